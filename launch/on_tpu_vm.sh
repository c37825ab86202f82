#!/bin/sh
# On every host of a TPU VM: sh NAME.sh start|status|stop|pack. Filled in and copied there by launch/tpu_vm.
NAME=
MOUNT=
RUN=
self=$HOME/$NAME.sh home=$HOME/$NAME place=$HOME/$NAME
[ -z "$MOUNT" ] || place=$HOME/$NAME-share
mkdir -p "$home" && cd "$home" || exit 1

alive() { [ -f pid ] && [ ! -f status ] && kill -0 "$(cat pid)" 2>/dev/null; }

mounted() {
    [ -z "$MOUNT" ] || mountpoint -q "$place" && return
    command -v mount.nfs >/dev/null || sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y nfs-common
    mkdir -p "$place" && sudo mount -t nfs "$MOUNT" "$place"
}

case $1 in
start)
    alive && exit 0
    rm -rf checkout status && tar -xzf "../$NAME-checkout.tar.gz" && mounted || exit 1
    [ -d "$place/$RUN" ] || tar -xzf "../$NAME-run.tar.gz" -C "$place" || exit 1
    nohup setsid sh "$self" run >>log 2>&1 </dev/null &
    echo $! >pid
    ;;
run) # in a session of its own, which outlives the connection
    trap : TERM
    checkout/launch/setup && cd "$place" && "$home/checkout/launch/local" EXPERIMENT
    echo $? >"$home/status.new" && mv "$home/status.new" "$home/status"
    ;;
status)
    if [ -f status ]; then
        echo "dlcourse: $(cat status)"
    elif alive; then
        echo "dlcourse: running"
    elif [ -f pid ]; then
        echo "dlcourse: lost"
    else
        echo "dlcourse: none"
    fi
    ;;
stop)
    alive || exit 0
    kill -TERM -"$(cat pid)"
    for second in $(seq 60); do
        [ -f status ] && break
        sleep 1
    done
    ;;
pack) # 1: a file changed while it was read, as those of a run do
    [ -d "$place/$RUN" ] || exit 0 # what was copied here is all there is
    tar -czf "../$NAME-run.tar.gz" -C "$place" "$RUN" || [ $? = 1 ]
    ;;
esac

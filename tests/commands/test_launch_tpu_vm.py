"""launch/tpu_vm against a gcloud that plays a machine's life: created, lost, made anew, failing, refused, deleted."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkout
import pytest
from checkout import launch
from commands import assert_mistake

HERE = Path(__file__).parent
WHAT = ["--type=v5litepod-8", "--zone=us-central1-a", "--every=0.2"]


@pytest.fixture
def cloud(tmp_path):
    """The variables of a user whose PATH has the stand-in for gcloud; `launch/local` on its machines is one too."""
    env = checkout.make(tmp_path)
    root = Path(env["LAUNCH"])
    (root / "local").write_text(f'#!/bin/sh\nname=$1\nshift\n'
                                f'exec {sys.executable} -S "$(dirname "$0")/../experiments/$name.py" "$@"\n')
    (root / "setup").write_text("#!/bin/sh\ntrue\n")
    program, fake = tmp_path / "bin/gcloud", tmp_path / "cloud"
    program.parent.mkdir()
    fake.mkdir()
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -S {HERE / 'fake_gcloud.py'} \"$@\"\n")
    program.chmod(0o755)
    return env | {"PATH": f"{program.parent}:{env['PATH']}", "FAKE_GCLOUD": str(fake)}


def play(cloud, tmp_path, plan, *words):
    """Runs the command under a plan; returns what it said and the verbs that gcloud was asked, in their order."""
    fake = Path(cloud["FAKE_GCLOUD"])
    (fake / "plan.json").write_text(json.dumps(plan))
    said = launch("tpu_vm", *words, cwd=tmp_path, env=cloud)
    assert "Traceback" not in said.stderr, said.stderr
    return said, [" ".join(shlex.split(line)[2:4]) for line in (fake / "calls").read_text().splitlines()]


def machines(cloud) -> dict:
    return json.loads((Path(cloud["FAKE_GCLOUD"]) / "state.json").read_text())


def starts(tmp_path) -> int:
    return len((tmp_path / "runs/x/starts-0").read_text().splitlines())


@pytest.mark.slow
def test_a_success_is_fetched_and_the_machine_deleted(cloud, tmp_path):
    said, calls = play(cloud, tmp_path, {}, *WHAT, "stub", "--workdir=runs/x")
    assert said.returncode == 0, said.stderr
    assert starts(tmp_path) == 1 and (tmp_path / "runs/x/result.json").exists()
    assert calls[-1] == "tpu-vm delete" and calls.count("tpu-vm create") == 1 and "now" not in machines(cloud)
    for word in ("state ", "follow ", "stop ", "results "):
        assert word in said.stderr


@pytest.mark.slow
def test_a_lost_machine_is_made_anew_and_the_run_goes_on(cloud, tmp_path):
    plan = {"preempt": [3, 3]}
    said, calls = play(cloud, tmp_path, plan, *WHAT, "--spot", "--retries=0", "stub", "--workdir=runs/x", "--waits=2")
    assert said.returncode == 0, said.stderr
    assert calls.count("queued-resources create") == 3 and calls.count("queued-resources delete") == 3
    assert starts(tmp_path) == 3, "each start found what the one before had left"
    assert "suspended" in said.stderr and "now" not in machines(cloud)


@pytest.mark.slow
@pytest.mark.parametrize(("end", "status", "count"), [("1", 1, 2), ("2", 2, 1), ("1,0", 0, 2), ("75,75,75,0", 0, 4)])
def test_failures_are_counted_mistakes_final_and_what_was_stopped_goes_on(end, status, count, cloud, tmp_path):
    said, calls = play(cloud, tmp_path, {}, *WHAT, "--retries=1", "stub", "--workdir=runs/x", f"--end={end}")
    assert (said.returncode, starts(tmp_path)) == (status, count), said.stderr
    assert calls.count("tpu-vm create") == 1 and "now" not in machines(cloud)


@pytest.mark.slow
def test_a_machine_that_is_told_to_stop_saves_and_goes_on(cloud, tmp_path):
    said, _ = play(cloud, tmp_path, {"stop": [3]}, *WHAT, "--retries=0", "stub", "--workdir=runs/x", "--waits=1")
    assert said.returncode == 0 and starts(tmp_path) == 2 and "saved after a signal" in said.stderr


@pytest.mark.slow
def test_a_refusal_is_one_line_and_nothing_is_left(cloud, tmp_path):
    plan = {"create": ["Quota 'TPUV5sLitepodPerProjectPerZone' exhausted. Limit 0"]}
    said, calls = play(cloud, tmp_path, plan, *WHAT, "stub")
    last = said.stderr.strip().splitlines()[-1]
    assert said.returncode == 2 and last.startswith("error: ") and "Quota" in last and "--zone" in last
    assert calls.count("tpu-vm create") == 1 and calls[-1] == "tpu-vm delete"


def test_without_an_account(cloud, tmp_path):
    said, calls = play(cloud, tmp_path, {"logged out": True}, *WHAT, "stub")
    assert_mistake(said, "active account", "gcloud auth login")
    assert calls == ["tpu-vm describe"]


@pytest.mark.slow
def test_no_room_is_tried_again(cloud, tmp_path):
    plan = {"create": ["There is no more capacity in the zone"] * 2}
    said, calls = play(cloud, tmp_path, plan, *WHAT, "--retries=2", "stub", "--workdir=runs/x")
    assert said.returncode == 0 and calls.count("tpu-vm create") == 3
    said, _ = play(cloud, tmp_path, {"create": ["no more capacity"] * 9}, *WHAT, "--retries=1", "stub")
    assert said.returncode == 1 and "now" not in machines(cloud)


@pytest.mark.slow
def test_a_machine_that_cannot_be_deleted_is_said_loudly(cloud, tmp_path):
    said, calls = play(cloud, tmp_path, {"delete": ["INTERNAL"]}, *WHAT, "stub", "--workdir=runs/x")
    assert said.returncode == 0 and calls.count("tpu-vm delete") == 2
    said, _ = play(cloud, tmp_path, {"delete": ["INTERNAL"] * 9}, *WHAT, "stub", "--workdir=runs/y")
    assert said.returncode == 1 and "MAY STILL BE RUNNING" in said.stderr and "tpu-vm delete" in said.stderr


@pytest.mark.slow
def test_a_kept_machine_is_found_again(cloud, tmp_path):
    words = [*WHAT, "--keep", "stub", "--workdir=runs/x"]
    said, calls = play(cloud, tmp_path, {}, *words)
    assert said.returncode == 0 and "costs money until: gcloud" in said.stderr and "tpu-vm delete" not in calls
    said, calls = play(cloud, tmp_path, {}, *words)
    assert said.returncode == 0 and calls.count("tpu-vm create") == 1
    assert starts(tmp_path) == 1, "what has ended is not started again"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_fetches_and_deletes(number, cloud, tmp_path):
    fake = Path(cloud["FAKE_GCLOUD"])
    (fake / "plan.json").write_text("{}")
    words = [f"{cloud['LAUNCH']}/tpu_vm", *WHAT, "stub", "--workdir=runs/x", "--waits=1"]
    with subprocess.Popen(words, cwd=tmp_path, env=cloud, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(fake.glob("host-0/*/runs/x/starts-0")) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(process.pid, number)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "goes on from there" in said, said
    assert starts(tmp_path) == 1 and "now" not in machines(cloud)
    assert "tpu-vm delete" in (fake / "calls").read_text()


@pytest.mark.slow
def test_a_killed_launcher_takes_its_machine_up_again(cloud, tmp_path):
    fake = Path(cloud["FAKE_GCLOUD"])
    (fake / "plan.json").write_text("{}")
    words = [*WHAT, "stub", "--workdir=runs/x", "--waits=1", "--seconds=4"]
    with subprocess.Popen([f"{cloud['LAUNCH']}/tpu_vm", *words], cwd=tmp_path, env=cloud) as process:
        while not list(fake.glob("host-0/*/runs/x/starts-0")):
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
    said, calls = play(cloud, tmp_path, {}, *words)
    assert said.returncode == 0 and starts(tmp_path) == 1 and calls.count("tpu-vm create") == 1


@pytest.mark.slow
def test_several_hosts_share_what_they_write_and_end_as_one(cloud, tmp_path):
    fake = Path(cloud["FAKE_GCLOUD"])
    (fake / "share").mkdir()
    for name, does in {"sudo": f'rmdir "$5" && ln -s {fake}/share "$5"', "mountpoint": 'test -L "$2"',
                       "mount.nfs": "true"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    words = ["--type=v4-16", "--zone=us-central1-a", "--every=0.2", "--mount=10.0.0.2:/share", "--spot", "--retries=0"]
    said, calls = play(cloud, tmp_path, {"hosts": 2, "preempt": [3]}, *words, "stub", "--workdir=runs/x", "--waits=2")
    assert said.returncode == 0, said.stderr
    assert starts(tmp_path) == 4 and calls.count("queued-resources create") == 2, "two hosts, each started twice"


def test_one_status_for_all_hosts():
    verdict = checkout.module("tpu_vm").verdict
    for ends, status in {"0 0": 0, "75 75": 75, "0 75": 75, "1 134": 134, "75 1 2": 2, "0 lost": 255}.items():
        assert verdict(ends.split()) == status, ends


GOLDEN = HERE / "golden"


@pytest.mark.parametrize("name", ["on_demand", "spot"])
def test_the_commands_are_those_on_file(name, cloud, tmp_path):
    words = [*WHAT[:2], "--project=mine", "--name=box", *(["--spot"] * (name == "spot"))]
    said = launch("tpu_vm", "--dry-run", *words, "classification", "--dataset=folder:a b", cwd=tmp_path, env=cloud)
    assert said.stdout == (GOLDEN / f"tpu_vm_{name}.txt").read_text()


@pytest.mark.parametrize(("words", "says"), [
    (["stub"], ["--type"]), (["--type=v5litepod-8", "stub"], ["--zone"]),
    (["--type=v9-8", "--zone=z", "stub"], ["--type=v9-8", "v6e-N"]),
    (["--type=v4-32", "--zone=z", "stub"], ["4 hosts", "--mount"]),
    (["--typ=v4-8", "stub"], ["--typ=v4-8", "did you mean --type"]),
    (["--spot=yes", "stub"], ["--spot=yes", "did you mean --spot"]),
    ([*WHAT, "--retries=many", "stub"], ["--retries=many"]),
    ([*WHAT, "--name=A b", "stub"], ["--name=A b"]),
    ([*WHAT, "stubb"], ["stubb", "did you mean stub"]),
    ([*WHAT, "stub", "--workdir=/tmp/x"], ["--workdir=/tmp/x", "runs/"])])
def test_a_mistake_is_one_line(words, says, cloud, tmp_path):
    assert_mistake(launch("tpu_vm", *words, cwd=tmp_path, env=cloud), *says)
    assert not (Path(cloud["FAKE_GCLOUD"]) / "calls").exists()


def test_without_gcloud(cloud, tmp_path):
    said = launch("tpu_vm", *WHAT, "stub", cwd=tmp_path, env=cloud | {"PATH": str(checkout.tools(tmp_path / "tools"))})
    assert_mistake(said, "gcloud is not on PATH", "install the Google Cloud CLI")

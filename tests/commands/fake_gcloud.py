"""A stand-in for gcloud: TPU VMs are folders, and what happens to them is written in a plan.

In the folder $FAKE_GCLOUD: plan.json, calls (one a line), state.json, and host-N/, the home folders of the machine.
The plan: "hosts"; "create", "delete": outcomes of the next calls, "" for success, else the error; "preempt": after how
many looks (from when it was ready) each machine is taken away; "stop": likewise, its experiment gets SIGTERM;
"logged out": true.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(os.environ["FAKE_GCLOUD"])


def main(words: list[str]) -> None:
    with open(HERE / "calls", "a") as calls:
        print(shlex.join(words), file=calls)
    assert words[:2] == ["compute", "tpus"] and "--quiet" in words and "--zone=us-central1-a" in words, words
    plan, state = json.loads((HERE / "plan.json").read_text()), read()
    flags = dict(word[2:].partition("=")[::2] for word in words[4:] if word.startswith("--"))
    things = [word for word in words[4:] if not word.startswith("--")]
    group, verb = words[2:4]
    do = {"create": create, "describe": describe, "delete": delete, "ssh": ssh, "scp": scp}[verb]
    do(plan, state, flags, things, group)


def read() -> dict:
    return json.loads((HERE / "state.json").read_text()) if (HERE / "state.json").exists() else {"machines": 0}


def write(state: dict) -> None:
    """Whole or not at all: this process may be killed."""
    (HERE / "state.new").write_text(json.dumps(state))
    os.replace(HERE / "state.new", HERE / "state.json")


def fail(message: str, status: int = 1) -> None:
    print(f"ERROR: (gcloud.compute.tpus) {message}\nmore words", file=sys.stderr)
    sys.exit(status)


def outcome(plan: dict, state: dict, verb: str) -> None:
    """The next planned outcome of this verb."""
    done = state.setdefault(verb, 0)
    state[verb] += 1
    write(state)
    planned = plan.get(verb, [])
    if done < len(planned) and planned[done]:
        fail(planned[done])


def hosts() -> list[Path]:
    return sorted(HERE.glob("host-*"))


def create(plan, state, flags, things, group) -> None:
    if "now" in state:
        fail("ALREADY_EXISTS")
    outcome(plan, state, "create")
    state |= {"now": "WAITING_FOR_RESOURCES" if group == "queued-resources" else "READY", "looks": 0, "group": group}
    state["machines"] += 1
    for host in range(plan.get("hosts", 1)):
        (HERE / f"host-{host}").mkdir()
    write(state)


def describe(plan, state, flags, things, group) -> None:
    if plan.get("logged out"):
        fail("You do not currently have an active account selected.")
    if "now" not in state:
        fail("NOT_FOUND: Resource was not found")
    if state["now"] == "WAITING_FOR_RESOURCES" and state["looks"]:
        state |= {"now": "ACTIVE", "looks": 0}
    state["looks"] += group == state["group"]
    for event in ("preempt", "stop"):
        when = plan.get(event, [])[state["machines"] - 1:state["machines"]]
        if state["now"] in ("ACTIVE", "READY") and when and state["looks"] == when[0] and group == state["group"]:
            kill(signal.SIGTERM if event == "stop" else signal.SIGKILL)
            state["now"] = state["now"] if event == "stop" else "SUSPENDED"
    write(state)
    print("READY" if group == "tpu-vm" and state["now"] == "ACTIVE" else state["now"])


def kill(how: int) -> None:
    for pid in HERE.glob("host-*/*/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), how)


def delete(plan, state, flags, things, group) -> None:
    outcome(plan, state, "delete")
    if "now" not in state:
        fail("NOT_FOUND: Resource was not found")
    assert group == state["group"] and ("force" in flags) == (group == "queued-resources")
    kill(signal.SIGKILL)
    for host in hosts():
        shutil.rmtree(host)
    del state["now"]
    write(state)


def chosen(state: dict, flags: dict) -> list[Path]:
    if state.get("now") not in ("ACTIVE", "READY"):
        fail("ssh: connect to host: Connection timed out", 255)
    return hosts() if flags["worker"] == "all" else [hosts()[int(flags["worker"])]]


def ssh(plan, state, flags, things, group) -> None:
    words = ["sh", "-c", flags["command"]]
    statuses = [subprocess.run(words, cwd=host, env=os.environ | {"HOME": str(host)}).returncode
                for host in chosen(state, flags)]
    sys.exit(next((status for status in statuses if status), 0))


def scp(plan, state, flags, things, group) -> None:
    *sources, target = things
    for host in chosen(state, flags):
        def place(name, host=host):
            return re.sub(r"^[a-z0-9-]+:", f"{host}/", name)

        for source in sources:
            shutil.copy(place(source), place(target))


if __name__ == "__main__":
    main(sys.argv[1:])

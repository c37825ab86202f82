"""A Cloud TPU VM as gcloud makes, finds and deletes it; on demand, or spot through a queued resource."""

from __future__ import annotations

import re
import subprocess
import time
from typing import NamedTuple

from command_line import Mistake, say

RUNTIMES = {"v2": "tpu-ubuntu2204-base", "v3": "tpu-ubuntu2204-base", "v4": "tpu-ubuntu2204-base",
            "v5litepod": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
"""The software of the VM for each kind of TPU."""
READY, NONE, UNKNOWN = "READY", "NONE", "UNKNOWN"
COMING = ("CREATING", "STARTING", "RESTARTING", "REPAIRING", "ACCEPTED", "PROVISIONING", "WAITING_FOR_RESOURCES")
REFUSED = re.compile("quota|PERMISSION_DENIED|INVALID_ARGUMENT|NOT_FOUND|UNAUTHENTICATED|active account|"
                     "credentials|not properly specified", re.IGNORECASE)
"""Answers to a wish that waiting does not change."""
PATIENCE = 900
"""Seconds that one call of gcloud may take."""


class Lost(Exception):
    """The machine was taken away."""


class Broken(Exception):
    """Something failed that may work at the next try."""


class Machine(NamedTuple):
    """A TPU VM, of one or several hosts (workers); its commands, and what gcloud says of it."""

    name: str
    type: str
    zone: str
    project: str
    runtime: str
    spot: bool
    pause: float
    """Seconds between two looks."""

    def gcloud(self, group: str, *words: str) -> list[str]:
        where = [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else []), "--quiet"]
        return ["gcloud", "compute", "tpus", group, *words, *where]

    @property
    def hosts(self) -> int:
        """Up to -8 is one host; larger slices have hosts of four chips, which count as two cores each in v2 to v5p."""
        kind, _, size = self.type.partition("-")
        return 1 if int(size) <= 8 else int(size) // (4 if kind in ("v5litepod", "v6e") else 8)

    def create_command(self) -> list[str]:
        if self.spot:
            return self.gcloud("queued-resources", "create", self.name, f"--node-id={self.name}",
                               f"--accelerator-type={self.type}", f"--runtime-version={self.runtime}", "--spot")
        what = [f"--accelerator-type={self.type}", f"--version={self.runtime}"]
        return self.gcloud("tpu-vm", "create", self.name, *what)

    def delete_command(self) -> list[str]:
        if self.spot:
            return self.gcloud("queued-resources", "delete", self.name, "--force")
        return self.gcloud("tpu-vm", "delete", self.name)

    def state_commands(self) -> list[list[str]]:
        node = self.gcloud("tpu-vm", "describe", self.name, "--format=value(state)")
        queued = self.gcloud("queued-resources", "describe", self.name, "--format=value(state.state)")
        return [queued, node] if self.spot else [node]

    def ssh_command(self, command: str, worker: str = "all") -> list[str]:
        return self.gcloud("tpu-vm", "ssh", self.name, f"--worker={worker}", f"--command={command}")

    def copy_command(self, *words: str, worker: str) -> list[str]:
        return self.gcloud("tpu-vm", "scp", *words, f"--worker={worker}")

    def look(self) -> tuple[str, str]:
        """READY, NONE (there is no such machine), UNKNOWN (no answer), one of COMING, or how it was lost; and why."""
        for command in self.state_commands():
            done = call(command)
            if done.returncode:
                return (NONE if "NOT_FOUND" in done.stderr else UNKNOWN), done.stderr
            said = done.stdout.strip()
            if said not in (READY, "ACTIVE"):
                return said or UNKNOWN, ""
        return READY, ""

    def check_access(self) -> None:
        """Refuses to begin where gcloud has no account or no project to ask with."""
        state, why = self.look()
        if state == UNKNOWN and REFUSED.search(why):
            raise Mistake(f"gcloud cannot be asked about --zone={self.zone}: {reason(why)} (`gcloud auth login`, "
                          "--project=ID or `gcloud config set project ID`)")

    def do(self, command: list[str]) -> str:
        """What a command for the machine prints; where it fails, whether the machine was lost or something broke."""
        done = call(command)
        if not done.returncode:
            return done.stdout
        state, _ = self.look()
        if state not in (READY, UNKNOWN, *COMING):
            raise Lost(state)
        raise Broken(f"{' '.join(command[3:6])}: {reason(done.stderr)}")

    def ensure(self) -> None:
        """Returns when the machine is ready, creating it where there is none."""
        created, told, silent = False, "", 0
        while (state := self.look())[0] != READY:
            state, why = state
            if state != told:
                say(f"{self.name}: {state.lower()}")
                told = state
            silent = silent + 1 if state == UNKNOWN else 0
            if silent > 10:
                raise Broken(f"gcloud does not say how {self.name} is: {reason(why)}")
            if state == NONE and created:
                raise Broken("the machine was created and is not there")
            if state == NONE:
                self.create()
                created = True
            elif state in COMING or state == UNKNOWN:
                time.sleep(self.pause)
            else:
                self.delete()
                if created:
                    raise Broken(f"the machine was {state} before it was ready")

    def create(self) -> None:
        say(f"{self.name}: creating {self.type} in {self.zone}")
        done = call(self.create_command())
        if done.returncode and REFUSED.search(done.stderr):
            what = f"--type={self.type} in --zone={self.zone}"
            raise Mistake(f"gcloud refused {what}: {reason(done.stderr)}; see `gcloud auth list`, the project's quota, "
                          "and `gcloud compute tpus accelerator-types list`")
        if done.returncode:
            raise Broken(f"could not be created: {reason(done.stderr)}")

    def delete(self) -> bool:
        """Deletes the machine, if it is there; whether it is gone."""
        for attempt in range(3):
            if attempt:
                time.sleep(self.pause)
            done = call(self.delete_command())
            if not done.returncode or "NOT_FOUND" in done.stderr:
                return True
        say(f"could not be deleted: {reason(done.stderr)}")
        return False


def call(command: list[str]) -> subprocess.CompletedProcess:
    """Runs a command to its end, which is a failure after PATIENCE."""
    try:
        return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {PATIENCE} s")


def reason(text: str) -> str:
    """What gcloud's many lines say in one: the error, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason given"]
    return next((line for line in lines if line.startswith("ERROR")), lines[-1])

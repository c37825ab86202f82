"""Runs an experiment on a Cloud TPU VM that is made for it and deleted after it. Called by launch/tpu_vm.

usage: launch/tpu_vm [machine flags] EXPERIMENT [--flag=value ...]

machine flags, before EXPERIMENT:
  --type=TYPE        the accelerator, such as v5litepod-8, v6e-8 or v4-32
  --zone=ZONE        where, such as us-central1-a
  --project=ID       whose project; default gcloud's own
  --spot             a cheap machine that may be taken away at any time: it is then made anew, and the run goes on
  --name=NAME        of the machine; default made from the command, so that the same command finds it again
  --runtime=VERSION  the machine's software; default the one for its kind of TPU
  --mount=HOST:/DIR  an NFS share that holds the run; needed where TYPE has several hosts
  --retries=N        how often an experiment that failed is started again; default 3
  --every=SECONDS    how often to look at the machine and to fetch the run; default 60
  --keep             leave the machine running at the end
  --dry-run          print the script and the commands, and stop
  --help             show this and stop; after EXPERIMENT, show the experiment's flags

The run's folder is fetched while it grows: what a lost machine had saved later than that is computed again. Where this
program itself was killed, the machine stays, and the same command takes it up again.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import signal
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import command_line
import travel
from command_line import DONE, FAILED, MISTAKE, STOPPED, Mistake, say
from tpu_machine import COMING, READY, RUNTIMES, UNKNOWN, Broken, Lost, Machine

LINGER = 600
"""Seconds that the other hosts may take to end after the first one."""


class Stop(BaseException):
    """A signal told this program to end."""


class Job(NamedTuple):
    """An experiment on a machine."""

    machine: Machine
    words: list[str]
    folder: str
    mount: str
    retries: int

    @property
    def on_machine(self) -> str:
        """The command that does `verb` on the machine is this and the verb."""
        return f"sh {self.machine.name}.sh"

    def script(self) -> str:
        text = (Path(__file__).parent / "on_tpu_vm.sh").read_text(encoding="utf-8")
        values = {"NAME": self.machine.name, "MOUNT": self.mount, "RUN": self.folder}
        text = re.sub(r"^(NAME|MOUNT|RUN)=.*$", lambda found: f"{found[1]}={shlex.quote(values[found[1]])}", text,
                      flags=re.MULTILINE)
        return text.replace("EXPERIMENT", shlex.join(self.words))

    def copies(self, folder: str) -> list[str]:
        name = self.machine.name
        files = [f"{folder}/{name}{end}" for end in (".sh", "-checkout.tar.gz", "-run.tar.gz")]
        return self.machine.copy_command(*files, f"{name}:", worker="all")

    def fetches(self, folder: str) -> tuple[list[str], list[str]]:
        name = self.machine.name
        return (self.machine.ssh_command(f"{self.on_machine} pack", worker="0"),
                self.machine.copy_command(f"{name}:{name}-run.tar.gz", f"{folder}/run.tar.gz", worker="0"))

    def start(self) -> None:
        """Copies checkout and run to the machine and starts the experiment, where it is not running already."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, f"{self.machine.name}.sh").write_text(self.script(), encoding="utf-8")
            travel.pack_checkout(Path(folder, f"{self.machine.name}-checkout.tar.gz"))
            travel.pack_run(Path("/nowhere" if self.mount else self.folder),  # a share keeps it
                            Path(folder, f"{self.machine.name}-run.tar.gz"))
            self.machine.do(self.copies(folder))
        self.machine.do(self.machine.ssh_command(f"{self.on_machine} start"))

    def statuses(self) -> list[str]:
        """Of every host: "running", "none" (never started), "lost" (ended without a word) or an exit status."""
        command = self.machine.ssh_command(f"{self.on_machine} status 2>/dev/null || echo dlcourse: none")
        return re.findall(r"^dlcourse: (\w+)$", self.machine.do(command), re.MULTILINE)

    def watch(self) -> int:
        """Looks on until all hosts have ended; returns how."""
        first_end = None
        while True:
            state, _ = self.machine.look()
            if state not in (READY, UNKNOWN, *COMING):  # coming: maintenance, after which it is there again
                raise Lost(state)
            ends = self.statuses() if state == READY else []
            ended = [end for end in ends if end != "running"]
            if len(ended) >= self.machine.hosts:
                return verdict(ended)
            first_end = (first_end or time.monotonic()) if ended else None
            if first_end and time.monotonic() - first_end > LINGER:
                self.machine.do(self.machine.ssh_command(f"{self.on_machine} stop"))
            time.sleep(self.machine.pause)
            if ends and not self.mount:
                with contextlib.suppress(Broken):
                    self.fetch()

    def fetch(self) -> None:
        """Brings the run's folder here."""
        with tempfile.TemporaryDirectory() as folder:
            for command in self.fetches(folder):
                self.machine.do(command)
            travel.unpack_run(Path(folder, "run.tar.gz"), Path(self.folder))

    def stop(self) -> None:
        """Lets the experiment save and brings the run here."""
        self.machine.do(self.machine.ssh_command(f"{self.on_machine} stop"))
        self.fetch()

    def tail(self) -> str:
        with contextlib.suppress(Broken, Lost):
            return self.machine.do(self.machine.ssh_command(f"tail -n 20 {self.machine.name}/log", worker="0"))
        return ""


def main(words: list[str]) -> int:
    machine, rest = command_line.words_or_help(words, __doc__)
    job = job_of(machine, rest)
    if "dry-run" in machine:
        dry_run(job)
        return DONE
    command_line.tool("gcloud", command_line.GET_GCLOUD)
    job.machine.check_access()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    tell(job)
    status = FAILED
    try:
        status = drive(job)
    except Stop:
        say("stopping: the experiment saves, the run is fetched; once more to skip that")
        with contextlib.suppress(Broken, Lost, Stop):
            if job.machine.look()[0] == READY:
                job.stop()
        status = STOPPED
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        status = end(job, "keep" in machine, status)
    return status


def stop(*_) -> None:
    raise Stop


def job_of(machine: dict[str, str], rest: list[str]) -> Job:
    kind = command_line.need(machine, "type", "name an accelerator, such as --type=v5litepod-8").lower()
    found = re.fullmatch(rf"({'|'.join(RUNTIMES)})-(\d+)", kind)
    if not found:
        raise Mistake(f"--type={kind}: unknown; give one of {', '.join(f'{name}-N' for name in RUNTIMES)} "
                      "(later TPUs are to be had through launch/gke)")
    name = command_line.name_of(machine, rest)
    spot, project, pause = "spot" in machine, machine.get("project", ""), command_line.seconds(machine, "every", 60)
    zone = command_line.need(machine, "zone", "name a zone that has it, such as --zone=us-central1-a")
    made = Machine(name, kind, zone, project, machine.get("runtime", RUNTIMES[found[1]]), spot, pause)
    mount = machine.get("mount", "")
    if mount and not re.fullmatch(r"[\w.-]+:/[\w./-]*", mount):
        raise Mistake(f"--mount={mount}: give HOST:/DIR of an NFS share")
    if made.hosts > 1 and not mount:
        raise Mistake(f"--type={kind} has {made.hosts} hosts, which save together: name an NFS share that all reach, "
                      "such as a Filestore instance, with --mount=HOST:/DIR")
    words, folder = command_line.in_folder(rest, name)
    if made.hosts > 1:  # one host may be ready long before another
        words = [*words, "--coordinator_timeout=1800"]
    return Job(made, words, folder, mount, command_line.count(machine, "retries", 3, least=0))


def drive(job: Job) -> int:
    """Makes machines and starts the experiment until it is over; returns its status."""
    failures, adopt = 0, True
    while True:
        try:
            job.machine.ensure()
            # It may run already: started by an earlier call of this command, or before the connection broke.
            if not (adopt and any(end != "none" for end in job.statuses())):
                job.start()
            adopt = False
            status = job.watch()
            job.fetch()
            if status in (DONE, MISTAKE):
                return status
            if status == STOPPED:
                say(f"{job.machine.name}: saved after a signal; starting again")
                continue
            reason = f"failed with status {status}"
        except Lost as lost:
            say(f"{job.machine.name}: {str(lost).lower()}; making it anew, the run goes on from what was fetched")
            job.machine.delete()
            continue
        except Broken as broken:
            reason, adopt = str(broken), True
        failures += 1
        if failures > job.retries:
            say(f"{job.machine.name}: {reason}; given up\n{job.tail()}")
            return FAILED
        say(f"{job.machine.name}: {reason}; starting again ({failures} of {job.retries})")
        time.sleep(job.machine.pause)


def verdict(ends: list[str]) -> int:
    """One status for all hosts: a mistake or a failure of one is that of all."""
    numbers = [int(end) if end.isdecimal() else 255 for end in ends]
    return MISTAKE if MISTAKE in numbers else max(numbers)


def end(job: Job, keep: bool, status: int) -> int:
    """Deletes the machine, or says how to."""
    delete = shlex.join(job.machine.delete_command())
    if keep:
        say(f"{job.machine.name} is kept and costs money until: {delete}")
    elif not job.machine.delete():
        say(f"{job.machine.name} MAY STILL BE RUNNING AND COST MONEY; delete it by: {delete}")
        return status or FAILED
    words = {DONE: "done", MISTAKE: "a mistake in the command", STOPPED: "stopped; the same command goes on from there"}
    say(f"{words.get(status, 'failed')}; the run: {job.folder}")
    return status


def tell(job: Job) -> None:
    log = job.machine.ssh_command(f"tail -F {job.machine.name}/log", worker="0")
    say(f"""{job.machine.name}: {shlex.join(job.words)}
  state    {shlex.join(job.machine.state_commands()[0])}
  follow   {shlex.join(log)}
  stop     Ctrl-C here: it saves, the run is fetched, the machine is deleted
  results  {job.folder}, fetched while it grows""")


def dry_run(job: Job) -> None:
    name = job.machine.name
    print(f"# --- {name}.sh, on the machine", job.script(), "# --- commands", sep="\n")
    steps = [job.machine.create_command(), *job.machine.state_commands(), job.copies("TMP"),
             *(job.machine.ssh_command(f"{job.on_machine} {verb}") for verb in ("start", "status")),
             *job.fetches("TMP"), job.machine.delete_command()]
    print(*map(shlex.join, steps), sep="\n")


if __name__ == "__main__":
    command_line.start(main)

"""Submits an experiment to a SLURM cluster: one job, or an array of them. Called by launch/slurm.

usage: launch/slurm [machine flags] EXPERIMENT [--flag=value ...]

machine flags, before EXPERIMENT:
  --nodes=N          how many nodes; default 1
  --gpus=N           GPUs on each node, each with a process of its own; default 0
  --processes=N      processes on each node of a job without GPUs; default 1
  --time=LIMIT       as sbatch takes it; 90 s before it ends the experiment saves, and the job is queued again
  --partition=NAME   where to queue; default the cluster's own
  --account=NAME     whom to charge
  --qos=NAME         quality of service
  --sbatch=FLAGS     any other flags of sbatch, such as --sbatch="--constraint=a100 --mem=64G"
  --sweep=FILE       an array of jobs, one a line of FILE, which holds the experiment flags of that job
  --retries=N        how often a job that failed is started again; default 3
  --python=PROGRAM   the Python to build the environment with
  --venv=PATH        where the environment lives; compute nodes must see it too
  --with=EXTRA,...   also install these extras; --gpus brings cuda
  --dry-run          print the job script and the commands, and stop
  --help             show this and stop; after EXPERIMENT, show the experiment's flags

The checkout and the folder you are in must be visible to the compute nodes. The environment is made here, before
submitting, since compute nodes often have no network.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import command_line
import environment
from command_line import MISTAKE, ROOT, STOPPED, Mistake, say

LOGS = "runs/slurm"
PASSED_ON = ("nodes", "time", "partition", "account", "qos")
BODY = """
# {done} done, {mistake} a mistake: final. {stopped} saved after a signal: queued again, without limit. Else a failure.
failures={logs}/{name}-$SLURM_JOB_ID.failures
while :; do
    {check}srun --kill-on-bad-exit=0 --wait=600 {command} "$@"
    status=$?
    case $status in
    {done} | {mistake}) break ;;
    {stopped})
        echo "launch/slurm: saved after a signal; queued again"
        scontrol requeue "$SLURM_JOB_ID" || echo "launch/slurm: submit it again, with the same command"
        exit {stopped}
        ;;
    esac
    echo "$status" >>"$failures"
    failed=$(wc -l <"$failures")
    [ "$failed" -le {retries} ] || break
    echo "launch/slurm: failed with status $status; starting again ($failed of {retries})"
done
rm -f "$failures"
exit $status
"""
# Not killed on a bad exit: processes that save after a signal do not leave at the same moment. An experiment ends all
# its processes when one dies; --wait is for those that cannot even do that.


def main(words: list[str]) -> None:
    machine, rest = command_line.words_or_help(words, __doc__)
    text, wanted = script(machine, rest), environment.wanted(machine | extras(machine), rest[0])
    if "dry-run" in machine:
        print(f"# --- {LOGS}/{rest[0]}.sh", text.rstrip(), "# --- commands", f"sbatch {LOGS}/{rest[0]}.sh", sep="\n")
        return
    command_line.tool("sbatch", "run this on a login node of the cluster, or try the experiment with launch/local")
    environment.keep(*wanted)
    Path(LOGS).mkdir(parents=True, exist_ok=True)
    file = Path(LOGS, f"{rest[0]}.sh")
    file.write_text(text)
    said = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True)
    if said.returncode:
        raise Mistake(f"sbatch refused the job: {' '.join(said.stderr.split())}")
    tell(said.stdout.strip().partition(";")[0], machine, rest)


def tell(job: str, machine: dict[str, str], rest: list[str]) -> None:
    log = f"{LOGS}/{rest[0]}-{job}{'_*' if 'sweep' in machine else ''}.out"
    say(f"""submitted job {job}: {shlex.join(rest)}
  state    squeue --job={job}
  follow   tail -F {log}
  stop     scancel {job}    (it saves and is not queued again; the same command goes on from there)
  results  below runs/, as with launch/local; the log names the folder""")


def script(machine: dict[str, str], rest: list[str]) -> str:
    """The text of the job script."""
    nodes, gpus = command_line.count(machine, "nodes", 1), command_line.count(machine, "gpus", 0, least=0)
    processes = command_line.count(machine, "processes", gpus or 1)
    if gpus and processes != gpus:
        raise Mistake(f"--processes={processes} contradicts --gpus={gpus}: each process takes one GPU; leave it out")
    lines = tasks(machine["sweep"], rest) if "sweep" in machine else []
    header = {"job-name": rest[0], "nodes": nodes, "ntasks-per-node": processes, "signal": "TERM@90", "requeue": None,
              "open-mode": "append", "output": f"{LOGS}/%x-{'%A_%a' if lines else '%j'}.out"}
    header |= {"gres": f"gpu:{gpus}"} if gpus else {}
    header |= {"array": f"0-{len(lines) - 1}"} if lines else {}
    header |= {name: machine[name] for name in PASSED_ON if name in machine}
    head = ["#!/bin/sh",
            *(f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in header.items()),
            *(f"#SBATCH {flag}" for flag in further(machine.get("sbatch", "")))]
    if lines:
        head += ["", "case $SLURM_ARRAY_TASK_ID in",
                 *(f"{index}) set -- {shlex.join(flags)} ;;" for index, flags in enumerate(lines)), "esac"]
    body = BODY.format(
        done=command_line.DONE, mistake=MISTAKE, stopped=STOPPED, logs=LOGS, name=rest[0], retries=retries(machine),
        check=device_check(machine, nodes, gpus) if gpus else "", command=shlex.join(local(machine, rest)))
    return "\n".join(head) + "\n" + body


def further(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise Mistake(f"--sbatch={text}: {error}") from None


def retries(machine: dict[str, str]) -> int:
    return command_line.count(machine, "retries", 3, least=0)


def device_check(machine: dict[str, str], nodes: int, gpus: int) -> str:
    """Refuses to run where JAX does not see the GPUs that were asked for: it would silently use fewer, or the CPU."""
    doctor = shlex.join(local(machine, ["doctor", f"--devices={gpus}"]))
    return f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 {doctor} &&\n    "


def extras(machine: dict[str, str]) -> dict[str, str]:
    """--with, which GPUs bring by themselves."""
    given = set(filter(None, machine.get("with", "").split(",")))
    return {"with": ",".join(sorted(given | ({"cuda"} if machine.get("gpus", "0") != "0" else set())))}


def local(machine: dict[str, str], rest: list[str]) -> list[str]:
    """The command on a compute node."""
    with_extras = {name: value for name, value in extras(machine).items() if value}
    kept = {name: machine[name] for name in ("python", "venv") if name in machine} | with_extras
    return [str(ROOT / "launch/local"), *(f"--{name}={value}" for name, value in kept.items()), *rest]


def tasks(file: str, rest: list[str]) -> list[list[str]]:
    """The experiment flags of every job of a sweep."""
    try:
        text = Path(file).read_text(encoding="utf-8")
        found = [shlex.split(line, comments=True) for line in text.splitlines()]
    except (OSError, ValueError) as error:  # unreadable, or a quotation without its end
        raise Mistake(f"--sweep={file}: {getattr(error, 'strerror', error)}; give a file with flags") from None
    found = [flags for flags in found if flags]
    wrong = [word for flags in found for word in flags if not word.startswith("-")]
    if wrong or not found:
        raise Mistake(f"--sweep={file}: {wrong[0] if wrong else 'empty'}; a line holds flags such as --seed=1")
    if any(re.match("--?workdir", word) for word in rest):
        raise Mistake(f"--sweep={file}: all its jobs would share one --workdir; leave it out, or give it line by line")
    return found


if __name__ == "__main__":
    command_line.start(main)

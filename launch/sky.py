"""Runs an experiment by SkyPilot, on the cloud and region that has room or is cheapest. Called by launch/sky.

usage: launch/sky [machine flags] EXPERIMENT [--flag=value ...]

machine flags, before EXPERIMENT:
  --accelerators=WHAT  such as H100:8 or tpu-v5litepod-8, as `sky show-gpus` lists them
  --bucket=URI       where the run is written: gs://NAME or s3://NAME, which must be there
  --infra=WHERE      such as gcp/us-central1; default wherever it is to be had
  --nodes=N          how many machines; default 1
  --spot             cheap machines that may be taken away: SkyPilot finds others, and the run goes on
  --runtime=VERSION  the software of a TPU VM; default the one for its kind of TPU
  --name=NAME        of the job; default made from the command
  --retries=N        how often an experiment that failed is started again; default 3
  --dry-run          print the file and the commands, and stop
  --help             show this and stop; after EXPERIMENT, show the experiment's flags

The job is SkyPilot's to watch from then on (a managed job): this machine may be switched off.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import command_line
import yaml_text
from command_line import DONE, MISTAKE, ROOT, STOPPED, Mistake, say
from tpu_machine import RUNTIMES

PORT = 8476
PROCESSES = f"""processes="--coordinator=$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{PORT}"
processes="$processes --num_processes=$SKYPILOT_NUM_NODES --process_id=$SKYPILOT_NODE_RANK"
processes="$processes --coordinator_timeout=1800"  # one may be ready long before another
"""
RUN = """checkout=$PWD
cd /bucket
{processes}failed=0
while :; do
    "$checkout/launch/local" {command}{more}
    status=$?
    case $status in {done} | {mistake} | {stopped}) exit $status ;; esac
    failed=$((failed + 1))
    [ "$failed" -le {retries} ] || exit $status
    echo "launch/sky: failed with status $status; starting again ($failed of {retries})"
done
"""
# The loop is here since SkyPilot's max_restarts_on_errors would start a mistake again too.


def main(words: list[str]) -> None:
    machine, rest = command_line.words_or_help(words, __doc__)
    name = command_line.name_of(machine, rest)
    rest, folder = command_line.in_folder(rest, name)
    text = yaml_text.dump(task(machine, rest, name)) + "\n"
    file = Path("runs/sky", f"{name}.yaml")
    launch = ["sky", "jobs", "launch", "--yes", "--detach-run", str(file)]
    if "dry-run" in machine:
        print(f"# --- {file}", text + "# --- commands", shlex.join(launch), sep="\n")
        return
    command_line.tool("sky", "pip install 'skypilot[gcp]' (or [aws], …) in an environment of its own, then `sky check`")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    source = f"{machine['bucket']}/{folder}"
    fetch = f"gcloud storage rsync --recursive {source} {folder}" if source.startswith("gs") else \
        f"aws s3 sync {source} {folder}"
    say(f"""{name}: {shlex.join(rest)}
  state    sky jobs queue
  follow   sky jobs logs -n {name}
  stop     sky jobs cancel -n {name}    (the same command goes on from the last checkpoint)
  results  {fetch}""")
    os.execvp(launch[0], launch)


def task(machine: dict[str, str], rest: list[str], name: str) -> dict:
    """The job as SkyPilot takes it."""
    accelerators = command_line.need(machine, "accelerators", "such as --accelerators=H100:8 or tpu-v5litepod-8")
    if not re.fullmatch(r"[\w.-]+(:\d+)?", accelerators):
        raise Mistake(f"--accelerators={accelerators}: give KIND or KIND:COUNT, such as H100:8")
    nodes, retries = command_line.count(machine, "nodes", 1), command_line.count(machine, "retries", 3, least=0)
    resources = {"infra": machine["infra"]} if "infra" in machine else {}
    resources |= {"accelerators": accelerators}
    tpu = re.fullmatch(rf"tpu-({'|'.join(RUNTIMES)})-\d+", accelerators)
    if tpu:
        resources |= {"accelerator_args": {"runtime_version": machine.get("runtime", RUNTIMES[tpu[1]])}}
    elif "runtime" in machine:
        raise Mistake(f"--runtime={machine['runtime']} has no meaning for --accelerators={accelerators}; leave it out")
    recovery = {"max_restarts_on_errors": 0, "recover_on_exit_codes": [STOPPED]}
    resources |= {"use_spot": "spot" in machine, "job_recovery": recovery}
    run = RUN.format(command=shlex.join(rest), retries=retries, done=DONE, mistake=MISTAKE, stopped=STOPPED,
                     processes=PROCESSES if nodes > 1 else "", more=" $processes" if nodes > 1 else "")
    source = command_line.bucket(machine, ("gs", "s3"))
    return {"name": name, "workdir": str(ROOT), "num_nodes": nodes, "resources": resources,
            "file_mounts": {"/bucket": {"source": source, "mode": "MOUNT"}}, "setup": "launch/setup\n", "run": run}


if __name__ == "__main__":
    command_line.start(main)

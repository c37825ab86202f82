"""Is this machine fit to run experiments? Each line says ok, warn or fail, and what to do.

Looks at versions and how they fit, devices seen against devices present, what SLURM, TPU and Kubernetes say, a step on
every device with an all-reduce, room and rights on disk, data sets, the compilation cache. Ends with status 0, or 2
where something failed.

    launch/doctor [--devices=N] [--dataset=NAME] [--workdir=PATH]        under 10 s on a CPU
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dlcourse.contracts import InputError
from experiments import command, parsing, settings
from experiments.doctor_machine import REPAIR, Finding, cache, disk, drivers, surroundings, versions

MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
PATIENCE = 90
"""Seconds until a device that does not answer is given up."""


@dataclasses.dataclass(frozen=True)
class Config:
    devices: int = settings.setting(0, "fail unless JAX sees this many devices here; 0 asks for no number")
    dataset: str = settings.setting("digits", "the data set to look for, as experiments take it")
    workdir: str = settings.setting("", "the folder that a run would write to; default runs/ here")


def main(argv: list[str]) -> int:
    if {"--help", "-h"} & set(argv):
        print(parsing.help_text(Config(), "doctor", __doc__))
        return command.DONE
    try:
        config, _ = parsing.parse(Config(), argv)
        if config.devices < 0:
            raise InputError(f"--devices={config.devices}: give the number of devices, or 0")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return command.MISTAKE
    return examine(config.workdir or "runs", config.dataset, config.devices)


def examine(workdir: str, dataset: str, devices: int = 0) -> int:
    """Prints all findings as they come; returns 0, or 2 where something failed."""
    failed = warned = 0
    for finding in findings(workdir, dataset, devices):
        print(f"{MARKS[finding.level]}  {finding.what:<10}  {finding.said}", flush=True)
        if finding.level != "ok":
            print(f"{'':18}-> {finding.way}", flush=True)
        failed, warned = failed + (finding.level == "fail"), warned + (finding.level == "warn")
    end = f"{failed} to mend" if failed else "fit to run"
    print(f"{end}, {warned} to look at" if warned else end)
    return command.MISTAKE if failed else command.DONE


def findings(workdir: str, dataset: str, devices: int) -> Iterator[Finding]:
    yield from versions()
    gpus, found = drivers()
    yield from found
    yield from surroundings(os.environ, devices)
    yield from step(probe(), os.environ, gpus, devices)
    yield from disk(Path(workdir).expanduser())
    yield from data(dataset)
    yield from cache(command.compilation_cache())


def probe() -> dict:
    """What a process of its own says of the devices: one that hangs or crashes must not take this one along."""
    surrounding = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
    words = [sys.executable, "-W", "ignore", "-P", str(Path(__file__).with_name("doctor_step.py"))]
    try:
        done = subprocess.run(words, env=surrounding, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {PATIENCE} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]}
    return json.loads(lines[-1])


def step(seen: dict, environ, gpus: int, asked: int) -> Iterator[Finding]:
    """Judges what `probe` saw against what is there and what was asked for.

    Args:
      seen: of `probe`.
      environ: of the process.
      gpus: present on the machine, whether JAX sees them or not.
      asked: how many devices JAX must see; 0 does not ask.
    """
    if "error" in seen:
        yield Finding("fail", "devices", f"JAX cannot use them: {seen['error']}", "end whatever else holds the device "
                      "(one process at a time may hold a TPU; a pod needs all its hosts), or set JAX_PLATFORMS=cpu")
        return
    count, cpu = seen["devices"], seen["platform"] == "cpu"
    said = f"JAX sees {count} x {seen['kind']}"
    chosen = environ.get("JAX_PLATFORMS") == "cpu"
    present = gpus or len(chips())
    if cpu and present and not chosen:
        extra = "cuda" if gpus else "tpu"
        yield Finding("fail", "devices", f"{said}, though this machine has {present} {'GPUs' if gpus else 'TPU chips'}",
                      f"JAX fell back to the CPU: install its plugin with launch/local --with={extra} …")
    elif asked and (count != asked or (cpu and not chosen)):
        yield Finding("fail", "devices", f"{said}; {asked} were asked for",
                      "ask the scheduler for as many GPUs a node as processes (launch/slurm --gpus=N does)")
    elif cpu and present:
        yield Finding("warn", "devices", f"{said}, as JAX_PLATFORMS=cpu says", "unset it to use the accelerator")
    elif not cpu and count < present:
        visible = environ.get("CUDA_VISIBLE_DEVICES", environ.get("TPU_VISIBLE_CHIPS"))
        yield Finding("warn", "devices", f"{said} of {present}; the others are idle",
                      f"visible are {visible}: unset CUDA_VISIBLE_DEVICES (TPU_VISIBLE_CHIPS) to use them all"
                      if visible is not None else "free the others of other processes, or see nvidia-smi")
    else:
        yield Finding("ok", "devices", said)
    if seen["reduced"] != seen["expected"]:
        yield Finding("fail", "all-reduce", f"the sum over all is {seen['reduced']}, not {seen['expected']}",
                      "a device or the link between devices computes wrongly: try without it (CUDA_VISIBLE_DEVICES), "
                      "and NCCL_P2P_DISABLE=1")
    else:
        yield Finding("ok", "all-reduce", f"over {count} devices: right; {seen['tflops']:.2f} TFLOP/s in float32 "
                      f"({seen['steps']} steps in {seen['seconds']:.1f} s, compiled in {seen['compile']:.1f} s)")


def chips() -> list[str]:
    """TPU chips of this machine by their device files."""
    files = [str(path) for path in Path("/dev").glob("accel[0-9]*")]
    return files or ([str(path) for path in Path("/dev/vfio").glob("[0-9]*")] if "TPU_ACCELERATOR_TYPE" in os.environ
                     else [])


def data(name: str) -> Iterator[Finding]:
    try:
        from dlcourse import data as sources
    except ImportError as error:
        yield Finding("fail", "data", f"cannot be read: {error}", REPAIR)
        return
    try:
        dataset = sources.load(name)
        sizes = ", ".join(f"{len(split)} {split_name}" for split_name, split in dataset.splits.items())
        yield Finding("ok", "data", f"{name}: {sizes}")
    except InputError as error:
        yield Finding("fail", "data", f"{name}: not usable", " ".join(str(error).split()))
    except Exception as error:
        yield Finding("fail", "data", f"{name}: {type(error).__name__}", " ".join(str(error).split()) or "see above")
    folder = sources.tfds.data_dir()
    prepared = sorted(path.name for path in folder.glob("*/") if path.name != "downloads") if folder.is_dir() else []
    built_in = ["digits", "faces", "shapes", *(["fashion_mnist"] if sources.fashion.DEBIAN.is_dir() else [])]
    yield Finding("ok", "data found", f"{', '.join(built_in)}; in {folder}: {', '.join(prepared) or 'nothing'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

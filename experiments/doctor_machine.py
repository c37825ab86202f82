"""What the doctor finds out about a machine without JAX: versions, drivers, surroundings, disk, cache."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

DRIVERS = {"12": 525, "13": 580}
"""The oldest NVIDIA driver for each CUDA version (NVIDIA, CUDA compatibility, table 1)."""
REPAIR = "make the environment anew: remove .venv and call launch/local, or pip install -e . here"


class Finding(NamedTuple):
    level: str
    """ok, warn or fail."""
    what: str
    said: str
    way: str = ""
    """What to do, where there is something to do."""


def installed() -> dict[str, str]:
    """Version of every installed distribution by its normal name."""
    return {_normal(dist.metadata["Name"]): dist.version for dist in metadata.distributions() if dist.metadata["Name"]}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def versions(have: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """Whether all that dlcourse needs is there, at versions that fit each other."""
    from packaging.requirements import Requirement

    have = installed() if have is None else have
    try:
        needs = [Requirement(text) for text in metadata.requires("dlcourse") or []]
    except metadata.PackageNotFoundError:
        yield Finding("warn", "versions", "dlcourse is not installed here, only on PYTHONPATH", REPAIR)
        needs = []
    wrong = [f"{need} (here: {have.get(_normal(need.name), 'missing')})" for need in needs
             if (need.marker is None or need.marker.evaluate({"extra": ""}))
             and not (_normal(need.name) in have and need.specifier.contains(have[_normal(need.name)], True))]
    main = ", ".join(f"{name} {have.get(name, 'missing')}" for name in ("jax", "jaxlib", "flax", "optax"))
    if wrong:
        yield Finding("fail", "versions", f"needed: {'; '.join(wrong)}", REPAIR)
    elif have.get("jax") != have.get("jaxlib"):
        yield Finding("fail", "versions", f"{main}: jax and jaxlib differ", REPAIR)
    else:
        yield Finding("ok", "versions", main)
    for name, version in have.items():
        if re.fullmatch(r"jax-(cuda|rocm)\d+-(plugin|pjrt)", name) and version != have.get("jaxlib"):
            yield Finding("fail", "plugin", f"{name} {version} does not fit jaxlib {have.get('jaxlib')}: JAX would "
                          "leave it out and use the CPU", "launch/local --with=cuda …, or pip install 'jax[cuda13]'")


def drivers(have: Mapping[str, str] | None = None) -> tuple[int, list[Finding]]:
    """The number of GPUs that nvidia-smi lists, and whether their driver is new enough for JAX's plugin."""
    smi = shutil.which("nvidia-smi")
    if not smi:
        return 0, []
    listed = _said([smi, "-L"])
    gpus = len(re.findall(r"^GPU \d+:", listed, re.MULTILINE))
    if not gpus:
        way = "see what nvidia-smi says: the driver may not be loaded"
        return 0, [Finding("warn", "driver", "nvidia-smi is here and lists no GPU", way)]
    version = _said([smi, "--query-gpu=driver_version", "--format=csv,noheader"]).strip().split("\n")[0]
    have = installed() if have is None else have
    cuda = next((number for number in DRIVERS if f"jax-cuda{number}-plugin" in have), None)
    major = int(version.partition(".")[0]) if re.match(r"\d+\.", version) else 0
    if cuda and major < DRIVERS[cuda]:
        said = f"{version}, {gpus} GPUs: too old for CUDA {cuda}, which needs {DRIVERS[cuda]}"
        return gpus, [Finding("fail", "driver", said,
                              "update the driver, or pip install an older plugin, such as 'jax[cuda12]'")]
    return gpus, [Finding("ok", "driver", f"{version}, {gpus} GPUs")]


def _said(words: list[str]) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def surroundings(environ: Mapping[str, str], asked: int) -> Iterator[Finding]:
    """What a scheduler has set, and the traps in it; `asked`: the processes that each node will have, if not as now."""
    if "SLURM_JOB_ID" in environ:
        per_node = asked or int(re.match(r"\d*", environ.get("SLURM_NTASKS_PER_NODE", "")).group() or 1)
        visible = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        said = (f"job {environ['SLURM_JOB_ID']}: {environ.get('SLURM_JOB_NUM_NODES', '1')} nodes x {per_node} tasks, "
                f"{len(visible)} GPUs visible")
        if visible and len(visible) < per_node:
            # Each process takes the GPU of its number on the node: jax-ml/jax#28194.
            yield Finding("fail", "SLURM", said, "every task must see the GPUs of all: "
                          f"--gres=gpu:{per_node} in place of --gpus-per-task")
        elif int(environ.get("SLURM_NTASKS") or 1) > 1 and len(visible) > per_node:
            yield Finding("fail", "SLURM", said, f"a task takes one GPU, the others stay idle: --ntasks-per-node="
                          f"{len(visible)} (launch/slurm --gpus={len(visible)})")
        else:
            yield Finding("ok", "SLURM", said)
    if "TPU_ACCELERATOR_TYPE" in environ or "TPU_WORKER_HOSTNAMES" in environ:
        hosts = environ.get("TPU_WORKER_HOSTNAMES", "localhost").split(",")
        yield Finding("ok", "TPU", f"{environ.get('TPU_ACCELERATOR_TYPE', 'type unknown')}, worker "
                      f"{environ.get('TPU_WORKER_ID', '0')} of {len(hosts)}")
    if "KUBERNETES_SERVICE_HOST" in environ:
        yield Finding("ok", "Kubernetes", f"pod {environ.get('HOSTNAME', 'unknown')}, index "
                      f"{environ.get('JOB_COMPLETION_INDEX', '0')}")


def disk(folder: Path) -> Iterator[Finding]:
    """Whether a run could be written to `folder`: rights, locks, room."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        yield Finding("fail", "disk", f"{there}: {error.strerror}", "name another folder with --workdir=PATH")
        return
    free = shutil.disk_usage(there).free / 1e9
    level = "fail" if free < 0.2 else "warn" if free < 5 else "ok"
    yield Finding(level, "disk", f"{there} can be written to, {free:.1f} GB free",
                  "checkpoints and reports need room: clear some, or name another folder with --workdir=PATH")


def cache(folder: Path | None) -> Iterator[Finding]:
    """The folder of compiled programs."""
    asked = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folder = Path(asked) if asked else folder
    there = folder and next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if there is None or not os.access(there, os.W_OK):
        yield Finding("warn", "cache", f"compiled programs cannot be kept{f' in {folder}' if folder else ''}",
                      "every start compiles anew: set XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR to a folder of yours")
        return
    sizes = [path.stat().st_size for path in folder.glob("*") if path.is_file()] if folder.exists() else []
    yield Finding("ok", "cache", f"{folder}: {len(sizes)} files, {sum(sizes) / 1e6:.0f} MB")

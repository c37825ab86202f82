"""Where a run took place: enough to judge whether its figures can be compared with others."""

from __future__ import annotations

import os
import platform
import subprocess
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """Versions, devices, processor and the commit of the code.

    Returns:
      `python`, `jax`, `flax`, `devices` ("8 TPU v4"), `processes`, `cpu` ("Intel … (2 cores)"), `system`, `commit`.
    """
    import jax

    kinds = Counter(device.device_kind for device in jax.devices())
    return {
        "python": platform.python_version(), "jax": jax.__version__, "flax": version("flax"),
        "devices": ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        "processes": jax.process_count(), "cpu": f"{_processor()} ({_cores()} cores)",
        "system": f"{platform.system()} {platform.machine()}", "commit": commit(Path(__file__).parent)}


def commit(folder: Path) -> str | None:
    """The commit that the code in `folder` is checked out at, with "-dirty" where it was changed.

    Returns:
      40 hex digits and perhaps "-dirty"; None where git does not track that code.
    """
    # Installed code may lie inside somebody else's checkout: that commit would say nothing about it.
    if _git(folder, "ls-files", "--", ".") in (None, ""):
        return None
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

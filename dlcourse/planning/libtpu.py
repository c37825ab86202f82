"""The TPU compiler without a TPU: libtpu, kept in a folder of its own.

In the everyday environment it would make JAX look for TPUs at every start; in a folder of its own, it is loaded by
those who ask for it alone.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from dlcourse.contracts import InputError

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What must be set before JAX is imported, so that libtpu compiles and looks for no TPU. The type of accelerator is
any: the topology that is compiled for says which."""


def requirement() -> str:
    """The libtpu that this JAX was made for, as pip spells it: libtpu==0.0.42.*"""
    wanted = (re.match(r"(libtpu\s*[=<>!~][^;]*)", line) for line in importlib.metadata.requires("jax") or ())
    found = next((match[1].replace(" ", "") for match in wanted if match), "")
    if not found:
        raise InputError(f"jax {importlib.metadata.version('jax')} names no libtpu; install a jax that has the extra "
                         "`tpu`, or plan for GPUs (--topology=h100:8)")
    return found


def folder() -> Path:
    """Where it lies: $DLCOURSE_LIBTPU, else a folder for this version below the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(cache) if os.path.isabs(cache) else Path("~/.cache").expanduser()
    version = re.sub(r"[^\d.]+", "", requirement()).strip(".")
    return Path(os.environ.get("DLCOURSE_LIBTPU") or root / "dlcourse" / "libtpu" / version).expanduser()


def install_command(target: Path) -> list[str]:
    """What brings libtpu into `target`."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    return [*pip, "--target", str(target), requirement()]


def find(install: bool = True) -> Path:
    """The path of libtpu.so, installed now where it is missing and `install` allows.

    Raises:
      InputError: it is not there and could not be brought.
    """
    target = folder()
    library = target / "libtpu" / "libtpu.so"
    if library.exists():
        return library
    command = install_command(target)
    said = ""
    if install:
        done = subprocess.run(command, capture_output=True, text=True)
        said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
        if library.exists():
            return library
    tried = f" and pip could not bring it ({said.strip()})" if said else ""
    raise InputError(f"the TPU compiler is not at {library}{tried}; where there is a network: {shlex.join(command)}; "
                     "DLCOURSE_LIBTPU=FOLDER names another place")


def surroundings(library: Path) -> dict[str, str]:
    """The environment variables under which JAX compiles for TPUs on a machine that has none."""
    return ENVIRONMENT | {"TPU_LIBRARY_PATH": str(library)}

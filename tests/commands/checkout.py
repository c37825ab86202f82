"""A checkout of its own with a stand-in for an experiment, and an environment that launch/local finds whole."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from commands import ROOT

STUB = '''"""A stand-in for an experiment: counts its starts, then ends as it is told."""

import os
import signal
import sys
import time
from pathlib import Path


def main(flags):
    folder = Path(flags.get("workdir", "runs/stub"))
    folder.mkdir(parents=True, exist_ok=True)
    rank = os.environ.get("SLURM_PROCID", "0")
    starts = folder / f"starts-{rank}"
    with open(starts, "a") as file:
        print(os.environ.get("SLURMD_NODENAME", "here"), *sys.argv[1:], file=file)
    start = len(starts.read_text().splitlines())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    if start <= int(flags.get("waits", 0)):
        time.sleep(float(flags.get("seconds", 100)))
    end = [int(status) for status in flags.get("end", "0").split(",")]
    (folder / "result.json").write_text("{}")
    sys.exit(end[min(start, len(end)) - 1])


if __name__ == "__main__":
    main(dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:]))
'''


def module(name: str):
    """A module of launch/, which imports its neighbours."""
    sys.path.insert(0, str(ROOT / "launch"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "launch"))


def tools(folder: Path) -> Path:
    """A folder for PATH with what launch/find_python needs, and nothing else."""
    folder.mkdir()
    for tool in ("sh", "dirname", "sort", "head"):
        (folder / tool).symlink_to(f"/usr/bin/{tool}" if os.path.exists(f"/usr/bin/{tool}") else f"/bin/{tool}")
    return folder


def make(folder: Path) -> dict[str, str]:
    """Makes the checkout in folder/checkout; returns the variables to call it with."""
    root, venv = folder / "checkout", folder / "venv"
    for name in ("launch", "experiments"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "dlcourse").symlink_to(ROOT / "dlcourse")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root)
    (root / "experiments/stub.py").write_text(STUB)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    packages = venv / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    (packages / "here.pth").write_text(f"{root}\n{sysconfig.get_path('purelib')}\n")
    stamp = [str(venv / "bin/python"), "-c", "import sys, environment; print(environment.stamp_of(sys.version))"]
    said = subprocess.run(stamp, env={"PYTHONPATH": str(root / "launch")}, capture_output=True, text=True, check=True)
    (venv / "dlcourse.lock").touch()
    whole = {"hash": said.stdout.strip(), "extras": ["cuda", "dev", "peers", "tpu"]}
    (venv / "dlcourse.json").write_text(json.dumps(whole))
    return {"PATH": os.environ["PATH"], "HOME": str(folder), "DLCOURSE_VENV": str(venv), "JAX_PLATFORMS": "cpu",
            "LAUNCH": str(root / "launch")}


def launch(name: str, *words: str, cwd: Path, env: dict[str, str], **more) -> subprocess.CompletedProcess:
    return subprocess.run([f"{env['LAUNCH']}/{name}", *words], cwd=cwd, env=env, capture_output=True, text=True,
                          timeout=300, **more)

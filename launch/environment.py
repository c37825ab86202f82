"""Makes and keeps the environment of this checkout, then runs an experiment in it. Called by launch/local.

usage: launch/local [machine flags] EXPERIMENT [--flag=value ...]
       launch/local [machine flags] test [pytest arguments]

machine flags, before EXPERIMENT:
  --python=PROGRAM   the Python to build with; default the newest usable one on PATH
  --venv=PATH        where the environment lives; default $DLCOURSE_VENV, else .venv in the checkout
  --with=EXTRA,...   also install these extras of pyproject.toml: cuda, tpu, peers (an accelerator is found by itself)
  --dry-run          print the commands and stop
  --help             show this and stop; after EXPERIMENT, show the experiment's flags

The standard library alone: this runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import command_line
from command_line import ROOT, Mistake

LOCK, STAMP = "dlcourse.lock", "dlcourse.json"
EXTRAS_OF = {"benchmark": {"peers"}, "benchmark_attacks": {"peers"}}
"""What an experiment needs beyond the everyday environment."""


def main(words: list[str]) -> None:
    machine, rest = command_line.words_or_help(words, __doc__)
    command, folder = command_of(rest)
    venv, extras, python = wanted(machine, rest[0])
    if "dry-run" in machine:
        dry_run(venv, extras, python, command, folder)
        return
    keep(venv, extras, python)
    if folder:
        os.chdir(folder)
    program = str(venv / "bin" / "python")
    os.execv(program, [program, *command])


def wanted(machine: dict[str, str], experiment: str) -> tuple[Path, set[str], str | None]:
    """Where the environment lives, the extras it must have, and the Python to make it with (None: it has its own)."""
    venv = Path(machine.get("venv") or os.environ.get("DLCOURSE_VENV") or ROOT / ".venv").expanduser().absolute()
    extras = {"dev"} | set(filter(None, machine.get("with", "").split(","))) | EXTRAS_OF.get(experiment, set())
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if not extras <= set(known):
        raise Mistake(f"--with={machine['with']}: choose from {', '.join(sorted(known))}")
    return venv, extras, base_python() if "python" in machine or not usable(venv) else None


def command_of(rest: list[str]) -> tuple[list[str], Path | None]:
    """Python's arguments, and the folder to run in (None: where the user is)."""
    name, *arguments = rest
    if name == "test":
        # A process a core, up to 4; what shares fixtures stays together, and the slow commands come first.
        # A process a core, up to 4; what shares fixtures stays together, and the slow commands come first.
        spread = ["-nlogical", "--maxprocesses=4", "--dist=loadfile", "--no-loadscope-reorder"]
        return ["-m", "pytest", *spread, *arguments], ROOT
    return ["-P", "-m", f"experiments.{name}", *arguments], None  # -P: a folder `experiments` of the user's stays out


def base_python() -> str:
    """The interpreter outside of any environment that this one came from."""
    return getattr(sys, "_base_executable", None) or sys.executable


def usable(venv: Path) -> bool:
    """Whether the environment's own Python is running this."""
    return Path(sys.prefix) == venv.resolve() or Path(sys.prefix) == venv


# --- the environment: stamped when whole, locked while it changes ---


def version_of(python: str | None) -> str:
    """Of this program, or of the Python that runs this where it is None."""
    if python is None:
        return sys.version
    show = [python, "-E", "-c", "import sys; sys.stdout.write(sys.version)"]
    return subprocess.run(show, capture_output=True, text=True).stdout


def stamp_of(version: str) -> str:
    """What an environment was made from; it is made anew when this changes."""
    parts = [version, str(ROOT)] + [(ROOT / name).read_text() for name in ("pyproject.toml", "constraints.txt")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read_stamp(venv: Path) -> dict:
    try:
        return json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return {"hash": "", "extras": []}


def is_whole(venv: Path, extras: set[str], python: str | None) -> bool:
    stamp = read_stamp(venv)
    return stamp["hash"] == stamp_of(version_of(python)) and extras <= set(stamp["extras"])


def accelerator_extras(have: set[str]) -> set[str]:
    """`cuda` or `tpu` where this machine has one; looked for cheaply, since every call does."""
    if os.environ.get("JAX_PLATFORMS") == "cpu" or have & {"cuda", "tpu"}:
        return set()
    if glob.glob("/dev/accel[0-9]*") or (glob.glob("/dev/vfio/[0-9]*") and os.environ.get("TPU_ACCELERATOR_TYPE")):
        return {"tpu"}
    smi = shutil.which("nvidia-smi")
    if smi and subprocess.run([smi, "-L"], capture_output=True, text=True).stdout.startswith("GPU "):
        return {"cuda"}
    return set()


def keep(venv: Path, extras: set[str], python: str | None) -> None:
    """Leaves a whole environment with at least these extras at `venv`."""
    extras = extras | accelerator_extras(set(read_stamp(venv)["extras"]) | extras)
    if is_whole(venv, extras, python):
        return
    with locked(venv):
        if is_whole(venv, extras, python):  # another call made it while this one waited
            return
        stamp = read_stamp(venv)
        (venv / STAMP).unlink(missing_ok=True)  # an interrupted installation must not look whole
        version = version_of(python)
        if stamp["hash"] == stamp_of(version):
            extras |= set(stamp["extras"])
        else:
            python = python or base_python()
            say(f"making {venv} with Python {version.split()[0]} (this once)")
            clear(venv)
            check([python, "-m", "venv", str(venv)])
        install(venv, extras)
        fresh = venv / f".{STAMP}"
        fresh.write_text(json.dumps({"hash": stamp_of(version), "extras": sorted(extras)}))
        os.replace(fresh, venv / STAMP)


@contextlib.contextmanager
def locked(venv: Path):
    """Holds the environment for this process; makes its folder where there is none."""
    try:
        if venv.exists() and any(venv.iterdir()) and not (venv / LOCK).exists():
            raise Mistake(f"{venv} was not made by launch/local; remove it, or name another place with --venv=PATH")
        venv.mkdir(parents=True, exist_ok=True)
        with open(venv / LOCK, "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another launch/local that is making {venv}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        place = error.filename or venv
        raise Mistake(f"cannot write {place} ({error.strerror}); name another place with --venv=PATH") from None


def clear(venv: Path) -> None:
    for entry in venv.iterdir():
        if entry.name != LOCK:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def install_commands(venv: Path, extras: set[str]) -> tuple[list[str], list[str], list[str]]:
    """Installing uv, installing by uv, and installing by pip where uv fails."""
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    what = ["-e", f"{ROOT}[{','.join(sorted(extras))}]", "-c", str(ROOT / "constraints.txt")]
    uv = [str(venv / "bin" / "uv"), "pip", "install", "--quiet", "--python", str(venv / "bin" / "python")]
    return [*pip, "install", "-qq", "uv"], [*uv, *what], [*pip, "install", "--quiet", *what]


def install(venv: Path, extras: set[str]) -> None:
    get_uv, by_uv, by_pip = install_commands(venv, extras)
    flags, environment = settings_for_uv(pip_settings(venv))
    if not can_cache():
        flags.append("--no-cache")
    if subprocess.run(get_uv).returncode == 0:
        if subprocess.run([*by_uv, *flags], env=os.environ | environment).returncode == 0:
            return
    say("uv could not install; trying pip, which takes longer")
    check(by_pip)


def can_cache() -> bool:
    """Whether uv could write its cache; a service user may have no home."""
    cache = Path(os.environ.get("UV_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return os.access(next(folder for folder in (cache, *cache.absolute().parents) if folder.exists()), os.W_OK)


def pip_settings(venv: Path) -> dict[str, str]:
    """pip's settings by their bare names: global ones, then those for `install`, then the environment's."""
    config_list = [str(venv / "bin" / "python"), "-m", "pip", "config", "list"]
    listed = subprocess.run(config_list, capture_output=True, text=True)
    found = re.findall(r"^(global|install|:env:)\.([\w-]+)='(.*)'$", listed.stdout, re.MULTILINE)
    order = ["global", "install", ":env:"]
    return {name: value for _, name, value in sorted(found, key=lambda entry: order.index(entry[0]))}


def settings_for_uv(pip: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """The flags and variables by which uv looks where pip would: it reads none of pip's settings."""
    flags = ["--index-strategy=unsafe-best-match"] if "extra-index-url" in pip else []
    for name in ("index-url", "extra-index-url", "find-links"):
        flags += [f"--{name}={place}" for place in pip.get(name, "").replace("\\n", " ").split()]
    flags += [f"--allow-insecure-host={host}" for host in pip.get("trusted-host", "").replace("\\n", " ").split()]
    if pip.get("no-index", "false").lower() in ("1", "true", "yes", "on"):
        flags.append("--no-index")
    variables = {"cert": "SSL_CERT_FILE", "timeout": "UV_HTTP_TIMEOUT", "default-timeout": "UV_HTTP_TIMEOUT"}
    wanted = {variables[name]: value for name, value in pip.items() if name in variables}
    if "proxy" in pip:
        wanted |= {"HTTPS_PROXY": pip["proxy"], "HTTP_PROXY": pip["proxy"]}
    return flags, {name: value for name, value in wanted.items() if name not in os.environ}


def check(command: list[str]) -> None:
    if subprocess.run(command).returncode:
        raise Mistake(f"this failed, see above: {shlex.join(command)}")


def dry_run(venv: Path, extras: set[str], python: str | None, command: list[str], folder: Path | None) -> None:
    """Prints what would be run."""
    extras = extras | accelerator_extras(set(read_stamp(venv)["extras"]) | extras)
    if not is_whole(venv, extras, python):
        get_uv, by_uv, _ = install_commands(venv, extras)
        for step in ([python or base_python(), "-m", "venv", str(venv)], get_uv, by_uv):
            print(shlex.join(step))
    if folder:
        print(shlex.join(["cd", str(folder)]))
    print(shlex.join([str(venv / "bin" / "python"), *command]))


def say(line: str) -> None:
    print(f"launch/local: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    command_line.start(main)

"""From a command line to a run folder and an exit status.

    if __name__ == "__main__":
        command.run(main, Config, name="classification")

Exit status: 0 done; 2 a mistake of the user, in one line; 75 stopped by a signal after saving; 1 anything else.
Nothing here imports JAX before the flags are found good, and its surroundings are set before it is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import platform
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlcourse.contracts import InputError
from dlcourse.reporting import files
from dlcourse.reporting.run import HOW_ONLY, WHERE_ONLY, open_run
from experiments import checks, cluster, parsing

DONE, FAILED, MISTAKE, STOPPED = 0, 1, 2, 75


def run(main: Callable[[Any, Any], None], Config: type, name: str) -> None:
    """Runs an experiment as the command line says and exits.

    Args:
      main: (config, run) -> None, which ends with `run.finish`.
      Config: a frozen dataclass; its fields, and those of the dataclasses it holds, are the flags.
      name: of the experiment, also of its folder below runs/.
    """
    code = status(main, Config, name, sys.argv[1:])
    if code not in (DONE, STOPPED):
        cluster.leave(code)
    sys.exit(code)


def status(main, Config, name: str, argv: list[str]) -> int:
    """Runs an experiment and returns its exit status; every failure is said on standard error."""
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        if "--doctor" in argv:
            return _examine(Config(), [word for word in argv if word != "--doctor"])
        _execute(main, Config, name, argv)
        return DONE
    except KeyboardInterrupt:
        return _say("interrupted; nothing since the last checkpoint was saved", FAILED)
    except Exception as error:
        if any(kind.__name__ == "Interrupted" for kind in type(error).__mro__):  # by name: its module imports JAX
            return _say(f"{str(error) or 'stopped by a signal'}; saved: the same command goes on from there", STOPPED)
        mistake = as_mistake(error)
        if mistake:
            return _say(f"error: {mistake}", MISTAKE)
        if cluster.lost(error):
            return _say("error: another process of this run is gone; start all of them again: they go on from the last "
                        f"checkpoint ({str(error).splitlines()[0][:200]})", FAILED)
        traceback.print_exc()
        return FAILED
    finally:
        signal.signal(signal.SIGTERM, before)


def _examine(default, argv: list[str]) -> int:
    """What launch/doctor says of this machine, for the data and the folder that the flags name."""
    from experiments import doctor

    values = by_name(parsing.parse(default, argv)[0])
    return doctor.examine(values.get("workdir") or "runs", values.get("dataset") or "digits")


class Interrupted(Exception):
    """SIGTERM came outside the training loop, where nothing is left to save."""


def _stop(*_) -> None:
    raise Interrupted("stopped by a signal outside training")


def _execute(main, Config, name: str, argv: list[str]) -> None:
    default = Config()
    if {"--help", "-h", "-help"} & set(argv):
        print(parsing.help_text(default, name, sys.modules[main.__module__].__doc__ or name))
        return
    config, given = parsing.parse(default, argv)
    values = by_name(config)
    checks.check(values, given)
    _prepare_surroundings(values)
    if "coordinator" in values:
        cluster.start(values)
    if values.get("require_accelerator"):
        _require_accelerator()
    workdir = Path(values.get("workdir") or default_workdir(name, config)).expanduser()
    typed = parsing.as_flags({key: given[key] for key in given if key not in WHERE_ONLY})
    missing = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    opening = functools.partial(open_run, workdir, name, dataclasses.asdict(config), typed,
                                overwrite=values.get("overwrite", False), tensorboard=values.get("tensorboard", False))
    with cluster.opened(opening, workdir) as run:
        if not run.finished:
            try:
                main(config, run)
            except InputError:
                if run.writes:
                    _withdraw(workdir, missing)
                raise
        if run.writes and run.finished:
            from dlcourse.reporting import terminal

            terminal.summary(run.finished, run.path)


def _withdraw(workdir: Path, missing: list[Path]) -> None:
    """Takes the folder of a refused run away, with the parents made for it, if nothing was measured in it yet."""
    opened = {"config.json", "flags.txt", files.LOCK}
    with contextlib.suppress(OSError):
        if {entry.name for entry in workdir.iterdir()} <= opened:
            for name in opened:
                (workdir / name).unlink(missing_ok=True)
            for folder in missing:
                folder.rmdir()


def by_name(config) -> dict[str, Any]:
    """Every setting of a config by its flag's name."""
    return {setting.name: setting.default for setting in parsing.settings_of(config)}


def default_workdir(name: str, config) -> Path:
    """runs/NAME/DATASET-MODEL-HASH, where the hash tells apart all settings that change the result."""
    values = by_name(config)
    telling = {key: value for key, value in values.items() if key not in WHERE_ONLY + HOW_ONLY}
    digest = hashlib.sha256(json.dumps(telling, sort_keys=True).encode()).hexdigest()[:8]
    words = [re.sub(r"[^A-Za-z0-9]+", "-", str(values[key])).strip("-")[:40] for key in ("dataset", "model")
             if key in values]
    return Path("runs", name, "-".join([*filter(None, words), digest]))


def as_mistake(error: BaseException) -> str | None:
    """One line for what a user can mend (a wrong input, no room on disk or in memory), None for a defect."""
    chain = [error]
    while len(chain) < 10 and (cause := chain[-1].__cause__ or chain[-1].__context__):
        chain.append(cause)
    if isinstance(error, InputError):
        return " ".join(str(error).split())
    for link in chain:
        text = str(link)
        if getattr(link, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
            place = f" while writing {link.filename}" if getattr(link, "filename", None) else ""
            return f"no space left on the disk{place}; make room, or write elsewhere with --workdir=PATH"
        if isinstance(link, MemoryError) or "RESOURCE_EXHAUSTED" in text:
            return "out of memory; try a smaller --batch_size, more --accumulate or a smaller --model"
        if "Unable to initialize backend" in text:
            return f"JAX cannot start on the platform asked for (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')})"
    return None


def _say(line: str, code: int) -> int:
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)
    return code


def _require_accelerator() -> None:
    import jax

    if jax.default_backend() == "cpu":
        raise InputError("--require_accelerator=true: JAX finds only a CPU here; leave the flag out, or install JAX "
                         "for this machine's accelerator (launch/local --with=cuda or --with=tpu)")


def _prepare_surroundings(values: dict[str, Any]) -> None:
    """Quiet libraries, a compilation cache and reproducible kernels: all before JAX is imported.

    What the user has set in the environment stays as it is.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    for library in ("absl", "orbax", "asyncio"):  # what they say of an error is said once, by us
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    sys.unraisablehook = _unraisablehook
    if values.get("deterministic"):
        asked = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{asked} --xla_gpu_deterministic_ops=true".strip()
    folder = compilation_cache()
    if folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _unraisablehook(raised) -> None:
    """Python's own, but for what writers still say to orbax's event loop once a full disk has ended it."""
    if not (raised.exc_type is RuntimeError and str(raised.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(raised)


def compilation_cache() -> Path | None:
    """A folder for compiled programs below the user's cache, one a kind of processor; None where it cannot be made.

    Programs compiled for one processor must not be run on another that shares the home folder.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(cache) if os.path.isabs(cache) else Path("~/.cache").expanduser()
    try:
        processor = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        told = ("flags", "Features", "model")
        processor = "\n".join(line for line in processor.splitlines() if line.startswith(told))
    except OSError:
        processor = platform.node()
    folder = root / "dlcourse" / f"{platform.machine()}-{hashlib.sha256(processor.encode()).hexdigest()[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None

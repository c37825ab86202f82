"""A run's folder: opened once, resumed safely, finished atomically."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlcourse.contracts import Claim, InputError
from dlcourse.reporting import files

WHERE_ONLY = ("workdir", "overwrite", "coordinator", "num_processes", "process_id", "coordinator_timeout")
"""Settings that say where a run takes place, not what it is: no part of its config."""

HOW_ONLY = ("tensorboard", "require_accelerator", "parallel", "fsdp", "steps_per_dispatch", "checkpoint_every", "keep",
            "profile")
"""Settings that may differ when a run is resumed."""


class Run:
    """What an experiment writes to. Made by `open_run`."""

    def __init__(self, path: Path, experiment: str, config: dict, flags: Sequence[str], *, tensorboard: bool,
                 writes: bool):
        self.path = path
        self.experiment = experiment
        self.config = config
        self.flags = list(flags)
        self.figures: list[dict] = []
        self.writes = writes
        self._wants_events = tensorboard and writes
        self._events: Any = None
        self._resume_step: int | None = None

    @property
    def finished(self) -> dict | None:
        """The content of result.json when the run is finished, else None."""
        result = read_result(self.path)
        return result if result and result.get("status") == "finished" else None

    @property
    def command(self) -> str:
        """What to type to repeat the run."""
        return shlex.join(["python", "-m", f"experiments.{self.experiment}", *self.flags])

    def log(self, step: int, split: str, values: Mapping[str, float], seconds: float) -> None:
        """Adds a line to metrics.jsonl, and the same scalars to TensorBoard.

        Args:
          step: the training step that the values belong to.
          split: "train", "validation", …
          values: quantities by name; scalars of any array library.
          seconds: since the run began.
        """
        if not self.writes:
            return
        values = {name: float(value) for name, value in values.items()}
        record = {"step": int(step), "split": split, "values": values, "seconds": round(float(seconds), 3)}
        with files.in_one_line(self.path):
            files.append_line(self.path / "metrics.jsonl", files.to_json(record))
            if self._wants_events:
                self._tensorboard().scalars(int(step), split, values)

    def metrics(self) -> list[dict]:
        """All that was logged, in order."""
        return files.read_json_lines(self.path / "metrics.jsonl")

    def sync_metrics(self) -> int:
        """How many lines were logged, all of them safe on disk by now."""
        with files.in_one_line(self.path):
            return files.sync_lines(self.path / "metrics.jsonl") if self.writes else 0

    def truncate_metrics(self, lines: int, step: int) -> None:
        """Forgets what was logged after the first `lines` lines, for a run that goes on from a checkpoint at `step`."""
        if not self.writes:
            return
        kept = self.metrics()[:lines]
        with files.in_one_line(self.path):
            files.write_atomically(self.path / "metrics.jsonl", "".join(files.to_json(r) + "\n" for r in kept))
        self._resume_step = step

    def figure(self, name: str, fig: Any, *, caption: str, alt: str, how: str) -> None:
        """Keeps a figure as figures/NAME.svg, to be shown in the report in the order of calls.

        Args:
          name: a file name without ending: letters, digits, `_`, `-`.
          fig: a matplotlib Figure.
          caption: what is to be seen.
          alt: the same for those who cannot see it.
          how: how we know: what was measured, on what, against which control.
        """
        if not re.fullmatch(r"[\w-]+", name, re.ASCII):
            raise ValueError(f"{name!r} is no name for a figure")
        entry = {"file": f"figures/{name}.svg", "caption": caption, "alt": alt, "how": how}
        self.figures = [figure for figure in self.figures if figure["file"] != entry["file"]] + [entry]
        if not self.writes:
            return
        from dlcourse.reporting import svg

        with files.in_one_line(self.path):
            (self.path / "figures").mkdir(exist_ok=True)
            files.write_atomically(self.path / entry["file"], svg.from_figure(fig, name))

    def finish(self, metrics: Mapping[str, float], claims: Sequence[Claim], seconds: Mapping[str, float],
               environment: Mapping[str, Any], tables: Sequence[Mapping] = ()) -> dict:
        """Writes report.html and then result.json, whose presence says that all is done.

        Args:
          metrics: `split/quantity` or `method/quantity` -> number.
          claims: with their evidence.
          seconds: `total`, `compile`, `train`.
          environment: from `environment.describe()`.
          tables: `{"title", "header": [...], "rows": [[...], ...], "note"}`, such as one row a class.

        Returns:
          The content of result.json.
        """
        from dlcourse.reporting import report

        result = files.plain({
            "schema": 1, "experiment": self.experiment, "status": "finished", "command": self.command,
            "date": datetime.date.today().isoformat(),
            "config": self.config, "environment": environment, "seconds": seconds, "metrics": metrics,
            "claims": list(claims), "figures": self.figures, "tables": list(tables)})
        if self.writes:
            with files.in_one_line(self.path):
                files.write_atomically(self.path / "report.html", report.render(result, self.path))
                files.write_atomically(self.path / "result.json", files.to_json(result, indent=1) + "\n")
        return result

    def _tensorboard(self) -> Any:
        if self._events is None:
            from dlcourse.reporting import tensorboard

            self._events = tensorboard.Events(self.path / "tensorboard", self._resume_step)
        return self._events

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


def read_result(folder: str | Path) -> dict | None:
    """The content of a run's result.json, or None where there is none."""
    try:
        return json.loads((Path(folder) / "result.json").read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}/result.json cannot be read ({error}); run again with --overwrite") from None


@contextlib.contextmanager
def open_run(workdir: str | Path, experiment: str, config: Mapping, flags: Sequence[str], *, overwrite: bool = False,
             tensorboard: bool = True, writes: bool = True) -> Iterator[Run]:
    """Opens the folder of a run: new, to be resumed, or finished. Held for this process while open.

    Args:
      workdir: the folder, made where it is missing.
      experiment: its name, as in `python -m experiments.NAME`.
      config: all settings, nested by concern; plain values.
      flags: `--name=value` each, those that repeat the run.
      overwrite: delete an earlier run in that folder first.
      tensorboard: write events too.
      writes: False in all processes of a run but the first; they then leave the disk alone.

    Raises:
      InputError: a folder in use, of another experiment or config, of something else, or one that cannot be written.
    """
    path = Path(workdir).expanduser()
    config = files.plain(_without(config, WHERE_ONLY))
    flags = [flag for flag in flags if not re.match(rf"--?(no)?({'|'.join(WHERE_ONLY)})(=|$)", flag)]
    run = Run(path, experiment, config, flags, tensorboard=tensorboard, writes=writes)
    if not writes:
        yield run
        return
    with contextlib.ExitStack() as stack:
        try:
            with files.in_one_line(path):
                made = _make(path)
                stack.enter_context(files.lock(path))
                _prepare(path, experiment, config, flags, overwrite)
        except InputError:
            _unmake(path, made if "made" in locals() else [])
            raise
        stack.callback(run.close)
        yield run


def _make(path: Path) -> list[Path]:
    """Makes `path`; returns the folders that were missing, deepest first."""
    if re.match(r"[a-z0-9]+:/", str(path)):
        raise InputError(f"--workdir={path}: a run's folder must be on a file system; mount the bucket and name that")
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return missing


def _unmake(path: Path, made: list[Path]) -> None:
    """Takes away the folders that a failed opening made, as far as they hold nothing else."""
    with contextlib.suppress(OSError):
        if made:
            (path / files.LOCK).unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()


def _prepare(path: Path, experiment: str, config: dict, flags: list[str], overwrite: bool) -> None:
    """Leaves `path` as a folder of exactly this run, or raises InputError."""
    for leftover in (*path.glob(".*.tmp"), *path.glob("figures/.*.tmp")):
        leftover.unlink()
    earlier = read_config(path)
    others = [entry for entry in path.iterdir() if entry.name != files.LOCK]
    if earlier is None and others:
        raise InputError(f"--workdir={path} holds {others[0].name} but no run; name a new or an empty folder")
    if earlier is not None and overwrite:
        # config.json goes last: a folder without it is nobody's, and would not be deleted from again.
        for entry in sorted(others, key=lambda entry: entry.name == "config.json"):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        earlier = None
    if earlier is not None:
        _refuse_another(path, earlier, experiment, config)
        whole = files.read_json_lines(path / "metrics.jsonl")
        if whole:
            files.write_atomically(path / "metrics.jsonl", "".join(files.to_json(r) + "\n" for r in whole))
        return
    files.write_atomically(path / "flags.txt", "".join(flag + "\n" for flag in flags))
    files.write_atomically(path / "config.json", files.to_json({"experiment": experiment, "config": config}, 1) + "\n")


def read_config(path: Path) -> dict | None:
    """The `experiment` and the `config` of the run in a folder, or None where there is none."""
    try:
        content = json.loads((path / "config.json").read_bytes())
        return content if {"experiment", "config"} <= content.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def _refuse_another(path: Path, earlier: dict, experiment: str, config: dict) -> None:
    way_out = "name another folder with --workdir, or start anew with --overwrite"
    if earlier["experiment"] != experiment:
        raise InputError(f"--workdir={path} is a run of {earlier['experiment']}, not of {experiment}; {way_out}")
    there, here = _leaves(earlier["config"]), _leaves(config)
    names = [n for n in {**there, **here} if there.get(n) != here.get(n) and n.split(".")[-1] not in HOW_ONLY]
    if names:
        said = ", ".join(f"--{n.split('.')[-1]} was {there.get(n)!r} and is {here.get(n)!r}" for n in names)
        raise InputError(f"--workdir={path} holds a run with other settings ({said}); {way_out}")


def _without(config: Mapping, names: Sequence[str]) -> dict:
    return {name: _without(value, names) if isinstance(value, Mapping) else value
            for name, value in config.items() if name not in names}


def _leaves(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict of dotted names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat.update(_leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value})
    return flat

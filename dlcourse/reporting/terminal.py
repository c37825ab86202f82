"""What a person sees while a run runs: banner, progress, and the result at the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

EVERY = 5.0
"""Seconds between two lines of progress where there is no terminal."""


def number(value: Any) -> str:
    """A figure as people read it: four significant digits, whole numbers whole."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1e4 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as people read them: `4.2 s`, `3 min 05 s`, `2 h 07 min`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def banner(pairs: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> None:
    """Prints name and value, one pair a line, before a run begins."""
    from rich.text import Text

    pairs = [(str(name), str(value)) for name, value in dict(pairs).items()]
    width = max(len(name) for name, _ in pairs)
    console = _console()
    for name, value in pairs:
        console.print(Text.assemble((f"{name:<{width}}  ", "dim"), value))


class Progress:
    """A bar on a terminal, a plain line every few seconds elsewhere.

        with Progress(total_steps, batch_size) as progress:
            progress.update(step, {"loss": …, "accuracy": …})

    `total_steps` is None where only a clock ends the run. `done` steps were made in an earlier session; they do not
    count into the speed and the time left. `quiet`: nothing is shown, as in all processes of a run but the first.
    """

    def __init__(self, total_steps: int | None, batch_size: int, done: int = 0, quiet: bool = False):
        self.total, self.batch_size, self.done, self.quiet = total_steps, batch_size, done, quiet
        self.console = _console()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        self._began = self._said = time.monotonic()
        if self.console.is_terminal and not self.quiet:
            from rich import progress as rich_progress

            self._bar = rich_progress.Progress(
                rich_progress.BarColumn(bar_width=24), rich_progress.TextColumn("{task.fields[line]}", markup=False),
                console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total, completed=self.done, line="compiling")
        return self

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Says where the run is: after `step` steps, with these values."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=self._line(step, values, now))
        elif not self.quiet and (now - self._said >= EVERY or step == self.total):
            self._said = now
            print(self._line(step, values, now), flush=True)

    def _line(self, step: int, values: Mapping[str, float], now: float) -> str:
        parts = [f"step {step}/{self.total}" if self.total else f"step {step}"]
        parts += [f"{name} {float(value):.4g}" for name, value in values.items()]
        speed = (step - self.done) / max(now - self._began, 1e-9)
        if speed > 0:
            parts.append(f"{number(round(speed * self.batch_size))} examples/s")
            if self.total and step < self.total:
                parts.append(f"{duration((self.total - step) / speed)} left")
        return "  ".join(parts)

    def __exit__(self, *exception: Any) -> None:
        if self._bar is not None:
            self._bar.stop()


def summary(result: Mapping[str, Any], path: Any) -> None:
    """Prints the end of a run: figures, claims and where the report is.

    Args:
      result: the content of result.json.
      path: the run's folder.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = _console()
    if result["metrics"]:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="dim")
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name, value in _shown(result["metrics"]).items():
            table.add_row(Text(name), number(value))
        console.print(table)
    for claim in result["claims"]:
        _print_claim(console, claim)
    console.print(Text.assemble(("\nreport  ", "dim"), f"{path}/report.html"))


def _shown(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics without the curves: of more than eight `method/quantity` of one method only their number is said."""
    sizes = Counter(name.partition("/")[0] for name in metrics)
    shown = {}
    for name, value in metrics.items():
        method = name.partition("/")[0]
        if sizes[method] <= 8:
            shown[name] = value
        else:
            shown[f"{method}/…"] = f"{sizes[method]} values, in the report"
    return shown


def _print_claim(console: Any, claim: Mapping[str, Any]) -> None:
    from rich.text import Text

    evidence = claim["evidence"]
    low, high = (number(end) for end in evidence["ci95"])
    verdict = ("holds         ", "bold green") if claim["holds"] else ("does not hold ", "bold yellow")
    said = (f"{number(evidence['value'])} against {number(evidence['control'])}, 95 % interval [{low}, {high}], "
            f"threshold {number(evidence['threshold'])}, n = {number(evidence['n'])} ({claim['id']})")
    console.print(Text.assemble("\n", verdict, claim["statement"], "\n", (f"{'':14}{said}", "dim")))

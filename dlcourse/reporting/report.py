"""A run's result as one page that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dlcourse.reporting import svg
from dlcourse.reporting.terminal import duration, number

ROOM_FOR_FIGURES = 4_500_000
"""Bytes; the page stays below 5 MB. Figures beyond are linked, the largest first."""

WIDE = 1.7
"""A figure so many times wider than high takes the page's whole width."""


def render(result: Mapping[str, Any], folder: Path) -> str:
    """The report of a finished run.

    Args:
      result: the content of result.json.
      folder: the run's, where its figures lie.

    Returns:
      HTML. All that came from flags, files and class names is escaped.
    """
    settings = list(_leaves(result["config"]))
    environment = [("date", result["date"]), *result["environment"].items(), *_times(result["seconds"])]
    return _environment().get_template("report.html.jinja").render(
        result=result, title=result["experiment"].replace("_", " ").capitalize(), subtitle=_subtitle(settings),
        tiles=list(_tiles(result)), figures=_figures(result["figures"], folder),
        metrics=list(_metrics(result["metrics"])), settings=settings, environment=environment)


def render_course(rows: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> str:
    """The index of a whole course.

    Args:
      rows: what the lecture says, in its order: `id`, `section`, `says`, `status` (said where nothing was tested) and
        `claims` (those of result.json, each with `report`, a link).
      runs: `command`, `outcome`, `seconds`, `report` (a link or None).

    Returns:
      HTML.
    """
    claims = [claim for row in rows for claim in row["claims"]]
    return _environment().get_template("course.html.jinja").render(
        rows=rows, runs=runs, tested=len(claims), held=sum(bool(claim["holds"]) for claim in claims),
        waiting=sum(not row["claims"] for row in rows))


def _environment() -> jinja2.Environment:
    templates = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    page = jinja2.Environment(loader=templates, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page.filters.update(number=number, duration=duration, scale=scale, in_words=in_words)
    page.globals["verdict"] = _verdict
    return page


def _verdict(claim: Mapping[str, Any]) -> Markup:
    kind, words = ("yes", "holds") if claim["holds"] else ("no", "does not hold")
    return Markup('<span class="verdict {}">{}</span>').format(kind, words)


def in_words(evidence: Mapping[str, Any]) -> str:
    """A claim's evidence as a phrase."""
    low, high = (number(end) for end in evidence["ci95"])
    return (f"{number(evidence['value'])} against {number(evidence['control'])} of the control, "
            f"95 % interval {low} to {high}, n = {number(evidence['n'])}")


def scale(evidence: Mapping[str, Any]) -> dict[str, float | None] | None:
    """Where value, control and interval lie on a line, in percent of its length.

    An interval that holds `value - control` is that of the difference and is drawn from the control on; one that
    holds only `value` is the value's own.

    Returns:
      `value`, `control`, `low`, `width` (None where the interval fits neither); None where a number is missing.
    """
    value, control, (low, high) = evidence["value"], evidence["control"], evidence["ci95"]
    if None in (value, control, low, high):
        return None
    slack = 1e-9 + 1e-6 * abs(value)
    if low - slack <= value - control <= high + slack:
        low, high = control + low, control + high
    elif not low - slack <= value <= high + slack:
        low = high = None
    marks = [value, control] + ([] if low is None else [low, high])
    start, length = min(marks), (max(marks) - min(marks)) or 1.0
    at = lambda x: round(4 + 92 * (x - start) / length, 2)  # noqa: E731
    return {"value": at(value), "control": at(control), "low": None if low is None else at(low),
            "width": None if low is None else round(at(high) - at(low), 2)}


def _subtitle(settings: Sequence[tuple[str, Any]]) -> str:
    values = {name.split(".")[-1]: value for name, value in settings}
    said = [(name, values[name]) for name in ("dataset", "model", "seed") if values.get(name) not in (None, "")]
    return " · ".join(f"{name} {value}" for name, value in said)


def _tiles(result: Mapping[str, Any]):
    """The few figures that come first: test accuracy, claims, time."""
    metrics = result["metrics"]
    accuracy, low, high = (metrics.get(f"test/accuracy{end}") for end in ("", "_low", "_high"))
    if accuracy is not None:
        interval = f"{100 * low:.1f} to {100 * high:.1f} %" if None not in (low, high) else ""
        examples = f"{number(metrics['test/n'])} examples" if metrics.get("test/n") else ""
        yield {"name": "test accuracy", "value": f"{100 * accuracy:.1f} %",
               "note": ", ".join(filter(None, (interval, examples)))}
    if result["claims"]:
        held = sum(bool(claim["holds"]) for claim in result["claims"])
        yield {"name": "claims that hold", "value": f"{held} of {len(result['claims'])}",
               "note": "each with its control"}
    if result["seconds"].get("total") is not None:
        yield {"name": "time", "value": duration(result["seconds"]["total"]),
               "note": str(result["environment"].get("devices", ""))}


def _figures(figures: Sequence[Mapping[str, str]], folder: Path) -> list[dict[str, Any]]:
    texts = {figure["file"]: (folder / figure["file"]).read_text() for figure in figures}
    room = ROOM_FOR_FIGURES
    inside = set()
    for file in sorted(texts, key=lambda file: len(texts[file])):
        if len(texts[file].encode()) <= room:
            room -= len(texts[file].encode())
            inside.add(file)
    drawn = {file: Markup(svg.inline(texts[file])) for file in inside}
    return [{**figure, "wide": _aspect(texts[figure["file"]]) > WIDE, "svg": drawn.get(figure["file"])}
            for figure in figures]


def _aspect(text: str) -> float:
    found = re.search(r'viewBox="\S+ \S+ (\S+) (\S+)"', text)
    return float(found.group(1)) / float(found.group(2)) if found else 1.0


def _metrics(metrics: Mapping[str, float]):
    """One row a metric, with its `_low` and `_high` as its interval."""
    for name, value in metrics.items():
        stem = re.sub("_(low|high)$", "", name)
        if stem != name and stem in metrics and {f"{stem}_low", f"{stem}_high"} <= metrics.keys():
            continue
        has_interval = {f"{name}_low", f"{name}_high"} <= metrics.keys()
        yield {"name": name, "value": value, "low": metrics[f"{name}_low"] if has_interval else None,
               "high": metrics[f"{name}_high"] if has_interval else None}


def _times(seconds: Mapping[str, float]):
    yield from ((f"time, {name}", duration(value)) for name, value in seconds.items() if value is not None)


def _leaves(config: Mapping[str, Any], prefix: str = ""):
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value

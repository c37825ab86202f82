"""The drawings of a report. Each says what is seen (caption), the same in words (alt) and how we know (how).

Every function returns a `Drawing`: `run.figure("probes", **figures.probe_curve(...))`.
Colours are of middle brightness and black is the page's ink, so that all read on light and dark.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypedDict

import matplotlib
import numpy as np
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#2f81d6", "#d9612b", "#2a9d6f", "#8b95a3"

STYLE = {
    "figure.constrained_layout.use": True, "font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left",
    "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.5,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": "black", "grid.alpha": 0.14,
    "grid.linewidth": 0.5, "xtick.major.width": 0.5, "ytick.major.width": 0.5, "legend.frameon": False,
    "lines.linewidth": 1.6, "text.parse_math": False, "image.interpolation": "none", "image.composite_image": False,
    "axes.prop_cycle": matplotlib.cycler(color=[BLUE, ORANGE, GREEN, GREY]),
}

POINTS = 400
"""A longer curve is averaged down to so many points: more cannot be seen, and the page stays small."""


class Drawing(TypedDict):
    fig: Figure
    caption: str
    alt: str
    how: str


def styled(draw: Callable[..., Drawing]) -> Callable[..., Drawing]:
    """Makes a drawing in this style, leaving matplotlib's global settings alone."""

    @functools.wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Drawing:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def percent(share: float) -> str:
    """A share as people read it: `98.3 %`."""
    return f"{100 * share:.1f} %"


@styled
def learning_curves(records: Sequence[Mapping[str, Any]]) -> Drawing:
    """Loss and accuracy over the steps, on the training and the validation split.

    Args:
      records: lines of metrics.jsonl, as `run.metrics()` returns them. A validation split's mean negative
        log likelihood is its loss; `accuracy_low` and `accuracy_high` are drawn as a band.
    """
    curves = {quantity: {split: _curve(records, split, names) for split in ("train", "validation")}
              for quantity, names in (("loss", ("loss", "nll")), ("accuracy", ("accuracy",)))}
    curves = {quantity: {split: curve for split, curve in by_split.items() if len(curve)}
              for quantity, by_split in curves.items() if any(map(len, by_split.values()))}
    fig = Figure(figsize=(3.4 * max(len(curves), 1), 2.4))
    for ax, (quantity, by_split) in zip(fig.subplots(1, max(len(curves), 1), squeeze=False)[0], curves.items(),
                                        strict=False):
        for (split, curve), colour in zip(by_split.items(), (BLUE, ORANGE), strict=False):
            ax.plot(*curve.T, color=colour, label=split, marker="o" if len(curve) == 1 else None)
        if "validation" in by_split and quantity == "accuracy":
            _band(ax, records)
        ax.set(title=quantity, xlabel="step")
        ax.legend()
    ends = "; ".join(f"{quantity} on {split} from {curve[0, 1]:.3g} to {curve[-1, 1]:.3g}"
                     for quantity, by_split in curves.items() for split, curve in by_split.items())
    return Drawing(
        fig=fig, caption="How the network learned.", alt=f"Learning curves: {ends}.",
        how="Logged during training. Training values are means over the batches since the last point, with "
            "augmentation and dropout on; validation values are over the whole split, with both off. "
            "The band is the 95 % interval.")


def _curve(records, split: str, names: Sequence[str]) -> np.ndarray:
    """(T, 2) of step and value, thinned by averaging neighbours."""
    named = [(record["step"], [record["values"][name] for name in names if record["values"].get(name) is not None])
             for record in records if record["split"] == split]
    curve = np.array([(step, values[0]) for step, values in named if values], np.float64).reshape(-1, 2)
    blocks = np.array_split(curve, min(len(curve), POINTS)) if len(curve) else []
    return np.array([block.mean(0) for block in blocks]).reshape(-1, 2)


def _band(ax: Any, records) -> None:
    low, high = (_curve(records, "validation", (f"accuracy_{end}",)) for end in ("low", "high"))
    if len(low) and len(low) == len(high):
        ax.fill_between(low[:, 0], low[:, 1], high[:, 1], color=ORANGE, alpha=0.2, linewidth=0)


@styled
def probe_curve(taps: Sequence[str], trained: Sequence[float], untrained: Sequence[float],
                trained_ci: Sequence[tuple[float, float]], untrained_ci: Sequence[tuple[float, float]]) -> Drawing:
    """Accuracy of a linear probe at every tap, of the trained network and of the same network untrained.

    Args:
      taps: T names, from pixels to logits.
      trained: (T,) accuracies in [0, 1].
      untrained: (T,) the control's.
      trained_ci: (T, 2) 95 % intervals.
      untrained_ci: (T, 2).
    """
    fig = Figure(figsize=(max(4.2, 0.5 * len(taps) + 1), 2.9))
    ax = fig.subplots()
    curves = (("untrained", untrained, untrained_ci, GREY), ("trained", trained, trained_ci, BLUE))
    for name, values, ci, colour in curves:
        ax.plot(range(len(taps)), values, "o-", color=colour, label=name, markersize=4)
        ax.fill_between(range(len(taps)), *np.asarray(ci, np.float64).T, color=colour, alpha=0.2, linewidth=0)
    ax.set_ylabel("accuracy of a linear probe")
    _name_positions(ax, taps)
    ax.legend()
    points = "; ".join(f"{tap} {percent(a)} against {percent(b)}"
                       for tap, a, b in zip(taps, trained, untrained, strict=True))
    return Drawing(
        fig=fig, caption="What a linear classifier can read from each layer, before and after training.",
        alt=f"Accuracy of a linear probe at each layer, trained against untrained: {points}.",
        how="A linear classifier was fitted on each layer's activations of training images and scored on images it had "
            "not seen. The control is the same network before training, read the same way. Bands are 95 % intervals.")


@styled
def receptive_fields(taps: Sequence[str], theory: Sequence[float], measured: Sequence[float]) -> Drawing:
    """The side of the patch of pixels that one unit sees, by arithmetic and by gradient.

    Args:
      taps: T names, in order.
      theory: (T,) pixels.
      measured: (T,) pixels.
    """
    fig = Figure(figsize=(max(4.2, 0.5 * len(taps) + 1), 2.7))
    ax = fig.subplots()
    ax.plot(range(len(taps)), theory, "-", color=GREY, label="theory")
    ax.plot(range(len(taps)), measured, "o", color=BLUE, label="measured", markersize=5)
    ax.set(ylabel="receptive field (pixels)", ylim=(0, None))
    _name_positions(ax, taps)
    ax.legend()
    points = "; ".join(f"{tap} {a:g} and {b:g}" for tap, a, b in zip(taps, theory, measured, strict=True))
    return Drawing(
        fig=fig, caption="How much of the image one unit sees, layer by layer.",
        alt=f"Receptive field in pixels at each layer, theory and measured: {points}.",
        how="Theory: kernel sizes and strides, added up. Measured: the extent of the pixels for which the derivative "
            "of a unit in the middle of the layer is not zero.")


def _name_positions(ax: Any, names: Sequence[str]) -> None:
    crowded = sum(map(len, names)) > 40
    ax.set_xticks(range(len(names)), [shorten(name) for name in names], rotation=45 if crowded else 0,
                  ha="right" if crowded else "center", rotation_mode="anchor" if crowded else None)


@styled
def comparison(names: Sequence[str], values: Sequence[float], intervals: Sequence[tuple[float, float]],
               controls: Collection[str], quantity: str, how: str) -> Drawing:
    """Values with intervals, one a row; controls are grey, and a line marks the best of them.

    Args:
      names: M names.
      values: (M,).
      intervals: (M, 2) 95 % intervals.
      controls: those of `names` that could have refuted the claim.
      quantity: what the values are, with unit.
      how: what was measured, and on what.
    """
    fig = Figure(figsize=(5.2, 0.34 * len(names) + 0.8))
    ax = fig.subplots()
    for row, (name, value, (low, high)) in enumerate(zip(names, values, intervals, strict=True)):
        colour = GREY if name in controls else BLUE
        ax.plot([low, high], [row, row], color=colour, linewidth=5, alpha=0.4, solid_capstyle="butt")
        ax.plot([value], [row], "o", color=colour, markersize=6)
    best = [value for name, value in zip(names, values, strict=True) if name in controls]
    if best:
        ax.axvline(max(best), color="black", linewidth=0.7, linestyle=(0, (3, 3)), alpha=0.6)
    ax.set_yticks(range(len(names)), [shorten(name, 32) for name in names])
    ax.set(xlabel=quantity, ylim=(len(names) - 0.5, -0.5))
    ax.grid(axis="x")
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    rows = "; ".join(f"{name} {value:.4g} (95 % interval {low:.4g} to {high:.4g})"
                     for name, value, (low, high) in zip(names, values, intervals, strict=True))
    caption = f"{quantity[:1].upper()}{quantity[1:]}, against controls (grey; the line marks the best of them)."
    return Drawing(fig=fig, caption=caption, alt=f"{quantity}: {rows}.", how=how)


def shorten(name: str, length: int = 16) -> str:
    """`name` with its middle left out where it is longer than `length` characters."""
    name = str(name)
    return name if len(name) <= length else f"{name[: length - 5]}…{name[-4:]}"

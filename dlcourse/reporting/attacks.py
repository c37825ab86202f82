"""The drawings of attacks: accuracy by the size of the change, and images before and after."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from dlcourse.reporting.figures import BLUE, GREEN, GREY, ORANGE, Drawing, percent, shorten, styled
from dlcourse.reporting.pictures import picture

COLOURS = (BLUE, ORANGE, GREEN, "#8d5fd3", "#c2185b", "#6b705c")


@styled
def accuracy_by_size(sizes: Sequence[float], accuracies: Mapping[str, Sequence[float]], controls: Collection[str],
                     unit: str, n: int) -> Drawing:
    """Accuracy under each attack as the change may grow; controls are grey.

    Args:
      sizes: (E,) eps, rising; may begin with 0.
      accuracies: attack -> (E,) in [0, 1].
      controls: those of the attacks that only draw at random.
      unit: of eps, such as "grey levels (L∞)".
      n: images.
    """
    fig = Figure(figsize=(5, 3))
    ax = fig.subplots()
    colours = iter(COLOURS)
    for name, values in accuracies.items():
        colour = GREY if name in controls else next(colours, BLUE)
        ax.plot(sizes, values, "o-", color=colour, label=name, markersize=4)
    ax.set(xlabel=f"size of the change, {unit}", ylabel="accuracy", ylim=(0, 1.02))
    ax.legend()
    ends = "; ".join(f"{name} from {percent(values[0])} at {sizes[0]:.3g} to {percent(values[-1])} at {sizes[-1]:.3g}"
                     for name, values in accuracies.items())
    return Drawing(fig=fig, caption="How accuracy falls as the change may grow; under noise of the same size (grey).",
                   alt=f"Accuracy by size of the change: {ends}.",
                   how=f"Over the same {n} test images; an image counts as right only if it is so after the attack. "
                       "Noise: the worst of several random changes of the same norm.")


@styled
def certified_by_radius(curves: Sequence[tuple[float, Sequence[float], Sequence[float], float]], samples: int,
                        n: int) -> Drawing:
    """The share of images whose class is right and certain to stay so within each radius.

    Args:
      curves: deviation of the noise, radii (R,) l2 in pixels' units, accuracy (R,) in [0, 1], average radius.
      samples: noisy copies an image.
      n: images.
    """
    fig = Figure(figsize=(5, 3))
    ax = fig.subplots()
    for number, (sigma, radii, accuracy, average) in enumerate(sorted(curves)):
        ax.step(radii, accuracy, where="post", color=COLOURS[number % len(COLOURS)],
                label=f"σ {sigma:g}, average radius {average:.3f}")
    ax.set(xlabel="radius (L2)", ylabel="certified accuracy", ylim=(0, 1.02),
           xlim=(0, max(radii[-1] for _, radii, *_ in curves)))
    ax.legend()
    return Drawing(fig=fig, caption="Randomised smoothing: images whose class cannot change within a radius.",
                   alt="; ".join(f"with noise of deviation {sigma:g} certified accuracy falls from "
                                 f"{percent(accuracy[0])} at radius 0 to {percent(accuracy[-1])} at {radii[-1]:.3g}"
                                 for sigma, radii, accuracy, _ in sorted(curves)) + ".",
                   how=f"CERTIFY (Cohen et al. 2019) with noise of deviation σ and {samples} noisy copies of each of "
                       f"{n} test images; each certificate is wrong with probability 0.001. The average radius is 0 "
                       "where the class is wrong.")


@styled
def trade_off(networks: Mapping[str, tuple[float, float]], threat: str, n: int) -> Drawing:
    """Accuracy under attack by accuracy without, a point a network.

    Args:
      networks: name -> (clean, attacked), both in [0, 1].
      threat: that the second holds for.
      n: images attacked.
    """
    fig = Figure(figsize=(5, 3.4))
    ax = fig.subplots()
    for name, (clean, attacked) in networks.items():
        ax.plot([clean], [attacked], "o", color=BLUE)
        ax.annotate(shorten(name), (clean, attacked), xytext=(5, 4), textcoords="offset points", fontsize=7)
    ax.set(xlabel="accuracy", ylabel=f"accuracy, {threat}")
    ax.margins(0.2)
    said = "; ".join(f"{name} {percent(clean)}, {percent(attacked)} under attack"
                     for name, (clean, attacked) in networks.items())
    return Drawing(fig=fig, caption="What robustness costs: accuracy under attack against accuracy without.",
                   alt=f"Accuracy without and under attack: {said}.",
                   how=f"Without attack over the whole test split, under the worst of all attacks over {n} images.")


@styled
def strips(originals: np.ndarray, changed: np.ndarray, before: Sequence[str], after: Sequence[str], scale: float,
           caption: str, how: str) -> Drawing:
    """Each image, the change made visible, and the result, with what the network says of both.

    Args:
      originals: (M,H,W,C) in [0,1].
      changed: (M,H,W,C) in [0,1].
      before: M verdicts on the originals.
      after: M verdicts on the results.
      scale: what the change is multiplied by, around middle grey.
      caption: of the figure.
      how: how the images were chosen and changed.
    """
    m = len(originals)
    fig = Figure(figsize=(1.15 * m, 4.3))
    change = np.clip(0.5 + scale * (np.asarray(changed) - originals), 0, 1)
    rows = ((originals, before), (change, [f"change x {scale:.3g}"] * m), (changed, after))
    for axes, (images, words) in zip(fig.subplots(3, m, squeeze=False), rows, strict=True):
        for ax, image, said in zip(axes, images, words, strict=True):
            ax.axis("off")
            picture(ax, np.asarray(image))
            ax.text(0.5, -0.06, said, transform=ax.transAxes, ha="center", va="top", fontsize=7, linespacing=1.2)
    said = "; ".join(f"{a} became {b}" for a, b in zip(before, after, strict=True)).replace("\n", " ")
    return Drawing(fig=fig, caption=caption, alt=f"Images before and after the attack: {said}.", how=how)


def verdict(name: str, confidence: float) -> str:
    """A class and how sure the network is of it, in two short lines."""
    return f"{shorten(name, 13)}\n{percent(confidence)}"

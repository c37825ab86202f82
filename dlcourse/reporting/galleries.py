"""Pictures side by side, a row a method and a column a class."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from dlcourse.reporting.figures import Drawing, percent, shorten, styled
from dlcourse.reporting.pictures import thumbnail


@styled
def gallery(rows: Mapping[str, np.ndarray], confidence: Mapping[str, np.ndarray], class_names: Sequence[str], *,
            caption: str, how: str, most: int = 12) -> Drawing:
    """Images of every class, with what a network makes of each.

    Args:
      rows: method -> (K,H,W,C) in [0,1], the k-th image for class k.
      confidence: method -> (K,) the probability of that class.
      class_names: K.
      caption: what is to be seen.
      how: how the images were made, and what judged them.
      most: columns at most, the first ones.
    """
    count = min(len(class_names), most)
    fig = Figure(figsize=(1.1 + 0.78 * count, 1.02 * len(rows)))
    for line, (method, images) in zip(fig.subplots(len(rows), count, squeeze=False), rows.items(), strict=True):
        line[0].text(-0.15, 0.5, textwrap.fill(method, 13), transform=line[0].transAxes, ha="right", va="center",
                     fontsize=8, fontweight="bold")
        for k, ax in enumerate(line):
            ax.axis("off")
            image = thumbnail(images[k])
            ax.imshow(image if image.shape[-1] == 3 else image.mean(-1), cmap="gray", vmin=0, vmax=1)
            ax.text(0.5, -0.06, f"{shorten(class_names[k], 11)}\n{percent(confidence[method][k])}",
                    transform=ax.transAxes, ha="center", va="top", fontsize=7, linespacing=1.2)
    said = "; ".join(f"{method}: " + ", ".join(f"{class_names[k]} {percent(values[k])}" for k in range(count))
                     for method, values in confidence.items())
    return Drawing(fig=fig, caption=caption, alt=f"A row of images a method, with confidences. {said}.", how=how)

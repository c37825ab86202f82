"""The drawings of a report that show images: predictions, confusions and filters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from dlcourse.reporting.figures import BLUE, ORANGE, Drawing, percent, shorten, styled

THUMBNAIL = 96
"""Larger images are shown at this many pixels a side, so that a page of them stays small."""


@styled
def confusion_matrix(counts: np.ndarray, class_names: Sequence[str]) -> Drawing:
    """Which class is taken for which.

    Args:
      counts: (K, K) whole numbers; row the truth, column the prediction.
      class_names: K.
    """
    counts = np.asarray(counts)
    classes, total, right = len(counts), int(counts.sum()), int(np.trace(counts))
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = float(np.clip(0.36 * classes + 0.9, 2.6, 6.2))
    fig = Figure(figsize=(side, side))
    ax = fig.subplots()
    ax.imshow(_tint(share))
    ax.grid(False)
    ax.set(xlabel="prediction", ylabel="truth")
    if classes <= 30:
        names = [shorten(name, 12) for name in class_names]
        ax.set_xticks(range(classes), names, rotation=90 if max(map(len, names)) > 2 else 0)
        ax.set_yticks(range(classes), names)
        ax.tick_params(length=0)
    if classes <= 15:
        for row, column in zip(*np.nonzero(counts), strict=True):
            ax.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8)
    return Drawing(
        fig=fig, caption="Which class is taken for which: right in blue, wrong in orange.",
        alt=f"Confusion matrix: {right} of {total} right. {_worst_confusions(counts, class_names)}",
        how=f"Counts over {total} test examples. A cell's tint is the square root of its share of its row, "
            "so that rare confusions can be seen.")


def _tint(share: np.ndarray) -> np.ndarray:
    """(K, K) in [0, 1] -> (K, K, 4): colour by right or wrong, opacity by share, so that any page shows through."""
    colour = np.where(np.eye(len(share), dtype=bool)[..., None], to_rgb(BLUE), to_rgb(ORANGE))
    return np.concatenate([colour, 0.8 * np.sqrt(share)[..., None]], -1)


def _worst_confusions(counts: np.ndarray, class_names: Sequence[str]) -> str:
    wrong = counts - np.diag(np.diag(counts))
    worst = [i for i in np.argsort(wrong, axis=None)[::-1][:3] if wrong.flat[i] > 0]
    pairs = [(*np.unravel_index(i, wrong.shape), int(wrong.flat[i])) for i in worst]
    said = "; ".join(f"{class_names[truth]} taken for {class_names[taken]} {n} times" for truth, taken, n in pairs)
    return f"Most common confusions: {said}." if said else "No confusions."


@styled
def sample_predictions(images: Callable[[np.ndarray], np.ndarray], labels: np.ndarray, predicted: np.ndarray,
                       confidence: np.ndarray, class_names: Sequence[str], columns: int = 6) -> Drawing:
    """The best, the worst that are still right, and the most wrong.

    Args:
      images: indices (M,) of the N examples -> (M, H, W, C) in [0, 1]; asked only for those that are shown.
      labels: (N,) the truth.
      predicted: (N,) the most probable class.
      confidence: (N,) its probability.
      class_names: K.
      columns: images a row, at most.
    """
    labels, predicted, confidence = map(np.asarray, (labels, predicted, confidence))
    right = np.flatnonzero(predicted == labels)
    wrong = np.flatnonzero(predicted != labels)
    rows = {"best: right and surest": right[np.argsort(-confidence[right], kind="stable")][:columns],
            "worst: right and least sure": right[np.argsort(confidence[right], kind="stable")][:columns],
            "most wrong: wrong and surest": wrong[np.argsort(-confidence[wrong], kind="stable")][:columns]}
    rows = {title: chosen for title, chosen in rows.items() if len(chosen)}
    fig = Figure(figsize=(0.98 * columns, 1.6 * len(rows)))
    for part, (title, chosen) in zip(np.ravel(fig.subfigures(len(rows), 1)), rows.items(), strict=True):
        part.suptitle(title, x=0.005, ha="left", fontsize=9, fontweight="bold")
        shown = [*zip(chosen, images(chosen), strict=True), *[(None, None)] * columns]
        for ax, (index, image) in zip(part.subplots(1, columns, squeeze=False)[0], shown, strict=False):
            ax.axis("off")
            if index is not None:
                picture(ax, image)
                ax.text(0.5, -0.06, _verdict(labels[index], predicted[index], confidence[index], class_names),
                        transform=ax.transAxes, ha="center", va="top", fontsize=7.5, linespacing=1.3)
    said = " ".join(f"{title[:1].upper()}{title[1:]}: {_in_words(chosen, labels, predicted, confidence, class_names)}."
                    for title, chosen in rows.items())
    none = "" if len(wrong) else " None was wrong."
    return Drawing(
        fig=fig, caption=f"The surest, the least sure and the most wrong predictions.{none}", alt=said + none,
        how=f"Chosen by the probability that the network gives to its prediction, among {len(labels)} test images of "
            f"which {len(wrong)} were wrong; nobody picked them.")


def _verdict(label: int, predicted: int, confidence: float, class_names: Sequence[str]) -> str:
    said = f"{shorten(class_names[predicted], 14)}\n{percent(confidence)}"
    return said if label == predicted else f"{said}\nis {shorten(class_names[label], 11)}"


def _in_words(chosen, labels, predicted, confidence, class_names) -> str:
    return "; ".join(f"{class_names[labels[i]]} called {class_names[predicted[i]]} with {percent(confidence[i])}"
                     for i in chosen)


def picture(ax: Any, image: np.ndarray) -> None:
    """Draws (H, W, C) in [0, 1], grey unless C is 3."""
    image = thumbnail(image)
    if image.shape[-1] == 3:
        ax.imshow(image)
    else:
        ax.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=1)


def thumbnail(image: np.ndarray) -> np.ndarray:
    """(H, W, C) in [0, 1] -> the same, averaged down until no side exceeds `THUMBNAIL` pixels."""
    image = np.clip(np.asarray(image, np.float32), 0, 1)
    factor = -(-max(image.shape[:2]) // THUMBNAIL)
    height, width = (side // factor * factor or side for side in image.shape[:2])
    if factor == 1 or min(image.shape[:2]) < factor:
        return image
    return image[:height, :width].reshape(height // factor, factor, width // factor, factor, -1).mean((1, 3))


@styled
def filters(trained: np.ndarray, untrained: np.ndarray, most: int = 64) -> Drawing:
    """First-layer kernels, and those that training began with, on one colour scale centred on zero.

    Args:
      trained: (h, w, C, F) kernels.
      untrained: (h, w, C, F) the same before training.
      most: show at most so many, the first ones.
    """
    trained, untrained = (np.asarray(kernels, np.float32)[..., :most] for kernels in (trained, untrained))
    height, width, channels, count = trained.shape
    scale = float(max(np.abs(trained).max(), np.abs(untrained).max())) or 1.0
    fig = Figure(figsize=(6.6, 3.4))
    axes = fig.subplots(1, 2)
    fig.get_layout_engine().set(wspace=0.08)
    for ax, kernels, name in zip(axes, (trained, untrained), ("trained", "untrained (control)"), strict=True):
        shown = ax.imshow(_on_one_scale(kernels, scale), cmap="RdBu_r", vmin=0, vmax=1)
        ax.set_title(name)
        ax.axis("off")
    if channels != 3:
        bar = fig.colorbar(shown, ax=axes, shrink=0.7, ticks=[0, 0.5, 1])
        bar.ax.set_yticklabels([f"−{scale:.2g}", "0", f"{scale:.2g}"])
        bar.outline.set_visible(False)
    shares = (f"{np.linalg.norm(kernels) / np.sqrt(kernels.size):.3g}" for kernels in (trained, untrained))
    colours = ("grey is zero, a colour the input channels' weights" if channels == 3 else
               "white is zero, red positive, blue negative")
    return Drawing(
        fig=fig, caption=f"{count} filters of the first layer, and the same before training.",
        alt=f"{count} filters of {height} by {width} weights, trained and untrained side by side; "
            "root mean square weight {} after and {} before training.".format(*shares),
        how=f"The weights themselves, on one scale for both, centred on zero ({colours}). "
            "What the untrained ones show too was not learned.")


def _mosaic(kernels: np.ndarray) -> np.ndarray:
    """(h, w, C, F) -> one image of all kernels, (…, …) or (…, …, 3), with gaps of NaN between them."""
    height, width, channels, count = kernels.shape
    if channels != 3:
        kernels = kernels.mean(2, keepdims=True)
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    image = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, kernels.shape[2]), np.nan, np.float32)
    for index in range(count):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        image[top : top + height, left : left + width] = kernels[..., index]
    return image[..., 0] if channels != 3 else image


def _on_one_scale(kernels: np.ndarray, scale: float) -> np.ndarray:
    """A mosaic with -scale, 0 and scale at 0, 0.5 and 1; its gaps are see-through."""
    image = _mosaic(kernels) / scale * 0.5 + 0.5
    if image.ndim == 2:
        return image  # imshow leaves out what is NaN
    return np.concatenate([np.nan_to_num(image), ~np.isnan(image[..., :1])], -1)

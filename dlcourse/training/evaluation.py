"""What a classifier does on a split, example by example, and the figures made from that."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dlcourse.contracts import Predict, Split
from dlcourse.data import batches
from dlcourse.training.intervals import wilson
from dlcourse.training.parallel import Plan


class Predictions(struct.PyTreeNode):
    """One entry an example, in the split's order.

    Attributes:
      index: (N,) position in the split.
      label: (N,) the truth.
      predicted: (N,) the most probable class.
      confidence: (N,) its probability, in [0, 1].
      nll: (N,) -log probability of the truth, in nats.
    """

    index: np.ndarray
    label: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    nll: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """(N,) bool; never where the logits are not finite."""
        return (self.predicted == self.label) & ~np.isnan(self.confidence)


@functools.lru_cache(maxsize=64)
def _logits(model):
    return jax.jit(lambda variables, images: model.apply(variables, images)[0])


def predictor(model, variables) -> Predict:
    """images -> logits with these variables, which stay arguments: new ones never recompile.

    A pytree whose leaves are the variables, so that it may itself be an argument of a compiled function.
    """
    return jax.tree_util.Partial(_logits(model), variables)


def mirrored(predict: Predict) -> Predict:
    """images -> the mean of the logits of each image and of its mirror image (Krizhevsky et al. 2012, section 4.1)."""
    return lambda images: (predict(images) + predict(images[:, :, ::-1])) / 2


@jax.jit
def _judge(logits, label):
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    nll = -jnp.take_along_axis(log_p, label[:, None], 1)[:, 0]
    return logits.argmax(-1), jnp.exp(log_p.max(-1)), nll


def predictions(predict: Predict, split: Split, batch_size: int = 500, plan: Plan | None = None) -> Predictions:
    """Every example's prediction, in the split's order, in every process.

    Args:
      predict: images -> logits.
      split: N examples.
      batch_size: B, at most N, rounded up to what the plan's devices divide.
      plan: how to divide the work, where `predict` works on arrays that lie on several devices.
    """
    parts, size, part = [], max(1, min(batch_size, len(split))), {}
    if plan is not None and plan.mesh.size > 1:
        size = -(-size // plan.mesh.size) * plan.mesh.size
        part = {"part": plan.part}
    for batch in batches.eval_batches(split, size, **part):
        batch = batch if plan is None else plan.place_batch(batch)
        columns = (batch["mask"], batch["index"], batch["label"], *_judge(predict(batch["image"]), batch["label"]))
        mask, *columns = columns if plan is None else plan.fetch(columns)
        parts.append([np.asarray(column)[np.asarray(mask)] for column in columns])
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    order = np.argsort(columns[0], kind="stable")  # several processes each read a share of every batch
    return Predictions(*(column[order] for column in columns))


def calibration_error(found: Predictions, bins: int = 15) -> float:
    """ECE = sum_b n_b / N |accuracy_b - confidence_b| over equal-width bins (Guo et al. 2017, section 2).

    NaN where a confidence is: a network that diverged has no calibration.
    """
    if np.isnan(found.confidence).any():
        return float("nan")
    which = np.minimum((found.confidence * bins).astype(int), bins - 1)
    gap = np.bincount(which, found.correct - found.confidence.astype(np.float64), bins)
    return float(np.abs(gap).sum() / len(which))


def confusion(found: Predictions, num_classes: int) -> np.ndarray:
    """(K, K) counts: row the truth, column the prediction."""
    return np.bincount(found.label * num_classes + found.predicted, minlength=num_classes**2).reshape(num_classes, -1)


def per_class(found: Predictions, num_classes: int) -> list[dict[str, float]]:
    """For every class: `n`, `recall`, `precision`, `f1`; None where a ratio has no cases."""
    counts = confusion(found, num_classes)
    rows = []
    for hits, truth, named in zip(np.diag(counts), counts.sum(1), counts.sum(0), strict=True):
        ratio = {"recall": (hits, truth), "precision": (hits, named), "f1": (2 * hits, truth + named)}
        rows.append({"n": int(truth), **{name: float(a / b) if b else None for name, (a, b) in ratio.items()}})
    return rows


def summarise(found: Predictions) -> Iterator[tuple[str, float]]:
    """(name, value): accuracy with its Wilson interval, mean NLL, ECE, and over how many examples."""
    hits, n = int(found.correct.sum()), len(found.label)
    low, high = wilson(hits, n)
    yield from {"accuracy": hits / n, "accuracy_low": low, "accuracy_high": high,
                "nll": float(found.nll.mean()), "ece": calibration_error(found), "n": n}.items()


def classification(predict: Predict, split: Split, plan: Plan | None = None) -> Iterator[tuple[str, float]]:
    """The Evaluator of classifiers: `summarise` over the predictions on the split."""
    yield from summarise(predictions(predict, split, plan=plan))

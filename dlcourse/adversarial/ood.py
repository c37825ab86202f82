"""Scores of how much an image looks like the training data, and how well they tell other images apart.

Every score is larger for images like the training data. Scores of logits are functions of logits alone; Mahalanobis'
reads a network's last features, ODIN's follows the gradient by the image.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from scipy import stats

from dlcourse.contracts import InputError, Predict


def max_softmax(logits: jax.Array) -> jax.Array:
    """max_k p_k, (B,K) -> (B,) (Hendrycks & Gimpel 2017)."""
    return jax.nn.softmax(logits).max(-1)


def max_logit(logits: jax.Array) -> jax.Array:
    """max_k z_k, (B,K) -> (B,) (Hendrycks et al. 2022, section 4)."""
    return logits.max(-1)


def energy(logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """-E = T log sum_k exp(z_k / T), (B,K) -> (B,) (Liu et al. 2020, eq. 4)."""
    return temperature * jax.nn.logsumexp(logits / temperature, axis=-1)


@jax.jit
def odin(predict: Predict, images: jax.Array, temperature: float = 1000.0, step: float = 0.0014) -> jax.Array:
    """max_k softmax(z(x') / T), x' = x + step sign(grad_x log max_k softmax(z(x) / T)) (Liang et al. 2018, eq. 1, 2).

    Args:
      predict: images -> logits, a pytree such as `evaluation.predictor` returns.
      images: (B,H,W,C).
      temperature: T.
      step: in pixels' units; the paper chooses it on validation, .0014 for most of its pairs.

    Returns:
      (B,).
    """
    def sureness(images):
        return jax.nn.log_softmax(predict(images) / temperature).max(-1).sum()

    moved = images + step * jnp.sign(jax.grad(sureness)(images))
    return jax.nn.softmax(predict(moved) / temperature).max(-1)


class Mahalanobis(struct.PyTreeNode):
    """Gaussians of one covariance, one a class, over features.

    Attributes:
      means: (K,D).
      whiten: (D,D), W with W W^T the inverse covariance.
    """

    means: jax.Array
    whiten: jax.Array

    def __call__(self, features: jax.Array) -> jax.Array:
        """-min_k (f - mu_k)^T Sigma^-1 (f - mu_k), (B,D) -> (B,) (Lee et al. 2018, eq. 2)."""
        # Some directions are stretched much: accelerators' short products would be off by a deviation there.
        at, centres = (jnp.matmul(each, self.whiten, precision="highest") for each in (features, self.means))
        return -jnp.square(at[:, None] - centres[None]).sum(-1).min(-1)


def fit_mahalanobis(features: np.ndarray, labels: np.ndarray, num_classes: int) -> Mahalanobis:
    """The class means and their common covariance (Lee et al. 2018, eq. 1).

    Directions without variance, to 1e-6 of the largest, count for nothing: the inverse is the pseudo-inverse.

    Args:
      features: (N,D), of training images.
      labels: (N,).
      num_classes: K.

    Raises:
      InputError: a class without examples.
    """
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    counts = np.bincount(labels, minlength=num_classes)
    if not counts.all():
        raise InputError(f"class {int(counts.argmin())} has no examples: Mahalanobis' score needs some of every class")
    means = np.stack([features[labels == k].mean(0) for k in range(num_classes)])
    centred = features - means[labels]
    variances, axes = np.linalg.eigh(centred.T @ centred / len(features))
    kept = variances > 1e-6 * variances[-1]
    whiten = axes * np.where(kept, 1 / np.sqrt(np.where(kept, variances, 1.0)), 0.0)[None]
    return Mahalanobis(jnp.asarray(means, jnp.float32), jnp.asarray(whiten, jnp.float32))


OF_LOGITS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "max softmax": max_softmax, "max logit": max_logit, "energy": energy}


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """P(score of an image inside > that of one outside) + P(equal) / 2, from (N,) and (M,) scores."""
    n, m = len(inside), len(outside)
    ranks = stats.rankdata(np.concatenate([inside, outside]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def aupr(inside: np.ndarray, outside: np.ndarray) -> float:
    """Average precision sum_t (R_t - R_(t-1)) P_t over all thresholds t, images inside being the positive ones."""
    accepted, wrongly = _accepted(inside, outside)
    gains = np.diff(accepted, prepend=0) / len(inside)
    return float((gains * accepted / (accepted + wrongly)).sum())


def fpr95(inside: np.ndarray, outside: np.ndarray) -> float:
    """Share of images outside that pass where the threshold lets at least 95 % of those inside pass."""
    accepted, wrongly = _accepted(inside, outside)
    return float(wrongly[np.argmax(accepted >= 0.95 * len(inside))] / len(outside))


def _accepted(inside, outside):
    """How many inside and how many outside score at least t, for each distinct score t inside, largest first."""
    thresholds = np.unique(np.asarray(inside))[::-1]
    return tuple(len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left") for scores in
                 (inside, outside))


def judge(inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    """auroc, aupr and fpr95 of scores (N,) inside and (M,) outside; NaN scores count as the lowest."""
    inside, outside = (np.nan_to_num(np.asarray(s, np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
                       for s in (inside, outside))
    return {"auroc": auroc(inside, outside), "aupr": aupr(inside, outside), "fpr95": fpr95(inside, outside)}

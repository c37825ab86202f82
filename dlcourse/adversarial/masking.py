"""Probes for networks that are hard to attack, but not robust (Athalye et al. 2018, section 3; Carlini et al. 2019).

Each returns plain numbers over N examples on the host, and calls `predict` as it is: what is drawn anew in every call
would be drawn once and for all inside of jit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dlcourse.adversarial import gradient, objectives
from dlcourse.adversarial import threat as threats
from dlcourse.adversarial.threat import Threat
from dlcourse.contracts import Predict

GREY_LEVEL = 1 / 255


def logits(predict: Predict, images, batch_size: int) -> np.ndarray:
    """(N,K) float64, in batches."""
    parts = [predict(jnp.asarray(images[i:i + batch_size])) for i in range(0, len(images), batch_size)]
    return np.concatenate([np.asarray(part, np.float64) for part in parts])


def difference(first: np.ndarray, second: np.ndarray) -> float:
    """The largest |difference| of logits (N,K), in units of their standard deviation; of those that are finite."""
    both = np.isfinite(first) & np.isfinite(second)
    if not both.any():
        return 0.0
    spread = np.std(first[both])
    return float(np.abs(first - second)[both].max() / (spread if spread > 0 else 1.0))


def quantised(images, threat: Threat) -> np.ndarray:
    """The nearest images of 256 levels, float32: low + round(255 (x - low) / (high - low)) (high - low) / 255."""
    low, high = float(threat.low), float(threat.high)
    levels = np.round(255 * (np.asarray(images, np.float64) - low) / (high - low))
    return (low + levels * (high - low) / 255).astype(np.float32)


def unmoved(key, predict: Predict, images, threat: Threat, batch_size: int) -> float:
    """The share of 8-bit images whose logits stay bit by bit the same when each pixel moves by 1/16 of a grey level.

    Logits of a network that does not round its input change in their last digits at least.
    """
    grey, low, high = quantised(images, threat), float(threat.low), float(threat.high)
    signs = np.asarray(jax.random.rademacher(key, grey.shape, np.int8), np.float32)
    near = np.clip(grey + np.float32((high - low) * GREY_LEVEL / 16) * signs, low, high).astype(np.float32)
    before, after = logits(predict, grey, batch_size), logits(predict, near, batch_size)
    return float(np.all(before == after, axis=-1).mean())


@functools.partial(jax.jit, static_argnames=("objective",))
def _largest(predict, images, labels, objective):
    slope, *_ = gradient.ascend(predict, images, labels, None, objectives.OBJECTIVES[objective])
    return jnp.abs(slope).max((1, 2, 3))


def gradients(predict: Predict, images, labels, batch_size: int) -> dict[str, float]:
    """Shares of the images where gradients say nothing.

    `zero`: that of the margin is zero in every pixel; `saturated`: that of the cross-entropy is below 2^-24, what
    float32 resolves of 1 - p, of the margin's; `nonfinite`: either is not finite.
    """
    largest = {name: np.concatenate([np.asarray(_largest(predict, jnp.asarray(images[i:i + batch_size]),
                                                         jnp.asarray(labels[i:i + batch_size]), name), np.float64)
                                     for i in range(0, len(images), batch_size)])
               for name in ("margin", "cross_entropy")}
    margin, entropy = largest["margin"], largest["cross_entropy"]
    return {"zero": float((margin == 0).mean()),
            "saturated": float(((margin > 0) & (entropy <= 2.0**-24 * margin)).mean()),
            "nonfinite": float((~np.isfinite(margin) | ~np.isfinite(entropy)).mean())}


def huge(threat: Threat, images) -> float:
    """The eps that carries every pixel half the box's width: no network can be right everywhere within."""
    pixels = math.prod(images.shape[1:])
    return 0.5 * float(threat.high - threat.low) * (1.0 if threat.norm == "linf" else math.sqrt(pixels))


def right_under(key, attack: Callable, predict: Predict, images, labels, threat: Threat,
                batch_size: int) -> np.ndarray:
    """(N,) bool: neither misclassified nor fooled by the attack."""
    parts, eps = [], np.broadcast_to(np.asarray(threat.eps, np.float32), len(images))
    for start in range(0, len(images), batch_size):
        some, truth, reach = (jnp.asarray(values[start:start + batch_size]) for values in (images, labels, eps))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(start + jnp.arange(len(some)))
        found = attack(keys, predict, some, truth, threat.replace(eps=reach))
        predicted = logits(predict, found.images, batch_size)
        clean = logits(predict, some, batch_size)
        parts.append(right(clean, np.asarray(truth)) & ~np.asarray(threats.fooled(jnp.asarray(predicted), truth)))
    return np.concatenate(parts)


def right(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N,K), (N,) -> (N,) bool: the label wins, by finite logits."""
    return np.isfinite(values).all(-1) & (values.argmax(-1) == labels)


def curve(key, attack: Callable, predict: Predict, images, labels, threat: Threat,
          batch_size: int) -> list[dict[str, float]]:
    """Accuracy under the attack at eps 0, the threat's half, once and twice, and up to `huge`; in increasing order."""
    most = huge(threat, images)
    own = [float(np.max(threat.eps)) * factor for factor in (0.5, 1, 2)]
    sizes = sorted({eps for eps in own if eps < most} | {most / 4, most / 2, most})
    clean = right(logits(predict, images, batch_size), np.asarray(labels)).mean()
    points = [{"eps": 0.0, "accuracy": float(clean)}]
    for eps in sizes:
        under = right_under(key, attack, predict, images, labels, threat.replace(eps=jnp.float32(eps)), batch_size)
        points.append({"eps": eps, "accuracy": float(under.mean())})
    return points


def restarts(key, attack: Callable, predict: Predict, images, labels, threat: Threat, count: int,
             batch_size: int) -> list[float]:
    """Accuracy under the worst of 1, 2, ... `count` runs of an attack with random starts."""
    left, accuracies = np.ones(len(images), bool), []
    for number in range(count):
        own = jax.random.fold_in(key, number)
        left &= right_under(own, attack, predict, images, labels, threat, batch_size)
        accuracies.append(float(left.mean()))
    return accuracies

"""FMN: gradient steps inside a ball whose radius follows the boundary."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dlcourse.adversarial import minimal, objectives
from dlcourse.adversarial.gradient import ascend
from dlcourse.adversarial.threat import DUAL, NORMS, AttackResult, Threat, fooled, project, size, steepest
from dlcourse.contracts import Predict


@functools.partial(jax.jit, static_argnames=("steps",))
def fmn(key, predict: Predict, images, labels, threat: Threat, *, targets=None, steps: int = 100,
        step_size: float = 1.0, gamma: float = 0.05, overshoot: float = 0.05) -> AttackResult:
    """d <- P_r(d + a g / |g|_2), r shrinking where x + d fools the network and growing where it does not.

    g is the gradient of the margin, a falls from step_size to step_size / 100 and gamma to 0.001 along a cosine
    (Pintor et al. 2021, algorithm 1). r is at most the smallest |d| found; until one is found |d| + |margin| / |g|_*,
    where the linearised network would be fooled (line 9), here with an overshoot: as published, 0, where the box holds
    steps back x may come nearer to the boundary from below for ever, and nothing is found. For l0, where r counts
    pixels, it starts at 1 and changes by one at least. eps only judges (see `minimal`): the image returned may be
    farther.

    Args:
      key: unused; the attack draws nothing.
      predict: images -> logits, a pytree such as `evaluation.predictor` returns.
      images: (B,H,W,C) in the box.
      labels: (B,) the truth.
      threat: of any norm.
      targets: (B,) classes to be taken for, or None.
      steps: gradients.
      step_size: a at first, in pixels' units, the l2 length of a step whatever the norm.
      gamma: share by which r changes at first.
      overshoot: share added to r until an image that fools the network is found.
    """
    norm = threat.norm
    nearest = minimal.start(predict, images, labels, threat, targets, NORMS)
    farthest = size(jnp.maximum(images - threat.low, threat.high - images), norm)

    def adapted(radius, x, margin, gradient, won, nearest, gamma):
        if norm == "l0":
            less = jnp.minimum(jnp.minimum(radius - 1, jnp.floor(radius * (1 - gamma))), nearest.distance)
            more = jnp.maximum(radius + 1, jnp.floor(radius * (1 + gamma)))
            return jnp.maximum(jnp.where(won, less, more), 1.0)
        boundary = size(x - images, norm) + jnp.abs(margin) / jnp.maximum(size(gradient, DUAL[norm]), 1e-12)
        more = jnp.where(jnp.isfinite(nearest.distance), radius * (1 + gamma), boundary * (1 + overshoot))
        return jnp.where(won, jnp.minimum(radius * (1 - gamma), nearest.distance), more)

    def step(carry):
        i, x, radius, nearest = carry
        gradient, logits, margin = ascend(predict, x, labels, targets, objectives.margin)
        won = fooled(logits, labels, targets)
        nearest = nearest.replace(queries=nearest.queries + nearest.open).update(x, size(x - images, norm), won)
        radius = adapted(radius, x, margin, gradient, won, nearest, minimal.cosine(gamma, 0.001, i, steps))
        radius = jnp.minimum(radius, farthest)
        length = minimal.cosine(step_size, step_size / 100, i, steps)
        change = project(x - images + length * steepest(gradient, "l2"), norm, radius)
        return i + 1, jnp.clip(images + change, threat.low, threat.high), radius, nearest

    first = jnp.full(len(images), 1.0 if norm == "l0" else jnp.inf, images.dtype)
    nearest = jax.lax.while_loop(lambda c: (c[0] < steps) & jnp.any(c[-1].open), step, (0, images, first, nearest))[-1]
    return minimal.result(predict, nearest.images, images, labels, threat, nearest.queries, targets)

"""DDN: the direction from the gradient, the length by whether the last one was enough."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dlcourse.adversarial import minimal, objectives
from dlcourse.adversarial.gradient import ascend
from dlcourse.adversarial.threat import AttackResult, Threat, example_keys, fooled, over_pixels, size, steepest
from dlcourse.contracts import Predict


@functools.partial(jax.jit, static_argnames=("steps",))
def ddn(key, predict: Predict, images, labels, threat: Threat, *, targets=None, steps: int = 100,
        radius: float = 1.0, gamma: float = 0.05) -> AttackResult:
    """d <- d + a g / |g|, then d <- r d / |d|, r smaller by gamma where x + d fools the network and else larger.

    r <- (1 - gamma) r or (1 + gamma) r; g is the gradient of the cross-entropy and a falls from 1 to 0.01 along a
    cosine (Rony et al. 2019, algorithm 1 and section 5; without its rounding to grey levels). Where g is exactly zero a
    random direction stands in, as in the authors' code. eps only judges (see `minimal`): the image returned may be
    farther.

    Args:
      key: (), or (B,) keys; for those directions.
      predict: images -> logits, a pytree such as `evaluation.predictor` returns.
      images: (B,H,W,C) in the box.
      labels: (B,) the truth.
      threat: of norm l2.
      targets: (B,) classes to be taken for, or None.
      steps: gradients.
      radius: r at first, in pixels' units.
      gamma: above.

    Raises:
      InputError: another norm.
    """
    nearest = minimal.start(predict, images, labels, threat, targets, ("l2",))
    keys = example_keys(key, len(images))
    farthest = size(jnp.maximum(images - threat.low, threat.high - images), "l2")

    def random(i):
        own = jax.vmap(lambda k: jax.random.fold_in(k, i))(keys)
        return jax.vmap(lambda k, x: jax.random.normal(k, x.shape, x.dtype))(own, images)

    def step(carry):
        i, x, radius, nearest = carry
        gradient, logits, _ = ascend(predict, x, labels, targets, objectives.cross_entropy)
        won = fooled(logits, labels, targets)
        nearest = nearest.replace(queries=nearest.queries + nearest.open).update(x, size(x - images, "l2"), won)
        flat = size(gradient, "l2") == 0
        replaced = jax.lax.cond(jnp.any(flat), lambda: random(i), lambda: jnp.zeros_like(x))
        gradient = jnp.where(over_pixels(flat, x), replaced, gradient)
        change = x - images + minimal.cosine(1.0, 0.01, i, steps) * steepest(gradient, "l2")
        radius = jnp.minimum(radius * jnp.where(won, 1 - gamma, 1 + gamma), farthest)
        change = change * over_pixels(radius / jnp.maximum(size(change, "l2"), 1e-12), x)
        return i + 1, jnp.clip(images + change, threat.low, threat.high), radius, nearest

    first = jnp.full(len(images), radius, images.dtype)
    nearest = jax.lax.while_loop(lambda c: (c[0] < steps) & jnp.any(c[-1].open), step, (0, images, first, nearest))[-1]
    return minimal.result(predict, nearest.images, images, labels, threat, nearest.queries, targets)

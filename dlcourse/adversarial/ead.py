"""EAD: Carlini and Wagner's loss with an L1 term, so that few pixels change."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dlcourse.adversarial import minimal, objectives
from dlcourse.adversarial.threat import AttackResult, Threat, fooled, size
from dlcourse.contracts import InputError, Predict

RULES = ("EN", "L1")


@functools.partial(jax.jit, static_argnames=("steps", "rounds", "rule"))
def ead(key, predict: Predict, images, labels, threat: Threat, *, targets=None, steps: int = 10000, rounds: int = 9,
        rule: str = "EN", beta: float = 1e-3, step_size: float = 1e-2, constant: float = 1e-3) -> AttackResult:
    """min over x in the box of c max(0, -margin(x)) + |x - x0|_2^2 + beta |x - x0|_1, by FISTA from x0; c by bisection.

    x' = S(y - a grad), y = x' + k / (k + 3) (x' - x), where S moves each value towards x0 by beta, no further than it,
    and a falls as step_size sqrt(1 - k / steps) (Chen et al. 2018, eqs. 4-6 and algorithm 1; the constants are those of
    the authors' code). An example's round ends once its own smooth loss falls no more (`minimal.stalled`). eps only
    judges (see `minimal`): the image returned may be farther.

    Args:
      key: unused; the attack draws nothing.
      predict: images -> logits, a pytree such as `evaluation.predictor` returns.
      images: (B,H,W,C) in the box.
      labels: (B,) the truth.
      threat: of norm l1.
      targets: (B,) classes to be taken for, or None.
      steps: gradients a round, at most; each costs two forward passes.
      rounds: values of c.
      rule: what the nearest image is nearest in: "EN", |d|_2^2 + beta |d|_1, or "L1", |d|_1.
      beta: weight of the L1 term.
      step_size: a at first.
      constant: c at first.

    Raises:
      InputError: another norm or rule.
    """
    if rule not in RULES:
        raise InputError(f"rule {rule!r} is not known: use {' or '.join(RULES)}")
    nearest = minimal.start(predict, images, labels, threat, targets, ("l1",))

    def distance(x):
        change = x - images
        return size(change, "l1") if rule == "L1" else beta * size(change, "l1") + _square(change)

    def shrunk(z):
        change = z - images
        change = jnp.sign(change) * jnp.maximum(jnp.abs(change) - beta, 0.0)
        return jnp.clip(images + change, threat.low, threat.high)

    def attempt(constants, nearest):
        def total(y):
            hinge = jnp.maximum(-objectives.margin(predict(y), labels, targets), 0.0)
            losses = constants * hinge + _square(y - images)
            return losses.sum(), losses

        def step(carry):
            k, x, y, before, running, succeeded, nearest = carry
            gradient, losses = jax.grad(total, has_aux=True)(y)
            moved = shrunk(y - step_size * jnp.sqrt(1 - k / steps) * gradient)
            ends, before = minimal.stalled(k, steps, losses, before)
            nearest = nearest.replace(queries=nearest.queries + 2 * running)
            running = running & ~ends
            won = running & fooled(predict(moved), labels, targets)
            nearest = nearest.update(moved, distance(moved), won)
            return k + 1, moved, moved + k / (k + 3) * (moved - x), before, running, succeeded | won, nearest

        carry = (0, images, images, jnp.full_like(constants, jnp.inf), nearest.open, jnp.zeros(len(images), bool),
                 nearest)
        *_, succeeded, nearest = jax.lax.while_loop(lambda c: (c[0] < steps) & jnp.any(c[4]), step, carry)
        return nearest, succeeded

    nearest = minimal.over_constants(attempt, nearest, constant, rounds)
    return minimal.result(predict, nearest.images, images, labels, threat, nearest.queries, targets)


def _square(change):
    return jnp.square(change).reshape(len(change), -1).sum(-1)

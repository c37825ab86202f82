"""Carlini and Wagner's L2 attack: Adam on distance and margin together, the box by a change of variables."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from dlcourse.adversarial import minimal, objectives
from dlcourse.adversarial.threat import AttackResult, Threat, fooled, size
from dlcourse.contracts import Predict


@functools.partial(jax.jit, static_argnames=("steps", "rounds"))
def carlini_wagner(key, predict: Predict, images, labels, threat: Threat, *, targets=None, steps: int = 10000,
                   rounds: int = 9, step_size: float = 1e-2, constant: float = 1e-3) -> AttackResult:
    """min over w of |x - x0|^2 + c max(0, -margin(x)), x = (tanh(w) + 1) / 2, by Adam from x0; c by bisection.

    Carlini & Wagner 2017, V and VI.A, their f6 without confidence; the constants are those of the authors' code. An
    example's round ends once its own loss falls no more (`minimal.stalled`), so that neighbours do not matter. eps only
    judges (see `minimal`): the image returned may be farther.

    Args:
      key: unused; the attack draws nothing.
      predict: images -> logits, a pytree such as `evaluation.predictor` returns.
      images: (B,H,W,C) in the box.
      labels: (B,) the truth.
      threat: of norm l2.
      targets: (B,) classes to be taken for, or None.
      steps: gradients a round, at most.
      rounds: values of c.
      step_size: of Adam.
      constant: c at first.

    Raises:
      InputError: another norm.
    """
    middle, half = (threat.high + threat.low) / 2, (threat.high - threat.low) / 2
    nearest = minimal.start(predict, images, labels, threat, targets, ("l2",))
    # Just inside of the box, at whose faces the inverse of tanh is infinite.
    origin = jnp.arctanh(0.999999 * (images - middle) / half)
    reached = jnp.tanh(origin) * half + middle
    adam = optax.adam(step_size)

    def attempt(constants, nearest):
        def total(change):
            x = jnp.clip(jnp.tanh(origin + change) * half + middle, threat.low, threat.high)
            logits = predict(x)
            hinge = jnp.maximum(-objectives.margin(logits, labels, targets), 0.0)
            losses = constants * hinge + jnp.square(x - reached).reshape(len(x), -1).sum(-1)
            return losses.sum(), (x, logits, losses)

        def step(carry):
            i, change, moments, before, running, succeeded, nearest = carry
            gradient, (x, logits, losses) = jax.grad(total, has_aux=True)(change)
            updates, moments = adam.update(gradient, moments)
            ends, before = minimal.stalled(i, steps, losses, before)
            nearest = nearest.replace(queries=nearest.queries + running)
            running = running & ~ends
            won = running & fooled(logits, labels, targets)
            nearest = nearest.update(x, size(x - images, "l2"), won)
            return i + 1, change + updates, moments, before, running, succeeded | won, nearest

        change = jnp.zeros_like(images)
        carry = (0, change, adam.init(change), jnp.full_like(constants, jnp.inf), nearest.open,
                 jnp.zeros(len(images), bool), nearest)
        *_, succeeded, nearest = jax.lax.while_loop(lambda c: (c[0] < steps) & jnp.any(c[4]), step, carry)
        return nearest, succeeded

    nearest = minimal.over_constants(attempt, nearest, constant, rounds)
    return minimal.result(predict, nearest.images, images, labels, threat, nearest.queries, targets)

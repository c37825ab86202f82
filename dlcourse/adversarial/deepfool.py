"""DeepFool: to the nearest boundary of the linearised network, again and again."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dlcourse.adversarial import minimal, objectives
from dlcourse.adversarial.threat import AttackResult, Threat, fooled, over_pixels, steepest
from dlcourse.contracts import InputError, Predict


@functools.partial(jax.jit, static_argnames=("steps", "candidates"))
def deepfool(key, predict: Predict, images, labels, threat: Threat, *, targets=None, steps: int = 50,
             candidates: int = 10, overshoot: float = 0.02) -> AttackResult:
    """r <- r + |f_k| / |w_k|_* argmax_{|d| <= 1} <w_k, d> for the class k of least |f_k| / |w_k|_*, x = x0 + 1.02 r.

    f_k = z_k - z_label at x, w_k its gradient, |.|_* the dual norm (Moosavi-Dezfooli et al. 2016, algorithm 2 and
    section 3.3). As in the authors' code the overshoot is part of every step and each step is 1e-4 longer, for
    stability; here x also stays in the box. eps only judges (see `minimal`): the image returned may be farther.

    Args:
      key: unused; the attack draws nothing.
      predict: images -> logits, a pytree such as `evaluation.predictor` returns.
      images: (B,H,W,C) in the box.
      labels: (B,) the truth.
      threat: of norm linf or l2.
      targets: None; there is no targeted form.
      steps: at most.
      candidates: classes looked at, the label's and the most probable others.
      overshoot: share of the change that is added beyond the boundary.

    Raises:
      InputError: targets, fewer than 2 candidates, or another norm.
    """
    if targets is not None:
        raise InputError("deepfool has no targeted form: leave targets out, or take fmn, ddn or carlini_wagner")
    if candidates < 2:
        raise InputError(f"candidates={candidates}: must be at least 2, the label's class and another")
    nearest = minimal.start(predict, images, labels, threat, None, ("linf", "l2"))
    others = objectives.others(predict(images), labels)
    rivals = jax.lax.top_k(others, min(candidates, others.shape[1]) - 1)[1]

    def step(carry):
        i, x, change, done, queries = carry
        gaps, gradients, logits = _linearised(predict, x, labels, rivals)
        done = done | fooled(logits, labels)
        lengths = _dual(gradients, threat.norm) + 1e-8
        away = jnp.abs(gaps) / lengths
        best = away.argmin(-1)
        gradient = jnp.take_along_axis(gradients, best.reshape(1, -1, *(1,) * (x.ndim - 1)), 0)[0]
        change = change + over_pixels(away.min(-1) + 1e-4, x) * steepest(gradient, threat.norm)
        moved = jnp.clip(images + (1 + overshoot) * change, threat.low, threat.high)
        return i + 1, jnp.where(over_pixels(done, x), x, moved), change, done, queries + ~done

    _, x, _, _, queries = jax.lax.while_loop(
        lambda c: (c[0] < steps) & ~jnp.all(c[3]), step,
        (0, images, jnp.zeros_like(images), ~nearest.open, nearest.queries))
    distance = jnp.where(nearest.open, 1.0, 0.0)  # there is but one candidate an example
    nearest = nearest.replace(queries=queries).update(x, distance, fooled(predict(x), labels))
    return minimal.result(predict, nearest.images, images, labels, threat, nearest.queries, None)


def _linearised(predict, x, labels, rivals):
    """z_k - z_label for the rivals (B,R), its gradients (R,B,H,W,C), and all logits (B,K)."""
    def gaps(x):
        logits = predict(x)
        return jnp.take_along_axis(logits, rivals, 1) - objectives.picked(logits, labels)[:, None], logits

    values, pull, logits = jax.vjp(gaps, x, has_aux=True)
    each = jnp.broadcast_to(jnp.eye(rivals.shape[1], dtype=values.dtype)[:, None], (rivals.shape[1], *values.shape))
    return values, jax.vmap(lambda one: pull(one)[0])(each), logits


def _dual(gradients, norm):
    flat = gradients.reshape(*gradients.shape[:2], -1)
    return (jnp.abs(flat).sum(-1) if norm == "linf" else jnp.sqrt(jnp.square(flat).sum(-1))).T

"""One change for all images."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dlcourse.adversarial import objectives
from dlcourse.adversarial import threat as threats
from dlcourse.adversarial.threat import AttackResult, Threat, project, steepest
from dlcourse.contracts import InputError, Predict
from dlcourse.streams import stream


@functools.partial(jax.jit, static_argnames=("epochs", "batch_size"))
def universal(key, predict: Predict, images, labels, threat: Threat, *, targets=None, epochs: int = 10,
              batch_size: int = 128, step_size: float | None = None, cap: float = 9.0) -> jax.Array:
    """d <- P(d + step_size steepest(grad_d mean_B min(L(x + d), cap))), batch by batch, P projecting onto |d| <= eps.

    The universal perturbation of Moosavi-Dezfooli et al. 2017, found as in Shafahi et al. 2020, section 4 and algorithm
    1; the cap keeps the images that are fooled already from taking over. x + d is clipped to the box. The one attack
    here whose result is of all images together: fit it on some, judge it by `applied` and `fooling_rate` on others.

    Args:
      key: (); for the order of the images in each epoch.
      predict: images -> logits, a pytree such as `evaluation.predictor` returns.
      images: (N,H,W,C) in the box.
      labels: (N,) the truth.
      threat: of norm linf, l2 or l1, with one eps for all.
      targets: (N,) classes to be taken for, or None.
      epochs: passes over the images.
      batch_size: B, at most N; the last batch of an epoch may be smaller.
      step_size: in pixels' units; default eps / 10.
      cap: beta of Shafahi et al., in nats; with targets, where L = log p(target) is below 0, it does nothing.

    Returns:
      The perturbation, (H,W,C).

    Raises:
      InputError: another norm, or an eps for each image.
    """
    if threat.norm == "l0":
        raise InputError("norm 'l0': universal has linf, l2, l1")
    if jnp.ndim(threat.eps):
        raise InputError(f"eps has shape {jnp.shape(threat.eps)}: one perturbation for all images has one eps")
    count, size = len(images), min(batch_size, len(images))
    batches = -(-count // size)
    step_size = jnp.asarray(threat.eps) / 10 if step_size is None else step_size

    def loss(change, chosen, used):
        logits = predict(jnp.clip(images[chosen] + change, threat.low, threat.high))
        aims = None if targets is None else targets[chosen]
        values = jnp.minimum(objectives.cross_entropy(logits, labels[chosen], aims), cap)
        return jnp.where(used, values, 0.0).sum() / used.sum()

    def step(i, carry):
        change, order = carry
        place = i % batches
        order = jax.lax.cond(place == 0, lambda: _order(key, i // batches, count, batches * size), lambda: order)
        chosen = jax.lax.dynamic_slice(order, (place * size,), (size,))
        gradient = jax.grad(loss)(change, jnp.maximum(chosen, 0), chosen >= 0)
        return project(change + step_size * steepest(gradient, threat.norm), threat.norm, threat.eps), order

    start = jnp.zeros((1, *images.shape[1:]), images.dtype), jnp.zeros(batches * size, jnp.int32)
    return jax.lax.fori_loop(0, epochs * batches, step, start)[0][0]


def _order(key, epoch, count, length):
    """A permutation of the images, filled up with -1."""
    order = jax.random.permutation(stream(key, "order", epoch), count)
    return jnp.pad(order, (0, length - count), constant_values=-1).astype(jnp.int32)


@jax.jit
def applied(perturbation, predict: Predict, images, labels, threat: Threat, *, targets=None) -> AttackResult:
    """The result of adding one perturbation (H,W,C), made to fit the threat, to every image; loss is the margin."""
    moved = threats.inside(images + perturbation[None], images, threat)
    queries = jnp.zeros(len(images), jnp.int32)
    return threats.result(predict, moved, images, labels, threat, objectives.margin, queries, targets)


@jax.jit
def fooling_rate(perturbation, predict: Predict, images, threat: Threat) -> jax.Array:
    """The share of images, in [0, 1], of which the network says another class than without the perturbation (H,W,C).

    P(k(x + v) != k(x)), whatever the truth (Moosavi-Dezfooli et al. 2017, section 2).
    """
    before = predict(images).argmax(-1)
    return applied(perturbation, predict, images, before, threat).success.mean()

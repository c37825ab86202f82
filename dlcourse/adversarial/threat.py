"""What an attacker may do, what an attack returns, and the geometry of both.

    attack(key, predict, images, labels, threat, *, targets=None, ...) -> AttackResult

is the contract of every attack here. An attack is a pure function: it works inside jit, vmap and shard_map, and its
number of steps and other sizes are Python numbers while eps, weights, labels and targets are arrays, so that new ones
never compile again. What happens to an example depends on its own key alone, not on its neighbours in the batch.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import struct

from dlcourse.contracts import InputError, Predict

NORMS = ("linf", "l2", "l1", "l0")
DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}
"""The norm of w in |<w, d>| <= |w|_dual |d|_norm."""


class Threat(struct.PyTreeNode):
    """Images x' in [low, high] with |x' - x|_norm <= eps.

    Attributes:
      norm: one of NORMS; "l0" counts changed pixels, all their channels as one.
      eps: scalar or (B,), in pixels' units, > 0.
      low: of the box, usually 0.
      high: of the box, usually 1.
    """

    eps: jax.Array | float
    norm: str = struct.field(pytree_node=False, default="linf")
    low: jax.Array | float = 0.0
    high: jax.Array | float = 1.0


class AttackResult(struct.PyTreeNode):
    """The images an attack ends with, one entry an example.

    Attributes:
      images: (B,H,W,C) float32, inside the threat; of attacks that look for the smallest change (see `minimal`) the
        nearest that fools, which may lie beyond eps and is no success there.
      success: (B,) bool, re-predicted on `images`: misclassified, or classified as the target. Where logits are not
        finite the attack failed.
      loss: (B,) float32, the attack's objective at `images`.
      norm: (B,) float32, |images - originals| in the threat's norm.
      queries: (B,) int32, forward passes spent on the example.
    """

    images: jax.Array
    success: jax.Array
    loss: jax.Array
    norm: jax.Array
    queries: jax.Array


def checked(threat: Threat, images, labels=None, *, norms=NORMS, targets=None, classes: int = 0,
            least: int = 2) -> None:
    """Raises InputError for a threat, images, labels or targets that no attack can work with.

    Looks at concrete values alone: call it outside of jit.

    Args:
      threat: with concrete eps.
      images: (B,H,W,C) within the box.
      labels: (B,).
      norms: those that the attack has.
      targets: (B,) or None.
      classes: K, if known.
      least: classes that the attack needs.
    """
    if threat.norm not in norms:
        raise InputError(f"norm {threat.norm!r}: this attack has {', '.join(norms)}")
    if not float(jnp.min(jnp.asarray(threat.eps))) > 0:
        raise InputError(f"eps={float(jnp.min(jnp.asarray(threat.eps))):g}: must be greater than 0")
    eps, across = float(jnp.max(jnp.asarray(threat.eps))), width(threat, images.shape[1:])
    if eps > across * (1 + 1e-6):
        raise InputError(f"eps={eps:g}: beyond the box, which is {across:g} wide in {threat.norm}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"images are {images.dtype}: attacks take floats in [{threat.low:g}, {threat.high:g}]; "
                         "divide bytes by 255")
    if not bool(jnp.all((images >= threat.low) & (images <= threat.high))):
        raise InputError(f"images reach from {float(jnp.min(images)):g} to {float(jnp.max(images)):g}: outside of the "
                         f"box [{threat.low:g}, {threat.high:g}]")
    if classes and classes < least:
        raise InputError(f"{classes} classes: this attack needs at least {least}")
    if targets is not None and labels is not None and bool(jnp.any(targets == labels)):
        raise InputError("a target is its image's own label: give other classes")


def width(threat: Threat, shape: tuple[int, int, int]) -> float:
    """The largest |x' - x| of two images of a shape (H,W,C) in the box."""
    side, values = float(threat.high) - float(threat.low), math.prod(shape)
    return {"linf": side, "l2": side * values**0.5, "l1": side * values, "l0": float(values // shape[-1])}[threat.norm]


def example_keys(key: jax.Array, count: int) -> jax.Array:
    """(B,) keys, one an example: `key` as it is where it is (B,) already, else one folded in by position."""
    return key if key.ndim else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))


def over_pixels(values: jax.Array, like: jax.Array) -> jax.Array:
    """(B,) or () -> an array that broadcasts with (B,H,W,C)."""
    values = jnp.asarray(values)
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim)) if values.ndim else \
        values.reshape((1,) * like.ndim)


def flat(values: jax.Array) -> jax.Array:
    """(B,H,W,C) -> (B,H*W*C), and stays so: XLA would undo it, and on a CPU reduce one channel several times slower."""
    return jax.lax.optimization_barrier(values.reshape(len(values), -1))


def size(change: jax.Array, norm: str) -> jax.Array:
    """|change| of every example, (B,H,W,C) -> (B,)."""
    if norm == "l0":
        return jnp.any(change != 0, axis=-1).sum((1, 2)).astype(change.dtype)
    change = flat(change)
    if norm == "linf":
        return jnp.abs(change).max(-1)
    if norm == "l2":
        return jnp.sqrt(jnp.square(change).sum(-1))
    return jnp.abs(change).sum(-1)


def project(change: jax.Array, norm: str, eps) -> jax.Array:
    """The nearest change with |change| <= eps, (B,H,W,C); without the box.

    L1 by the threshold that sorting gives (Duchi et al. 2008, figure 1); L0 keeps the pixels that changed most.
    """
    eps = jnp.broadcast_to(jnp.asarray(eps, change.dtype), change.shape[:1])
    if norm == "linf":
        eps = over_pixels(eps, change)
        return jnp.clip(change, -eps, eps)
    if norm == "l2":
        length = size(change, "l2")
        return change * over_pixels(jnp.where(length > eps, eps / jnp.maximum(length, 1e-12), 1.0), change)
    flat = change.reshape(len(change), -1)
    if norm == "l1":
        ordered = -jnp.sort(-jnp.abs(flat), axis=-1)
        sums, counts = jnp.cumsum(ordered, axis=-1), jnp.arange(1, flat.shape[1] + 1, dtype=flat.dtype)
        thresholds = (sums - eps[:, None]) / counts[None]
        used = jnp.maximum((ordered > thresholds).sum(-1), 1) - 1
        cut = jnp.maximum(jnp.take_along_axis(thresholds, used[:, None], 1), 0.0)
        return (jnp.sign(flat) * jnp.maximum(jnp.abs(flat) - cut, 0.0)).reshape(change.shape)
    pixels = jnp.square(change).sum(-1).reshape(len(change), -1)
    rank = jnp.argsort(jnp.argsort(-pixels, axis=-1), axis=-1)
    kept = (rank + 1 <= eps[:, None]).reshape(*change.shape[:-1], 1)
    return jnp.where(kept, change, 0.0)


def inside(images: jax.Array, originals: jax.Array, threat: Threat) -> jax.Array:
    """The image within the threat that `images` is moved to: first |change| <= eps, then the box.

    For convex norms the box only shrinks a change from an original inside it, so that both hold afterwards.
    """
    change = project(images - originals, threat.norm, threat.eps)
    return jnp.clip(originals + change, threat.low, threat.high)


def steepest(gradient: jax.Array, norm: str) -> jax.Array:
    """argmax of <gradient, d> over |d|_norm <= 1, (B,H,W,C): its sign for linf, its direction for l2.

    For l1 the one coordinate where the gradient is largest. Zero where the gradient is, or is not finite.
    """
    gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
    if norm == "linf":
        return jnp.sign(gradient)
    if norm == "l2":
        largest = over_pixels(size(gradient, "linf"), gradient)  # else squares of small gradients would vanish
        gradient = gradient / jnp.where(largest > 0, largest, 1.0)
        return gradient / over_pixels(jnp.maximum(size(gradient, "l2"), 1e-12), gradient)
    flat = gradient.reshape(len(gradient), -1)
    best = jnp.abs(flat).argmax(-1)
    return (jax.nn.one_hot(best, flat.shape[1], dtype=flat.dtype) * jnp.sign(flat)).reshape(gradient.shape)


def random_start(keys: jax.Array, images: jax.Array, threat: Threat) -> jax.Array:
    """A point within the threat: uniform in the linf ball, in the l2 ball, and in the l1 ball; then the box.

    l2 and l1: a uniform direction (normal, or Laplace draws) times eps u^(1/D).
    """
    def one(key, image):
        direction, radius = jax.random.split(key)
        if threat.norm == "linf":
            return jax.random.uniform(direction, image.shape, image.dtype, -1.0, 1.0)
        draw = jax.random.normal if threat.norm == "l2" else jax.random.laplace
        drawn = draw(direction, image.shape, image.dtype)
        length = size(drawn[None], threat.norm)[0]
        return drawn / length * jax.random.uniform(radius, (), image.dtype) ** (1 / image.size)

    unit = jax.vmap(one)(keys, images)
    return inside(images + over_pixels(threat.eps, images) * unit, images, threat)


def fooled(logits: jax.Array, labels: jax.Array, targets: jax.Array | None = None) -> jax.Array:
    """(B,K), (B,) -> (B,) bool: another class than the label wins, or the target does; never by logits that are not
    finite."""
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    predicted = logits.argmax(-1)
    return finite & (predicted != labels if targets is None else predicted == targets)


def result(predict: Predict, images: jax.Array, originals: jax.Array, labels: jax.Array, threat: Threat, objective,
           queries: jax.Array, targets: jax.Array | None = None) -> AttackResult:
    """The result of having reached `images`, judged anew: success by what the network says of these very images.

    Args:
      predict: images -> logits.
      images: reached, (B,H,W,C).
      originals: (B,H,W,C).
      labels: (B,).
      threat: that the images are within.
      objective: (logits, labels, targets) -> (B,), what the attack maximised.
      queries: (B,) spent until here; one more is.
      targets: (B,) or None.
    """
    logits = predict(images)
    return AttackResult(images, fooled(logits, labels, targets), objective(logits, labels, targets),
                        size(images - originals, threat.norm), queries + 1)


def unchanged(predict: Predict, images: jax.Array, labels: jax.Array, threat: Threat, objective,
              targets: jax.Array | None = None) -> AttackResult:
    """The result of doing nothing, where attacks begin; any other loses to a real one where it does not succeed."""
    found = result(predict, images, images, labels, threat, objective, jnp.zeros(len(images), jnp.int32), targets)
    return found.replace(loss=jnp.where(found.success, found.loss, -jnp.inf))


def better_of(found: AttackResult, kept: AttackResult) -> tuple[AttackResult, jax.Array]:
    """The better of two results of each example, and (B,) where that is `found`.

    What fools is kept; else what is found is taken where it fools or has the larger objective. The queries are those
    of `found`, which count on from `kept`, where an attack had anything left to do.
    """
    better = ~kept.success & (found.success | (found.loss > kept.loss))
    best = jax.tree.map(lambda new, old: jnp.where(over_pixels(better, new), new, old), found, kept)
    return best.replace(queries=jnp.where(kept.success, kept.queries, found.queries)), better

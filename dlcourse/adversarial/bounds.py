"""Certificates by bounding: what differences of logits cannot fall below anywhere in a threat.

All return (B,K) lower bounds of z_label - z_k, 0 at the label itself: an image is certified where all others are
positive (`certified`). They interpret the program of `predict` (see `program`) for every image by itself, so that any
feed-forward network of linear layers, normalisation at evaluation, relu, maxima, sums and branches has them, and are
differentiable, so that they can be trained with. Threats are linf, l2 and l1 balls in the box.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from dlcourse.adversarial.program import Interval
from dlcourse.adversarial.relaxation import Network, Region
from dlcourse.adversarial.threat import Threat, over_pixels
from dlcourse.contracts import InputError, Predict


@functools.partial(jax.jit, static_argnames=("sound",))
def interval(predict: Predict, images, threat: Threat, *, sound: bool = True) -> tuple[jax.Array, jax.Array]:
    """Interval arithmetic from the pixels to the logits: their lower and upper bounds, (B,K) each.

    l_out, u_out = f(m) -+ |f|(r), m and r the middle and half the width, for a linear f; f(l), f(u) for a monotone one
    (Gowal et al. 2018, section 3).

    Args: as of `ibp`.
    """
    def one(predict, region):
        network = Network(predict, region, threat.norm, sound)
        found = network.values[network.logits]
        return found.lower[0], found.upper[0]

    return _over_images(one, predict, images, threat)


@functools.partial(jax.jit, static_argnames=("sound",))
def ibp(predict: Predict, images, labels, threat: Threat, *, sound: bool = True) -> jax.Array:
    """Interval bound propagation; the linear layers behind the last relu are joined with the difference of logits.

    Gowal et al. 2018, section 3 and their appendix on eliding the last layer. Exact for a network of none but linear
    layers, up to the l2 and l1 ball's cut with the box, where the better of ball and box counts.

    Args:
      predict: images -> logits, a pytree.
      images: (B,H,W,C) in the box.
      labels: (B,).
      threat: of norm linf, l2 or l1; eps may be (B,).
      sound: widen every step by what rounding may do, both here and in the network's own float32 arithmetic, whatever
        the order of its sums (not by arithmetic of less than float32, such as TF32 or a TPU's default). Without, as
        publications have it.

    Returns:
      (B,K) lower bounds of z_label - z_k.

    Raises:
      InputError: a norm or a primitive of the network that there is no rule for.
    """
    def one(predict, region, label):
        network = Network(predict, region, threat.norm, sound)
        return network.below(*network.differences(label), relax=False)

    return _over_images(one, predict, images, threat, labels)


@functools.partial(jax.jit, static_argnames=("intermediate", "sound"))
def crown(predict: Predict, images, labels, threat: Threat, *, intermediate: str = "crown",
          sound: bool = True) -> jax.Array:
    """Linear lower bounds, carried back from the difference of logits to the pixels (Zhang et al. 2018, section 3).

    A relu of d in [l, u], l < 0 < u, lies above a d with a = 1 where u > -l, else 0, and below u (d - l) / (u - l).
    max(x, y) is y + relu(x - y). What has no linear bounds (other maxima) is bounded by its interval. Never below
    `ibp`, since every interval, the last too, is cut with that of interval arithmetic.

    Args: as of `ibp`, and
      intermediate: whence l and u: "crown", carried back from each relu (cost: as many rows as there are units);
        "ibp", the intervals (CROWN-IBP, Zhang et al. 2020, section 3).
    """
    def one(predict, region, label):
        network = Network(predict, region, threat.norm, sound, tighten=intermediate == "crown")
        return network.best(*network.differences(label))

    _known(intermediate)
    return _over_images(one, predict, images, threat, labels)


@functools.partial(jax.jit, static_argnames=("steps", "intermediate", "sound"))
def alpha_crown(predict: Predict, images, labels, threat: Threat, *, steps: int = 20, rate: float = 0.1,
                intermediate: str = "crown", sound: bool = True) -> jax.Array:
    """CROWN with the slopes a in [0, 1] that raise the bounds, found by Adam (Xu et al. 2021, section 3.2).

    Every difference of logits has slopes of its own for the pass back from the logits; l and u of relus stay those of
    `crown`. The best bound of all steps, never below `crown`.

    Args: as of `crown`, and
      steps: of Adam.
      rate: its first step size, divided by 1.02 at every step.
    """
    adam = optax.adam(optax.exponential_decay(1.0, 1, 1 / 1.02))

    def one(predict, region, label):
        network = Network(predict, region, threat.norm, sound, tighten=intermediate == "crown")
        rows = network.differences(label)
        slopes = {i: jnp.broadcast_to(slope, (len(rows[1]), *slope.shape[1:]))
                  for i, slope in network.slopes.items()}

        def total(slopes):
            found = network.below(*rows, slopes=slopes)
            return found.sum(), found

        def step(_, carry):
            slopes, state, best = carry
            gradient, found = jax.grad(total, has_aux=True)(slopes)
            change, state = adam.update(jax.tree.map(jnp.negative, gradient), state)
            slopes = jax.tree.map(lambda slope, by: jnp.clip(slope + rate * by, 0.0, 1.0), slopes, change)
            return slopes, state, jnp.maximum(best, found)

        start = slopes, adam.init(slopes), network.best(*rows)
        slopes, _, best = jax.lax.fori_loop(0, steps, step, start)
        return jnp.maximum(best, network.below(*rows, slopes=slopes))

    _known(intermediate)
    return _over_images(one, predict, images, threat, labels)


def certified(bounds: jax.Array, labels: jax.Array) -> jax.Array:
    """(B,K), (B,) -> (B,) bool: no class but the label can win; never where a bound is not a number."""
    own = jax.nn.one_hot(labels, bounds.shape[-1], dtype=bool)
    return jnp.all(own | (bounds > 0), axis=-1)


def _known(intermediate):
    if intermediate not in ("crown", "ibp"):
        raise InputError(f"intermediate={intermediate!r}: there is crown and ibp")


def _over_images(one, predict, images, threat, *others):
    """`one(predict, region, ...)` for every image by itself."""
    if threat.norm not in ("linf", "l2", "l1"):
        raise InputError(f"norm {threat.norm!r}: there are bounds for linf, l2, l1")
    eps = jnp.broadcast_to(jnp.asarray(threat.eps, images.dtype), (len(images),))
    around = over_pixels(eps, images)
    box = Interval(jnp.maximum(images - around, threat.low), jnp.minimum(images + around, threat.high))
    region = jax.tree.map(lambda x: x[:, None], Region(box, images, eps))._replace(eps=eps)
    with jax.default_matmul_precision("highest"):
        return jax.vmap(one, (None, *(0,) * (1 + len(others))))(predict, region, *others)

"""What attacks that look for the smallest change share: the nearest image found, and what is made of it.

Such attacks (deepfool, ddn, fmn, carlini_wagner, ead, boundary, hop_skip_jump) use the threat's norm and box to search
in, and its eps only to judge: they return the nearest image that fools the network, however far it is, and it counts as
a success where it also is within eps. An image that fools the network as it is stays as it is; so does one for which
nothing was found. `distances` tells all these apart.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from dlcourse.adversarial import objectives
from dlcourse.adversarial import threat as threats
from dlcourse.adversarial.threat import AttackResult, Threat, fooled, over_pixels
from dlcourse.contracts import InputError, Predict


class Nearest(struct.PyTreeNode):
    """The nearest image so far that fools the network.

    Attributes:
      images: (B,H,W,C); the original where there is none.
      distance: (B,) in the attack's measure; infinite where there is none.
      queries: (B,) int32, forward passes spent.
    """

    images: jax.Array
    distance: jax.Array
    queries: jax.Array

    @property
    def open(self) -> jax.Array:
        """(B,) bool, where there is anything to look for: the original itself does not fool the network."""
        return self.distance > 0

    def update(self, images, distance, fools) -> Nearest:
        """With these images where they fool the network from a smaller distance."""
        nearer = fools & (distance < self.distance)
        return self.replace(images=jnp.where(over_pixels(nearer, images), images, self.images),
                            distance=jnp.where(nearer, distance, self.distance))


def start(predict: Predict, images, labels, threat: Threat, targets, norms: tuple[str, ...]) -> Nearest:
    """The originals, at distance 0 where they fool the network already and else infinitely far; after one query.

    Raises:
      InputError: the threat's norm is none of `norms`.
    """
    if threat.norm not in norms:
        raise InputError(f"norm {threat.norm!r}: this attack has {', '.join(norms)}")
    won = fooled(predict(images), labels, targets)
    return Nearest(images, jnp.where(won, 0.0, jnp.inf).astype(images.dtype), jnp.ones(len(images), jnp.int32))


def result(predict: Predict, nearest, images, labels, threat: Threat, queries, targets) -> AttackResult:
    """The nearest images judged anew: success where they fool the network and are within eps; loss is the margin."""
    found = threats.result(predict, nearest, images, labels, threat, objectives.margin, queries, targets)
    return found.replace(success=found.success & (found.norm <= jnp.asarray(threat.eps)))


def distances(found: AttackResult) -> jax.Array:
    """(B,) the smallest change found by an attack of this kind: 0 where none was needed, infinite where none was found.

    What they have found beyond eps counts too, so that medians need no threat; its margin, the loss, is above 0.
    """
    return jnp.where(found.success | (found.loss > 0) & jnp.isfinite(found.loss), found.norm, jnp.inf)


def cosine(first, last, i, steps: int):
    """From first at i = 0 to nearly last at i = steps - 1: last + (first - last) (1 + cos(pi i / steps)) / 2."""
    return last + (first - last) * (1 + jnp.cos(jnp.pi * i / steps)) / 2


def over_constants(attempt: Callable, nearest: Nearest, first, rounds: int) -> Nearest:
    """The nearest of `rounds` attempts, each with constants of its own: times 10 until one succeeds, then bisected.

    Carlini & Wagner 2017, VI.A: the constant weighs fooling the network against the size of the change.

    Args:
      attempt: (constants (B,), nearest) -> (nearest, succeeded (B,) bool with these constants).
      nearest: to begin with.
      first: constant of the first round.
      rounds: at least 1.
    """
    def body(carry):
        i, constant, low, high, nearest = carry
        nearest, succeeded = attempt(constant, nearest)
        low, high = jnp.where(succeeded, low, constant), jnp.where(succeeded, constant, high)
        return i + 1, jnp.where(jnp.isinf(high), 10 * constant, (low + high) / 2), low, high, nearest

    zeros = jnp.zeros_like(nearest.distance)
    carry = 0, zeros + jnp.asarray(first, zeros.dtype), zeros, zeros + jnp.inf, nearest
    return jax.lax.while_loop(lambda c: (c[0] < rounds) & jnp.any(c[-1].open), body, carry)[-1]


def stalled(i, steps: int, loss, before):
    """Whether an attempt is to end, and the loss to compare with at the next check; per example.

    Every tenth of the steps, where the loss has not fallen below 0.9999 of what it was (the authors' code of Carlini &
    Wagner 2017, there for a batch as a whole).
    """
    checks = i % -(-steps // 10) == 0
    return checks & ~(loss <= 0.9999 * before), jnp.where(checks, loss, before)

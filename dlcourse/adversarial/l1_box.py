"""The l1 ball cut by the box: most of the ball around an image lies outside of the box, so that both count at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dlcourse.adversarial.threat import Threat


def inside_l1(images: jax.Array, originals: jax.Array, threat: Threat) -> jax.Array:
    """The point nearest to `images` of all with |d|_1 <= eps in the box (Croce & Hein 2021, proposition 2.1).

    d = sign(c) clip(|c| - t, 0, room), c = images - originals, room the distance to the box on that side. |d|_1 over
    t is straight between kinks, which are at |c| and at |c| - room; on the piece where it reaches eps t is found.

    Args:
      images: (B,H,W,C).
      originals: (B,H,W,C) in the box.
      threat: eps and the box; its norm is not asked for.
    """
    origin = originals.reshape(len(originals), -1)
    change = images.reshape(origin.shape) - origin
    eps = jnp.broadcast_to(jnp.asarray(threat.eps, change.dtype), change.shape[:1])[:, None]
    room = jnp.where(change > 0, threat.high - origin, origin - threat.low)
    strength, ones = jnp.abs(change), jnp.ones_like(change)
    kinks = jnp.concatenate([-strength, -jnp.maximum(strength - room, 0.0)], -1)
    kinks, bends = jax.lax.sort((kinks, jnp.concatenate([ones, -ones], -1)), num_keys=1)
    slopes = jnp.cumsum(bends, -1)  # by which |d|_1 grows as t falls below the kink
    growth = slopes[:, :-1] * (kinks[:, 1:] - kinks[:, :-1])
    lengths = jnp.concatenate([jnp.zeros_like(kinks[:, :1]), jnp.cumsum(growth, -1)], -1)
    piece = jnp.maximum((lengths <= eps).sum(-1, keepdims=True) - 1, 0)
    kink, length, slope = (jnp.take_along_axis(of, piece, 1) for of in (kinks, lengths, slopes))
    cut = jnp.maximum(-kink - (eps - length) / jnp.maximum(slope, 1.0), 0.0)
    moved = origin + jnp.sign(change) * jnp.clip(strength - cut, 0.0, room)
    return jnp.clip(moved, threat.low, threat.high).reshape(originals.shape)

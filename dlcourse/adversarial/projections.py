"""Exact nearest points of sets that attacks move on: a hyperplane, or an L1 ball, each intersected with the box."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dlcourse.adversarial.threat import Threat, over_pixels, size

NORMS = ("linf", "l2", "l1")


def onto_hyperplane(points: jax.Array, normals: jax.Array, excess: jax.Array, norm: str, low, high) -> jax.Array:
    """argmin |d|_norm with <w, x + d> = b and low <= x + d <= high (the step of FAB, Croce & Hein 2020).

    Each coordinate moves to its own side by m_i, at most to its wall r_i away: m_i = min(t, r_i) for linf and
    min(t |w_i|, r_i) for l2, t such that sum |w_i| m_i = |<w, x> - b|; for l1 those of largest |w_i| go first. Where
    no point of the box lies on the hyperplane, every m_i = r_i, which comes nearest to it.

    Args:
      points: (B,H,W,C) x, in the box.
      normals: (B,H,W,C) w.
      excess: (B,) <w, x> - b.
      norm: of NORMS.
      low: of the box.
      high: of the box.

    Returns:
      (B,H,W,C) d.
    """
    scale = jnp.maximum(size(normals, "linf"), 1e-30)
    weights = normals / over_pixels(scale, normals)  # so that what counts as zero does not depend on the unit of w
    way = jnp.sign(weights) * over_pixels(jnp.where(excess >= 0, -1.0, 1.0), weights)
    rooms = jnp.where(way > 0, high - points, points - low)
    usable = jnp.abs(weights) > 1e-8
    flat = [jnp.where(usable, values, 0.0).reshape(len(points), -1) for values in (jnp.abs(weights), rooms)]
    moves = jax.vmap(_MOVES[norm])(*flat, jnp.abs(excess) / scale)
    return way * moves.reshape(points.shape)


def _linf(weights, rooms, amount):
    return jnp.minimum(_level(weights, rooms, amount), rooms)


def _l2(weights, rooms, amount):
    limits = rooms / jnp.where(weights > 0, weights, 1.0)
    level = _level(jnp.square(weights), limits, amount)
    return jnp.where(level < limits, level * weights, rooms)


def _l1(weights, rooms, amount):
    order = jnp.argsort(-weights)
    weights, rooms = weights[order], rooms[order]
    reach = weights * rooms
    left = amount - (jnp.cumsum(reach) - reach)
    moves = jnp.where(weights > 0, jnp.clip(left / jnp.where(weights > 0, weights, 1.0), 0.0, rooms), 0.0)
    return jnp.zeros_like(moves).at[order].set(moves)


_MOVES = {"linf": _linf, "l2": _l2, "l1": _l1}


def _level(weights, limits, amount):
    """t with sum_i weights_i min(t, limits_i) = amount, infinite where even all limits do not suffice; (D,) each.

    Newton's method from 0: the sum is concave and made of straight pieces, so that t grows to the very solution, in
    few steps and without the sorting that takes most of the time on a CPU.
    """
    def solved(level):
        free = limits > level
        filled = jnp.where(free, 0.0, weights * limits).sum()
        rest = jnp.where(free, weights, 0.0).sum()
        return jnp.where(rest > 0, jnp.maximum((amount - filled) / jnp.where(rest > 0, rest, 1.0), level), jnp.inf)

    def grow(levels):
        return levels[1], solved(levels[1])

    start = jnp.zeros_like(amount)
    return jax.lax.while_loop(lambda levels: levels[1] > levels[0], grow, (start, solved(start)))[1]


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

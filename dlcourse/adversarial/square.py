"""The Square attack: random search over square-shaped changes, by scores alone (Andriushchenko et al. 2020)."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dlcourse.adversarial import objectives
from dlcourse.adversarial import threat as threats
from dlcourse.adversarial.projections import NORMS, inside_l1
from dlcourse.adversarial.threat import AttackResult, Threat, example_keys, fooled, over_pixels, size
from dlcourse.contracts import InputError, Predict
from dlcourse.streams import stream

HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Proposals after which p is halved (the authors' schedule for 10000 queries); it is not stretched to other budgets."""


class Moves(struct.PyTreeNode):
    """What one proposal draws, (B,...); all proposals of a run, (B,Q,...).

    Attributes:
      top: row where the window begins.
      left: column where it begins.
      other_top: row of the window whose share it takes over (l2, l1).
      other_left: column of that.
      turned: whether the pattern is transposed (l2, l1).
      signs: (...,C) -1 or 1.
    """

    top: jax.Array
    left: jax.Array
    other_top: jax.Array
    other_left: jax.Array
    turned: jax.Array
    signs: jax.Array


class Draws(struct.PyTreeNode):
    """Everything that a run draws: given to `square` it repeats another implementation's run.

    Attributes:
      tile_turned: (B,T) whether a tile of the start is transposed.
      tile_signs: (B,T,C) -1 or 1. The start of linf is vertical stripes: T = W, nothing is transposed.
      moves: (B,Q,...).
    """

    tile_turned: jax.Array
    tile_signs: jax.Array
    moves: Moves


@functools.partial(jax.jit, static_argnames=("queries", "restarts", "p"))
def square(key, predict: Predict, images, labels, threat: Threat, *, targets=None, queries: int = 5000,
           restarts: int = 1, p: float = 0.8, draws: Draws | None = None) -> AttackResult:
    """Proposes to change one square of the image, and keeps what raises the objective (algorithms 1 to 3).

    linf sets a square to x0 +- eps; l2 and l1 put two opposite pyramids into it, paid for by another square's share of
    the norm (l1 as in AutoAttack: then the exact projection onto ball and box). The objective is the margin, with
    targets their cross-entropy. An example's draws depend on its key and the proposal's number alone. A
    square may lie anywhere in the image, as published; the authors' code never reaches the last row and column.

    Args:
      key: (), or (B,) keys.
      predict: images -> logits, a pytree such as `evaluation.predictor` returns.
      images: (B,H,W,C) in the box.
      labels: (B,) the truth.
      threat: of norm linf, l2 or l1.
      targets: (B,) classes to be taken for, or None.
      queries: proposals a restart; an example takes none once it is fooled.
      restarts: until fooled; else that of the largest objective is kept.
      p: the share of the image's pixels that the first squares cover.
      draws: instead of random ones, for one restart.

    Raises:
      InputError: for another norm, or draws for several restarts.
    """
    if threat.norm not in NORMS:
        raise InputError(f"norm {threat.norm!r}: square has {', '.join(NORMS)}")
    if draws is not None and (restarts != 1 or draws.moves.top.shape[1] < queries):
        raise InputError(f"restarts={restarts}, queries={queries}: the draws are for 1 restart of "
                         f"{draws.moves.top.shape[1]} proposals")
    keys = example_keys(key, len(images))
    objective = objectives.margin if targets is None else objectives.cross_entropy

    def restart(carry):
        number, kept = carry
        own = jax.vmap(lambda k: jax.random.fold_in(k, number))(keys)
        reached, taken = _search(own, predict, images, labels, threat, targets, objective, queries, p, draws,
                                 kept.success)
        found = threats.result(predict, reached, images, labels, threat, objective, kept.queries + taken, targets)
        return number + 1, threats.better_of(found, kept)[0]

    start = threats.unchanged(predict, images, labels, threat, objective, targets)
    return jax.lax.while_loop(lambda c: (c[0] < restarts) & ~jnp.all(c[1].success), restart, (0, start))[1]


def _search(keys, predict, images, labels, threat, targets, objective, queries, p, draws, done):
    """The best images of one restart and the queries spent on each; those that are `done` are left alone."""
    sides = window_sides(threat.norm, *images.shape[1:3], p)
    shapes = jnp.asarray(np.stack([_placed(side, *images.shape[1:3], threat.norm) for side in sides]))

    def judged(x):
        logits = predict(x)
        values = objective(logits, labels, targets)
        return jnp.where(jnp.isfinite(values), values, -jnp.inf), fooled(logits, labels, targets)

    def step(carry):
        i, proposed, x, best, spent, done = carry
        value, hit = judged(proposed)
        better = ~done & (hit | (value > best))
        x, best = jnp.where(over_pixels(better, x), proposed, x), jnp.where(better, value, best)
        stage = sum((i > after).astype(jnp.int32) for after in HALVED_AFTER)
        side = jnp.asarray(sides)[stage]
        moves = jax.vmap(lambda key: drawn_move(key, i, side, images.shape[1:]))(keys) if draws is None else \
            jax.tree.map(lambda all_: all_[:, i], draws.moves)
        # Drawn in the round before it is judged: a CPU would else draw it anew, slowly, while it pads the first layer.
        proposed = _proposal(x, images, moves, side, shapes[stage], threat)
        return i + 1, proposed, x, best, spent + ~done, done | hit

    start = jnp.where(over_pixels(done, images), images, _start(keys, images, threat, draws))
    first = (0, start, start, jnp.full(len(images), -jnp.inf), jnp.zeros(len(images), jnp.int32), done)
    _, _, x, _, spent, _ = jax.lax.while_loop(lambda c: (c[0] <= queries) & ~jnp.all(c[5]), step, first)
    return x, spent


def window_sides(norm: str, height: int, width: int, p: float) -> np.ndarray:
    """The square's side in pixels before the first halving of p, between each two, and after the last."""
    sides = [max(round(math.sqrt(p / 2**halvings * height * width)), 1) for halvings in range(len(HALVED_AFTER) + 1)]
    if norm != "linf":  # two pyramids need three rows, and a middle
        sides = [max(side, 3) | 1 for side in sides]
    return np.minimum(np.array(sides, np.int32), min(height, width))


def drawn_move(key: jax.Array, number: jax.Array, side: jax.Array, shape: tuple[int, int, int]) -> Moves:
    """The draws of one example's proposal, windows anywhere within the image.

    Args:
      key: the example's.
      number: the proposal's.
      side: the window's.
      shape: H, W, C.
    """
    height, width, channels = shape
    places, turn, sign = jax.random.split(stream(key, "move", number), 3)
    ends = jnp.array([height, width, height, width]) - side + 1
    top, left, other_top, other_left = jax.random.randint(places, (4,), 0, ends)
    return Moves(top, left, other_top, other_left, jax.random.bernoulli(turn),
                 jax.random.rademacher(sign, (channels,), jnp.float32))


def _proposal(x, images, moves, side, shapes, threat):
    """(B,H,W,C) within the threat; shapes (2,H,W), the pattern upright and turned."""
    eps = over_pixels(jnp.broadcast_to(jnp.asarray(threat.eps, x.dtype), len(x)), x)
    window = _window(moves.top, moves.left, side, x)
    signs = moves.signs[:, None, None, :]
    if threat.norm == "linf":
        return jnp.clip(jnp.where(window, images + eps * signs, x), threat.low, threat.high)
    change = x - images
    other = _window(moves.other_top, moves.other_left, side, x)
    pattern = jax.vmap(lambda turned, top, left: jnp.roll(shapes[turned.astype(jnp.int32)], (top, left), (0, 1)))(
        moves.turned, moves.top, moves.left)
    here = jnp.where(window, change, 0.0)
    bump = pattern[..., None] * signs + here / (_by_channel(here, threat.norm) + 1e-12)
    whole = over_pixels(size(change, threat.norm), x)
    freed = _by_channel(jnp.where(window | other, change, 0.0), threat.norm)
    channels = x.shape[-1]
    if threat.norm == "l2":
        budget = jnp.sqrt(jnp.maximum(eps**2 - whole**2, 0.0) / channels + freed**2)
    else:
        budget = jnp.maximum(eps - whole, 0.0) + freed * channels
    bump = bump / (_by_channel(bump, threat.norm) + 1e-12) * budget
    return _filled(jnp.where(window, bump, jnp.where(other, 0.0, change)), images, threat)


def _start(keys, images, threat, draws):
    """Stripes x0 +- eps for linf; tiles of pyramids for l2 and l1."""
    _, height, width, channels = images.shape
    values, tiles = (None, np.broadcast_to(np.arange(width), (height, width))) if threat.norm == "linf" else \
        _tiles(height, width, threat.norm)
    count = int(tiles.max()) + 1
    if draws is None:
        turn, sign = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(stream(key, "start")))(keys), 1, 0)
        turned = jax.vmap(lambda key: jax.random.bernoulli(key, shape=(count,)))(turn)
        signs = jax.vmap(lambda key: jax.random.rademacher(key, (count, channels), images.dtype))(sign)
    else:
        turned, signs = draws.tile_turned, draws.tile_signs
    signs = signs[:, tiles]
    if values is None:
        return jnp.clip(images + over_pixels(threat.eps, images) * signs, threat.low, threat.high)
    upright, across = jnp.asarray(values)[:, None]
    return _filled(jnp.where(turned[:, tiles], across, upright)[..., None] * signs, images, threat)


def _filled(change, images, threat):
    """The image at the ball's edge for l2, then in the box; for l1 the nearest in both."""
    if threat.norm == "l2":
        length = over_pixels(size(change, "l2"), change) + 1e-12
        return jnp.clip(images + change / length * over_pixels(threat.eps, change), threat.low, threat.high)
    return inside_l1(images + change, images, threat.replace(eps=threat.eps * (1 - 1e-6)))  # for rounding


def _by_channel(change, norm):
    """The norm of each channel, (B,1,1,C)."""
    if norm == "l2":
        return jnp.sqrt(jnp.square(change).sum((1, 2), keepdims=True))
    return jnp.abs(change).sum((1, 2), keepdims=True)


def _window(top, left, side, like):
    """(B,H,W,1) bool."""
    rows, columns = jnp.arange(like.shape[1])[None], jnp.arange(like.shape[2])[None]
    inside = [(at >= first[:, None]) & (at < first[:, None] + side) for at, first in ((rows, top), (columns, left))]
    return (inside[0][:, :, None] & inside[1][:, None, :])[..., None]


def _pyramid(rows: int, columns: int, norm: str) -> np.ndarray:
    """Rings round the middle, ring m of height sum_{j >= m} 1 / (j+1)^2 (l1: power 4, as in AutoAttack), of norm 1."""
    middle = rows // 2, columns // 2
    rings = np.maximum(abs(np.arange(rows) - middle[0])[:, None], abs(np.arange(columns) - middle[1])[None])
    powers = 1.0 / np.arange(1, max(middle) + 2) ** (2.0 if norm == "l2" else 4.0)
    heights = np.append(powers[::-1].cumsum()[::-1], np.zeros(max(rows, columns)))[rings]
    return heights / _length(heights, norm) if heights.size else heights


def _pattern(side: int, norm: str) -> np.ndarray:
    """Two pyramids of opposite signs, one above the other, (side, side) of norm 1."""
    both = np.concatenate([_pyramid(side // 2, side, norm), -_pyramid(side - side // 2, side, norm)])
    return both / _length(both, norm)


def _length(values, norm):
    return np.sqrt((values**2).sum()) if norm == "l2" else np.abs(values).sum()


def _placed(side: int, height: int, width: int, norm: str) -> np.ndarray:
    """(2,H,W): the pattern in the upper left corner, upright and turned."""
    placed = np.zeros((2, height, width), np.float32)
    placed[0, :side, :side] = _pattern(side, norm)
    placed[1, :side, :side] = _pattern(side, norm).T
    return placed


def _tiles(height: int, width: int, norm: str) -> tuple[np.ndarray, np.ndarray]:
    """Patterns of a fifth of the side in rows: their values (2,H,W), upright and turned, and tiles (H,W)."""
    side = max(min(height, width) // 5, 1)
    first = max(min(height, width) - 5 * side, 0) // 2
    down, across = (height - first) // side, (width - first) // side
    values, tiles = np.zeros((2, height, width), np.float32), np.zeros((height, width), int)
    for number in range(down * across):
        row, column = first + side * (number // across), first + side * (number % across)
        place = slice(row, row + side), slice(column, column + side)
        tiles[place] = number
        values[(0, *place)], values[(1, *place)] = _pattern(side, norm), _pattern(side, norm).T
    return values, tiles

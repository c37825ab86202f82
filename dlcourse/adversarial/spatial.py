"""Attacks that turn and move the image instead of changing its pixels' values."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.scipy.ndimage import map_coordinates

from dlcourse.adversarial import objectives
from dlcourse.adversarial import threat as threats
from dlcourse.adversarial.threat import AttackResult, Threat, example_keys
from dlcourse.contracts import Predict


class Pose(struct.PyTreeNode):
    """How images are moved; each (B,).

    Attributes:
      degrees: anticlockwise, around the image's centre.
      down: pixels, after turning.
      right: pixels, after turning.
    """

    degrees: jax.Array
    down: jax.Array
    right: jax.Array


def moved(images, pose: Pose, fill=0.0):
    """The images turned, then shifted; bilinear, with `fill` outside: x'(p) = x(R^-1 (p - c - t) + c)."""
    height, width = images.shape[1:3]
    rows, columns = jnp.meshgrid(jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2,
                                 indexing="ij")

    def one(image, degrees, down, right):
        cos, sin = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
        from_row = cos * (rows - down) + sin * (columns - right) + (height - 1) / 2
        from_column = -sin * (rows - down) + cos * (columns - right) + (width - 1) / 2
        return jax.vmap(lambda channel: map_coordinates(channel - fill, [from_row, from_column], order=1),
                        in_axes=-1, out_axes=-1)(image) + fill

    return jax.vmap(one)(images, pose.degrees, pose.down, pose.right)


def worst_pose(predict: Predict, images, labels, threat: Threat, poses: Pose, *,
               targets=None) -> tuple[AttackResult, Pose]:
    """The first of an example's poses that fools the network, else that of the greatest margin, and which it was.

    Args:
      predict: images -> logits.
      images: (B,H,W,C) in the box.
      labels: (B,) the truth.
      threat: its box, and the norm that the result reports; its eps is not used.
      poses: to be tried in this order, each (M,B).
      targets: (B,) classes to be taken for, or None.
    """
    start = threats.unchanged(predict, images, labels, threat, objectives.margin, targets)
    still = jax.tree.map(lambda values: jnp.zeros_like(values[0]), poses)

    def body(carry):
        number, kept, best = carry
        pose = jax.tree.map(lambda values: values[number], poses)
        tried = jnp.clip(moved(images, pose, threat.low), threat.low, threat.high)
        found = threats.result(predict, tried, images, labels, threat, objectives.margin, kept.queries, targets)
        kept, better = threats.better_of(found, kept)
        return number + 1, kept, jax.tree.map(functools.partial(jnp.where, better), pose, best)

    _, kept, best = jax.lax.while_loop(
        lambda c: (c[0] < len(poses.degrees)) & ~jnp.all(c[1].success), body, (0, start, still))
    return kept, best


@functools.partial(jax.jit, static_argnames=("angles", "shifts"))
def grid(key, predict: Predict, images, labels, threat: Threat, *, targets=None, degrees: float = 30.0,
         pixels: float = 3.0, angles: int = 31, shifts: int = 5) -> AttackResult:
    """All of a grid of rotations and translations (Engstrom et al. 2019, section 3: 31 angles, 5 x 5 shifts).

    Args:
      key: unused; the attack draws nothing.
      predict: images -> logits.
      images: (B,H,W,C) in the box.
      labels: (B,) the truth.
      threat: its box, and the norm that the result reports; its eps is not used.
      targets: (B,) classes to be taken for, or None.
      degrees: the largest angle either way.
      pixels: the largest shift each way; theirs is about a tenth of the image: 3 of 28 or 32.
      angles: of the grid.
      shifts: of the grid, each way.
    """
    reach = functools.partial(jnp.linspace, -1.0, 1.0)
    turned, down, right = (axis.reshape(-1, 1) * jnp.ones((1, len(images))) for axis in jnp.meshgrid(
        degrees * reach(angles), pixels * reach(shifts), pixels * reach(shifts), indexing="ij"))
    return worst_pose(predict, images, labels, threat, Pose(turned, down, right), targets=targets)[0]


@functools.partial(jax.jit, static_argnames=("draws",))
def worst_of(key, predict: Predict, images, labels, threat: Threat, *, targets=None, degrees: float = 30.0,
             pixels: float = 3.0, draws: int = 10) -> AttackResult:
    """The worst of random rotations and translations (Engstrom et al. 2019, section 3: of 10).

    Args: as of `grid`, and
      key: (), or (B,) keys.
      draws: k; more of them begin with the same.
    """
    def draw(key, number):
        return jax.random.uniform(jax.random.fold_in(key, number), (3,), minval=-1.0)

    keys = example_keys(key, len(images))
    drawn = jax.vmap(lambda number: jax.vmap(lambda k: draw(k, number))(keys))(jnp.arange(draws))
    turned, down, right = jnp.moveaxis(drawn, -1, 0)
    return worst_pose(predict, images, labels, threat, Pose(degrees * turned, pixels * down, pixels * right),
                      targets=targets)[0]

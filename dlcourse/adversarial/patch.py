"""One patch that, laid anywhere on any image, makes the network see a given class (Brown et al. 2017)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.scipy.ndimage import map_coordinates

from dlcourse.adversarial import objectives
from dlcourse.adversarial.threat import example_keys, fooled
from dlcourse.contracts import Predict


class Place(struct.PyTreeNode):
    """Where and how a patch lies on images; each (B,).

    Attributes:
      side: of the patch, in pixels of the image.
      degrees: anticlockwise.
      row: of the patch's centre, in pixels.
      column: of the patch's centre, in pixels.
    """

    side: jax.Array
    degrees: jax.Array
    row: jax.Array
    column: jax.Array


class Places(struct.PyTreeNode):
    """What is drawn from: uniform sides, angles, and centres such that the patch's disc lies within the image.

    Attributes:
      least, most: side, as a share of the image's shorter side.
      degrees: the largest angle either way.
    """

    least: jax.Array | float = 0.3
    most: jax.Array | float = 0.5
    degrees: jax.Array | float = 22.5


def draw(keys, image_shape: tuple[int, int, int], places: Places) -> Place:
    """A place for each of B keys."""
    height, width = image_shape[:2]
    side, angle, row, column = jax.vmap(lambda k: jax.random.uniform(k, (4,)))(keys).T
    side = min(height, width) * (places.least + (places.most - places.least) * side)
    return Place(side, places.degrees * (2 * angle - 1), (side - 1) / 2 + (height - side) * row,
                 (side - 1) / 2 + (width - side) * column)


def lay(patch, images, place: Place):
    """A(p, x, l, t): the images with the patch's disc on them, (B,H,W,C); bilinear within the patch.

    Args:
      patch: (S,S,C).
      images: (B,H,W,C).
      place: where.
    """
    edge = len(patch)
    rows, columns = jnp.meshgrid(jnp.arange(images.shape[1], dtype=images.dtype),
                                 jnp.arange(images.shape[2], dtype=images.dtype), indexing="ij")

    def one(image, side, degrees, row, column):
        cos, sin = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
        # In units of half the patch's side, so that the disc is where u^2 + v^2 <= 1.
        u = (cos * (rows - row) + sin * (columns - column)) * 2 / side
        v = (-sin * (rows - row) + cos * (columns - column)) * 2 / side
        at = [edge / 2 * u + (edge - 1) / 2, edge / 2 * v + (edge - 1) / 2]
        seen = jax.vmap(lambda channel: map_coordinates(channel, at, order=1, mode="nearest"), in_axes=-1,
                        out_axes=-1)(patch)
        return jnp.where((u**2 + v**2 <= 1)[..., None], seen, image)

    return jax.vmap(one)(images, place.side, place.degrees, place.row, place.column)


@functools.partial(jax.jit, static_argnames=("side", "steps", "batch"))
def learn(key, predict: Predict, images, target, *, places: Places | None = None, side: int = 16, steps: int = 500,
          batch: int = 16, learning_rate: float = 0.05, low: float = 0.0, high: float = 1.0):
    """The patch of greatest mean log p(target | A(p, x, l, t)) over images x, places l and turns and sizes t.

    Brown et al. 2017, eq. 1, the expectation over transformations by a draw of images and places a step; by Adam,
    clipped to the box. It is one patch for all images, and thus no attack on a threat of small changes.

    Args:
      key: ().
      predict: images -> logits.
      images: (N,H,W,C) to learn on.
      target: (), the class to be seen.
      places: to draw from; default Places().
      side: S, of the patch, in its own pixels.
      steps: of Adam.
      batch: images a step.
      learning_rate: of Adam, in pixels' units.
      low, high: the box.

    Returns:
      The patch (S,S,C), and each step's mean log p (steps,).
    """
    places = Places() if places is None else places
    optimizer = optax.adam(learning_rate)

    def step(carry, number):
        patch, state = carry
        which, where = jax.random.split(jax.random.fold_in(key, number))
        some = images[jax.random.randint(which, (batch,), 0, len(images))]
        place = draw(jax.random.split(where, batch), images.shape[1:], places)
        wanted = jnp.full(batch, target)
        loss, gradient = jax.value_and_grad(
            lambda p: -objectives.cross_entropy(predict(lay(p, some, place)), wanted, wanted).mean())(patch)
        updates, state = optimizer.update(gradient, state)
        return (jnp.clip(patch + updates, low, high), state), -loss

    patch = jnp.full((side, side, images.shape[-1]), (low + high) / 2, images.dtype)
    (patch, _), log_p = jax.lax.scan(step, (patch, optimizer.init(patch)), jnp.arange(steps))
    return patch, log_p


@jax.jit
def hits(key, predict: Predict, images, target, patch, places: Places | None = None):
    """(B,) bool: which images, each with the patch at a place of its own, are taken for the target.

    Args:
      key: (), or (B,) keys.
      predict: images -> logits.
      images: (B,H,W,C), none of them of the target's class if the rate is to mean anything.
      target: ().
      patch: (S,S,C); as controls, one of noise and the untrained one.
      places: to draw from; default Places().
    """
    place = draw(example_keys(key, len(images)), images.shape[1:], Places() if places is None else places)
    wanted = jnp.full(len(images), target)
    return fooled(predict(lay(patch, images, place)), wanted, wanted)

"""The fifteen common corruptions at five severities (Hendrycks & Dietterich 2019), and the mean corruption error.

Constants are those that made CIFAR-10-C, for images of 32 x 32 pixels. For others, lengths in pixels grow with the
shorter side over 32 but never shrink (a pixel stays a pixel), elastic shifts are shares of the side at any size, and
what has no length stays. Images stay floats: only `jpeg` rounds to 8 bits. Frost is a stand-in; see `weather`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlcourse.adversarial import blurs, masking, weather
from dlcourse.adversarial.jpeg import jpeg
from dlcourse.adversarial.threat import example_keys
from dlcourse.contracts import InputError, Predict

SEVERITIES = (1, 2, 3, 4, 5)


class Level(NamedTuple):
    """A severity of one corruption.

    Attributes:
      c: (n,) its constants.
      index: () int32 from 0 to 4.
      table: (5, n) the constants of all severities, in NumPy, from which sizes are known.
    """

    c: jax.Array
    index: jax.Array
    table: np.ndarray


class Corruption(NamedTuple):
    """One kind of damage.

    Attributes:
      apply: (key, image (H,W,C), level) -> (H,W,C), before it is cut to [0, 1].
      constants: five rows of n numbers.
      lengths: which of the n are in pixels.
    """

    apply: Callable
    constants: Sequence
    lengths: tuple[int, ...] = ()

    def table(self, shape: tuple[int, ...]) -> np.ndarray:
        """(5, n) float32 for images of shape (H,W,C)."""
        table = np.array(self.constants, np.float64).reshape(5, -1)
        table[:, self.lengths] *= max(1.0, min(shape[:2]) / 32)
        return table.astype(np.float32)


def _gaussian_noise(key, x, level):
    return x + level.c[0] * jax.random.normal(key, x.shape)


def _shot_noise(key, x, level):
    return jax.random.poisson(key, x * level.c[0], x.shape) / level.c[0]


def _impulse_noise(key, x, level):
    which, salt = jax.random.split(key)
    value = jax.random.bernoulli(salt, 0.5, x.shape).astype(x.dtype)
    return jnp.where(jax.random.bernoulli(which, level.c[0], x.shape), value, x)


def _defocus_blur(key, x, level):
    return blurs.filtered(x, blurs.disk(level.c[0], level.c[1], int(np.ceil(level.table[:, 0].max())) + 1))


def _glass_blur(key, x, level):
    """A blur; once or twice every pixel becomes one of those at offsets from -d to d - 1; a blur.

    The published code means to swap pixels but copies them; what it does to the images of the benchmark is this.
    """
    sigma, room = level.c[0], int(4 * level.table[:, 0].max() + 0.5)
    reach = max(1, round(float(level.table[0, 1])))
    height, width = x.shape[:2]
    x = blurs.gaussian(x, sigma, room)
    for turn, own in enumerate(jax.random.split(key)):
        rows, columns = (jax.random.randint(k, (height, width), -reach, reach) for k in jax.random.split(own))
        at = jnp.arange(height)[:, None], jnp.arange(width)[None]
        near = [(i <= reach) | (i > side - reach) for i, side in zip(at, (height, width), strict=True)]
        stays = near[0] | near[1] | (turn >= level.c[2])  # near edges nothing moves, as there
        moved = x[jnp.clip(at[0] + rows, 0, height - 1), jnp.clip(at[1] + columns, 0, width - 1)]
        x = jnp.where(stays[..., None], x, moved)
    return blurs.gaussian(x, sigma, room)


def _motion_blur(key, x, level):
    angle = jax.random.uniform(key, minval=-45.0, maxval=45.0)
    return blurs.motion(x, jnp.round(level.c[0]), level.c[1], angle, int(np.ceil(level.table[:, 0].max())))


def _zoom_blur(key, x, level):
    """The mean of the image, once more the image, and the image enlarged by 1 %, 2 %, … up to a largest factor."""
    factors = np.linspace(1.0, 1.25, 26)
    rows, columns = (jnp.asarray(blurs.zoom_positions(factors, side)) for side in x.shape[:2])
    used = jnp.arange(len(factors)) < level.c[0]
    zoomed = jax.vmap(blurs.interpolated, (None, 0, 0))(x, rows, columns)
    return (x + jnp.where(used[:, None, None, None], zoomed, 0.0).sum(0)) / (level.c[0] + 1)


def _snow(key, x, level):
    mean, deviation, _, least, radius, sigma, kept = level.c
    flakes = tuple(jnp.asarray(blurs.zoom_positions(level.table[:, 2], side))[level.index] for side in x.shape[:2])
    return weather.snow(key, x, mean, deviation, flakes, least, jnp.round(radius), sigma, kept,
                        int(np.ceil(level.table[:, 4].max())))


def _frost(key, x, level):
    return weather.frost(key, x, level.c[0], level.c[1])


def _fog(key, x, level):
    return weather.fog(key, x, level.c[0], level.c[1])


def _brightness(key, x, level):
    """The value of hue, saturation and value raised: colours keep their proportions."""
    value = x.max(-1, keepdims=True)
    raised = jnp.clip(value + level.c[0], 0.0, 1.0)
    return jnp.where(value > 0, x * raised / jnp.where(value > 0, value, 1.0), raised)


def _contrast(key, x, level):
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * level.c[0] + mean


def _elastic_transform(key, x, level):
    """A random affine map, then every pixel from a place near it; c in shares of the shorter side."""
    height, width = x.shape[:2]
    side = min(height, width)
    alpha, sigma, jitter = level.c[0] * side, level.c[1] * side, level.c[2] * side
    corners, shifts = jax.random.split(key)
    # Three corners of a square, (x, y), are moved; the map that this defines is followed back.
    reach, centre = side // 3, jnp.asarray([width // 2, height // 2], jnp.float32)
    moves = jitter * jax.random.uniform(corners, (3, 2), minval=-1.0, maxval=1.0)
    to = centre[None] + reach * jnp.asarray([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]) + moves
    (a, c), (b, d) = (to[1] - to[2]) / (2 * reach), (to[0] - to[1]) / (2 * reach)
    right, down = (jnp.arange(width)[None] - to[0, 0], jnp.arange(height)[:, None] - to[0, 1])
    area = a * d - b * c
    from_x, from_y = (d * right - b * down) / area, (a * down - c * right) / area
    x = blurs.sampled(x, from_y + centre[1] + reach, from_x + centre[0] + reach, "mirror")
    room = int(3 * level.table[:, 1].max() * side + 0.5)
    smooth = blurs.gaussian(jax.random.uniform(shifts, (height, width, 2), minval=-1.0, maxval=1.0), sigma, room,
                            truncate=3.0, edge="reflect")
    dy, dx = alpha * smooth[..., 0], alpha * smooth[..., 1]
    return blurs.sampled(x, jnp.arange(height)[:, None] + dy, jnp.arange(width)[None] + dx, "reflect")


def _pixelate(key, x, level):
    """Down to a share of the size by means over boxes and up again by repetition, as Pillow resizes with boxes."""
    down, across = (jnp.asarray(np.stack([_boxes(side, float(share)) for share in level.table[:, 0]]))[level.index]
                    for side in x.shape[:2])
    return jnp.einsum("ih,hwc,jw->ijc", down, x, across, precision="highest")


def _boxes(side: int, share: float) -> np.ndarray:
    """(side, side): what `side` pixels become by way of int(share side) boxes, each the pixels with centres in it."""
    small = int(side * round(share, 6))
    wide, i = side / small, np.arange(side)
    centres = (np.arange(small)[:, None] + 0.5) * wide
    offset = ((i[None] - centres) + 0.5) * (1 / wide)  # in Pillow's order, which decides ties
    near = (i[None] >= np.floor(centres - wide / 2 + 0.5)) & (i[None] < np.floor(centres + wide / 2 + 0.5))
    inside = (near & (offset > -0.5) & (offset <= 0.5)).astype(np.float32)
    return (inside / inside.sum(1, keepdims=True))[np.floor((i + 0.5) * (small / side)).astype(int)]


def _jpeg(key, x, level):
    return jpeg(x, level.c[0])


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Corruption(_shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": Corruption(_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": Corruption(_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)), (0,)),
    "glass_blur": Corruption(
        _glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)), (0, 1)),
    "motion_blur": Corruption(_motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)), (0, 1)),
    "zoom_blur": Corruption(_zoom_blur, (7, 12, 16, 21, 26)),
    "snow": Corruption(_snow, (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)), (4, 5)),
    "frost": Corruption(_frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": Corruption(_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": Corruption(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": Corruption(
        _elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))),
    "pixelate": Corruption(_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg": Corruption(_jpeg, (80, 65, 58, 50, 40)),
}


@functools.partial(jax.jit, static_argnames="name")
def corrupt(key: jax.Array, images: jax.Array, severity, *, name: str) -> jax.Array:
    """The images damaged, each by draws of its own key.

    Args:
      key: (), or (B,) keys.
      images: (B,H,W,C) float32 in [0,1].
      severity: () or (B,) whole numbers from 1 to 5; others are taken for the nearest. New ones never recompile.
      name: of CORRUPTIONS.

    Returns:
      (B,H,W,C) in [0,1].

    Raises:
      InputError: an unknown name.
    """
    kind = _known(name)
    table = kind.table(images.shape[1:])
    levels = jnp.clip(jnp.broadcast_to(severity, images.shape[:1]), 1, 5) - 1

    def one(key, image, index):
        return jnp.clip(kind.apply(key, image, Level(jnp.asarray(table)[index], index, table)), 0.0, 1.0)

    return jax.vmap(one)(example_keys(key, len(images)), images, levels)


def errors(key: jax.Array, predict: Predict, images: np.ndarray, labels: np.ndarray, *,
           names: Sequence[str] = tuple(CORRUPTIONS), batch_size: int = 500) -> dict[str, np.ndarray]:
    """Share of the images that are misclassified, (5,) over severities, for every corruption.

    An image is where its logits are not finite.

    Args:
      key: (); every image has the same draws however images are batched.
      predict: images -> logits, a pytree.
      images: (N,H,W,C).
      labels: (N,).
      names: of CORRUPTIONS.
      batch_size: B.
    """
    keys = example_keys(key, len(images))
    counts = {name: np.zeros(5) for name in names}
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        for name in names:
            for severity in SEVERITIES:
                damaged = corrupt(keys[part], jnp.asarray(images[part]), severity, name=name)
                counts[name][severity - 1] += int((~masking.right(np.asarray(predict(damaged)), labels[part])).sum())
    return {name: count / len(images) for name, count in counts.items()}


def mean_corruption_error(errors: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> float:
    """mCE = mean over corruptions of sum_s E_s / sum_s E_s of a reference (Hendrycks & Dietterich 2019, section 3).

    Args:
      errors: name -> (5,), of the network.
      reference: the same of another network.

    Raises:
      InputError: other corruptions in one than in the other, or a reference without errors.
    """
    if set(errors) != set(reference):
        odd = sorted(set(errors) ^ set(reference))[0]
        raise InputError(f"corruption {odd!r} was measured on one network alone: the mean needs both on all")
    flawless = [name for name in errors if not np.sum(reference[name])]
    if flawless:
        raise InputError(f"the reference makes no error under {flawless[0]}: leave it out, or take a weaker reference")
    return float(np.mean([np.sum(errors[name]) / np.sum(reference[name]) for name in errors]))


def _known(name: str) -> Corruption:
    if name not in CORRUPTIONS:
        raise InputError(f"corruption {name!r}: there is {', '.join(CORRUPTIONS)}")
    return CORRUPTIONS[name]

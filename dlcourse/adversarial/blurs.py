"""Blurs and interpolation of one image (H,W,C), with sizes of their parameters that jit need not know.

A kernel has room for its largest form, given as a Python number; what a smaller one does not reach weighs nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

EDGES = {"nearest": "edge", "reflect": "symmetric", "mirror": "reflect", "constant": "constant"}
"""SciPy's names of what lies beyond an image, and NumPy's."""


def gaussian(image: jax.Array, sigma, room: int, *, truncate: float = 4.0, edge: str = "nearest") -> jax.Array:
    """Each channel convolved with exp(-i^2 / 2 sigma^2), |i| <= truncate sigma + 1/2, normalised, along both axes.

    Args:
      image: (H,W,C).
      sigma: in pixels; 0 changes nothing.
      room: the largest radius of any sigma, in pixels.
      truncate: radius of the kernel in sigmas.
      edge: of EDGES.
    """
    i = jnp.arange(-room, room + 1)
    near = jnp.abs(i) <= jnp.floor(truncate * sigma + 0.5)
    kernel = jnp.where(near, jnp.exp(-0.5 * jnp.square(i / jnp.maximum(sigma, 1e-6))), 0.0)
    kernel = kernel / kernel.sum()
    for axis in (0, 1):
        image = _along(image, kernel, axis, room, edge)
    return image


def _along(image, kernel, axis, room, edge):
    """A sum of shifted images: compiled well for any batch on any machine, and exact to float32."""
    size, pads = image.shape[axis], [(0, 0)] * image.ndim
    pads[axis] = (room, room)
    padded = jnp.pad(image, pads, mode=EDGES[edge])
    shifted = (kernel[j] * jax.lax.slice_in_dim(padded, j, j + size, axis=axis) for j in range(2 * room + 1))
    return sum(shifted)


def disk(radius, alias, room: int) -> jax.Array:
    """(2 room + 1, 2 room + 1): pixels within the radius, softened by a gaussian of sigma `alias` and 3 taps.

    Source: Hendrycks & Dietterich 2019, the published code; 3 taps as there for radii up to 8, here for all.
    """
    i = jnp.arange(-room, room + 1)
    inside = (jnp.square(i)[:, None] + jnp.square(i)[None] <= jnp.square(radius)).astype(jnp.float32)
    return gaussian((inside / inside.sum())[..., None], alias, 1, truncate=1e6, edge="mirror")[..., 0]


def filtered(image: jax.Array, kernel: jax.Array, edge: str = "mirror") -> jax.Array:
    """Each channel of (H,W,C) correlated with a kernel (2r + 1, 2r + 1)."""
    room, (height, width) = kernel.shape[0] // 2, image.shape[:2]
    padded = jnp.pad(image, ((room, room), (room, room), (0, 0)), mode=EDGES[edge])
    out = jax.lax.conv_general_dilated(
        padded.transpose(2, 0, 1)[:, None], kernel[None, None], (1, 1), "VALID", precision="highest")
    return out[:, 0].transpose(1, 2, 0).reshape(height, width, -1)


def motion(image: jax.Array, radius, sigma, angle, room: int) -> jax.Array:
    """sum_i w_i image at i steps of one pixel in a direction, w_i ~ exp(-i^2 / 2 sigma^2), i = 0 .. 2 radius.

    As ImageMagick's motion blur, which the published corruptions call: one-sided, steps rounded to whole pixels, edge
    pixels repeated.

    Args:
      image: (H,W,C).
      radius: in pixels.
      sigma: in pixels.
      angle: in degrees.
      room: the largest radius, a whole number.
    """
    image, (height, width) = jnp.asarray(image), image.shape[:2]
    i = jnp.arange(2 * room + 1)
    weights = jnp.where(i <= 2 * radius, jnp.exp(-0.5 * jnp.square(i / sigma)), 0.0)
    weights = weights / weights.sum()
    # The direction of (sin, cos), each offset rounded half down.
    down = jnp.ceil(i * jnp.cos(jnp.deg2rad(angle)) - 0.5).astype(jnp.int32)
    right = jnp.ceil(i * jnp.sin(jnp.deg2rad(angle)) - 0.5).astype(jnp.int32)

    def add(total, step):
        weight, dy, dx = step
        rows, columns = (jnp.clip(jnp.arange(n) + d, 0, n - 1) for n, d in ((height, dy), (width, dx)))
        return total + weight * image[rows][:, columns], None

    return jax.lax.scan(add, jnp.zeros_like(image), (weights, right, down))[0]


def zoom_positions(factors: np.ndarray, size: int) -> np.ndarray:
    """Where each of `size` pixels of an image that is enlarged by a factor and cut to its centre comes from.

    The centre of ceil(size / factor) pixels becomes round(factor ceil(size / factor)) by linear interpolation from
    corner to corner, and the middle `size` of these are kept, as the published corruptions do with SciPy.

    Args:
      factors: (F,) at least 1.
      size: in pixels.

    Returns:
      (F, size) float32.
    """
    factors = np.asarray(factors, np.float64)
    kept = np.ceil(size / factors).astype(int)
    enlarged = np.maximum(np.round(kept * factors).astype(int), size)
    top, trim = (size - kept) // 2, (enlarged - size) // 2
    scale = (kept - 1) / np.maximum(enlarged - 1, 1)
    return (top[:, None] + (np.arange(size)[None] + trim[:, None]) * scale[:, None]).astype(np.float32)


def interpolated(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """(H,W,C) at rows (H',) x columns (W',), linearly; positions within the image."""
    down, across = (jnp.maximum(0.0, 1 - jnp.abs(positions[:, None] - jnp.arange(size)[None]))
                    for positions, size in ((rows, image.shape[0]), (columns, image.shape[1])))
    return jnp.einsum("ih,hwc,jw->ijc", down, image, across, precision="highest")


def sampled(image: jax.Array, rows: jax.Array, columns: jax.Array, edge: str) -> jax.Array:
    """(H,W,C) at positions rows, columns (H',W'), linearly, "mirror" or "reflect" beyond the edges."""
    image, (height, width) = jnp.asarray(image), image.shape[:2]
    top, left = jnp.floor(rows), jnp.floor(columns)
    down, across = (rows - top)[..., None], (columns - left)[..., None]

    def at(dy, dx):
        return image[_folded(top.astype(jnp.int32) + dy, height, edge), _folded(left.astype(jnp.int32) + dx, width,
                                                                             edge)]

    return (1 - down) * ((1 - across) * at(0, 0) + across * at(0, 1)) + down * ((1 - across) * at(1, 0)
                                                                            + across * at(1, 1))


def _folded(i, size, edge):
    """Whole positions beyond an axis of so many pixels, brought back by mirroring at its ends."""
    if edge == "mirror":
        period = max(2 * (size - 1), 1)
        i = i % period
        return jnp.minimum(i, period - i)
    i = i % (2 * size)
    return jnp.minimum(i, 2 * size - 1 - i)

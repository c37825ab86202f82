"""Fog, frost and snow on one image (H,W,C)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dlcourse.adversarial import blurs

LUMA = (0.299, 0.587, 0.114)


def plasma(key: jax.Array, size: int, decay) -> jax.Array:
    """A random landscape in [0, 1] by the diamond-square algorithm on a torus (Fournier et al. 1982, section 4).

    Each square's centre, then each edge's middle, is the mean of its four neighbours plus a^2 u, u uniform in [-1, 1],
    where a falls by the factor `decay` from one size of squares to the next, as the published corruptions have it.

    Args:
      key: a stream.
      size: a power of two.
      decay: of the amplitude; larger is smoother.

    Returns:
      (size, size).
    """
    noise = jax.random.uniform(key, (size, size), minval=-1.0, maxval=1.0)  # of each point, whose turn comes once
    land, step, amplitude = jnp.zeros((1, 1)), size, jnp.float32(100.0)
    while step >= 2:
        half, scale = step // 2, jnp.square(amplitude)
        right, below = jnp.roll(land, -1, 1), jnp.roll(land, -1, 0)
        centres = (land + right + below + jnp.roll(right, -1, 0)) / 4 + scale * noise[half::step, half::step]
        across = (land + right + centres + jnp.roll(centres, 1, 0)) / 4 + scale * noise[::step, half::step]
        down = (land + below + centres + jnp.roll(centres, 1, 1)) / 4 + scale * noise[half::step, ::step]
        rows = [jnp.stack(pair, -1).reshape(len(land), -1) for pair in ((land, across), (down, centres))]
        land = jnp.stack(rows, 1).reshape(2 * len(land), -1)
        step, amplitude = half, amplitude / decay
    land = land - land.min()
    return land / land.max()


def _landscape(key, image, decay):
    """(H,W,1)."""
    height, width = image.shape[:2]
    return plasma(key, 1 << (max(height, width) - 1).bit_length(), decay)[:height, :width, None]


def fog(key: jax.Array, image: jax.Array, thickness, decay) -> jax.Array:
    """(x + t plasma) max(x) / (max(x) + t)."""
    brightest = image.max()
    return (image + thickness * _landscape(key, image, decay)) * brightest / (brightest + thickness)


def frost(key: jax.Array, image: jax.Array, kept, ice) -> jax.Array:
    """kept x + ice f, f made up of ridges of a random landscape, bright along lines as ice crystals are.

    The published corruption takes f from six photographs, which are not ours to give away: this one stands in for
    them, and figures for frost are comparable among each other alone.
    """
    coarse, fine = jax.random.split(key)
    ridges = sum(weight * (1 - jnp.abs(2 * _landscape(k, image, decay) - 1)) ** 2
                 for k, weight, decay in ((coarse, 0.6, 2.0), (fine, 0.4, 1.4)))
    return kept * image + ice * ridges


def snow(key: jax.Array, image: jax.Array, mean, deviation, positions, least, radius, sigma, kept,
         room: int) -> jax.Array:
    """Flakes, which fall down in streaks of two directions, over an image that is whitened.

    Source: Hendrycks & Dietterich 2019, the published code.

    Args:
      key: a stream.
      image: (H,W,C).
      mean, deviation: of the normal draws that become flakes.
      positions: (rows (H,), columns (W,)) of `zoom_positions`: by how much flakes are enlarged.
      least: what is less is no flake.
      radius, sigma: of the streaks, in pixels.
      kept: share of the image that is not whitened.
      room: the largest radius.
    """
    drawn, direction = jax.random.split(key)
    height, width, channels = image.shape
    layer = mean + deviation * jax.random.normal(drawn, (height, width, 1))
    layer = blurs.interpolated(layer, *positions)
    layer = jnp.clip(jnp.where(layer < least, 0.0, layer), 0.0, 1.0)
    layer = blurs.motion(layer, radius, sigma, jax.random.uniform(direction, minval=-135.0, maxval=-45.0), room)
    grey = (image * jnp.asarray(LUMA)[None, None]).sum(-1, keepdims=True) if channels == 3 else image
    white = kept * image + (1 - kept) * jnp.maximum(image, 1.5 * grey + 0.5)
    return white + layer + layer[::-1, ::-1]

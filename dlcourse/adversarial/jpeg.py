"""What JPEG loses, as a function of arrays: colour resolution and the rounding of cosine coefficients.

The stages of a baseline codec (ITU T.81; JFIF 1.02) but its lossless coding, which changes nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

LUMINANCE = np.array([
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99], np.float32).reshape(8, 8)
CHROMINANCE = np.full((8, 8), 99, np.float32)
CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
"""Steps of quantisation at quality 50 (ITU T.81, tables K.1 and K.2)."""

COSINES = np.array([[np.sqrt((1 if u == 0 else 2) / 8) * np.cos((2 * x + 1) * u * np.pi / 16) for x in range(8)]
                    for u in range(8)], np.float32)
TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168735892, -0.331264108, 0.5], [0.5, -0.418687589, -0.081312411]],
                  np.float32)
OFFSET = np.array([[[0, 128, 128]]], np.float32)
FROM_YCC = np.array([[1, 0, 1.402], [1, -0.344136286, -0.714136286], [1, 1.772, 0]], np.float32)


def jpeg(image: jax.Array, quality) -> jax.Array:
    """(H,W,C) in [0,1] after coding at this quality and decoding, multiples of 1/255.

    Three channels are colours, their two colour differences halved in either direction (4:2:0) and interpolated
    back; any other number of channels are grey images.

    Args:
      image: (H,W,C).
      quality: from 1 to 100.
    """
    levels = jnp.round(image * 255)
    if image.shape[-1] == 3:
        ycc = jnp.round(_product(levels, TO_YCC) + OFFSET)
        height, width = image.shape[:2]
        grey = coded(ycc[..., :1], LUMINANCE, quality)
        colour = enlarged(coded(halved(ycc[..., 1:]), CHROMINANCE, quality)[:, : (width + 1) // 2])
        ycc = jnp.concatenate([grey, colour[:height, :width]], -1) - OFFSET
        levels = jnp.round(_product(ycc, FROM_YCC))
    else:
        levels = coded(levels, LUMINANCE, quality)
    return jnp.clip(levels, 0, 255) / 255


def _product(pixels, matrix):
    return jnp.einsum("hwc,dc->hwd", pixels, matrix, precision="highest")


def steps(table: np.ndarray, quality) -> jax.Array:
    """The table for a quality, as the Independent JPEG Group scales it: 5000 / q percent below 50, then 200 - 2 q."""
    percent = jnp.where(quality < 50, jnp.floor(5000 / quality), 200 - 2 * quality)
    return jnp.clip(jnp.floor((table * percent + 50) / 100), 1, 255)


def coded(levels: jax.Array, table: np.ndarray, quality) -> jax.Array:
    """Grey levels (H,W,C) after their 8 x 8 cosine coefficients were rounded to multiples of the steps.

    Blocks that the image does not fill repeat its edges.
    """
    height, width, channels = levels.shape
    fill = [(0, -side % 8) for side in (height, width)]
    padded = jnp.pad(levels, (*fill, (0, 0)), mode="edge") - 128
    blocks = padded.reshape(padded.shape[0] // 8, 8, padded.shape[1] // 8, 8, channels)
    found = jnp.einsum("ux,axbyc,vy->aubvc", COSINES, blocks, COSINES, precision="highest")
    step = steps(table, quality)[None, :, None, :, None]
    kept = jnp.sign(found) * jnp.floor(jnp.abs(found) / step + 0.5001) * step  # halves away from zero
    back = jnp.einsum("ux,aubvc,vy->axbyc", COSINES, kept, COSINES, precision="highest").reshape(padded.shape)
    return jnp.clip(jnp.round(back + 128), 0, 255)[:height, :width]


def halved(levels: jax.Array) -> jax.Array:
    """Means of 2 x 2 levels, rounded up and down in turn from one column to the next, as libjpeg does.

    To the right the edge is repeated until blocks are full; below, `coded` does.
    """
    height, width = levels.shape[:2]
    even = jnp.pad(levels, ((0, height % 2), (0, -width % 16), (0, 0)), mode="edge")
    sums = even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]
    bias = 1 + jnp.arange(sums.shape[1]) % 2
    return jnp.floor((sums + bias[None, :, None]) / 4)


def enlarged(levels: jax.Array) -> jax.Array:
    """Twice the size: 9/16, 3/16, 3/16 and 1/16 of the nearest four levels, rounded in turn, as libjpeg does."""
    def doubled(x, axis):
        x = jnp.moveaxis(x, axis, 0)
        padded = jnp.concatenate([x[:1], x, x[-1:]])
        pairs = jnp.stack([3 * x + padded[:-2], 3 * x + padded[2:]], 1)
        return jnp.moveaxis(pairs.reshape(-1, *x.shape[1:]), 0, axis)

    sums = doubled(doubled(levels, 0), 1)
    bias = jnp.where(jnp.arange(sums.shape[1]) % 2 == 0, 8, 7)
    return jnp.floor((sums + bias[None, :, None]) / 16)

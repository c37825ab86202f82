"""RandAugment (Cubuk et al. 2020): random operations, one magnitude for all.

For each image and layer one of `OPERATIONS` is drawn. These are the paper's but equalize, which needs a
histogram for each image. All geometric ones are a single affine warp whose matrix differs by image; the
photometric ones are computed for all images and selected from.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dlcourse import streams

OPERATIONS = ("identity", "rotate", "shear_x", "shear_y", "translate_x", "translate_y", "autocontrast", "brightness",
              "contrast", "saturation", "sharpness", "posterize", "solarize")
ROTATE, SHEAR, TRANSLATE, ENHANCE = jnp.pi / 6, 0.3, 0.3, 0.9
"""At full magnitude: 30 degrees, a shear of 0.3, 0.3 of the side, a factor of 1 ± 0.9."""


def randaugment(key: jax.Array, images: jax.Array, layers: int, strength: float) -> jax.Array:
    """Applies `layers` random operations in turn.

    Args:
      key: a typed key.
      images: (B,H,W,C) in [0,1].
      layers: N of the paper.
      strength: its M as a share of the full magnitude, in [0, 1].

    Returns:
      As images.
    """
    def one_layer(layer: jax.Array, images: jax.Array) -> jax.Array:
        now = streams.stream(key, "layer", layer)
        operation = jax.random.randint(streams.stream(now, "operation"), images.shape[:1], 0, len(OPERATIONS))
        signed = strength * jax.random.rademacher(streams.stream(now, "sign"), images.shape[:1], jnp.float32)
        return apply(images, operation, signed, strength)

    return jax.lax.fori_loop(0, layers, one_layer, images)


def apply(images: jax.Array, operation: jax.Array, signed: jax.Array, strength: float) -> jax.Array:
    """Applies to each image the operation (B,) numbered as in OPERATIONS.

    With m = `signed` (B,) in [-1, 1] and s = `strength` = |m|: rotate 30° m; shear 0.3 m; translate 0.3 m of the side;
    brightness, contrast, saturation and sharpness by 1 + 0.9 m; posterize to 8 - 4 s bits; solarize the 8-bit values
    from 256 (1 - s) on.
    """
    # The barriers keep XLA's CPU compiler from redoing the warp inside each of its readers: 49 -> 7 ms with the loop.
    warped = warp(*jax.lax.optimization_barrier((images, matrices(operation, signed, *images.shape[1:3]))))
    images = jax.lax.optimization_barrier(warped)
    factor = 1 + ENHANCE * signed
    levels = 2 ** (8 - round(4 * strength)) / 256
    results = {
        "autocontrast": autocontrast(images),
        "brightness": blend(jnp.zeros_like(images), images, factor),
        "contrast": blend(grey(images).mean((1, 2, 3), keepdims=True), images, factor),
        "saturation": blend(grey(images), images, factor) if images.shape[3] == 3 else images,
        "sharpness": blend(smooth(images), images, factor),
        "posterize": jnp.floor(jnp.round(images * 255) * levels) / (levels * 255),
        "solarize": jnp.where(images >= 256 / 255 * (1 - strength), 1 - images, images),
    }
    out = images
    for name, result in results.items():
        out = jnp.where((operation == OPERATIONS.index(name)).reshape(-1, 1, 1, 1), result.astype(images.dtype), out)
    return out


def blend(base: jax.Array, images: jax.Array, factor: jax.Array) -> jax.Array:
    """base + factor (images - base), clipped to [0,1]: factor (B,) 0 gives base, 1 the images, more exaggerates."""
    return jnp.clip(base + factor.reshape(-1, 1, 1, 1).astype(images.dtype) * (images - base), 0, 1)


def grey(images: jax.Array) -> jax.Array:
    """Luma (ITU-R BT.601) of RGB, else the mean over channels: (B,H,W,1)."""
    if images.shape[3] != 3:
        return images.mean(3, keepdims=True)
    return (images * jnp.array([0.299, 0.587, 0.114], images.dtype).reshape(1, 1, 1, 3)).sum(3, keepdims=True)


def autocontrast(images: jax.Array) -> jax.Array:
    """Stretches each channel of each image to [0, 1]; constant ones stay."""
    low, high = images.min((1, 2), keepdims=True), images.max((1, 2), keepdims=True)
    return jnp.where(high > low, (images - low) / jnp.where(high > low, high - low, 1), images)


def smooth(images: jax.Array) -> jax.Array:
    """The 3x3 mean in which the centre counts five times (13 in all), as Pillow's SMOOTH; edges repeated."""
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = sum(padded[:, i:i + height] for i in range(3))
    return (sum(rows[:, :, j:j + width] for j in range(3)) + 4 * images) / 13


def matrices(operation: jax.Array, signed: jax.Array, height: int, width: int) -> jax.Array:
    """For each image where a pixel comes from: (B,2,3), source (y, x) = matrix @ (y, x, 1), pixels from the centre."""
    def where(name: str, values: jax.Array, otherwise: float = 0.0) -> jax.Array:
        return jnp.where(operation == OPERATIONS.index(name), values, otherwise)

    angle = where("rotate", ROTATE * signed)
    yx = where("shear_y", SHEAR * signed) - jnp.sin(angle)
    xy = where("shear_x", SHEAR * signed) + jnp.sin(angle)
    rows = [jnp.stack([jnp.cos(angle), yx, where("translate_y", TRANSLATE * height * signed)], -1),
            jnp.stack([xy, jnp.cos(angle), where("translate_x", TRANSLATE * width * signed)], -1)]
    return jnp.stack(rows, 1)


def warp(images: jax.Array, matrix: jax.Array) -> jax.Array:
    """Bilinear resampling at matrix @ (y, x, 1), black outside: (B,H,W,C) and (B,2,3) -> (B,H,W,C)."""
    batch, height, width, channels = images.shape
    y, x = (jnp.arange(n) - (n - 1) / 2 for n in (height, width))
    y, x = jnp.broadcast_to(y.reshape(-1, 1), (height, width)), jnp.broadcast_to(x.reshape(1, -1), (height, width))
    grid = jnp.stack([y, x, jnp.ones_like(x)]).reshape(1, 3, height * width, 1)
    # Sums of products, not a matrix product: accelerators would round coordinates.
    source = (matrix.reshape(batch, 2, 3, 1) * grid.reshape(1, 1, 3, -1)).sum(2)
    source = source + jnp.array([(height - 1) / 2, (width - 1) / 2]).reshape(1, 2, 1)
    corner = jnp.floor(source)
    part = (source - corner).astype(images.dtype)[..., None]
    flat, total = images.reshape(batch, height * width, channels), 0
    for dy in (0, 1):
        for dx in (0, 1):
            at_y, at_x = corner[:, 0].astype(jnp.int32) + dy, corner[:, 1].astype(jnp.int32) + dx
            inside = (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
            index = jnp.where(inside, at_y * width + at_x, 0)[..., None]
            weight = (part[:, 0] if dy else 1 - part[:, 0]) * (part[:, 1] if dx else 1 - part[:, 1])
            total += jnp.where(inside[..., None], weight, 0) * jnp.take_along_axis(flat, index, axis=1)
    return jnp.clip(total, 0, 1).reshape(images.shape)

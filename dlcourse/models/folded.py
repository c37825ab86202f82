"""Filtering and normalising at once: forms that move less memory, for accelerators where memory is the limit.

Batch normalisation costs a TPU more than the filters do, because every map is written and read again and again. Two
facts about linear maps save much of that, and change nothing in what is computed:

  The moments of y = x W follow from those of x:  mean(y) = mean(x) W,  var(y)_o = sum_ij W_io cov(x)_ij W_jo.
  So a 1 x 1 filter can be normalised before it is applied: x (W a) + c, with y itself never written. The gradient
  needs no y either: it comes through cov(x), which is small (channels x channels).

  Rising maps commute with the maximum:  max(a y + c) = a max(y) + c for a >= 0.
  So the pool comes first, and what follows works on a quarter of the pixels.

The functions take the layers that would be called one after another, and use their parameters and statistics.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dlcourse.models.layers import BatchNorm, Conv, convolve, moments, over_batch


def normalised_sum(*parts: tuple[Conv, BatchNorm, jax.Array]) -> jax.Array:
    """sum of norm(conv(x)) over the parts, all of 1 x 1 filters without bias, as one product.

    Args:
      *parts: (conv, norm, x (B, H, W, C)); all results of one shape.

    Returns:
      (B, H, W, features), of the filters' dtype.
    """
    inputs, kernels, shifts = zip(*(_folded(*part) for part in parts), strict=True)
    x, kernel = jnp.concatenate(inputs, -1), jnp.concatenate(kernels, 0)
    return convolve(x, kernel[None, None]) + sum(shifts).astype(x.dtype)[None, None, None]


def normalised_then_pooled(conv: Conv, norm: BatchNorm, x: jax.Array,
                           pool: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
    """y = relu(norm(conv(x))), which costs nothing unless it is used, and pool(y), computed as relu(pool(...) a + c).

    Where a scale is negative, the filter's sign is turned, so that the maximum of what it makes is the one wanted.
    At a scale of exactly 0 the maximum has a kink: the scale's gradient there is the one from above.

    Args:
      conv: without bias.
      norm: of what it makes.
      x: (B, H, W, C).
      pool: takes maxima over windows.
    """
    known = norm.variables.get("params", {})  # none yet while they are being made, when all scales are positive
    sign = jnp.where(known["scale"] < 0, -1.0, 1.0) if "scale" in known else jnp.ones(conv.features)
    kernel, _ = conv.weights(x.shape[-1])
    y = convolve(x.astype(conv.dtype), (kernel * sign[None, None, None]).astype(conv.dtype), conv.stride, conv.padding)

    def turned_back():
        mean, var = moments(y)
        return mean * sign, var

    factor, shift = norm.fold(conv.features, turned_back)

    def normalised(y):
        return nn.relu((y * (factor * sign)[None, None, None] + shift[None, None, None]).astype(norm.dtype))

    return normalised(y), normalised(pool(y))


def product_moments(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of each channel of x @ kernel over the batch, from those of x.

    Args:
      x: (B, H, W, C).
      kernel: (C, features), as it is multiplied with x.
    """
    square = gram(x)
    count, axes = x.size // x.shape[-1], tuple(range(x.ndim - 1))
    mean, square = over_batch(x.astype(square.dtype).mean(axes), square / count)
    covariance = square - mean[:, None] * mean[None, :]
    kernel = kernel.astype(mean.dtype)
    spread = jnp.matmul(covariance, kernel, precision=lax.Precision.HIGHEST)
    return jnp.matmul(mean, kernel, precision=lax.Precision.HIGHEST), jnp.maximum((kernel * spread).sum(0), 0.0)


@jax.custom_jvp
def gram(x: jax.Array) -> jax.Array:
    """x^T x over all pixels, (..., C) -> (C, C), float32 at least."""
    return _inner(x, x)


@gram.defjvp
def _gram_jvp(primals, tangents):
    # One product and its transpose, where the product rule would spend two; so does the gradient then.
    half = _inner(tangents[0], primals[0])
    return gram(primals[0]), half + half.T


def _inner(x, y):
    axes = tuple(range(x.ndim - 1))
    accumulated = jnp.promote_types(x.dtype, jnp.float32)
    return lax.dot_general(x, y, ((axes, axes), ((), ())), preferred_element_type=accumulated)


def _folded(conv, norm, x):
    """x as the filter sees it, and (W a, c) such that norm(conv(x)) = x (W a) + c."""
    x = x[:, :: conv.stride, :: conv.stride].astype(conv.dtype)
    kernel = conv.weights(x.shape[-1])[0][0, 0]
    factor, shift = norm.fold(conv.features, lambda: product_moments(x, kernel.astype(conv.dtype)))
    return x, (kernel * factor[None]).astype(conv.dtype), shift

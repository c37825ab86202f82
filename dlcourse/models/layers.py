"""Filter, normalise, pool: the layers that networks here share, quick on a CPU and plain on accelerators.

Images are (B, H, W, C). Every function keeps derivatives of any order and either mode (`grad`,
`jvp`, `vmap`), whatever form its gradient is computed in.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.custom_derivatives import SymbolicZero

_LAYOUT = ("NHWC", "HWIO", "NHWC")

BATCH = "batch"
"""Name of a mapped axis (`vmap`, `pmap`, `shard_map`) that divides a batch: statistics are then over all its parts."""


_COMPILED_FOR: contextvars.ContextVar[str] = contextvars.ContextVar("_COMPILED_FOR", default="")


def platform() -> str:
    """What the layers are written for: "cpu", "gpu" or "tpu"; every form computes the same."""
    return _COMPILED_FOR.get() or jax.default_backend()


@contextlib.contextmanager
def compiled_for(name: str):
    """What is traced inside takes the forms of this platform, such as a program compiled for a TPU that is not here.

    A function that was traced before under `jit` keeps its form: trace a fresh one.
    """
    token = _COMPILED_FOR.set(name)
    try:
        yield
    finally:
        _COMPILED_FOR.reset(token)


@functools.cache
def _cpu_lacks_avx512() -> bool:
    """Whether weight gradients are quicker as shifted matrix products on this machine's CPU.

    XLA's CPU convolution transposed onto the kernel is 2.6-4 times slower than k*k matrix products
    where the CPU has AVX2 but not AVX-512; with AVX-512 it is quicker.
    """
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    features = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx2" in features and "avx512f" not in features


def _convolve(images, kernel, stride, padding, layout=_LAYOUT):
    return lax.conv_general_dilated(
        images, kernel, (stride, stride), ((padding, padding),) * 2, dimension_numbers=layout
    )


def _shifted_products(images, kernel, padding):
    """The same stride-1 convolution as a sum over kernel offsets of shift(images) @ kernel[i, j]."""
    k = kernel.shape[0]
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = (size + 2 * padding - k + 1 for size in images.shape[1:3])
    return sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(k) for j in range(k))


def _patch_products(images, kernel, stride, padding):
    """The same, k = q stride, as one product of patches: q rows of blocks high for one channel, else one row.

    Each row of blocks is then multiplied by all q parts of the kernel, and what belongs together is added up: on a CPU
    that costs less than copying the row q times into patches.
    """
    k, _, channels, features = kernel.shape
    q = k // stride
    tall = q if channels == 1 else 1
    height, width = ((size + 2 * padding - k) // stride + 1 for size in images.shape[1:3])
    rows, columns, tops = height + q - 1, width + q - 1, height + q - tall
    ends = [(padding, needed * stride - size - padding, 0)
            for needed, size in zip((rows, columns), images.shape[1:3], strict=True)]
    blocks = lax.pad(images, jnp.zeros((), images.dtype), ((0, 0, 0), *ends, (0, 0, 0)))
    blocks = blocks.reshape(len(images), rows, stride, columns, stride * channels)
    patches = jnp.concatenate([blocks[:, i : i + tops, row, j : j + width]
                               for i in range(tall) for row in range(stride) for j in range(q)], -1)
    parts = kernel.reshape(q // tall, patches.shape[-1], features)
    products = patches @ parts.swapaxes(0, 1).reshape(patches.shape[-1], -1)
    products = products.reshape(*products.shape[:3], q // tall, features)
    return sum(products[:, i : i + height, :, i] for i in range(q // tall))


def _in_blocks(kernel, stride):
    return 1 < stride < kernel.shape[0] and kernel.shape[0] % stride == 0


def _turned(images, kernel, stride, padding):
    """The same, with the kernel's channels and features exchanged in memory, so that its transpose is `_convolve`'s."""
    return _convolve(images, jnp.swapaxes(kernel, 2, 3), stride, padding, ("NHWC", "HWOI", "NHWC"))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _convolve_on_cpu(images, kernel, stride, padding, shifted):
    """The convolution, with gradients in forms that a CPU computes quickly.

    XLA brings convolutions into the layout that its quick kernels need, but not those within loops, where they run
    20 times slower. A gradient by the images that is in this layout from the start is as quick within loops as outside.
    Where strides divide the kernel into blocks, products of patches are quicker still, both ways.

    Args:
      images, kernel, stride, padding: of `convolve`.
      shifted: whether the weight gradient is a sum of matrix products (stride 1).
    """
    form = _patch_products if _in_blocks(kernel, stride) else _convolve
    return form(images, kernel, stride, padding)


def _convolve_on_cpu_jvp(stride, padding, shifted, primals, tangents):
    # In reverse mode these terms are not computed, but transposed. Transposing the shifted products onto the kernel
    # gives shift(images)^T @ cotangent, one product an offset: the quick weight gradient, with no rule of its own.
    (images, kernel), (d_images, d_kernel) = primals, tangents
    terms = []
    if not isinstance(d_images, SymbolicZero):
        form = _patch_products if _in_blocks(kernel, stride) else _turned
        terms.append(form(d_images, kernel, stride, padding))
    if not isinstance(d_kernel, SymbolicZero):
        terms.append(
            _shifted_products(images, d_kernel, padding) if shifted else _convolve(images, d_kernel, stride, padding)
        )
    return _convolve_on_cpu(images, kernel, stride, padding, shifted), sum(terms)


_convolve_on_cpu.defjvp(_convolve_on_cpu_jvp, symbolic_zeros=True)


def convolve(images: jax.Array, kernel: jax.Array, stride: int = 1, padding: int | None = None) -> jax.Array:
    """Cross-correlation out[b,y,x,o] = sum_ijc images[b, sy+i-p, sx+j-p, c] kernel[i,j,c,o].

    Args:
      images: (B, H, W, C).
      kernel: (k, k, C, features).
      stride: s, in pixels.
      padding: p zeros on every side; default k // 2, which keeps the size at stride 1 and odd k.

    Returns:
      (B, (H + 2p - k) // s + 1, (W + 2p - k) // s + 1, features).
    """
    padding = kernel.shape[0] // 2 if padding is None else padding
    if platform() != "cpu":
        return _convolve(images, kernel, stride, padding)
    return _convolve_on_cpu(
        images, kernel, stride, padding, stride == 1 and kernel.shape[0] > 1 and _cpu_lacks_avx512()
    )


def max_pool(images: jax.Array, window: int = 2, stride: int | None = None, padding: int = 0) -> jax.Array:
    """Maximum over window x window pixels, as the maximum of strided slices; on a TPU, as reduce_window.

    The backward pass of reduce_window (select-and-scatter) is some 15 times slower on a CPU, that of
    the slices slower on a TPU. Equal maxima share the gradient of slices; reduce_window gives it to the first.

    Args:
      images: (B, H, W, C).
      window: side of the window, in pixels.
      stride: default `window`; smaller strides overlap.
      padding: pixels of minus infinity on every side.

    Returns:
      (B, (H + 2 padding - window) // stride + 1, …, C): what does not fill a window is left out.
    """
    stride = stride or window
    if platform() == "tpu":
        return nn.max_pool(images, (window, window), (stride, stride), ((padding, padding),) * 2)
    if padding:
        images = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=-jnp.inf)
    height, width = ((size - window) // stride + 1 for size in images.shape[1:3])

    def rows(i):
        return images[:, i : i + (height - 1) * stride + 1 : stride]

    def columns(x, j):
        return x[:, :, j : j + (width - 1) * stride + 1 : stride]

    tallest = functools.reduce(jnp.maximum, (rows(i) for i in range(window)))
    return functools.reduce(jnp.maximum, (columns(tallest, j) for j in range(window)))


def at_least_float32(x: jax.Array) -> jax.Array:
    """x as float32, or as it is where its type is more exact."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), Phi the normal distribution function (Hendrycks & Gimpel 2016, section 2); any shape.

    For bfloat16 on a TPU, where the error function costs as much as the products around it, Phi(x) is
    1 / (1 + exp(-x p(x^2))) with p fitted so that x Phi(x) is off by less than 6e-5 anywhere (with tanh, as often
    written, 5e-4): below bfloat16's own rounding of all values beyond 0.03.
    """
    if platform() != "tpu" or x.dtype != jnp.bfloat16:
        return nn.gelu(x, approximate=False)
    u = x.astype(jnp.float32)
    square = jnp.minimum(jnp.square(u), 25.0)  # beyond, p would fall, and Phi is 0 or 1
    return (u * jax.nn.sigmoid(u * (1.594412 + square * (0.0744682 - 0.00076798 * square)))).astype(x.dtype)


class Conv(nn.Module):
    """Filtering: `convolve` with a kernel drawn, by default, as He et al. 2015 (fan out, truncated normal).

    Attributes:
      features: filters, the channels of the output.
      kernel: side of the filters, in pixels.
      stride: in pixels.
      padding: zeros on every side; default kernel // 2.
      use_bias: no by default, since a normalisation follows.
      kernel_init: draws the kernel.
      dtype: of the computation; the parameters are float32.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    padding: int | None = None
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")
    dtype: jnp.dtype = jnp.float32

    def __call__(self, x):
        kernel, bias = self.weights(x.shape[-1])
        y = convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.padding)
        return y if bias is None else y + bias.astype(self.dtype)[None, None, None]

    @nn.compact
    def weights(self, channels: int) -> tuple[jax.Array, jax.Array | None]:
        """The kernel (k, k, channels, features) and the bias (features,), if any, for a caller that folds them."""
        shape = (self.kernel, self.kernel, channels, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None


class BatchNorm(nn.Module):
    """scale (x - mean) / sqrt(var + 1e-5) + bias, each channel by itself (Ioffe & Szegedy 2015).

    Statistics are float32, over the batch and all pixels, the variance as E[x^2] - E[x]^2 so that one
    pass reads x; scale and shift are folded into x a + c. Running averages have momentum 0.9. Where an axis
    named BATCH is mapped, "the batch" is all of it, as in synchronised batch normalisation.

    Attributes:
      train: normalise by the batch (and update `batch_stats`), or by the running averages.
      scale_init: initial scale; zeros for the last one of a residual block (Goyal et al. 2017, 5.1).
      dtype: of the result.
    """

    train: bool
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    dtype: jnp.dtype = jnp.float32

    def __call__(self, x):
        factor, shift = self.fold(x.shape[-1], lambda: moments(x))
        axes = tuple(range(x.ndim - 1))
        return (x * jnp.expand_dims(factor, axes) + jnp.expand_dims(shift, axes)).astype(self.dtype)

    @nn.compact
    def fold(self, channels: int, moments: Callable[[], tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
        """(a, c), each (channels,) float32, so that x a + c is x normalised.

        Args:
          channels: of x.
          moments: the mean and the variance of each channel of x in this batch; asked while training alone.
        """
        shape = (channels,)
        scale, bias = self.param("scale", self.scale_init, shape), self.param("bias", nn.initializers.zeros, shape)
        running = [
            self.variable("batch_stats", name, init, shape, jnp.float32)
            for name, init in (("mean", jnp.zeros), ("var", jnp.ones))
        ]
        mean, var = (average.value for average in running)
        if self.train:
            mean, var = moments()
            if not self.is_initializing():
                for average, value in zip(running, (mean, var), strict=True):
                    average.value = 0.9 * average.value + 0.1 * value
        factor = scale * lax.rsqrt(var + 1e-5)
        return factor, bias - mean * factor


def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of each channel over the batch, float32."""
    x, axes = at_least_float32(x), tuple(range(x.ndim - 1))
    mean, square = over_batch(x.mean(axes), jnp.square(x).mean(axes))
    return mean, jnp.maximum(square - jnp.square(mean), 0.0)


def over_batch(*means: jax.Array) -> tuple[jax.Array, ...]:
    """Means over this part of a batch, made means over all of it where an axis BATCH is mapped."""
    try:
        return lax.pmean(means, BATCH)
    except NameError:  # no such axis is mapped: this is the whole batch
        return means

"""Vision transformers (Dosovitskiy et al. 2021): patches are words, and every patch looks at all others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from dlcourse.contracts import InputError
from dlcourse.models.layers import Conv, at_least_float32, gelu, platform
from dlcourse.models.taps import Edit, Taps


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(D / heads)) V for every head (Vaswani et al. 2017, eq. 1), then a linear layer.

    Attributes:
      heads: which split the D features evenly.
      dtype: of the computation; the softmax is in float32 at least.
    """

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        if platform() == "tpu":
            return self.by_heads(x)
        batch, tokens, width = x.shape
        # One product for the three of them; Glorot's limit for a D x D kernel is LeCun's for this one.
        projection = nn.Dense(3 * width, dtype=self.dtype, kernel_init=nn.initializers.lecun_uniform(), name="qkv")(x)
        query, key, value = jnp.moveaxis(projection.reshape(batch, tokens, 3, self.heads, width // self.heads), 2, 0)
        exact = jnp.promote_types(self.dtype, jnp.float32)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=exact)
        weights = jax.nn.softmax(scores * (width // self.heads) ** -0.5, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, tokens, width)
        return nn.Dense(width, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name="out")(mixed)

    def by_heads(self, x):
        """The same with the same parameters, laid out for a TPU: every map is made head by head as it is needed.

        Scores have the keys before the queries, so that the softmax adds over rows; they are divided by their sum
        only after the product with V, where there are 64 numbers a query instead of one a key. The gradient then
        needs no sum over the scores either: that of the sum comes through the mixed values.
        """
        width = x.shape[-1]
        size = width // self.heads
        kernel, bias = Weights(3 * width, nn.initializers.lecun_uniform(), name="qkv")(width)
        kernel = kernel.astype(self.dtype).reshape(width, 3, self.heads, size)
        bias = bias.astype(self.dtype).reshape(3, 1, self.heads, 1, size)
        x = x.astype(self.dtype)
        query, key, value = (jnp.einsum("btd,dhe->bhte", x, kernel[:, i]) + bias[i] for i in range(3))
        query = query * jnp.asarray(size**-0.5, self.dtype)
        scores = at_least_float32(jnp.einsum("bhqd,bhkd->bhkq", query, key))
        # The largest score cancels out: it keeps exp within its range and has no part in the gradient.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(2, keepdims=True)))
        mixed = jnp.einsum("bhkq,bhkd->bhqd", weights.astype(self.dtype), value)
        mixed = (mixed / weights.sum(2)[..., None]).astype(self.dtype)
        kernel, bias = Weights(width, nn.initializers.xavier_uniform(), name="out")(width)
        kernel = kernel.astype(self.dtype).reshape(self.heads, size, width)
        return jnp.einsum("bhqd,hdo->bqo", mixed, kernel) + bias.astype(self.dtype)[None, None]


class Weights(nn.Module):
    """The parameters of `nn.Dense(features)`, for a product that is written in another way.

    Attributes:
      features: of the output.
      kernel_init: of the kernel; the bias starts at zero.
    """

    features: int
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, width: int):
        kernel = self.param("kernel", self.kernel_init, (width, self.features))
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)) with four times the features inside (pre-norm).

    Attributes:
      heads: of the attention.
      dtype: of the computation; normalisation statistics are float32.
    """

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        def norm(name):
            return nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=name)

        def dense(features, name):
            small = nn.initializers.normal(1e-6)
            glorot = nn.initializers.xavier_uniform()
            return nn.Dense(features, dtype=self.dtype, kernel_init=glorot, bias_init=small, name=name)

        x = x + Attention(self.heads, self.dtype, name="attention")(norm("norm1")(x))
        width = x.shape[-1]
        hidden = gelu(dense(4 * width, "mlp1")(norm("norm2")(x)))
        return x + dense(width, "mlp2")(hidden)


class ViT(nn.Module):
    """Patches, a class token, learned positions, `depth` blocks; the class token's features are classified.

    As published, but for the classifier, which starts small instead of zero: an untrained network
    is the control of many experiments here, and one without gradients could not be.

    Attributes:
      num_classes: K.
      width: D features a token.
      depth: blocks.
      heads: a block.
      patch: side of a patch, in pixels; both sides of the image are multiples of it.
      dtype: of the computation; parameters, normalisation statistics, softmax and logits are float32.
    """

    num_classes: int
    width: int
    depth: int
    heads: int
    patch: int = 16
    dtype: jnp.dtype = jnp.float32

    @staticmethod
    def defaults(image_shape):
        side = min(image_shape[:2])
        return {"patch": 16 if side > 64 else 4 if side > 16 else 2}

    def check(self, image_shape):
        height, width, _ = image_shape
        if height % self.patch or width % self.patch:
            raise InputError(f"model vit: patch={self.patch} does not divide images of {height}x{width} pixels: "
                             "choose another patch, or resize with --image_size")

    @nn.compact
    def __call__(self, images, train: bool = False, edit: Edit | None = None):
        tap = Taps(edit)
        x = (images.astype(self.dtype) - 0.5) / 0.25
        stem = Conv(self.width, self.patch, self.patch, padding=0, use_bias=True, dtype=self.dtype, name="stem")
        x = tap("stem", stem(x))
        x = tap("tokens", self.tokens(x))
        for layer in range(1, self.depth + 1):
            x = tap(f"block{layer}", Block(self.heads, self.dtype, name=f"block{layer}")(x))
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        x = tap("features", at_least_float32(x[:, 0]))
        logits = tap("logits", nn.Dense(self.num_classes, name="classifier")(x))
        return logits, tap.finish()

    def tokens(self, patches):
        """(B, H/p, W/p, D) -> (B, 1 + HW/p^2, D): the class token first, positions added to all."""
        patches = patches.reshape(len(patches), -1, self.width)
        first = self.param("class_token", nn.initializers.zeros, (1, 1, self.width)).astype(self.dtype)
        first = jnp.broadcast_to(first, (len(patches), 1, self.width))
        x = jnp.concatenate([first, patches], axis=1)
        positions = self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        return x + positions.astype(self.dtype)

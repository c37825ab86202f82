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
    def __call__(self, x, apart: bool = False):
        if platform() == "tpu":
            return self.by_heads(x, apart)
        assert not apart
        batch, tokens, width = x.shape
        # One product for the three of them; Glorot's limit for a D x D kernel is LeCun's for this one.
        projection = nn.Dense(3 * width, dtype=self.dtype, kernel_init=nn.initializers.lecun_uniform(), name="qkv")(x)
        query, key, value = jnp.moveaxis(projection.reshape(batch, tokens, 3, self.heads, width // self.heads), 2, 0)
        exact = jnp.promote_types(self.dtype, jnp.float32)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=exact)
        weights = jax.nn.softmax(scores * (width // self.heads) ** -0.5, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, tokens, width)
        return nn.Dense(width, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name="out")(mixed)

    def by_heads(self, x, apart: bool = False):
        """The same with the same parameters, laid out for a TPU: every map is made head by head as it is needed.

        Scores have the keys before the queries, so that the softmax adds over rows; they are divided by their sum
        only after the product with V, where there are 64 numbers a query instead of one a key. The gradient then
        needs no sum over the scores either: that of the sum comes through the mixed values.

        Args:
          x: (B, T, D).
          apart: give the results of the first token, (B, 1, D), and of the others, (B, T - 1, D), one not needing
            the other.
        """
        width = x.shape[-1]
        size = width // self.heads
        kernel, bias = Weights(3 * width, nn.initializers.lecun_uniform(), name="qkv")(width)
        kernel = kernel.astype(self.dtype).reshape(width, 3, self.heads, size)
        bias = bias.astype(self.dtype).reshape(3, 1, self.heads, 1, size)
        out, out_bias = Weights(width, nn.initializers.xavier_uniform(), name="out")(width)
        out = out.astype(self.dtype).reshape(self.heads, size, width)
        x = x.astype(self.dtype)

        def project(i, x):
            return jnp.einsum("btd,dhe->bhte", x, kernel[:, i]) + bias[i]

        def queries(x):
            return project(0, x) * jnp.asarray(size**-0.5, self.dtype)

        def joined(mixed):
            return jnp.einsum("bhqe,heo->bqo", mixed, out) + out_bias.astype(self.dtype)[None, None]

        def seen_by(some):
            query, key, value = queries(some), project(1, x), project(2, x)
            scores = at_least_float32(jnp.einsum("bhqe,bhke->bhkq", query, key))
            # The largest score cancels out: it keeps exp within its range and has no part in the gradient.
            weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(2, keepdims=True)))
            mixed = jnp.einsum("bhkq,bhke->bhqe", weights.astype(self.dtype), value)
            return joined((mixed / weights.sum(2)[..., None]).astype(self.dtype))

        def seen_by_one(one):
            # q (x W_k + b_k)^T = (q W_k^T) x^T + a constant, which the softmax forgets, and p (x W_v + b_v) =
            # (p x) W_v + b_v: for one query that is less work than keys and values of all tokens.
            wanted = jnp.einsum("bhqe,dhe->bhqd", queries(one), kernel[:, 1])
            scores = at_least_float32(jnp.einsum("bhqd,bkd->bhqk", wanted, x))
            weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
            mixed = jnp.einsum("bhqk,bkd->bhqd", weights, x)
            return joined(jnp.einsum("bhqd,dhe->bhqe", mixed, kernel[:, 2]) + bias[2])

        return (seen_by_one(x[:, :1]), seen_by(x[:, 1:])) if apart else seen_by(x)


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

    Called with `apart`, on a TPU alone, it gives the first token and the others as two arrays, of which one needs no
    part of the other's computation.

    Attributes:
      heads: of the attention.
      dtype: of the computation; normalisation statistics are float32.
    """

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, apart: bool = False):
        def norm(name):
            return nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=name)

        def dense(features, name):
            small = nn.initializers.normal(1e-6)
            glorot = nn.initializers.xavier_uniform()
            return nn.Dense(features, dtype=self.dtype, kernel_init=glorot, bias_init=small, name=name)

        width = x.shape[-1]
        attention, normed = Attention(self.heads, self.dtype, name="attention"), norm("norm1")(x)
        norm2, mlp1, mlp2 = norm("norm2"), dense(4 * width, "mlp1"), dense(width, "mlp2")

        def mlp(x):
            return x + mlp2(gelu(mlp1(norm2(x))))

        if not apart:
            return mlp(x + attention(normed))
        first, others = attention(normed, apart=True)
        return mlp(x[:, :1] + first), mlp(x[:, 1:] + others)


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
        for layer in range(1, self.depth):
            x = tap(f"block{layer}", Block(self.heads, self.dtype, name=f"block{layer}")(x))
        x = self.last_block(x, tap)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        x = tap("features", at_least_float32(x[:, 0]))
        logits = tap("logits", nn.Dense(self.num_classes, name="classifier")(x))
        return logits, tap.finish()

    def last_block(self, x, tap):
        """The last block; on a TPU, without the tokens that are not classified, unless an edit may move them.

        What nobody reads is not computed: the others go to the tap alone.
        """
        name = f"block{self.depth}"
        block = Block(self.heads, self.dtype, name=name)
        if platform() != "tpu":
            return tap(name, block(x))
        first, others = block(x, apart=True)
        x = tap(name, jnp.concatenate([first, others], axis=1))
        return x if name in tap.edit else first

    def tokens(self, patches):
        """(B, H/p, W/p, D) -> (B, 1 + HW/p^2, D): the class token first, positions added to all."""
        patches = patches.reshape(len(patches), -1, self.width)
        first = self.param("class_token", nn.initializers.zeros, (1, 1, self.width)).astype(self.dtype)
        first = jnp.broadcast_to(first, (len(patches), 1, self.width))
        x = jnp.concatenate([first, patches], axis=1)
        positions = self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        return x + positions.astype(self.dtype)

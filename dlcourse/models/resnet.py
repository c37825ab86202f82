"""Residual networks (He et al. 2016), the v1.5 whose stride sits in the 3 x 3 filter (Goyal et al. 2017, 5.1)."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn

from dlcourse.models.folded import normalised_sum, normalised_then_pooled
from dlcourse.models.layers import BatchNorm, Conv, at_least_float32, max_pool, platform
from dlcourse.models.taps import Edit, Taps


class Block(nn.Module):
    """x + F(x), with F two 3 x 3 filters, or 1 x 1, 3 x 3, 1 x 1 around a bottleneck of a quarter of the channels.

    F ends in a normalisation whose scale starts at zero, so that at first every block passes its
    input through and the network is as shallow as its stem.

    Attributes:
      features: channels of the output.
      stride: in pixels.
      bottleneck: which F.
      dtype: of the computation.
    """

    features: int
    stride: int
    bottleneck: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, train: bool):
        conv = partial(Conv, dtype=self.dtype)
        norm = partial(BatchNorm, train, dtype=self.dtype)
        width = self.features // 4 if self.bottleneck else self.features
        filters = [(width, 1, 1), (width, 3, self.stride), (self.features, 1, 1)]
        if not self.bottleneck:
            filters = [(width, 3, self.stride), (width, 3, 1)]

        y = x
        for i, (features, kernel, stride) in enumerate(filters, start=1):
            last = i == len(filters)
            filtered = conv(features, kernel, stride, name=f"conv{i}")
            normal = norm(scale_init=nn.initializers.zeros if last else nn.initializers.ones, name=f"norm{i}")
            y = y if last else nn.relu(normal(filtered(y)))
        parts = [(filtered, normal, y)]
        if x.shape[-1] != self.features or self.stride > 1:
            shortcut = conv(self.features, 1, self.stride, name="shortcut")
            parts.append((shortcut, norm(name="shortcut_norm"), x))
        if self.bottleneck and platform() == "tpu":
            y = normalised_sum(*parts)
            return nn.relu(y if len(parts) == 2 else x + y)
        y, x = ([normal(filtered(y)) for filtered, normal, y in parts] + [x])[:2]
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A stem, four stages of residual blocks, the average over all pixels, a linear classifier.

    Attributes:
      num_classes: K.
      blocks: blocks a stage; each stage but the first halves the map and doubles the channels.
      bottleneck: whether blocks are bottlenecks (ResNet-50 and deeper).
      stem: "imagenet" is a 7 x 7 filter and a pool, each of stride 2; "small" one 3 x 3 filter, for
        images of up to 64 pixels a side, which have nothing to give away.
      dtype: of the computation; parameters, normalisation statistics and logits are float32.
    """

    num_classes: int
    blocks: tuple[int, ...]
    bottleneck: bool
    stem: Literal["small", "imagenet"] = "imagenet"
    dtype: jnp.dtype = jnp.float32

    @staticmethod
    def defaults(image_shape):
        return {"stem": "imagenet" if min(image_shape[:2]) > 64 else "small"}

    @nn.compact
    def __call__(self, images, train: bool = False, edit: Edit | None = None):
        tap = Taps(edit)
        x = (images.astype(self.dtype) - 0.5) / 0.25
        kernel, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        conv = Conv(64, kernel, stride, dtype=self.dtype, name="stem")
        norm = BatchNorm(train, dtype=self.dtype, name="stem_norm")
        pool = partial(max_pool, window=3, stride=2, padding=1)
        if self.stem == "imagenet" and platform() == "tpu" and "stem" not in tap.edit:
            x, pooled = normalised_then_pooled(conv, norm, x, pool)
            tap("stem", x)
            x = tap("pool", pooled)
        else:
            x = tap("stem", nn.relu(norm(conv(x))))
            x = tap("pool", pool(x)) if self.stem == "imagenet" else x
        for stage, count in enumerate(self.blocks, start=1):
            features = 64 * 2 ** (stage - 1) * (4 if self.bottleneck else 1)
            for i in range(1, count + 1):
                name = f"stage{stage}_block{i}"
                stride = 2 if stage > 1 and i == 1 else 1
                x = tap(name, Block(features, stride, self.bottleneck, self.dtype, name=name)(x, train))
        x = tap("features", at_least_float32(x).mean((1, 2)))
        logits = tap("logits", nn.Dense(self.num_classes, name="classifier")(x))
        return logits, tap.finish()

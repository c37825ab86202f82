"""Wide residual networks (Zagoruyko & Komodakis 2016): fewer, wider blocks that normalise before they filter."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from dlcourse.contracts import InputError
from dlcourse.models.layers import BatchNorm, Conv, at_least_float32
from dlcourse.models.taps import Edit, Taps


class Block(nn.Module):
    """x + F(x), F = normalise, threshold, filter, twice (the pre-activation of He et al. 2016b).

    Where the channels change, the shortcut is a 1 x 1 filter of the already activated input.

    Attributes:
      features: channels of the output.
      stride: in pixels.
      dropout: share of the features dropped between the two filters while training.
      dtype: of the computation.
    """

    features: int
    stride: int
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, train: bool):
        y = nn.relu(BatchNorm(train, dtype=self.dtype, name="norm1")(x))
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, self.stride, dtype=self.dtype, name="shortcut")(y)
        y = Conv(self.features, 3, self.stride, dtype=self.dtype, name="conv1")(y)
        y = nn.relu(BatchNorm(train, dtype=self.dtype, name="norm2")(y))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return x + Conv(self.features, 3, dtype=self.dtype, name="conv2")(y)


class WideResNet(nn.Module):
    """WRN-depth-widen: a 3 x 3 filter, three stages of (depth - 4) / 6 blocks of 16, 32, 64 times `widen` channels.

    Attributes:
      num_classes: K.
      depth: 6n + 4 for n blocks a stage.
      widen: how much wider than He et al. 2016.
      dropout: share of the features dropped inside a block while training.
      dtype: of the computation; parameters, normalisation statistics and logits are float32.
    """

    num_classes: int
    depth: int = 16
    widen: int = 4
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    def check(self, image_shape):
        if self.depth < 10 or self.depth % 6 != 4:
            raise InputError(f"model wide_resnet: depth={self.depth} must be 6n + 4, such as 10, 16, 22, 28 or 40")

    @nn.compact
    def __call__(self, images, train: bool = False, edit: Edit | None = None):
        tap = Taps(edit)
        x = (images.astype(self.dtype) - 0.5) / 0.25
        x = tap("stem", Conv(16, dtype=self.dtype, name="stem")(x))
        for stage in (1, 2, 3):
            for i in range(1, (self.depth - 4) // 6 + 1):
                name = f"stage{stage}_block{i}"
                stride = 2 if stage > 1 and i == 1 else 1
                features = 16 * 2 ** (stage - 1) * self.widen
                x = tap(name, Block(features, stride, self.dropout, self.dtype, name=name)(x, train))
        x = tap("relu", nn.relu(BatchNorm(train, dtype=self.dtype, name="norm")(x)))
        x = tap("features", at_least_float32(x).mean((1, 2)))
        logits = tap("logits", nn.Dense(self.num_classes, name="classifier")(x))
        return logits, tap.finish()

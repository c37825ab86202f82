"""The lecture's cascade: each layer filters, normalises, thresholds, and some pool."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from flax import linen as nn

from dlcourse.contracts import InputError
from dlcourse.models.layers import BatchNorm, Conv, at_least_float32, max_pool
from dlcourse.models.taps import Edit, Taps


class ConvNet(nn.Module):
    """Stages of linear-nonlinear layers; between stages the map is halved and the filters doubled.

    Attributes:
      num_classes: K.
      width: filters of the first stage; stage i has width * 2^i.
      stages: how many.
      depth: layers a stage.
      first_kernel: side of the first layer's filters, in pixels; 11 shows oriented filters, which
        on 3 x 3 pixels cannot be told from chance.
      halve: between stages by a "pool", or by the "stride" of the next layer, whose bounds are tighter and cheaper
        (`adversarial.bounds`).
      hidden: units of a layer that sees the whole last map; 0 has the map's mean in its place.
      dropout: share of the pooled features dropped while training.
      dtype: of the computation; parameters, normalisation statistics and logits are float32.
    """

    num_classes: int
    width: int = 32
    stages: int = 3
    depth: int = 2
    first_kernel: int = 3
    halve: Literal["pool", "stride"] = "pool"
    hidden: int = 0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train: bool = False, edit: Edit | None = None):
        tap = Taps(edit)
        x = (images.astype(self.dtype) - 0.5) / 0.25
        for layer, (stage, first) in enumerate(self.plan(), start=1):
            kernel, stride = self.first_kernel if layer == 1 else 3, 1
            if first and stage and self.halve == "pool":
                x = tap(f"pool{stage}", max_pool(x))
            elif first and stage:
                stride = 2
            features = self.width * 2**stage
            x = tap(f"conv{layer}", Conv(features, kernel, stride, dtype=self.dtype, name=f"conv{layer}")(x))
            x = BatchNorm(train, dtype=self.dtype, name=f"norm{layer}")(x)
            x = tap(f"relu{layer}", nn.relu(x))
        if self.hidden:
            x = x.reshape(len(x), -1)
            x = tap("hidden", nn.Dense(self.hidden, use_bias=False, dtype=self.dtype, name="hidden")(x))
            x = tap("relu_hidden", nn.relu(BatchNorm(train, dtype=self.dtype, name="norm_hidden")(x)))
        else:
            x = x.mean((1, 2))
        x = tap("features", at_least_float32(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        logits = tap("logits", nn.Dense(self.num_classes, name="classifier")(x))
        return logits, tap.finish()

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raises InputError where the pools leave nothing of the image, or a filter has no centre."""
        if min(image_shape[:2]) < 2 ** (self.stages - 1):
            raise InputError(f"model convnet: stages={self.stages} halve {image_shape[0]} x {image_shape[1]} pixels "
                             "down to none: take fewer stages or a larger --image_size")
        if self.first_kernel % 2 == 0:
            raise InputError(f"model convnet: first_kernel={self.first_kernel} must be odd, so that it has a centre")

    def plan(self) -> list[tuple[int, bool]]:
        """(stage, whether it is the stage's first) for every layer, in order."""
        return [(stage, depth == 0) for stage in range(self.stages) for depth in range(self.depth)]

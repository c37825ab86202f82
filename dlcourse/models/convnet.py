"""The lecture's cascade: each layer filters, normalises, thresholds, and some pool."""

from __future__ import annotations

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
      dropout: share of the pooled features dropped while training.
      dtype: of the computation; parameters, normalisation statistics and logits are float32.
    """

    num_classes: int
    width: int = 32
    stages: int = 3
    depth: int = 2
    first_kernel: int = 3
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train: bool = False, edit: Edit | None = None):
        tap = Taps(edit)
        x = (images.astype(self.dtype) - 0.5) / 0.25
        for layer, (stage, pools) in enumerate(self.plan(), start=1):
            kernel = self.first_kernel if layer == 1 else 3
            features = self.width * 2**stage
            x = tap(f"conv{layer}", Conv(features, kernel, dtype=self.dtype, name=f"conv{layer}")(x))
            x = BatchNorm(train, dtype=self.dtype, name=f"norm{layer}")(x)
            x = tap(f"relu{layer}", nn.relu(x))
            if pools:
                x = tap(f"pool{stage + 1}", max_pool(x))
        x = tap("features", at_least_float32(x.mean((1, 2))))
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
        """(stage, whether a pool follows) for every layer, in order."""
        last = self.stages - 1
        return [(s, d == self.depth - 1 and s < last) for s in range(self.stages) for d in range(self.depth)]

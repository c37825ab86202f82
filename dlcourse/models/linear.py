"""No layer and fully connected layers: what a network can do without looking at neighbouring pixels together."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from dlcourse.models.layers import at_least_float32
from dlcourse.models.taps import Edit, Taps


class Linear(nn.Module):
    """Softmax regression on pixels: one template a class.

    Attributes:
      num_classes: K.
      dtype: of the computation; parameters and logits are float32.
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train: bool = False, edit: Edit | None = None):
        tap = Taps(edit)
        x = (images.astype(self.dtype) - 0.5) / 0.25
        x = tap("features", at_least_float32(x.reshape(len(x), -1)))
        logits = tap("logits", nn.Dense(self.num_classes, name="classifier")(x))
        return logits, tap.finish()


class MLP(nn.Module):
    """Fully connected layers, each thresholded; kernels as He et al. 2015.

    Attributes:
      num_classes: K.
      width: units a layer.
      depth: hidden layers.
      dropout: share of the last layer's units dropped while training.
      dtype: of the computation; parameters and logits are float32.
    """

    num_classes: int
    width: int = 256
    depth: int = 2
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train: bool = False, edit: Edit | None = None):
        tap = Taps(edit)
        x = (images.astype(self.dtype) - 0.5) / 0.25
        x = x.reshape(len(x), -1)
        he = nn.initializers.he_normal()
        for layer in range(1, self.depth + 1):
            x = tap(f"dense{layer}", nn.Dense(self.width, dtype=self.dtype, kernel_init=he, name=f"dense{layer}")(x))
            x = tap(f"relu{layer}", nn.relu(x))
        x = tap("features", at_least_float32(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        logits = tap("logits", nn.Dense(self.num_classes, name="classifier")(x))
        return logits, tap.finish()

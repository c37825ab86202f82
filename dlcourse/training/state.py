"""Everything that training changes, in one tree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dlcourse.streams import stream


class TrainState(struct.PyTreeNode):
    """What a step takes and returns; what a checkpoint holds.

    Attributes:
      step: () int32, updates made so far; with the seed it also is the position in the data.
      params: the network's parameters.
      model_state: its other collections (running averages of batch normalisation).
      opt_state: of the optimizer.
      ema: an average of `params` over the steps, or None.
      key: the run's random key; a step draws from stream(key, "step", step).
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    ema: Any
    key: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is evaluated with: the averaged parameters where there are any."""
        return {"params": self.params if self.ema is None else self.ema, **self.model_state}


def create(model, image_shape: tuple[int, int, int], tx: optax.GradientTransformation, key: jax.Array,
           *, ema: bool = False) -> TrainState:
    """A fresh state, its parameters drawn from stream(key, "init").

    Args:
      model: a Flax module under the Model contract.
      image_shape: (H, W, C).
      tx: the optimizer.
      key: the run's typed key.
      ema: keep an average of the parameters.
    """
    images = jnp.zeros((1, *image_shape), jnp.float32)
    variables = jax.jit(model.init)(stream(key, "init"), images)
    params = variables.pop("params")
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, variables, tx.init(params), average, key)

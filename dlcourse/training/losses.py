"""Training ideas as losses: (params, model_state, batch, key) -> (scalar, (model_state, metrics))."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dlcourse.contracts import Batch, Loss
from dlcourse.data.batches import in_unit
from dlcourse.streams import stream


def weighted_mean(values: jax.Array, batch: Batch) -> jax.Array:
    """sum_b w_b m_b v_b / sum_b w_b m_b over the batch's `mask` and `weight`, each 1 where absent.

    Args:
      values: (B,).
      batch: a Batch.
    """
    weights = jnp.ones_like(values)
    for name in ("mask", "weight"):
        if name in batch:
            weights = weights * batch[name].astype(values.dtype)
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), jnp.finfo(values.dtype).tiny)


def targets(batch: Batch, num_classes: int, smoothing: float = 0.0) -> jax.Array:
    """(B, K) target distributions: (1 - s) t + s / K, t the batch's `target` or its label one-hot.

    Source: Szegedy et al. 2016, section 7.
    """
    target = batch["target"] if "target" in batch else jax.nn.one_hot(batch["label"], num_classes)
    return (1.0 - smoothing) * target + smoothing / num_classes


def cross_entropy(model, *, label_smoothing: float = 0.0) -> Loss:
    """Mean over the batch of -sum_k target_k log softmax(logits)_k.

    Args:
      model: a Flax module under the Model contract.
      label_smoothing: share of the target spread evenly over all classes, in [0, 1).

    Returns:
      A Loss whose metrics are `loss` and `accuracy` (against the batch's labels).
    """

    def loss(params, model_state, batch, key):
        (logits, _), new_state = model.apply(
            {"params": params, **model_state}, batch["image"], train=True,
            mutable=list(model_state), rngs={"dropout": stream(key, "dropout")},
        )
        wanted = targets(batch, logits.shape[-1], label_smoothing)
        value = weighted_mean(-jnp.sum(wanted * jax.nn.log_softmax(logits), -1), batch)
        correct = (logits.argmax(-1) == batch["label"]).astype(jnp.float32)
        return value, (new_state, {"loss": value, "accuracy": weighted_mean(correct, batch)})

    return loss


def from_bytes(loss: Loss) -> Loss:
    """The same loss on batches whose images may be uint8, a quarter to send to a device; see `data.batches`."""
    return lambda params, model_state, batch, key: loss(params, model_state, in_unit(batch), key)


def augmented(loss: Loss, augment: Callable[[jax.Array, Batch], Batch]) -> Loss:
    """The same loss on batches that pass through `augment(key, batch)` first, on the device."""

    def on_augmented(params, model_state, batch, key):
        return loss(params, model_state, augment(stream(key, "augment"), batch), key)

    return on_augmented

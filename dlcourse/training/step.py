"""The training step: one update, pure, knowing nothing of devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dlcourse.contracts import Batch, Loss
from dlcourse.models.layers import platform
from dlcourse.streams import stream
from dlcourse.training.state import TrainState


def train_step(state: TrainState, batch: Batch, *, loss: Loss, tx: optax.GradientTransformation,
               ema: float = 0.0, accumulate: int = 1,
               average: Callable[[Any], Any] = lambda tree: tree) -> tuple[TrainState, dict[str, jax.Array]]:
    """params <- params + tx(mean gradient of the loss over the batch).

    Args:
      state: before the update.
      batch: B examples; B a multiple of `accumulate`.
      loss: a Loss; its batch has the number of earlier updates, too, as `step`.
      tx: the optimizer whose state is in `state`.
      ema: decay d of the average, ema <- d' ema + (1 - d') params with d' = min(d, (1+t)/(10+t)).
      accumulate: parts of the batch that go through the network one after another.
      average: of gradients, model state and metrics over replicas, each of which sees a share of the batch.

    Returns:
      The state after the update, and the loss's metrics with `grad_norm`.
    """
    key = stream(state.key, "step", state.step)
    grads, model_state, metrics = average(_gradient(loss, state, batch, key, accumulate))
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.ema
    if average is not None:
        decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update(params, average, 1 - decay)
    state = state.replace(step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state, ema=average)
    return state, {**metrics, "grad_norm": optax.tree.norm(grads)}


def _gradient(loss, state, batch, key, parts):
    """The gradient, new model state and metrics; over several parts, their means."""
    def at_step(params, model_state, batch, key):
        return loss(params, model_state, {**batch, "step": state.step}, key)

    value_and_grad = jax.value_and_grad(at_step, has_aux=True)
    if parts == 1:
        (_, (model_state, metrics)), grads = value_and_grad(state.params, state.model_state, batch, key)
        return grads, model_state, metrics

    def one(sums, part):
        index, batch = part
        model_state, total = sums
        (_, (model_state, metrics)), grads = value_and_grad(
            state.params, model_state, batch, stream(key, "part", index))
        return (model_state, jax.tree.map(jnp.add, total, (grads, metrics))), None

    # Every parts-th example: a batch that is divided over devices is then so in each part, and nothing moves.
    split = jnp.arange(parts), jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), dict(batch))
    (_, (_, metrics)), grads = jax.eval_shape(value_and_grad, state.params, state.model_state,
                                              jax.tree.map(lambda x: x[0], split[1]), key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (grads, metrics))
    # On a CPU, convolutions in a loop of XLA's use one core, some 20 times slower than outside of it.
    (model_state, total), _ = jax.lax.scan(one, (state.model_state, zeros), split, unroll=platform() == "cpu")
    grads, metrics = jax.tree.map(lambda x: x / parts, total)
    return grads, model_state, metrics

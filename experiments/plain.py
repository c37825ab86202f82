"""Steps as the Flax examples write them, without any form of ours: what `tpu_steps` compares with."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

BF16 = jnp.bfloat16


class Bottleneck(nn.Module):
    filters: int
    strides: tuple[int, int]

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, use_bias=False, dtype=BF16)
        norm = partial(nn.BatchNorm, use_running_average=False, momentum=0.9, epsilon=1e-5, dtype=BF16)
        y = nn.relu(norm()(conv(self.filters, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.filters, (3, 3), self.strides)(y)))
        y = norm(scale_init=nn.initializers.zeros)(conv(4 * self.filters, (1, 1))(y))
        if x.shape != y.shape:
            x = norm(name="norm_proj")(conv(4 * self.filters, (1, 1), self.strides, name="conv_proj")(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    blocks: tuple[int, ...] = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], use_bias=False, dtype=BF16)(x.astype(BF16))
        x = nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5, dtype=BF16)(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                x = Bottleneck(64 * 2**stage, (2, 2) if stage and not i else (1, 1))(x)
        return nn.Dense(1000, dtype=BF16)(x.mean((1, 2))).astype(jnp.float32)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(dtype=BF16)(x)
        x = x + nn.MultiHeadDotProductAttention(6, dtype=BF16, deterministic=True)(y, y)
        y = nn.gelu(nn.Dense(1536, dtype=BF16)(nn.LayerNorm(dtype=BF16)(x)))
        return x + nn.Dense(384, dtype=BF16)(y)


class ViTS(nn.Module):
    depth: int = 12

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(384, (16, 16), (16, 16), padding="VALID", dtype=BF16)(x)
        x = x.reshape(len(x), -1, 384)
        first = self.param("class_token", nn.initializers.zeros, (1, 1, 384)).astype(BF16)
        x = jnp.concatenate([jnp.tile(first, (len(x), 1, 1)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:])).astype(BF16)
        for _ in range(self.depth):
            x = Encoder()(x)
        return nn.Dense(1000)(nn.LayerNorm(dtype=BF16)(x)[:, 0])


STEPS = {"resnet50": (ResNet50, optax.sgd(0.1, momentum=0.9, nesterov=True), 1e-4),
         "vit_s": (ViTS, optax.adamw(1e-3, weight_decay=0.1), 0.0)}
"""Model, optimizer, and the weight of the L2 penalty in the loss."""


def step(name: str, **options):
    """The step (state, batch) -> (state, metrics), and its abstract state (params, statistics, optimizer's)."""
    make, tx, decay = STEPS[name]
    model = make(**options)
    variables = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 224, 224, 3))), jax.random.key(0))
    params = variables["params"]
    start = params, variables.get("batch_stats", {}), jax.eval_shape(tx.init, params)

    def update(state, batch):
        params, statistics, opt_state = state

        def loss(params):
            logits, changed = model.apply({"params": params, "batch_stats": statistics}, batch["image"],
                                          mutable=["batch_stats"])
            value = optax.softmax_cross_entropy(logits, jax.nn.one_hot(batch["label"], 1000)).mean()
            if decay:
                value += 0.5 * decay * sum(jnp.sum(x**2) for x in jax.tree.leaves(params) if x.ndim > 1)
            return value, (changed.get("batch_stats", {}), jnp.mean(logits.argmax(-1) == batch["label"]))

        (value, (changed, accuracy)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), changed, opt_state), {"loss": value, "accuracy": accuracy}

    return update, start

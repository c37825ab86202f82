"""One update, against updates written out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from dlcourse import streams
from dlcourse.contracts import InputError
from dlcourse.training import losses, optimizers
from dlcourse.training import state as states
from dlcourse.training.step import train_step


class Tiny(nn.Module):
    """A linear model whose every number can be checked by hand."""

    @nn.compact
    def __call__(self, images, train=False, edit=None):
        return nn.Dense(3, name="classifier")(images.reshape(len(images), -1)), {}


def batch(n=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.random((n, 2, 2, 1), np.float32),
        "label": rng.integers(0, 3, n).astype(np.int32),
        "index": np.arange(n, dtype=np.int32),
    }


def make(tx, **options):
    model = Tiny()
    state = states.create(model, (2, 2, 1), tx, streams.root(0), ema=options.get("ema", 0) > 0)
    return state, jax.jit(functools.partial(train_step, loss=losses.cross_entropy(model), tx=tx, **options))


def by_hand(params, b):
    x, kernel, bias = (
        b["image"].reshape(8, -1),
        np.asarray(params["classifier"]["kernel"]),
        np.asarray(params["classifier"]["bias"]),
    )
    z = x @ kernel + bias
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    residual = (p - np.eye(3)[b["label"]]) / 8
    return x.T @ residual, residual.sum(0)


def test_sgd_is_the_gradient_by_hand_with_decay_on_kernels_only():
    state, step = make(optimizers.create("sgd", 0.1, weight_decay=0.5, momentum=0.0))
    b = batch()
    d_kernel, d_bias = by_hand(state.params, b)
    after, metrics = step(state, b)
    kernel, bias = state.params["classifier"]["kernel"], state.params["classifier"]["bias"]
    np.testing.assert_allclose(
        after.params["classifier"]["kernel"], kernel - 0.1 * (d_kernel + 0.5 * kernel), atol=1e-6
    )
    np.testing.assert_allclose(after.params["classifier"]["bias"], bias - 0.1 * d_bias, atol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt((d_kernel**2).sum() + (d_bias**2).sum()), rtol=1e-5)
    assert int(after.step) == 1


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_keeps_the_result(parts):
    tx = optimizers.create("adamw", 0.1)
    (state, whole), (_, split) = make(tx), make(tx, accumulate=parts)
    one, other = whole(state, batch()), split(state, batch())
    for a, b in zip(
        jax.tree.leaves((one[0].params, one[1])), jax.tree.leaves((other[0].params, other[1])), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_average_follows_its_recurrence():
    state, step = make(optimizers.create("sgd", 0.5), ema=0.9)
    expected = state.params["classifier"]["bias"]
    for t in range(5):
        state, _ = step(state, batch(seed=t))
        decay = min(0.9, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * state.params["classifier"]["bias"]
    np.testing.assert_allclose(state.ema["classifier"]["bias"], expected, rtol=1e-5, atol=1e-7)
    assert state.variables["params"] is state.ema


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw", "lamb", "lion", "muon"])
def test_every_optimizer_lowers_the_loss_and_spares_biases_from_decay(name):
    tx = optimizers.create(name, 0.02, weight_decay=0.3, clip=1.0)
    state, step = make(tx)
    first = None
    for _ in range(30):
        state, metrics = step(state, batch())
        first = first if first is not None else metrics["loss"]
    assert metrics["loss"] < first
    params = {
        "classifier": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
        "conv": {"kernel": jnp.ones((3, 3, 2, 4))},
    }
    still = jax.tree.map(jnp.zeros_like, params)
    plain = optimizers.create(name, 0.02, weight_decay=0.3)
    updates, _ = plain.update(still, plain.init(params), params)
    assert float(jnp.abs(updates["classifier"]["bias"]).max()) == 0.0
    assert float(updates["classifier"]["kernel"].max()) < 0.0 and float(updates["conv"]["kernel"].max()) < 0.0


def test_clipping_bounds_the_norm():
    tx = optimizers.create("sgd", 1.0, momentum=0.0, clip=0.01)
    state, step = make(tx)
    after, metrics = step(state, batch())
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, after.params, state.params))
    assert metrics["grad_norm"] > 0.02
    np.testing.assert_allclose(moved, 0.01, rtol=1e-4)


def test_schedules_at_their_landmarks():
    cosine = optimizers.schedule("cosine", 2.0, 100, warmup=10)
    np.testing.assert_allclose([cosine(0), cosine(5), cosine(10), cosine(55), cosine(100)], [0, 1, 2, 1, 0], atol=1e-6)
    cycle = optimizers.schedule("one_cycle", 1.0, 100)
    np.testing.assert_allclose([cycle(0), cycle(30), cycle(100)], [1 / 25, 1, 1 / 250000], rtol=1e-3)
    constant = optimizers.schedule("constant", 0.5, 0)
    assert float(constant(0)) == float(constant(10**6)) == 0.5
    with pytest.raises(InputError, match="--warmup"):
        optimizers.schedule("cosine", 1.0, 10, warmup=10)


def test_losses_in_closed_form():
    b = {
        "image": np.zeros((4, 2, 2, 1), np.float32),
        "label": np.array([0, 1, 2, 0], np.int32),
        "mask": np.array([1, 1, 1, 0], bool),
        "weight": np.array([1, 2, 1, 9], np.float32),
    }
    values = jnp.asarray([1.0, 2.0, 3.0, 100.0])
    np.testing.assert_allclose(losses.weighted_mean(values, b), (1 + 2 * 2 + 3) / 4)
    np.testing.assert_allclose(losses.targets(b, 3, 0.3)[1], [0.1, 0.8, 0.1], rtol=1e-6)
    mixed = {**b, "target": np.full((4, 3), 1 / 3, np.float32)}
    np.testing.assert_allclose(losses.targets(mixed, 3, 0.3), np.full((4, 3), 1 / 3), rtol=1e-6)


def test_augmentation_gets_a_key_of_its_own_each_step():
    seen = []

    def spy(key, b):
        jax.debug.callback(lambda k: seen.append(tuple(np.asarray(k))), jax.random.key_data(key))
        return b

    tx = optimizers.create("sgd", 0.1)
    state, _ = make(tx)
    step = functools.partial(train_step, loss=losses.augmented(losses.cross_entropy(Tiny()), spy), tx=tx)
    for _ in range(3):
        state, _ = step(state, batch())
    jax.effects_barrier()
    assert len(set(seen)) == 3

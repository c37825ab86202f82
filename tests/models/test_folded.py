"""The forms for accelerators compute what the plain ones do: values, statistics and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dlcourse import models
from dlcourse.models import folded, layers
from dlcourse.training import losses


def arrays(*shapes, dtype=np.float64):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def test_moments_of_a_product_come_from_those_of_its_factor_in_all_derivatives():
    with jax.enable_x64(True):
        x, w, dx, dw = arrays((3, 4, 5, 6), (6, 8), (3, 4, 5, 6), (6, 8))
        x = x + 2  # far from centred, as what passes a threshold is

        def direct(x, w):
            y = (x @ w).reshape(-1, 8)
            return jnp.sin(y.mean(0)).sum() + jnp.sin(y.var(0)).sum()

        def folding(x, w):
            mean, var = folded.product_moments(x, w)
            return jnp.sin(mean).sum() + jnp.sin(var).sum()

        def everything(f):
            gradient = jax.grad(f, (0, 1))
            return f(x, w), gradient(x, w), jax.jvp(f, (x, w), (dx, dw)), jax.jvp(gradient, (x, w), (dx, dw))

        for one, other in zip(*(jax.tree.leaves(everything(f)) for f in (direct, folding)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


class Stem(nn.Module):
    folds: bool

    @nn.compact
    def __call__(self, x):
        conv, norm = layers.Conv(8, 3, name="conv"), layers.BatchNorm(True, name="norm")
        if self.folds:
            return folded.normalised_then_pooled(conv, norm, x, layers.max_pool)
        y = nn.relu(norm(conv(x)))
        return y, layers.max_pool(y)


def test_the_pool_may_come_first_whatever_the_sign_of_the_scale():
    (x,) = arrays((4, 8, 8, 3), dtype=np.float32)
    variables = Stem(False).init(jax.random.key(0), x)
    variables["params"]["norm"]["scale"] = jnp.array([1.0, -1.0, 0.1, -2.0, 0.5, -0.5, 3.0, 1.0])
    variables["params"]["norm"]["bias"] = jnp.full(8, 0.3)

    def outcome(folds):
        def loss(params):
            made, state = Stem(folds).apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return jnp.sin(made[1]).sum(), (made, state)

        return jax.grad(loss, has_aux=True)(variables["params"])

    plain, ours = outcome(False), outcome(True)
    assert all(np.ptp(leaf) > 0 for leaf in jax.tree.leaves(plain[0]))
    for one, other in zip(*map(jax.tree.leaves, (plain, ours)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_a_network_is_the_same_in_the_forms_of_a_tpu(train):
    model = models.create("resnet50,stem=imagenet", 10, (32, 32, 3))
    model = model.clone(blocks=(2, 1))
    rng = np.random.default_rng(0)
    batch = {"image": rng.random((8, 32, 32, 3), np.float32), "label": np.arange(8) % 10}
    variables = model.init(jax.random.key(0), batch["image"])
    noise = iter(np.random.default_rng(1).random(10**6, np.float32))
    variables = jax.tree.map(lambda leaf: leaf + (0.1 + next(noise) if leaf.ndim == 1 else 0), variables)
    state = {"batch_stats": variables["batch_stats"]}

    def outcome(platform):
        with layers.compiled_for(platform):
            if not train:
                return jax.jit(lambda v, x: model.apply(v, x))(variables, batch["image"])
            loss = losses.cross_entropy(model)
            gradient = jax.grad(lambda params: loss(params, state, batch, jax.random.key(0)), has_aux=True)
            return jax.jit(gradient)(variables["params"])

    plain, ours = outcome("cpu"), outcome("tpu")
    for one, other in zip(*map(jax.tree.leaves, (plain, ours)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4 * np.abs(one).max())


def test_an_edit_of_the_stem_is_not_lost_where_the_pool_comes_first():
    model = models.create("resnet50,stem=imagenet", 10, (32, 32, 3)).clone(blocks=(1,))
    images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    variables = model.init(jax.random.key(0), images)
    with layers.compiled_for("tpu"):
        _, taps = model.apply(variables, images, edit={"stem": lambda x: 0 * x + 3})
        assert list(taps) == list(model.apply(variables, images)[1])
    np.testing.assert_allclose(taps["pool"], 3)


@pytest.fixture(scope="module")
def vit():
    """A small network, images, and parameters large enough that some tokens look at few others; biases are not zero."""
    model = models.create("vit_ti,patch=8", 10, (32, 32, 3)).clone(depth=2)
    rng = np.random.default_rng(0)
    images = rng.random((4, 32, 32, 3), np.float32)
    params = jax.jit(lambda x: model.init(jax.random.key(0), x))(images)["params"]
    params = jax.tree.map(lambda leaf: 1.5 * leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)
                          * (leaf.ndim == 1), params)
    return model, images, params


def in_both_forms(function, *arguments):
    """function(*arguments) in the forms of a CPU and of a TPU, leaf by leaf."""
    made = []
    for platform in ("cpu", "tpu"):
        with layers.compiled_for(platform):
            made.append(jax.jit(lambda *a: function(*a))(*arguments))
    return zip(*map(jax.tree.leaves, made), strict=True)


def test_attention_is_the_same_in_the_forms_of_a_tpu(vit):
    model, images, params = vit
    batch = {"image": images, "label": np.arange(4)}
    shapes = [jax.tree.map(np.shape, params)]
    with layers.compiled_for("tpu"):
        shapes.append(jax.tree.map(np.shape, jax.eval_shape(model.init, jax.random.key(0), images)["params"]))
    assert shapes[0] == shapes[1]
    gradient = jax.grad(losses.cross_entropy(model), has_aux=True)
    for one, other in in_both_forms(lambda p: gradient(p, {}, batch, jax.random.key(0)), params):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=3e-4 * np.abs(one).max())


def test_taps_of_attention_are_the_same_in_the_forms_of_a_tpu(vit):
    model, images, params = vit
    with layers.compiled_for("tpu"):
        names = list(jax.eval_shape(model.apply, {"params": params}, images)[1])
    assert names == list(jax.eval_shape(model.apply, {"params": params}, images)[1])
    for one, other in in_both_forms(lambda p: model.apply({"params": p}, images), params):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=3e-4 * np.abs(one).max())


@pytest.mark.parametrize("name", ["stem", "tokens", "block1", "block2", "features", "logits"])
def test_an_edit_means_the_same_in_the_forms_of_a_tpu(vit, name):
    model, images, params = vit

    def outcome(added):
        # Tokens change places, so that what is classified comes from others than the class token.
        edit = {name: lambda x: jnp.roll(x, 1, axis=1) + added}
        return jnp.sin(model.apply({"params": params}, images, edit=edit)[0]).sum()

    shape = jax.eval_shape(model.apply, {"params": params}, images)[1][name].shape
    for one, other in in_both_forms(jax.value_and_grad(outcome), jnp.zeros(shape)):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=3e-4 * np.abs(one).max())


def test_gelu_in_bfloat16_is_off_by_less_than_its_rounding():
    x = jnp.linspace(-12, 12, 24001).astype(jnp.bfloat16)
    exact = np.asarray(nn.gelu(x.astype(jnp.float32), approximate=False))
    with layers.compiled_for("tpu"):
        ours = np.asarray(layers.gelu(x), np.float32)
        np.testing.assert_array_equal(layers.gelu(exact), nn.gelu(exact, approximate=False))
    assert np.all(np.abs(ours - exact) <= 6e-5 + np.abs(exact) * 2**-8)

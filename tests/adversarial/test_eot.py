"""The expectation over a network's draws, where it is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlcourse.adversarial import eot, gradient
from dlcourse.adversarial.apgd import apgd
from dlcourse.adversarial.threat import Threat

pytestmark = pytest.mark.slow


def flipping(weights, key, images):
    """Logits (s w.x, 0), s a random sign for the whole batch given."""
    sign = jax.random.rademacher(key, (), jnp.float32)
    return jnp.stack([sign * (images.reshape(len(images), -1) @ weights), jnp.zeros(len(images))], -1)


def noisy(weights, key, images):
    seen = images + weights["sigma"] * jax.random.normal(key, images.shape)
    return seen.reshape(len(images), -1) @ weights["kernel"]


@pytest.fixture
def images():
    return jax.random.uniform(jax.random.key(0), (6, 2, 2, 1))


@pytest.fixture
def network():
    weights = {"kernel": jax.random.normal(jax.random.key(1), (4, 3)), "sigma": jnp.float32(0.3)}
    return jax.tree_util.Partial(noisy, weights)


def test_gradient_is_the_mean_of_gradients_not_the_gradient_of_the_mean(images):
    w = jnp.arange(1.0, 5.0)
    predict = eot.Expectation(jax.tree_util.Partial(flipping, w), jax.random.key(0), samples=8)
    slope, logits, values = gradient.ascend(predict, images, None, None, lambda z, labels, targets: z[:, 0] ** 2)
    along = images.reshape(6, -1) @ w
    np.testing.assert_allclose(slope.reshape(6, -1), 2 * along[:, None] * w[None], rtol=1e-5)
    np.testing.assert_allclose(values, along**2, rtol=1e-5)
    assert bool(jnp.all(jnp.abs(logits[:, 0]) <= along + 1e-5)) and bool(jnp.any(jnp.abs(logits[:, 0]) < 0.9 * along))
    np.testing.assert_allclose(predict(images), logits, rtol=1e-5)


def test_attacks_by_the_gradient_follow_the_mean_of_gradients(images):
    """E[CE] = (log(1 + e^u) + log(1 + e^-u)) / 2 grows with |u|, whichever way the mean of the drawn signs points."""
    w = jnp.array([6.0, 7.0, 8.0, 9.0])
    predict = eot.Expectation(jax.tree_util.Partial(flipping, w), jax.random.key(0), samples=16)
    assert len(set(jnp.sign(predict(images)[:, 0]).tolist())) > 1
    found = gradient.fgsm(jax.random.key(0), predict, images, jnp.zeros(6, jnp.int32), Threat(jnp.float32(0.1)))
    np.testing.assert_allclose(found.images, jnp.clip(images + 0.1, 0, 1), atol=1e-6)


def test_mean_logits_approach_the_expectation(images, network):
    mean = eot.Expectation(network, jax.random.key(0), samples=4000)(images)
    kernel = network.args[0]["kernel"]
    exact = images.reshape(6, -1) @ kernel
    error = 0.3 * jnp.linalg.norm(kernel, axis=0)[None] / np.sqrt(4000)
    assert float(jnp.max(jnp.abs(mean - exact) / error)) < 4.5
    assert float(jnp.max(jnp.abs(mean - exact) / error)) > 0.5  # it does draw


def test_draws_are_an_images_own(images, network):
    predict = eot.Expectation(network, jax.random.key(0), samples=3)
    logits = predict(images)
    np.testing.assert_allclose(predict(images[::-1])[::-1], logits, rtol=1e-6)
    np.testing.assert_allclose(predict(images[2:3])[0], logits[2], rtol=1e-5)
    kernel = network.args[0]["kernel"]
    moved = images.at[:, 0, 0, 0].add(1e-6)
    drawn, drawn_there = (z - x.reshape(6, -1) @ kernel for z, x in ((logits, images), (predict(moved), moved)))
    assert float(jnp.abs(drawn - drawn_there).max(-1).min()) > 1e-3  # another image meets other draws
    assert float(jnp.abs(predict.replace(key=jax.random.key(1))(images) - logits).max(-1).min()) > 1e-3


def test_attack_fools_the_expectation_without_compiling_anew(images, network):
    labels = network(jax.random.key(0), images).argmax(-1)
    before = apgd._cache_size()
    for seed in (0, 1):
        predict = eot.Expectation(network, jax.random.key(seed), samples=20)
        found = apgd(jax.random.key(0), predict, images, labels, Threat(jnp.float32(0.9)), steps=20)
        assert bool(found.success.all())
        np.testing.assert_array_equal(predict(found.images).argmax(-1) != labels, found.success)
    assert apgd._cache_size() == before + 1

"""Estimated gradients against true ones, and the attacks they drive against PGD and a network without gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlcourse.adversarial import estimated, gradient
from dlcourse.adversarial.threat import Threat, example_keys, size

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)
ATTACKS = [functools.partial(estimated.spsa, steps=10, pairs=32), functools.partial(estimated.nes, steps=10, pairs=32)]


@jax.jit
def linear(weights, images):
    return jnp.einsum("bd,dk->bk", images.reshape(len(images), -1) - 0.5, weights)


@jax.jit
def rounded(weights, images):
    """A network whose gradient is zero everywhere, as rounding's is."""
    return linear(weights, jnp.round(255 * images) / 255)


def problem(function=linear, count=6, seed=0):
    rng = np.random.default_rng(seed)
    weights = jnp.asarray(rng.normal(size=(64, 3)), jnp.float32)
    images = jnp.asarray(rng.uniform(0.2, 0.8, (count, 8, 8, 1)), jnp.float32)
    predict = jax.tree_util.Partial(function, weights)
    return predict, images, predict(images).argmax(-1)


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("curvature", [0.0, 1.0])
def test_estimates_are_the_gradient_on_average_with_the_variance_that_theory_gives(signs, curvature):
    """f = w.x + c (x.x)^2 / 2 is quadratic up to c: antithetic pairs cancel even terms."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(1, 4, 4, 1)), jnp.float32)
    images, pairs = jnp.asarray(rng.uniform(size=(200, 4, 4, 1)), jnp.float32), 50

    def value(x):
        return ((w + curvature * x / 2) * x).sum((1, 2, 3))

    true = np.asarray(w + curvature * images)
    found = estimated.estimate(example_keys(KEY, 200), value, images, 0.1, pairs=pairs, signs=signs)
    squares = (true**2).sum((1, 2, 3), keepdims=True)
    spread = np.sqrt((squares + (-1 if signs else 1) * true**2) / pairs)
    score = (np.asarray(found) - true) / spread  # (200,4,4,1) of mean 0 and variance 1
    assert abs(score.mean()) < 4 / np.sqrt(score.size)
    assert abs(score.std() - 1) < 0.05
    # 16 times the pairs: a quarter of the error, and the last, partly filled chunk counts as it should.
    more = estimated.estimate(example_keys(KEY, 200), value, images, 0.1, pairs=16 * pairs + 3, signs=signs)
    assert np.abs(np.asarray(more) - true).mean() / np.abs(np.asarray(found) - true).mean() == pytest.approx(0.25, 0.1)


def test_does_not_ask_about_more_pairs_than_told():
    asked = [0]

    def value(x):
        jax.debug.callback(lambda _: asked.__setitem__(0, asked[0] + 1), x[0, 0, 0, 0])
        return x.sum((1, 2, 3))

    estimated.estimate(example_keys(KEY, 2), value, jnp.ones((2, 4, 4, 1)), 0.1, pairs=7, signs=True, chunk=16)
    jax.effects_barrier()
    assert asked[0] == 14


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("norm, eps", [("linf", 0.05), ("l2", 0.3)])
def test_success_close_to_that_of_pgd_on_a_linear_network_and_within_the_threat(attack, norm, eps):
    predict, images, labels = problem(count=64)
    threat = Threat(norm=norm, eps=eps)
    found = attack(KEY, predict, images, labels, threat)
    white = gradient.pgd(KEY, predict, images, labels, threat, objective="margin", random_start=False)
    assert 0.3 < white.success.mean() < 1, "a problem that is neither trivial nor impossible"
    assert white.success.mean() - found.success.mean() < 0.15
    assert np.all(np.asarray(found.norm) <= eps * (1 + 1e-5))
    assert found.images.min() >= 0 and found.images.max() <= 1
    np.testing.assert_allclose(found.norm, size(found.images - images, norm))


def test_fools_a_network_whose_gradient_is_zero():
    predict, images, labels = problem(rounded, count=32)
    threat = Threat(eps=0.08)
    white = gradient.pgd(KEY, predict, images, labels, threat, random_start=False)
    found = ATTACKS[0](KEY, predict, images, labels, threat)
    assert not white.success.any() and found.success.mean() > 0.5


@pytest.mark.parametrize("attack", ATTACKS)
def test_contract(attack):
    predict, images, labels = problem()
    threat, keys = Threat(eps=0.05), example_keys(KEY, len(images))
    together = attack(keys, predict, images, labels, threat)
    before = attack.func._cache_size()
    other, *_ = problem(seed=1)
    attack(example_keys(jax.random.key(1), 6), other, images, labels, Threat(eps=0.3))
    assert attack.func._cache_size() == before
    alone = attack(keys[2:3], predict, images[2:3], labels[2:3], threat)
    np.testing.assert_allclose(together.images[2], alone.images[0], atol=1e-6)
    np.testing.assert_array_equal(together.queries[together.success == 0], 1 + 10 * 65 + 1)
    targets = (labels + 1) % 3
    aimed = attack(keys, predict, images, labels, Threat(eps=0.3), targets=targets)
    assert aimed.success.all() and np.all(predict(aimed.images).argmax(-1) == targets)
    broken = attack(keys, jax.tree_util.Partial(linear, jnp.full((64, 3), jnp.nan)), images, labels, threat)
    assert not broken.success.any() and np.all(np.isfinite(broken.images))

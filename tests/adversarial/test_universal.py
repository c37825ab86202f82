"""One change for all images, against its closed form and against a second implementation in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlcourse.adversarial import threat as threats
from dlcourse.adversarial.threat import Threat
from dlcourse.adversarial.universal import applied, fooling_rate, universal
from dlcourse.contracts import InputError
from dlcourse.streams import stream

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)
WEIGHTS = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)


@jax.jit
def logits(weights, images):
    return (images - 0.5).reshape(len(images), -1) @ weights


PREDICT = jax.tree_util.Partial(logits, jnp.asarray(WEIGHTS))


def problem(count=50, side=4, predict=PREDICT):
    """Images (N,side,side,1) around grey, and what the network says of them."""
    images = 0.5 + 0.15 * np.random.default_rng(1).uniform(-1, 1, (count, side, side, 1))
    images = jnp.asarray(images, jnp.float32)
    return images, predict(images).argmax(-1)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_two_classes_have_a_closed_form(norm):
    """Where all images are of one of two classes the best change is the steepest for each of them."""
    slope = WEIGHTS[:, 1] - WEIGHTS[:, 0]
    predict = jax.tree_util.Partial(logits, jnp.asarray(WEIGHTS[:, :2]))
    images, _ = problem()
    threat = Threat(norm=norm, eps=0.1)
    found = universal(KEY, predict, images, jnp.zeros(50, int), threat, batch_size=20)
    best = threats.steepest(jnp.asarray(slope).reshape(1, 4, 4, 1), norm)[0] * 0.1
    np.testing.assert_allclose(found, best, atol=1e-4)
    aimed = universal(KEY, predict, images, jnp.zeros(50, int), threat, batch_size=20, targets=jnp.ones(50, int))
    np.testing.assert_allclose(aimed, best, atol=1e-4)


def by_hand(images, labels, eps, epochs, size, step, cap):
    """linf, with numpy's arithmetic in float64 and the same order of images."""
    images, weights, change = np.asarray(images, np.float64), WEIGHTS.astype(np.float64), np.zeros((4, 4, 1))
    for epoch in range(epochs):
        order = np.asarray(jax.random.permutation(stream(KEY, "order", epoch), len(images)))
        for first in range(0, len(images), size):
            chosen = order[first:first + size]
            moved = images[chosen] + change
            z = (moved.clip(0, 1) - 0.5).reshape(len(chosen), -1) @ weights
            p = np.exp(z - z.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            own = p[np.arange(len(chosen)), labels[chosen]]
            pull = (p - np.eye(3)[labels[chosen]]) * (-np.log(own) < cap)[:, None] / len(chosen)
            gradient = (pull @ weights.T).reshape(moved.shape) * ((moved > 0) & (moved < 1))
            change = (change + step * np.sign(gradient.sum(0))).clip(-eps, eps)
    return change


def test_equals_an_implementation_in_numpy():
    images, labels = problem()
    images = images.at[:20].set(jnp.clip(3 * images[:20] - 1, 0, 1))  # some at the box
    images = jnp.clip(images, 0.001, 0.999)
    found = universal(KEY, PREDICT, images, labels, Threat(norm="linf", eps=0.1), epochs=4, batch_size=16,
                      step_size=0.013, cap=1.0)
    want = by_hand(images, np.asarray(labels), 0.1, 4, 16, 0.013, 1.0)
    assert 0 < np.abs(want).max() <= 0.1 and len(np.unique(np.abs(want).round(4))) > 3
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_fools_more_than_noise_of_its_size():
    # Of many pixels: noise moves logits by its size times the square root of their number, a plan by their number.
    weights = np.random.default_rng(2).normal(size=(256, 3)).astype(np.float32)
    predict = jax.tree_util.Partial(logits, jnp.asarray(weights))
    images, labels = problem(200, 16, predict)
    threat = Threat(norm="linf", eps=0.02)
    found = universal(KEY, predict, images[:100], labels[:100], threat, batch_size=20)
    noise = 0.02 * jnp.sign(jax.random.normal(KEY, (20, *found.shape)))
    held_out = images[100:]
    rates = [float(fooling_rate(change, predict, held_out, threat)) for change in (0 * found, found, *noise)]
    assert rates[0] == 0 and rates[1] > 0.4 > 2 * np.mean(rates[2:]), rates
    result = applied(found, predict, held_out, labels[100:], threat)
    np.testing.assert_allclose(result.success.mean(), rates[1])
    assert (result.norm <= 0.02 + 1e-6).all() and (result.images >= 0).all() and (result.images <= 1).all()
    np.testing.assert_array_equal(result.success, predict(result.images).argmax(-1) != labels[100:])


def test_compiles_once():
    images, labels = problem()
    universal(KEY, PREDICT, images, labels, Threat(norm="l2", eps=0.1), epochs=1)
    compiled = universal._cache_size()
    other = jax.tree_util.Partial(logits, jnp.asarray(2 * WEIGHTS))
    universal(jax.random.key(1), other, images, (labels + 1) % 3, Threat(norm="l2", eps=0.2), epochs=1)
    assert universal._cache_size() == compiled


def test_bad_input():
    images, labels = problem()
    with pytest.raises(InputError, match="norm 'l0'"):
        universal(KEY, PREDICT, images, labels, Threat(norm="l0", eps=3.0))
    with pytest.raises(InputError, match="one eps"):
        universal(KEY, PREDICT, images, labels, Threat(norm="l2", eps=jnp.ones(50)))

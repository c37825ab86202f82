"""Certificates of smoothing: published radii, exact intervals, and a network whose certificate is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dlcourse.adversarial import smoothing
from dlcourse.contracts import InputError

SHAPE = (4, 4, 1)


@pytest.mark.parametrize("hits, trials, sigma, radius", [
    (100_000, 100_000, 0.25, 0.95286), (99_000, 100_000, 0.25, 0.57250), (60_000, 100_000, 0.5, 0.12047),
    (100, 100, 0.25, 0.37512), (50_400, 100_000, 0.25, None)])
def test_published_radii(hits, trials, sigma, radius):
    found = smoothing.judge(np.array([3]), np.array([hits]), trials, sigma, 0.001)
    assert found.predicted[0] == (smoothing.ABSTAIN if radius is None else 3)
    np.testing.assert_allclose(found.radius[0], radius or 0.0, atol=1e-5)


def test_the_bound_is_that_of_the_binomial_test():
    for hits, trials, alpha in ((0, 10, 0.001), (1, 10, 0.05), (7, 10, 0.001), (99_000, 100_000, 0.001)):
        expected = stats.binomtest(hits, trials, alternative="greater").proportion_ci(1 - alpha, "exact").low
        np.testing.assert_allclose(smoothing.lower_bound(hits, trials, alpha), expected, rtol=1e-9)
        if hits:
            np.testing.assert_allclose(stats.binom.sf(hits - 1, trials, smoothing.lower_bound(hits, trials, alpha)),
                                       alpha, rtol=1e-6)


def test_abstains_as_the_two_sided_test_does():
    rows = [[a, 100 - a - c, c] for a in range(0, 60) for c in (0, 5, 38)]
    rows += [[50, 50, 0], [0, 100, 0], [66, 34, 0], [67, 33, 0], [68, 32, 0]]
    for alpha in (0.001, 0.05):
        expected = []
        for row in rows:
            second, first = sorted(row)[-2:]
            sure = stats.binomtest(first, first + second, 0.5).pvalue <= alpha
            expected.append(int(np.argmax(row)) if sure else smoothing.ABSTAIN)
        assert smoothing.decide(np.array(rows), alpha).tolist() == expected
        assert smoothing.ABSTAIN in expected and 1 in expected


def halves(weights, images):
    """Class 1 on one side of a plane: logits (0, <w, x> - b)."""
    score = images.reshape(len(images), -1) @ weights - weights.sum() / 2
    return jnp.stack([jnp.zeros_like(score), score], -1)


def planes():
    weights = jax.random.normal(jax.random.key(0), (16,))
    direction = (weights / jnp.linalg.norm(weights)).reshape(SHAPE)
    distances = jnp.array([-0.5, -0.1, 0.0, 0.05, 0.2, 0.6])
    images = 0.5 + distances[:, None, None, None] * direction[None]
    return jax.tree_util.Partial(jax.jit(halves), weights), images, np.asarray(distances)


def test_of_a_linear_network_the_radius_is_the_distance():
    predict, images, distances = planes()
    sigma, n = 0.25, 20_000
    found = smoothing.certify(jax.random.key(1), predict, images, sigma, samples=n)
    # The probability is Phi(distance / sigma); of n draws the bound is some 3.1 + 4 standard deviations lower at most.
    truth = stats.norm.cdf(np.abs(distances) / sigma)
    spread = np.sqrt(truth * (1 - truth) / n)
    assert (found.radius <= np.abs(distances) + 1e-6).all()
    assert (found.probability >= truth - 8 * spread - 1e-3).all() and (found.probability <= truth).all()
    assert found.predicted.tolist() == [0, 0, smoothing.ABSTAIN, 1, 1, 1]
    assert smoothing.predict_smoothed(jax.random.key(2), predict, images, sigma).tolist() == found.predicted.tolist()
    labels = np.array([0, 1, 1, 1, 1, 1])
    radii = np.where(found.predicted == labels, found.radius, 0.0)
    np.testing.assert_allclose(smoothing.average_radius(found, labels), radii.mean())
    np.testing.assert_allclose(smoothing.certified_accuracy(found, labels, [0.0, 0.01, 0.15, 0.45, 9.0]),
                               np.array([4, 4, 3, 2, 0]) / 6)


def test_counts_are_binomial_complete_and_each_image_s_own():
    predict, images, distances = planes()
    keys = jax.random.split(jax.random.key(3), len(images))
    together = smoothing.counts(keys, predict, images, 0.25, samples=1234, chunk=100)
    assert (together.sum(-1) == 1234).all()
    expected = 1234 * stats.norm.cdf(distances / 0.25)
    assert (np.abs(together[:, 1] - expected) < 5 * np.sqrt(1234) / 2).all()
    compiled = smoothing._counted._cache_size()
    for order in (np.arange(6)[::-1], np.array([2, 2, 5, 0, 1, 3])):
        again = smoothing.counts(keys[order], predict, images[order], 0.25, samples=1234, chunk=100)
        np.testing.assert_array_equal(again, together[order])
    other = jax.tree.map(lambda leaf: -leaf, predict)
    mirrored = smoothing.counts(keys, other, images, 0.5, samples=1234, chunk=100)
    assert smoothing._counted._cache_size() == compiled
    expected = 1234 * stats.norm.cdf(-distances / 0.5)
    assert (np.abs(mirrored[:, 1] - expected) < 5 * np.sqrt(1234) / 2).all()


def test_not_a_number_is_no_class():
    broken = jax.tree_util.Partial(jax.jit(lambda w, x: halves(w, x) * jnp.nan), jnp.ones(16))
    found = smoothing.certify(jax.random.key(0), broken, jnp.full((2, *SHAPE), 0.5), 0.25, samples=200)
    assert (found.predicted == smoothing.ABSTAIN).all() and (found.radius == 0).all()


@pytest.mark.parametrize("mistake", [{"sigma": 0.0}, {"alpha": 0.0}, {"alpha": 1.0}, {"samples": 0}])
def test_mistakes_are_named(mistake):
    predict, images, _ = planes()
    with pytest.raises(InputError, match=f"{next(iter(mistake))}=.*"):
        smoothing.certify(jax.random.key(0), predict, images, **{"sigma": 0.25, **mistake})

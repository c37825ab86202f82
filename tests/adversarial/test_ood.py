"""Scores against closed forms and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import sklearn.covariance
import sklearn.metrics

from dlcourse.adversarial import ood
from dlcourse.contracts import InputError


@pytest.mark.parametrize("ties", [False, True])
def test_figures_agree_with_scikit_learn(ties):
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 300), rng.normal(0, 2, 170)
    if ties:
        inside, outside = inside.round(), outside.round()
    truth, scores = np.repeat([1, 0], [300, 170]), np.concatenate([inside, outside])
    false, true, _ = sklearn.metrics.roc_curve(truth, scores, drop_intermediate=False)
    got = ood.judge(inside, outside)
    np.testing.assert_allclose(got["auroc"], sklearn.metrics.roc_auc_score(truth, scores), rtol=1e-12)
    np.testing.assert_allclose(got["aupr"], sklearn.metrics.average_precision_score(truth, scores), rtol=1e-12)
    np.testing.assert_allclose(got["fpr95"], false[true >= 0.95].min(), rtol=1e-12)


def test_nan_is_the_lowest_score():
    assert ood.judge(np.array([0.5, 0.6]), np.array([np.nan, np.nan]))["auroc"] == 1.0
    assert ood.judge(np.array([np.nan, np.nan]), np.array([0.5, 0.6]))["auroc"] == 0.0


def test_scores_of_logits():
    logits = np.random.default_rng(0).normal(0, 3, (50, 7)).astype(np.float32)
    np.testing.assert_allclose(ood.max_softmax(logits), scipy.special.softmax(logits, 1).max(1), rtol=1e-5)
    np.testing.assert_allclose(ood.max_logit(logits), logits.max(1))
    np.testing.assert_allclose(ood.energy(logits, 2.0), 2 * scipy.special.logsumexp(logits / 2, 1), rtol=1e-5)
    assert np.isfinite(ood.energy(jnp.full((1, 3), 1e4)))[0]


def test_mahalanobis_against_scipy():
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 3
    features = (rng.normal(size=(400, 5)) @ rng.normal(size=(5, 5)) + 3 * np.eye(5)[labels]).astype(np.float32)
    fitted, new = ood.fit_mahalanobis(features, labels, 3), rng.normal(size=(20, 5)).astype(np.float32)
    means = np.stack([features[labels == k].mean(0) for k in range(3)])
    inverse = np.linalg.inv(sklearn.covariance.empirical_covariance(features - means[labels], assume_centered=True))
    wanted = -scipy.spatial.distance.cdist(new, means, "mahalanobis", VI=inverse).min(1) ** 2
    np.testing.assert_allclose(fitted(new), wanted, rtol=1e-3)


def test_mahalanobis_ignores_a_feature_that_never_varies():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(100, 4)), np.arange(100) % 2
    wide = np.concatenate([features, np.ones((100, 1))], 1)
    new = rng.normal(size=(5, 4)).astype(np.float32)
    at = ood.fit_mahalanobis(wide, labels, 2)(np.concatenate([new, np.ones((5, 1), np.float32)], 1))
    np.testing.assert_allclose(at, ood.fit_mahalanobis(features, labels, 2)(new), rtol=1e-4)
    with pytest.raises(InputError, match="class 2"):
        ood.fit_mahalanobis(features, labels, 3)


def _line(weights, images):
    return images.reshape(len(images), -1) @ weights


def test_odin_of_a_linear_model_and_no_second_compilation():
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(12, 4)), jnp.float32)
    images = jnp.asarray(rng.random((6, 2, 2, 3)), jnp.float32)
    logits = np.asarray(_line(weights, images), np.float64) / 10
    p, best = scipy.special.softmax(logits, 1), logits.argmax(1)
    gradient = np.asarray(weights).T[best] - p @ np.asarray(weights).T
    moved = np.asarray(images).reshape(6, -1) + 0.05 * np.sign(gradient)
    wanted = scipy.special.softmax(moved @ np.asarray(weights, np.float64) / 10, 1).max(1)
    predict = jax.tree_util.Partial(_line, weights)
    np.testing.assert_allclose(ood.odin(predict, images, 10.0, 0.05), wanted, rtol=1e-4)
    before = ood.odin._cache_size()
    ood.odin(jax.tree_util.Partial(_line, weights + 1), images, 20.0, 0.01)
    assert ood.odin._cache_size() == before

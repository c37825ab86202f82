"""For a linear network the smallest change is known exactly, in every norm and with the box."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlcourse.adversarial import minimal
from dlcourse.adversarial.carlini_wagner import carlini_wagner
from dlcourse.adversarial.ddn import ddn
from dlcourse.adversarial.deepfool import deepfool
from dlcourse.adversarial.ead import ead
from dlcourse.adversarial.fmn import fmn
from dlcourse.adversarial.threat import Threat

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)


@jax.jit
def logits(weights, images):
    return (images - 0.5).reshape(len(images), -1) @ weights


def problem(spread, classes, count=24):
    """A linear network of some classes on 4x4 pixels, images within 0.5 +- spread, and what it says of them."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(16, classes)).astype(np.float32)
    images = (0.5 + spread * rng.uniform(-1, 1, (count, 4, 4, 1))).astype(np.float32)
    predict = jax.tree_util.Partial(logits, jnp.asarray(weights))
    return predict, weights, jnp.asarray(images), predict(images).argmax(-1)


def exact(weights, image, label, norm, aims=None):
    """The smallest change of one image within [0, 1] after which no class is below the label; or the aims' classes."""
    x = np.asarray(image, np.float64).ravel()
    best = np.inf
    for rival in range(weights.shape[1]) if aims is None else aims:
        if rival != label:
            slope = weights[:, rival].astype(np.float64) - weights[:, label]
            room = np.where(slope > 0, 1 - x, x)
            best = min(best, _least(np.abs(slope), room, -(x - 0.5) @ slope, norm))
    return best


def _least(slope, room, gap, norm):
    if (slope * room).sum() < gap:
        return np.inf
    if norm in ("l1", "l0"):  # the most effective pixels first, each as far as it goes; the last in part
        order = np.argsort(-slope if norm == "l1" else -slope * room)
        gains, lengths = (slope * room)[order], room[order]
        whole = int(np.searchsorted(np.cumsum(gains), gap))
        if norm == "l0":
            return whole + 1
        return lengths[:whole].sum() + (gap - gains[:whole].sum()) / slope[order[whole]]
    change = (lambda t: np.minimum(t, room)) if norm == "linf" else (lambda t: np.minimum(t * slope, room))
    low, high = 0.0, 1.0 if norm == "linf" else 1e3
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if slope @ change(middle) >= gap else (middle, high)
    return np.linalg.norm(change(high), np.inf if norm == "linf" else 2)


AWAY, AT_BOX = 0.2, 0.5  # how far pixels are from grey: where the smallest change keeps within the box, and not
ATTACKS = {
    "ddn": (functools.partial(ddn, steps=300, radius=0.1), "l2"),
    "fmn linf": (functools.partial(fmn, steps=300, step_size=0.1), "linf"),
    "fmn l2": (functools.partial(fmn, steps=300, step_size=0.1), "l2"),
    "fmn l1": (functools.partial(fmn, steps=300, step_size=0.1), "l1"),
    "carlini_wagner": (functools.partial(carlini_wagner, steps=3000, rounds=15, step_size=3e-3, constant=0.01), "l2"),
    # S moves by beta in each step of step_size: L1 weighs ten times as much as L2 here, whose optimum is another one.
    "ead": (functools.partial(ead, steps=3000, rounds=12, constant=0.01, step_size=1e-3, rule="L1", beta=0.01), "l1"),
}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_deepfool_is_exact_in_one_step(norm):
    predict, weights, images, labels = problem(AWAY, classes=4)
    truth = np.array([exact(weights, x, y, norm) for x, y in zip(images, labels, strict=True)])
    found = deepfool(KEY, predict, images, labels, Threat(norm=norm, eps=1.0), steps=1)
    assert found.success.all()
    np.testing.assert_allclose(found.norm, 1.02 * (truth + 1e-4), rtol=1e-4)
    nearly = deepfool(KEY, predict, images, labels, Threat(norm=norm, eps=1.0), steps=1, overshoot=0.0)
    np.testing.assert_allclose(minimal.distances(nearly), truth, atol=1e-3)


@pytest.mark.parametrize("spread", [AWAY, AT_BOX])
@pytest.mark.parametrize("name", ATTACKS)
def test_smallest_change(name, spread):
    # Of several rivals these attacks follow the one of the smallest margin, which need not be the nearest.
    attack, norm = ATTACKS[name]
    predict, weights, images, labels = problem(spread, classes=2)
    truth = np.array([exact(weights, x, y, norm) for x, y in zip(images, labels, strict=True)])
    found = np.asarray(minimal.distances(attack(KEY, predict, images, labels, Threat(norm=norm, eps=100.0))))
    assert (found > truth - 1e-5).all(), "shorter than possible"
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-3)


def test_fewest_pixels():
    predict, weights, images, labels = problem(AT_BOX, classes=2)
    sides = np.sign(weights[:, labels] - weights[:, 1 - labels]).T.reshape(images.shape)
    images = jnp.clip(images + 0.5 * sides, 0, 1)
    truth = np.array([exact(weights, x, y, "l0") for x, y in zip(images, labels, strict=True)])
    assert truth.min() > 1 and truth.max() > 3
    found = np.asarray(minimal.distances(fmn(KEY, predict, images, labels, Threat(norm="l0", eps=16.0))))
    assert (found >= truth).all()
    assert (found == truth).mean() > 0.8 and (found - truth).max() <= 1, (truth, found)


@pytest.mark.parametrize("name", ATTACKS)
def test_targets_are_reached(name):
    # With the target's boundary alone in mind nothing shorter is possible; the other classes may cost more.
    attack, norm = ATTACKS[name]
    predict, weights, images, labels = problem(AWAY, classes=4)
    targets = (labels + 1) % 4
    found = attack(KEY, predict, images, labels, Threat(norm=norm, eps=100.0), targets=targets)
    assert found.success.all() and (predict(found.images).argmax(-1) == targets).all()
    least = np.array([exact(weights, x, y, norm, [t]) for x, y, t in zip(images, labels, targets, strict=True)])
    ratio = np.asarray(found.norm) / least
    assert (ratio > 1 - 1e-4).all() and np.median(ratio) < 1.2, ratio

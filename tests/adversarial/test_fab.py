"""FAB against its authors' code, and against what is the truth for a linear network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlcourse.adversarial.fab import _nearest, descend, fab, fab_t
from dlcourse.adversarial.projections import NORMS, onto_hyperplane
from dlcourse.adversarial.threat import Threat, size
from dlcourse.contracts import InputError
from tests.adversarial.small import digits, golden, linear, maker, network, silent, smallest_change

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)


def near_the_middle(predict, count=12, shape=(4, 4, 2)):
    """Images whose nearest boundary is far nearer than the box, and what a linear network says of them."""
    images = 0.5 + 0.05 * jax.random.normal(jax.random.key(7), (count, *shape))
    return images, predict(images).argmax(-1)


def same_norms(ours, theirs):
    assert np.median(ours) == pytest.approx(np.median(theirs), rel=0.01)
    return np.isclose(ours, theirs, rtol=0.02).mean()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("form", ["fab", "fab_t"])
def test_success_is_that_of_the_authors_code(form, norm):
    images, labels = digits(maker.COUNT)
    threat = Threat(eps=maker.EPS[norm], norm=norm)
    found = {"fab": fab, "fab_t": fab_t}[form](KEY, network(), images, labels, threat)
    theirs = golden[f"{form}_{norm}_success"]
    assert (np.asarray(found.success) == theirs).mean() >= 0.995
    both = np.asarray(found.success) & theirs
    assert same_norms(np.asarray(found.norm)[both], golden[f"{form}_{norm}_norm"][both]) > 0.9


@pytest.mark.parametrize("norm", NORMS)
def test_smallest_change_is_that_of_the_authors_code(norm):
    images, _ = digits(maker.COUNT)
    labels = network()(images).argmax(-1)
    found = fab(KEY, network(), images, labels, Threat(eps=1e3, norm=norm))
    assert found.success.all()
    assert same_norms(np.asarray(found.norm), golden[f"smallest_{norm}_norm"]) > 0.9


@pytest.mark.parametrize("norm", NORMS)
def test_restart_is_that_of_the_authors_code(norm):
    images, _ = digits(maker.COUNT)
    labels = network()(images).argmax(-1)
    drawn = maker.unit_draws("rand" if norm == "linf" else "randn", (maker.COUNT, 3, 10, 10))
    drawn = jnp.asarray(2 * drawn - 1 if norm == "linf" else drawn).transpose(0, 2, 3, 1)
    start = jnp.clip(images + maker.EPS[norm] / 2 * drawn / size(drawn, norm)[:, None, None, None], 0, 1)
    _, found, taken = descend(network(), images, start, labels, Threat(eps=maker.EPS[norm], norm=norm),
                              lambda x: _nearest(network(), x, labels, norm), None, jnp.ones(len(images), bool), 100,
                              (0.1, 1.05, 0.9))
    assert taken == 100
    assert same_norms(np.asarray(found), golden[f"restart_{norm}_norm"]) > 0.9


@pytest.mark.parametrize("norm", NORMS)
def test_linear_network_is_crossed_at_its_closed_form(norm):
    predict = linear(jax.random.key(3), 5, 32)
    images, labels = near_the_middle(predict)
    exact = smallest_change(predict, images, norm)
    threat = Threat(eps=100.0, norm=norm, low=-100.0, high=100.0)
    for attack in (fab, fab_t):
        found = attack(KEY, predict, images, labels, threat, eta=1.0005)
        if attack is fab:  # fab_t tries the likeliest class alone once that succeeds
            np.testing.assert_allclose(found.norm, exact, rtol=1e-3)
        assert (found.norm >= exact * (1 - 1e-5)).all() and found.success.all()
    # An overshoot of 5 % after every return by 10 % leaves about 1 %.
    published = fab(KEY, predict, images, labels, threat).norm / exact
    assert (published >= 1).all() and (published < 1.015).all()


@pytest.mark.parametrize("norm", NORMS)
def test_linear_network_with_the_box_in_the_way(norm):
    predict = linear(jax.random.key(4), 2, 32)
    images = jax.random.uniform(jax.random.key(5), (20, 4, 4, 2)).round(0) * 0.9 + 0.05
    labels = predict(images).argmax(-1)
    weights, logits = predict.args[0], predict(images)
    sign = jnp.where(labels == 0, 1.0, -1.0)
    normals = sign[:, None, None, None] * (weights[:, 0] - weights[:, 1]).reshape(1, 4, 4, 2)
    exact = size(onto_hyperplane(images, normals, sign * (logits[:, 0] - logits[:, 1]), norm, 0.0, 1.0), norm)
    found = fab(KEY, predict, images, labels, Threat(eps=100.0, norm=norm), eta=1.0005)
    assert (exact > 1.01 * smallest_change(predict, images, norm)).any()
    np.testing.assert_allclose(found.norm[found.success], exact[found.success], rtol=2e-3)
    assert found.success.mean() > 0.9


@pytest.mark.parametrize("attack", [fab, fab_t])
def test_returns_the_original_where_the_change_is_larger_than_eps(attack):
    predict = linear(jax.random.key(3), 5, 32)
    images, labels = near_the_middle(predict)
    exact = smallest_change(predict, images, "l2")
    eps = float(np.sort(exact)[7:9].mean())
    found = attack(KEY, predict, images, labels, Threat(eps=eps, norm="l2"), eta=1.0005)  # published: 1 % too far
    expected = exact < eps
    assert (np.abs(exact / eps - 1) > 2e-3).all()
    np.testing.assert_array_equal(found.success, expected)
    np.testing.assert_array_equal(found.images[~found.success], images[~found.success])
    assert np.isfinite(found.loss).all() and ((found.loss > 0) == found.success).all()
    single = found.queries[expected]
    assert (single == 202).all() and (found.queries[~expected] >= 202).all()


def test_misclassified_images_are_left_alone_and_fooled_ones_spared_further_restarts():
    images, labels = digits(30)
    wrong = labels.at[:4].set((network()(images).argmax(-1)[:4] + 1) % 10)
    found = fab(KEY, network(), images, wrong, Threat(eps=0.02), restarts=3, steps=10)
    assert (found.norm[:4] == 0).all() and found.success[:4].all() and (found.queries[:4] == 1).all()
    once = fab(KEY, network(), images, wrong, Threat(eps=0.02), steps=10)
    np.testing.assert_array_equal(found.images[once.success], once.images[once.success])
    assert (found.queries[~found.success] == 1 + 3 * 21).all()


@pytest.mark.parametrize("norm", NORMS)
def test_target_is_what_the_images_are_taken_for(norm):
    images, _ = digits(40)
    labels = network()(images).argmax(-1)
    targets = (labels + 1 + jnp.arange(40) % 9) % 10
    threat = Threat(eps=3 * maker.EPS[norm], norm=norm)
    found = fab(KEY, network(), images, labels, threat, targets=targets, steps=40)
    assert (network()(found.images).argmax(-1) == targets)[found.success].all() and found.success.any()
    assert (found.norm <= threat.eps).all()
    assert (found.images >= 0).all() and (found.images <= 1).all()
    untargeted = fab(KEY, network(), images, labels, threat, steps=40)
    assert np.median(found.norm[found.success]) > np.median(untargeted.norm[untargeted.success])


@pytest.mark.parametrize("attack", [fab, fab_t])
@pytest.mark.parametrize("norm", NORMS)
def test_examples_do_not_know_of_their_batch(attack, norm):
    images, labels = digits(9)
    threat = Threat(eps=0.2 * maker.EPS[norm], norm=norm)
    keys = jax.random.split(KEY, 9)
    whole = attack(keys, network(), images, labels, threat, steps=8, restarts=2)
    order = jnp.array([8, 2, 5])
    part = attack(keys[order], network(), images[order], labels[order], threat, steps=8, restarts=2)
    np.testing.assert_allclose(part.images, whole.images[order], atol=1e-5)
    np.testing.assert_array_equal(part.queries, whole.queries[order])
    assert not whole.success.all()


def test_nothing_is_compiled_again():
    images, labels = digits(5)
    fab(KEY, network(), images, labels, Threat(eps=0.1), steps=2, targets=(labels + 1) % 10)
    fab_t(KEY, network(), images, labels, Threat(eps=0.1), steps=2, eta=1.05)
    sizes = fab._cache_size(), fab_t._cache_size()
    fab(jax.random.key(1), network(1.1), images, labels, Threat(eps=0.2), steps=2, targets=(labels + 2) % 10)
    fab_t(KEY, network(1.1), images, labels, Threat(eps=0.2), steps=2, eta=1.1)
    assert (fab._cache_size(), fab_t._cache_size()) == sizes


def test_logits_that_are_not_finite_are_no_success():
    images, labels = digits(3)
    for attack in (fab, fab_t):
        found = attack(KEY, jax.tree_util.Partial(silent), images, labels % 3, Threat(eps=0.3), steps=3)
        assert not found.success.any()
        np.testing.assert_array_equal(found.images, images)


def test_restarts_begin_half_of_eps_away():
    from dlcourse.adversarial.fab import _half_way
    images = jnp.full((6, 5, 5, 3), 0.5)
    for norm in NORMS:
        start = _half_way(jax.random.split(KEY, 6), images, Threat(eps=0.4, norm=norm))
        np.testing.assert_allclose(size(start - images, norm), 0.2, rtol=1e-5)
        assert len(np.unique(start[:, 0, 0, 0])) == 6


def test_what_it_does_not_have_is_an_error():
    images, labels = digits(2)
    for attack in (fab, fab_t):
        with pytest.raises(InputError, match="l0"):
            attack(KEY, network(), images, labels, Threat(eps=3, norm="l0"))
    with pytest.raises(InputError, match="for given targets take fab"):
        fab_t(KEY, network(), images, labels, Threat(eps=3.0), targets=labels + 1)

"""Gradient attacks and noise: closed forms on a linear classifier, geometry, and what must not matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlcourse import models
from dlcourse.adversarial import estimated, gradient, objectives, threat
from dlcourse.adversarial.threat import Threat
from dlcourse.contracts import InputError
from dlcourse.training import evaluation
from tests.adversarial import linear

KEY = jax.random.key(0)
ATTACKS = {"fgsm": gradient.fgsm, "n_fgsm": gradient.n_fgsm, "pgd": functools.partial(gradient.pgd, steps=20),
           "noise": functools.partial(gradient.noise, draws=5)}


@pytest.fixture(scope="module")
def convnet():
    model = models.create("convnet,width=4", 10, (8, 8, 1))
    images = jax.random.uniform(jax.random.key(1), (12, 8, 8, 1))
    predict = evaluation.predictor(model, model.init(jax.random.key(2), images))
    return predict, images, predict(images).argmax(-1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_a_linear_network_is_fooled_exactly_from_its_smallest_change_on(name, norm):
    predict, *_ = linear.network()
    images, labels = linear.examples()
    least = linear.smallest(images, labels, norm)
    for factor in (0.999, 1.001):
        eps = jnp.asarray(factor * least)
        how = {"step_size": eps / 2, "steps": 60} if name == "pgd" else {}
        found = getattr(gradient, name)(KEY, predict, images, labels, Threat(eps=eps, norm=norm),
                                        objective="margin", **how)
        # The class that is nearest by logits need not be the one that is nearest by images.
        assert found.success.mean() == 0 if factor < 1 else found.success.mean() >= 0.9


def test_a_target_is_not_reached_before_its_distance():
    predict, *_ = linear.network()
    images, labels = linear.examples()
    targets = (labels + 1) % linear.CLASSES
    least = linear.smallest(images, labels, "linf", targets)
    for factor in (0.999, 1.5):
        found = gradient.pgd(KEY, predict, images, labels, Threat(eps=jnp.asarray(factor * least)), targets=targets,
                             objective="margin", steps=100)
        assert found.success.mean() == 0 if factor < 1 else found.success.mean() >= 0.9


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_leaves_the_threat(name, norm, convnet):
    predict, images, labels = convnet
    eps = {"linf": 0.3, "l2": 2.0, "l1": 6.0}[norm]
    found = ATTACKS[name](KEY, predict, images, labels, Threat(eps=eps, norm=norm))
    assert float(found.norm.max()) <= eps * (1 + 1e-6)
    assert float(found.images.min()) >= 0 and float(found.images.max()) <= 1
    np.testing.assert_array_equal(found.success, predict(found.images).argmax(-1) != labels)
    np.testing.assert_allclose(found.norm, threat.size(found.images - images, norm), rtol=1e-6)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_example_does_not_know_its_neighbours(name, convnet):
    predict, images, labels = convnet
    keys = threat.example_keys(KEY, len(images))
    whole = ATTACKS[name](keys, predict, images, labels, Threat(eps=0.1))
    order = jnp.array([7, 2, 5])
    part = ATTACKS[name](keys[order], predict, images[order], labels[order], Threat(eps=0.1))
    np.testing.assert_allclose(part.images, whole.images[order], atol=1e-6)
    np.testing.assert_array_equal(part.queries, whole.queries[order])


def test_other_weights_sizes_and_targets_compile_nothing(convnet):
    predict, images, labels = convnet
    gradient.pgd(KEY, predict, images, labels, Threat(eps=0.1), targets=(labels + 1) % 10, steps=3)
    before = gradient.pgd._cache_size()
    other = jax.tree.map(lambda x: x + 0.1, predict)
    gradient.pgd(KEY, other, images, labels, Threat(eps=0.2), targets=(labels + 2) % 10, steps=3)
    assert gradient.pgd._cache_size() == before


def test_more_restarts_and_larger_changes_never_help_the_network(convnet):
    predict, images, labels = convnet
    def accuracy(eps, restarts):
        return 1 - float(gradient.pgd(KEY, predict, images, labels, Threat(eps=eps), restarts=restarts).success.mean())

    assert accuracy(0.05, 3) <= accuracy(0.05, 1)
    falling = [accuracy(eps, 1) for eps in (0.01, 0.1, 0.5)]
    assert falling == sorted(falling, reverse=True) and falling[-1] < falling[0]


def test_logits_that_are_not_finite_are_a_failure(convnet):
    _, images, labels = convnet
    found = gradient.fgsm(KEY, jax.tree_util.Partial(lambda x: jnp.full((len(x), 10), jnp.nan)), images, labels,
                          Threat(eps=0.1))
    assert not bool(found.success.any())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_a_projection_is_within_and_the_nearest(norm):
    change = jax.random.normal(jax.random.key(3), (20, 3, 4, 2))
    eps = {"linf": 0.5, "l2": 1.0, "l1": 2.0, "l0": 4.5}[norm]
    near = threat.project(change, norm, eps)
    assert float(threat.size(near, norm).max()) <= eps * (1 + 1e-6)
    np.testing.assert_allclose(threat.project(near, norm, eps), near, atol=1e-6)
    if norm == "l0":
        return
    # The nearest point of a convex set makes no acute angle with any other of it.
    others = threat.random_start(threat.example_keys(KEY, 20), jnp.zeros_like(change),
                                 Threat(eps=eps, norm=norm, low=-9.0, high=9.0))
    inner = ((change - near) * (others - near)).sum((1, 2, 3))
    assert float(inner.max()) < 1e-4


def test_starts_fill_the_ball_evenly():
    images = jnp.full((4000, 2, 1, 1), 0.5)
    for norm, area in (("linf", 4.0), ("l2", np.pi), ("l1", 2.0)):
        x = threat.random_start(threat.example_keys(KEY, 4000), images, Threat(eps=0.3, norm=norm)) - 0.5
        small = threat.size(x, norm) <= 0.15
        np.testing.assert_allclose(float(small.mean()), 0.25, atol=0.03)  # half the radius, a quarter of the area
        square = jnp.all(jnp.abs(x) <= 0.1, axis=(1, 2, 3)).mean()
        np.testing.assert_allclose(float(square), 0.04 / (area * 0.09), atol=0.03)


def test_objectives_are_those_of_the_papers():
    logits = jnp.array([[3.0, 1.0, 0.5, -1.0], [0.0, 2.0, 1.0, 4.0]])
    labels, targets = jnp.array([0, 1]), jnp.array([2, 0])
    np.testing.assert_allclose(objectives.margin(logits, labels), [-2.0, 2.0])
    np.testing.assert_allclose(objectives.dlr(logits, labels), [-2.0 / 2.5, 2.0 / 3.0], rtol=1e-6)
    np.testing.assert_allclose(objectives.dlr(logits, labels, targets), [-2.5 / (3 - (0.5 - 1) / 2),
                                                                       -2.0 / (4 - (1 + 0) / 2)], rtol=1e-6)
    np.testing.assert_allclose(objectives.cross_entropy(logits, labels), -jax.nn.log_softmax(logits)[[0, 1], labels])
    np.testing.assert_allclose(objectives.dlr(100 * logits + 3, labels), objectives.dlr(logits, labels), rtol=1e-4)


@pytest.mark.parametrize(("change", "said"), [
    ({"eps": 0.0}, "eps=0"), ({"eps": 2.0}, "beyond the box"), ({"norm": "l0"}, "linf, l2"), ({"low": 0.6}, "outside")])
def test_what_no_attack_can_work_with_is_one_line(change, said):
    images, labels = linear.examples(4)
    with pytest.raises(InputError, match=said):
        threat.checked(Threat(**{"eps": 0.1, **change}), images, norms=("linf", "l2"))


@pytest.mark.parametrize(("norm", "eps", "shape"), [
    ("linf", 1.0, (2, 2, 1)), ("l2", 2.0, (2, 2, 1)), ("l1", 12.0, (2, 2, 3)), ("l0", 4.0, (2, 2, 3))])
def test_a_threat_reaches_across_the_box_and_no_farther(norm, eps, shape):
    images = jnp.zeros((2, *shape))
    threat.checked(Threat(eps=eps, norm=norm), images)
    with pytest.raises(InputError, match=f"{eps:g} wide in {norm}"):
        threat.checked(Threat(eps=1.01 * eps, norm=norm), images)


@pytest.mark.parametrize("attack", [gradient.fgsm, gradient.n_fgsm, gradient.pgd, gradient.noise, estimated.spsa,
                                    estimated.nes])
def test_a_norm_that_an_attack_has_not_is_refused(attack):
    predict, *_ = linear.network()
    with pytest.raises(InputError, match="norm 'l0': this attack has linf, l2, l1"):
        attack(KEY, predict, *linear.examples(4), Threat(eps=2.0, norm="l0"))


@pytest.mark.parametrize("attack", [gradient.fgsm, gradient.n_fgsm, gradient.pgd, estimated.spsa, estimated.nes])
def test_an_objective_that_there_is_not_is_refused(attack):
    predict, *_ = linear.network()
    two = jax.tree_util.Partial(lambda weights, x: jnp.stack([x.sum((1, 2, 3)), 1 - x.sum((1, 2, 3))], 1), 0)
    with pytest.raises(InputError, match="objective 'luck'"):
        attack(KEY, predict, *linear.examples(4), Threat(eps=0.1), objective="luck")
    with pytest.raises(InputError, match="2 classes: dlr needs at least 3"):
        attack(KEY, two, *linear.examples(4), Threat(eps=0.1), objective="dlr")


@pytest.mark.parametrize("kind", gradient.KINDS)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_noise_is_as_large_as_said(kind, norm):
    predict, *_ = linear.network()
    found = gradient.noise(KEY, predict, *linear.examples(), Threat(eps=0.3, norm=norm), kind=kind)
    sizes = found.norm[found.norm > 0]
    assert float(sizes.max()) <= 0.3 * (1 + 1e-6) and float(sizes.min()) >= (0.2 if kind == "uniform" else 0.3 - 1e-6)
    if kind == "sign":
        moved = jnp.abs(found.images - linear.examples()[0])[found.norm > 0]
        np.testing.assert_allclose(moved, jnp.broadcast_to(moved[0, 0, 0, 0], moved.shape), rtol=1e-4)
    with pytest.raises(InputError, match="kind 'loud'"):
        gradient.noise(KEY, predict, *linear.examples(), Threat(eps=0.3, norm=norm), kind="loud")


def test_the_noise_before_a_step_stays_in_the_box():
    """At black pixels whose gradient points up a step ends at eps at least, from wherever in the box it began."""
    predict = jax.tree_util.Partial(lambda weights, x: jnp.stack([-x.sum((1, 2, 3)), x.sum((1, 2, 3))], 1), 0)
    images = jnp.zeros((5, 4, 4, 1))
    found = gradient.n_fgsm(KEY, predict, images, jnp.zeros(5, jnp.int32), Threat(eps=0.1), clip=False)
    assert float(found.images.min()) >= 0.1 and float(found.images.max()) > 0.15


def test_small_gradients_have_a_direction_and_broken_ones_none():
    slope = jnp.array([3e-25, -4e-25, jnp.nan]).reshape(1, 1, 3, 1)
    np.testing.assert_allclose(threat.steepest(slope, "l2").ravel(), [0.6, -0.8, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(threat.steepest(slope, "linf").ravel(), [1, -1, 0])
    np.testing.assert_array_equal(threat.steepest(slope, "l1").ravel(), [0, -1, 0])
    np.testing.assert_array_equal(threat.steepest(jnp.zeros((1, 2, 2, 1)), "l2"), jnp.zeros((1, 2, 2, 1)))


def test_targets_and_classes_are_checked():
    images, labels = linear.examples(4)
    with pytest.raises(InputError, match="own label"):
        threat.checked(Threat(eps=0.1), images, labels, targets=labels)
    with pytest.raises(InputError, match="at least 3"):
        threat.checked(Threat(eps=0.1), images, classes=2, least=3)
    with pytest.raises(InputError, match="divide bytes"):
        threat.checked(Threat(eps=0.1), (255 * images).astype(jnp.uint8))

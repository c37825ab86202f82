"""What holds for every attack that looks for the smallest change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlcourse import models
from dlcourse.adversarial import minimal, threat
from dlcourse.adversarial.carlini_wagner import carlini_wagner
from dlcourse.adversarial.ddn import ddn
from dlcourse.adversarial.deepfool import deepfool
from dlcourse.adversarial.ead import ead
from dlcourse.adversarial.fmn import fmn
from dlcourse.adversarial.threat import Threat
from dlcourse.contracts import InputError
from dlcourse.training.evaluation import predictor

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)
SHORT = dict(steps=40, rounds=3, constant=1.0)
ATTACKS = {
    "deepfool": (deepfool, "l2", {}),
    "ddn": (ddn, "l2", dict(steps=20, radius=0.5)),
    "fmn linf": (fmn, "linf", dict(steps=20, step_size=0.3)),
    "fmn l1": (fmn, "l1", dict(steps=20, step_size=0.3)),
    "fmn l0": (fmn, "l0", dict(steps=20)),
    "carlini_wagner": (carlini_wagner, "l2", SHORT),
    "ead": (ead, "l1", SHORT),
}
MODEL = models.create("mlp,width=16,depth=1", 5, (4, 4, 2))
IMAGES = jax.random.uniform(jax.random.key(7), (12, 4, 4, 2))


@functools.cache
def variables(seed):
    return MODEL.init(jax.random.key(seed), IMAGES)


def problem(seed=1):
    """A network that nobody trained, and images of which the first it already gets wrong."""
    predict = predictor(MODEL, variables(seed))
    labels = predict(IMAGES).argmax(-1)
    return predict, labels.at[0].set((labels[0] + 1) % 5)


@pytest.fixture(params=ATTACKS)
def attack(request):
    function, norm, options = ATTACKS[request.param]
    return functools.partial(function, **options), norm


def test_results_are_what_they_say(attack):
    run, norm = attack
    predict, labels = problem()
    found = run(KEY, predict, IMAGES, labels, Threat(norm=norm, eps=jnp.inf))
    logits = predict(found.images)
    assert found.success.mean() > 0.7
    np.testing.assert_array_equal(found.success, logits.argmax(-1) != labels)
    np.testing.assert_allclose(found.norm, threat.size(found.images - IMAGES, norm), rtol=1e-5)
    assert (found.images >= 0).all() and (found.images <= 1).all() and found.images.dtype == jnp.float32
    np.testing.assert_array_equal(found.images[0], IMAGES[0])  # was wrong already
    assert found.norm[0] == 0 and found.queries[0] < found.queries[1:].min()
    lost = ~np.asarray(found.success)
    np.testing.assert_array_equal(found.images[lost], IMAGES[lost])
    assert np.isinf(minimal.distances(found)[lost]).all() and np.isfinite(minimal.distances(found)[~lost]).all()


def test_eps_only_judges_and_nothing_compiles_again(attack):
    run, norm = attack
    predict, labels = problem()
    free = run(KEY, predict, IMAGES, labels, Threat(norm=norm, eps=100.0))
    compiled = run.func._cache_size()
    eps = float(np.median(minimal.distances(free)))
    judged = run(KEY, predict, IMAGES, labels, Threat(norm=norm, eps=eps))
    np.testing.assert_array_equal(judged.images, free.images)
    np.testing.assert_array_equal(judged.success, np.asarray(free.success & (free.norm <= eps)))
    assert 0 < judged.success.mean() < 1
    np.testing.assert_array_equal(minimal.distances(judged), minimal.distances(free))
    other, labels = problem(seed=2)
    run(KEY, other, 1 - IMAGES, labels, Threat(norm=norm, eps=eps, low=-0.5, high=2.0))
    assert run.func._cache_size() == compiled


def test_neighbours_do_not_matter(attack):
    run, norm = attack
    predict, labels = problem()
    keys = threat.example_keys(KEY, len(IMAGES))
    together = run(keys, predict, IMAGES, labels, Threat(norm=norm, eps=jnp.full(len(IMAGES), 100.0)))
    for part in (slice(0, 5), slice(5, 12)):
        alone = run(keys[part], predict, IMAGES[part], labels[part],
                    Threat(norm=norm, eps=jnp.full(len(IMAGES[part]), 100.0)))
        np.testing.assert_allclose(alone.images, together.images[part], atol=2e-4)
        np.testing.assert_array_equal(alone.success, together.success[part])
        np.testing.assert_array_equal(alone.queries, together.queries[part])


def test_works_inside_jit_and_vmap(attack):
    run, norm = attack
    predict, labels = problem()
    whole = run(KEY, predict, IMAGES, labels, Threat(norm=norm, eps=100.0))

    @jax.jit
    def apart(images, labels):
        def one(image, label):
            return run(KEY, predict, image[None], label[None], Threat(norm=norm, eps=100.0))
        return jax.tree.map(lambda x: x[:, 0], jax.vmap(one)(images, labels))

    found = apart(IMAGES, labels)
    np.testing.assert_allclose(found.norm, whole.norm, rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(found.success, whole.success)


def test_a_network_that_says_nan_is_never_fooled(attack):
    run, norm = attack
    predict, labels = problem()

    @jax.tree_util.Partial
    def broken(images):  # once any pixel is off the original, as sqrt of a negative number
        off = jnp.abs(images - images.round(2)).reshape(len(images), -1).sum(-1)
        return jnp.where((off > 1e-4)[:, None], jnp.nan, 1.0) * jax.nn.one_hot(jnp.zeros(len(images), int), 5)

    images = IMAGES.round(2)
    found = run(KEY, broken, images, jnp.zeros(len(images), int), Threat(norm=norm, eps=100.0))
    assert not found.success.any() and jnp.isinf(minimal.distances(found)).all()
    np.testing.assert_array_equal(found.images, images)


def test_bad_input():
    predict, labels = problem()
    for run, norms in ((deepfool, ("l1", "l0")), (ddn, ("linf", "l1")), (carlini_wagner, ("linf",)), (ead, ("l2",))):
        for norm in norms:
            with pytest.raises(InputError, match=f"norm '{norm}': this attack has"):
                run(KEY, predict, IMAGES, labels, Threat(norm=norm, eps=1.0))
    with pytest.raises(InputError, match="no targeted form"):
        deepfool(KEY, predict, IMAGES, labels, Threat(norm="l2", eps=1.0), targets=labels)
    with pytest.raises(InputError, match="candidates=1"):
        deepfool(KEY, predict, IMAGES, labels, Threat(norm="l2", eps=1.0), candidates=1)
    with pytest.raises(InputError, match="rule 'EL'"):
        ead(KEY, predict, IMAGES, labels, Threat(norm="l1", eps=1.0), rule="EL")


def test_ddn_leaves_a_place_without_gradient_in_a_random_direction():
    @jax.tree_util.Partial
    def steep(images):  # class 0 with certainty, unless the pixels move off their mean
        far = jnp.square(images - 0.5).reshape(len(images), -1).sum(-1) > 0.01
        return jnp.stack([jnp.where(far, 0.0, 1.0), jnp.where(far, 1.0, 0.0)], -1) * 200

    images = jnp.full((3, 4, 4, 1), 0.5)
    found = ddn(KEY, steep, images, jnp.zeros(3, int), Threat(norm="l2", eps=1.0))
    assert found.success.all()
    np.testing.assert_allclose(found.norm, 0.1, rtol=0.05)
    assert not jnp.allclose(found.images[0], found.images[1])


def test_the_constant_is_bisected():
    """The least constant from which an attempt succeeds is found to within a factor of 2^-rounds."""
    needed = jnp.array([0.03, 0.7, 1e9])

    def attempt(constants, nearest):
        won = constants >= needed
        return nearest.update(jnp.zeros((3, 1, 1, 1)), jnp.where(won, constants, 1.0), won), won

    begun = minimal.Nearest(jnp.ones((3, 1, 1, 1)), jnp.full(3, jnp.inf), jnp.zeros(3, int))
    found = minimal.over_constants(attempt, begun, 1e-3, 15)
    np.testing.assert_allclose(found.distance[:2], needed[:2], rtol=1e-2)
    assert (found.distance[:2] >= needed[:2]).all() and jnp.all(found.images[:2] == 0)
    assert jnp.isclose(found.distance[2], 1e9, rtol=0.1) or found.images[2, 0, 0, 0] == 0

"""Attacks on decisions: closed forms on linear networks, Foolbox's results on the same weights, and their contract."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlcourse import models
from dlcourse.adversarial import decision
from dlcourse.adversarial.threat import Threat, example_keys
from dlcourse.contracts import InputError
from dlcourse.training import evaluation

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)


@jax.jit
def linear(weights, images):
    return jnp.einsum("bd,dk->bk", images.reshape(len(images), -1) - 0.5, weights)


@jax.jit
def two_layers(weights, images):
    hidden, hidden_bias, last, last_bias = weights
    hidden = jax.nn.relu(jnp.dot(images.reshape(len(images), -1), hidden) + hidden_bias[None])
    return jnp.dot(hidden, last) + last_bias[None]


def problem(classes=2, count=12, seed=0):
    """Images on which the box is never met, a linear network, its own predictions as labels."""
    rng = np.random.default_rng(seed)
    weights = jnp.asarray(rng.normal(size=(64, classes)), jnp.float32)
    images = jnp.asarray(rng.uniform(0.35, 0.65, (count, 8, 8, 1)), jnp.float32)
    predict = jax.tree_util.Partial(linear, weights)
    return predict, images, predict(images).argmax(-1)


def smallest(predict, images, labels, norm):
    """|z_0 - z_1| / |w_0 - w_1|_q, q the dual norm, for two classes."""
    weights, = (np.asarray(w, np.float64) for w in predict.args)
    apart = weights[:, 0] - weights[:, 1]
    return np.abs(np.asarray(predict(images), np.float64) @ [1, -1]) / np.linalg.norm(apart, 1 if norm == "linf" else 2)


@pytest.mark.parametrize("attack, norm", [
    (decision.boundary, "l2"), (decision.hop_skip_jump, "l2"), (decision.hop_skip_jump, "linf")])
def test_reaches_the_closed_form_on_a_linear_network(attack, norm):
    predict, images, labels = problem()
    found = attack(KEY, predict, images, labels, Threat(norm=norm, eps=100.0))
    ratio = np.asarray(found.norm) / smallest(predict, images, labels, norm)
    assert np.all(found.success)
    assert ratio.min() > 1 - 1e-4 and ratio.max() < 1.02, ratio
    assert found.images.min() >= 0 and found.images.max() <= 1


@pytest.mark.parametrize("attack, norm", [("boundary", "l2"), ("hop_skip_jump", "l2"), ("hop_skip_jump", "linf")])
def test_comes_as_close_as_foolbox_on_the_same_weights(attack, norm):
    golden = np.load(pathlib.Path(__file__).parent / "golden/decision.npz")
    weights = tuple(jnp.asarray(golden[name]) for name in ("hidden", "hidden_bias", "last", "last_bias"))
    found = getattr(decision, attack)(
        KEY, jax.tree_util.Partial(two_layers, weights), jnp.asarray(golden["images"]), jnp.asarray(golden["labels"]),
        Threat(norm=norm, eps=100.0), start=jnp.asarray(golden["start"]))
    theirs = golden[f"{attack}_{norm}"]
    assert np.all(found.success)
    assert abs(np.median(found.norm) / np.median(theirs) - 1) < 0.03, (np.asarray(found.norm), theirs)


ATTACKS = [(functools.partial(decision.boundary, steps=200), "l2"),
           (functools.partial(decision.hop_skip_jump, steps=3), "linf")]


@pytest.mark.parametrize("attack, norm", ATTACKS)
def test_an_example_does_not_depend_on_its_batch(attack, norm):
    predict, images, labels = problem()
    keys, threat = example_keys(KEY, len(images)), Threat(norm=norm, eps=100.0)
    together = attack(keys, predict, images, labels, threat)
    alone = attack(keys[5:6], predict, images[5:6], labels[5:6], threat)
    np.testing.assert_allclose(together.norm[5], alone.norm[0], rtol=2e-3)
    assert together.queries[5] == alone.queries[0] or norm == "linf"
    assert not np.allclose(together.norm, attack(example_keys(jax.random.key(1), 12), predict, images, labels,
                                                 threat).norm, rtol=1e-6)


@pytest.mark.parametrize("attack, norm", ATTACKS)
def test_other_weights_eps_and_labels_do_not_compile_again(attack, norm):
    sizes = set()
    for seed in range(3):
        predict, images, labels = problem(seed=seed)
        attack(jax.random.key(seed), predict, images, labels, Threat(norm=norm, eps=0.1 + seed))
        sizes.add(attack.func._cache_size())
    assert len(sizes) == 1


@pytest.mark.parametrize("attack, norm", ATTACKS)
def test_leaves_alone_what_is_fooled_and_admits_where_it_found_no_start(attack, norm):
    predict, images, labels = problem()
    wrong = labels.at[0].set(1 - labels[0])
    found = attack(KEY, predict, images, wrong, Threat(norm=norm, eps=100.0))
    assert found.success[0] and found.norm[0] == 0 and found.queries[0] == 2
    constant = jax.tree_util.Partial(linear, jnp.zeros((64, 2)))
    none = attack(KEY, constant, images, jnp.zeros(12, jnp.int32), Threat(norm=norm, eps=100.0))
    assert not none.success.any() and np.all(none.norm == 0)
    near = attack(KEY, predict, images, labels, Threat(norm=norm, eps=1e-4))
    assert not near.success.any() and np.all(near.norm > 1e-4) and np.all(near.loss > 0)  # found, but beyond eps
    nan = attack(KEY, jax.tree_util.Partial(linear, jnp.full((64, 2), jnp.nan)), images, labels,
                 Threat(norm=norm, eps=100.0))
    assert not nan.success.any()


@pytest.mark.parametrize("attack, norm", ATTACKS)
def test_counts_the_queries_that_it_makes(attack, norm):
    asked = [0]

    def counted(images):  # once an image batch, also of those that vmap puts together
        jax.debug.callback(lambda _: asked.__setitem__(0, asked[0] + 1), images[0, 0, 0, 0])
        return linear(problem()[0].args[0], images)

    _, images, labels = problem(count=1)
    found = attack(KEY, jax.tree_util.Partial(counted), images, labels, Threat(norm=norm, eps=100.0))
    jax.effects_barrier()
    # A chunk is filled up with draws that do not count; whether x is fooled already is asked once for all.
    assert 0 <= asked[0] - int(found.queries[0]) <= 3 * 25, (asked[0], found.queries)


def test_targeted_from_the_nearest_image_of_the_target():
    predict, images, labels = problem(5)
    pool = problem(5, 60, seed=1)[1]
    targets = (labels + 1) % 5
    start = decision.nearest_start(predict, images, labels, pool, targets)
    assert np.all(predict(start).argmax(-1) == targets)
    for i in range(len(images)):
        suiting = pool[np.asarray(predict(pool).argmax(-1)) == int(targets[i])]
        best = jnp.sqrt(jnp.square(suiting - images[i:i + 1]).sum((1, 2, 3))).min()
        np.testing.assert_allclose(jnp.linalg.norm((start[i] - images[i]).ravel()), best, rtol=1e-5)
    found = decision.hop_skip_jump(KEY, predict, images, labels, Threat(norm="l2", eps=100.0), targets=targets,
                                   start=start, steps=3)
    assert np.all(found.success) and np.all(predict(found.images).argmax(-1) == targets)
    assert np.all(found.norm < 0.9 * jnp.sqrt(jnp.square(start - images).sum((1, 2, 3))))


def test_works_on_a_registered_network_with_convolutions_and_batch_norm():
    model = models.create("convnet,width=4,stages=2,depth=1", 3, (8, 8, 1))
    images = problem(count=6)[1]
    predict = evaluation.predictor(model, model.init(KEY, images, train=False))
    labels = predict(images).argmax(-1)
    start = jnp.clip(images + 0.3 * jax.random.normal(KEY, images.shape), 0, 1)
    found = decision.hop_skip_jump(KEY, predict, images, labels, Threat(norm="l2", eps=100.0), start=start, steps=2,
                                   first_draws=25)
    np.testing.assert_array_equal(found.success, np.asarray(predict(found.images).argmax(-1) != labels))
    assert found.success.any() and np.all(np.isfinite(found.images))


@pytest.mark.parametrize("attack, norm", [(decision.boundary, "linf"), (decision.hop_skip_jump, "l1")])
def test_other_norms_are_refused(attack, norm):
    predict, images, labels = problem()
    with pytest.raises(InputError, match=f"norm '{norm}'"):
        attack(KEY, predict, images, labels, Threat(norm=norm, eps=100.0))

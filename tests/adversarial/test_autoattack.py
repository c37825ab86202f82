"""AutoAttack's stages: on whom they run, in which batches, and that nobody once fooled stands again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_apgd import golden  # noqa: F401

from dlcourse.adversarial import autoattack as whole
from dlcourse.adversarial.apgd import apgd
from dlcourse.adversarial.eot import Expectation
from dlcourse.adversarial.threat import Threat
from dlcourse.contracts import InputError

pytestmark = pytest.mark.slow


def test_stages_are_those_published():
    names = {at: [name for name, _ in stages] for at, stages in whole.STAGES.items()}
    for norm in ("linf", "l2", "l1"):
        assert names["standard", norm] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    for norm in ("linf", "l2"):
        assert names["plus", norm] == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
        assert names["rand", norm] == ["apgd-ce", "apgd-dlr"]


def test_chunks_hold_every_row_once_in_at_most_three_sizes():
    sizes = whole.bucket_sizes(40)
    assert sizes == (3, 10, 40)
    for count in range(130):
        parts = list(whole.chunks(np.arange(count) + 7, sizes))
        assert {len(rows) for rows, _ in parts} <= set(sizes)
        np.testing.assert_array_equal(np.concatenate([np.empty(0, int), *(rows[:used] for rows, used in parts)]),
                                      np.arange(count) + 7)
        assert all((rows[used:] == rows[0]).all() for rows, used in parts)


def planted(key, predict, images, labels, threat, *, fools, seen):
    """An attack that darkens the images whose first pixel is in `fools`, by more than is allowed where it may."""
    seen.append(np.asarray(images)[:, 0, 0, 0])
    first = images[:, 0, 0, 0]
    hit = jnp.any(first[:, None] == jnp.asarray(fools, jnp.float32)[None], -1)
    reached = jnp.where(hit[:, None, None, None], images - 2 * threat.eps[:, None, None, None], images)
    zeros = jnp.zeros(len(images))
    return whole.AttackResult(reached, hit, zeros, zeros, jnp.full(len(images), 10, jnp.int32))


@jax.jit
def brightness(limit, images):
    """Class 0 where the last pixel is above the limit, else 1."""
    above = images[:, -1, -1, 0] - limit
    return jnp.stack([above, -above], -1)


def test_each_stage_meets_survivors_alone_and_is_judged_anew_inside_the_threat(monkeypatch):
    count = 20
    images = np.full((count, 2, 2, 1), 0.5, np.float32)
    images[:, 0, 0, 0] = np.arange(count) / 100
    images[:, -1, -1, 0] = [0.2] * 2 + [0.55] * 9 + [0.9] * 9  # misclassified; within reach of eps .1; beyond it
    seen = [], []
    stages = [functools.partial(planted, fools=np.arange(*span) / 100, seen=s)
              for span, s in zip(((0, 5), (3, 20)), seen, strict=True)]
    monkeypatch.setitem(whole.STAGES, ("standard", "linf"), (("one", {}), ("two", {})))
    monkeypatch.setattr(whole, "_attack", lambda name, settings, classes: lambda *given: (
        lambda found: (found.images, found.queries))(stages[name == "two"](*given)))
    predict = jax.tree_util.Partial(brightness, jnp.float32(0.5))
    threat = Threat(0.1)
    found = dict(whole.autoattack_stages(jax.random.key(0), predict, jnp.asarray(images), jnp.zeros(count, jnp.int32),
                                         threat, batch_size=8))
    flags = {name: np.flatnonzero(result.success) for name, result in found.items()}
    np.testing.assert_array_equal(flags["clean"], [0, 1])
    np.testing.assert_array_equal(flags["one"], np.arange(5))
    np.testing.assert_array_equal(flags["two"], np.arange(11))  # the others were moved too far, and back inside
    assert set(np.concatenate(seen[0])) == set(images[2:, 0, 0, 0])
    assert set(np.concatenate(seen[1])) == set(images[5:, 0, 0, 0])
    assert {len(part) for part in seen[0] + seen[1]} <= set(whole.bucket_sizes(8))
    last = found["two"]
    assert last.norm.max() <= 0.1 + 1e-6
    np.testing.assert_array_equal(last.queries, [1] * 2 + [1 + 11] * 3 + [1 + 22] * 15)


@pytest.mark.parametrize("norm, version", [("linf", "standard"), ("l2", "rand")])
def test_result_does_not_depend_on_batches(golden, norm, version, monkeypatch):  # noqa: F811
    second = [("apgd-t", {"classes": 3, "steps": 10})] if version == "standard" else []
    monkeypatch.setitem(whole.STAGES, (version, norm), (("apgd-ce", {"steps": 10}), *second))
    images, labels = golden["images"][:30], golden["labels"][:30]
    predict = golden["predict"]
    if version == "rand":
        weights = predict.args[0]
        predict = Expectation(jax.tree_util.Partial(drawing, weights), jax.random.key(3), samples=3)
    threat = Threat(golden[f"eps_{norm}"], norm)
    one, other = (whole.autoattack(jax.random.key(0), predict, images, labels, threat, version=version, batch_size=size)
                  for size in (30, 16))
    assert 0 < one.success.mean() < 1
    np.testing.assert_array_equal(one.success, other.success)
    np.testing.assert_array_equal(one.queries, other.queries)
    np.testing.assert_allclose(one.images, other.images, atol=1e-5)


def drawing(weights, key, images, noise=0.05):
    from test_apgd import layered
    return layered(weights, images + noise * jax.random.normal(key, images.shape))


def test_another_threat_and_other_weights_compile_nothing(golden, monkeypatch):  # noqa: F811
    monkeypatch.setitem(whole.STAGES, ("standard", "linf"), (("apgd-ce", {"steps": 5}),))
    images, labels = golden["images"][:16], golden["labels"][:16]
    before = apgd._cache_size()
    for n in range(3):
        predict = jax.tree.map(lambda leaf, n=n: leaf * (1 - n / 20), golden["predict"])
        whole.autoattack(jax.random.key(n), predict, images, labels, Threat(0.05 + 0.1 * n))
    assert apgd._cache_size() <= before + 3


def test_rand_is_judged_by_draws_of_its_own(golden):  # noqa: F811
    images, labels = golden["images"][:30], golden["labels"][:30]
    predict = Expectation(jax.tree_util.Partial(drawing, golden["predict"].args[0]), jax.random.key(3), samples=4)
    found = whole.autoattack(jax.random.key(0), predict, images, labels, Threat(golden["eps_linf"]), version="rand")
    judge = predict.replace(key=whole.stream(predict.key, "judge"))
    np.testing.assert_array_equal(found.success, judge(jnp.asarray(found.images)).argmax(-1) != labels)
    assert 0 < found.success.mean() < 1


@pytest.mark.slow
@pytest.mark.parametrize("norm, version", [("linf", "standard"), ("l2", "standard"), ("l1", "standard"),
                                           ("linf", "plus"), ("l2", "plus")])
def test_leaves_standing_whom_the_authors_code_leaves(golden, norm, version):  # noqa: F811
    theirs = golden[f"{norm}_{version}"]
    theirs = theirs[:50] if norm == "l1" else theirs  # five restarts, five targets, and a sort in every step
    images, labels = golden["images"][:len(theirs)], golden["labels"][:len(theirs)]
    found = whole.autoattack(jax.random.key(0), golden["predict"], images, labels,
                             Threat(golden[f"eps_{norm}"], norm), version=version)
    assert abs(found.success.mean() - theirs.mean()) <= 0.01
    assert np.mean(found.success == theirs) >= 0.98
    assert found.norm.max() <= golden[f"eps_{norm}"] * (1 + 1e-5)
    np.testing.assert_array_equal(golden["predict"](jnp.asarray(found.images)).argmax(-1) != labels, found.success)


def fooled_by_rand(golden, norm, noise, samples, seed):  # noqa: F811
    """Whom `rand` fools of the images of golden/make_apgd.py, judged as there by the mean of 500 draws."""
    count = golden[f"{norm}_rand"].shape[-1]
    images, labels = golden["images"][:count], golden["labels"][:count]
    network = jax.tree_util.Partial(drawing, golden["predict"].args[0], noise=jnp.float32(noise))
    found = whole.autoattack(jax.random.key(seed), Expectation(network, jax.random.key(3), samples), images, labels,
                             Threat(golden[f"eps_{norm}"], norm), version="rand")
    judge = Expectation(network, jax.random.key(4), 500 if noise else 1)
    return np.asarray(judge(jnp.asarray(found.images)).argmax(-1) != labels)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_rand_is_as_strong_as_the_authors_code(golden, norm):  # noqa: F811
    """Theirs ends at one draw that is wrong, ours at a mean of them."""
    assert fooled_by_rand(golden, norm, 0.1, 20, 0).mean() >= golden[f"{norm}_rand"].mean() - 0.01


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_rand_fools_whom_the_authors_code_fools_where_nothing_is_drawn(golden, norm):  # noqa: F811
    """From five starts on each side: one start more or less decides an image or two of 120 on either."""
    theirs = golden[f"{norm}_rand_still"]
    ours = np.stack([fooled_by_rand(golden, norm, 0.0, 2, seed) for seed in range(len(theirs))])
    assert abs(ours.mean() - theirs.mean()) <= 0.01
    sure = np.all(ours == ours[:1], axis=0) & np.all(theirs == theirs[:1], axis=0)
    assert sure.mean() > 0.9 and np.mean(ours[0, sure] == theirs[0, sure]) >= 0.995


@pytest.mark.parametrize("words, settings", [
    ("version 'all'", {"version": "all"}),
    ("norm 'l0'", {"threat": Threat(1.0, "l0")}),
    ("AutoAttack plus has linf, l2", {"threat": Threat(1.0, "l1"), "version": "plus"}),
    ("given targets take apgd", {"targets": jnp.zeros(2, jnp.int32)}),
    ("take standard", {"version": "rand"}),
    ("2 classes: AutoAttack standard needs at least 4", {}),
])
def test_what_cannot_be_is_said(words, settings):
    settings = {"threat": Threat(0.1), **settings}
    predict = jax.tree_util.Partial(brightness, jnp.float32(0.5))
    with pytest.raises(InputError, match=words):
        whole.autoattack(jax.random.key(0), predict, jnp.ones((2, 2, 2, 1)), jnp.zeros(2, jnp.int32), **settings)

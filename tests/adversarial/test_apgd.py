"""APGD against its authors' code from the same noise, and against what a linear network allows in closed form."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from dlcourse.adversarial import apgd, objectives
from dlcourse.adversarial.projections import inside_l1
from dlcourse.adversarial.threat import Threat, inside, size
from dlcourse.contracts import InputError

pytestmark = pytest.mark.slow

GOLDEN = pathlib.Path(__file__).parent / "golden" / "apgd.npz"


def layered(weights, images):
    """The network of golden/make_apgd.py."""
    x = images.reshape(len(images), -1)
    for n in (1, 2, 3):
        x = (x if n == 1 else jax.nn.relu(x)) @ weights[f"kernel{n}"].T + weights[f"bias{n}"][None]
    return x


def linear(weights, images):
    return images.reshape(len(images), -1) @ weights["kernel"] + weights["bias"][None]


@pytest.fixture(scope="module")
def golden():
    stored = dict(np.load(GOLDEN))
    names = [f"{kind}{n}" for kind in ("kernel", "bias") for n in (1, 2, 3)]
    stored["predict"] = jax.tree_util.Partial(jax.jit(layered), {name: jnp.asarray(stored[name]) for name in names})
    stored["images"] = jnp.asarray(stored["grey"], jnp.float32)[..., None] / 16
    stored["labels"] = jnp.asarray(stored["labels"], jnp.int32)
    stored["noise"] = jnp.asarray(stored["noise"][..., None] / 127, jnp.float32)
    return stored


@functools.partial(jax.jit, static_argnames="objective")
def climbed(predict, images, labels, threat, noise, aims, objective):
    """Success of one climb from the noise, and the size of the change."""
    measure, nobody = objectives.OBJECTIVES[objective], jnp.zeros(len(images), bool)
    climb = functools.partial(apgd.ascent, predict, images, labels, aims=aims, targets=None, measure=measure)
    if threat.norm == "l1":
        start = inside_l1(images + noise, images, threat.replace(eps=3 * threat.eps))
        x, _ = apgd.shrinking(climb, start, images, threat, 100, nobody)
    else:
        unit = noise / size(noise, threat.norm)[:, None, None, None]
        x, _ = climb(threat, inside(images + threat.eps * unit, images, threat), nobody, steps=100)
    return predict(x).argmax(-1) != labels, size(x - images, threat.norm)


@pytest.mark.parametrize("run", ["linf_cross_entropy", "linf_dlr", "linf_targeted_dlr", "l2_cross_entropy",
                                 "l1_cross_entropy", "l1_targeted_dlr"])
def test_fools_whom_the_authors_code_fools(golden, run):
    norm, *targeted, objective = run.replace("cross_entropy", "cross-entropy").split("_")
    predict, images, labels = golden["predict"], golden["images"], golden["labels"]
    aims = apgd.wrong_classes(predict(images), labels)[:, 0] if targeted else None
    flags, norms = climbed(predict, images, labels, Threat(jnp.asarray(golden[f"eps_{norm}"]), norm), golden["noise"],
                           aims, objective.replace("-", "_"))
    assert np.mean(np.asarray(flags) == golden[f"{run}_counted" if norm == "l1" else run]) >= 0.995
    assert np.mean(np.asarray(flags) == golden[run]) >= 0.99  # the authors' count of changed pixels; see make_apgd
    assert float(norms.max()) <= golden[f"eps_{norm}"] * (1 + 1e-5)


def planes(classes=2, count=40):
    """A linear network, images far from the box, labels as it says, and each image's distance to the next class.

    "l1 pair" is the distance where two entries change alike: the two largest, as sparse as APGD's rule gets.
    """
    random = np.random.default_rng(classes)
    kernel, bias = random.normal(size=(16, classes)), random.normal(size=classes)
    images = random.uniform(0.45, 0.55, (count, 16))
    bias -= (images @ kernel).mean(0)  # no class wins by far
    logits = images @ kernel + bias
    labels = logits.argmax(1)
    gaps = logits.max(1, keepdims=True) - logits
    apart = np.sort(np.abs(kernel[:, labels].T[:, :, None] - kernel[None]), 1)
    duals = {"linf": apart.sum(1), "l2": np.sqrt(np.square(apart).sum(1)), "l1": apart[:, -1],
             "l1 pair": apart[:, -2:].mean(1)}
    with np.errstate(invalid="ignore"):
        distances = {norm: np.nanmin(gaps / dual, 1) for norm, dual in duals.items()}
    weights = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    return (jax.tree_util.Partial(jax.jit(linear), weights), jnp.asarray(images.reshape(count, 4, 4, 1), jnp.float32),
            jnp.asarray(labels, jnp.int32), distances)


@pytest.mark.parametrize("norm, reached", [("linf", "linf"), ("l2", "l2"), ("l1", "l1 pair")])
def test_between_two_classes_the_closed_form_is_the_limit(norm, reached):
    predict, images, labels, distances = planes()
    below, beyond = (apgd.apgd(jax.random.key(0), predict, images, labels, Threat(jnp.asarray(eps, jnp.float32), norm))
                     for eps in (distances[norm] * 0.999, distances[reached] * 1.001))
    assert not bool(below.success.any())
    assert float(beyond.success.mean()) >= (0.95 if norm == "l1" else 1)  # now and then l1 is still less sparse


@pytest.mark.parametrize("norm, reached", [("linf", "linf"), ("l2", "l2"), ("l1", "l1 pair")])
def test_robust_accuracy_among_many_classes_is_that_of_the_closed_form(norm, reached):
    predict, images, labels, distances = planes(6, 120)
    eps = float(np.median(distances[norm]))
    found = apgd.apgd_t(jax.random.key(0), predict, images, labels, Threat(jnp.float32(eps), norm), classes=5)
    sure, must = (distances[of] < eps for of in (norm, reached))
    far = np.abs(distances[norm] / eps - 1) > 1e-3
    assert must[far].sum() > 40
    assert not np.any(~sure & far & np.asarray(found.success)) and np.all(np.asarray(found.success)[must & far])


def test_projection_on_l1_ball_and_box_is_the_nearest_point():
    random = np.random.default_rng(0)
    origin = random.uniform(0, 1, (12, 6)) * (random.uniform(size=(12, 6)) > 0.3)
    moved = origin + random.normal(size=(12, 6)) * random.choice([0.1, 1.0], (12, 1))
    ours = np.asarray(inside_l1(jnp.asarray(moved, jnp.float32), jnp.asarray(origin, jnp.float32), Threat(0.8, "l1")))
    assert np.abs(ours - origin).sum(1).max() <= 0.8 * (1 + 1e-6)
    assert ours.min() >= 0 and ours.max() <= 1
    for x, point, found in zip(origin, moved, ours, strict=True):  # point = x + up - down, as a quadratic programme
        best = minimize(lambda d, x=x, point=point: np.square(x + d[:6] - d[6:] - point).sum(), np.zeros(12),
                        bounds=[*zip(np.zeros(6), 1 - x, strict=True), *zip(np.zeros(6), x, strict=True)],
                        constraints={"type": "ineq", "fun": lambda d: 0.8 - d.sum()}, method="SLSQP",
                        options={"ftol": 1e-12, "maxiter": 500})
        np.testing.assert_allclose(found, x + best.x[:6] - best.x[6:], atol=2e-4)


def test_a_change_within_both_stays_as_it_is():
    x = jnp.full((1, 2, 2, 1), 0.5)
    near = x.at[0, 0, 0, 0].add(0.25)
    np.testing.assert_array_equal(inside_l1(near, x, Threat(0.3, "l1")), near)


@pytest.mark.parametrize("norm", apgd.NORMS)
def test_what_happens_to_an_example_depends_on_no_other(golden, norm):
    predict, images, labels = golden["predict"], golden["images"][:24], golden["labels"][:24]
    threat = Threat(jnp.asarray(golden[f"eps_{norm}"]), norm)
    keys = jax.random.split(jax.random.key(1), 24)
    order = jnp.asarray(np.random.default_rng(0).permutation(24))
    whole = apgd.apgd(keys, predict, images, labels, threat, steps=20, restarts=2)
    mixed = apgd.apgd(keys[order], predict, images[order], labels[order], threat, steps=20, restarts=2)
    assert 0 < float(whole.success.mean()) < 1
    for name in ("success", "queries"):
        np.testing.assert_array_equal(getattr(whole, name)[order], getattr(mixed, name))
    np.testing.assert_allclose(whole.images[order], mixed.images, atol=1e-5)


def test_an_example_alone_ends_where_it_does_in_company(golden):
    threat = Threat(jnp.asarray(golden["eps_linf"]))
    keys = jax.random.split(jax.random.key(1), 24)
    together, alone = (apgd.apgd(keys[rows], golden["predict"], golden["images"][rows], golden["labels"][rows], threat,
                                 steps=20, restarts=2) for rows in (slice(0, 24), slice(3, 4)))
    np.testing.assert_allclose(together.images[3:4], alone.images, atol=1e-5)
    assert int(together.queries[3]) == int(alone.queries[0])


def test_other_eps_weights_labels_and_targets_compile_nothing(golden):
    images, labels = golden["images"][:4], golden["labels"][:4]
    predict = golden["predict"]
    other = jax.tree.map(lambda leaf: leaf * 0.9, predict)
    before = apgd.apgd._cache_size()
    for n, network, eps in ((0, predict, 0.1), (1, other, 0.2)):
        threat = Threat(jnp.float32(eps))
        apgd.apgd(jax.random.key(n), network, images, labels, threat, targets=(labels + 1 + n) % 10, steps=7)
    assert apgd.apgd._cache_size() == before + 1


def test_targets_are_what_counts_as_success(golden):
    images, labels = golden["images"][:60], golden["labels"][:60]
    targets = (labels + 1) % 10
    found = apgd.apgd(jax.random.key(0), golden["predict"], images, labels, Threat(jnp.float32(0.2)), targets=targets,
                      steps=30)
    taken = golden["predict"](found.images).argmax(-1)
    np.testing.assert_array_equal(found.success, taken == targets)
    assert 0 < float(found.success.mean()) < 1


def test_aims_are_all_wrong_classes_and_never_the_label():
    logits = jnp.asarray(np.random.default_rng(0).integers(0, 3, (200, 5)), jnp.float32)  # many ties, many mistakes
    labels = jnp.asarray(np.random.default_rng(1).integers(0, 5, 200), jnp.int32)
    aims = np.asarray(apgd.wrong_classes(logits, labels))
    assert all(set(row) == set(range(5)) - {label} for row, label in zip(aims, np.asarray(labels), strict=True))
    strengths = np.take_along_axis(np.asarray(logits), aims, 1)
    assert (np.diff(strengths, axis=1) <= 0).all()


def test_more_classes_and_more_restarts_fool_more_and_spend_queries(golden):
    predict, images, labels = golden["predict"], golden["images"][:60], golden["labels"][:60]
    threat = Threat(jnp.asarray(golden["eps_linf"]))
    one, all_nine = (apgd.apgd_t(jax.random.key(0), predict, images, labels, threat, classes=n, steps=20)
                     for n in (1, 9))
    assert bool(jnp.all(all_nine.success >= one.success))
    np.testing.assert_array_equal(one.queries[one.success], all_nine.queries[one.success])
    assert int(all_nine.queries[~all_nine.success].min()) == 1 + 9 * (21 + 1)


def test_review_of_steps_is_at_the_published_iterations():
    assert apgd.checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)


def test_logits_that_are_not_finite_are_no_success():
    predict = jax.tree_util.Partial(lambda x: jnp.where(x.sum((1, 2, 3))[:, None] > 0, jnp.nan, jnp.ones((1, 3))))
    images = jnp.full((2, 2, 2, 1), 0.5)
    found = apgd.apgd(jax.random.key(0), predict, images, jnp.array([0, 1]), Threat(jnp.float32(0.1)), steps=3)
    assert not bool(found.success.any()) and bool(jnp.all(jnp.isfinite(found.images)))


@pytest.mark.parametrize("words, call", [
    ("norm 'l0'", lambda *given: apgd.apgd(*given, Threat(1.0, "l0"))),
    ("objective 'hinge'", lambda *given: apgd.apgd(*given, Threat(0.1), objective="hinge")),
    ("2 classes: dlr needs at least 3", lambda *given: apgd.apgd(*given, Threat(0.1), objective="dlr")),
    ("2 classes: dlr with targets needs at least 4", lambda *given: apgd.apgd_t(*given, Threat(0.1))),
    ("classes=2 to aim at", lambda *given: apgd.apgd_t(*given, Threat(0.1), classes=2, objective="margin")),
    ("given targets take apgd", lambda *given: apgd.apgd_t(*given, Threat(0.1), targets=given[3])),
])
def test_what_cannot_be_is_said(words, call):
    predict, images, labels, _ = planes()
    with pytest.raises(InputError, match=words):
        call(jax.random.key(0), predict, images, labels)

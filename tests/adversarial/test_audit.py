"""The audit's planted defects: each sign must show where its defect was put, and none on an honest network."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from dlcourse.adversarial import audit as audits
from dlcourse.adversarial import estimated, gradient, masking
from dlcourse.adversarial.threat import AttackResult, Threat, size
from dlcourse.contracts import InputError

pytestmark = pytest.mark.slow

KEY, THREAT, COUNT = jax.random.key(0), Threat(eps=0.1), 100


@jax.jit
def plain(weights, images):
    (hidden, hidden_bias), (last, last_bias) = weights
    features = jax.nn.relu(jnp.dot(images.reshape(len(images), -1) - 0.5, hidden) + hidden_bias[None])
    return jnp.dot(features, last) + last_bias[None]


@functools.cache
def trained():
    """A small network of the digits, weights, and images it has not seen; the first COUNT are for the audit."""
    digits = load_digits()
    images = jnp.asarray(digits.images[..., None] / 16, jnp.float32)
    labels = jnp.asarray(digits.target, jnp.int32)
    first, second = jax.random.split(KEY)
    weights = ((0.15 * jax.random.normal(first, (64, 48)), jnp.zeros(48)),
               (0.15 * jax.random.normal(second, (48, 10)), jnp.zeros(10)))
    tx = optax.adam(1e-2)

    def loss(weights):
        logits = plain(weights, images[:1400])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[:1400]).mean() + 1e-3 * sum(
            jnp.square(w).sum() for w, _ in weights)

    @jax.jit
    def step(_, carry):
        weights, state = carry
        updates, state = tx.update(jax.grad(loss)(weights), state)
        return optax.apply_updates(weights, updates), state

    weights, _ = jax.lax.fori_loop(0, 150, step, (weights, tx.init(weights)))
    return weights, images[1400:1400 + COUNT], labels[1400:1400 + COUNT]


@jax.jit
def saturated(weights, images):
    return 1e4 * plain(weights, images)


@jax.jit
def one_hot(weights, images):
    """A softmax so steep that float32 knows 0 and 1 alone, and gives those out."""
    return jax.nn.softmax(1e6 * plain(weights, images))


@jax.jit
def rounding(weights, images):
    return plain(weights, jnp.round(15 * images) / 15)


@jax.jit
def straight_through(weights, images):
    """Rounds the input, and says that it does not, as far as gradients go."""
    return plain(weights, images + jax.lax.stop_gradient(jnp.round(15 * images) / 15 - images))


def stochastic(generator, weights, images):
    def draw(like):
        return generator.normal(size=like.shape).astype(np.float32)

    noise = jax.pure_callback(draw, jax.ShapeDtypeStruct(images.shape, jnp.float32), jax.lax.stop_gradient(images),
                              vmap_method="expand_dims")
    return plain(weights, images + 0.1 * noise)


@jax.jit
def batch_normalised(weights, images):
    return plain(weights, (images - images.mean(0, keepdims=True)) / (images.std(0, keepdims=True) + 0.1) / 2 + 0.5)


@jax.jit
def nan_off_the_data(weights, images):
    """Finite on the digits, whose pixels are sixteenths, and not a number in every eighth other image."""
    rest = jnp.abs(16 * images - jnp.round(16 * images)).max((1, 2, 3))
    return jnp.where((rest > 1e-3)[:, None] & (images.sum((1, 2, 3)) % 1 < 0.125)[:, None], jnp.nan,
                     plain(weights, images))


@functools.cache
def report(function):
    weights, images, labels = trained()
    bound = functools.partial(function, np.random.default_rng(0)) if function is stochastic else function
    predict = jax.tree_util.Partial(bound, weights)
    results = {
        "fgsm": gradient.fgsm(KEY, predict, images, labels, THREAT),
        "pgd": gradient.pgd(KEY, predict, images, labels, THREAT)}
    if function in (plain, one_hot, rounding):
        results["spsa"] = estimated.spsa(KEY, predict, images, labels, THREAT, steps=10, pairs=64, reach=0.05)
    found = audits.audit(KEY, predict, images, labels, THREAT, results, white=("fgsm", "pgd"),
                         black=("spsa",) if "spsa" in results else (), order=("pgd", "fgsm"))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_an_honest_network_shows_no_sign():
    found = report(plain)
    assert found["flagged"] == [], [sign for sign in found["signs"] if sign["flagged"]]
    assert all(sign["value"] is not None for sign in found["signs"] if sign["name"] != "certificate_broken")
    assert found["clean"]["accuracy"] > 0.85 and found["curve"]["points"][-1]["accuracy"] == 0
    assert found["attacks"]["pgd"]["accuracy"] < found["attacks"]["fgsm"]["accuracy"] < found["clean"]["accuracy"]
    assert found["worst_case"]["accuracy"] <= min(each["accuracy"] for each in found["attacks"].values())


@pytest.mark.parametrize("network, right_signs", [
    (saturated, {"saturated_loss"}),
    (one_hot, {"zero_gradient", "survives_huge_eps", "black_box_beats_white_box"}),
    (rounding, {"zero_gradient", "quantised", "survives_huge_eps", "flat_curve", "black_box_beats_white_box"}),
    (straight_through, {"quantised"}),
    (stochastic, {"stochastic"}),
    (batch_normalised, {"batch_dependent"}),
    (nan_off_the_data, {"nonfinite"})], ids=lambda given: getattr(given, "__name__", ""))
def test_each_planted_defect_shows_its_sign(network, right_signs):
    flagged = set(report(network)["flagged"])
    assert right_signs <= flagged, flagged


@pytest.mark.parametrize("network, absent", [
    (saturated, {"stochastic", "nonfinite", "batch_dependent", "quantised"}),
    (rounding, {"stochastic", "nonfinite", "batch_dependent", "saturated_loss"}),
    (straight_through, {"stochastic", "nonfinite", "batch_dependent", "zero_gradient", "saturated_loss"}),
    (stochastic, {"nonfinite", "batch_dependent", "quantised", "zero_gradient", "saturated_loss"}),
    (nan_off_the_data, {"stochastic", "batch_dependent", "quantised", "zero_gradient"})],
    ids=lambda given: getattr(given, "__name__", ""))
def test_and_no_sign_of_another_cause(network, absent):
    assert not absent & set(report(network)["flagged"])


def results(images, labels, predict, change, claim):
    images = images + change
    return AttackResult(images, claim, jnp.zeros(len(images)), size(change, "linf"), jnp.ones(len(images), jnp.int32))


def quick(changes, **settings):
    """The audit of made-up results, by a probe of few steps."""
    weights, images, labels = trained()
    predict = jax.tree_util.Partial(plain, weights)
    made = {name: results(images, labels, predict, *each) for name, each in changes.items()}
    found = audits.audit(KEY, predict, images, labels, THREAT, made, restarts=2,
                         probe=functools.partial(gradient.pgd, steps=10), **settings)
    return found, {sign["name"]: sign for sign in found["signs"]}


def test_measures_norm_box_and_claims_anew():
    weights, images, labels = trained()
    predict = jax.tree_util.Partial(plain, weights)
    wrong = np.asarray(predict(images).argmax(-1) != labels)
    none, claims = jnp.zeros_like(images), jnp.asarray(wrong)
    honest, _ = quick({"nothing": (none, claims)})
    assert honest["attacks"]["nothing"]["success"] == wrong.mean()
    assert honest["attacks"]["nothing"]["accuracy"] == honest["clean"]["accuracy"] == 1 - wrong.mean()
    far = none.at[3, 4, 4].set(0.101)
    _, signs = quick({"far": (jnp.where(images + far > 1, -far, far), claims)})
    assert signs["norm_exceeded"]["flagged"] and not signs["box_exceeded"]["flagged"]
    _, signs = quick({"off": (none.at[3, 0, 0].set(-1e-4), claims)})  # that pixel is 0 in every digit
    assert signs["box_exceeded"]["flagged"] and not signs["norm_exceeded"]["flagged"]
    found, signs = quick({"liar": (none, jnp.ones(COUNT, bool))})
    assert signs["success_misreported"]["value"] == pytest.approx(1 - wrong.mean())
    assert found["attacks"]["liar"]["claimed"] == 1 and found["attacks"]["liar"]["success"] == wrong.mean()
    found, signs = quick({"nan": (none.at[:5].set(jnp.nan), claims.at[:5].set(True))})
    assert signs["nonfinite"]["value"] == 0.05 and found["attacks"]["nan"]["success"] == wrong[5:].sum() / COUNT


def test_results_outside_of_the_threat_are_no_successes():
    _, images, labels = trained()
    grey = 0.5 - images
    found, signs = quick({"grey": (grey, labels != -1)}, smallest=("grey",))
    assert found["attacks"]["grey"]["success"] == 0 and not signs["norm_exceeded"]["flagged"]
    assert signs["success_misreported"]["flagged"]
    _, signs = quick({"grey": (grey, labels == -1)}, smallest=("grey",))
    assert not signs["success_misreported"]["flagged"]


def test_order_and_certificates_are_compared_image_by_image():
    weights, images, labels = trained()
    predict = jax.tree_util.Partial(plain, weights)
    right = np.asarray(predict(images).argmax(-1) == labels)
    strong = gradient.pgd(KEY, predict, images, labels, THREAT)
    change, none = strong.images - images, jnp.zeros_like(images)
    broken = np.asarray(strong.success) & right
    given = {"strong": (none, jnp.asarray(~right)), "weak": (change, strong.success)}
    _, signs = quick(given, order=("strong", "weak"), certified=np.asarray(right))
    assert signs["order_violated"]["value"] == signs["certificate_broken"]["value"] == broken.mean() > 0.1
    assert signs["order_violated"]["flagged"] and signs["certificate_broken"]["flagged"]
    _, signs = quick(given, order=("weak", "strong"), certified=np.asarray(right) & ~broken)
    assert not signs["order_violated"]["flagged"] and not signs["certificate_broken"]["flagged"]


def test_8_bit_images_are_judged_and_successes_below_a_grey_level_noticed():
    weights, images, labels = trained()
    found = report(plain)["attacks"]["pgd"]
    assert abs(found["success_8bit"] / found["success"] - 1) < 0.1  # rounding may also help
    np.testing.assert_array_equal(np.round(255 * masking.quantised(images, THREAT)) / np.float32(255),
                                  masking.quantised(images, THREAT))

    @jax.jit
    def fragile(weights, images):  # fooled by what lies between grey levels
        between = jnp.abs(255 * images - jnp.round(255 * images)).max((1, 2, 3))
        return jnp.stack([jnp.zeros(len(images)), (between - 0.01) * weights], -1)

    grey = jnp.asarray(masking.quantised(images, THREAT))
    predict = jax.tree_util.Partial(fragile, jnp.float32(1.0))
    made = results(grey, labels * 0, predict, jnp.where(grey > 0.5, -5e-4, 5e-4), jnp.ones(COUNT, bool))
    found = audits.audit(KEY, predict, grey, labels * 0, THREAT, {"tiny": made}, restarts=2)
    assert found["attacks"]["tiny"]["success"] == 1 and found["attacks"]["tiny"]["success_8bit"] == 0
    assert "lost_in_8_bits" in found["flagged"]


@pytest.mark.parametrize("accuracies, runs, sign, value", [
    ([0.9, 0.6, 0.3, 0.0, 0.0], [0.3, 0.3, 0.3, 0.3], None, None),
    ([0.9, 0.5, 0.4, 0.4, 0.0], [0.4, 0.4, 0.4, 0.4], "flat_curve", 1.0),  # from 0.25 to 0.5
    ([0.9, 0.9, 0.9, 0.3, 0.0], [0.9, 0.9, 0.9, 0.9], None, None),  # robust up to the threat's eps is not flat
    ([0.9, 0.6, 0.3, 0.2, 0.1], [0.3, 0.3, 0.3, 0.3], "survives_huge_eps", 0.1),
    ([0.9, 0.4, 0.5, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], "curve_rises", 0.1),
    ([0.9, 0.6, 0.5, 0.0, 0.0], [0.5, 0.4, 0.3, 0.2], "restarts_gain", 0.2)])
def test_signs_of_an_attack_that_gets_stuck(accuracies, runs, sign, value):
    points = [{"eps": eps, "accuracy": accuracy} for eps, accuracy in zip((0, 0.1, 0.25, 0.4, 0.5), accuracies,
                                                                           strict=True)]
    values = audits._curve_signs(points, runs, Threat(eps=0.25), 0.5)
    flagged = {name: number for name, number in values.items() if audits._sign(name, number, 1000).flagged}
    assert flagged == ({} if sign is None else {sign: pytest.approx(value)})


def test_small_batches_and_an_eps_of_its_own_for_each_image_give_the_same():
    weights, images, labels = trained()
    predict = jax.tree_util.Partial(plain, weights)
    whole, _ = quick({}, batch_size=COUNT)
    parts, _ = quick({}, batch_size=40)
    assert whole["curve"] == parts["curve"] and whole["restarts"] == parts["restarts"]
    eps = np.where(np.arange(COUNT) < 50, 1e-4, 0.3)
    attack = functools.partial(gradient.pgd, steps=10)
    left = masking.right_under(KEY, attack, predict, images, labels, Threat(eps=eps), 40)
    right = np.asarray(predict(images).argmax(-1) == labels)
    assert np.array_equal(left[:50], right[:50]) and left[50:].mean() < 0.1


@pytest.mark.parametrize("norm, order", [("linf", np.inf), ("l2", 2), ("l1", 1)])
def test_norms_are_numpys(norm, order):
    change = np.random.default_rng(0).normal(size=(5, 4, 4, 3)).astype(np.float32)
    expected = np.linalg.norm(change.reshape(5, -1).astype(np.float64), order, axis=-1)
    np.testing.assert_allclose(audits.norms(change, norm), expected, rtol=1e-14)
    sparse = change * (np.arange(4) < 2).reshape(1, 1, 4, 1)
    np.testing.assert_array_equal(audits.norms(sparse, "l0"), 8)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="'pdg': no such result; there is pgd"):
        weights, images, _ = trained()
        quick({"pgd": (jnp.zeros_like(images), jnp.zeros(COUNT, bool))}, white=("pdg",))

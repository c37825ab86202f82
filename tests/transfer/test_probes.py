import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dlcourse import models
from dlcourse.contracts import InputError
from dlcourse.transfer import probes


def problem(seed, count=120, dimensions=12, classes=3):
    """Correlated, badly scaled features with one constant; classes overlap."""
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.normal(size=(count, 5)) @ rng.normal(size=(5, dimensions)), 0)
    x *= 10.0 ** rng.uniform(-3, 3, dimensions)
    labels = (x[:, :classes] / x[:, :classes].std(0) + rng.normal(size=(count, classes))).argmax(1)
    x[:, -1] = 7.3
    return x.astype(np.float32), labels.astype(np.int32)


def objective(x, labels, weights, bias, l2):
    logits = x @ weights + bias
    logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return -logits[np.arange(len(x)), labels].mean() + l2 / 2 * np.square(weights).sum()


@pytest.mark.parametrize("shape", [(120, 12), (30, 40)])
@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0])
def test_the_solution_is_scikit_learns(shape, l2):
    x, labels = problem(0, *shape)
    probe = probes.fit_linear(x, labels, 3, l2)
    constant = x.std(0) < 1e-5
    standard = np.where(constant, 0.0, (x - x.mean(0, dtype=float)) / np.where(constant, 1.0, x.std(0, dtype=float)))
    peer = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=5000).fit(standard, labels)
    ours = objective(standard, labels, np.float64(probe.weights), np.float64(probe.bias), l2)
    theirs = objective(standard, labels, peer.coef_.T, peer.intercept_, l2)
    assert ours - theirs < 1e-5
    if l2 >= 1e-2:
        np.testing.assert_allclose(probe.weights, peer.coef_.T, atol=1e-3 * np.abs(peer.coef_).max())
    np.testing.assert_allclose(
        jax.nn.softmax(probes.predict_linear(probe, x)), peer.predict_proba(standard), atol=5e-3)


def test_many_problems_at_once_are_each_alone():
    """With an l2 that makes the minimum sharp: else rounding alone decides where, close to it, a search ends."""
    x, labels = map(np.stack, zip(*map(problem, range(3)), strict=True))
    together = jax.vmap(lambda x, y: probes.fit_linear(x, y, 3, 1.0))(x, labels)
    for i in range(3):
        alone = probes.fit_linear(x[i], labels[i], 3, 1.0)
        np.testing.assert_allclose(together.weights[i], alone.weights, atol=1e-5 * np.abs(alone.weights).max())


def test_another_l2_does_not_recompile():
    x, labels = problem(1)
    probes.fit_linear(x, labels, 3, 0.1)
    before = probes.fit_linear._cache_size()
    probes.fit_linear(x + 1, labels, 3, 0.2)
    assert probes.fit_linear._cache_size() == before


def test_l2_is_chosen_on_the_validation_split():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    # One weak true feature among 300 that only fit the noise of the training labels.
    x = rng.normal(size=(200, 300)) + 1.5 * np.eye(300)[0] * (2 * labels[:, None] - 1)
    train, validation = (x[:60], labels[:60]), (x[60:], labels[60:])
    probe, l2 = probes.select_linear(train, validation, 2)
    accuracies = {g: float(probes.accuracy(probes.fit_linear(*train, 2, g), *validation)) for g in probes.L2_GRID}
    assert accuracies[l2] == max(accuracies.values()) == float(probes.accuracy(probe, *validation))
    assert accuracies[l2] > min(accuracies.values())


def test_features_of_every_tap_without_the_padding():
    model = models.create("convnet,width=4,stages=2", 3, (8, 8, 1))
    images = np.random.default_rng(0).uniform(size=(6, 8, 8, 1)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    labels, mask = np.arange(6, dtype=np.int32), np.array([True] * 5 + [False])
    batches = [{"image": images[i : i + 3], "label": labels[i : i + 3], "mask": mask[i : i + 3]} for i in (0, 3)]
    features, found = probes.tap_features(model, variables, batches)
    _, taps = jax.jit(model.apply)(variables, images[:5])
    np.testing.assert_array_equal(found, labels[:5])
    assert list(features) == [name for name in taps if name != "logits"]
    np.testing.assert_allclose(features["features"], taps["features"], rtol=1e-5, atol=1e-6)
    blocks = np.asarray(taps["relu1"]).reshape(5, 4, 2, 4, 2, 4).mean((2, 4)).reshape(5, -1)
    np.testing.assert_allclose(features["relu1"], blocks, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="no tap called 'conv9'.*conv1"):
        probes.tap_features(model, variables, batches, ["conv9"])


@pytest.mark.parametrize(("shape", "dimensions"), [
    ((2, 7, 7, 32), 16 * 32), ((2, 3, 5, 8), 12 * 8), ((2, 7, 7, 128), 4 * 128), ((2, 7, 7, 2048), 2048),
    ((2, 50, 192), 192), ((2, 9), 9),
])
def test_a_summary_has_moderate_length_and_keeps_constants(shape, dimensions):
    summary = probes.summarise(jnp.full(shape, 3.0, jnp.bfloat16))
    assert summary.shape == (2, dimensions) and summary.dtype == jnp.float32
    np.testing.assert_allclose(summary, 3.0, rtol=1e-6)

"""Bounds hold at every sampled point, are exact where that is known, and equal auto_LiRPA's."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dlcourse import models
from dlcourse.adversarial import bounds, gradient, program, relaxation, threat
from dlcourse.adversarial.objectives import picked
from dlcourse.adversarial.threat import Threat
from dlcourse.contracts import InputError
from dlcourse.models.layers import convolve, max_pool
from dlcourse.training.evaluation import predictor

pytestmark = pytest.mark.slow

SHAPE, CLASSES = (6, 6, 1), 5
GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "bounds.npz")
GOLDEN_MODELS = {"mlp": "mlp,width=16", "convnet": "convnet,width=4,stages=1"}
METHODS = {
    "IBP": bounds.ibp,
    "CROWN-IBP": lambda *args, **kw: bounds.crown(*args, intermediate="ibp", **kw),
    "CROWN-met": bounds.crown,
}


def variables_of(model, seed=0):
    """Random ones, those of normalisation too."""
    drawn = model.init(jax.random.key(seed), jnp.zeros((1, *SHAPE)))
    rng = np.random.default_rng(seed)
    changed = [leaf + rng.uniform(0, 0.5, leaf.shape).astype(np.float32) * (leaf.ndim == 1)
               for leaf in jax.tree.leaves(drawn)]
    return jax.tree.unflatten(jax.tree.structure(drawn), changed)


def network(spec, count=4, seed=0):
    model = models.create(spec, CLASSES, SHAPE)
    predict = predictor(model, variables_of(model, seed))
    images = jax.random.uniform(jax.random.key(seed + 1), (count, *SHAPE))
    return predict, images, predict(images).argmax(-1)


@jax.jit
def branched(weights, images):
    """A residual branch, a padded pool, a maximum of two branches, a concatenation."""
    kernel, other, last = weights
    x = jax.nn.relu(convolve(images * 2.0 - 1.0, kernel))
    x = x + jnp.maximum(-convolve(x, other), 0.5 - x)
    x = jnp.concatenate([max_pool(x, 2, 2, 1), x[:, 1:5, 1:5]], -1)
    return x.reshape(len(x), -1) @ last


def branched_network(count=4):
    keys = jax.random.split(jax.random.key(5), 4)
    weights = (jax.random.normal(keys[0], (3, 3, 1, 3)), jax.random.normal(keys[1], (3, 3, 3, 3)) / 3,
               jax.random.normal(keys[2], (96, CLASSES)) / 7)
    predict = jax.tree_util.Partial(branched, weights)
    images = jax.random.uniform(keys[3], (count, *SHAPE))
    return predict, images, predict(images).argmax(-1)


NETWORKS = {"mlp": lambda: network("mlp,width=12"), "convnet": lambda: network("convnet,width=2,stages=2,depth=1"),
            "plain": lambda: network("plain,width=2"), "branched": branched_network}
alpha = functools.partial(bounds.alpha_crown, steps=3)


def margins(predict, images, labels):
    logits = predict(images)
    return picked(logits, labels)[:, None] - logits


def golden(name):
    variables = {}
    for path in GOLDEN:
        if path.startswith(f"{name}/"):
            *folders, last = path.split("/")[1:]
            level = variables
            for folder in folders:
                level = level.setdefault(folder, {})
            level[last] = jnp.asarray(GOLDEN[path])
    predict = predictor(models.create(GOLDEN_MODELS[name], 10, (8, 8, 1)), variables)
    return predict, jnp.asarray(GOLDEN[f"{name}:images"]), jnp.asarray(GOLDEN[f"{name}:labels"])


@pytest.mark.parametrize("name", ["mlp", pytest.param("convnet", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_equal_those_of_auto_lirpa(name, method):
    predict, images, labels = golden(name)
    np.testing.assert_allclose(predict(images), GOLDEN[f"{name}:logits"], atol=1e-5)
    for norm, eps in (("linf", 0.02), ("linf", 0.1), ("l2", 0.1)):
        case = f"{name}:{norm}:{eps}"
        if f"{case}:{method}" not in GOLDEN:
            continue
        ball = Threat(eps=eps, norm=norm) if norm == "linf" else Threat(eps, norm, -jnp.inf, jnp.inf)
        ours = METHODS[method](predict, images, labels, ball, sound=False)
        # Ours are never below those of intervals.
        theirs = np.maximum(GOLDEN[f"{case}:{method}"], GOLDEN[f"{case}:IBP"])
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def worst_of_linear(weights, images, norm, eps):
    """min <w, x'> over the ball in the box, by bisection on the multiplier for l2, in float64."""
    if norm == "linf":
        low, high = np.maximum(images - eps, 0), np.minimum(images + eps, 1)
        return np.where(weights > 0, weights * low, weights * high).sum(-1)
    lowest, highest = np.full(weights.shape[0], 1e-9), np.full(weights.shape[0], 1e9)
    for _ in range(200):
        step = np.sqrt(lowest * highest)[:, None]
        length = np.linalg.norm(np.clip(images - step * weights, 0, 1) - images, axis=-1)
        lowest, highest = np.where(length < eps, step[:, 0], lowest), np.where(length < eps, highest, step[:, 0])
    return (weights * np.clip(images - lowest[:, None] * weights, 0, 1)).sum(-1)


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.3)])
def test_exact_for_a_linear_network(norm, eps):
    predict, images, labels = network("linear", count=6)
    if norm == "l2":  # where the box does not cut the ball, the bound is exact; else only below
        images = 0.4 + 0.2 * images
        labels = predict(images).argmax(-1)
    (variables,) = predict.args
    kernel, bias = (np.asarray(variables["params"]["classifier"][n], np.float64) for n in ("kernel", "bias"))
    flat = np.asarray(images, np.float64).reshape(6, -1)
    expected = np.zeros((6, CLASSES))
    for k in range(CLASSES):
        weights = (kernel[:, labels] - kernel[:, [k]]).T / 0.25
        expected[:, k] = worst_of_linear(weights, flat, norm, eps) - weights.sum(-1) / 2 + bias[labels] - bias[k]
    for method in METHODS.values():
        np.testing.assert_allclose(method(predict, images, labels, Threat(eps, norm), sound=False), expected,
                                   atol=2e-5)
        assert (method(predict, images, labels, Threat(eps, norm)) <= expected).all()


@pytest.mark.parametrize("name", ["mlp", pytest.param("branched", marks=pytest.mark.slow)])
def test_tighter_and_tighter_never_beyond_an_attack(name):
    predict, images, labels = NETWORKS[name]()
    within = Threat(eps=0.03)
    found = [bounds.ibp(predict, images, labels, within)]
    found += [bounds.crown(predict, images, labels, within, intermediate=i) for i in ("ibp", "crown")]
    found += [alpha(predict, images, labels, within)]
    reached = [gradient.pgd(jax.random.key(0), predict, images, labels, within, targets=jnp.full_like(labels, k),
                            objective="margin").images for k in range(CLASSES)]
    for images in reached:
        assert (margins(predict, images, labels) >= found[-1]).all()
    assert all((looser <= tighter).all() for looser, tighter in zip(found, found[1:], strict=False))
    assert all(looser.sum() < tighter.sum() - 0.01 for looser, tighter in zip(found, found[1:], strict=False))
    assert (picked(found[0], labels) <= 0).all() and (picked(found[0], labels) > -0.01).all()


@pytest.mark.parametrize("name, norm, eps, methods", [
    ("mlp", "linf", 0.05, [bounds.ibp, bounds.crown, alpha]),
    pytest.param("branched", "linf", 0.05, [bounds.ibp, bounds.crown], marks=pytest.mark.slow),
    pytest.param("convnet", "linf", 0.05, [bounds.ibp, METHODS["CROWN-IBP"]], marks=pytest.mark.slow),
    pytest.param("plain", "linf", 0.05, [bounds.ibp, METHODS["CROWN-IBP"]], marks=pytest.mark.slow),
    ("mlp", "l2", 0.4, [bounds.ibp, bounds.crown]), ("mlp", "l1", 1.0, [bounds.crown])])
def test_no_violation_in_a_million_points(name, norm, eps, methods):
    """200,000 in each of six cases: uniform ones, and corners or ends of random directions."""
    predict, images, labels = NETWORKS[name]()
    within = Threat(eps=eps, norm=norm)
    found = [sampled(jax.random.key(i), predict, images, labels, within) for i in range(10)]
    gap, least, most = (jnp.stack(part) for part in zip(*found, strict=True))
    for method in methods:
        low = method(predict, images, labels, within)
        assert (gap.min(0) >= low).all()
        assert (low > -jnp.inf).all()
    lower, upper = bounds.interval(predict, images, within)
    assert (least.min(0) >= lower).all() and (most.max(0) <= upper).all()


@functools.partial(jax.jit, static_argnames=("points",))
def sampled(key, predict, images, labels, within, points=5000):
    """The least margins, least and largest logits over so many points an image."""
    many, names = jnp.repeat(images, points, 0), jnp.repeat(labels, points)
    uniform = threat.random_start(jax.random.split(key, len(many)), many, within)
    far = threat.inside(many + 1e3 * threat.steepest(uniform - many, within.norm), many, within)
    logits = predict(jnp.where(jax.random.bernoulli(key, 0.5, (len(many), 1, 1, 1)), uniform, far))
    gap = picked(logits, names)[:, None] - logits
    gap, logits = (values.reshape(len(images), points, -1) for values in (gap, logits))
    return gap.min(1), logits.min(1), logits.max(1)


@pytest.mark.parametrize("name", ["mlp", "branched", "plain"])
def test_rounding_is_within_the_margin_and_would_be_seen(name):
    """In a ball that no float32 resolves, bounds without the margin are violated by rounding; with it never."""
    predict, images, labels = NETWORKS[name]()
    exact = jax.jit(lambda predict, images, labels: margins(predict, images, labels))
    seen = [margins(predict, images, labels), exact(predict, images, labels),
            jnp.concatenate([margins(predict, images[i:i + 1], labels[i:i + 1]) for i in range(len(images))])]
    for method in (bounds.ibp, bounds.crown):
        tiny = Threat(eps=1e-9)
        loose, sound = (method(predict, images, labels, tiny, sound=s) for s in (False, True))
        assert all((margin >= sound).all() for margin in seen)
        assert any((margin < loose).any() for margin in seen)
        assert jnp.abs(sound - loose).max() < 0.01


def test_each_image_by_itself_and_nothing_recompiles():
    predict, images, labels = network("mlp,width=12")
    other, *_ = network("mlp,width=12", seed=3)
    eps = jnp.array([0.01, 0.02, 0.03, 0.04])
    together = bounds.crown(predict, images, labels, Threat(eps=eps))
    count = bounds.crown._cache_size()
    bounds.crown(other, images[::-1], labels[::-1], Threat(eps=eps / 2))
    assert bounds.crown._cache_size() == count
    for i in range(4):
        alone = bounds.crown(predict, images[i:i + 1], labels[i:i + 1], Threat(eps=eps[i:i + 1]))
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)


def test_derivatives_are_those_of_the_bounds():
    predict, images, labels = network("mlp,width=6", count=2)

    def total(predict):
        return bounds.crown(predict, images, labels, Threat(eps=0.02), sound=False).sum()

    slope = jax.grad(total, allow_int=True)(predict)
    direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(7), x.shape), predict)
    ahead, behind = (total(jax.tree.map(lambda p, d, s=s: p + s * d, predict, direction)) for s in (1e-3, -1e-3))
    along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), slope, direction)))
    assert jnp.isfinite(along)
    np.testing.assert_allclose(along, (ahead - behind) / 2e-3, rtol=0.02)


def test_bounded_by_pieces_of_memory(monkeypatch):
    predict, images, labels = network("mlp,width=12")
    whole = bounds.crown(predict, images, labels, Threat(eps=0.05))
    monkeypatch.setattr(relaxation, "CHUNK", 7)
    bounds.crown.clear_cache()
    np.testing.assert_allclose(bounds.crown(predict, images, labels, Threat(eps=0.05)), whole, atol=1e-5)
    bounds.crown.clear_cache()


def test_certified():
    labels = jnp.array([0, 1, 1, 0])
    found = jnp.array([[0.0, 1.0, 2.0], [1.0, 0.0, 0.5], [1.0, 0.0, -0.1], [0.0, jnp.nan, 1.0]])
    assert bounds.certified(found, labels).tolist() == [True, True, False, False]


def test_what_has_no_rule_is_named():
    images, labels = jnp.full((2, *SHAPE), 0.5), jnp.zeros(2, jnp.int32)

    def curved(weights, images):
        return jnp.tanh(images.reshape(len(images), -1)) @ weights

    def squared(weights, images):
        flat = images.reshape(len(images), -1)
        return (flat * flat) @ weights

    def divided(weights, images):
        flat = images.reshape(len(images), -1)
        return nn.relu(flat / flat.max(-1, keepdims=True)) @ weights

    def pooled(weights, images):  # the start is no constant to JAX, so that this is a reduction by any function
        pools = jax.lax.reduce_window(images, jnp.float32(0) * weights[0, 0], jax.lax.max, (1, 3, 3, 1), (1, 1, 1, 1),
                                      "SAME")
        return pools.reshape(len(images), -1) @ weights

    weights = jnp.ones((36, CLASSES))
    for function, name in ((curved, "tanh"), (squared, "mul"), (divided, "div"), (pooled, "reduce_window")):
        with pytest.raises(InputError, match=name):
            bounds.ibp(jax.tree_util.Partial(function, weights), images, labels, Threat(eps=0.1))
    predict, *_ = network("mlp,width=12")
    with pytest.raises(InputError, match="l0"):
        bounds.ibp(predict, images, labels, Threat(eps=2, norm="l0"))
    with pytest.raises(InputError, match="intermediate='fast'"):
        bounds.crown(predict, images, labels, Threat(eps=0.1), intermediate="fast")
    half = predictor(models.create("mlp,width=12", CLASSES, SHAPE, "bfloat16"), predict.args[0])
    with pytest.raises(InputError, match="bfloat16"):
        bounds.ibp(half, images, labels, Threat(eps=0.1))


def test_a_convolution_is_one_layer_whatever_form_it_runs_in():
    model = models.create("plain,width=2", 10, (12, 12, 1))
    predict = predictor(model, model.init(jax.random.key(0), jnp.zeros((1, 12, 12, 1))))
    names = [equation.name for equation in program.trace(predict, jnp.zeros((12, 12, 1)))[0][1:]]
    assert names.count("conv_general_dilated") == 2 and "concatenate" not in names

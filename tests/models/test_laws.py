"""Laws that hold for every network in the registry, and published sizes."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from dlcourse import models
from dlcourse.contracts import InputError
from dlcourse.models import size

CLASSES, IMAGE_SHAPE = 3, (8, 8, 1)
SMALL = {
    "linear": ("linear", {}),
    "mlp": ("mlp,width=8,dropout=0.5", {}),
    "convnet": ("convnet,width=4,stages=2,first_kernel=5", {}),
    "convnet of strides": ("convnet,width=4,stages=2,halve=stride,hidden=6", {}),
    "plain": ("plain,width=3", {}),
    "resnet18": ("resnet18", {"blocks": (1, 1)}),
    "resnet34": ("resnet34,stem=imagenet", {"blocks": (2, 1)}),
    "resnet50": ("resnet50,stem=imagenet", {"blocks": (1, 1)}),
    "wide_resnet": ("wide_resnet,depth=10,widen=1", {}),
    "vit_ti": ("vit_ti,patch=4", {"width": 12, "depth": 1}),
    "vit_s": ("vit_s,patch=2", {"width": 12, "depth": 2}),
    "vit_b": ("vit_b", {"width": 24, "depth": 1}),
}
every = pytest.mark.parametrize("name", SMALL)


def test_the_laws_are_held_against_every_network():
    assert set(models.names()) <= set(SMALL)


@functools.cache
def small(name, dtype="float32"):
    """A network of this kind that compiles quickly."""
    spec, shrunk = SMALL[name]
    return models.create(spec, CLASSES, IMAGE_SHAPE, dtype).clone(**shrunk)


@functools.cache
def images():
    return jax.random.uniform(jax.random.key(1), (4, *IMAGE_SHAPE))


@functools.cache
def variables(name):
    """Parameters at a generic point: what starts at zero (last scales, biases) would hide its gradients."""
    shapes = size.abstract_variables(small(name), IMAGE_SHAPE)
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan_in = max(1, np.prod(leaf.shape[:-1]))
        return jnp.asarray(rng.normal(0.1, fan_in**-0.5, leaf.shape), jnp.float32)

    drawn = {"params": jax.tree.map(draw, shapes["params"])}
    if "batch_stats" in shapes:
        drawn["batch_stats"] = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5), shapes["batch_stats"])
    return drawn


def train(model, variables, images):
    """(logits, taps), and the state that training changes."""
    return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})


class Forward:
    """One compilation for all laws that need values: every tap is edited by a gain."""

    def __init__(self, name):
        self.name, self.traces = name, 0
        self.taps = list(jax.eval_shape(small(name).apply, variables(name), images())[1])
        self._compiled = jax.jit(self._scale_taps)

    def _scale_taps(self, variables, images, gains):
        self.traces += 1
        edit = {tap: lambda x, gain=gain: x * gain for tap, gain in gains.items()}
        return small(self.name).apply(variables, images, edit=edit)

    def __call__(self, images, without=None):
        gains = {tap: jnp.zeros(()) if tap == without else jnp.ones(()) for tap in self.taps}
        return self._compiled(variables(self.name), images, gains)


forward = functools.cache(Forward)


@every
def test_shapes(name):
    shapes = size.abstract_variables(small(name), IMAGE_SHAPE)
    evaluated = jax.eval_shape(small(name).apply, shapes, images())
    trained, state = jax.eval_shape(functools.partial(train, small(name)), shapes, images())
    assert jax.tree.map(jnp.shape, trained) == jax.tree.map(jnp.shape, evaluated)
    assert jax.tree.leaves(state) == jax.tree.leaves(shapes.get("batch_stats", {}))
    logits, taps = evaluated
    assert logits.shape == (4, CLASSES) and taps["features"].ndim == 2
    assert all(tap.shape[0] == 4 for tap in taps.values())


@every
def test_an_example_does_not_depend_on_its_batch(name):
    together, _ = forward(name)(images())
    shuffled, _ = forward(name)(images()[::-1])
    beside_blanks, _ = forward(name)(images().at[1:].set(0.0))
    np.testing.assert_allclose(shuffled[::-1], together, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(beside_blanks[0], together[0], rtol=1e-5, atol=1e-6)
    assert np.ptp(together, axis=0).min() > 1e-4, "the images are not told apart"


@every
def test_taps_are_complete_and_in_the_order_of_computation(name):
    names = forward(name).taps
    logits, taps = forward(name)(images())
    assert list(taps) == names and names[-2:] == ["features", "logits"]
    np.testing.assert_array_equal(logits, taps["logits"])
    for position, tap in enumerate(names):
        edited_logits, edited = forward(name)(images(), without=tap)
        assert not np.any(edited[tap])
        assert not np.array_equal(edited_logits, logits), f"{tap} has no effect on the logits"
        for earlier in names[:position]:
            np.testing.assert_array_equal(edited[earlier], taps[earlier], err_msg=f"{tap} is computed before {earlier}")


@every
def test_whatever_has_parameters_is_tapped(name):
    exempt = {"classifier", "class_token", "positions"}
    steps = {module for module in variables(name)["params"] if "norm" not in module}
    assert steps - exempt <= set(forward(name).taps)


@every
def test_an_identity_edit_changes_nothing(name):
    def program(edit):
        return str(jax.make_jaxpr(functools.partial(small(name).apply, edit=edit))(variables(name), images()))

    assert program({tap: lambda x: x for tap in forward(name).taps}) == program(None)


@every
def test_an_unknown_edit_is_an_error(name):
    with pytest.raises(ValueError, match="no tap called 'nowhere'.*logits"):
        jax.eval_shape(functools.partial(small(name).apply, edit={"nowhere": jnp.tanh}), variables(name), images())


@every
def test_a_second_call_does_not_recompile(name):
    forward(name)(images())
    forward(name)(images() * 0.5, without="features")
    assert forward(name).traces == 1


def _gradient(name):
    def gradient(variables, images):
        def loss(params):
            (logits, _), _ = train(small(name), {**variables, "params": params}, images)
            return (logits * jnp.arange(1.0, 1 + CLASSES)[None] ** 2 * jnp.arange(4.0)[:, None]).sum()

        return jax.grad(loss)(variables["params"])

    return jax.jit(gradient)


@every
def test_a_gradient_reaches_every_parameter(name):
    for path, leaf in jax.tree_util.tree_leaves_with_path(_gradient(name)(variables(name), images())):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-6, jax.tree_util.keystr(path)


@every
def test_training_lowers_for_hardware_that_is_absent(name):
    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(_gradient(name), platforms=platforms)(variables(name), images())
    assert exported.platforms == platforms


@every
def test_bfloat16_computes_nearly_the_same(name):
    model = small(name, "bfloat16")
    shapes = size.abstract_variables(model, IMAGE_SHAPE)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    logits, taps = jax.jit(model.apply)(variables(name), images())
    assert logits.dtype == jnp.float32
    exact, _ = forward(name)(images())
    assert np.linalg.norm(logits - exact) < 0.03 * np.linalg.norm(exact)
    half = [tap for tap, value in taps.items() if value.dtype == jnp.bfloat16]
    assert half == [tap for tap in taps if tap not in ("features", "logits")]


# He et al. 2016 as in torchvision; Dosovitskiy et al. 2021 and Steiner et al. 2022 as in timm.
@pytest.mark.parametrize("name, parameters, giga_multiply_adds", [
    ("resnet18", 11_689_512, 1.814),
    ("resnet50", 25_557_032, 4.089),
    ("vit_s,patch=16", 22_050_664, 4.6),
])
def test_sizes_as_published(name, parameters, giga_multiply_adds):
    model = models.create(name, 1000, (224, 224, 3))
    assert size.parameters(size.abstract_variables(model, (224, 224, 3))) == parameters
    assert size.multiply_adds(model, (224, 224, 3)) == pytest.approx(giga_multiply_adds * 1e9, rel=1e-3)


def test_wide_resnet_has_the_published_size():
    variables = size.abstract_variables(models.create("wide_resnet,depth=28,widen=10", 10, (32, 32, 3)), (32, 32, 3))
    assert size.parameters(variables) == pytest.approx(36.5e6, rel=1e-3)


def test_options_that_are_left_out_follow_the_image():
    assert models.create("resnet18", 2, (64, 64, 3)).stem == "small"
    assert models.create("resnet18", 2, (65, 80, 3)).stem == "imagenet"
    assert models.create("resnet18,stem=small", 2, (224, 224, 3)).stem == "small"
    assert [models.create("vit_ti", 2, (side, side, 1)).patch for side in (8, 28, 224)] == [2, 4, 16]


@pytest.mark.parametrize("spec, message", [
    ("convnett", "unknown model 'convnett': did you mean 'convnet'\\? there is linear, mlp"),
    ("", "unknown model ''"),
    ("convnet,wdth=3", "unknown option of model convnet 'wdth': did you mean 'width'\\?"),
    ("resnet18,blocks=3", "unknown option of model resnet18 'blocks': there is stem"),
    ("convnet,width", "'width' is not of the form option=value"),
    ("convnet,width=0", "width=0 must be a whole number, at least 1"),
    ("convnet,width=2.5", "width=2.5 must be a whole number"),
    ("mlp,dropout=nan", "dropout=nan must be a number in \\[0, 1\\)"),
    ("mlp,width=3,width=4", "sets an option twice"),
    ("resnet50,stem=large", "unknown value of resnet50's stem 'large': there is small, imagenet"),
    ("wide_resnet,depth=17", "depth=17 must be 6n \\+ 4"),
    ("vit_s,patch=3", "patch=3 does not divide images of 8x8 pixels"),
])
def test_a_mistake_is_explained(spec, message):
    with pytest.raises(InputError, match=message):
        models.create(spec, CLASSES, IMAGE_SHAPE)


def test_an_unknown_dtype_is_explained():
    with pytest.raises(InputError, match="'float16' is not known"):
        models.create("linear", CLASSES, IMAGE_SHAPE, "float16")

"""Filtering and pooling: every form of the computation is the same mathematics."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dlcourse.models import layers


def arrays(*shapes, dtype=np.float64):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.parametrize(("kernel", "stride", "padding", "shifted"), [
    (3, 1, 1, True), (3, 1, 0, True), (5, 1, 2, True), (11, 1, 5, True), (3, 1, 1, False), (3, 2, 1, False),
    (7, 2, 3, False), (1, 2, 0, False), (4, 2, 1, False), (4, 2, 0, False), (6, 3, 2, False)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_form_for_a_cpu_is_the_convolution_in_all_derivatives(kernel, stride, padding, shifted, channels):
    with jax.enable_x64(True):
        x, w, dx, dw = arrays(*[(2, 12, 13, channels), (kernel, kernel, channels, 4)] * 2)

        def native(x, w):
            return jnp.sin(layers._convolve(x, w, stride, padding)).sum()

        def on_cpu(x, w):
            return jnp.sin(layers._convolve_on_cpu(x, w, stride, padding, shifted)).sum()

        def everything(f):
            gradient = jax.grad(f, (0, 1))
            return f(x, w), gradient(x, w), jax.jvp(f, (x, w), (dx, dw)), jax.jvp(gradient, (x, w), (dx, dw))

        for one, other in zip(*(jax.tree.leaves(everything(f)) for f in (native, on_cpu)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels", [1, 3])
def test_there_are_products_alone_where_strides_divide_the_kernel(channels):
    x, w = arrays((2, 8, 8, channels), (4, 4, channels, 4), dtype=np.float32)
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda x: layers._convolve_on_cpu(x, w, 2, 1, False).sum()))(x))
    assert "conv_general_dilated[" not in jaxpr and "dot_general[" in jaxpr


def test_the_shifted_weight_gradient_has_no_convolution_over_the_kernel():
    x, w = arrays((2, 8, 8, 3), (3, 3, 3, 4), dtype=np.float32)
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda w: layers._convolve_on_cpu(x, w, 1, 1, True).sum()))(w))
    assert jaxpr.count("conv_general_dilated") <= 1 and jaxpr.count("dot_general") == 9


@pytest.mark.parametrize("machine", ["avx2", "avx2 avx512f", ""])
def test_the_form_follows_the_cpu(machine, monkeypatch):
    layers._cpu_lacks_avx512.cache_clear()
    monkeypatch.setattr(layers.pathlib.Path, "exists", lambda self: True)
    monkeypatch.setattr(layers.pathlib.Path, "read_text", lambda self: machine)
    assert layers._cpu_lacks_avx512() == (machine == "avx2")
    layers._cpu_lacks_avx512.cache_clear()


@pytest.mark.parametrize(
    ("size", "window", "stride", "padding"), [(8, 2, 2, 0), (7, 2, 2, 0), (9, 3, 2, 1), (6, 3, 1, 1)]
)
def test_max_pool_is_reduce_window_where_no_maxima_tie(size, window, stride, padding):
    (x,) = arrays((2, size, size, 3), dtype=np.float32)

    def reference(x):
        pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, window, window, 1), (1, stride, stride, 1), pads)

    def ours(x):
        return layers.max_pool(x, window, stride, padding)

    np.testing.assert_array_equal(ours(x), reference(x))
    gradients = [jax.grad(lambda x, f=f: jnp.sin(f(x)).sum())(x) for f in (ours, reference)]
    np.testing.assert_allclose(*gradients, rtol=1e-6)


def test_equal_maxima_share_the_gradient():
    gradient = jax.grad(lambda x: layers.max_pool(x).sum())(jnp.ones((1, 2, 2, 1)))
    np.testing.assert_array_equal(gradient.ravel(), [0.25] * 4)


def test_convolve_against_the_definition():
    x, w = arrays((2, 7, 6, 3), (3, 3, 3, 4), dtype=np.float32)
    got = np.asarray(layers.convolve(x, w, stride=2))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    assert got.shape == (2, 4, 3, 4)
    for i, j in itertools.product(range(4), range(3)):
        patch = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        np.testing.assert_allclose(got[:, i, j], np.einsum("bijc,ijco->bo", patch, w), rtol=2e-4, atol=1e-5)


def test_batch_normalisation_is_flaxs():
    (x,) = arrays((4, 5, 5, 3), dtype=np.float32)
    x = 3.0 * x + 2.0
    for train in (True, False):
        ours, theirs = layers.BatchNorm(train), nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)
        variables = ours.init(jax.random.key(0), x)
        assert jax.tree.structure(variables) == jax.tree.structure(theirs.init(jax.random.key(0), x))
        (y, state), (expected, expected_state) = (
            m.apply(variables, x, mutable=["batch_stats"]) for m in (ours, theirs)
        )
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)

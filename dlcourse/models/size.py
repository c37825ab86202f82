"""How large a network is: parameters, and multiplications per image, counted without running it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def parameters(variables: Any) -> int:
    """P, the trained numbers: those of the collection `params` (arrays or their shapes)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


def abstract_variables(model: nn.Module, image_shape: tuple[int, int, int]) -> Any:
    """The shapes of the variables that `model.init` would make for images of (H, W, C)."""
    return jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, *image_shape))), jax.random.key(0))


def multiply_adds(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-add pairs of convolutions and matrix products to classify one image of (H, W, C).

    What publications call GMACs and often, loosely, GFLOPs. Additions, normalisations and other
    element-wise work are left out, as they leave them out.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = abstract_variables(model, image_shape)
    jaxpr = jax.make_jaxpr(lambda v, x: model.apply(v, x)[0])(variables, images)
    return _count(jaxpr.jaxpr)


def flops(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Floating-point operations to classify one image: a multiplication and an addition per pair."""
    return 2 * multiply_adds(model, image_shape)


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """The programs that an equation calls: the bodies of jit, of custom derivatives, of loops."""
    for value in equation.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield inner


def _count(jaxpr: Any) -> int:
    return sum(_count_one(equation) for equation in jaxpr.eqns)


def _count_one(equation: Any) -> int:
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        # A kernel holds (channels in / groups) x pixels numbers for every channel out.
        kernel, out_axis = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec[0]
        return math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[out_axis]
    if name in ("while", "cond"):
        raise NotImplementedError(f"how often {name!r} runs its body is not known before it runs")
    repeats = equation.params["length"] if name == "scan" else 1
    return repeats * sum(_count(inner) for inner in inner_jaxprs(equation))

"""A network's program as a list of equations that depend on the image, and what intervals do in each of them.

Everything else (normalisation folded into a factor, say) is computed once, so that weights may be traced. Of the
primitives in use it is known whether they only move numbers, add, scale or sum them (all of these are affine in what
depends on the image), or take maxima; any other is an error that names it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dlcourse.contracts import InputError
from dlcourse.models.layers import compiled_for

MOVES = frozenset("broadcast_in_dim concatenate convert_element_type copy expand_dims pad reshape rev select_n slice "
                  "squeeze transpose".split())
ADDS = frozenset("add add_any neg sub".split())
SCALES = frozenset(("div", "mul"))
SUMS = frozenset("conv_general_dilated dot_general reduce_sum reduce_window_sum".split())
MAXIMA = frozenset("clamp max min reduce_max reduce_min reduce_window_max reduce_window_min".split())
AFFINE = MOVES | ADDS | SCALES | SUMS


class Ref(NamedTuple):
    """Stands for the value of the equation of this number; 0 is the image."""

    number: int


class Equation(NamedTuple):
    """One primitive applied to operands, each a Ref or an array that does not depend on the image."""

    name: str
    primitive: Any
    params: dict[str, Any]
    operands: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Of the operands."""

    @property
    def refs(self) -> tuple[int, ...]:
        """The numbers of the operands that depend on the image."""
        return tuple(operand.number for operand in self.operands if isinstance(operand, Ref))

    def __call__(self, *values, constants=lambda x: x):
        """The primitive's value, given those of `refs` in order; `constants` changes the other operands."""
        values = iter(values)
        operands = [next(values) if isinstance(o, Ref) else constants(o) for o in self.operands]
        return self.primitive.bind(*operands, **self.params)

    @property
    def shifts(self) -> bool:
        """Whether an affine equation may be other than 0 where all of `refs` are."""
        return len(self.refs) < len(self.operands) and self.name not in SCALES | SUMS

    @property
    def terms(self) -> int:
        """The longest sum that the primitive or its transpose computes."""
        if self.name == "reduce_sum":
            return math.prod(self.shapes[0][axis] for axis in self.params["axes"])
        if self.name == "reduce_window_sum":
            return math.prod(self.params["window_dimensions"])
        if self.name == "conv_general_dilated":
            kernel, (out, channels, *_) = self.shapes[1], self.params["dimension_numbers"].rhs_spec
            groups = self.params["feature_group_count"]
            return max(math.prod(kernel) // kernel[out], math.prod(kernel) // kernel[channels] // groups)
        if self.name == "dot_general":
            side = 1 if isinstance(self.operands[0], Ref) else 0
            weights = self.shapes[side]
            (contracted, _) = self.params["dimension_numbers"]
            fan_in = math.prod(weights[axis] for axis in contracted[side])
            return max(fan_in, math.prod(weights) // fan_in)
        return 1


def trace(predict, image) -> tuple[list[Equation | None], int]:
    """The equations of predict(image[None]) that depend on the image, and the number of the logits' equation.

    Args:
      predict: images -> logits, a pytree.
      image: (H,W,C), for its shape.

    Raises:
      InputError: a primitive that has no rule here, or logits that do not depend on the image.
    """
    leaves, tree = jax.tree.flatten(predict)
    # The products that bound must be no less exact than those whose rounding is bounded.
    # A convolution is one linear layer, as it is written for a GPU; a CPU's products of patches are many.
    with jax.default_matmul_precision("highest"), compiled_for("gpu"):
        program = jax.make_jaxpr(lambda leaves, x: tree.unflatten(leaves)(x))(leaves, jnp.zeros((1, *image.shape)))
    equations: list[Equation | None] = [None]
    (logits,) = _follow(program.jaxpr, program.consts, [*leaves, Ref(0)], equations)
    if not isinstance(logits, Ref):
        raise InputError("the logits do not depend on the image: there is nothing to bound")
    return equations, logits.number


def _follow(jaxpr, consts, arguments, equations):
    """Values of a program's outputs: Refs where they depend on the image, whose equations are appended."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

    def read(atom):
        return atom.val if hasattr(atom, "val") else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        inner = _called(equation)
        if inner is not None:
            found = _follow(inner.jaxpr, inner.consts, operands, equations)
        elif any(isinstance(operand, Ref) for operand in operands):
            found = [_append(equation, operands, equations)]
        else:
            found = equation.primitive.bind(*operands, **equation.params)
            found = found if equation.primitive.multiple_results else [found]
        values.update(zip(equation.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _called(equation):
    """The program that an equation only calls: jit, custom derivatives, rematerialisation; else None."""
    if equation.primitive.name not in CALLS:  # loops and reductions have programs, too
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(name)
        if inner is not None:
            return inner if hasattr(inner, "consts") else _Closed(inner, ())
    return None


CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call",
         "custom_vjp_call", "custom_vjp_call_jaxpr"}


class _Closed(NamedTuple):
    jaxpr: Any
    consts: tuple[Any, ...]


def _append(equation, operands, equations):
    name, out = equation.primitive.name, equation.outvars[0].aval
    depends = [isinstance(operand, Ref) for operand in operands]
    if name == "pad" and not depends[1]:  # as pools do: infinity times a coefficient of zero would be no number
        operands[1] = jnp.clip(operands[1], -1e30, 1e30)
    made = Equation(name, equation.primitive, equation.params, tuple(operands),
                    tuple(atom.aval.shape for atom in equation.invars))
    fault = ""
    if name not in AFFINE | MAXIMA or len(equation.outvars) > 1:
        fault = "there is no rule for it"
    elif name in ("conv_general_dilated", "dot_general", "mul", "div") and sum(depends) > 1:
        fault = "both operands depend on the image"
    elif depends != [True, *depends[1:]] and name in ("conv_general_dilated", "div"):
        fault = "the second operand depends on the image"
    elif name == "pad" and depends[1] or name == "select_n" and depends[0]:
        fault = "which numbers are taken depends on the image"
    elif out.dtype not in (jnp.float32, jnp.float64):
        fault = f"it computes in {out.dtype}"
    if fault:
        raise InputError(f"bounds cannot follow the primitive {name!r}: {fault}; take a network of linear layers, "
                         "normalisation, relu and pools in float32")
    equations.append(made)
    return Ref(len(equations) - 1)


class Interval(NamedTuple):
    """Numbers between lower and upper, of one shape."""

    lower: jax.Array
    upper: jax.Array

    @property
    def size(self) -> jax.Array:
        """The largest absolute value."""
        return jnp.maximum(jnp.abs(self.lower), jnp.abs(self.upper))

    def widened(self, by) -> Interval:
        return Interval(self.lower - by, self.upper + by)

    def meet(self, other: Interval) -> Interval:
        """What lies in both; where rounding leaves nothing, a point between."""
        lower, upper = jnp.maximum(self.lower, other.lower), jnp.minimum(self.upper, other.upper)
        return Interval(jnp.minimum(lower, upper), jnp.maximum(lower, upper))


def unit(sound: bool) -> float:
    """The relative rounding error that bounds allow an operation: 4 times that of float32, 2^-24; 0 if not sound.

    One for the network's own rounding, two for those of the bounds, the rest for higher orders. Single operations have
    twice that: constants that go into them, such as a factor with a root, may themselves be rounded in another way.
    """
    return 4 * 2.0**-24 if sound else 0.0


def propagate(equation: Equation, operands: list[Interval], sound: bool) -> Interval:
    """The interval of an equation's value, given those of its `refs` in order (Gowal et al. 2018, section 3).

    With `sound` it holds the value that the network computes in float32, summed in any order: a sum of n products is
    off by at most n 2^-24 times the sum of their absolute values (Higham 2002, section 3.1).
    """
    lower, upper = zip(*operands, strict=True)
    if equation.name in MOVES | MAXIMA:
        return Interval(equation(*lower), equation(*upper))
    if equation.name in ADDS | SCALES:
        if equation.name == "neg" or equation.name == "sub" and not isinstance(equation.operands[0], Ref):
            found = Interval(equation(*upper), equation(*lower))
        elif equation.name == "sub" and len(operands) == 2:
            found = Interval(equation(lower[0], upper[1]), equation(upper[0], lower[1]))
        else:
            ends = equation(*lower), equation(*upper)
            found = Interval(jnp.minimum(*ends), jnp.maximum(*ends))
        return found.widened(2 * unit(sound) * found.size) if sound else found
    (x,) = operands
    middle, radius = (x.lower + x.upper) / 2, (x.upper - x.lower) / 2
    if sound:
        radius = radius + (equation.terms + 2) * unit(sound) * x.size
    middle, radius = equation(middle), equation(radius, constants=jnp.abs)
    return Interval(middle - radius, middle + radius)


def slack(equation: Equation, operands: list[Interval], value: Interval) -> jax.Array:
    """How far rounding may move each number of an equation's value, and of linear bounds carried through it."""
    if equation.name in SUMS:
        return (equation.terms + 2) * unit(True) * equation(operands[0].size, constants=jnp.abs)
    return 2 * unit(True) * value.size

"""Follow intervals of pixels through a traced program: what each number may depend on.

The arithmetic of Araujo, Norris & Sim 2019, "Computing Receptive Fields of Convolutional Neural
Networks", eq. 2-5, applied to a jaxpr instead of a list of layers, so that it holds for whatever
the program really does: branches, pools written as slices, padding of any kind.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from dlcourse.models.size import inner_jaxprs


class Interval(NamedTuple):
    """Unit i of an axis sees the pixels [start + i stride, start + i stride + size)."""

    start: int
    size: int
    stride: int

    def window(self, kernel: int, stride: int, padding: int, dilation: int = 1) -> Interval:
        """After a filter or pool: unit i reads `kernel` units, from i stride - padding on."""
        reach = (kernel - 1) * dilation * self.stride
        return Interval(self.start - padding * self.stride, self.size + reach, self.stride * stride)

    def clip(self, unit: int, length: int) -> tuple[int, int]:
        """The pixels [first, last) that `unit` sees of an image with `length` pixels on this axis."""
        first = self.start + unit * self.stride
        return max(0, first), min(length, first + self.size)


class Track(NamedTuple):
    """An array keeps one direction of the image on `axis`, whose units see `interval`."""

    axis: int
    interval: Interval


EVERYTHING = "everything"
"""In place of a Track: every number of the array may depend on all pixels of the direction (an upper
bound: which pixels a pool leaves out at the border is not followed through an average over the image).
In place of either, None: no number depends on the image."""

Seen = Track | str | None


def follow(jaxpr: Any, inputs: Sequence[Seen]) -> list[Seen]:
    """What the outputs of a program see of one direction of the image, given what its inputs see."""
    seen = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom):
        return None if hasattr(atom, "val") else seen.get(atom)

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        seen.update(zip(equation.outvars, _outputs(equation, operands), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(equation, operands):
    count = len(equation.outvars)
    if all(seen is None for seen in operands):
        return [None] * count
    name, inner = equation.primitive.name, list(inner_jaxprs(equation))
    if len(inner) == 1 and len(inner[0].invars) == len(operands) and name not in ("scan", "while"):
        return follow(inner[0], operands)
    # What has no rule may mix pixels in any way.
    if EVERYTHING in operands or name not in RULES:
        return [EVERYTHING] * count
    return [RULES[name](equation, operands)] * count


def _join(equation, operands):
    """The smallest interval around those of all operands, which the same unit reads."""
    return functools.reduce(_around, [seen for seen in operands if seen is not None])


def _around(a, b):
    (axis, first), (other_axis, second) = a, b
    if axis != other_axis or first.stride != second.stride:
        return EVERYTHING
    start = min(first.start, second.start)
    size = max(first.start + first.size, second.start + second.size) - start
    return Track(axis, Interval(start, size, first.stride))


def _conv(equation, operands):
    (track, kernel), params = operands, equation.params
    images, filters, out = params["dimension_numbers"]
    if kernel is not None or track.axis == images[1]:
        return EVERYTHING
    if track.axis == images[0]:
        return track._replace(axis=out[0])
    i = images[2:].index(track.axis)
    if params["lhs_dilation"][i] != 1:
        return EVERYTHING
    kernel_size = equation.invars[1].aval.shape[filters[2 + i]]
    padding, dilation = params["padding"][i][0], params["rhs_dilation"][i]
    return Track(out[2 + i], track.interval.window(kernel_size, params["window_strides"][i], padding, dilation))


def _reduce_window(equation, operands):
    (track, *_), params = operands, equation.params
    axis = track.axis
    if params["base_dilation"][axis] != 1:
        return EVERYTHING
    window, stride, dilation = (params[f"window_{key}"][axis] for key in ("dimensions", "strides", "dilation"))
    return Track(axis, track.interval.window(window, stride, params["padding"][axis][0], dilation))


def _slice(equation, operands):
    (track,), params = operands, equation.params
    stride = params["strides"][track.axis] if params["strides"] else 1
    return track._replace(interval=track.interval.window(1, stride, -params["start_indices"][track.axis]))


def _pad(equation, operands):
    track, _ = operands
    if track is None:
        return EVERYTHING
    low, _, interior = equation.params["padding_config"][track.axis]
    return EVERYTHING if interior else track._replace(interval=track.interval.window(1, 1, low))


def _concatenate(equation, operands):
    joined = _join(equation, operands)
    return EVERYTHING if joined != EVERYTHING and joined.axis == equation.params["dimension"] else joined


def _reduce(equation, operands):
    return _drop(operands[0], equation.params["axes"])


def _squeeze(equation, operands):
    return _drop(operands[0], equation.params["dimensions"])


def _drop(track, axes):
    if track.axis in axes:
        return EVERYTHING
    return track._replace(axis=track.axis - sum(axis < track.axis for axis in axes))


def _transpose(equation, operands):
    return operands[0]._replace(axis=list(equation.params["permutation"]).index(operands[0].axis))


def _broadcast(equation, operands):
    (track, *_), params = operands, equation.params
    axis = params["broadcast_dimensions"][track.axis]
    kept = equation.invars[0].aval.shape[track.axis] == params["shape"][axis]
    return track._replace(axis=axis) if kept else EVERYTHING


def _reshape(equation, operands):
    """An axis survives where an equally long one has equally many numbers before it."""
    (track, *_), before = operands, equation.invars[0].aval.shape
    after = equation.outvars[0].aval.shape
    for axis, length in enumerate(after):
        if length == before[track.axis] and math.prod(after[:axis]) == math.prod(before[: track.axis]):
            return track._replace(axis=axis)
    return EVERYTHING


def _dot_general(equation, operands):
    contracted, batch = equation.params["dimension_numbers"]
    if None not in operands:
        return EVERYTHING
    side = 0 if operands[1] is None else 1
    axis = operands[side].axis
    if axis in contracted[side]:
        return EVERYTHING
    if axis in batch[side]:
        return operands[side]._replace(axis=list(batch[side]).index(axis))
    free = [[a for a in range(atom.aval.ndim) if a not in contracted[s] + batch[s]]
            for s, atom in enumerate(equation.invars)]
    offset = len(batch[0]) + (len(free[0]) if side else 0)
    return operands[side]._replace(axis=offset + free[side].index(axis))


RULES = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "dot_general": _dot_general,
    "pad": _pad,
    "reshape": _reshape,
    "slice": _slice,
    "squeeze": _squeeze,
    "transpose": _transpose,
    **dict.fromkeys("reduce_max reduce_min reduce_prod reduce_sum".split(), _reduce),
    **dict.fromkeys("reduce_window_max reduce_window_min reduce_window_sum".split(), _reduce_window),
    **dict.fromkeys(
        "abs add add_any and cbrt ceil clamp convert_element_type copy cos div eq erf erfc exp exp2 expm1 floor ge gt "
        "integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow rem round rsqrt select_n sign "
        "sin sqrt square stop_gradient sub tan tanh xor".split(), _join),
}
"""What each primitive does to a Track, given the equation and what its operands see."""

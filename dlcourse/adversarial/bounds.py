"""Certificates by bounding: what differences of logits cannot fall below anywhere in a threat.

All return (B,K) lower bounds of z_label - z_k, 0 at the label itself: an image is certified where all others are
positive (`certified`). They interpret the program of `predict` (see `program`) for every image by itself, so that any
feed-forward network of linear layers, normalisation at evaluation, relu, maxima, sums and branches has them, and are
differentiable, so that they can be trained with. Threats are linf, l2 and l1 balls in the box.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dlcourse.adversarial.program import AFFINE, Equation, Interval, Ref, propagate, slack, trace, unit
from dlcourse.adversarial.threat import Threat, over_pixels
from dlcourse.contracts import InputError, Predict

CHUNK = 1024
"""Rows of coefficients that are carried back at once; more go one chunk after another, to spare memory."""


class _Region(NamedTuple):
    """Around one image: its box (1,H,W,C) of the box and the ball's extent, the ball's centre and radius."""

    box: Interval
    centre: jax.Array
    eps: jax.Array


@functools.partial(jax.jit, static_argnames=("sound",))
def interval(predict: Predict, images, threat: Threat, *, sound: bool = True) -> tuple[jax.Array, jax.Array]:
    """Interval arithmetic from the pixels to the logits: their lower and upper bounds, (B,K) each.

    l_out, u_out = f(m) -+ |f|(r), m and r the middle and half the width, for a linear f; f(l), f(u) for a monotone one
    (Gowal et al. 2018, section 3).

    Args: as of `ibp`.
    """
    def one(predict, region):
        network = _Network(predict, region, threat.norm, sound)
        found = network.values[network.logits]
        return found.lower[0], found.upper[0]

    return _over_images(one, predict, images, threat)


@functools.partial(jax.jit, static_argnames=("sound",))
def ibp(predict: Predict, images, labels, threat: Threat, *, sound: bool = True) -> jax.Array:
    """Interval bound propagation; the linear layers behind the last relu are joined with the difference of logits.

    Gowal et al. 2018, section 3 and their appendix on eliding the last layer. Exact for a network of none but linear
    layers, up to the l2 and l1 ball's cut with the box, where the better of ball and box counts.

    Args:
      predict: images -> logits, a pytree.
      images: (B,H,W,C) in the box.
      labels: (B,).
      threat: of norm linf, l2 or l1; eps may be (B,).
      sound: widen every step by what rounding may do, both here and in the network's own float32 arithmetic, whatever
        the order of its sums (not by arithmetic of less than float32, such as TF32 or a TPU's default). Without, as
        publications have it.

    Returns:
      (B,K) lower bounds of z_label - z_k.

    Raises:
      InputError: a norm or a primitive of the network that there is no rule for.
    """
    def one(predict, region, label):
        network = _Network(predict, region, threat.norm, sound)
        return network.below(*network.differences(label), relax=False)

    return _over_images(one, predict, images, threat, labels)


@functools.partial(jax.jit, static_argnames=("intermediate", "sound"))
def crown(predict: Predict, images, labels, threat: Threat, *, intermediate: str = "crown",
          sound: bool = True) -> jax.Array:
    """Linear lower bounds, carried back from the difference of logits to the pixels (Zhang et al. 2018, section 3).

    A relu of d in [l, u], l < 0 < u, lies above a d with a = 1 where u > -l, else 0, and below u (d - l) / (u - l).
    max(x, y) is y + relu(x - y). What has no linear bounds (other maxima) is bounded by its interval. Never below
    `ibp`, since every interval, the last too, is cut with that of interval arithmetic.

    Args: as of `ibp`, and
      intermediate: whence l and u: "crown", carried back from each relu (cost: as many rows as there are units);
        "ibp", the intervals (CROWN-IBP, Zhang et al. 2020, section 3).
    """
    def one(predict, region, label):
        network = _Network(predict, region, threat.norm, sound, tighten=intermediate == "crown")
        return network.best(*network.differences(label))

    _known(intermediate)
    return _over_images(one, predict, images, threat, labels)


@functools.partial(jax.jit, static_argnames=("steps", "intermediate", "sound"))
def alpha_crown(predict: Predict, images, labels, threat: Threat, *, steps: int = 20, rate: float = 0.1,
                intermediate: str = "crown", sound: bool = True) -> jax.Array:
    """CROWN with the slopes a in [0, 1] that raise the bounds, found by Adam (Xu et al. 2021, section 3.2).

    Every difference of logits has slopes of its own for the pass back from the logits; l and u of relus stay those of
    `crown`. The best bound of all steps, never below `crown`.

    Args: as of `crown`, and
      steps: of Adam.
      rate: its first step size, divided by 1.02 at every step.
    """
    adam = optax.adam(optax.exponential_decay(1.0, 1, 1 / 1.02))

    def one(predict, region, label):
        network = _Network(predict, region, threat.norm, sound, tighten=intermediate == "crown")
        rows = network.differences(label)
        slopes = {i: jnp.broadcast_to(slope, (len(rows[1]), *slope.shape[1:]))
                  for i, slope in network.slopes.items()}

        def total(slopes):
            found = network.below(*rows, slopes=slopes)
            return found.sum(), found

        def step(_, carry):
            slopes, state, best = carry
            gradient, found = jax.grad(total, has_aux=True)(slopes)
            change, state = adam.update(jax.tree.map(jnp.negative, gradient), state)
            slopes = jax.tree.map(lambda slope, by: jnp.clip(slope + rate * by, 0.0, 1.0), slopes, change)
            return slopes, state, jnp.maximum(best, found)

        start = slopes, adam.init(slopes), network.best(*rows)
        slopes, _, best = jax.lax.fori_loop(0, steps, step, start)
        return jnp.maximum(best, network.below(*rows, slopes=slopes))

    _known(intermediate)
    return _over_images(one, predict, images, threat, labels)


def certified(bounds: jax.Array, labels: jax.Array) -> jax.Array:
    """(B,K), (B,) -> (B,) bool: no class but the label can win; never where a bound is not a number."""
    own = jax.nn.one_hot(labels, bounds.shape[-1], dtype=bool)
    return jnp.all(own | (bounds > 0), axis=-1)


def _known(intermediate):
    if intermediate not in ("crown", "ibp"):
        raise InputError(f"intermediate={intermediate!r}: there is crown and ibp")


def _over_images(one, predict, images, threat, *others):
    """`one(predict, region, ...)` for every image by itself."""
    if threat.norm not in ("linf", "l2", "l1"):
        raise InputError(f"norm {threat.norm!r}: there are bounds for linf, l2, l1")
    eps = jnp.broadcast_to(jnp.asarray(threat.eps, images.dtype), (len(images),))
    around = over_pixels(eps, images)
    box = Interval(jnp.maximum(images - around, threat.low), jnp.minimum(images + around, threat.high))
    region = jax.tree.map(lambda x: x[:, None], _Region(box, images, eps))._replace(eps=eps)
    with jax.default_matmul_precision("highest"):
        return jax.vmap(one, (None, *(0,) * (1 + len(others))))(predict, region, *others)


class _Network:
    """The program of a network around one image, with the interval of every equation's value."""

    def __init__(self, predict, region: _Region, norm: str, sound: bool, tighten: bool = False):
        self.equations, self.logits = trace(predict, region.centre[0])
        self.region, self.norm, self.sound = region, norm, sound
        self.values: list[Interval] = [region.box.widened(unit(sound) * region.box.size)]
        self.gaps: dict[int, Interval] = {}  # of x - y for every max(x, y)
        self.slopes: dict[int, jax.Array] = {}  # the lower ones, with a leading axis of one for all rows
        affine = {0}  # depends on the image by linear layers alone: a ball's bounds are better than those of its box
        for number, equation in enumerate(self.equations[1:], 1):
            straight = affine.issuperset(equation.refs)
            if straight and equation.name in AFFINE:
                affine.add(number)
            operands = [self.values[i] for i in equation.refs]
            value = propagate(equation, operands, sound)
            if equation.name == "max":
                carry = tighten or straight and norm != "linf"
                gap, second = self._gap(equation, value.lower.shape, carry)
                self.gaps[number] = gap
                self.slopes[number] = (gap.upper > -gap.lower).astype(gap.upper.dtype)[None]
                if carry:
                    above = Interval(second.lower + jax.nn.relu(gap.lower), second.upper + jax.nn.relu(gap.upper))
                    value = value.meet(above.widened(2 * unit(sound) * above.size))
            self.values.append(value)

    def _gap(self, equation, shape, tighten):
        """The intervals of x - y and of y for max(x, y)."""
        ends = []
        for operand in equation.operands:
            value = self.values[operand.number] if isinstance(operand, Ref) else Interval(operand, operand)
            ends.append(Interval(*(jnp.broadcast_to(end, shape) for end in value)))
        first, second = ends
        gap = Interval(first.lower - second.upper, first.upper - second.lower)
        gap = gap.widened(unit(self.sound) * (first.size + second.size))
        if tighten:
            gap = gap.meet(self._carried_gap(equation, shape))
        return gap, second

    def _carried_gap(self, equation, shape):
        """The interval of x - y from linear bounds."""
        def rows_below(units):
            rows = jax.nn.one_hot(units % size, size) * jnp.where(units < size, 1.0, -1.0)[:, None]
            rows = rows.reshape(-1, *shape)
            return self.below(*self._split(equation, rows, -rows))

        size = math.prod(shape)
        chunks = -(-2 * size // CHUNK)
        if chunks == 1:  # not in a loop, where a CPU's convolutions are slow
            found = rows_below(jnp.arange(2 * size))
        else:
            found = jax.lax.map(rows_below, jnp.arange(chunks * CHUNK).reshape(chunks, CHUNK)).reshape(-1)
        return Interval(found[:size].reshape(shape), -found[size:2 * size].reshape(shape))

    def differences(self, label):
        """The coefficients of z_label - z_k for every k, and the constant that goes with them."""
        classes = self.values[self.logits].lower.shape[-1]
        rows = (jax.nn.one_hot(label, classes)[None] - jnp.eye(classes))[:, None]
        return {self.logits: rows}, jnp.zeros(classes)

    def best(self, coefficients, constant):
        """The better one of the linear bound and that of interval arithmetic."""
        return jnp.maximum(self.below(coefficients, constant), self.below(coefficients, constant, relax=False))

    def below(self, coefficients, constant, relax: bool = True, slopes=None):
        """Lower bounds (R,) of constant + sum_i <coefficients_i, value_i>, carried back to the pixels.

        Args:
          coefficients: {an equation's number: (R, *its shape)}.
          constant: (R,).
          relax: carry on through maxima by their linear bounds; else stop there at their intervals.
          slopes: in place of the default ones.
        """
        coefficients, slopes = dict(coefficients), self.slopes if slopes is None else slopes
        for number in range(max(coefficients), 0, -1):
            if number not in coefficients:
                continue
            rows, equation = coefficients.pop(number), self.equations[number]
            if equation.name in AFFINE:
                carried, by = self._affine(number, equation, rows)
            elif number in self.gaps and relax:
                carried, by = self._maximum(number, equation, rows, slopes[number])
            else:
                carried, by = {}, self._lowest(self.values[number], rows)
            constant = constant + by
            for i, more in carried.items():
                coefficients[i] = coefficients[i] + more if i in coefficients else more
        return constant + self._pixels(coefficients[0]) if 0 in coefficients else constant

    def _affine(self, number, equation: Equation, rows):
        zeros = [jnp.zeros_like(self.values[i].lower) for i in equation.refs]
        bias, pull = jax.vjp(equation, *zeros)
        carried: dict[int, jax.Array] = {}
        for i, more in zip(equation.refs, jax.vmap(pull)(rows), strict=True):
            carried[i] = carried[i] + more if i in carried else more
        by = _dot(rows, bias) if equation.shifts else jnp.zeros(len(rows))
        if self.sound:
            rounding = slack(equation, [self.values[i] for i in equation.refs], self.values[number])
            by = by - _dot(jnp.abs(rows), rounding + bias.size * unit(True) * jnp.abs(bias))
        return carried, by

    def _maximum(self, number, equation: Equation, rows, slopes):
        """Through y + relu(d), d = x - y: rows go to y, and to d times its slopes."""
        low, high = self.gaps[number]
        on, off = (low >= 0)[None], (high <= 0)[None]
        unstable = (low < 0) & (high > 0)
        upper = jnp.where(unstable, high / jnp.where(unstable, high - low, 1.0), 0.0)
        offset = jnp.maximum(-upper * low, high - upper * high) + 2 * unit(self.sound) * (high - low)
        offset = jnp.where(unstable, offset, 0.0)
        slope = jnp.where(rows >= 0, slopes, upper[None])
        through = rows * jnp.where(on, 1.0, jnp.where(off, 0.0, slope))
        carried, by = self._split(equation, through, rows - through)
        by = by + _dot(jnp.minimum(rows, 0.0), offset)
        if self.sound:
            by = by - unit(True) * _dot(jnp.abs(rows), self.values[number].size + offset.size * offset)
        return carried, by

    def _split(self, equation: Equation, first, second):
        """Rows for the two operands of a maximum: to their equations, or, of a constant one, what it adds."""
        carried: dict[int, jax.Array] = {}
        by = jnp.zeros(len(first))
        for operand, rows in zip(equation.operands, (first, second), strict=True):
            if isinstance(operand, Ref):
                more = carried.get(operand.number)
                carried[operand.number] = rows if more is None else more + rows
            else:
                fixed = jnp.broadcast_to(operand, rows.shape[1:])
                by = by + _dot(rows, fixed)
                if self.sound:
                    by = by - fixed.size * unit(True) * _dot(jnp.abs(rows), jnp.abs(fixed))
        return carried, by

    def _lowest(self, value: Interval, rows):
        found = _dot(jnp.maximum(rows, 0.0), value.lower) + _dot(jnp.minimum(rows, 0.0), value.upper)
        return found - value.lower.size * unit(True) * _dot(jnp.abs(rows), value.size) if self.sound else found

    def _pixels(self, rows):
        """min of <rows, x> over the region: exact over the box, and over the ball by the dual norm."""
        boxed = self._lowest(self.values[0], rows)
        if self.norm == "linf":
            return boxed
        flat, centre = rows.reshape(len(rows), -1), self.region.centre
        squares = jnp.square(flat).sum(-1)
        safe = jnp.where(squares > 0, squares, 1.0)
        dual = jnp.where(squares > 0, jnp.sqrt(safe), 0.0) if self.norm == "l2" else jnp.abs(flat).max(-1)
        found = _dot(rows, centre) - self.region.eps * dual
        if self.sound:
            found = found - centre.size * unit(True) * (_dot(jnp.abs(rows), jnp.abs(centre)) + self.region.eps * dual)
        return jnp.maximum(boxed, found)


def _dot(rows, value):
    """(R, *S), S -> (R,)."""
    return (rows * value[None]).sum(tuple(range(1, rows.ndim)))

"""A network's program around one image: the interval of every value, and linear bounds carried back to the pixels."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dlcourse.adversarial.program import AFFINE, Equation, Interval, Ref, propagate, slack, trace, unit

CHUNK = 1024
"""Rows of coefficients that are carried back at once; more go one chunk after another, to spare memory."""


class Region(NamedTuple):
    """Around one image: its box (1,H,W,C) of the box and the ball's extent, the ball's centre and radius."""

    box: Interval
    centre: jax.Array
    eps: jax.Array


class Network:
    """The program of a network around one image, with the interval of every equation's value."""

    def __init__(self, predict, region: Region, norm: str, sound: bool, tighten: bool = False):
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

"""Which pixels a unit sees: by arithmetic on the network's program, and by its derivative.

`theoretical` never computes a number and `measured` never looks at the program. Both know any
network that has taps, with batch normalisation as in evaluation: in training, every pixel of the
batch matters to every unit.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dlcourse.interpretation.intervals import EVERYTHING, Interval, Track, follow


class Box(NamedTuple):
    """The pixels [top, bottom) x [left, right)."""

    top: int
    bottom: int
    left: int
    right: int


class ReceptiveField(NamedTuple):
    """What the units of a tap see, along the rows and along the columns.

    A tap that is no map (features, tokens), or whose every unit sees the whole image, has stride 0.
    """

    rows: Interval
    columns: Interval
    box: Box
    """What the unit in the centre sees of the image; of a tap that is no map, what all its units see."""

    @property
    def size(self) -> int:
        """Pixels a side, padding included; the longer one where the sides differ."""
        return max(self.rows.size, self.columns.size)

    @property
    def is_global(self) -> bool:
        return self.rows.stride == self.columns.stride == 0


def theoretical(model: nn.Module, image_shape: tuple[int, int, int]) -> OrderedDict[str, ReceptiveField]:
    """The receptive field of every tap, in order, from shapes alone.

    Args:
      model: a network of `dlcourse.models`.
      image_shape: (H, W, C).
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    program, taps = jax.make_jaxpr(lambda v, x: model.apply(v, x)[1], return_shape=True)(variables, images)
    constants = [None] * len(jax.tree.leaves(variables))
    rows, columns = (follow(program.jaxpr, [*constants, Track(axis, Interval(0, 1, 1))]) for axis in (1, 2))
    fields = map(_field, rows, columns, taps.values(), [image_shape] * len(taps))
    return OrderedDict(zip(taps, fields, strict=True))


def _field(rows, columns, tap, image_shape):
    intervals, bounds = [], []
    for axis, seen in ((1, rows), (2, columns)):
        pixels = image_shape[axis - 1]
        local = seen != EVERYTHING and tap.ndim == 4 and seen.axis == axis
        interval = Interval(*map(int, seen.interval)) if local else Interval(0, pixels, 0)
        intervals.append(interval)
        bounds += interval.clip(tap.shape[axis] // 2 if local else 0, pixels)
    return ReceptiveField(*intervals, Box(*bounds))


def measured(model: nn.Module, image_shape: tuple[int, int, int]) -> OrderedDict[str, Box]:
    """The pixels for which the unit in the centre of each tap has a derivative, by autodiff.

    The derivative of a trained network can vanish on pixels that the unit does see: behind a
    threshold that is off, a maximum that went to a neighbour, or a sum that cancels. So it is
    taken where none of that happens. Weights are positive, hence nothing cancels and nothing is off.
    Four images rise in brightness towards one side each, and filters weigh their centre most, so
    that activations rise too, up to the border: every maximum goes to the neighbour on that side,
    and the four derivatives together reach the field's four sides. In float64, since the corner of
    a deep field counts for 1e-3 per layer.

    Args:
      model: a network of `dlcourse.models`.
      image_shape: (H, W, C).

    Returns:
      {tap: box} in order. Of a tap that is no map (features, tokens), what all its units see.
    """
    with jax.enable_x64(True):
        exact = model.clone(dtype=jnp.dtype("float64"))
        variables = _positive(exact, image_shape)
        images = jnp.asarray(_ramps(image_shape))
        shapes = jax.eval_shape(lambda v, x: exact.apply(v, x)[1], variables, images)

        @jax.jit
        def support(variables, images, units):
            _, pull = jax.vjp(lambda x: exact.apply(variables, x)[1], images)
            return (jnp.abs(pull(units)[0]) > 0).any((0, 3))

        boxes = {}
        for name in shapes:
            units = OrderedDict((tap, _centre(shape, tap == name)) for tap, shape in shapes.items())
            boxes[name] = _around(np.asarray(support(variables, images, units)))
        return OrderedDict((name, boxes[name]) for name in shapes)


def _positive(model, image_shape):
    """Parameters drawn from [0.5, 1.5] over the fan-in, filters 1000 times weaker off their centre."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))

    def draw(path, leaf):
        if leaf.ndim == 1:
            return jnp.full(leaf.shape, float(path[-1].key in ("scale", "var")), leaf.dtype)
        weights = rng.uniform(0.5, 1.5, leaf.shape) / leaf.shape[-2]
        if leaf.ndim == 4:
            centre = np.full((*leaf.shape[:2], 1, 1), 1e-3)
            centre[leaf.shape[0] // 2, leaf.shape[1] // 2] = 1.0
            weights = weights * centre
        return jnp.asarray(weights, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _ramps(image_shape):
    """(4, H, W, C) in (0.5, 0.75]: rising 10,000-fold above grey towards the top, bottom, left and right."""
    height, width, _ = image_shape
    down, right = (0.5 + 0.25 * np.logspace(0, -4, length) for length in (height, width))
    ramps = [down[:, None], down[::-1, None], right[None], right[None, ::-1]]
    return np.stack([np.broadcast_to(ramp[..., None], image_shape) for ramp in ramps])


def _centre(tap, selected):
    units = np.zeros(tap.shape, tap.dtype)
    if selected and units.ndim == 4:
        units[:, tap.shape[1] // 2, tap.shape[2] // 2] = 1.0
    elif selected:
        units[:] = np.random.default_rng(1).uniform(0.5, 1.5, tap.shape)
    return jnp.asarray(units)


def _around(support):
    rows, columns = (np.flatnonzero(support.any(axis)) for axis in (1, 0))
    if not len(rows):
        return Box(0, 0, 0, 0)
    return Box(*(int(edge) for axis in (rows, columns) for edge in (axis[0], axis[-1] + 1)))

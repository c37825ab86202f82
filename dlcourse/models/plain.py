"""Convolutions and relus without normalisation: the networks that are trained to have certificates."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dlcourse.contracts import InputError
from dlcourse.models.layers import Conv, at_least_float32
from dlcourse.models.taps import Edit, Taps


class Plan(NamedTuple):
    """Convolutions as (filters, side, stride), padded by one pixel, then units of fully connected layers."""

    convolutions: tuple[tuple[int, int, int], ...]
    hidden: tuple[int, ...]


PLANS = {
    "small": Plan(((16, 4, 2), (32, 4, 2)), (100,)),
    "medium": Plan(((32, 3, 1), (32, 4, 2), (64, 3, 1), (64, 4, 2)), (512, 512)),
    "large": Plan(((64, 3, 1), (64, 3, 1), (128, 3, 2), (128, 3, 1), (128, 3, 1)), (512,)),
}
"""Small and medium are the small and the large one of Wong et al. 2018; large is that of Gowal et al. 2018, table 1."""


def for_bounds(key, shape, dtype=jnp.float32) -> jax.Array:
    """Normal, of deviation sqrt(2 pi) / fan in, so that intervals keep their width (Shi et al. 2021, section 3.1).

    E|w| fan_in / 2 = 1, where half of the relus pass an interval on.
    """
    return math.sqrt(2 * math.pi) / math.prod(shape[:-1]) * jax.random.normal(key, shape, dtype)


INITS = {"he": nn.initializers.he_normal(), "bounds": for_bounds}


class PlainConvNet(nn.Module):
    """Convolutions, then fully connected layers, each followed by a relu and none by a normalisation.

    Pixels are taken as they are, as published: black is 0, as is the padding.

    Attributes:
      num_classes: K.
      size: of PLANS.
      width: filters of the first layer; the other layers in proportion. 0 has those of PLANS.
      start: of the kernels of all layers but the last: as He et al. 2015, or as `for_bounds`.
      dtype: of the computation; parameters and logits are float32.
    """

    num_classes: int
    size: Literal["small", "medium", "large"] = "small"
    width: int = 0
    start: Literal["he", "bounds"] = "he"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train: bool = False, edit: Edit | None = None):
        tap = Taps(edit)
        x = images.astype(self.dtype)
        plan, init = self.plan(), INITS[self.start]
        for layer, (filters, side, stride) in enumerate(plan.convolutions, start=1):
            conv = Conv(filters, side, stride, 1, True, init, self.dtype, name=f"conv{layer}")
            x = tap(f"relu{layer}", nn.relu(tap(f"conv{layer}", conv(x))))
        x = x.reshape(len(x), -1)
        for layer, units in enumerate(plan.hidden, start=1):
            dense = nn.Dense(units, kernel_init=init, dtype=self.dtype, name=f"dense{layer}")
            x = tap(f"relu_dense{layer}", nn.relu(tap(f"dense{layer}", dense(x))))
        x = tap("features", at_least_float32(x))
        logits = tap("logits", nn.Dense(self.num_classes, name="classifier")(x))
        return logits, tap.finish()

    def plan(self) -> Plan:
        """The layers of this network."""
        convolutions, hidden = PLANS[self.size]
        published = convolutions[0][0]

        def wide(units):
            return max(1, units * (self.width or published) // published)

        return Plan(tuple((wide(filters), *rest) for filters, *rest in convolutions), tuple(map(wide, hidden)))

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raises InputError where the convolutions leave nothing of the image."""
        side = min(image_shape[:2])
        for _, kernel, stride in self.plan().convolutions:
            side = (side + 2 - kernel) // stride + 1
        if side < 1:
            raise InputError(f"model plain: size={self.size} leaves nothing of {image_shape[0]} x {image_shape[1]} "
                             "pixels: take a larger --image_size")

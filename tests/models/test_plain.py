"""Networks for certificates: their published layers, and what their initialisation keeps."""

import jax
import jax.numpy as jnp
import pytest

from dlcourse import models
from dlcourse.contracts import InputError
from dlcourse.models import plain, size


def test_plain_networks_have_the_published_layers():
    """Wong et al. 2018 on MNIST: 14 x 14 x 16 -> 7 x 7 x 32 -> 100 units."""
    variables = size.abstract_variables(models.create("plain", 10, (28, 28, 1)), (28, 28, 1))
    shapes = {layer: weights["kernel"].shape for layer, weights in variables["params"].items()}
    assert shapes == {"conv1": (4, 4, 1, 16), "conv2": (4, 4, 16, 32), "dense1": (1568, 100), "classifier": (100, 10)}
    half = models.create("plain,size=medium,width=16", 10, (28, 28, 1)).plan()
    assert half.convolutions == ((16, 3, 1), (16, 4, 2), (32, 3, 1), (32, 4, 2)) and half.hidden == (256, 256)
    with pytest.raises(InputError, match="size=small leaves nothing of 2 x 2 pixels"):
        models.create("plain", 10, (2, 2, 1))


@pytest.mark.parametrize("shape", [(4, 4, 16, 500), (300, 2000)])
def test_intervals_keep_their_width_at_first(shape):
    """|W| r = 2 r for equal radii r; a relu that is active for half of them halves that."""
    kernel = plain.for_bounds(jax.random.key(0), shape)
    assert jnp.abs(kernel).reshape(-1, shape[-1]).sum(0).mean() == pytest.approx(2, rel=0.01)


def test_the_initialisation_is_chosen_by_name():
    shape = (28, 28, 1)
    wide, narrow = (models.create(f"plain,start={start}", 10, shape).init(jax.random.key(0), jnp.zeros((1, *shape)))
                    for start in ("he", "bounds"))
    ratio = jnp.std(narrow["params"]["dense1"]["kernel"]) / jnp.std(wide["params"]["dense1"]["kernel"])
    assert ratio == pytest.approx((jnp.pi / 1568) ** 0.5, rel=0.02)

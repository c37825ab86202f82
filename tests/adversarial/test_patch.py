"""Where a patch lies against scipy's warps; what it learns against the optimum of linear networks."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from dlcourse.adversarial import patch as patches
from dlcourse.adversarial.patch import Place, Places

KEY = jax.random.key(0)


def place(side, degrees, row, column, count=2):
    return Place(*(jnp.full(count, value, jnp.float32) for value in (side, degrees, row, column)))


def pictures(count=2, side=12, channels=3, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(count, side, side, channels)), jnp.float32)


def test_lies_unchanged_where_it_has_the_images_scale():
    images, patch = pictures(), pictures(1, 6, seed=1)[0]
    laid = np.asarray(patches.lay(patch, images, place(6, 0, 2.5, 7.5)))
    rows, columns = np.mgrid[:12, :12]
    disc = (rows - 2.5) ** 2 + (columns - 7.5) ** 2 <= 9
    pasted = np.array(images)
    pasted[:, 0:6, 5:11] = patch
    np.testing.assert_allclose(laid[:, disc], pasted[:, disc], atol=1e-6)
    np.testing.assert_array_equal(laid[:, ~disc], np.asarray(images)[:, ~disc])


def test_turns_and_scales_as_scipy_does():
    images, patch = pictures(), pictures(1, 9, seed=1)[0]
    side, degrees, row, column = 7.3, 20.0, 5.2, 6.1
    laid = np.asarray(patches.lay(patch, images, place(side, degrees, row, column)))
    angle = np.deg2rad(degrees)
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) * 9 / side
    offset = np.array([4, 4]) - matrix @ [row, column]
    theirs = np.stack([ndimage.affine_transform(channel, matrix, offset, (12, 12), order=1, mode="nearest")
                       for channel in np.moveaxis(np.asarray(patch), -1, 0)], -1)
    rows, columns = np.mgrid[:12, :12]
    disc = (rows - row) ** 2 + (columns - column) ** 2 <= side**2 / 4
    np.testing.assert_allclose(laid[0, disc], theirs[disc], atol=1e-5)
    np.testing.assert_array_equal(laid[0, ~disc], np.asarray(images)[0, ~disc])


def test_places_are_within_the_image_and_as_told():
    drawn = patches.draw(jax.random.split(KEY, 2000), (20, 30, 1), Places(0.3, 0.6, 22.5))
    assert 6 <= drawn.side.min() < 6.1 and 11.9 < drawn.side.max() <= 12
    assert -22.5 <= drawn.degrees.min() < -22 and 22 < drawn.degrees.max() <= 22.5
    for centre, length in ((drawn.row, 20), (drawn.column, 30)):
        low, high = np.asarray(centre - drawn.side / 2 + 0.5), np.asarray(centre + drawn.side / 2 + 0.5)
        assert -1e-4 <= low.min() < 0.3 and length - 0.3 < high.max() <= length + 1e-4


@jax.jit
def linear(weights, images):
    return jnp.stack([jnp.zeros(len(images)), jnp.einsum("bhwc,hwc->b", images, weights)], -1)


def test_learns_the_optimum_of_a_linear_network_at_a_fixed_place():
    """There log p grows with w.x: the best patch is white where w > 0, black where w < 0, and outside of the disc as
    it began."""
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(8, 8, 1)), jnp.float32)
    fixed = Places(1.0, 1.0, 0.0)
    patch, log_p = patches.learn(KEY, jax.tree_util.Partial(linear, weights / 4), pictures(5, 8, 1), 1, places=fixed,
                                 side=8, steps=60)
    rows, columns = np.mgrid[:8, :8]
    disc = (rows - 3.5) ** 2 + (columns - 3.5) ** 2 <= 16
    np.testing.assert_array_equal(np.asarray(patch)[disc], np.asarray(weights > 0)[disc])
    np.testing.assert_array_equal(np.asarray(patch)[~disc], 0.5)
    assert log_p[-1] > log_p[0]


@jax.jit
def reddest(scale, images):
    """Class 1 where the image has, anywhere, a spot of 3 x 3 that is red and not blue."""
    spot = images[..., 0] - images[..., 2]
    mean = sum(spot[:, i:i + 10, j:j + 10] for i in range(3) for j in range(3)) / 9
    return jnp.stack([jnp.zeros(len(images)), scale * (mean.max((1, 2)) - 0.8)], -1)


def test_one_patch_works_anywhere_on_images_it_never_saw_and_its_controls_do_not():
    predict, unseen = jax.tree_util.Partial(reddest, jnp.float32(20.0)), pictures(100, seed=9)
    patch, _ = patches.learn(KEY, predict, pictures(20), 1, side=8, steps=150)
    count = patches.hits._cache_size()
    rate = patches.hits(jax.random.key(1), predict, unseen, 1, patch).mean()
    grey, noise = (patches.hits(jax.random.key(1), predict, unseen, 1, control).mean()
                   for control in (jnp.full_like(patch, 0.5), pictures(1, 8, seed=4)[0]))
    assert rate > 0.95 and grey < 0.05 and noise < 0.05, (rate, grey, noise)
    assert patch.min() >= 0 and patch.max() <= 1
    patches.hits(jax.random.key(2), jax.tree_util.Partial(reddest, jnp.float32(2.0)), unseen, 0, patch)
    assert patches.hits._cache_size() == count + 1

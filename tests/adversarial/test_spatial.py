"""Warps against scipy's, and the search for the worst against planted truths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from dlcourse.adversarial import spatial
from dlcourse.adversarial.spatial import Pose
from dlcourse.adversarial.threat import Threat, example_keys

KEY, THREAT = jax.random.key(0), Threat(norm="l2", eps=1.0)


def pictures(count=4, shape=(9, 12, 3)):
    return jnp.asarray(np.random.default_rng(0).uniform(size=(count, *shape)), jnp.float32)


def pose(count, degrees, down, right):
    return Pose(*(jnp.full(count, value, jnp.float32) for value in (degrees, down, right)))


@pytest.mark.parametrize("degrees", [-30.0, 7.0, 90.0])
def test_turns_as_scipy_does(degrees):
    images = pictures()
    theirs = ndimage.rotate(images, degrees, axes=(2, 1), reshape=False, order=1, mode="grid-constant")
    ours = spatial.moved(images, pose(4, degrees, 0, 0))
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_turns_and_shifts_as_scipy_does_with_a_fill():
    images, angle = pictures(), np.deg2rad(17)
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = (np.array(images.shape[1:3]) - 1) / 2
    offset = centre - matrix @ (centre + [1.25, -2.5])
    theirs = np.stack([np.stack([ndimage.affine_transform(channel, matrix, offset, order=1, mode="grid-constant",
                                                          cval=0.4) for channel in np.moveaxis(image, -1, 0)], -1)
                       for image in np.asarray(images)])
    np.testing.assert_allclose(spatial.moved(images, pose(4, 17.0, 1.25, -2.5), 0.4), theirs, atol=2e-5)


def test_anticlockwise_down_and_right_are_what_they_say():
    image = jnp.zeros((1, 9, 9, 1)).at[0, 4, 8].set(1.0)  # at the right
    assert np.unravel_index(spatial.moved(image, pose(1, 90.0, 0, 0)).argmax(), (9, 9)) == (0, 4)  # at the top
    assert np.unravel_index(spatial.moved(image, pose(1, 0, 2, -3)).argmax(), (9, 9)) == (6, 5)


@jax.jit
def near(template, images):
    """Class 1 where an image is within 0.3 of the template."""
    distance = jnp.sqrt(jnp.square(images - template).sum((1, 2, 3)))
    return jnp.stack([jnp.zeros_like(distance), 0.3 - distance], -1)


def test_the_grid_finds_a_planted_pose_and_no_other():
    """Only at -14 degrees, 3 down and 1.5 left is the image the template; that is a point of the grid."""
    image = pictures(1)
    planted = spatial.moved(image, pose(1, -14.0, 3.0, -1.5))
    predict = jax.tree_util.Partial(near, planted)
    labels = jnp.zeros(1, jnp.int32)
    found = spatial.grid(KEY, predict, image, labels, THREAT)
    assert found.success[0]
    np.testing.assert_allclose(found.images, planted, atol=1e-5)
    turned, down, right = np.meshgrid(np.linspace(-30, 30, 31), np.linspace(-3, 3, 5), np.linspace(-3, 3, 5),
                                      indexing="ij")
    place = np.flatnonzero((turned.ravel() == -14) & (down.ravel() == 3) & (right.ravel() == -1.5))[0]
    assert found.queries[0] == place + 2  # one for the image itself
    poses = Pose(*(jnp.asarray(axis.reshape(-1, 1), jnp.float32) for axis in (turned, down, right)))
    _, which = jax.jit(spatial.worst_pose)(predict, image, labels, THREAT, poses)
    assert (which.degrees[0], which.down[0], which.right[0]) == (-14, 3, -1.5)
    missed = spatial.grid(KEY, predict, image, labels, THREAT, degrees=10.0)
    assert not missed.success[0] and missed.queries[0] == 775 + 1
    assert missed.loss[0] < 0


@jax.jit
def bright(weights, images):
    return jnp.stack([jnp.zeros(len(images)), jnp.einsum("bhwc,hwc->b", images, weights)], -1)


def test_the_worst_of_k_is_the_greatest_margin_of_its_draws_and_grows_with_k():
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(9, 12, 3)), jnp.float32)
    images, predict = pictures(), jax.tree_util.Partial(bright, weights)
    labels, keys = jnp.argmax(predict(images), -1), example_keys(KEY, 4)
    hard = jax.tree_util.Partial(lambda w, x: bright(w, x) - 1e3 * jax.nn.one_hot(1 - labels, 2), weights)
    losses = [spatial.worst_of(keys, hard, images, labels, THREAT, draws=k).loss for k in (5, 10)]
    by_hand = []
    for k in range(5):
        drawn = jnp.stack([jax.random.uniform(jax.random.fold_in(own, k), (3,), minval=-1.0) for own in keys], -1)
        one = Pose(30 * drawn[0], 3 * drawn[1], 3 * drawn[2])
        logits = hard(jnp.clip(spatial.moved(images, one), 0, 1))
        by_hand.append(jnp.take_along_axis(logits, 1 - labels[:, None], 1)[:, 0]
                       - jnp.take_along_axis(logits, labels[:, None], 1)[:, 0])
    np.testing.assert_allclose(losses[0], np.max(by_hand, 0), rtol=1e-4)
    assert np.all(losses[1] >= losses[0]) and np.any(losses[1] > losses[0])


def test_contract():
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(9, 12, 3)), jnp.float32)
    images, keys = pictures(), example_keys(KEY, 4)
    predict = jax.tree_util.Partial(bright, weights)
    labels = predict(images).argmax(-1)
    together = spatial.worst_of(keys, predict, images, labels, THREAT, degrees=30.0, pixels=3.0)
    size = spatial.worst_of._cache_size()
    spatial.worst_of(keys, jax.tree_util.Partial(bright, -weights), images, labels, Threat(norm="l2", eps=2.0),
                     degrees=3.0, pixels=1.0)
    assert spatial.worst_of._cache_size() == size
    alone = spatial.worst_of(keys[1:2], predict, images[1:2], labels[1:2], THREAT, degrees=30.0, pixels=3.0)
    np.testing.assert_allclose(together.images[1], alone.images[0], atol=1e-6)
    nan = spatial.worst_of(keys, jax.tree_util.Partial(bright, weights * jnp.nan), images, labels, THREAT, degrees=30.0,
                           pixels=3.0)
    assert not nan.success.any() and np.all(np.isfinite(nan.images))

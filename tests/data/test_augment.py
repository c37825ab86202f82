"""Laws of augmentation, and each step against a plain implementation with the same draws."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps
import pytest

from dlcourse.contracts import InputError
from dlcourse.data import augment, randaugment

K = 5
SPECS = ["flip", "crop=2", "colour=0.8", "cutout=5", "mixup=0.3", "cutmix=1", "randaugment=2:10"]


def batch_of(shape, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    images, labels = rng.random(shape), rng.integers(0, K, shape[0])
    return {"image": jnp.asarray(images, dtype), "label": jnp.asarray(labels, jnp.int32)}


@pytest.mark.parametrize(("spec", "channels", "dtype"), [
    *[(spec, 3, jnp.bfloat16) for spec in SPECS],
    *[(spec, 1, jnp.float32) for spec in ("colour=0.8", "randaugment=2:10", "cutout=3,flip,crop=1,mixup=0.5,cutmix=1")],
])
def test_laws(spec, channels, dtype):
    batch = batch_of((12, 10, 14, channels), dtype)
    traces = []

    @jax.jit
    def apply(key, batch):
        traces.append(spec)
        return augment.create(spec, K)(key, batch)

    out, again, other = (apply(jax.random.key(seed), batch) for seed in (3, 3, 4))
    assert len(traces) == 1
    assert out["image"].shape == batch["image"].shape and out["image"].dtype == dtype
    assert float(out["image"].min()) >= 0 and float(out["image"].max()) <= 1
    np.testing.assert_array_equal(out["label"], batch["label"])
    np.testing.assert_array_equal(out["image"], again["image"])
    assert not np.array_equal(out["image"], other["image"])
    if "mix" in spec:
        np.testing.assert_allclose(out["target"].sum(1), 1, rtol=1e-6)
        assert out["target"].shape == (12, K) and float(out["target"].min()) >= 0
    else:
        assert "target" not in out


@pytest.mark.parametrize("spec", SPECS)
def test_each_image_has_draws_of_its_own(spec):
    one = batch_of((1, 12, 12, 3))["image"]
    if "mix" in spec:  # a batch of two kinds, so that mixing shows; half the partners are of one's own kind
        images = jnp.concatenate([jnp.tile(one, (16, 1, 1, 1)), jnp.tile(1 - one, (16, 1, 1, 1))])
    else:
        images = jnp.tile(one, (32, 1, 1, 1))
    out = augment.create(spec, K)(jax.random.key(0), {"image": images, "label": jnp.arange(32, dtype=jnp.int32) % K})
    distinct = len({np.asarray(image).tobytes() for image in out["image"]})
    assert distinct >= (2 if spec == "flip" else 8), distinct


def test_streams_do_not_depend_on_each_other():
    batch = batch_of((8, 8, 8, 1))
    alone = augment.create("mixup=0.3", K)(jax.random.key(1), batch)
    after = augment.create("flip,mixup=0.3", K)(jax.random.key(1), batch)
    np.testing.assert_array_equal(alone["target"], after["target"])


def test_randaugment_draws_anew_in_each_layer():
    images = jnp.tile(batch_of((1, 6, 6, 3))["image"], (300, 1, 1, 1))
    out = jax.jit(randaugment.randaugment, static_argnums=(2, 3))(jax.random.key(0), images, 2, 0.5)
    ways = len({np.asarray(image).tobytes() for image in out})
    assert ways > 2 * len(randaugment.OPERATIONS)  # more than any operation, of either sign, done twice


def test_flip_crop_and_cutout_are_the_plain_ones():
    rng = np.random.default_rng(0)
    images = np.asarray(batch_of((20, 7, 9, 2))["image"])
    which = rng.random(20) < 0.5
    expected = np.stack([image[:, ::-1] if w else image for image, w in zip(images, which, strict=True)])
    np.testing.assert_array_equal(augment.mirrored(images, which), expected)

    offsets = rng.integers(0, 7, (20, 2))
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)))
    expected = np.stack([image[y:y + 7, x:x + 9] for image, (y, x) in zip(padded, offsets, strict=True)])
    np.testing.assert_array_equal(augment.shifted(images, offsets, 3), expected)

    key = jax.random.key(5)
    expected = images.copy()
    for image, (y, x) in zip(expected, np.asarray(augment.centres(key, images.shape)), strict=True):
        image[max(0, y - 2):y + 3, max(0, x - 2):x + 3] = 0
    np.testing.assert_array_equal(augment.cutout(key, images, 5), expected)


def test_draws_cover_their_whole_range_evenly():
    centres = np.asarray(augment.centres(jax.random.key(0), (20000, 4, 8, 1)))
    for axis, size in enumerate((4, 8)):
        counts = np.bincount(centres[:, axis], minlength=size)
        assert len(counts) == size
        np.testing.assert_allclose(counts / 20000, 1 / size, atol=0.02)
    image = jnp.zeros((20000, 3, 3, 1)).at[:, 1, 1].set(1)  # one bright pixel shows where each crop went
    where = np.asarray(augment.crop(jax.random.key(0), image, 1)).reshape(-1, 9).argmax(1)
    np.testing.assert_allclose(np.bincount(where) / 20000, 1 / 9, atol=0.02)
    flipped = np.asarray(augment.flip(jax.random.key(0), jnp.tile(jnp.array([[[[0.0], [1.0]]]]), (20000, 1, 1, 1))))
    assert abs(flipped[:, 0, 0, 0].mean() - 0.5) < 0.02


def test_mixup_is_its_closed_form():
    batch = batch_of((6, 3, 3, 1))
    share, partner = np.float32([0.0, 0.25, 0.5, 0.75, 1.0, 0.1]), np.array([1, 2, 3, 4, 5, 0])
    out = augment.mixed(batch, jnp.asarray(share), jnp.asarray(partner), K)
    one_hot = np.eye(K)[np.asarray(batch["label"])]
    weight = share[:, None]
    np.testing.assert_allclose(out["target"], weight * one_hot + (1 - weight) * one_hot[partner], rtol=1e-6)
    weight, images = share[:, None, None, None], np.asarray(batch["image"])
    np.testing.assert_allclose(out["image"], weight * images + (1 - weight) * images[partner], rtol=1e-6)


def test_mixup_shares_follow_beta():
    n, alpha = 20000, 0.4
    batch = {"image": jnp.zeros((n, 1, 1, 1)).at[:n // 2].set(1), "label": jnp.zeros(n, jnp.int32).at[:n // 2].set(1)}
    out = augment.mixup(jax.random.key(0), batch, alpha, 2)
    np.testing.assert_allclose(out["image"].reshape(-1), out["target"][:, 1], atol=1e-6)  # the same λ for both
    mixed = np.asarray(out["target"][:, 1])
    # Half the partners are of the other kind: then E (t - 1/2)^2 is Var λ = 1 / (4 (2 α + 1)), else 1/4.
    expected = 0.5 / 4 + 0.5 / (4 * (2 * alpha + 1))
    assert abs(np.mean((mixed - 0.5) ** 2) - expected) < 0.003


def test_cutmix_target_counts_pixels():
    images = jnp.zeros((8, 6, 10, 1)).at[4:].set(1)
    batch = {"image": images, "label": jnp.array([0] * 4 + [1] * 4, jnp.int32)}
    start = jnp.array([[-2, 3], [0, 0], [4, 8], [2, 2]] * 2)
    stop = jnp.array([[2, 6], [6, 10], [9, 12], [2, 5]] * 2)
    out = augment.pasted(batch, start, stop, jnp.arange(8)[::-1], 2)
    np.testing.assert_allclose(out["target"][:, 1], out["image"].mean((1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(out["target"][:4, 1], [2 * 3 / 60, 1, 2 * 2 / 60, 0], rtol=1e-6)


def operate(image, todo, strength):
    """{(operation, sign): image} for one (H,W,C) image, in a single call."""
    operation = jnp.array([randaugment.OPERATIONS.index(name) for name, _ in todo])
    signed = jnp.array([sign * strength for _, sign in todo], jnp.float32)
    images = jnp.tile(jnp.asarray(image)[None], (len(todo), 1, 1, 1))
    out = jax.jit(randaugment.apply, static_argnums=3)(images, operation, signed, strength)
    return dict(zip(todo, np.asarray(out), strict=True))


def test_photometric_operations_agree_with_pillow():
    image = np.random.default_rng(0).integers(30, 200, (12, 12, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(image)
    enhancers = {"brightness": "Brightness", "contrast": "Contrast", "saturation": "Color", "sharpness": "Sharpness"}
    expected = {(name, sign): getattr(PIL.ImageEnhance, enhancer)(picture).enhance(1 + 0.9 * sign * 0.5)
                for name, enhancer in enhancers.items() for sign in (-1, 1)}
    expected |= {("posterize", 1): PIL.ImageOps.posterize(picture, 6),
                 ("solarize", 1): PIL.ImageOps.solarize(picture, 128),
                 ("autocontrast", 1): PIL.ImageOps.autocontrast(picture), ("identity", 1): picture}
    got = operate(image / np.float32(255), list(expected), 0.5)
    inner = (slice(1, -1), slice(1, -1))  # Pillow leaves the border unsmoothed, and rounds in between
    for what, theirs in expected.items():
        np.testing.assert_allclose(got[what][inner] * 255, np.asarray(theirs)[inner], atol=2, err_msg=str(what))
        assert what[0] == "identity" or np.abs(got[what] * 255 - image).max() > 2


def test_warps_are_the_plain_ones():
    images = batch_of((2, 9, 9, 2))["image"]
    quarter = jnp.broadcast_to(jnp.array([[[0.0, 1, 0], [-1, 0, 0]]]), (2, 2, 3))  # from (x, -y)
    np.testing.assert_allclose(jax.jit(randaugment.warp)(images, quarter), np.rot90(images, axes=(1, 2)), atol=1e-6)
    sideways, up = ("translate_x", 1), ("translate_y", -1)
    out = operate(images[0], [sideways, up], 1 / 2.7)  # 0.3 / 2.7 of 9 pixels: one
    np.testing.assert_allclose(out[sideways][:, :-1], images[0, :, 1:], atol=1e-5)
    np.testing.assert_allclose(out[sideways][:, -1], 0, atol=1e-5)
    np.testing.assert_allclose(out[up][1:], images[0, :-1], atol=1e-5)


@pytest.mark.parametrize(("spec", "says"), [
    ("flop", "did you mean flip"), ("blur=3", "There are flip, crop=PIXELS"), ("crop=two", "whole number"),
    ("crop", "whole number"), ("crop=0", "from 1"), ("flip=1", "no value"), ("mixup=-1", "mixup=ALPHA"),
    ("mixup=nan", "mixup=ALPHA"), ("colour=2", "from 1e-09 to 1"), ("randaugment=2", "a number from 0 to 10"),
    ("randaugment=2:11", "from 0 to 10"), ("flip,,crop=2", "unknown step ''"), ("flip,flip", "twice"),
])
def test_a_bad_spec_says_what_to_write(spec, says):
    with pytest.raises(InputError, match="--augment=") as error:
        augment.create(spec, K)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_steps_larger_than_the_image_are_refused():
    with pytest.raises(InputError, match="cutout=9 is more than images of 8x8"):
        augment.create("cutout=9", K)(jax.random.key(0), batch_of((2, 8, 8, 1)))


def test_no_augmentation_is_the_identity():
    batch = batch_of((2, 4, 4, 1))
    assert augment.create("", K)(jax.random.key(0), batch) is batch

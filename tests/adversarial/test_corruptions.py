"""Corruptions against Pillow, SciPy and scikit-image, closed forms, and laws that hold for all fifteen."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import skimage.color
from PIL import Image

from dlcourse.adversarial import blurs, corruptions, weather
from dlcourse.adversarial import jpeg as codec
from dlcourse.contracts import InputError

pytestmark = pytest.mark.slow


def pictures(count, height, width, channels, seed=0):
    """Smooth waves with a disk on them."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = rng.uniform(1, 9, (count, 5, 1, 1))
    planes = [0.5 + 0.35 * np.sin(waves[:, 0] * x + waves[:, 1] * y + c + waves[:, 2]) * np.cos(waves[:, 3] * y)
              + 0.15 * ((x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.01 * waves[:, 4]) for c in range(channels)]
    return np.clip(np.stack(planes, -1), 0, 1).astype(np.float32)


@pytest.mark.parametrize("shape", [(33, 27, 1), (8, 8, 3), (40, 56, 3), (33, 27, 3)])
def test_jpeg_agrees_with_pillow(shape):
    noise = np.random.default_rng(1).normal(0, 0.03, shape)
    levels = np.round(255 * np.clip(pictures(1, *shape)[0] + noise, 0, 1)).astype(np.uint8)
    coded = jax.jit(codec.jpeg)
    for quality in (10, 40, 58, 80, 95):
        file = io.BytesIO()
        Image.fromarray(levels if shape[2] == 3 else levels[..., 0]).save(file, "JPEG", quality=quality)
        wanted = np.asarray(Image.open(file)).reshape(shape).astype(float)
        got = 255 * np.asarray(coded(levels.astype(np.float32) / 255, quality))
        # Pillow's cosine transform is one of integers: here and there a coefficient is rounded the other way.
        off, lost = np.abs(got - wanted), np.abs(wanted - levels).mean()
        assert off.mean() < 0.2 * lost + 0.4, (quality, off.mean(), lost)
        assert np.median(off) <= 1


@pytest.mark.parametrize("sigma", [0.05, 0.4, 1.0, 2.3])
@pytest.mark.parametrize(("edge", "truncate"), [("nearest", 4.0), ("reflect", 3.0)])
def test_gaussian_agrees_with_scipy(sigma, edge, truncate):
    image = pictures(1, 20, 17, 2)[0]
    wanted = scipy.ndimage.gaussian_filter(image, (sigma, sigma, 0), mode=edge, truncate=truncate)
    got = blurs.gaussian(image, sigma, 10, truncate=truncate, edge=edge)
    np.testing.assert_allclose(got, wanted, atol=2e-6)


@pytest.mark.parametrize(("radius", "alias"), [(0.3, 0.4), (1, 0.2), (1.5, 0.1), (3, 0.5)])
def test_defocus_agrees_with_scipy(radius, alias):
    i = np.arange(-8, 9)
    disk = (i[:, None] ** 2 + i[None] ** 2 <= radius**2).astype(float)
    taps = np.exp(-0.5 * np.square(np.array([-1, 0, 1]) / alias))
    for axis in (0, 1):
        disk = scipy.ndimage.convolve1d(disk, taps / taps.sum(), axis, mode="mirror")
    image = pictures(1, 21, 18, 2)[0]
    wanted = scipy.ndimage.correlate(image, (disk / disk.sum())[..., None], mode="mirror")
    np.testing.assert_allclose(blurs.filtered(image, blurs.disk(radius, alias, 5)), wanted, atol=2e-6)


def test_motion_of_a_point_and_by_hand():
    image = np.zeros((15, 15, 1), np.float32)
    image[7, 7] = 1.0
    weights = np.exp(-0.5 * np.square(np.arange(7) / 2.0))
    # At 0 degrees each pixel is a sum of those to its right: the point moves to the left.
    streak = np.asarray(blurs.motion(image, 3, 2.0, 0.0, 5))[7, 7::-1, 0]
    np.testing.assert_allclose(streak, np.append(weights / weights.sum(), 0.0), atol=1e-6)
    picture, angle = pictures(1, 14, 19, 1)[0], 33.0
    wanted = np.zeros_like(picture)
    for i, weight in enumerate(weights / weights.sum()):
        dx, dy = (int(np.ceil(i * f(np.deg2rad(angle)) - 0.5)) for f in (np.cos, np.sin))
        for y, x in np.ndindex(14, 19):
            wanted[y, x] += weight * picture[min(y + dy, 13), min(x + dx, 18)]
    np.testing.assert_allclose(blurs.motion(picture, 3, 2.0, angle, 5), wanted, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 1.05, 1.13, 1.25, 1.75, 2.25])
@pytest.mark.parametrize("side", [28, 32])
def test_zoom_agrees_with_scipy(factor, side):
    image = pictures(1, side, side, 2)[0]
    kept = int(np.ceil(side / factor))
    top = (side - kept) // 2
    big = scipy.ndimage.zoom(image[top:top + kept, top:top + kept], (factor, factor, 1), order=1)
    trim = (len(big) - side) // 2
    at = jnp.asarray(blurs.zoom_positions(np.array([factor]), side))[0]
    np.testing.assert_allclose(blurs.interpolated(image, at, at), big[trim:trim + side, trim:trim + side], atol=2e-5)


def test_positions_agree_with_scipy():
    image = pictures(1, 12, 9, 2)[0]
    rows, columns = np.random.default_rng(0).uniform(-14, 25, (2, 11, 8))
    for edge in ("mirror", "reflect"):
        wanted = np.stack([scipy.ndimage.map_coordinates(image[..., c], [rows, columns], order=1, mode=edge)
                           for c in range(2)], -1)
        np.testing.assert_allclose(blurs.sampled(image, jnp.float32(rows), jnp.float32(columns), edge), wanted,
                                   atol=2e-5)


@pytest.mark.parametrize("side", [8, 28, 32, 45])
def test_pixelate_agrees_with_pillow(side):
    image = pictures(1, side, side, 1)[0]
    for severity, share in enumerate((0.95, 0.9, 0.85, 0.75, 0.65), 1):
        small = Image.fromarray(image[..., 0]).resize((int(side * share),) * 2, Image.Resampling.BOX)
        wanted = np.asarray(small.resize((side, side), Image.Resampling.BOX))[..., None]
        got = corruptions.corrupt(jax.random.key(0), image[None], severity, name="pixelate")[0]
        np.testing.assert_allclose(got, wanted, atol=2e-6)


def test_brightness_agrees_with_scikit_image_and_contrast_with_its_formula():
    image = pictures(1, 10, 10, 3)[0]
    image[0, 0] = 0.0
    for severity, c in enumerate((0.05, 0.1, 0.15, 0.2, 0.3), 1):
        hsv = skimage.color.rgb2hsv(image)
        hsv[..., 2] = np.clip(hsv[..., 2] + c, 0, 1)
        got = corruptions.corrupt(jax.random.key(0), image[None], severity, name="brightness")[0]
        np.testing.assert_allclose(got, skimage.color.hsv2rgb(hsv), atol=2e-6)
    got = corruptions.corrupt(jax.random.key(0), image[None], 5, name="contrast")[0]
    mean = image.mean((0, 1))
    np.testing.assert_allclose(got, 0.15 * (image - mean) + mean, atol=1e-6)


def test_moments_of_the_noises():
    grey = jnp.full((40, 32, 32, 1), 0.5)
    for severity in (1, 5):
        gaussian, shot, impulse = (np.asarray(corruptions.corrupt(jax.random.key(3), grey, severity, name=f"{n}_noise"))
                                   for n in ("gaussian", "shot", "impulse"))
        deviation, photons, amount = ((0.04, 500, 0.01), None, None, None, (0.10, 50, 0.07))[severity - 1]
        np.testing.assert_allclose([gaussian.mean(), gaussian.std()], [0.5, deviation], rtol=0.02)
        np.testing.assert_allclose([shot.mean(), shot.var()], [0.5, 0.5 / photons], rtol=0.03)
        np.testing.assert_allclose(shot * photons, np.round(shot * photons), atol=1e-3)
        np.testing.assert_allclose([(impulse == 0).mean(), (impulse == 1).mean()], [amount / 2] * 2, rtol=0.15)


def test_plasma():
    land = np.asarray(weather.plasma(jax.random.key(0), 64, 3.0))
    assert land.shape == (64, 64) and land.min() == 0 and land.max() == 1
    rough = [np.abs(np.diff(np.asarray(weather.plasma(jax.random.key(0), 64, d)), axis=0)).mean() for d in (1.5, 2, 3)]
    assert rough[0] > rough[1] > rough[2]
    # Amplitudes die out at once: half-way points are means of their neighbours on the torus.
    flat = np.asarray(weather.plasma(jax.random.key(0), 16, 1e4))
    np.testing.assert_allclose(flat[::2, 1::2], (flat[::2, ::2] + np.roll(flat[::2, ::2], -1, 1)
                                                + flat[1::2, 1::2] + np.roll(flat[1::2, 1::2], 1, 0)) / 4, atol=1e-5)


RISING = sorted(set(corruptions.CORRUPTIONS) - {"glass_blur", "frost", "elastic_transform"})


@pytest.mark.slow
@pytest.mark.parametrize("name", RISING)
def test_severity_rises(name):
    images = jnp.asarray(pictures(16, 32, 32, 1 if name == "shot_noise" else 3))
    change = [float(jnp.square(corruptions.corrupt(jax.random.key(0), images, s, name=name) - images).mean())
              for s in corruptions.SEVERITIES]
    # Motion's third and fourth differ in nothing that its kernel's weights, all but zero there, can show.
    assert all(b > a * (1 - 1e-3) for a, b in zip(change, change[1:], strict=False)) and change[4] > 1.5 * change[0]


@pytest.mark.slow
def test_severity_where_the_published_constants_do_not_rise_in_mean_square():
    """Glass pixels come from one place away, then from two; frost leaves less of the image; elastic shifts grow."""
    images = jnp.asarray(pictures(16, 32, 32, 1))

    def at(name, s):
        return np.asarray(corruptions.corrupt(jax.random.key(0), images, s, name=name)).reshape(16, -1)

    def kept(s):
        clean = np.asarray(images).reshape(16, -1)
        return np.mean([np.polyfit(a, b, 1)[0] for a, b in zip(clean, at("frost", s), strict=True)])

    assert np.square(at("glass_blur", 4) - at("glass_blur", 2)).mean() > 0
    assert kept(1) > kept(3) > kept(5)
    ramp = jnp.broadcast_to(jnp.linspace(0, 1, 32)[None, :, None, None], (16, 32, 32, 1))
    rough = [float(jnp.square(jnp.diff(corruptions.corrupt(jax.random.key(0), ramp, s, name="elastic_transform"),
                                       n=2, axis=2)).mean()) for s in (1, 3, 5)]
    assert rough[0] < rough[1] < rough[2]


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_laws(name):
    """In [0, 1]; of the key; an image by itself as in a batch; every severity from one program; grey and colour."""
    images = jnp.asarray(pictures(4, 12, 10, 3))
    before = corruptions.corrupt._cache_size()
    mixed = corruptions.corrupt(jax.random.key(0), images, jnp.array([1, 3, 5, 5]), name=name)
    again = corruptions.corrupt(jax.random.key(0), images, jnp.array([5, 3, 1, 5]), name=name)
    assert corruptions.corrupt._cache_size() == before + 1
    assert mixed.shape == images.shape and mixed.dtype == images.dtype
    assert float(mixed.min()) >= 0 and float(mixed.max()) <= 1 and not np.array_equal(mixed[2], images[2])
    np.testing.assert_allclose(mixed[1], again[1], atol=1e-6)
    np.testing.assert_allclose(mixed[3], again[3], atol=1e-6)
    assert not np.array_equal(mixed[0], again[0])
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(4))
    alone = corruptions.corrupt(keys[2:3], images[2:3], jnp.array([5]), name=name)
    np.testing.assert_allclose(alone[0], mixed[2], atol=2e-6)


def test_lengths_follow_the_size_and_nothing_shrinks():
    blur = corruptions.CORRUPTIONS["motion_blur"]
    np.testing.assert_allclose(blur.table((64, 96, 3)), 2 * blur.table((32, 32, 3)))
    np.testing.assert_allclose(blur.table((8, 8, 1)), blur.table((32, 32, 3)))


def _bright(images):
    return jnp.stack([0 * images.mean((1, 2, 3)) + 0.6, images.mean((1, 2, 3))], 1)


def test_errors_and_their_mean():
    images = np.full((30, 8, 8, 1), 0.43, np.float32)
    found = corruptions.errors(jax.random.key(0), jax.tree_util.Partial(_bright), images, np.zeros(30, np.int32),
                               names=("brightness", "contrast"), batch_size=16)
    np.testing.assert_allclose(found["brightness"], [0, 0, 0, 1, 1])
    np.testing.assert_allclose(found["contrast"], 0)
    reference = {"brightness": np.full(5, 0.8), "contrast": np.full(5, 0.5)}
    np.testing.assert_allclose(corruptions.mean_corruption_error(found, reference), (2 / 4 + 0) / 2)
    with pytest.raises(InputError, match="contrast"):
        corruptions.mean_corruption_error(found, {"brightness": np.ones(5)})
    with pytest.raises(InputError, match="contrast"):
        corruptions.mean_corruption_error(reference, found)
    with pytest.raises(InputError, match="smoke"):
        corruptions.corrupt(jax.random.key(0), images, 1, name="smoke")

"""Every data set keeps the contract; each source reads what it should."""

import gzip
import io
import pathlib
import struct
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from dlcourse import data
from dlcourse.data import arrays, decoding, fashion, folder, shapes, splits

NEEDS_FASHION = pytest.mark.skipif(not fashion.DEBIAN.is_dir(), reason="no dataset-fashion-mnist from Debian here")


@pytest.mark.parametrize("name", ["digits", "faces", "shapes", "fake:9x7x2,3",
                                  pytest.param("fashion_mnist", marks=[NEEDS_FASHION, pytest.mark.slow])])
def test_contract(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    dataset = data.load(name, seed=1)
    assert tuple(dataset.splits) == ("train", "validation", "test")
    assert dataset.citation and dataset.licence
    for split in dataset.splits.values():
        batch = split[np.array([len(split) - 1, 0])]
        assert batch["image"].shape == (2, *dataset.image_shape) and batch["image"].dtype == np.float32
        assert batch["image"].min() >= 0 and 0.5 < split[np.arange(20) % len(split)]["image"].max() <= 1
        assert split.labels.dtype == np.int32 and len(split.labels) == len(split)
        np.testing.assert_array_equal(batch["label"], split.labels[[-1, 0]])
        counts = np.bincount(split.labels, minlength=dataset.num_classes)
        assert len(counts) == dataset.num_classes and counts.min() >= 1
    again, other = data.load(name, seed=1), data.load(name, seed=2)
    everything = {key: split[np.arange(min(len(split), 300))]["image"] for key, split in dataset.splits.items()}
    for key, images in everything.items():
        np.testing.assert_array_equal(again.splits[key][np.arange(len(images))]["image"], images)
    test, validation = (other.splits[key][np.arange(len(everything[key]))]["image"] for key in ("test", "validation"))
    np.testing.assert_array_equal(test, everything["test"])  # whatever the seed
    assert not np.array_equal(validation, everything["validation"])


def test_splits_are_disjoint_complete_and_stratified():
    dataset = data.load("digits", validation_fraction=0.25)
    rows = np.concatenate([split.images.reshape(len(split), -1) for split in dataset.splits.values()])
    source = data.embedded.digits().splits["train"]
    assert len(rows) == 1797
    np.testing.assert_array_equal(np.unique(rows, axis=0), np.unique(source.images.reshape(1797, -1), axis=0))
    whole = np.bincount(source.labels)
    test = np.bincount(dataset.splits["test"].labels)
    np.testing.assert_allclose(test, 0.2 * whole, atol=0.51)
    np.testing.assert_allclose(np.bincount(dataset.splits["validation"].labels), 0.25 * (whole - test), atol=0.51)
    # Written down once: they must not change with NumPy, Python or the machine.
    _, held = splits.stratified(np.array([0, 0, 0, 1, 1, 1, 1] * 2), 0.3, 0, "test", ("a", "b"))
    assert held.tolist() == [2, 4, 7, 11]


def test_digits_are_those_of_scikit_learn():
    import sklearn.datasets

    theirs, ours = sklearn.datasets.load_digits(), data.embedded.digits().splits["train"]
    np.testing.assert_array_equal(ours.images[..., 0] * 16, theirs.images)
    np.testing.assert_array_equal(ours.labels, theirs.target)


def test_the_first_hundred_are_the_faces():
    from skimage.feature import Cascade

    folder = pathlib.Path(data.embedded.inside("skimage")) / "data"
    detector = Cascade(str(folder / "lbpcascade_frontalface_opencv.xml"))  # trained elsewhere, by others
    chosen = np.r_[0:100:10, 100:200:10]
    dataset = data.embedded.faces()
    batch = dataset.splits["train"][chosen]
    images = arrays.resized(batch["image"], 50)[..., 0]
    found = [bool(detector.detect_multi_scale((255 * np.pad(image, 20, mode="edge")).astype(np.uint8), 1.1, 1,
                                              min_size=(24, 24), max_size=(80, 80))) for image in images]
    assert sum(found[:10]) >= 8 and sum(found[10:]) == 0
    assert [dataset.class_names[k] for k in batch["label"]] == ["face"] * 10 + ["not face"] * 10


def test_import_is_light():
    code = ("import sys, dlcourse.data; heavy = {'jax', 'sklearn', 'skimage', 'tensorflow_datasets', 'grain', 'PIL'}; "
            "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", ["digits", "shapes", "fake:9x7x2,3"])
def test_image_size(name):
    dataset = data.load(name, image_size=12)
    assert dataset.image_shape[:2] == (12, 12)
    image = dataset.splits["test"][np.arange(5)]["image"]
    assert image.shape == (5, *dataset.image_shape) and 0 <= image.min() and image.max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_resizing_keeps_the_centre_and_the_mean(dtype):
    ramp = np.broadcast_to(np.arange(12).reshape(1, 1, 12, 1) / 11, (1, 8, 12, 1))
    ramp = (ramp * 255).astype(np.uint8) if dtype == np.uint8 else ramp.astype(dtype)
    out = arrays.resized(ramp, 4)
    assert out.shape == (1, 4, 4, 1) and out.dtype == dtype
    pairs = ramp[0, 0, 2:10, 0].reshape(4, 2).mean(1)  # the middle 8 columns, two a pixel
    tolerance = 1.0 if dtype == np.uint8 else 0.01
    np.testing.assert_allclose(out[0, 1:3, 1:3, 0], np.tile(pairs[1:3], (2, 1)), atol=tolerance)


def test_shapes_are_what_their_attributes_say():
    attributes = shapes.sample(600, seed=3)
    images = shapes.render(attributes, 48) / 255
    assert np.bincount(attributes["shape"]).tolist() == [100] * 6
    y, x = np.meshgrid(*[(np.arange(48) + 0.5) / 48] * 2, indexing="ij")
    painted = np.abs(images - attributes["background"].reshape(-1, 1, 1, 1)).max(3) > 0.05
    radius = np.array(list(shapes.RADII.values()))[attributes["size"]]
    for k, (mask, (cy, cx), r) in enumerate(zip(painted, attributes["position"], radius, strict=True)):
        assert np.hypot(y[mask] - cy, x[mask] - cx).max() < 1.2 * r + 0.03, k  # nothing outside
    plain = attributes["texture"] == 0
    centre = (attributes["position"] * 48).astype(int)
    middle = images[np.arange(600), centre[:, 0], centre[:, 1]] * 255
    filled = plain & (attributes["shape"] != shapes.ATTRIBUTES["shape"].index("ring"))
    colours = np.array(list(shapes.COLOURS.values()))[attributes["colour"]]
    np.testing.assert_allclose(middle[filled], colours[filled])
    areas = {name: painted[(attributes["shape"] == k) & plain & (attributes["size"] == 2)].mean()
             for k, name in enumerate(shapes.ATTRIBUTES["shape"])}
    expected = {"circle": np.pi * 0.9**2, "square": 1.6**2, "triangle": 0.5 * 1.6 * 1.6,
                "cross": 4 * 0.3 * 0.95 * 2 - 0.6**2, "ring": np.pi * (0.95**2 - 0.45**2), "diamond": 2.0}
    for name, area in areas.items():
        assert area == pytest.approx(expected[name] * 0.38**2, rel=0.12), name
    names = ("colour", "size", "texture")
    for one in names:  # no attribute tells of another
        for other in ("shape", *names):
            if one != other:
                assert abs(np.corrcoef(attributes[one], attributes[other])[0, 1]) < 0.15


def test_fake_classes_can_be_told_apart_but_not_by_one_example():
    dataset = data.load("fake:16x16x1,4")
    train, test = (split[np.arange(len(split))] for split in (dataset.splits["train"], dataset.splits["test"]))
    means = np.stack([train["image"][train["label"] == k].mean(0) for k in range(4)])
    nearest = ((test["image"][:, None] - means[None]) ** 2).sum((2, 3, 4)).argmin(1)
    assert (nearest == test["label"]).mean() > 0.95
    assert len({image.tobytes() for image in train["image"]}) > 0.9 * len(train["image"])


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(array).save(path, **options)


def test_folder_kinds_of_image(tmp_path):
    red = np.zeros((6, 4, 3), np.uint8)
    red[:3, :, 0] = 255  # the upper half is red
    save(tmp_path / "a" / "rgb.png", red)
    clear = np.dstack([red, np.full((6, 4), 255, np.uint8)])
    clear[3:, :, 3] = 0  # the lower half is transparent
    save(tmp_path / "a" / "rgba.png", clear)
    PIL.Image.fromarray(red).quantize(2).save(tmp_path / "a" / "palette.png")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # shown after a turn by 90 degrees clockwise
    save(tmp_path / "b" / "nested" / "turned.png", np.ascontiguousarray(np.rot90(red)), exif=exif)
    save(tmp_path / "b" / "grey.png", np.full((6, 4), 51, np.uint8))
    save(tmp_path / "b" / "deep.png", np.full((6, 4), 51 * 257, np.uint16))
    (tmp_path / "a" / ".DS_Store").write_text("litter")
    dataset = folder.load(str(tmp_path), 0)
    split = dataset.splits["train"]
    assert dataset.image_shape == (6, 4, 3) and dataset.class_names == ("a", "b")
    got = {path.name: image for path, image in zip(split.paths, split[np.arange(6)]["image"], strict=True)}
    for name in ("rgb.png", "palette.png", "turned.png"):
        np.testing.assert_array_equal(got[name], red / 255, err_msg=name)
    np.testing.assert_array_equal(got["rgba.png"], np.where(np.arange(6).reshape(6, 1, 1) < 3, red / 255, 1))
    for name in ("grey.png", "deep.png"):
        np.testing.assert_allclose(got[name], 0.2, rtol=1e-6, err_msg=name)
    small = folder.load(str(tmp_path), 2)
    assert small.splits["train"][np.arange(6)]["image"].shape == (6, 2, 2, 3)
    assert split.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_photos_are_what_pillow_makes_of_them(tmp_path):
    photo = PIL.Image.open(pathlib.Path(data.embedded.inside("skimage")) / "data" / "chelsea.png")  # 451 x 300 pixels
    photo.save(tmp_path / "photo.jpg", quality=90)
    plain = PIL.Image.open(tmp_path / "photo.jpg").convert("RGB")
    np.testing.assert_array_equal(decoding.decode(tmp_path / "photo.jpg", 3, 0), np.asarray(plain))
    square = plain.resize((200, 200), PIL.Image.Resampling.BILINEAR, box=(75.5, 0, 375.5, 300))
    np.testing.assert_array_equal(decoding.decode(tmp_path / "photo.jpg", 3, 200), np.asarray(square))
    small = plain.resize((60, 60), PIL.Image.Resampling.BILINEAR, box=(75.5, 0, 375.5, 300))
    content = io.BytesIO((tmp_path / "photo.jpg").read_bytes())
    difference = decoding.decode(content, 3, 60) - np.asarray(small, np.float32)  # decoded at a quarter of the size
    assert np.sqrt(np.mean(difference**2)) < 3


def test_folder_levels(tmp_path):
    for level, count in (("train", 4), ("val", 2), ("test", 3)):
        for k in ("cat", "dog"):
            for i in range(count):
                save(tmp_path / level / k / f"{i}.png", np.full((3, 3), 10 * i, np.uint8))
    dataset = data.load(f"folder:{tmp_path}")
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 8, "validation": 4, "test": 6}
    assert dataset.image_shape == (3, 3, 1)


def test_npz_with_its_own_splits(tmp_path):
    image, label = np.arange(20 * 4, dtype=np.uint8).reshape(20, 2, 2), np.arange(20) % 2
    np.savez(tmp_path / "mine.npz", image=image, label=label, image_test=image[:4] / 255, label_test=label[:4],
             class_names=np.array(["even", "odd"]))
    dataset = data.load(f"npz:{tmp_path}/mine.npz")
    assert dataset.class_names == ("even", "odd") and dataset.image_shape == (2, 2, 1)
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 18, "validation": 2, "test": 4}
    np.testing.assert_allclose(dataset.splits["test"][np.arange(4)]["image"][..., 0], image[:4] / 255, rtol=1e-6)


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_idx_files_gzipped_or_not(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "plain").write_bytes(idx(array))
    (tmp_path / "zipped.gz").write_bytes(gzip.compress(idx(array)))
    np.testing.assert_array_equal(fashion.read_idx(tmp_path / "plain", 3), array)
    np.testing.assert_array_equal(fashion.read_idx(tmp_path / "zipped.gz", 3), array)

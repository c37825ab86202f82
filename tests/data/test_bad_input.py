"""Each mistake is one line that names what was given and a way out."""

import gzip
import pickle

import numpy as np
import PIL.Image
import pytest
from test_sources import idx, save

from dlcourse import data
from dlcourse.contracts import InputError
from dlcourse.data import fashion, tfds


def refused(name, *says, **options):
    with pytest.raises(InputError) as error:
        data.load(name, **options)
    message = str(error.value)
    assert "\n" not in message
    for part in says:
        assert part in message, message
    return message


@pytest.mark.parametrize(("name", "says"), [
    ("fasion_mnist", "did you mean fashion_mnist?"), ("folders:/x", "did you mean folder:PATH?"),
    ("npz", "did you mean npz:PATH?"), ("digits:8", "did you mean digits?"), ("", "There are digits, faces"),
    (".", "did you mean folder:.?"), ("fake:28x28,10", "such as fake:28x28x1,10"),
    ("fake:8x8x1,1", "at least 2 classes"),
])
def test_unknown_names(name, says):
    refused(name, name, says)


def test_bad_settings():
    refused("digits", "--image_size=-1", image_size=-1)
    refused("shapes", "--image_size=500", image_size=500)
    for fraction in (0, 0.6, float("nan")):
        refused("digits", "--validation_fraction", validation_fraction=fraction)


def grey(side=4):
    return np.full((side, side), 100, np.uint8)


@pytest.fixture
def good(tmp_path):
    """A folder with two classes of four images."""
    for k in ("cat", "dog"):
        for i in range(4):
            save(tmp_path / k / f"{i}.png", grey())
    return tmp_path


def test_the_folder_is_good_before_it_is_spoilt(good):
    assert len(data.load(f"folder:{good}").splits["test"]) == 2


def truncate(root):
    noisy = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    save(root / "dog" / "bad.jpg", noisy)
    (root / "dog" / "bad.jpg").write_bytes((root / "dog" / "bad.jpg").read_bytes()[:3000])


@pytest.mark.parametrize(("spoil", "says"), [
    (lambda root: (root / "dog" / "notes.txt").write_text("woof"), ["notes.txt", "is not an image", "replace it"]),
    (truncate, ["bad.jpg", "cannot be read as an image", "truncated"]),
    (lambda root: (root / "cat" / "empty.png").write_bytes(b""), ["empty.png", "is not an image"]),
    (lambda root: PIL.Image.new("F", (4, 4)).save(root / "cat" / "f.tiff"), ["f.tiff", "32 bits", "npz:PATH"]),
    (lambda root: (root / "cow").mkdir(), ["cow", "no images"]),
    (lambda root: save(root / "cow" / "1.png", grey()), ["class 'cow' has 1", "at least 3"]),
    (lambda root: save(root / "cat" / "big.png", grey(5)), ["differ in size", "5x5", "--image_size"]),
    (lambda root: (root / "dog").rename(root / ".dog"), ["1 subfolders", "cat", "at least two"]),
    (lambda root: (root / "train").mkdir(), ["beside train/"]),
])
def test_bad_folders(good, spoil, says):
    spoil(good)
    refused(f"folder:{good}", *says)


def test_folder_missing_empty_or_a_file(tmp_path):
    refused(f"folder:{tmp_path}/none", "none", "No such file", "readable folder")
    refused(f"folder:{tmp_path}", "0 subfolders")
    (tmp_path / "file").write_text("")
    refused(f"folder:{tmp_path}/file", "Not a directory")


def test_folder_unreadable(good, monkeypatch):
    def deny(*_):
        raise PermissionError(13, "Permission denied", str(good))

    monkeypatch.setattr("pathlib.Path.iterdir", deny)  # root may read everything, so that chmod would not do
    refused(f"folder:{good}", str(good), "Permission denied")


def test_bad_levels(good):
    for k in ("cat", "dog"):
        (good / "train").mkdir(exist_ok=True)
        (good / k).rename(good / "train" / k)
    (good / "test").mkdir()
    refused(f"folder:{good}", "test", "no images")
    save(good / "test" / "cow" / "1.png", grey())
    refused(f"folder:{good}", "class 'cow' has no folder in train/")


IMAGE, LABEL = np.arange(12 * 4, dtype=np.uint8).reshape(12, 2, 2), np.arange(12) % 2
WITH_NAN = np.where(np.arange(48).reshape(12, 2, 2) == 20, np.nan, 0.5)


@pytest.mark.parametrize(("content", "says"), [
    ({"image": IMAGE}, ["lacks label", "save `image`"]),
    ({"image": IMAGE, "label": LABEL, "image_test": IMAGE}, ["lacks label_test"]),
    ({"image": IMAGE, "label": LABEL.astype(object)}, ["pickled", "refused", "np.savez"]),
    ({"image": IMAGE, "label": LABEL + 0.5}, ["labels of type float64"]),
    ({"image": IMAGE, "label": LABEL - 1}, ["label -1 is out of range"]),
    ({"image": IMAGE, "label": LABEL * 2}, ["label 2 occurs but 1 does not"]),
    ({"image": IMAGE, "label": LABEL, "image_test": IMAGE, "label_test": LABEL + 1},
     ["image_test", "label 2 is out of range"]),
    ({"image": IMAGE, "label": LABEL, "class_names": np.array(["one"])}, ["label 1 is out of range"]),
    ({"image": IMAGE, "label": LABEL[:5]}, ["12 images but labels of shape (5,)"]),
    ({"image": IMAGE, "label": LABEL * 0}, ["all of one class"]),
    ({"image": IMAGE[:0], "label": LABEL[:0]}, ["label", "no examples"]),
    ({"image": IMAGE, "label": LABEL, "image_test": IMAGE[:0], "label_test": LABEL[:0]},
     ["image_test", "none of them 0"]),
    ({"image": WITH_NAN, "label": LABEL}, ["image 5", "not finite"]),
    ({"image": WITH_NAN - np.inf, "label": LABEL}, ["not finite"]),
    ({"image": IMAGE.astype(np.float32), "label": LABEL}, ["from 0 to 47", "scale them to [0, 1]"]),
    ({"image": IMAGE / 47 - 0.5, "label": LABEL}, ["from -0.5 to 0.5"]),
    ({"image": IMAGE.astype(np.int64), "label": LABEL}, ["type int64", "uint8"]),
    ({"image": IMAGE.reshape(12, 4), "label": LABEL}, ["shape (12, 4)"]),
    ({"image": np.zeros((12, 3, 8, 8), np.uint8), "label": LABEL}, ["channels first", "np.moveaxis"]),
    ({"image": IMAGE, "label": LABEL, "image_test": IMAGE[:, :1], "label_test": LABEL}, ["different shapes"]),
    ({"image": IMAGE[:4], "label": LABEL[:4]}, ["class '0' has 1 training examples", "at least 3"]),
])
def test_bad_npz(tmp_path, content, says):
    np.savez(tmp_path / "bad.npz", **content)
    refused(f"npz:{tmp_path}/bad.npz", *says)


class Trap:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_files_that_are_no_npz(tmp_path):
    refused(f"npz:{tmp_path}/none.npz", "none.npz", "No such file")
    refused(f"npz:{tmp_path}", "Is a directory")
    np.savez(tmp_path / "cut.npz", image=IMAGE, label=LABEL)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-40])
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "single.npy", IMAGE)
    (tmp_path / "trap.npz").write_bytes(pickle.dumps(Trap()))
    for name in ("cut.npz", "empty.npz", "text.npz", "single.npy", "trap.npz"):
        refused(f"npz:{tmp_path}/{name}", name, "np.savez")


def test_bad_idx(tmp_path):
    whole = idx(np.zeros((2, 3, 4), np.uint8))
    cases = {"magic": (b"\x00\x00\x08\x01" + whole[4:], "wrong magic number 00000801, expected 00000803"),
             "short": (whole[:-1], "cut short"), "header": (whole[:7], "cut short"), "empty": (b"", "an empty file"),
             "gzip": (gzip.compress(whole)[:-9], "cannot be read")}
    for name, (content, says) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=says) as error:
            fashion.read_idx(tmp_path / name, 3)
        assert str(tmp_path / name) in str(error.value) and "download it again" in str(error.value)


def test_fashion_mnist_that_is_nowhere_lists_the_ways(tmp_path, monkeypatch):
    def offline():
        raise OSError("Name or service not known")

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path / "none")
    monkeypatch.setattr(fashion, "downloaded", offline)
    refused("fashion_mnist", "service not known", "apt install dataset-fashion-mnist", "TFDS_DATA_DIR", str(tmp_path))


def test_tfds_unknown_or_offline(tmp_path, monkeypatch):
    def offline(builder):
        raise OSError("Name or service not known")

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(tfds, "check_online", offline)
    refused("tfds:nonesuch", "tfds:nonesuch", "not found", "catalog")
    refused("tfds:mnist", "tfds:mnist", "service not known", "folder:PATH")

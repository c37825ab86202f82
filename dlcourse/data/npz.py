"""`npz:PATH`: arrays of one's own."""

from __future__ import annotations

import pathlib
import zipfile

import numpy as np

from dlcourse.contracts import Dataset, InputError
from dlcourse.data import arrays

KEYS = ("`image`, `label` and optionally `image_validation`, `label_validation`, `image_test`, `label_test`, "
        "`class_names`")


def load(path: str) -> Dataset:
    """Reads an npz file with `image` (N,H,W[,C]) uint8 or floats in [0,1] and `label` (N,) integers 0..K-1.

    Args:
      path: of a file written by `np.savez`. It may also hold `image_validation`, `label_validation`,
        `image_test`, `label_test`, and `class_names` (K,) strings.

    Returns:
      A data set of the splits that the file holds.

    Raises:
      InputError: the file or what is in it will not do. Pickled objects are never loaded: they run code.
    """
    content = read(pathlib.Path(path).expanduser())
    suffixes = {"train": "", "validation": "_validation", "test": "_test"}
    keys = {split: (f"image{suffix}", f"label{suffix}") for split, suffix in suffixes.items()}
    keys = {split: pair for split, pair in keys.items() if split == "train" or set(pair) & content.keys()}
    missing = [key for pair in keys.values() for key in pair if key not in content]
    if missing:
        raise InputError(f"npz:{path}: has {', '.join(content) or 'nothing'} but lacks {', '.join(missing)}; "
                         f"save {KEYS}")
    class_names = names_of(path, content)
    splits = {split: arrays.checked(f"npz:{path}: {image}", content[image], content[label], class_names)
              for split, (image, label) in keys.items()}
    shapes = {split.images.shape[1:] for split in splits.values()}
    if len(shapes) > 1:
        raise InputError(f"npz:{path}: its splits have images of different shapes {sorted(shapes)}; make them equal")
    return Dataset(pathlib.Path(path).stem, splits, class_names, shapes.pop(),
                   citation=f"arrays in {pathlib.Path(path).name}", licence="as its owner says")


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file, by name; a file that is not one, or holds pickles, is an InputError."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise InputError(f"npz:{path}: {error.strerror or error}; give the path of a readable file") from error
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        pickled = "Object arrays" in str(error)
        why = "holds pickled objects, which can run code and are refused" if pickled else "is not a whole npz file"
        raise InputError(f"npz:{path}: {why}; write plain arrays with np.savez: {KEYS}") from error


def names_of(path: str, content: dict[str, np.ndarray]) -> tuple[str, ...]:
    """The class names stored, or as many numbers as there are labels in `label`, each of which must occur."""
    if "class_names" in content:
        return tuple(str(name) for name in content["class_names"].ravel())
    labels = arrays.checked_labels(f"npz:{path}: label", content["label"].ravel())
    absent = np.setdiff1d(np.arange(min(labels.max(), len(labels)) + 1), labels)
    if len(absent):
        raise InputError(f"npz:{path}: label {labels.max()} occurs but {absent[0]} does not; number the classes "
                         "0..K-1, or store class_names")
    return tuple(str(k) for k in range(labels.max() + 1))

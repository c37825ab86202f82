"""Data sets that come inside packages we need anyway: no download, no waiting."""

from __future__ import annotations

import importlib.util
import pathlib

import numpy as np

from dlcourse.contracts import Dataset
from dlcourse.data.arrays import ArraySplit


def digits() -> Dataset:
    """1797 handwritten digits, 8x8x1, grey levels k/16; from scikit-learn's wheel."""
    table = np.loadtxt(inside("sklearn") / "datasets" / "data" / "digits.csv.gz", delimiter=",", dtype=np.int32)
    images = (table[:, :64] / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    return Dataset(
        name="digits", splits={"train": ArraySplit(images, table[:, 64])},
        class_names=tuple("0123456789"), image_shape=(8, 8, 1),
        citation="E. Alpaydin and C. Kaynak. Optical Recognition of Handwritten Digits. "
                 "UCI Machine Learning Repository, 1998. doi:10.24432/C50P49",
        licence="CC BY 4.0")


def faces() -> Dataset:
    """100 faces, then 100 crops of backgrounds, 25x25x1; from scikit-image's wheel."""
    images = np.load(inside("skimage") / "data" / "lfw_subset.npy", allow_pickle=False)
    return Dataset(
        name="faces",
        splits={"train": ArraySplit(images.astype(np.float32)[..., None], np.repeat(np.int32([0, 1]), 100))},
        class_names=("face", "not face"), image_shape=(25, 25, 1),
        citation="G. B. Huang, M. Mattar, H. Lee and E. Learned-Miller. Learning to Align from Scratch. NIPS 2012. "
                 "A subset, as in scikit-image's lfw_subset",
        licence="research use of Labeled Faces in the Wild; distributed with scikit-image without terms of its own")


def inside(package: str) -> pathlib.Path:
    """An installed package's folder, without importing it: scikit-learn takes seconds."""
    return pathlib.Path(importlib.util.find_spec(package).origin).parent

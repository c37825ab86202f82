"""Fashion-MNIST, from whichever place has it; and the idx files it comes in."""

from __future__ import annotations

import gzip
import pathlib
import struct
import zlib

import numpy as np

from dlcourse.contracts import Dataset, InputError
from dlcourse.data import arrays, tfds

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")
NAME = "fashion_mnist"
FILES = {"train": "train", "test": "t10k"}
CLASSES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CITATION = ("H. Xiao, K. Rasul and R. Vollgraf. Fashion-MNIST: a Novel Image Dataset for Benchmarking "
            "Machine Learning Algorithms. arXiv:1708.07747, 2017")
LICENCE = "MIT, Copyright 2017 Zalando SE"


def fashion_mnist() -> Dataset:
    """60,000 + 10,000 articles of clothing, 28x28x1: TFDS' folder, else Debian's files, else TFDS' download."""
    if tfds.is_prepared(NAME):
        return tfds.load(NAME, 0)
    if DEBIAN.is_dir():
        return from_idx({split: (DEBIAN / f"{part}-images-idx3-ubyte.gz", DEBIAN / f"{part}-labels-idx1-ubyte.gz")
                         for split, part in FILES.items()})
    try:
        # TFDS could download and then not prepare: its own extraction needs TensorFlow.
        return from_idx(downloaded())
    except InputError:
        raise
    except Exception as error:  # TFDS raises what it likes: from requests, etils, importlib
        raise InputError(
            f"--dataset={NAME}: not on this machine, and TFDS could not download it ({tfds.one_line(error)}). "
            f"Either go online; or `apt install dataset-fashion-mnist`; or set TFDS_DATA_DIR to a folder "
            f"(now {tfds.data_dir()}) that holds {NAME} prepared as array_record; or try --dataset=digits") from error


def downloaded() -> dict[str, tuple[pathlib.Path, pathlib.Path]]:
    """The idx files as TFDS downloads them (checksums verified), by split."""
    import tensorflow_datasets

    builder = tensorflow_datasets.builder(NAME, data_dir=tfds.data_dir())
    tfds.check_online(builder)
    manager = tensorflow_datasets.download.DownloadManager(
        download_dir=tfds.data_dir() / "downloads", dataset_name=NAME, url_infos=builder.url_infos)
    paths = manager.download({
        split: [f"{builder.URL}{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
        for split, part in FILES.items()})
    return {split: (pathlib.Path(images), pathlib.Path(labels)) for split, (images, labels) in paths.items()}


def from_idx(files: dict[str, tuple[pathlib.Path, pathlib.Path]]) -> Dataset:
    """Fashion-MNIST from {split: (images file, labels file)}."""
    splits = {split: arrays.checked(f"{images} with {labels.name}", read_idx(images, 3), read_idx(labels, 1), CLASSES)
              for split, (images, labels) in files.items()}
    return Dataset(NAME, splits, CLASSES, splits["train"].images.shape[1:], CITATION, LICENCE)


def read_idx(path: pathlib.Path, dimensions: int) -> np.ndarray:
    """Reads one idx file of bytes, gzipped or not.

    Two zero bytes, the type (8: unsigned byte), the number of dimensions, then each dimension as a
    big-endian 32-bit integer, then the values (LeCun et al., the MNIST database, "IDX file format").

    Args:
      path: the file.
      dimensions: how many it must have.

    Returns:
      uint8 of that many dimensions.

    Raises:
      InputError: the file is missing, not such an idx file, or cut short.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({tfds.one_line(error)}); install or download it again") from error
    magic, expected = content[:4], bytes((0, 0, 8, dimensions))
    if magic != expected:
        raise InputError(f"{path}: wrong magic number {magic.hex() or 'in an empty file'}, expected {expected.hex()}: "
                         f"not an idx file of bytes in {dimensions} dimensions; install or download it again")
    start = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", content[4:start]) if len(content) >= start else (1,)
    if len(content) - start != np.prod(shape, dtype=np.int64):
        raise InputError(f"{path}: {len(content)} bytes do not hold the {shape} values that it announces; "
                         "it is cut short: install or download it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


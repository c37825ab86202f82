"""`tfds:NAME`: TensorFlow Datasets by random access, without TensorFlow."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import socket
import urllib.parse
from typing import Any

import numpy as np

from dlcourse.contracts import Dataset, InputError
from dlcourse.data import arrays, tfds_labels
from dlcourse.data.decoding import decode, reading

IN_MEMORY = 2**28
"""Splits of up to this many bytes are read once; larger ones are decoded as they are needed."""


@dataclasses.dataclass(frozen=True)
class TfdsSplit:
    """A split whose images are decoded when they are read.

    Attributes:
      where: what to call it in an error.
      source: random access to features, as `as_data_source` gives.
      encoded: whether its images are files to be decoded here; else `source` decodes them.
      rows: (N,) positions in it that make this split.
      labels: (N,) int32.
      image_shape: (H,W,C) of the images as they are read.
      image_size: side of the square that images are resized to; 0 keeps them.
    """

    where: str
    source: Any
    encoded: bool
    rows: np.ndarray
    labels: np.ndarray
    image_shape: tuple[int, int, int]
    image_size: int
    dtype = np.dtype(np.uint8)
    decodes = True

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return arrays.read(self, indices)

    def facts(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """All that is known of the examples but their images."""
        return {"label": self.labels[indices]}

    def fill(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Decodes the images of `indices` (B,) into `out` (B,H,W,C) uint8."""
        for row, to in zip(self.rows[indices], out, strict=True):
            where = f"{self.where}, record {row}"
            with reading(where):
                to[...] = self.image(int(row), where)

    def image(self, row: int, where: str) -> np.ndarray:
        """The image of one record, (H,W,C) uint8."""
        if self.encoded:
            file = io.BytesIO(encoded_image(self.source.data_source[row]))
            return decode(file, self.image_shape[2], self.image_size, where)
        image = np.asarray(self.source[row]["image"])
        return arrays.resized(image[None], self.image_size)[0] if self.image_size else image

    def take(self, positions: np.ndarray) -> TfdsSplit:
        """The split of only these examples, in this order."""
        return dataclasses.replace(self, rows=self.rows[positions], labels=self.labels[positions])


def encoded_image(record: bytes) -> bytes:
    """The file of an image in a record; TFDS' own way to it takes five times as long, which shows at scale."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(record).features.feature["image"].bytes_list.value[0]


def data_dir() -> pathlib.Path:
    """Where TFDS keeps its data: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def is_prepared(name: str) -> bool:
    """Whether some version of `name` lies there in a format that can be read without TensorFlow."""
    infos = (data_dir() / name).glob("**/dataset_info.json")
    return any(json.loads(info.read_text()).get("fileFormat") == "array_record" for info in infos)


def load(name: str, image_size: int) -> Dataset:
    """Reads, and where it must downloads and prepares, a data set with features `image` and `label`.

    A split `test` is used as it is. Where there is only `validation` besides `train`, as in ImageNet, that is
    our test split and validation is carved from train: what is reported was never selected on.

    Args:
      name: as TFDS spells it: NAME[/CONFIG][:VERSION].
      image_size: side to resize to; 0 keeps images, which must then all have one shape.

    Returns:
      A data set of the splits that TFDS has.

    Raises:
      InputError: unknown, not an image classification, cannot be prepared, or damaged.
    """
    builder = prepared(name)
    height, width, channels = image_shape(name, builder.info.features, image_size)
    names = [split for split in ("train", "validation", "test") if split in builder.info.splits]
    if "train" not in names:
        raise InputError(f"tfds:{name}: has no split called train but {', '.join(builder.info.splits)}; choose another")
    try:
        splits = {split: read(builder, split, (height, width, channels), image_size) for split in names}
    except InputError:
        raise
    except Exception as error:  # array_record and protobuf raise what they like
        raise InputError(f"tfds:{name}: {builder.data_path} cannot be read ({one_line(error)}); "
                         "delete that folder and prepare it again") from error
    if "test" in splits and (splits["test"].labels < 0).any():
        del splits["test"]  # its labels were never published
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    licence = builder.info.redistribution_info.license or "not stated by TFDS"
    return Dataset(builder.info.name, splits, tuple(builder.info.features["label"].names), (height, width, channels),
                   builder.info.citation, licence)


def prepared(name: str) -> Any:
    """TFDS' builder of `name`, its data on disk as array_record."""
    import tensorflow_datasets

    try:
        builder = tensorflow_datasets.builder(name, data_dir=data_dir())
    except Exception as error:  # an unknown name, version or configuration each raises another type
        raise InputError(f"tfds:{name}: {one_line(error)}; see tensorflow.org/datasets/catalog for names") from error
    if not builder.is_prepared():
        try:
            check_online(builder)
            builder.download_and_prepare(file_format="array_record")
        except Exception as error:
            raise InputError(
                f"tfds:{name}: not in {data_dir()} and cannot be prepared here ({one_line(error)}); some data sets "
                "need TensorFlow for that: run `tfds build --file_format=array_record` where it is installed and copy "
                "the folder, or use folder:PATH") from error
    if builder.info.file_format.value != "array_record":
        raise InputError(f"tfds:{name}: {builder.data_path} holds {builder.info.file_format.value}, which needs "
                         "TensorFlow; prepare it again with file_format=array_record, or set TFDS_DATA_DIR elsewhere")
    return builder


def check_online(builder: Any) -> None:
    """Raises OSError where the host of a builder's first file cannot be found; TFDS itself retries for minutes."""
    for url in list(builder.url_infos)[:1]:
        socket.getaddrinfo(urllib.parse.urlparse(url).hostname, None)


def image_shape(name: str, features: Any, image_size: int) -> tuple[int, int, int]:
    """(H,W,C) of images as they will be read."""
    if not {"image", "label"} <= set(features) or not hasattr(features["label"], "names"):
        raise InputError(f"tfds:{name}: has the features {', '.join(features)}; an image classification has "
                         "`image` and `label`: choose another")
    if features["image"].np_dtype != np.uint8:
        raise InputError(f"tfds:{name}: its images are of type {np.dtype(features['image'].np_dtype)}, and only bytes "
                         "are read: choose another, or convert it to npz:PATH")
    height, width, channels = features["image"].shape
    if image_size:
        return image_size, image_size, channels
    if height is None or width is None:
        raise InputError(f"tfds:{name}: its images differ in size; give --image_size, such as --image_size=224")
    return height, width, channels


def read(builder: Any, split: str, shape: tuple[int, int, int], image_size: int) -> arrays.ArraySplit | TfdsSplit:
    """One split, in memory where it fits."""
    found = lazy(builder, split, shape, image_size)
    if len(found) * np.prod(shape, dtype=np.int64) > IN_MEMORY:
        return found
    images = np.empty((len(found), *shape), np.uint8)
    found.fill(np.arange(len(found)), images)
    return arrays.ArraySplit(images, found.labels)


def lazy(builder: Any, split: str, shape: tuple[int, int, int], image_size: int) -> TfdsSplit:
    """One split, decoded as it is read."""
    import tensorflow_datasets

    source, where = builder.as_data_source(split), f"tfds:{builder.info.full_name}, {split}"
    encoded = isinstance(builder.info.features["image"], tensorflow_datasets.features.Image)
    labels = tfds_labels.load(source.data_source, builder.info.splits[split].filepaths)
    return TfdsSplit(where, source, encoded, np.arange(len(labels)), labels, shape, image_size)


def one_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters, for inside a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]

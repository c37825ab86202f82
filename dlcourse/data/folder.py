"""`folder:PATH`: images of one's own, a subfolder a class, decoded when they are read."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from dlcourse.contracts import Dataset, InputError
from dlcourse.data import arrays
from dlcourse.data.decoding import decode, header

LEVELS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
CHECKED = 4000
"""Every file's header is read when a folder is loaded; this many files, evenly spread, are also decoded to the end."""
GROUP = 256
"""Files whose headers a thread reads at a time: a task for each of a million files would fill the memory."""
LITTER = {"thumbs.db", "desktop.ini"}
GREY = {"1", "L", "LA", "I;16"}


@dataclasses.dataclass(frozen=True)
class FolderSplit:
    """Files and their labels.

    Attributes:
      paths: N files.
      labels: (N,) int32.
      image_shape: (H,W,C) of the images as they are read.
      image_size: side of the square that images are resized to; 0 keeps them.
    """

    paths: tuple[pathlib.Path, ...]
    labels: np.ndarray
    image_shape: tuple[int, int, int]
    image_size: int
    dtype = np.dtype(np.uint8)
    decodes = True

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return arrays.read(self, indices)

    def facts(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """All that is known of the examples but their images."""
        return {"label": self.labels[indices]}

    def fill(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Decodes the images of `indices` (B,) into `out` (B,H,W,C) uint8."""
        for i, to in zip(indices, out, strict=True):
            image = decode(self.paths[i], to.shape[2], self.image_size)
            if image.shape != to.shape:
                raise InputError(f"{self.paths[i]}: is {image.shape[1]}x{image.shape[0]} now, {to.shape[1]}x"
                                 f"{to.shape[0]} when training began; put it back, or give --image_size")
            to[...] = image

    def take(self, positions: np.ndarray) -> FolderSplit:
        """The split of only these examples, in this order."""
        return dataclasses.replace(self, paths=tuple(self.paths[i] for i in positions), labels=self.labels[positions])


def load(path: str, image_size: int) -> Dataset:
    """A data set from PATH/CLASS/*.png, or from PATH/train/CLASS/*.png beside validation/ (or val/) and test/.

    Whatever pillow opens is an image; nested folders belong to the class above them, hidden files to nobody.
    Images are grey if all are, else RGB; transparency is laid on white; EXIF orientation is applied.

    Args:
      path: the folder.
      image_size: side to resize the centred square to; 0 where all images have one size.

    Returns:
      A data set of the splits that the folder has levels for.

    Raises:
      InputError: nothing to read, a file that is not a whole image, one class, or mixed sizes without image_size.
    """
    root = pathlib.Path(path).expanduser()
    levels = levels_of(root)
    class_names = tuple(folder.name for folder in subfolders(levels["train"]))
    if len(class_names) < 2:
        raise InputError(f"folder:{path}: {levels['train']} has {len(class_names)} subfolders with a class each "
                         f"({', '.join(class_names) or 'none'}); classification needs at least two")
    files = {split: files_of(level, class_names) for split, level in levels.items()}
    everything = [file for paths, _ in files.values() for file in paths]
    channels, (height, width) = inspect(path, everything, image_size)
    shape = (height, width, channels)
    splits = {split: FolderSplit(paths, labels, shape, image_size) for split, (paths, labels) in files.items()}
    return Dataset(root.resolve().name, splits, class_names, shape,
                   citation=f"images in the folder {root.resolve().name}", licence="as its owner says")


def levels_of(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """{split: folder of classes}: the levels train/, validation/ and test/, or the folder itself as train."""
    names = [folder.name for folder in subfolders(root)]
    if "train" not in names:
        return {"train": root}
    strangers = [name for name in names if name not in LEVELS]
    if strangers:
        raise InputError(f"folder:{root}: has {strangers[0]}/ beside train/; beside train/ only validation/ (or val/) "
                         "and test/ are read: move it")
    if {"val", "validation"} <= set(names):
        raise InputError(f"folder:{root}: has both val/ and validation/; keep one")
    return {LEVELS[name]: root / name for name in names}


def subfolders(folder: pathlib.Path) -> list[pathlib.Path]:
    """The visible folders in a folder, by name."""
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"folder:{folder}: {error.strerror}; give a readable folder with a subfolder of images "
                         "for each class") from error


def files_of(level: pathlib.Path, class_names: Sequence[str]) -> tuple[tuple[pathlib.Path, ...], np.ndarray]:
    """The files of one split and their labels (N,) int32, in an order that no file system decides."""
    strangers = [folder.name for folder in subfolders(level) if folder.name not in class_names]
    if strangers:
        raise InputError(f"folder:{level}: class {strangers[0]!r} has no folder in train/; "
                         f"the classes there are {', '.join(class_names)}")
    by_class = [visible_files(level / name) if (level / name).is_dir() else [] for name in class_names]
    if not any(by_class):
        raise InputError(f"folder:{level}: no images in {', '.join(class_names)}; fill it or remove it")
    if level.name not in ("validation", "val", "test") and not all(by_class):
        empty = level / class_names[[bool(files) for files in by_class].index(False)]
        raise InputError(f"folder:{empty}: no images in it; fill it or remove it")
    labels = np.repeat(np.arange(len(class_names), dtype=np.int32), [len(files) for files in by_class])
    return tuple(file for files in by_class for file in files), labels


def visible_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files below a folder, sorted; hidden ones and what file managers leave behind are skipped."""
    def refuse(error: OSError):
        raise InputError(f"folder:{error.filename}: {error.strerror}; make it readable") from error

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [pathlib.Path(parent, name) for name in names
                  if not name.startswith(".") and name.lower() not in LITTER]
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def inspect(path: str, files: Sequence[pathlib.Path], image_size: int) -> tuple[int, tuple[int, int]]:
    """Reads every header and decodes up to `CHECKED` files, so that a bad one is found before training starts.

    Returns:
      Channels (1 or 3) and (height, width) of the images to come.
    """
    with concurrent.futures.ThreadPoolExecutor() as pool:
        groups = [files[low:low + GROUP] for low in range(0, len(files), GROUP)]
        headers = [each for group in pool.map(lambda group: [header(file) for file in group], groups) for each in group]
        list(pool.map(lambda file: decode(file, 3, 0), files[::-(-len(files) // CHECKED)]))
    channels = 1 if all(mode in GREY for mode, _ in headers) else 3
    sizes = {size: file for file, (_, size) in reversed(list(zip(files, headers, strict=True)))}
    if image_size:
        return channels, (image_size, image_size)
    if len(sizes) > 1:
        (one, its), (other, others) = list(sizes.items())[:2]
        raise InputError(f"folder:{path}: images differ in size ({its.name} is {one[1]}x{one[0]}, {others.name} "
                         f"{other[1]}x{other[0]}); give --image_size, such as --image_size=64")
    return channels, next(iter(sizes))

"""A name becomes a data set: `load("digits")`."""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
from collections.abc import Callable

from dlcourse.contracts import Dataset, InputError
from dlcourse.data import arrays, embedded, fake, fashion, folder, npz, shapes, splits, tfds

SOURCES: dict[str, Callable[[str, int], Dataset]] = {
    "digits": lambda _, size: embedded.digits(),
    "faces": lambda _, size: embedded.faces(),
    "fashion_mnist": lambda _, size: fashion.fashion_mnist(),
    "shapes": lambda _, size: shapes.load(size),
    "folder:PATH": folder.load,
    "npz:PATH": lambda path, size: npz.load(path),
    "tfds:NAME": tfds.load,
    "fake:HxWxC,K": fake.load,
}
"""(what follows the colon, image_size) -> a data set that has at least `train`."""


def names() -> tuple[str, ...]:
    """What `load` understands; capitals stand for what the user fills in."""
    return tuple(SOURCES)


def load(name: str, *, image_size: int = 0, validation_fraction: float = 0.1, seed: int = 0) -> Dataset:
    """Loads a data set and completes its splits.

    Splits that the source has are used as they are. A missing test split is a fixed, stratified 20 % of the
    training examples, whatever the seed; a missing validation split is carved from the rest.

    Args:
      name: one of `names()`.
      image_size: side in pixels to resize to (the centred square of each image); 0 keeps images as they are.
      validation_fraction: share of the training examples held out for validation, in (0, 0.5].
      seed: of the validation split.

    Returns:
      A data set with the splits `train`, `validation` and `test`.

    Raises:
      InputError: the name is unknown or the data will not do.
    """
    if image_size < 0:
        raise InputError(f"--image_size={image_size}: give a number of pixels, or 0 to keep images as they are")
    if not 0 < validation_fraction <= 0.5:
        raise InputError(f"--validation_fraction={validation_fraction}: give a share above 0 and up to 0.5")
    source, argument = find(name)
    dataset = source(argument, image_size)
    require_two_classes(name, dataset)
    if image_size:
        dataset = resize(dataset, image_size)
    completed = splits.complete(dict(dataset.splits), dataset.class_names, validation_fraction, seed)
    return dataclasses.replace(dataset, splits=completed)


def find(name: str) -> tuple[Callable[[str, int], Dataset], str]:
    """The source of a data set and what follows the colon in its name; an unknown name is an InputError."""
    prefix, colon, argument = name.partition(":")
    for known, source in SOURCES.items():
        known_prefix, known_colon, _ = known.partition(":")
        if (prefix, colon) == (known_prefix, known_colon) and bool(argument) == bool(known_colon):
            return source, argument
    guess = difflib.get_close_matches(prefix, [known.partition(":")[0] for known in SOURCES], n=1)
    if guess:
        hint = f"did you mean {next(known for known in SOURCES if known.partition(':')[0] == guess[0])}? "
    else:
        path = pathlib.Path(name).expanduser()
        hint = f"did you mean {'folder' if path.is_dir() else 'npz'}:{name}? " if name and path.exists() else ""
    raise InputError(f"--dataset={name}: unknown; {hint}There are {', '.join(SOURCES)}")


def require_two_classes(name: str, dataset: Dataset) -> None:
    """Raises InputError where there is nothing to tell apart."""
    labels = dataset.splits["train"].labels
    if dataset.num_classes < 2 or (labels == labels[0]).all():
        raise InputError(f"--dataset={name}: its training examples are all of one class "
                         f"({dataset.class_names[labels[0]]!r}); classification needs at least two")


def resize(dataset: Dataset, image_size: int) -> Dataset:
    """Resizes what is in memory, once; splits that make or decode images on reading do so at that size already."""
    done = {name: dataclasses.replace(split, images=arrays.resized(split.images, image_size))
            if isinstance(split, arrays.ArraySplit) else split for name, split in dataset.splits.items()}
    return dataclasses.replace(dataset, splits=done, image_shape=(image_size, image_size, dataset.image_shape[2]))

"""Examples in memory, and what must be true of arrays from outside."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from dlcourse.contracts import InputError


@dataclasses.dataclass(frozen=True)
class ArraySplit:
    """A split held in memory; bytes stay bytes until they are read.

    Attributes:
      images: (N,H,W,C) uint8, or float32 in [0,1].
      labels: (N,) int32.
      extras: further arrays with a leading N, such as attributes; a batch carries them by name.
    """

    images: np.ndarray
    labels: np.ndarray
    extras: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": to_float(self.images[indices]), **self.facts(indices)}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return self.images.dtype

    def facts(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """All that is known of the examples but their images."""
        return {"label": self.labels[indices], **{name: values[indices] for name, values in self.extras.items()}}

    def fill(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Copies the images of `indices` (B,) into `out` (B,H,W,C) of this split's dtype."""
        np.take(self.images, indices, axis=0, out=out, mode="clip")  # any other mode goes through a buffer

    def take(self, positions: np.ndarray) -> ArraySplit:
        """The split of only these examples, in this order."""
        extras = {name: values[positions] for name, values in self.extras.items()}
        return ArraySplit(self.images[positions], self.labels[positions], extras)


def read(split, indices: np.ndarray) -> dict[str, np.ndarray]:
    """`split[indices]` of a split that has `image_shape`, `dtype`, `fill` and `facts`."""
    images = np.empty((len(indices), *split.image_shape), split.dtype)
    split.fill(indices, images)
    return {"image": to_float(images), **split.facts(indices)}


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 to float32 in [0,1] by x / 255; floats as they are."""
    return np.divide(images, np.float32(255), dtype=np.float32) if images.dtype == np.uint8 else images


def checked(where: str, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> ArraySplit:
    """A split of arrays that nobody has vouched for.

    Args:
      where: what to call them in an error, such as "digits.npz: image_test".
      images: (N,H,W) or (N,H,W,C).
      labels: (N,).
      class_names: K names.

    Returns:
      The split, with uint8 or float32 images and int32 labels.

    Raises:
      InputError: anything that a `Split` may not be.
    """
    images = checked_images(where, images)
    if labels.shape != images.shape[:1]:
        raise InputError(f"{where}: {len(images)} images but labels of shape {labels.shape}; give one label an image")
    labels = checked_labels(where, labels)
    if labels.max() >= len(class_names):
        raise InputError(f"{where}: label {labels.max()} is out of range; there are {len(class_names)} classes, "
                         f"numbered 0..{len(class_names) - 1}")
    return ArraySplit(images, labels)


def checked_images(where: str, images: np.ndarray) -> np.ndarray:
    """(N,H,W[,C]) uint8, or finite floats in [0,1] -> (N,H,W,C) uint8 or float32; anything else is an InputError."""
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise InputError(f"{where}: images of shape {images.shape}; expected (N,H,W) or (N,H,W,C), "
                         "none of them 0")
    images = images.reshape(*images.shape, 1) if images.ndim == 3 else images
    if images.shape[1] in (1, 3, 4) and images.shape[3] > 4:
        raise InputError(f"{where}: images of shape {images.shape} have their channels first; "
                         "write np.moveaxis(images, 1, -1) instead")
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise InputError(f"{where}: images of type {images.dtype}; store uint8 in 0..255, or floats in [0, 1]")
    low, high = images.min(), images.max()
    if not np.isfinite([low, high]).all():
        first = int(np.argmin(np.isfinite(images).all(axis=(1, 2, 3))))
        raise InputError(f"{where}: image {first} has pixels that are not finite; repair or drop it")
    if low < 0 or high > 1:
        raise InputError(f"{where}: float pixels from {low:g} to {high:g}; scale them to [0, 1], "
                         "or store uint8 in 0..255")
    return images.astype(np.float32)


def checked_labels(where: str, labels: np.ndarray) -> np.ndarray:
    """(N,) integers >= 0 -> int32; anything else is an InputError."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{where}: labels of type {labels.dtype}; store integers 0..K-1")
    if len(labels) == 0:
        raise InputError(f"{where}: no examples; leave this split out or fill it")
    if labels.min() < 0 or labels.max() > 2**31 - 1:
        outside = labels.min() if labels.min() < 0 else labels.max()
        raise InputError(f"{where}: label {outside} is out of range; number the classes 0..K-1")
    return labels.astype(np.int32)


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """(N,H,W,C) -> (N,size,size,C) of the same type: the centred square, bilinear (an area filter when shrinking).

    Bilinear because its weights are positive: pixels stay in [0,1].
    """
    from PIL import Image

    if images.shape[1:3] == (size, size):
        return images
    square = centred_square(images.shape[2], images.shape[1])
    out = np.empty((len(images), size, size, images.shape[3]), images.dtype)
    for image, to in zip(images, out, strict=True):
        for c in range(images.shape[3]):
            plane = Image.fromarray(np.ascontiguousarray(image[:, :, c]))
            to[:, :, c] = plane.resize((size, size), Image.Resampling.BILINEAR, box=square)
    return out if out.dtype == np.uint8 else out.clip(0, 1)


def centred_square(width: int, height: int) -> tuple[float, float, float, float]:
    """(left, upper, right, lower) of the largest square in the middle, in pixels."""
    side = min(width, height)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side

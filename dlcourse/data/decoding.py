"""Files of images become bytes in memory: upright, grey or RGB, of one size, or an error that names the file.

Pillow on purpose. Its decoder is libjpeg-turbo, as in every quicker-looking package, and it lets go of Python's lock;
what costs time around it are copies that nobody needs, so that none is made here that an image does not call for.
"""

from __future__ import annotations

import pathlib
from typing import BinaryIO

import numpy as np

from dlcourse.contracts import InputError
from dlcourse.data import arrays

ORIENTATION = 0x0112
"""EXIF tag; 1 is upright, 5 to 8 swap the axes."""


def decode(file: pathlib.Path | BinaryIO, channels: int, image_size: int, where: str = "") -> np.ndarray:
    """One image, upright, its centred square resized to image_size unless that is 0.

    Args:
      file: a path, or its content as a binary file.
      channels: 1 (grey) or 3 (RGB); transparency becomes white.
      image_size: side in pixels.
      where: what to call it in an error; its path if left out.

    Returns:
      (H,W,C) uint8, perhaps not writable.

    Raises:
      InputError: not an image, cut short, or of a kind that has no 8-bit form.
    """
    from PIL import Image

    where = where or file
    with reading(where), Image.open(file) as image:
        if image_size:
            image.draft(None, (image_size, image_size))  # lets JPEG skip detail that resizing would throw away
        image = converted(where, upright(image), channels)
        if image_size:
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR,
                                 box=arrays.centred_square(*image.size))
        return np.asarray(image).reshape(image.height, image.width, channels)


def header(path: pathlib.Path) -> tuple[str, tuple[int, int]]:
    """An image's pillow mode and its (height, width) once it is upright."""
    from PIL import Image

    with reading(path), Image.open(path) as image:
        sideways = image.getexif().get(ORIENTATION, 1) >= 5
        return image.mode, image.size if sideways else image.size[::-1]


def upright(image):
    """A pillow image turned as its EXIF data ask; pillow's own function copies also what stands upright."""
    from PIL import ImageOps

    return image if image.getexif().get(ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)


def converted(where: object, image, channels: int):
    """A pillow image as grey (1 channel) or RGB (3), 8 bits; transparency becomes white."""
    from PIL import Image

    if image.mode in ("I", "F"):
        raise InputError(f"{where}: has {image.mode!r} pixels of 32 bits without a scale; convert it "
                         "to 8 bits, or use npz:PATH")
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


class reading:
    """Turns whatever pillow raises on a bad file into an InputError that names it."""

    def __init__(self, where: object):
        self.where = where

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception) and not isinstance(error, InputError):
            from PIL import UnidentifiedImageError

            unknown = isinstance(error, UnidentifiedImageError)
            why = "is not an image" if unknown else f"cannot be read as an image ({error})"
            raise InputError(f"{self.where}: {why}; remove or replace it") from error

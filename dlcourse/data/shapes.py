"""`shapes`: pictures made to order, whose every attribute is known.

`sample` draws attributes, `render` draws the pictures. To plant a cause, such as a texture that goes with
a shape, change the attributes in between.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dlcourse.contracts import Dataset, InputError
from dlcourse.data import draws
from dlcourse.data.arrays import ArraySplit

EXAMPLES = {"train": 6000, "test": 1200}
DEFAULT_SIZE = 32
LARGEST_SIZE = 128
COLOURS = {"red": (230, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230), "yellow": (235, 220, 50),
           "magenta": (215, 50, 205), "cyan": (50, 210, 220)}
RADII = {"small": 0.18, "medium": 0.27, "large": 0.38}
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": ("circle", "square", "triangle", "cross", "ring", "diamond"),
    "colour": tuple(COLOURS),
    "size": tuple(RADII),
    "texture": ("plain", "horizontal stripes", "vertical stripes", "checks"),
}
"""The values of each attribute that is stored as a number; `position` (y, x) and `background` are continuous."""
CHUNK = 500


def load(image_size: int) -> Dataset:
    """6000 + 1200 coloured shapes on grey, RGB, 32x32 unless image_size says otherwise; label = shape."""
    size = image_size or DEFAULT_SIZE
    if not 8 <= size <= LARGEST_SIZE:
        raise InputError(f"--image_size={size}: shapes are drawn from 8 up to {LARGEST_SIZE} pixels a side")
    splits = {}
    for number, (name, count) in enumerate(EXAMPLES.items()):
        attributes = sample(count, seed=number)
        splits[name] = ArraySplit(render(attributes, size), attributes["shape"], attributes)
    return Dataset("shapes", splits, ATTRIBUTES["shape"], (size, size, 3), "made up by dlcourse", "CC0")


def sample(n: int, seed: int) -> dict[str, np.ndarray]:
    """Attributes of n pictures: shapes in equal numbers, all else independent of each other and of the shape.

    Args:
      n: how many.
      seed: of the draws.

    Returns:
      `shape`, `colour`, `size` and `texture` (n,) int32, positions in `ATTRIBUTES`; `position` (n,2) float32, the
      centre (y, x) as shares of the side, such that the shape lies inside; `background` (n,) float32 in [0.1, 0.6].
    """
    out = {name: draws.integers(f"shapes {name}", seed, 0, n, len(values)) for name, values in ATTRIBUTES.items()}
    out["shape"] = np.arange(n, dtype=np.int32) % len(ATTRIBUTES["shape"])
    radius = np.array(list(RADII.values()))[out["size"]][:, None]
    out["position"] = (radius + (1 - 2 * radius) * draws.uniform("shapes position", seed, 0, (n, 2))).astype(np.float32)
    out["background"] = (0.1 + 0.5 * draws.uniform("shapes background", seed, 0, (n,))).astype(np.float32)
    return out


def render(attributes: Mapping[str, np.ndarray], image_size: int) -> np.ndarray:
    """Pictures of attributes as `sample` gives them: (N, image_size, image_size, 3) uint8."""
    images = np.empty((len(attributes["shape"]), image_size, image_size, 3), np.uint8)
    for start in range(0, len(images), CHUNK):
        part = {name: values[start:start + CHUNK] for name, values in attributes.items()}
        images[start:start + CHUNK] = render_chunk(part, image_size)
    return images


def render_chunk(attributes: Mapping[str, np.ndarray], image_size: int) -> np.ndarray:
    """As `render`, all at once: colour c (dark in every other cell of the texture) over grey g by coverage a."""
    pixels = (np.arange(image_size) + 0.5) / image_size
    radius = np.array(list(RADII.values()))[attributes["size"]].reshape(-1, 1, 1)
    y = (pixels.reshape(1, -1, 1) - attributes["position"][:, 0].reshape(-1, 1, 1)) / radius
    x = (pixels.reshape(1, 1, -1) - attributes["position"][:, 1].reshape(-1, 1, 1)) / radius
    outside = np.empty((len(radius), image_size, image_size))
    for k in range(len(ATTRIBUTES["shape"])):
        chosen = attributes["shape"] == k
        outside[chosen] = distances(k, y[chosen], x[chosen])
    coverage = np.clip(0.5 - outside * radius * image_size, 0, 1)[..., None]  # one pixel wide edges
    colour = np.array(list(COLOURS.values()))[attributes["colour"]].reshape(-1, 1, 1, 3)
    colour = colour * shade(attributes["texture"].reshape(-1, 1, 1), y, x)[..., None]
    background = 255 * attributes["background"].astype(np.float64).reshape(-1, 1, 1, 1)
    return np.rint(background + coverage * (colour - background)).astype(np.uint8)


def distances(shape: int, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """How far points lie outside a shape of radius 1 (negative inside; near the edge, the distance to it).

    Only +, *, square roots and comparisons: every machine draws the same.

    Args:
      shape: position in ATTRIBUTES["shape"].
      y, x: broadcastable, in radii from the centre, y down.

    Returns:
      Of their common shape.
    """
    across, down = np.abs(x), np.abs(y)
    match ATTRIBUTES["shape"][shape]:
        case "circle":
            return np.sqrt(x * x + y * y) - 0.9
        case "square":
            return np.maximum(across, down) - 0.8
        case "triangle":
            return np.maximum(y - 0.6, across * 0.8944271909999159 - (y + 1) * 0.4472135954999579)
        case "cross":
            return np.minimum(np.maximum(across - 0.3, down - 0.95), np.maximum(across - 0.95, down - 0.3))
        case "ring":
            return np.abs(np.sqrt(x * x + y * y) - 0.7) - 0.25
        case "diamond":
            return (across + down - 1) * 0.7071067811865476
    raise ValueError(f"no formula for shape {shape}")


def shade(texture: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Brightness of the texture, 1 or 0.4: bands and checks half a radius wide."""
    row, column = np.floor(y * 2), np.floor(x * 2)
    cells = np.select([texture == 1, texture == 2, texture == 3],
                      [row + 0 * column, column + 0 * row, row + column], 0 * (row + column))
    return np.where(cells % 2 == 1, 0.4, 1.0)

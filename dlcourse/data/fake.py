"""`fake:HxWxC,K`: images of any shape that cost nothing to store, for tests and benchmarks."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from dlcourse.contracts import Dataset, InputError
from dlcourse.data import draws

EXAMPLES = {"train": 2000, "test": 400}
CELLS = 4


@dataclasses.dataclass(frozen=True)
class FakeSplit:
    """image = pattern of its class + a stretch of one reel of noise; made when it is read.

    Attributes:
      height: H.
      cells: (K,4,W,C) float32 in [64,191] / 255: the rows of the four bands that a pattern consists of.
      noise: (M,) float32 in [0,63] / 255, from which example i takes H W C values from `starts[i]` on.
      starts: (N,) positions in `noise`.
      labels: (N,) int32.
    """

    height: int
    cells: np.ndarray
    noise: np.ndarray
    starts: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        labels = self.labels[indices]
        bands = [slice(-(-self.height * r // CELLS), -(-self.height * (r + 1) // CELLS)) for r in range(CELLS)]
        out = np.empty((len(labels), self.height, *self.cells.shape[2:]), np.float32)
        for to, k, start in zip(out, labels, self.starts[indices], strict=True):
            noise = self.noise[start:start + to.size].reshape(to.shape)
            for band, row in zip(bands, self.cells[k], strict=True):
                np.add(noise[band], row, out=to[band])
        return {"image": out, "label": labels}

    def take(self, positions: np.ndarray) -> FakeSplit:
        """The split of only these examples, in this order."""
        return dataclasses.replace(self, starts=self.starts[positions], labels=self.labels[positions])


def load(argument: str, image_size: int) -> Dataset:
    """Made-up data: each class has a pattern of 4x4 cells, each image noise of its own upon it.

    Args:
      argument: "HxWxC,K", such as "224x224x3,1000".
      image_size: H and W instead of those, unless 0.

    Returns:
      2000 training and 400 test examples, at least 6 and 2 a class, always the same ones.
    """
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+),(\d+)", argument)
    height, width, channels, classes = map(int, match.groups()) if match else (0, 0, 0, 0)
    if min(height, width, channels) < 1 or classes < 2:
        raise InputError(f"--dataset=fake:{argument}: expected fake:HxWxC,K with at least 2 classes, "
                         "such as fake:28x28x1,10")
    height, width = (image_size, image_size) if image_size else (height, width)
    size = height * width * channels
    cells = (64 + draws.integers("fake cells", 0, 0, classes * CELLS**2 * channels, 128)).astype(np.float32) / 255
    cells = cells.reshape(classes, CELLS, CELLS, channels)[:, :, np.arange(width) * CELLS // width]
    noise = draws.bits("fake noise", 0, 0, size // 8 + 4096).astype("<u8").view(np.uint8) & np.uint8(63)
    noise = noise.astype(np.float32) / 255
    splits = {}
    for number, (split, count) in enumerate(EXAMPLES.items()):
        labels = np.arange(max(count, (6 if split == "train" else 2) * classes), dtype=np.int32) % classes
        starts = draws.integers("fake starts", 0, number, len(labels), len(noise) - size)
        splits[split] = FakeSplit(height, cells, noise, starts, labels)
    return Dataset(f"fake:{argument}", splits, tuple(f"class {k}" for k in range(classes)), (height, width, channels),
                   citation="made up by dlcourse", licence="CC0")

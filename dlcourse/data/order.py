"""Which example stands in which row of which batch: a pure function of (seed, step), whoever reads it.

Position p of the endless sequence that a run is fed lies in epoch p // N, and is there the (p mod N)-th of
a permutation keyed by (seed, epoch). Step s holds the positions s B .. (s+1) B - 1: batches may straddle
epochs, no example is left out or met twice in one, and to resume is to start at another step.

Of n processes the i-th reads the rows i B/n .. (i+1) B/n - 1 of every batch: together they read what one would.
"""

from __future__ import annotations

import functools
import threading
from typing import NamedTuple

import numpy as np

from dlcourse.contracts import InputError
from dlcourse.data import draws


class Order(NamedTuple):
    """The rows of batches that one process reads.

    Attributes:
      n: examples in the split, N > 0.
      batch_size: B, over all processes.
      seed: of the permutations; None for every example once, in the split's order.
      part: (i, n): this process is the i-th of n.
    """

    n: int
    batch_size: int
    seed: int | None
    part: tuple[int, int] = (0, 1)

    @property
    def share(self) -> int:
        """Rows of a batch that are this process's."""
        return self.batch_size // self.part[1]

    @property
    def steps(self) -> int:
        """Batches until every example was met, the same for every process."""
        return -(-self.n // self.batch_size)

    def rows(self, step: int, low: int = 0, high: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rows low .. high - 1 of this process's share of a batch.

        Returns:
          The examples (high - low,) int32, and a mask that is false where the split has come to its end: there
          stands its last example again.
        """
        first = step * self.batch_size + self.part[0] * self.share
        positions = np.arange(first + low, first + (self.share if high is None else high), dtype=np.int64)
        if self.seed is None:
            return np.minimum(positions, self.n - 1).astype(np.int32), positions < self.n
        return positions_to_indices(positions, self.n, self.seed), np.ones(len(positions), bool)


def checked(n: int, batch_size: int, seed: int | None, part: tuple[int, int]) -> Order:
    """An Order; InputError where no batch can be made or not be shared evenly."""
    if batch_size < 1:
        raise InputError(f"--batch_size={batch_size}: give at least 1")
    if n == 0:
        raise InputError("a split without examples cannot be read in batches; give it some")
    i, processes = part
    if not 0 <= i < processes:
        raise ValueError(f"part={part}: expected (i, n) with 0 <= i < n")
    if batch_size % processes:
        below = batch_size - batch_size % processes
        sizes = f"{below} or {below + processes}" if below else f"{processes}"
        raise InputError(f"--batch_size={batch_size}: {processes} processes cannot share that evenly; give {sizes}")
    return Order(n, batch_size, seed, part)


def positions_to_indices(positions: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Positions (B,) of the endless sequence -> examples (B,) int32 of n."""
    epochs, within = np.divmod(positions, n)
    out = np.empty(len(positions), np.int32)
    for epoch in np.unique(epochs):
        with _ONE_AT_A_TIME:
            order = permutation(n, seed, int(epoch))
        out[epochs == epoch] = order[within[epochs == epoch]]
    return out


_ONE_AT_A_TIME = threading.Lock()
"""Else every reading thread would draw the next epoch's permutation for itself."""


@functools.lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the examples in one epoch, (n,) int32; the same on every platform."""
    return draws.permutation("epoch", seed, epoch, n).astype(np.int32)

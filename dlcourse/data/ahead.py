"""Batches made by threads while the step before them runs.

Threads, since decoders and NumPy let go of Python's lock. They take a few rows at a time and write them straight into
the batch, so that nothing is stacked or copied afterwards, and stay a bounded number of batches ahead.
"""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import os
import weakref
from collections.abc import Iterable, Iterator

import numpy as np

from dlcourse.data.order import Order

MOST_ROWS = 16
"""In one task: enough that handing it over costs nothing, few enough that nobody waits long for a last one."""
MOST_THREADS = 32
BUFFER = 2**18
"""Bytes."""


class Ahead(Iterator[dict[str, np.ndarray]]):
    """The batches of `steps`, each made before it is asked for where there is time.

    What goes wrong in a thread is raised at the batch that it concerns. The threads end soon after the iterator is
    exhausted, has raised, or is dropped.

    Args:
      split: with `image_shape`, `dtype`, `fill` and `facts`.
      order: which example stands where.
      steps: numbers of batches; may never end.
      as_bytes: leave images in the split's dtype; else float32 in [0,1].
    """

    def __init__(self, split, order: Order, steps: Iterable[int], as_bytes: bool):
        threads = min(cores(), MOST_THREADS)
        rows = max(1, min(MOST_ROWS, order.share // (2 * threads)))
        self._split, self._order, self._steps = split, order, iter(steps)
        self._spans = [slice(low, min(low + rows, order.share)) for low in range(0, order.share, rows)]
        self._depth = max(2, -(-2 * threads // len(self._spans)))  # batches; enough tasks for every thread
        self._dtype = split.dtype if as_bytes else np.dtype(np.float32)
        self._waiting: collections.deque = collections.deque()
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, "dlcourse-data")
        self._close = weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            for step in itertools.islice(self._steps, self._depth - len(self._waiting)):
                self._begin(step)
            if not self._waiting:
                raise StopIteration
            images, tasks = self._waiting.popleft()
            parts = [task.result() for task in tasks]
            for step in itertools.islice(self._steps, 1):
                self._begin(step)
        except BaseException:
            self._steps = iter(())
            self._waiting.clear()
            self._close()
            raise
        return {"image": images, **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]}}

    def _begin(self, step: int) -> None:
        # A new array each time: JAX may go on reading one, or even keep it, after the step was started.
        images = np.empty((self._order.share, *self._split.image_shape), self._dtype)
        self._waiting.append((images, [self._pool.submit(fill, self._split, self._order, step, images, span)
                                       for span in self._spans]))


def fill(split, order: Order, step: int, images: np.ndarray, span: slice) -> dict[str, np.ndarray]:
    """Writes some rows of a batch's images and returns the same rows of all else."""
    index, mask = order.rows(step, span.start, span.stop)
    real = max(1, int(mask.sum()))  # the others repeat the last of these
    out = images[span]
    if out.dtype == split.dtype:
        split.fill(index[:real], out[:real])
    else:
        fill_float(split, index[:real], out[:real])
    out[real:] = out[real - 1]
    return {**split.facts(index), "mask": mask, "index": index}


def fill_float(split, index: np.ndarray, out: np.ndarray) -> None:
    """`split.fill` of bytes into floats in [0,1], by way of a buffer that stays in the processor's cache."""
    rows = max(1, BUFFER // out[0].size)
    buffer = np.empty((rows, *out.shape[1:]), split.dtype)
    for low in range(0, len(index), rows):
        some = out[low:low + rows]
        split.fill(index[low:low + rows], buffer[:len(some)])
        np.divide(buffer[:len(some)], np.float32(255), out=some)


def cores() -> int:
    """Processors that this process may use, which a cluster may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

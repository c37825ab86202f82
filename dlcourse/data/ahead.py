"""Batches made by threads while the step before them runs.

Threads, since decoders and NumPy let go of Python's lock. They take a few rows at a time and write them straight into
the batch, so that nothing is stacked or copied afterwards, and stay a bounded number of batches ahead.
"""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import os
import threading
import weakref
from collections.abc import Iterable, Iterator

import numpy as np

from dlcourse.data.order import Order

ROWS = 2**19
"""Bytes of stored images that a thread takes at a time: they stay in its processor's cache, and nobody waits long for
the last ones."""
MOST_THREADS = 32


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
        self._threads = min(cores(), MOST_THREADS)
        rows = max(1, min(ROWS // (int(np.prod(split.image_shape)) * split.dtype.itemsize),
                          order.share // (2 * self._threads)))
        self._split, self._order, self._steps = split, order, iter(steps)
        self._spans = [slice(low, min(low + rows, order.share)) for low in range(0, order.share, rows)]
        self._depth = max(2, -(-2 * self._threads // len(self._spans)))  # batches; enough rows for every thread
        self._dtype = split.dtype if as_bytes else np.dtype(np.float32)
        self._waiting: collections.deque = collections.deque()
        self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, "dlcourse-data")
        self._stopped = threading.Event()
        self._close = weakref.finalize(self, stop, self._stopped, self._pool)

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            for step in itertools.islice(self._steps, self._depth - len(self._waiting)):
                self._begin(step)
            if not self._waiting:
                raise StopIteration
            images, tasks = self._waiting.popleft()
            for step in itertools.islice(self._steps, 1):  # before waiting: threads shall not run out of work
                self._begin(step)
            found = sorted((part for task in tasks for part in task.result()), key=lambda part: part[0])
        except BaseException:
            self._steps = iter(())
            self._waiting.clear()
            self._close()
            raise
        parts = [part for _, part in found]
        return {"image": images, **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]}}

    def _begin(self, step: int) -> None:
        # A new array each time: JAX may go on reading one, or even keep it, after the step was started.
        images = np.empty((self._order.share, *self._split.image_shape), self._dtype)
        spans, threads = Shared(self._spans, self._stopped), min(self._threads, len(self._spans))
        self._waiting.append((images, [self._pool.submit(fill, self._split, self._order, step, images, spans)
                                       for _ in range(threads)]))


def stop(stopped: threading.Event, pool: concurrent.futures.Executor) -> None:
    """Ends a pool's threads once they have read the rows that they are at."""
    stopped.set()
    pool.shutdown(wait=False, cancel_futures=True)


class Shared(Iterator):
    """An iterator from which several threads may take until they are stopped."""

    def __init__(self, items: Iterable, stopped: threading.Event):
        self._items, self._lock, self._stopped = iter(items), threading.Lock(), stopped

    def __next__(self):
        with self._lock:
            if self._stopped.is_set():
                raise StopIteration
            return next(self._items)


def fill(split, order: Order, step: int, images: np.ndarray, spans: Iterable[slice]) -> list[tuple[int, dict]]:
    """Writes rows of a batch's images as long as there are any, and returns (first row, all else in these rows)."""
    parts, buffer = [], None
    for span in spans:
        index, mask = order.rows(step, span.start, span.stop)
        real = max(1, int(mask.sum()))  # the others repeat the last of these
        out = images[span]
        if out.dtype == split.dtype:
            split.fill(index[:real], out[:real])
        else:
            buffer = np.empty(out.shape, split.dtype) if buffer is None else buffer
            split.fill(index[:real], buffer[:real])
            np.divide(buffer[:real], np.float32(255), out=out[:real])
        out[real:] = out[real - 1]
        parts.append((span.start, {**split.facts(index), "mask": mask, "index": index}))
    return parts


def cores() -> int:
    """Processors that this process may use, which a cluster may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

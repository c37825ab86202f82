"""Batches made by threads while the step before them runs, with grain.

Threads, since decoders and NumPy let go of Python's lock. They take a few rows at a time and write them straight into
the batch, so that no image is stacked or copied afterwards, and stay a bounded number of batches ahead.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator

import numpy as np

from dlcourse.data.order import Order

ROWS = 2**20
"""Bytes of stored images that a thread takes at a time: they stay in its processor's cache, and nobody waits long for
the last ones."""
MOST_THREADS = 32


def ahead(split, order: Order, steps: range, as_bytes: bool) -> Iterator[dict[str, np.ndarray]]:
    """The batches of `steps`, each made before it is asked for where there is time.

    What goes wrong in a thread is raised at the batch that it concerns. The threads end soon after the iterator is
    exhausted, has raised, or is dropped.

    Args:
      split: with `image_shape`, `dtype`, `fill` and `facts`.
      order: which example stands where.
      steps: numbers of consecutive batches.
      as_bytes: leave images in the split's dtype; else float32 in [0,1].
    """
    import grain

    threads = min(cores(), MOST_THREADS)
    rows = max(1, min(ROWS // (int(np.prod(split.image_shape)) * split.dtype.itemsize), order.share // (2 * threads)))
    pieces = Pieces(split, order, rows, split.dtype if as_bytes else np.dtype(np.float32))
    each = -(-order.share // rows)  # pieces of a batch
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * each, 2 * threads))
    feed = grain.MapDataset.range(steps.start * each, steps.stop * each).map(pieces.make)
    with contextlib.closing(iter(feed.to_iter_dataset(options).batch(each, batch_fn=joined))) as made:
        yield from made


class Pieces:
    """Some rows of a batch's images, written where they belong, and all else that these rows have.

    The images of a batch are one array, made by the thread that comes first, and kept by those who hold pieces of it.
    It is new for every batch: JAX may go on reading one, or even keep it, after the step was started.
    """

    def __init__(self, split, order: Order, rows: int, dtype: np.dtype):
        self._split, self._order, self._rows, self._dtype = split, order, rows, dtype
        self._images: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def make(self, number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The `number`-th piece since the beginning of the run: (the batch's images, facts of the piece)."""
        share = self._order.share
        step, piece = divmod(number, -(-share // self._rows))
        with self._lock:
            images = self._images.get(step)
            if images is None:
                images = self._images[step] = np.empty((share, *self._split.image_shape), self._dtype)
        low = piece * self._rows
        index, mask = self._order.rows(step, low, min(low + self._rows, share))
        real = max(1, int(mask.sum()))  # the others repeat the last of these
        out = images[low : low + len(index)]
        stored = out if out.dtype == self._split.dtype else np.empty(out.shape, self._split.dtype)
        self._split.fill(index[:real], stored[:real])
        if stored is not out:
            np.divide(stored[:real], np.float32(255), out=out[:real])
        out[real:] = out[real - 1]
        return images, {**self._split.facts(index), "mask": mask, "index": index}


def joined(pieces) -> dict[str, np.ndarray]:
    """A batch from its pieces."""
    images, facts = pieces[0][0], [facts for _, facts in pieces]
    return {"image": images, **{name: np.concatenate([part[name] for part in facts]) for name in facts[0]}}


def cores() -> int:
    """Processors that this process may use, which a cluster may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

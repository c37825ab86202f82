"""Splits become batches. Which examples a step sees is a pure function of (seed, step).

Position p of the endless sequence that a run is fed lies in epoch p // N, and is there the (p mod N)-th of
a permutation keyed by (seed, epoch). Step s holds the positions s B .. (s+1) B - 1: batches may straddle
epochs, no example is left out or met twice in one, and to resume is to start at another step.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from dlcourse.contracts import InputError, Split
from dlcourse.data import draws
from dlcourse.data.arrays import ArraySplit

ON_DEVICE = 2**30
"""An accelerator keeps splits of up to this many bytes in its own memory."""


def train_batches(split: Split, batch_size: int, *, seed: int, start: int = 0) -> Iterator[dict[str, Any]]:
    """Batches for ever, from step `start` on.

    Args:
      split: N > 0 examples.
      batch_size: B >= 1; may exceed N.
      seed: of the permutations.
      start: the first step, as counted from the beginning of the run.

    Returns:
      An iterator of batches: `image`, `label`, `mask` (all true), `index` and the split's extras. NumPy
      arrays; images are JAX arrays where an accelerator holds the split.
    """
    check(split, batch_size)
    if getattr(split, "decodes", False):
        return decoded_train_batches(split, batch_size, seed, start)
    read = on_accelerator(split) or split.__getitem__
    return direct_train_batches(read, len(split), batch_size, seed, start)


def eval_batches(split: Split, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order; the last batch repeats its last example up to B, with `mask` false there."""
    check(split, batch_size)
    steps = range(-(-len(split) // batch_size))
    if getattr(split, "decodes", False):
        batches = decoded(split, lambda position: position, 0, len(split), batch_size)
    else:
        whole = np.arange(len(split), dtype=np.int32)
        batches = (with_index(split.__getitem__, whole[s * batch_size:(s + 1) * batch_size]) for s in steps)
    return (padded(batch, batch_size) for batch in batches)


def check(split: Split, batch_size: int) -> None:
    """Raises InputError where no batch can be made."""
    if batch_size < 1:
        raise InputError(f"--batch_size={batch_size}: give at least 1")
    if len(split) == 0:
        raise InputError("a split without examples cannot be read in batches; give it some")


def positions_to_indices(positions: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Positions (B,) of the endless sequence -> examples (B,) int32 of n."""
    epochs, within = np.divmod(positions, n)
    out = np.empty(len(positions), np.int32)
    for epoch in np.unique(epochs):
        out[epochs == epoch] = permutation(n, seed, int(epoch))[within[epochs == epoch]]
    return out


@functools.lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the examples in one epoch, (n,) int32; the same on every platform."""
    return draws.permutation("epoch", seed, epoch, n).astype(np.int32)


def with_index(read, indices: np.ndarray) -> dict[str, Any]:
    """The examples `indices` (B,) and the entries that every batch has."""
    return {**read(indices), "mask": np.ones(len(indices), bool), "index": indices}


def padded(batch: dict[str, np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
    """Fills a batch up to batch_size with its last example, masked."""
    missing = batch_size - len(batch["index"])
    if not missing:
        return batch
    batch = {name: np.concatenate([values, np.repeat(values[-1:], missing, axis=0)]) for name, values in batch.items()}
    batch["mask"][-missing:] = False
    return batch


def direct_train_batches(read, n: int, batch_size: int, seed: int, step: int) -> Iterator[dict[str, Any]]:
    """Reads in the caller's thread: for what costs less than handing it over."""
    while True:
        positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
        yield with_index(read, positions_to_indices(positions, n, seed))
        step += 1


def on_accelerator(split: Split):
    """`split.__getitem__` with images gathered from the accelerator's memory, or None where that does not fit.

    Bytes stay bytes there: a quarter of the memory, and only indices cross the bus. With several processes each
    feeds its own part of a global batch from NumPy arrays.
    """
    import jax

    small = isinstance(split, ArraySplit) and split.images.nbytes <= ON_DEVICE
    return device_reader(split) if small and jax.default_backend() != "cpu" and jax.process_count() == 1 else None


def device_reader(split: ArraySplit):
    """As `split.__getitem__`, with `image` a JAX array gathered on the default device."""
    import jax
    import jax.numpy as jnp

    held = jax.device_put(split.images)

    @jax.jit
    def gather(images, indices):
        chosen = images[indices]
        return chosen.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else chosen

    def read(indices: np.ndarray) -> dict[str, Any]:
        extras = {name: values[indices] for name, values in split.extras.items()}
        return {"image": gather(held, indices), "label": split.labels[indices], **extras}

    return read


def decoded_train_batches(split: Split, batch_size: int, seed: int, step: int) -> Iterator[dict[str, np.ndarray]]:
    """As `direct_train_batches`, decoded ahead by several threads."""
    def index_of(position: int) -> int:
        return int(positions_to_indices(np.array([position]), len(split), seed)[0])

    return decoded(split, index_of, step * batch_size, 2**62, batch_size)


def decoded(split: Split, index_of, start: int, stop: int, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the examples at `index_of(position)`, position = start .. stop - 1, through grain.

    One example is a task, so that the first batch is ready as soon as all threads together can make it and no more
    than two batches wait in memory.
    """
    import grain

    def read(position: int) -> dict[str, np.ndarray]:
        return with_index(split.__getitem__, np.array([index_of(position)], np.int32))

    def join(examples) -> dict[str, np.ndarray]:
        return {name: np.concatenate([example[name] for example in examples]) for name in examples[0]}

    options = grain.ReadOptions(num_threads=min(os.cpu_count() or 1, 32), prefetch_buffer_size=2 * batch_size)
    pipeline = grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options)
    yield from pipeline.batch(batch_size, batch_fn=join)

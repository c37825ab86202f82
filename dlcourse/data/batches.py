"""Splits become batches; `order` says which example a step sees, `ahead` makes batches while others are used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dlcourse.contracts import Batch, Split
from dlcourse.data import ahead, order
from dlcourse.data.arrays import ArraySplit

ON_DEVICE = 2**30
"""An accelerator keeps splits of up to this many bytes in its own memory."""
AHEAD = 2**22
"""Pixels in a batch from which on arrays, too, are read ahead; smaller batches cost less than handing them over."""

LAST = 2**32
"""No run makes as many steps."""


def train_batches(split: Split, batch_size: int, *, seed: int, start: int = 0, part: tuple[int, int] = (0, 1),
                  sharding=None, as_bytes: bool = False) -> Iterator[dict[str, Any]]:
    """Batches for ever, from step `start` on.

    Args:
      split: N > 0 examples.
      batch_size: B >= 1 over all processes; may exceed N.
      seed: of the permutations.
      start: the first step, as counted from the beginning of the run.
      part: (i, n): only rows i B/n .. (i+1) B/n - 1 of each batch are read and yielded.
      sharding: a NamedSharding of images, for those that an accelerator holds; None for its first device.
      as_bytes: leave images uint8 where the source stores bytes, a quarter to send to a device; the step must
        then begin with `in_unit`.

    Returns:
      An iterator of batches: `image`, `label`, `mask` (all true), `index` and the split's extras. NumPy
      arrays; images are JAX arrays where an accelerator holds the split.

    Raises:
      InputError: no batch can be made, or n does not divide B; while iterating, a damaged file.
    """
    rows = order.checked(len(split), batch_size, seed, part)
    read = on_accelerator(split, sharding)
    return made(split, rows, range(start, LAST), read, as_bytes)


def eval_batches(split: Split, batch_size: int, *, part: tuple[int, int] = (0, 1),
                 as_bytes: bool = False) -> Iterator[dict[str, np.ndarray]]:
    """Every example once over all processes, in order, as `train_batches` otherwise.

    The last batch repeats the last example up to B, with `mask` false there; every process yields as many batches.
    """
    rows = order.checked(len(split), batch_size, None, part)
    return made(split, rows, range(rows.steps), None, as_bytes)


def in_unit(batch: Batch) -> dict[str, Any]:
    """A batch with pixels in [0,1], for inside a jitted step: uint8 images by x / 255, others as they are."""
    import jax.numpy as jnp

    image = batch["image"]
    return {**batch, "image": image.astype(jnp.float32) / 255} if image.dtype == jnp.uint8 else {**batch}


def made(split: Split, rows: order.Order, steps: range, read, as_bytes: bool) -> Iterator[dict[str, Any]]:
    """The batches of `steps`, through `read` where it is given, else the way that suits the split."""
    if read is None and (getattr(split, "decodes", False) or large(split, rows.share)):
        return ahead.ahead(split, rows, steps, as_bytes)
    return direct(read or (stored(split) if as_bytes else split.__getitem__), rows, steps)


def large(split: Split, share: int) -> bool:
    """Whether a batch of these arrays takes longer to copy than to hand over."""
    return isinstance(split, ArraySplit) and share * int(np.prod(split.image_shape)) >= AHEAD


def direct(read, rows: order.Order, steps) -> Iterator[dict[str, Any]]:
    """Reads in the caller's thread: for what costs less than handing it over."""
    for step in steps:
        index, mask = rows.rows(step)
        yield {**read(index), "mask": mask, "index": index}


def stored(split: Split):
    """As `split.__getitem__`, with images as they are stored."""
    if not isinstance(split, ArraySplit):
        return split.__getitem__
    return lambda indices: {"image": split.images[indices], **split.facts(indices)}


def on_accelerator(split: Split, sharding=None):
    """`split.__getitem__` with images gathered from the accelerator's memory, or None where that does not fit.

    Bytes stay bytes there: a quarter of the memory, and only indices cross the bus. With several processes each
    feeds its own part of a global batch from NumPy arrays.
    """
    import jax

    small = isinstance(split, ArraySplit) and split.images.nbytes <= ON_DEVICE
    fits = small and jax.default_backend() != "cpu" and jax.process_count() == 1
    return device_reader(split, sharding) if fits else None


def device_reader(split: ArraySplit, sharding=None):
    """As `split.__getitem__`, with `image` a JAX array gathered where it is wanted.

    Args:
      split: its images are copied to the device, or to every device of the sharding's mesh.
      sharding: a NamedSharding of (B,H,W,C); None for the default device.
    """
    import jax
    import jax.numpy as jnp

    everywhere = sharding and jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    held = jax.device_put(split.images, everywhere)

    def gather(images, indices):
        chosen = images[indices]
        return chosen.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else chosen

    gather = jax.jit(gather, out_shardings=sharding)
    return lambda indices: {"image": gather(held, indices), **split.facts(indices)}

"""Named random streams: every consumer of randomness has a name, and a step where it repeats."""

from __future__ import annotations

import zlib

import jax


def root(seed: int) -> jax.Array:
    """The key that all streams of a run derive from."""
    return jax.random.key(seed)


def stream(key: jax.Array, name: str, step: int | jax.Array | None = None) -> jax.Array:
    """A key of its own for `name`, and for each `step` of it.

    fold_in(fold_in(key, crc32(name)), step): streams do not depend on how many others exist or
    in which order they are asked for, so that adding one changes nothing else in a run.

    Args:
      key: a typed key, from `root` or another stream.
      name: what the randomness is for, such as "augment".
      step: a counter (Python int or traced scalar) when the stream is used repeatedly.

    Returns:
      A typed key.
    """
    key = jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
    return key if step is None else jax.random.fold_in(key, step)

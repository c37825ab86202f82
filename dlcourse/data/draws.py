"""Seeded draws that are the same on every platform and under every NumPy.

NumPy may change how a `Generator` turns bits into numbers; the bits of PCG64 themselves are frozen.
Everything that decides which example goes where is therefore derived from the bits.
"""

from __future__ import annotations

import zlib

import numpy as np


def bits(name: str, seed: int, number: int, n: int) -> np.ndarray:
    """n words of 64 random bits: a stream of its own for each (name, seed, number).

    Args:
      name: what the draw is for, such as "epoch".
      seed: any integer.
      number: a counter >= 0 where the draw repeats, such as the epoch or the class.
      n: how many.

    Returns:
      (n,) uint64.
    """
    # All of one length: SeedSequence pads with zeros, so that (1,) and (1, 0) would be one stream.
    entropy = (zlib.crc32(name.encode()), seed % 2**64 // 2**32, seed % 2**32, number % 2**32, number // 2**32)
    return np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(n)


def permutation(name: str, seed: int, number: int, n: int) -> np.ndarray:
    """0..n-1 in random order, (n,) int64: the order of n random words."""
    return np.argsort(bits(name, seed, number, n), kind="stable")


def uniform(name: str, seed: int, number: int, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform numbers in [0, 1), float64: the upper 53 bits of each word."""
    return ((bits(name, seed, number, int(np.prod(shape))) >> np.uint64(11)) * 2.0**-53).reshape(shape)


def integers(name: str, seed: int, number: int, n: int, below: int) -> np.ndarray:
    """(n,) int32, uniform in 0..below-1 (below much less than 2**53, so that no value is favoured)."""
    return np.floor(uniform(name, seed, number, (n,)) * below).astype(np.int32)

"""Which examples are held out: one seeded, stratified rule for every data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dlcourse.contracts import InputError
from dlcourse.data import draws

TEST_SEED = 20170
"""Of test splits carved here. Apart from a run's seed, so that every run meets the same test set."""
TEST_FRACTION = 0.2


def stratified(labels: np.ndarray, fraction: float, seed: int, name: str, class_names: Sequence[str]):
    """Holds out the same fraction of every class.

    Of n_k examples of class k, round(fraction n_k) are held out, but at least one, and at least one is
    kept. They are the first in a permutation keyed by (name, seed, k).

    Args:
      labels: (N,) integers in 0..K-1.
      fraction: in (0, 1).
      seed: of the permutation.
      name: of the split that is held out, such as "validation".
      class_names: K names, for the error.

    Returns:
      The positions that are kept and those held out, each (·,) int64 ascending.

    Raises:
      InputError: a class has fewer than two examples.
    """
    held = np.zeros(len(labels), bool)
    for k, class_name in enumerate(class_names):
        of_class = np.flatnonzero(labels == k)
        if len(of_class) < 2:
            raise InputError(f"class {class_name!r} has {len(of_class)} training examples, too few to carve a "
                             f"{name} split from: give each class at least 3, or bring your own {name} split")
        count = min(max(1, round(fraction * len(of_class))), len(of_class) - 1)
        held[of_class[draws.permutation(name, seed, k, len(of_class))[:count]]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def complete(splits: dict[str, Any], class_names: Sequence[str], validation_fraction: float,
             seed: int) -> dict[str, Any]:
    """`train`, `validation` and `test`, each that the source lacks carved from `train`.

    Args:
      splits: has `train`; its members have `labels` and `take(positions)`.
      class_names: K names.
      validation_fraction: share of what remains of `train`, in (0, 0.5].
      seed: of the validation split alone.

    Returns:
      The three splits.
    """
    splits = dict(splits)
    for name, fraction, of_seed in (("test", TEST_FRACTION, TEST_SEED), ("validation", validation_fraction, seed)):
        if name not in splits:
            kept, held = stratified(splits["train"].labels, fraction, of_seed, name, class_names)
            splits[name], splits["train"] = splits["train"].take(held), splits["train"].take(kept)
    return {name: splits[name] for name in ("train", "validation", "test")}

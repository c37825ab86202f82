"""The few types that every room speaks, and the alphabet of dimensions.

B batch, H height, W width, C channels, K classes, D features, N examples, T episodes or time,
P parameters. Pixels are floats in [0, 1] everywhere; a model owns its normalisation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

Batch = Mapping[str, Any]
"""Arrays with a leading B: `image` (B,H,W,C) float in [0,1], `label` (B,) int32, `mask` (B,) bool,
`index` (B,) int32 (the example's position in its split). Losses also read `target` (B,K) and
`weight` (B,) where they are present, and `step` (), the updates before this one, which training adds."""

Predict = Callable[[Any], Any]
"""images (B,H,W,C) -> logits (B,K): what attacks, evaluators and explanations need, no more."""

Loss = Callable[[Any, Any, Batch, Any], tuple[Any, tuple[Any, dict[str, Any]]]]
"""(params, model_state, batch, key) -> (scalar, (model_state, metrics)). Every training idea is a loss."""

Evaluator = Callable[[Predict, "Split"], Iterator[tuple[str, Any]]]
"""(predict, split) -> (name, value) pairs, among them over how many examples they were taken."""


class Split(Protocol):
    """Random access to examples; arrays in memory, TFDS data sources and folders all satisfy it."""

    labels: np.ndarray
    """(N,) int32, known without decoding a single image."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """indices (B,) -> `image` (B,H,W,C) float32 in [0,1], `label` (B,) int32, and what else is known."""
        ...

    def take(self, positions: np.ndarray) -> Split:
        """The split of only these examples, in this order."""
        ...


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Named splits (always `train`, `validation`, `test`) and what a reader must know about them."""

    name: str
    splits: Mapping[str, Split]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    citation: str
    licence: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What was measured, and the control that could have refuted it.

    `value` and `control` share a unit; `ci95` is the 95 % interval of `value - control`
    (or of `value` where the control is exact); `n` is over how many observations.
    """

    value: float
    control: float
    threshold: float
    ci95: tuple[float, float]
    n: int


@dataclasses.dataclass(frozen=True)
class Claim:
    """One sentence of the lecture, made testable. `id` begins with its row in the lecture (`L07…`)."""

    id: str
    section: str
    statement: str
    holds: bool
    evidence: Evidence
    caveat: str


class InputError(ValueError):
    """A mistake in flags or input: one line that names what was given and a way out (exit status 2)."""

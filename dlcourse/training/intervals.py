"""95 % intervals: how far a figure might be from what it estimates."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

Z = 1.959963984540054
"""The normal distribution's 97.5 % point."""


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927): (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)."""
    z, n, p = Z, trials, successes / trials
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def paired_difference(correct: np.ndarray, control: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Difference of two accuracies on the same examples, with its 95 % interval.

    The interval is Wald's for paired proportions with Agresti & Min's (2005) half observation
    added to each of the four cells, so that it has a width even where the two never differ.

    Args:
      correct: (N,) bool.
      control: (N,) bool, on the same examples in the same order.
    """
    wins, losses = np.sum(correct & ~control) + 0.5, np.sum(~correct & control) + 0.5
    n = len(correct) + 2
    centre = (wins - losses) / n
    spread = Z * math.sqrt(wins + losses - (wins - losses) ** 2 / n) / n
    return float(correct.mean() - control.mean()), (centre - spread, centre + spread)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a mean of independent values (N,), by the normal approximation."""
    reach = Z * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - reach), float(np.mean(values) + reach)


def resampled_interval(scores, train_size: int, test_size: int) -> tuple[float, float]:
    """95 % interval of a mean over random splits: mean ± t sqrt((1/R + n_test/n_train) var).

    Source: Nadeau & Bengio 2003, eq. 9: splits of the same examples overlap, so that their results are not independent.
    """
    repeats = len(scores)
    if repeats < 2:
        return -np.inf, np.inf
    spread = np.sqrt((1 / repeats + test_size / train_size) * np.var(scores, ddof=1))
    reach = float(stats.t.ppf(0.975, repeats - 1) * spread)
    return float(np.mean(scores)) - reach, float(np.mean(scores)) + reach

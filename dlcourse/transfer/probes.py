"""Linear probes (Alain & Bengio 2017): how much of the answer a line can read off a layer.

A probe is multinomial logistic regression on features that are held fixed. Its parameters come
from a convex problem with one solution, so that two layers, or a trained and an untrained network,
differ by their features alone.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from dlcourse.contracts import Batch, InputError

L2_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""From almost none to so much that only the strongest directions count; features are standardised."""

MAX_FEATURES = 512
"""D of a map's summary, at most, so that no probe takes much longer than another."""


class Probe(NamedTuple):
    """logits = (features - mean) / scale @ weights + bias."""

    mean: jax.Array  # (D,)
    scale: jax.Array  # (D,)
    weights: jax.Array  # (D, K)
    bias: jax.Array  # (K,)


def predict_linear(probe: Probe, features: jax.Array) -> jax.Array:
    """features (N, D) -> logits (N, K)."""
    return (features - probe.mean[None]) / probe.scale[None] @ probe.weights + probe.bias[None]


@functools.partial(jax.jit, static_argnames=("num_classes", "steps"))
def fit_linear(features: jax.Array, labels: jax.Array, num_classes: int, l2: float, steps: int = 300) -> Probe:
    """The W, b that minimise mean_n cross_entropy(x_n W + b, label_n) + l2 / 2 |W|^2.

    x is standardised by the mean and deviation of these examples; a constant feature stays zero.
    This is scikit-learn's LogisticRegression(C=1 / (l2 N)), by L-BFGS from zero: no randomness, and
    `jax.vmap` fits many problems of one size at once.

    Args:
      features: (N, D).
      labels: (N,) int in [0, K).
      num_classes: K.
      l2: > 0; with zero, classes that a line can separate have no solution.
      steps: at most. It stops where the gradient g has |g| < 3e-5, when the objective is less
        than |g|^2 / (2 l2) above its minimum.

    Returns:
      The probe.
    """
    features = features.astype(jnp.float32)
    mean, deviation = features.mean(0), features.std(0)
    scale = jnp.where(deviation > 1e-6 * (1e-6 + jnp.abs(mean)), deviation, 1.0)
    x = (features - mean[None]) / scale[None]

    def loss(point):
        logits = x @ point["weights"] + point["bias"][None]
        fit = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return fit + 0.5 * l2 * jnp.square(point["weights"]).sum()

    start = {"weights": jnp.zeros((x.shape[1], num_classes)), "bias": jnp.zeros(num_classes)}
    return Probe(mean, scale, **_minimise(loss, start, steps, tolerance=3e-5))


def _minimise(loss, start, steps, tolerance):
    # Near the minimum float32 cannot see a decrease, and a longer search would only look for it.
    search = optax.scale_by_zoom_linesearch(max_linesearch_steps=6, initial_guess_strategy="one")
    optimizer = optax.lbfgs(linesearch=search)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):
        point, state, count, _ = carry
        value, gradient = value_and_grad(point, state=state)
        updates, state = optimizer.update(gradient, state, point, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(point, updates), state, count + 1, optax.tree.norm(gradient)

    def unfinished(carry):
        _, _, count, gradient = carry
        return (count < steps) & (gradient > tolerance)

    return jax.lax.while_loop(unfinished, step, (start, optimizer.init(start), 0, jnp.inf))[0]


def accuracy(probe: Probe, features: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of the N examples whose label has the largest logit."""
    return (predict_linear(probe, features).argmax(-1) == labels).mean()


def select_linear(
    train: tuple[jax.Array, jax.Array],
    validation: tuple[jax.Array, jax.Array],
    num_classes: int,
    grid: Sequence[float] = L2_GRID,
) -> tuple[Probe, float]:
    """The probe of the grid that is most accurate on the validation split, and its l2.

    Args:
      train: features (N, D) and labels (N,).
      validation: features (M, D) and labels (M,).
      num_classes: K.
      grid: values of l2; of equally accurate ones the largest is taken.

    Returns:
      (probe, l2).
    """
    probes = {l2: fit_linear(*train, num_classes, l2) for l2 in sorted(grid, reverse=True)}
    best = max(probes, key=lambda l2: float(accuracy(probes[l2], *validation)))
    return probes[best], best


def tap_features(
    model: nn.Module, variables: Any, batches: Iterable[Batch], taps: Sequence[str] | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What each tap says about each example, as a vector of moderate length.

    Maps (B, H, W, C) are averaged over a grid of at most 4 x 4 cells, fewer where the D features
    would exceed 512: coarse position is kept, as a layer's successors can use it, and no layer
    wins by its mere number of pixels. Tokens (B, T, C) are averaged. The reduction is fixed, so
    that a trained and an untrained network differ by their features alone.

    Args:
      model: a network of `dlcourse.models`.
      variables: of the model; running averages normalise.
      batches: of one split; masked examples are left out. Cap their number with
        `itertools.islice`.
      taps: names; default all but the logits, in order.

    Returns:
      {tap: (N, D) float32} and labels (N,) int32.
    """
    reduce = _reducer(model, None if taps is None else tuple(taps))
    rows, labels = [], []
    for batch in batches:
        mask = np.asarray(batch["mask"])
        rows.append({name: np.asarray(value)[mask] for name, value in reduce(variables, batch["image"]).items()})
        labels.append(np.asarray(batch["label"])[mask])
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}, np.concatenate(labels)


@functools.cache
def _reducer(model, taps):
    """Cached, so that a second network of the same kind (the untrained one) does not compile again."""

    def reduce(variables, images):
        _, values = model.apply(variables, images)
        names = [name for name in values if name != "logits"] if taps is None else taps
        if unknown := [name for name in names if name not in values]:
            raise InputError(f"no tap called {unknown[0]!r}; this network has {', '.join(values)}")
        return OrderedDict((name, summarise(values[name])) for name in names)

    return jax.jit(reduce)


def summarise(values: jax.Array) -> jax.Array:
    """(B, H, W, C), (B, T, C) or (B, D) -> (B, D) float32 with D at most 512 where C is."""
    values = values.astype(jnp.float32)
    if values.ndim == 3:
        return values.mean(1)
    if values.ndim == 2:
        return values
    cells = max(1, min(4, math.isqrt(MAX_FEATURES // values.shape[-1])))
    rows, columns = (_cells(size, min(size, cells)) for size in values.shape[1:3])
    return jnp.einsum("ih,bhwc,jw->bijc", rows, values, columns).reshape(len(values), -1)


def _cells(size, cells):
    """(cells, size): row i averages the pixels that touch the i-th of equal cells."""
    edges = np.arange(cells + 1) * size / cells
    pixels = np.arange(size)
    member = (pixels[None] + 1 > edges[:-1, None]) & (pixels[None] < edges[1:, None])
    return jnp.asarray(member / member.sum(1, keepdims=True), jnp.float32)

"""PGD on gradients estimated from the network's outputs, for networks without useful gradients: SPSA and NES."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dlcourse.adversarial import objectives
from dlcourse.adversarial import threat as threats
from dlcourse.adversarial.gradient import NORMS
from dlcourse.adversarial.threat import AttackResult, Threat, example_keys, fooled, inside, over_pixels, steepest
from dlcourse.contracts import Predict


def estimate(keys, value: Callable, images, reach, *, pairs: int, signs: bool, chunk: int = 16):
    """The mean over `pairs` draws v of (f(x + r v) - f(x - r v)) / 2r v, (B,H,W,C); unbiased where f is quadratic.

    SPSA draws signs (Spall 1992, eq. 2.2; Uesato et al. 2018, algorithm 1), NES normal numbers (Ilyas et al. 2018,
    algorithm 1). For a linear f of gradient g, pixel i has the variance (|g|^2 - g_i^2) / pairs by signs, and
    (|g|^2 + g_i^2) / pairs by normal numbers.

    Args:
      keys: (B,).
      value: f, images (B,H,W,C) -> (B,).
      images: x, (B,H,W,C).
      reach: r, in pixels' units.
      pairs: of values.
      signs: else normal.
      chunk: pairs that are evaluated together.
    """
    reach = jnp.asarray(reach, images.dtype)
    chunk = min(chunk, pairs)

    def body(carry):
        number, total = carry
        draw = jax.random.rademacher if signs else jax.random.normal
        shape = (chunk, *images.shape[1:])
        drawn = jax.vmap(lambda k: draw(jax.random.fold_in(k, number), shape, images.dtype), out_axes=1)(keys)
        step = reach.reshape((1,) * drawn.ndim) * drawn
        slope = (jax.vmap(value)(images[None] + step) - jax.vmap(value)(images[None] - step)) / (2 * reach)
        # What is not finite says nothing of where to go.
        slope = jnp.where((number * chunk + jnp.arange(chunk) < pairs)[:, None] & jnp.isfinite(slope), slope, 0.0)
        found = jnp.einsum("mb,mb...->b...", slope, drawn, precision=jax.lax.Precision.HIGHEST)
        return number + 1, total + found

    return jax.lax.while_loop(lambda c: c[0] * chunk < pairs, body, (0, jnp.zeros_like(images)))[1] / pairs


def _estimated_pgd(key, predict, images, labels, threat, targets, steps, step_size, pairs, reach, signs, objective,
                   chunk):
    objectives.check(predict, images, threat, NORMS, objective, targets)
    measure = objectives.OBJECTIVES[objective]
    keys = example_keys(key, len(images))
    size = 2.5 * jnp.asarray(threat.eps) / steps if step_size is None else jnp.asarray(step_size)

    def value(x):
        return measure(predict(x), labels, targets)

    def step(carry):
        i, x, queries, done = carry
        own = jax.vmap(lambda k: jax.random.fold_in(k, i))(keys)
        gradient = estimate(own, value, x, reach, pairs=pairs, signs=signs, chunk=chunk)
        moved = inside(x + over_pixels(size, x) * steepest(gradient, threat.norm), images, threat)
        x = jnp.where(over_pixels(done, x), x, moved)
        return i + 1, x, queries + jnp.where(done, 0, 2 * pairs + 1), done | fooled(predict(x), labels, targets)

    start = (0, images, jnp.ones(len(images), jnp.int32), fooled(predict(images), labels, targets))
    _, x, queries, _ = jax.lax.while_loop(lambda c: (c[0] < steps) & ~jnp.all(c[3]), step, start)
    return threats.result(predict, x, images, labels, threat, measure, queries, targets)


@functools.partial(jax.jit, static_argnames=("steps", "pairs", "objective", "chunk"))
def spsa(key, predict: Predict, images, labels, threat: Threat, *, targets=None, steps: int = 100,
         step_size: float | None = None, pairs: int = 128, reach: float = 0.01, objective: str = "margin",
         chunk: int = 16) -> AttackResult:
    """PGD along SPSA's estimate of the margin's gradient (Uesato et al. 2018, section 4 and algorithm 1).

    Their perturbation of 0.01 and objective; the steps are PGD's, where they take Adam's. Points beyond the box are
    asked about, as theirs are. An example that is fooled stays as it is.

    Args:
      key: (), or (B,) keys.
      predict: images -> logits.
      images: (B,H,W,C) in the box.
      labels: (B,) the truth.
      threat: of norm linf, l2 or l1.
      targets: (B,) classes to be taken for, or None.
      steps: estimates of the gradient.
      step_size: in pixels' units; default 2.5 eps / steps.
      pairs: of queries an estimate.
      reach: from the image to the points of a pair, in each pixel.
      objective: of objectives.OBJECTIVES.
      chunk: pairs that are predicted together.

    Raises:
      InputError: for a norm or an objective that it has not, or for too few classes.
    """
    return _estimated_pgd(key, predict, images, labels, threat, targets, steps, step_size, pairs, reach, True,
                          objective, chunk)


@functools.partial(jax.jit, static_argnames=("steps", "pairs", "objective", "chunk"))
def nes(key, predict: Predict, images, labels, threat: Threat, *, targets=None, steps: int = 100,
        step_size: float | None = None, pairs: int = 25, reach: float = 0.001, objective: str = "cross_entropy",
        chunk: int = 16) -> AttackResult:
    """PGD along NES's estimate of the gradient: antithetic normal draws (Ilyas et al. 2018, section 2 and table 1).

    Their 50 queries an estimate and sigma of 0.001, which is `reach`.

    Args: as of `spsa`.
    """
    return _estimated_pgd(key, predict, images, labels, threat, targets, steps, step_size, pairs, reach, False,
                          objective, chunk)

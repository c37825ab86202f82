"""Randomised smoothing (Cohen et al. 2019): the class that wins under gaussian noise, and the l2 ball where it must.

    g(x) = argmax_k P(f(x + N(0, sigma^2 I)) = k)

does not change within radius sigma Phi^-1(p) of x where its class has probability at least p > 1/2 (theorem 1). Counts
are drawn on the device, statistics on the host in float64.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from scipy import stats

from dlcourse.adversarial.threat import example_keys
from dlcourse.contracts import InputError, Predict
from dlcourse.streams import stream

ABSTAIN = -1


class Smoothed(struct.PyTreeNode):
    """What CERTIFY returns, one entry an image.

    Attributes:
      predicted: (B,) int, a class or ABSTAIN.
      radius: (B,) l2, in pixels' units; 0 where it abstains.
      probability: (B,) the lower confidence bound of the class's probability under noise.
    """

    predicted: np.ndarray
    radius: np.ndarray
    probability: np.ndarray


def counts(key, predict: Predict, images, sigma, *, samples: int, chunk: int = 100) -> jax.Array:
    """(B,K) int32: how often each class is predicted under noise (SAMPLEUNDERNOISE).

    Noisy images are not clipped. A prediction of logits that are not finite counts for no class. Call it outside of
    jit: chunks are dispatched one by one, since convolutions in a loop of XLA's are slow on a CPU.

    Args:
      key: (), or (B,) keys; what is drawn for an image depends on its own key, and on `chunk`, alone.
      predict: images -> logits, a pytree.
      images: (B,H,W,C).
      sigma: of the noise, in pixels' units.
      samples: an image.
      chunk: noisy images of each image that are classified at once.
    """
    keys, sigma = example_keys(key, len(images)), jnp.asarray(sigma, images.dtype)
    found = jnp.zeros((len(images), jax.eval_shape(predict, images).shape[-1]), jnp.int32)
    for number in range(-(-samples // chunk)):
        found += _counted(keys, predict, images, sigma, number, min(chunk, samples - number * chunk), chunk)
    return found


@functools.partial(jax.jit, static_argnames=("chunk",))
def _counted(keys, predict, images, sigma, number, wanted, chunk):
    """The counts of the first `wanted` noisy images of a chunk."""
    own = jax.vmap(lambda k: jax.random.fold_in(k, number))(keys)
    noise = jax.vmap(lambda k: jax.random.normal(k, (chunk, *images.shape[1:]), images.dtype))(own)
    logits = predict((images[:, None] + sigma * noise).reshape(-1, *images.shape[1:]))
    counted = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=jnp.int32)
    counted = jnp.where(jnp.isfinite(logits).all(-1, keepdims=True), counted, 0).reshape(len(images), chunk, -1)
    return (counted * (jnp.arange(chunk) < wanted)[None, :, None]).sum(1)


def certify(key, predict: Predict, images, sigma: float, *, selection: int = 100, samples: int = 100_000,
            alpha: float = 0.001, chunk: int = 100) -> Smoothed:
    """CERTIFY (Cohen et al. 2019, section 3.2.2): a class and a radius that are right with probability 1 - alpha.

    The most frequent of `selection` predictions is the class; `samples` further ones bound its probability from below.
    Abstains where the bound is not above 1/2.

    Args: as of `counts`, and
      selection: N0.
      samples: N.
      alpha: probability, for each image, that its certificate is wrong.

    Raises:
      InputError: sigma, alpha or the counts of samples are of no use.
    """
    _check(sigma, alpha, selection, samples)
    keys = example_keys(key, len(images))
    first, second = (jax.vmap(lambda k, n=name: stream(k, n))(keys) for name in ("selection", "estimation"))
    chosen = np.asarray(counts(first, predict, images, sigma, samples=selection, chunk=min(chunk, selection)))
    chosen = chosen.argmax(-1)
    found = np.asarray(counts(second, predict, images, sigma, samples=samples, chunk=min(chunk, samples)))
    return judge(chosen, np.take_along_axis(found, chosen[:, None], 1)[:, 0], samples, sigma, alpha)


def judge(chosen: np.ndarray, hits: np.ndarray, samples: int, sigma: float, alpha: float) -> Smoothed:
    """The certificates of classes (B,) that were predicted `hits` (B,) times: the host's part of CERTIFY."""
    probability = lower_bound(hits, samples, alpha)
    sure = probability > 0.5
    radius = np.where(sure, sigma * stats.norm.ppf(np.where(sure, probability, 0.5)), 0.0)
    return Smoothed(np.where(sure, chosen, ABSTAIN), radius, probability)


def predict_smoothed(key, predict: Predict, images, sigma: float, *, samples: int = 1000, alpha: float = 0.001,
                     chunk: int = 100) -> np.ndarray:
    """PREDICT (Cohen et al. 2019, section 3.2.1): g's class, wrong with probability at most alpha, or ABSTAIN.

    Abstains unless a two-sided binomial test rejects that the two most frequent classes are equally likely.

    Args: as of `certify`.
    """
    _check(sigma, alpha, samples)
    return decide(np.asarray(counts(key, predict, images, sigma, samples=samples, chunk=min(chunk, samples))), alpha)


def decide(found: np.ndarray, alpha: float) -> np.ndarray:
    """(B,K) counts -> (B,) classes or ABSTAIN: the host's part of PREDICT."""
    first, second = np.sort(found, axis=-1)[:, :-3:-1].T
    p = np.minimum(1.0, 2 * stats.binom.cdf(second, first + second, 0.5))
    return np.where(p <= alpha, found.argmax(-1), ABSTAIN)


def lower_bound(hits, trials, alpha: float) -> np.ndarray:
    """The one-sided (1 - alpha) bound of a probability (Clopper & Pearson 1934): p with P(X >= hits | p) = alpha."""
    hits, trials = np.asarray(hits, np.float64), np.asarray(trials, np.float64)
    return np.where(hits > 0, stats.beta.ppf(alpha, np.maximum(hits, 1), trials - np.maximum(hits, 1) + 1), 0.0)


def radii(found: Smoothed, labels) -> np.ndarray:
    """(B,) the certified radius where the class is right, 0 elsewhere."""
    return np.where(found.predicted == np.asarray(labels), found.radius, 0.0)


def average_radius(found: Smoothed, labels) -> float:
    """ACR: the mean certified radius, wrong and abstaining images counting 0 (Zhai et al. 2020, section 3)."""
    return float(radii(found, labels).mean())


def certified_accuracy(found: Smoothed, labels, at) -> np.ndarray:
    """(R,): the share of images that are right and whose radius is at least each of `at` (R,), in pixels' units."""
    right = found.predicted == np.asarray(labels)
    return np.array([(right & (found.radius >= radius)).mean() for radius in np.asarray(at)])


def _check(sigma, alpha, *samples):
    if not sigma > 0:
        raise InputError(f"sigma={sigma:g}: noise must be greater than 0, in pixels' units such as 0.25")
    if not 0 < alpha < 1:
        raise InputError(f"alpha={alpha:g}: the probability of being wrong is between 0 and 1, such as 0.001")
    if min(samples) < 1:
        raise InputError(f"samples={min(samples)}: at least 1 is needed")

"""Images of nothing that a network is sure of (Nguyen et al. 2015): three ways to make them, and what to compare with.

`evolved` draws them by evolution, as CPPNs or pixel by pixel; `ascended` climbs the gradient, with regularisers or
without. All classes at once. Every image is one of 8 bits, and is judged as such.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dlcourse.adversarial.blurs import gaussian
from dlcourse.adversarial.cppn import CPPN, polynomial_mutation
from dlcourse.adversarial.map_elites import as_bytes, evolve
from dlcourse.contracts import InputError, Predict
from dlcourse.streams import stream

CONFIDENCE = 0.996
"""What Nguyen et al. 2015 report."""

AIM = 0.9962
"""Where a search stops: a little above, since in a batch of another size the network's sums round otherwise."""


class Fooled(struct.PyTreeNode):
    """An image for every class.

    Attributes:
      images: (K,H,W,C), multiples of 1/255.
      confidence: (K,) that the network has in its class, re-predicted on these images.
      history: (T,K) the best confidences so far, over generations or steps.
      queries: () images that the network was shown.
    """

    images: np.ndarray
    confidence: np.ndarray
    history: np.ndarray
    queries: int


@dataclasses.dataclass(frozen=True)
class Direct:
    """The direct encoding: a genome is the image, its pixels drawn from U(0, 1) (Nguyen et al. 2015, section 2.2).

    Attributes:
      shape: (H,W,C).
      rate: of the pixels that mutate.
      halved_every: generations after which the rate is halved.
      strength: eta of polynomial mutation.
      patience: 0, since a line of pixels goes on getting better.
    """

    shape: tuple[int, int, int]
    rate: float = 0.1
    halved_every: int = 1000
    strength: float = 15.0
    patience: int = 0

    def draw(self, key: jax.Array) -> jax.Array:
        return jax.random.uniform(key, self.shape)

    def mutate(self, key: jax.Array, genome: jax.Array, generation) -> jax.Array:
        which, change = jax.random.split(key)
        rate = self.rate * 0.5 ** (generation // self.halved_every)
        return jnp.where(jax.random.bernoulli(which, rate, self.shape),
                         polynomial_mutation(change, genome, self.strength, 0.0, 1.0), genome)

    def render(self, genome: jax.Array) -> jax.Array:
        return genome


ENCODINGS = {"cppn": CPPN, "direct": Direct}


def evolved(key: jax.Array, predict: Predict, shape: tuple[int, int, int], classes: int, encoding: str = "cppn", *,
            population: int = 50, generations: int = 5000, target: float = AIM) -> Fooled:
    """Fooling images by MAP-Elites, one cell a class (Nguyen et al. 2015, section 2).

    Args:
      key: a stream.
      predict: images -> logits (B,K'), a pytree; K' >= K.
      shape: (H,W,C).
      classes: K, the first of the network's.
      encoding: "cppn" or "direct".
      population: children a generation; with fewer than the 200 of Nguyen et al., as many images make more
        generations.
      generations: at most.
      target: confidence at which the search stops; 1 makes all generations.

    Raises:
      InputError: another encoding.
    """
    if encoding not in ENCODINGS:
        raise InputError(f"encoding {encoding!r}: there is {', '.join(ENCODINGS)}")
    archive, history = evolve(key, predict, ENCODINGS[encoding](tuple(shape)), classes, population=population,
                              generations=generations, confidence=target)
    return Fooled(np.asarray(archive.images), confidences(predict, archive.images), history, int(archive.queries))


@dataclasses.dataclass(frozen=True)
class Regularisers:
    """What keeps images of gradient ascent smooth; all zero for none.

    Attributes:
      l2: weight of the mean square distance from grey (Simonyan et al. 2014, eq. 1).
      tv: weight of the mean square difference of neighbouring pixels (Mahendran & Vedaldi 2015, eq. 3, beta 2).
      blur: sigma, in pixels, of the blur after every fourth step (Yosinski et al. 2015, section 3).
      jitter: pixels, at most, by which the image is shifted before each gradient (Mordvintsev et al. 2015).
    """

    l2: float = 0.02
    tv: float = 0.1
    blur: float = 0.3
    jitter: int = 1


PLAIN = Regularisers(0.0, 0.0, 0.0, 0)


def ascended(key: jax.Array, predict: Predict, shape: tuple[int, int, int], classes: int, *,
             regularisers: Regularisers = PLAIN, steps: int = 500, step_size: float = 0.02,
             target: float = AIM) -> Fooled:
    """Fooling images by gradient ascent: x <- x + step_size g / rms(g), g the gradient of log p_k less regularisers.

    Starts from grey with a little noise, and ends when every class has reached the target; of all steps the surest
    image is kept.

    Args: as of `evolved`, and
      regularisers: what is subtracted from log p_k, and what is done to the image between steps.
      steps: at most.
      step_size: root mean square change of a pixel in a step.
    """
    labels = jnp.arange(classes)
    keys = jax.vmap(lambda k: jax.random.fold_in(stream(key, "start"), k))(labels)
    x = 0.5 + 0.02 * jax.vmap(lambda k: jax.random.normal(k, shape))(keys)
    best, log_p = x, jnp.full(classes, -jnp.inf)
    weights = tuple(map(jnp.float32, (regularisers.l2, regularisers.tv, regularisers.blur, step_size)))
    history = []
    for number in range(steps + 1):
        best, log_p = _better(predict, x, best, log_p)
        history.append(np.exp(log_p))
        if number == steps or (history[-1] >= target).all():
            break
        x = _climb(stream(key, "jitter", number), predict, x, jnp.int32(number), weights, regularisers.jitter)
    return Fooled(np.asarray(as_bytes(best)), confidences(predict, as_bytes(best)), np.stack(history),
                  classes * (2 * len(history) - 1))


@jax.jit
def _better(predict, x, best, log_p):
    now = jnp.diagonal(jax.nn.log_softmax(predict(as_bytes(x))))
    better = now > log_p  # never of a number that is none
    return jnp.where(better[:, None, None, None], x, best), jnp.where(better, now, log_p)


@functools.partial(jax.jit, static_argnames="jitter")
def _climb(key, predict, x, number, weights, jitter):
    l2, tv, blur, step_size = weights

    def objective(x):
        log_p = jnp.diagonal(jax.nn.log_softmax(predict(x)))
        rough = jnp.square(jnp.diff(x, axis=1)).mean((1, 2, 3)) + jnp.square(jnp.diff(x, axis=2)).mean((1, 2, 3))
        return (log_p - l2 * jnp.square(x - 0.5).mean((1, 2, 3)) - tv * rough).sum()

    shift = jax.random.randint(key, (2,), -jitter, jitter + 1)
    gradient = jnp.roll(jax.grad(objective)(jnp.roll(x, shift, (1, 2))), -shift, (1, 2))
    length = jnp.sqrt(jnp.square(gradient).mean((1, 2, 3), keepdims=True))
    x = jnp.clip(x + step_size * gradient / jnp.maximum(length, 1e-20), 0.0, 1.0)
    smooth = jax.vmap(lambda image: gaussian(image, blur, 8))(x)
    return jnp.where((blur > 0) & (number % 4 == 3), smooth, x)


def confidences(predict: Predict, images: jax.Array) -> np.ndarray:
    """(K,H,W,C), the k-th image for class k -> (K,) the probability of its class; 0 where that is no number."""
    p = np.asarray(jax.nn.softmax(predict(jnp.asarray(images))))
    return np.nan_to_num(p[np.arange(len(images)), np.arange(len(images))], nan=0.0)


RANDOM = ("uniform noise", "gaussian noise", "shuffled pixels")


def random_images(key: jax.Array, images: jax.Array, kind: str) -> jax.Array:
    """The control: images of 8 bits without a search, one for each of the real ones.

    Args:
      key: a stream.
      images: (B,H,W,C) real ones.
      kind: of RANDOM: pixels from U(0, 1); from a normal distribution of the real pixels' mean and deviation; or each
        real image with its pixels in another order.
    """
    if kind == "uniform noise":
        return as_bytes(jax.random.uniform(key, images.shape))
    if kind == "gaussian noise":
        drawn = images.mean() + images.std() * jax.random.normal(key, images.shape)
        return as_bytes(jnp.clip(drawn, 0.0, 1.0))
    keys = jax.random.split(key, len(images))
    flat = jax.vmap(jax.random.permutation)(keys, images.reshape(len(images), -1, images.shape[-1]))
    return as_bytes(flat.reshape(images.shape))

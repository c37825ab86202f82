"""MAP-Elites with a cell for every class (Mouret & Clune 2015; Nguyen et al. 2015, section 2).

The archive holds, for every class at once, the image that the network was ever surest of. Each generation draws
parents among the elites, whatever their class, mutates them, and lets each child into every cell where it is better.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dlcourse.contracts import Predict
from dlcourse.streams import stream


class Encoding(Protocol):
    """How a genome becomes an image. Hashable: equal encodings share one compiled program.

    Attributes:
      patience: generations after which another line of elites begins; 0 for never.
    """

    patience: int

    def draw(self, key: jax.Array) -> Any:
        """A random genome."""

    def mutate(self, key: jax.Array, genome: Any, generation: jax.Array) -> Any:
        """A child of the genome in this generation."""

    def render(self, genome: Any) -> jax.Array:
        """The genome's image, (H,W,C) in [0,1]."""


class Archive(struct.PyTreeNode):
    """The elites, one a class.

    Attributes:
      genomes: of the encoding, each leaf with a leading K.
      images: (K,H,W,C), of 8 bits a channel: multiples of 1/255.
      log_p: (K,) log probability of its class, in nats.
      generation: () int32, generations made so far.
      queries: () int32, images that the network was shown so far.
    """

    genomes: Any
    images: jax.Array
    log_p: jax.Array
    generation: jax.Array
    queries: jax.Array


def as_bytes(images: jax.Array) -> jax.Array:
    """The nearest images of 8 bits a channel, k / 255: what can be stored and shown."""
    return jnp.round(images * 255) / 255


@functools.partial(jax.jit, static_argnames=("encoding", "classes", "population"))
def begin(key: jax.Array, predict: Predict, encoding: Encoding, classes: int, population: int = 1000) -> Archive:
    """The archive of the best, for each class, of a random population.

    Args:
      key: a stream; the same as of the generations that follow.
      predict: images -> logits (B,K'), a pytree such as `evaluation.predictor` returns; K' >= K.
      encoding: of the images.
      classes: K; of further logits nothing is evolved.
      population: genomes.
    """
    genomes = jax.vmap(encoding.draw)(jax.random.split(stream(key, "draw"), population))
    images, log_p = _judged(predict, encoding, genomes, classes)
    best = log_p.argmax(0)
    return Archive(jax.tree.map(lambda leaf: leaf[best], genomes), images[best], log_p.max(0), jnp.int32(0),
                   jnp.int32(population))


@functools.partial(jax.jit, static_argnames=("encoding", "population"))
def generation(key: jax.Array, predict: Predict, archive: Archive, encoding: Encoding, wanted: jax.Array,
               population: int = 50) -> Archive:
    """The archive after `population` children were tried.

    An elite gives way to a child of higher probability, so that none ever gets worse, and to one of the same: genes
    that the image does not show drift until a mutation makes use of them (Vassilev & Miller 2000).

    Args: as of `begin`, and
      archive: of the generation before.
      wanted: (K,) bool; half of the parents are drawn from all elites, half from these, if there are any.
      population: children.
    """
    key = stream(key, "generation", archive.generation)
    parents, classes = _parents(stream(key, "parents"), wanted, population), len(archive.log_p)
    children = jax.vmap(encoding.mutate, (0, 0, None))(
        jax.random.split(stream(key, "mutate"), population),
        jax.tree.map(lambda leaf: leaf[parents], archive.genomes), archive.generation)
    images, log_p = _judged(predict, encoding, children, classes)
    best, better = log_p.argmax(0), log_p.max(0) >= archive.log_p

    def replaced(new, old):
        return jnp.where(better.reshape(-1, *[1] * (old.ndim - 1)), new[best], old)

    return Archive(jax.tree.map(replaced, children, archive.genomes), replaced(images, archive.images),
                   jnp.where(better, log_p.max(0), archive.log_p), archive.generation + 1,
                   archive.queries + population)


@jax.jit
def merged(one: Archive, other: Archive) -> Archive:
    """Of two archives, for every class the surer elite, where equal the other's; generations and queries the other's.

    Args:
      one, other: of the same encoding and classes.
    """
    better = other.log_p >= one.log_p
    best = jax.tree.map(lambda a, b: jnp.where(better.reshape(-1, *[1] * (a.ndim - 1)), b, a),
                        (one.genomes, one.images, one.log_p), (other.genomes, other.images, other.log_p))
    return Archive(*best, other.generation, other.queries)


def _parents(key, wanted, population):
    """Positions (population,) among the elites: the first half of all, the rest of those wanted, if any are."""
    weight = jnp.where(wanted.any(), wanted, True).astype(jnp.float32)
    everywhere = jax.random.randint(stream(key, "all"), (population,), 0, len(wanted))
    there = jax.random.categorical(stream(key, "wanted"), jnp.log(weight), shape=(population,))
    return jnp.where(jnp.arange(population) < population // 2, everywhere, there)


def _judged(predict, encoding, genomes, classes):
    """Images (B,H,W,C) of 8 bits and their log probabilities (B,K); those that are not finite never win."""
    images = as_bytes(jax.vmap(encoding.render)(genomes))
    log_p = jax.nn.log_softmax(predict(images))[:, :classes]
    return images, jnp.where(jnp.isfinite(log_p), log_p, -jnp.inf)


def evolve(key: jax.Array, predict: Predict, encoding: Encoding, classes: int, *, population: int = 50,
           founders: int = 1000, generations: int = 5000, confidence: float = 0.9962,
           every: int = 10) -> tuple[Archive, np.ndarray]:
    """Generations until the network is `confidence` sure of every class's image, or for so many.

    A line of elites may end where no child of theirs is better. Every `encoding.patience` generations another line
    begins from other founders, and each class keeps the surest elite of all lines.

    One compiled program a generation rather than a loop in one, since convolutions are some 20 times slower in loops
    of XLA's on a CPU.

    Args: as of `begin`, and
      population: children a generation.
      founders: random genomes that a line begins with.
      generations: at most, of all lines together.
      confidence: in (0, 1]; 1 makes all generations.
      every: generations from one look to the next.

    Returns:
      The archive, and the confidences (T,K) at the start and at every look.
    """
    line = kept = begin(key, predict, encoding, classes, founders)
    history, began = [np.exp(kept.log_p)], 0
    while (made := int(kept.generation)) < generations and not (confidence < 1 and (history[-1] >= confidence).all()):
        if encoding.patience and made - began >= encoding.patience:
            fresh, began = begin(stream(key, "line", made), predict, encoding, classes, founders), made
            line = fresh.replace(generation=line.generation, queries=line.queries + founders)
        wanted = history[-1] < confidence
        for _ in range(min(every, generations - made)):
            line = generation(key, predict, line, encoding, wanted, population)
        kept = merged(kept, line)
        history.append(np.exp(kept.log_p))
    return kept, np.stack(history)

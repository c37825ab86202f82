"""Images as functions of position: compositional pattern-producing networks (Stanley 2007) as arrays.

Nguyen et al. 2015 grow such networks with NEAT. Here each has the same nodes, in one order, and connections between
them that mutation opens and closes, so that one program draws and mutates a whole population.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

ACTIVATIONS = ("sine", "sigmoid", "gauss", "linear")
INPUTS = ("x", "y", "r", "bias")
REACH = 3.0
"""Weights lie in [-REACH, REACH]."""


class Genome(struct.PyTreeNode):
    """A network of N nodes; node n reads the inputs and the nodes before it, and the last C nodes are the channels.

    Attributes:
      weights: (N, 4 + N) in [-REACH, REACH].
      open: (N, 4 + N) bool, the connections in use.
      kinds: (N,) int32, positions in ACTIVATIONS.
    """

    weights: jax.Array
    open: jax.Array
    kinds: jax.Array


@dataclasses.dataclass(frozen=True)
class CPPN:
    """The indirect encoding: an Encoding of `map_elites`, whose genomes are networks.

    Attributes:
      shape: (H,W,C).
      nodes: N, the C outputs among them.
      sparse: share of connections that are open at the start.
      weight_rate, connection_rate, kind_rate: share of the weights, connections and activations that mutate, at most:
        each child's are these times .05^u, u uniform, so that there are always some that differ little.
      strength: eta of polynomial mutation.
      patience: generations after which another line begins: what a few nodes draw is soon as good as it will get.
    """

    shape: tuple[int, int, int]
    nodes: int = 20
    sparse: float = 0.25
    weight_rate: float = 0.2
    connection_rate: float = 0.05
    kind_rate: float = 0.05
    strength: float = 15.0
    patience: int = 800

    def draw(self, key: jax.Array) -> Genome:
        """A random genome."""
        weights, opened, kinds = jax.random.split(key, 3)
        size = (self.nodes, len(INPUTS) + self.nodes)
        return Genome(jax.random.uniform(weights, size, minval=-REACH, maxval=REACH),
                      jax.random.bernoulli(opened, self.sparse, size),
                      jax.random.randint(kinds, (self.nodes,), 0, len(ACTIVATIONS)))

    def mutate(self, key: jax.Array, genome: Genome, generation) -> Genome:
        """A child; the rates stay the same over the generations."""
        how_much, which, change, toggle, rekind, kinds = jax.random.split(key, 6)
        much = 0.05 ** jax.random.uniform(how_much)
        weights = jnp.where(jax.random.bernoulli(which, much * self.weight_rate, genome.weights.shape),
                            polynomial_mutation(change, genome.weights, self.strength, -REACH, REACH), genome.weights)
        opened = genome.open ^ jax.random.bernoulli(toggle, much * self.connection_rate, genome.open.shape)
        fresh = jax.random.randint(kinds, genome.kinds.shape, 0, len(ACTIVATIONS))
        return Genome(weights, opened,
                      jnp.where(jax.random.bernoulli(rekind, much * self.kind_rate, fresh.shape), fresh, genome.kinds))

    def render(self, genome: Genome) -> jax.Array:
        """The image (H,W,C): each output node's value at every pixel, [-1, 1] becoming [0, 1], the rest cut off."""
        height, width, channels = self.shape
        values = jnp.asarray(coordinates(height, width))
        for node in range(self.nodes):
            reads = genome.weights[node, :len(values)] * genome.open[node, :len(values)]
            # A sum, not a product of matrices, which accelerators would round.
            values = jnp.concatenate([values, activate((values * reads[:, None]).sum(0), genome.kinds[node])[None]])
        return jnp.clip((values[-channels:].T + 1) / 2, 0.0, 1.0).reshape(self.shape)


def coordinates(height: int, width: int) -> np.ndarray:
    """(4, H W) float32: x and y from -1 to 1, sqrt(2) times the distance from the centre, and 1."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, side) for side in (height, width)), indexing="ij")
    return np.stack([x, y, np.sqrt(2 * (x**2 + y**2)), np.ones_like(x)]).reshape(4, -1).astype(np.float32)


def activate(v: jax.Array, kind: jax.Array) -> jax.Array:
    """sin v, 2 / (1 + exp(-4.9 v)) - 1 (Stanley & Miikkulainen 2002's slope), 2 exp(-v^2) - 1, or v."""
    return jnp.select([kind == i for i in range(3)],
                      [jnp.sin(v), 2 * jax.nn.sigmoid(4.9 * v) - 1, 2 * jnp.exp(-jnp.square(v)) - 1], v)


def polynomial_mutation(key: jax.Array, values: jax.Array, strength: float, low: float, high: float) -> jax.Array:
    """clip(v + d (high - low)), d = (2u)^(1/(eta+1)) - 1 for u < 1/2, else 1 - (2 - 2u)^(1/(eta+1)), u uniform.

    Source: Deb 2001, section 4.5.2; eta is the strength, larger for smaller changes.
    """
    u = jax.random.uniform(key, values.shape, values.dtype)
    power = 1 / (strength + 1)
    change = jnp.where(u < 0.5, (2 * u) ** power - 1, 1 - (2 * (1 - u)) ** power)
    return jnp.clip(values + change * (high - low), low, high)

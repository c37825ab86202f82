"""Attacking networks that draw: the expectation over their draws (EoT; Athalye et al. 2018a, section 2.1)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from dlcourse.adversarial import gradient


class Expectation(struct.PyTreeNode):
    """A Predict made of a network that draws: images -> the mean of its logits over `samples` draws.

    What is drawn is a function of the key, the image and the sample's number. So an image that moved meets fresh
    draws, as it would outside of an attack; the same image is judged the same twice; and no example's draws depend
    on its neighbours. To judge what an attack has found, take another key: the attack chose among its own draws.
    One query of it is `samples` forward passes. FGSM, PGD, APGD, FAB, DDN and FMN follow the mean of the gradients;
    attacks with losses of their own follow the gradient of the mean logits.

    Attributes:
      network: (key, images (B,H,W,C)) -> logits (B,K); a pytree such as jax.tree_util.Partial.
      key: () of all draws.
      samples: draws to average over; 20 in AutoAttack's `rand` (Croce & Hein 2020, appendix).
    """

    network: Callable
    key: jax.Array
    samples: int = struct.field(pytree_node=False, default=20)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self._mean(lambda keys: self._draw(keys, images), images)

    def ascend(self, images, labels, targets, objective):
        """What `gradient.ascend` returns, each a mean over the draws: grad E[L(f(x))], not grad L(E[f(x)])."""
        return self._mean(
            lambda keys: gradient.ascend(lambda x: self._draw(keys, x), images, labels, targets, objective), images)

    def _draw(self, keys, images):
        return jax.vmap(lambda key, image: self.network(key, image[None])[0])(keys, images)

    def _mean(self, of, images):
        keys = jax.vmap(lambda image: jax.random.fold_in(self.key, _fingerprint(image)))(images)

        def add(total, number):
            found = of(jax.vmap(lambda key: jax.random.fold_in(key, number))(keys))
            return jax.tree.map(jnp.add, total, found), None

        shapes = jax.eval_shape(of, keys)
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(add, zero, jnp.arange(self.samples))
        return jax.tree.map(lambda leaf: leaf / self.samples, total)


def _fingerprint(image):
    """A number of an image's bits, other for an image that differs in any pixel (but for one case in 2^32)."""
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(image), jnp.uint32).ravel()
    odd = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
    mixed = (bits ^ (bits >> 15)) * (odd * jnp.uint32(2654435761))
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)

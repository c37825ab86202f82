"""Attacks on whole splits: batch by batch, with keys that belong to examples."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dlcourse.adversarial.threat import AttackResult, Threat, checked
from dlcourse.contracts import Predict
from dlcourse.streams import stream


def attacked(attack: Callable[..., AttackResult], key: jax.Array, predict: Predict, images, labels, threat: Threat, *,
             targets=None, batch_size: int = 250) -> AttackResult:
    """An attack's result on N images, as NumPy arrays.

    The last batch repeats its last image, so that one size is compiled; image i has the key fold_in(key, i), whatever
    the batches.

    Args:
      attack: under the Attack contract.
      key: of all.
      predict: a pytree.
      images: (N,H,W,C) in the box.
      labels: (N,).
      threat: its eps scalar or (N,).
      targets: (N,) or None.
      batch_size: at most.

    Raises:
      InputError: for what `threat.checked` refuses.
    """
    checked(threat, images, labels, targets=targets)
    images, labels, n = jnp.asarray(images), jnp.asarray(labels), len(images)
    size = min(batch_size, n)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))
    eps, parts = jnp.broadcast_to(jnp.asarray(threat.eps, jnp.float32), (n,)), []
    for low in range(0, n, size):
        rows = np.minimum(np.arange(low, low + size), n - 1)
        wanted = None if targets is None else jnp.asarray(targets)[rows]
        found = attack(keys[rows], predict, images[rows], labels[rows],
                       threat.replace(eps=eps[rows]), targets=wanted)
        real = slice(min(size, n - low))
        parts.append(jax.tree.map(lambda leaf, real=real: np.asarray(leaf)[real], found))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def named(seed_key: jax.Array, name: str) -> jax.Array:
    """The key of an attack in an evaluation: its own, whichever others run."""
    return stream(seed_key, f"attack/{name}")

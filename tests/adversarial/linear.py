"""A linear classifier, of which everything is known: the smallest change that fools it, in every norm."""

import jax
import jax.numpy as jnp
import numpy as np

SHAPE, CLASSES = (4, 5, 2), 3


@jax.jit
def _logits(weights, images):
    kernel, bias = weights
    return images.reshape(len(images), -1) @ kernel + bias[None]


def network(seed: int = 0):
    """(predict, kernel (D,K), bias (K,)); weights so small that the box is never reached."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(int(np.prod(SHAPE)), CLASSES)).astype(np.float32)
    bias = -kernel.sum(0) / 2  # grey images are undecided
    return jax.tree_util.Partial(_logits, (jnp.asarray(kernel), jnp.asarray(bias))), kernel, bias


def examples(count: int = 40, seed: int = 1, spread: float = 0.05):
    """Images near middle grey, and the classes that the network gives them."""
    images = 0.5 + spread * np.random.default_rng(seed).uniform(-1, 1, (count, *SHAPE)).astype(np.float32)
    predict, *_ = network()
    return jnp.asarray(images), predict(jnp.asarray(images)).argmax(-1)


def smallest(images, labels, norm: str, targets=None) -> np.ndarray:
    """(B,) the least change to another class, min_k margin_k / |w_k - w_y|_dual; for targets a lower bound."""
    _, kernel, bias = network()
    flat = np.asarray(images, np.float64).reshape(len(images), -1)
    logits, dual = flat @ kernel + bias, {"linf": 1, "l2": 2, "l1": np.inf}[norm]

    def distance(i, worse, better):
        return (logits[i, worse] - logits[i, better]) / np.linalg.norm(kernel[:, worse] - kernel[:, better], dual)

    def of(i, label):
        if targets is None:
            return min(distance(i, label, k) for k in range(CLASSES) if k != label)
        return max(distance(i, k, int(targets[i])) for k in range(CLASSES) if k != targets[i])

    return np.array([of(i, label) for i, label in enumerate(np.asarray(labels))])

"""Networks and images that attacks are tried on."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

GOLDEN = pathlib.Path(__file__).with_name("golden")
_spec = importlib.util.spec_from_file_location("make_fab_square", GOLDEN / "make_fab_square.py")
maker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(maker)
golden = np.load(GOLDEN / "fab_square.npz")


def _patches(patch, patch_bias, dense, dense_bias, images):
    """A convolution with stride 2 of filters on 2 x 2 pixels, as a product: convolutions are slow in loops."""
    patches = images.reshape(len(images), 5, 2, 5, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(len(images), 5, 5, 12)
    x = jax.nn.relu(patches @ patch + patch_bias[None, None, None])
    return x.reshape(len(x), -1) @ dense + dense_bias[None]


def network(scale=1.0):
    """The network of the golden results."""
    weights = [jnp.asarray(golden[name]) * scale for name in ("patch", "patch_bias", "dense", "dense_bias")]
    return jax.tree_util.Partial(_patches, *weights)


def digits(count, first=1300):
    images, labels = maker.digits(first, count)
    return jnp.asarray(images), jnp.asarray(labels)


def _linear(weights, bias, images):
    return images.reshape(len(images), -1) @ weights + bias[None]


def linear(key, classes, features):
    weights, bias = jax.random.split(key)
    return jax.tree_util.Partial(_linear, jax.random.normal(weights, (features, classes)),
                                 0.1 * jax.random.normal(bias, (classes,)))


def smallest_change(predict, images, norm):
    """min_k (z_y - z_k) / |w_y - w_k|_dual of a linear network, by the definition of the dual norm; without the box."""
    weights = np.asarray(predict.args[0], np.float64)
    logits = np.asarray(predict(images), np.float64)
    found = []
    for row in logits:
        y = row.argmax()
        found.append(min((row[y] - row[k]) / np.linalg.norm(weights[:, y] - weights[:, k],
                                                            {"linf": 1, "l2": 2, "l1": np.inf}[norm])
                         for k in range(len(row)) if k != y))
    return np.array(found)


def silent(images):
    """A network whose logits are not finite."""
    return jnp.full((len(images), 3), jnp.nan) * images.sum((1, 2, 3))[:, None]

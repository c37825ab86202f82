"""What attacks maximise: (logits (B,K), labels (B,), targets (B,) or None) -> (B,), larger where the attack is closer.

With targets each is the objective of being taken for the target; without, of being taken for anything but the label.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dlcourse.contracts import InputError


def cross_entropy(logits, labels, targets=None):
    """-log p(label), or log p(target)."""
    log_p = jax.nn.log_softmax(logits)
    return -picked(log_p, labels) if targets is None else picked(log_p, targets)


def margin(logits, labels, targets=None):
    """max_{k != label} z_k - z_label (Carlini & Wagner 2017, f6 negated), or z_target - max_{k != target} z_k."""
    if targets is None:
        return others(logits, labels).max(-1) - picked(logits, labels)
    return picked(logits, targets) - others(logits, targets).max(-1)


def dlr(logits, labels, targets=None):
    """The difference of logits ratio, which does not change when logits are scaled or shifted.

    Untargeted -(z_y - max_{k != y} z_k) / (z_(1) - z_(3)) with z_(1) >= z_(2) >= ... (Croce & Hein 2020, eq. 6);
    targeted -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2) (eq. 7). Needs K >= 3, targeted K >= 4.
    """
    ordered = jnp.sort(logits, axis=-1)
    if targets is None:
        best_is_label = (ordered[:, -1] == picked(logits, labels)).astype(logits.dtype)
        best_other = ordered[:, -2] * best_is_label + ordered[:, -1] * (1 - best_is_label)
        return -(picked(logits, labels) - best_other) / (ordered[:, -1] - ordered[:, -3] + 1e-12)
    spread = ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4]) + 1e-12
    return -(picked(logits, labels) - picked(logits, targets)) / spread


def picked(values, classes):
    """(B,K), (B,) -> (B,)."""
    return jnp.take_along_axis(values, classes[:, None], 1)[:, 0]


def others(logits, classes):
    """Logits (B,K) with those of `classes` (B,) at minus infinity."""
    return jnp.where(jax.nn.one_hot(classes, logits.shape[-1], dtype=bool), -jnp.inf, logits)


OBJECTIVES = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}
LEAST_CLASSES = {"cross_entropy": 2, "margin": 2, "dlr": 3}


def check(predict, images, threat, norms, objective: str, targets=None) -> int:
    """The number of classes K of a network that an attack may climb on.

    Looks at what is known while tracing alone.

    Raises:
      InputError: a norm that the attack has not, an unknown objective, or too few classes for it.
    """
    if threat.norm not in norms:
        raise InputError(f"norm {threat.norm!r}: this attack has {', '.join(norms)}")
    if objective not in OBJECTIVES:
        raise InputError(f"objective {objective!r}: there are {', '.join(OBJECTIVES)}")
    classes = jax.eval_shape(predict, images).shape[-1]
    least = LEAST_CLASSES[objective] + (objective == "dlr" and targets is not None)
    if classes < least:
        raise InputError(f"{classes} classes: {objective}{' with targets' * (targets is not None)} needs at least "
                         f"{least}; take cross_entropy")
    return classes

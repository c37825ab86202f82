"""Losses whose minimum is a network with certificates: (params, model_state, batch, key) -> (scalar, ...).

Where eps or a weight is to change while training, give a function of the number of earlier updates.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dlcourse.adversarial import bounds, objectives
from dlcourse.adversarial.defences import hard_labels
from dlcourse.adversarial.threat import Threat
from dlcourse.contracts import InputError, Loss
from dlcourse.training.evaluation import predictor
from dlcourse.training.losses import cross_entropy, weighted_mean

Schedule = float | Callable[[jax.Array], jax.Array]
"""A number, or a function of the updates before this one, such as `optax.linear_schedule`."""
WARM_UP = 0.05
"""Share of training before eps grows (Zhang et al. 2020, section 4: 10 of 200 epochs on MNIST)."""


def growth(start: float, end: float, steps: int, share: float) -> Schedule:
    """From `start` to `end` along a line, over `share` of `steps` updates, after WARM_UP of them; else constant.

    Args:
      start: during the warm-up, such as 0 of eps, 1 of kappa.
      end: from then on.
      steps: of the whole training.
      share: in [0, 1 - WARM_UP]; 0: `end` from the first update on.
    """
    if not share:
        return end

    def at(step):
        return start + (end - start) * jnp.clip((step / steps - WARM_UP) / share, 0.0, 1.0)

    return at


def ibp_loss(model, threat: Threat, *, eps: Schedule | None = None, kappa: Schedule = 0.5) -> Loss:
    """kappa CE(z(x), y) + (1 - kappa) CE(z_worst, y), z_worst by interval bounds (Gowal et al. 2018, section 3).

    z_worst_k = -min(z_y - z_k) over the threat, 0 at y. Bounds are those of the network as it is evaluated, with the
    running averages after this batch, which are held fixed.

    Args:
      model: under the Model contract, of primitives that `bounds` follow.
      threat: its eps is the last one.
      eps: a schedule in its place, from 0 on.
      kappa: from 1 down to 0.5 as published.

    Returns:
      A Loss whose metrics are `loss`, `accuracy` (clean), `certified_accuracy` and `eps`.

    Raises:
      InputError: a schedule, and a batch that does not say at which `step` it is (`train_step` says it); or a batch
        with `target`.
    """
    return _certified(model, threat, eps, kappa, 0.0)


def crown_ibp_loss(model, threat: Threat, *, eps: Schedule | None = None, kappa: Schedule = 0.0,
                   beta: Schedule = 1.0) -> Loss:
    """As `ibp_loss` with bounds beta (CROWN-IBP) + (1 - beta) (IBP) (Zhang et al. 2020, section 3).

    A step with beta or eps 0 costs what it does with `ibp_loss`.

    Args: as of `ibp_loss`, and
      beta: from 1 down to 0 while eps grows.
    """
    return _certified(model, threat, eps, kappa, beta)


def _certified(model, threat, eps, kappa, beta):
    def loss(params, model_state, batch, key):
        hard_labels(batch)

        def now(schedule):
            if not callable(schedule):
                return schedule
            if "step" not in batch:
                raise InputError("a schedule needs to know the step: give the batch one, as training.step does")
            return schedule(batch["step"])

        plain, (state, metrics) = cross_entropy(model)(params, model_state, batch, key)
        predict = predictor(model, {"params": params, **jax.lax.stop_gradient({**model_state, **state})})
        within = threat.replace(eps=jnp.asarray(threat.eps if eps is None else now(eps), jnp.float32))
        args = (predict, batch["image"], batch["label"], within)
        worst = bounds.ibp(*args, sound=False)
        if callable(beta) or beta:
            share = now(beta)

            def mixed(worst):
                return share * bounds.crown(*args, intermediate="ibp", sound=False) + (1 - share) * worst

            worst = jax.lax.cond((share > 0) & jnp.any(within.eps > 0), mixed, lambda worst: worst, worst)
        share = now(kappa)
        value = share * plain + (1 - share) * weighted_mean(objectives.cross_entropy(-worst, batch["label"]), batch)
        sure = bounds.certified(worst, batch["label"]).astype(jnp.float32)
        metrics = {**metrics, "loss": value, "certified_accuracy": weighted_mean(sure, batch), "eps": within.eps}
        return value, ({**model_state, **state}, metrics)

    return loss

"""Defences as losses: (params, model_state, batch, key) -> (scalar, (model_state, metrics)).

Images are attacked against the network as it is evaluated (running averages, no dropout, weights held fixed), then the
network is trained on them as it is trained. Those that train for certificates are in `certified_training`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dlcourse.adversarial import gradient, objectives
from dlcourse.adversarial import threat as threats
from dlcourse.adversarial.objectives import picked
from dlcourse.adversarial.threat import Threat, example_keys, over_pixels
from dlcourse.contracts import InputError, Loss, Predict
from dlcourse.streams import stream
from dlcourse.training.evaluation import predictor
from dlcourse.training.losses import cross_entropy, targets, weighted_mean


@dataclasses.dataclass(frozen=True)
class AdversarialLoss:
    """A Loss in two parts, so that `awp` may come between.

    Attributes:
      craft: (params, model_state, batch, key) -> attacked images (B,H,W,C), without a gradient.
      judge: (params, model_state, batch, attacked, key) -> what a Loss returns.
    """

    craft: Callable[..., jax.Array]
    judge: Callable[..., Any]

    def __call__(self, params, model_state, batch, key):
        attacked = self.craft(params, model_state, batch, stream(key, "attack"))
        return self.judge(params, model_state, batch, attacked, key)


def pgd_training(model, threat: Threat, *, steps: int = 10, step_size: float | None = None) -> AdversarialLoss:
    """Cross-entropy on what PGD from a random start makes of the batch (Madry et al. 2018, eq. 2.1).

    All steps are made, whether the network is fooled or not.

    Args:
      model: under the Model contract.
      threat: of norm linf, l2 or l1.
      steps: gradients.
      step_size: in pixels' units; default 2.5 eps / steps, as in `gradient.pgd`: for 10 steps eps / 4, which is Madry
        et al.'s 2 of 8 grey levels.

    Returns:
      A Loss whose `accuracy` is that on the attacked images.
    """
    def craft(params, model_state, batch, key):
        images, labels = batch["image"], batch["label"]
        predict = _evaluated(model, params, model_state)
        start = threats.random_start(example_keys(key, len(images)), images, threat)
        return _climb(lambda x: objectives.cross_entropy(predict(x), labels), start, images, threat, steps, step_size)

    return AdversarialLoss(craft, _on_attacked(model))


def fast_training(model, threat: Threat, *, noise: float = 2.0, step: float = 1.0,
                  clip: bool = False) -> AdversarialLoss:
    """Cross-entropy on single-step examples: N-FGSM (de Jorge et al. 2022, algorithm 1).

    Fast-AT (Wong et al. 2020) is noise 1, step 1.25, clip true. Watch `single_step_gap`.

    Args: as of `pgd_training` and `gradient.n_fgsm`.
    """
    def craft(params, model_state, batch, key):
        found = gradient.n_fgsm(key, _evaluated(model, params, model_state), batch["image"], batch["label"], threat,
                                noise=noise, step=step, clip=clip)
        return jax.lax.stop_gradient(found.images)

    return AdversarialLoss(craft, _on_attacked(model))


def trades(model, threat: Threat, *, beta: float = 6.0, steps: int = 10,
           step_size: float | None = None) -> AdversarialLoss:
    """Cross-entropy(p(x), y) + beta KL(p(x) || p(x')), x' what raises that KL (Zhang et al. 2019, algorithm 1).

    The attack starts at x + 0.001 N(0, I), as the authors' code does; KL has no slope at x itself.

    Args: as of `pgd_training`, and
      beta: the weight of robustness.

    Returns:
      A Loss whose metrics are `loss`, `accuracy` (clean), `robust_accuracy` and `divergence` (the mean KL, nats).
    """
    def craft(params, model_state, batch, key):
        images, predict = batch["image"], _evaluated(model, params, model_state)
        clean = predict(images)
        return _climb(lambda x: _kl(clean, predict(x)), _near(key, images, threat), images, threat, steps, step_size)

    def judge(params, model_state, batch, attacked, key):
        clean, state = _trained(model, params, model_state, batch["image"], key)
        plain = -jnp.sum(targets(batch, clean.shape[-1]) * jax.nn.log_softmax(clean), -1)
        logits, state = _trained(model, params, {**model_state, **state}, attacked, key)
        divergence = weighted_mean(_kl(clean, logits), batch)
        return _judged(weighted_mean(plain, batch) + beta * divergence, state, batch, clean, logits, divergence)

    return AdversarialLoss(craft, judge)


def mart(model, threat: Threat, *, weight: float = 5.0, steps: int = 10,
         step_size: float | None = None) -> AdversarialLoss:
    """BCE(p(x'), y) + weight KL(p(x) || p(x')) (1 - p_y(x)) (Wang et al. 2020, section 3).

    BCE = -log p_y(x') - log(1 - max_{k != y} p_k(x')); x' by PGD on cross-entropy from x + 0.001 N(0, I).

    Args: as of `pgd_training`, and
      weight: lambda, 5 as published.

    Returns:
      A Loss with the metrics of `trades`.

    Raises:
      InputError: a batch with `target`.
    """
    def craft(params, model_state, batch, key):
        images, labels, predict = batch["image"], batch["label"], _evaluated(model, params, model_state)
        return _climb(lambda x: objectives.cross_entropy(predict(x), labels), _near(key, images, threat), images,
                      threat, steps, step_size)

    def judge(params, model_state, batch, attacked, key):
        hard_labels(batch)
        labels = batch["label"]
        clean, state = _trained(model, params, model_state, batch["image"], key)
        logits, state = _trained(model, params, {**model_state, **state}, attacked, key)
        log_p = jax.nn.log_softmax(logits)
        # log(1 - p_k) of the strongest other class, without the difference of nearly equal numbers.
        rival = objectives.others(log_p, labels).argmax(-1)
        boosted = -picked(log_p, labels) - jax.nn.logsumexp(objectives.others(log_p, rival), -1)
        unsure = 1.0 - picked(jax.nn.softmax(clean), labels)
        divergence = weighted_mean(_kl(clean, logits) * unsure, batch)
        return _judged(weighted_mean(boosted, batch) + weight * divergence, state, batch, clean, logits, divergence)

    return AdversarialLoss(craft, judge)


def awp(loss: AdversarialLoss, *, gamma: float = 0.01) -> AdversarialLoss:
    """The loss at weights moved against it: w + v, v = gamma |w_l| g_l / |g_l| for kernels (Wu et al. 2020, section 4).

    g is the gradient at w on the same attacked images; kernels are the arrays of two axes and more. What the optimizer
    is given is the gradient at w + v.

    Args:
      loss: pgd_training, trades or mart.
      gamma: 0.01; 0.005 for TRADES.
    """
    def judge(params, model_state, batch, attacked, key):
        slope = jax.grad(lambda p: loss.judge(p, model_state, batch, attacked, key)[0])(params)

        def moved(weights, slope):
            if weights.ndim < 2:
                return weights
            length = jnp.linalg.norm(slope)
            by = gamma * jnp.linalg.norm(weights) * slope / jnp.where(length > 0, length, 1.0)
            return weights + jax.lax.stop_gradient(by)

        return loss.judge(jax.tree.map(moved, params, slope), model_state, batch, attacked, key)

    return AdversarialLoss(loss.craft, judge)


def gaussian_augmentation(loss: Loss, sigma: float) -> Loss:
    """The loss on images with N(0, sigma^2) noise, not clipped: what `smoothing` needs (Cohen et al. 2019, 3.3)."""
    def noisy(params, model_state, batch, key):
        drawn = jax.random.normal(stream(key, "gaussian"), batch["image"].shape, batch["image"].dtype)
        return loss(params, model_state, {**batch, "image": batch["image"] + sigma * drawn}, key)

    return noisy


def single_step_gap(key, predict: Predict, images, labels, threat: Threat, *, steps: int = 10) -> dict[str, jax.Array]:
    """Accuracies on a training batch under FGSM and PGD, and `gap`, PGD's minus FGSM's: far below 0 is overfitting.

    Wong et al. 2020, section 5.4: a network trained against single steps may come to withstand only these.
    """
    single = gradient.fgsm(key, predict, images, labels, threat).success.mean()
    many = gradient.pgd(key, predict, images, labels, threat, steps=steps).success.mean()
    return {"fgsm_accuracy": 1 - single, "pgd_accuracy": 1 - many, "gap": single - many}


def overfitted(gap, *, limit: float = 0.2) -> jax.Array:
    """Whether the alarm of catastrophic overfitting fires: `gap` below -limit.

    In a sound network PGD costs a few points more than FGSM; once overfitted, nearly all of FGSM's accuracy.
    """
    return jnp.asarray(gap) < -limit


def hard_labels(batch) -> None:
    """Raises InputError where images were mixed: some losses are for one class an image."""
    if "target" in batch:
        raise InputError("this defence needs one class an image: leave mixup and cutmix out of --augment")


def _evaluated(model, params, model_state) -> Predict:
    return predictor(model, jax.lax.stop_gradient({"params": params, **model_state}))


def _trained(model, params, model_state, images, key):
    (logits, _), state = model.apply({"params": params, **model_state}, images, train=True, mutable=list(model_state),
                                     rngs={"dropout": stream(key, "dropout")})
    return logits, state


def _on_attacked(model):
    def judge(params, model_state, batch, attacked, key):
        return cross_entropy(model)(params, model_state, {**batch, "image": attacked}, key)

    return judge


def _near(key, images, threat):
    draw = jax.vmap(lambda k, x: jax.random.normal(k, x.shape, x.dtype))
    return threats.inside(images + 0.001 * draw(example_keys(key, len(images)), images), images, threat)


def _climb(objective, start, images, threat, steps, size):
    size = over_pixels(2.5 * jnp.asarray(threat.eps) / steps if size is None else size, images)

    def step(x, _):
        slope = jax.grad(lambda x: objective(x).sum())(x)
        return threats.inside(x + size * threats.steepest(slope, threat.norm), images, threat), None

    return jax.lax.stop_gradient(jax.lax.scan(step, start, None, length=steps)[0])


def _kl(clean, attacked):
    """KL(softmax(clean) || softmax(attacked)), (B,K) twice -> (B,)."""
    log_p, log_q = jax.nn.log_softmax(clean), jax.nn.log_softmax(attacked)
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def _judged(value, state, batch, clean, attacked, divergence):
    accuracy, robust = (weighted_mean((z.argmax(-1) == batch["label"]).astype(jnp.float32), batch)
                        for z in (clean, attacked))
    return value, (state, {"loss": value, "accuracy": accuracy, "robust_accuracy": robust, "divergence": divergence})

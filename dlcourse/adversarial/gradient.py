"""Attacks that follow the gradient of the loss with steps of a fixed size, and noise of the same size as a control."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dlcourse.adversarial import objectives
from dlcourse.adversarial import threat as threats
from dlcourse.adversarial.threat import AttackResult, Threat, example_keys, fooled, inside, over_pixels, steepest
from dlcourse.contracts import InputError, Predict

NORMS = ("linf", "l2", "l1")
KINDS = ("uniform", "gaussian", "sign")


def ascend(predict: Predict, images, labels, targets, objective):
    """The gradient of the objective by the images, (B,H,W,C), the logits and the objective, from one pass each way.

    Each example's gradient is its own, since the objectives of a batch are added up. Where the network draws, each is
    an expectation (`eot.Expectation.ascend`).
    """
    if hasattr(predict, "ascend"):
        return predict.ascend(images, labels, targets, objective)

    def total(images):
        logits = predict(images)
        values = objective(logits, labels, targets)
        return values.sum(), (logits, values)

    gradient, (logits, values) = jax.grad(total, has_aux=True)(images)
    return gradient, logits, values


@functools.partial(jax.jit, static_argnames=("objective",))
def fgsm(key, predict: Predict, images, labels, threat: Threat, *, targets=None,
         objective: str = "cross_entropy") -> AttackResult:
    """One step of size eps: x + eps sign(grad L) for linf, eps grad L / |grad L| for l2 (Goodfellow et al. 2015, 4).

    Args:
      key: unused; the attack draws nothing.
      predict: images -> logits, a pytree such as `evaluation.predictor` returns.
      images: (B,H,W,C) in the box.
      labels: (B,) the truth.
      threat: of norm linf, l2 or l1.
      targets: (B,) classes to be taken for, or None.
      objective: of objectives.OBJECTIVES.

    Raises:
      InputError: for a norm or an objective that it has not, or for too few classes.
    """
    return n_fgsm(key, predict, images, labels, threat, targets=targets, objective=objective, noise=0.0, step=1.0,
                  clip=True)


@functools.partial(jax.jit, static_argnames=("objective", "clip"))
def n_fgsm(key, predict: Predict, images, labels, threat: Threat, *, targets=None, objective: str = "cross_entropy",
           noise: float = 2.0, step: float = 1.0, clip: bool = True) -> AttackResult:
    """One step from a noisy image: x + d + step eps sign(grad L(x + d)), d uniform of size noise eps, x + d in the box.

    de Jorge et al. 2022: noise 2, step 1, and in training no projection (`clip` false); as an attack on a threat the
    result must be projected. Wong et al. 2020 (Fast-AT): noise 1, step 1.25, projected.

    Args: as of `fgsm`, and
      key: (), or (B,) keys.
      noise, step: in units of eps.
      clip: project onto the threat; else onto the box alone.
    """
    objectives.check(predict, images, threat, NORMS, objective, targets)
    measure = objectives.OBJECTIVES[objective]
    keys = example_keys(key, len(images))
    # Without noise nothing is added, not even the rounding of a projection.
    start = images + over_pixels(noise * jnp.asarray(threat.eps), images) * _unit_noise(keys, images, threat)
    start = jnp.clip(start, threat.low, threat.high)  # as the authors' code does
    gradient, *_ = ascend(predict, start, labels, targets, measure)
    moved = start + over_pixels(step * jnp.asarray(threat.eps), images) * steepest(gradient, threat.norm)
    moved = inside(moved, images, threat) if clip else jnp.clip(moved, threat.low, threat.high)
    return threats.result(predict, moved, images, labels, threat, measure, jnp.ones(len(images), jnp.int32), targets)


def _unit_noise(keys, images, threat):
    unbounded = Threat(eps=1.0, norm=threat.norm, low=-jnp.inf, high=jnp.inf)
    return threats.random_start(keys, jnp.zeros_like(images), unbounded)


@functools.partial(jax.jit, static_argnames=("steps", "restarts", "objective", "random_start", "early_stop"))
def pgd(key, predict: Predict, images, labels, threat: Threat, *, targets=None, steps: int = 40,
        step_size: float | None = None, restarts: int = 1, random_start: bool = True, early_stop: bool = True,
        objective: str = "cross_entropy") -> AttackResult:
    """x <- P(x + step_size steepest(grad L(x))), P the projection onto the threat (Madry et al. 2018, eq. 4).

    Of all restarts the last image is kept that has the largest objective among those that fool the network, else among
    all. With early stop an example stays as it is once it is fooled, and the loop ends when all of them are.

    In l1 a step moves one coordinate and does not see the box: `apgd` is much stronger there.

    Args: as of `fgsm`, and
      key: (), or (B,) keys.
      steps: gradients a restart.
      step_size: in pixels' units; default 2.5 eps / steps (Madry et al.'s rule for a ball crossed some 2.5 times).
      restarts: from points drawn in the threat.
      random_start: else the one start is the image itself.
      early_stop: be content with any image that fools the network.
    """
    objectives.check(predict, images, threat, NORMS, objective, targets)
    measure = objectives.OBJECTIVES[objective]
    keys = example_keys(key, len(images))
    start = threats.unchanged(predict, images, labels, threat, measure, targets)
    size = 2.5 * jnp.asarray(threat.eps) / steps if step_size is None else jnp.asarray(step_size)

    def step(carry):
        i, x, queries, done = carry
        gradient, logits, _ = ascend(predict, x, labels, targets, measure)
        queries, done = queries + ~done, done | early_stop & fooled(logits, labels, targets)
        moved = inside(x + over_pixels(size, x) * steepest(gradient, threat.norm), images, threat)
        return i + 1, jnp.where(over_pixels(done, x), x, moved), queries, done

    def restart(carry):
        number, kept = carry
        own = jax.vmap(lambda k: jax.random.fold_in(k, number))(keys)
        x = threats.random_start(own, images, threat) if random_start else images
        done = early_stop & kept.success
        x = jnp.where(over_pixels(done, x), kept.images, x)
        _, x, queries, _ = jax.lax.while_loop(
            lambda c: (c[0] < steps) & ~jnp.all(c[3]), step, (0, x, kept.queries, done))
        found = threats.result(predict, x, images, labels, threat, measure, queries, targets)
        better = ~done & jnp.where(found.success == kept.success, found.loss > kept.loss, found.success)
        return number + 1, jax.tree.map(lambda new, old: jnp.where(over_pixels(better, new), new, old), found, kept) \
            .replace(queries=jnp.where(done, kept.queries, found.queries))

    return jax.lax.while_loop(lambda c: (c[0] < restarts) & ~jnp.all(early_stop & c[1].success), restart, (0, start))[1]


@functools.partial(jax.jit, static_argnames=("draws", "kind"))
def noise(key, predict: Predict, images, labels, threat: Threat, *, targets=None, draws: int = 1,
          kind: str = "uniform") -> AttackResult:
    """The control of every attack: the worst of `draws` random changes of the same size.

    Args: as of `fgsm`, and
      key: (), or (B,) keys.
      draws: tried one after another.
      kind: of KINDS. "uniform", a point of the ball as `random_start` draws it; "gaussian", normal numbers, and "sign",
        random signs, scaled to the size eps before the box.

    Raises:
      InputError: for a norm or a kind that it has not.
    """
    objectives.check(predict, images, threat, NORMS, "margin", targets)
    if kind not in KINDS:
        raise InputError(f"kind {kind!r}: there are {', '.join(KINDS)}")
    keys = example_keys(key, len(images))
    start = threats.unchanged(predict, images, labels, threat, objectives.margin, targets)

    def draw(number):
        own = jax.vmap(lambda k: jax.random.fold_in(k, number))(keys)
        if kind == "uniform":
            return threats.random_start(own, images, threat)
        random = jax.vmap(lambda k, x: jax.random.normal(k, x.shape, x.dtype))(own, images)
        random = jnp.sign(random) if kind == "sign" else random
        unit = random / over_pixels(threats.size(random, threat.norm), random)
        return inside(images + over_pixels(threat.eps, images) * unit, images, threat)

    def body(carry):
        number, kept = carry
        found = threats.result(predict, draw(number), images, labels, threat, objectives.margin, kept.queries, targets)
        return number + 1, threats.better_of(found, kept)[0]

    return jax.lax.while_loop(lambda c: (c[0] < draws) & ~jnp.all(c[1].success), body, (0, start))[1]

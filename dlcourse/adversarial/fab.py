"""FAB: the smallest change that crosses the decision boundary (Croce & Hein 2020, Minimally distorted examples)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dlcourse.adversarial import objectives
from dlcourse.adversarial import threat as threats
from dlcourse.adversarial.gradient import ascend
from dlcourse.adversarial.objectives import picked
from dlcourse.adversarial.projections import NORMS, onto_hyperplane
from dlcourse.adversarial.threat import DUAL, AttackResult, Threat, example_keys, flat, fooled, over_pixels, size
from dlcourse.contracts import InputError, Predict


@functools.partial(jax.jit, static_argnames=("steps", "restarts"))
def fab(key, predict: Predict, images, labels, threat: Threat, *, targets=None, steps: int = 100, restarts: int = 1,
        alpha_max: float = 0.1, eta: float = 1.05, beta: float = 0.9) -> AttackResult:
    """x <- (1-a) (x + eta d(x)) + a (x0 + eta d(x0)), d(x) the way to the nearest linearised boundary within the box.

    a = min(|d(x)| / (|d(x)| + |d(x0)|), alpha_max); from a point beyond the boundary it goes on at x0 + beta (x - x0)
    (Croce & Hein 2020, algorithm 1, as in their AutoAttack: without the final search). All steps are taken, since each
    may find a smaller change. What is returned is the smallest found where it is within eps, else the original, so
    that for the smallest change whatever its size eps is set large. Only images without one take another restart,
    from a random point at eps / 2.

    The boundary is that to the nearest other class, or with targets where the target overtakes the best other class.

    Args:
      key: (), or (B,) keys.
      predict: images -> logits, a pytree such as `evaluation.predictor` returns.
      images: (B,H,W,C) in the box.
      labels: (B,) the truth.
      threat: of norm linf, l2 or l1.
      targets: (B,) classes to be taken for, or None.
      steps: a restart; each takes two forward passes, and one backward for every class (with targets: one).
      restarts: the first begins at the image itself.
      alpha_max: the most that the original draws.
      eta: by how much boundaries are overshot.
      beta: the share of a change that is kept where it succeeded.

    Raises:
      InputError: for another norm.
    """
    def aim(x, number):
        if targets is None:
            return _nearest(predict, x, labels, threat.norm)
        gradient, _, values = ascend(predict, x, labels, targets, objectives.margin)
        return gradient, values

    return _attempts(key, predict, images, labels, threat, targets, aim, steps, restarts, restarts,
                     (alpha_max, eta, beta))


@functools.partial(jax.jit, static_argnames=("classes", "steps", "restarts"))
def fab_t(key, predict: Predict, images, labels, threat: Threat, *, targets=None, classes: int = 9, steps: int = 100,
          restarts: int = 1, alpha_max: float = 0.1, eta: float = 1.05, beta: float = 0.9) -> AttackResult:
    """FAB along the boundary with one class at a time: FAB-T of AutoAttack, untargeted in what counts as success.

    Costs one backward pass a step however many classes there are. The classes are tried from the likeliest on, those
    images that have no change within eps yet go on to the next.

    Args: as of `fab`, and
      targets: None; the attack has its own.
      classes: tried, of K - 1 all where there are fewer.
      restarts: for each class.
    """
    if targets is not None:
        raise InputError("fab_t aims at classes of its own: for given targets take fab")
    ranked = jnp.argsort(-predict(images), axis=-1)
    classes = min(classes, ranked.shape[-1] - 1)

    def difference(logits, labels, targets):
        return picked(logits, targets) - picked(logits, labels)

    def aim(x, number):
        gradient, _, values = ascend(predict, x, labels, ranked[:, 1 + number // restarts], difference)
        return gradient, values

    return _attempts(key, predict, images, labels, threat, None, aim, steps, restarts, classes * restarts,
                     (alpha_max, eta, beta))


def _attempts(key, predict, images, labels, threat, targets, aim, steps, restarts, attempts, rates):
    if threat.norm not in NORMS:
        raise InputError(f"norm {threat.norm!r}: fab has {', '.join(NORMS)}")
    keys = example_keys(key, len(images))
    kept = threats.unchanged(predict, images, labels, threat, objectives.margin, targets)

    def attempt(carry):
        number, kept = carry
        own = jax.vmap(lambda k: jax.random.fold_in(k, number))(keys)
        start = jnp.where(number % restarts == 0, images, _half_way(own, images, threat))
        reached, length, taken = descend(predict, images, start, labels, threat, lambda x: aim(x, number), targets,
                                         ~kept.success, steps, rates)
        reached = jnp.where(over_pixels(length <= threat.eps, images), reached, images)
        found = threats.result(predict, reached, images, labels, threat, objectives.margin, kept.queries + 2 * taken,
                               targets)
        return number + 1, threats.better_of(found, kept)[0]

    return jax.lax.while_loop(lambda c: (c[0] < attempts) & ~jnp.all(c[1].success), attempt, (0, kept))[1]


def descend(predict: Predict, images, start, labels, threat: Threat, aim, targets, alive, steps: int, rates):
    """One restart: the smallest change found from `start` on.

    Args:
      predict: images -> logits.
      images: (B,H,W,C) originals.
      start: (B,H,W,C) in the box.
      labels: (B,).
      threat: whose norm is measured and whose box is kept; eps plays no part.
      aim: images -> (normals (B,H,W,C), excess (B,)) of the boundary to go to.
      targets: (B,) or None.
      alive: (B,) bool; where none is, no step is taken.
      steps: as many.
      rates: alpha_max, eta, beta.

    Returns:
      (B,H,W,C) images, (B,) the norm of their change, infinite where none was found, and the number of steps taken.
    """
    alpha_max, eta, beta = rates

    def step(carry):
        i, x, best, shortest = carry
        normals, excess = aim(x)
        from_original = excess + flat(normals * (images - x)).sum(-1)
        ways = onto_hyperplane(jnp.concatenate([x, images]), jnp.concatenate([normals, normals]),
                               jnp.concatenate([excess, from_original]), threat.norm, threat.low, threat.high)
        here, there = jnp.split(jnp.maximum(size(ways, threat.norm), 1e-8), 2)
        way, way_back = jnp.split(ways, 2)
        alpha = over_pixels(jnp.minimum(here / (here + there), alpha_max), x)
        x = jnp.clip((x + eta * way) * (1 - alpha) + (images + eta * way_back) * alpha, threat.low, threat.high)
        crossed = fooled(predict(x), labels, targets)
        length = size(x - images, threat.norm)
        better = crossed & (length < shortest)
        best, shortest = jnp.where(over_pixels(better, x), x, best), jnp.where(better, length, shortest)
        return i + 1, jnp.where(over_pixels(crossed, x), images + beta * (x - images), x), best, shortest

    first = (0, start, images, jnp.full(len(images), jnp.inf, images.dtype))
    taken, _, best, shortest = jax.lax.while_loop(lambda c: (c[0] < steps) & jnp.any(alive), step, first)
    return best, shortest, taken


def _nearest(predict, x, labels, norm):
    """Normal and excess of the linearised boundary to the class min_k |z_k - z_y| / |grad (z_k - z_y)|_dual."""
    logits, pull = jax.vjp(predict, x)
    classes = jnp.eye(logits.shape[-1], dtype=logits.dtype)
    gradients = jax.vmap(lambda one: pull(jnp.broadcast_to(one[None], logits.shape))[0])(classes)

    def per_class(gradients, logits, label):
        normals = gradients - gradients[label][None]
        gaps = logits - logits[label]
        distances = jnp.abs(gaps) / (size(normals, DUAL[norm]) + 1e-12)
        nearest = jnp.where(jnp.arange(len(gaps)) == label, jnp.inf, distances).argmin()
        return normals[nearest], gaps[nearest]

    return jax.vmap(per_class, in_axes=(1, 0, 0))(gradients, logits, labels)


def _half_way(keys, images, threat):
    """A random point eps / 2 from the image: uniform coordinates for linf, a normal direction else; then the box."""
    def one(key, image):
        draw = functools.partial(jax.random.uniform, minval=-1.0, maxval=1.0) if threat.norm == "linf" else \
            jax.random.normal
        drawn = draw(key, image.shape, image.dtype)
        return drawn / size(drawn[None], threat.norm)[0]

    moved = images + over_pixels(threat.eps, images) / 2 * jax.vmap(one)(keys, images)
    return jnp.clip(moved, threat.low, threat.high)

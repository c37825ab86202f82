"""Auto-PGD: projected gradient ascent that chooses its own step sizes, for linf, l2 (2020) and l1 (2021)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct

from dlcourse.adversarial import objectives
from dlcourse.adversarial import threat as threats
from dlcourse.adversarial.gradient import NORMS, ascend
from dlcourse.adversarial.projections import inside_l1
from dlcourse.adversarial.threat import AttackResult, Threat, example_keys, fooled, inside, over_pixels, size, steepest
from dlcourse.contracts import InputError, Predict

MOMENTUM = 0.75  # of the new step; the rest is the step before (Croce & Hein 2020, eq. 3)
RHO = 0.75  # a step size stays where the objective rose in more than this share of steps (2020, section 3.1)
RADII, SHARES = (3, 2, 1), (0.3, 0.3, 0.4)  # l1: radii in units of eps, and how the steps are divided (2021, sec. 3.3)


@functools.partial(jax.jit, static_argnames=("steps", "restarts", "objective"))
def apgd(key, predict: Predict, images, labels, threat: Threat, *, targets=None, steps: int = 100, restarts: int = 1,
         objective: str = "cross_entropy") -> AttackResult:
    """x <- P(x + a (P(x + s g) - x) + (1 - a) (x - x_before)), with a step size s that halves where progress stalls.

    P projects onto the threat, g is the direction of steepest ascent, a = .75; s begins at 2 eps, and at growing
    frequency an example whose objective oscillates halves it and goes on from its best point (Croce & Hein 2020,
    section 3, algorithm 1). For l1 g is sparse, as sparse as the best point yet is, and the radius shrinks from 3 eps
    to eps on the way (Croce & Hein 2021, section 3); its rule ends with two entries, not one, so that where one pixel
    would do it needs up to twice the least eps. An example stops when it is fooled; of those that never are, the point
    of the largest objective is returned.

    Args:
      key: (), or (B,) keys.
      predict: images -> logits, a pytree such as `evaluation.predictor` returns, or an `eot.Expectation`.
      images: (B,H,W,C) in the box.
      labels: (B,) the truth.
      threat: of norm linf, l2 or l1.
      targets: (B,) classes to be taken for, or None.
      steps: gradients a restart, but for that of its start.
      restarts: from random points, each for the examples that none before has fooled.
      objective: of objectives.OBJECTIVES.

    Raises:
      InputError: for a norm or an objective that it has not, or for too few classes.
    """
    objectives.check(predict, images, threat, NORMS, objective, targets)
    measure = objectives.OBJECTIVES[objective]
    return _tries(key, predict, images, labels, threat, lambda number: targets, restarts, steps, measure, measure,
                  targets)


@functools.partial(jax.jit, static_argnames=("steps", "classes", "objective"))
def apgd_t(key, predict: Predict, images, labels, threat: Threat, *, targets=None, classes: int = 9, steps: int = 100,
           objective: str = "dlr") -> AttackResult:
    """APGD towards each of the most probable wrong classes in turn, until any wrong class wins (2020, section 5).

    Args: as of `apgd`, and
      targets: None; the attack has its own.
      classes: to aim at, at most K - 1.
    """
    if targets is not None:
        raise InputError("apgd_t aims at classes of its own: for given targets take apgd")
    known = objectives.check(predict, images, threat, NORMS, objective, targets=labels)
    if not 0 < classes < known:
        raise InputError(f"classes={classes} to aim at: a network of {known} classes has 1 to {known - 1} wrong ones")
    ranking = wrong_classes(predict(images), labels)
    return _tries(key, predict, images, labels, threat, lambda number: ranking[:, number], classes, steps,
                  objectives.OBJECTIVES[objective], objectives.margin, None)


def wrong_classes(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """(B,K-1) int32: all classes but the label, the most probable first."""
    return jnp.argsort(-objectives.others(logits, labels), axis=-1)[:, :-1].astype(jnp.int32)


def _tries(key, predict, images, labels, threat, aims, count, steps, measure, judge, targets):
    """The best of `count` climbs, the n-th towards aims(n); `judge` is the objective that compares and is reported."""
    keys = example_keys(key, len(images))
    kept = threats.unchanged(predict, images, labels, threat, judge, targets)

    def one(carry):
        number, kept = carry
        own = jax.vmap(lambda k: jax.random.fold_in(k, number))(keys)
        climb = functools.partial(ascent, predict, images, labels, aims=aims(number), targets=targets, measure=measure)
        if threat.norm == "l1":
            x, queries = shrinking(climb, beginning(own, images, threat.replace(eps=RADII[0] * threat.eps)), images,
                                   threat, steps, kept.success)
        else:
            x, queries = climb(threat, beginning(own, images, threat), kept.success, steps=steps)
        x = jnp.where(over_pixels(kept.success, x), kept.images, x)
        found = threats.result(predict, x, images, labels, threat, judge, kept.queries + queries, targets)
        return number + 1, threats.better_of(found, kept)[0]

    return jax.lax.while_loop(lambda c: (c[0] < count) & ~jnp.all(c[1].success), one, (0, kept))[1]


def beginning(keys: jax.Array, images: jax.Array, threat: Threat) -> jax.Array:
    """Where a climb starts: noise scaled to the full radius, (B,H,W,C).

    linf: uniform, its largest entry scaled to eps; l2: normal, scaled to eps; l1: normal, projected.
    """
    draw = jax.random.uniform if threat.norm == "linf" else jax.random.normal
    noise = jax.vmap(lambda key, image: draw(key, image.shape, image.dtype))(keys, images)
    if threat.norm == "l1":
        return inside_l1(images + noise, images, threat)
    noise = 2 * noise - 1 if threat.norm == "linf" else noise
    unit = noise / over_pixels(size(noise, threat.norm) + 1e-12, noise)
    return inside(images + over_pixels(threat.eps, images) * unit, images, threat)


def shrinking(climb, start, images, threat: Threat, steps: int, done):
    """Climbs in balls of 3, 2 and 1 eps, each from the best point of the one before, moved into the smaller ball.

    Args:
      climb: (threat, start, done, steps, settle) -> as `ascent`.
      start: (B,H,W,C).
      images: (B,H,W,C), the balls' centres.
      threat: of norm l1.
      steps: in all.
      done: (B,) bool, examples to leave alone.

    Returns:
      As `ascent`.
    """
    parts = [-int(-share * steps // 1) for share in SHARES[:-1]]

    def one(carry, of):
        start, queries = carry
        radius, part, last = of
        ball = threat.replace(eps=radius * jnp.asarray(threat.eps))
        reached, more = climb(ball, inside_l1(start, images, ball), done, steps=part, settle=last)
        return (reached, queries + more), None

    rounds = (jnp.asarray(RADII, images.dtype), jnp.asarray([*parts, steps - sum(parts)]),
              jnp.asarray(RADII) == RADII[-1])
    return jax.lax.scan(one, (start, jnp.zeros(len(images), jnp.int32)), rounds)[0]


class _Climb(struct.PyTreeNode):
    """Where a climb is: the iterate, the one before, the gradient; the best point; and the pace's own memory."""

    x: jax.Array
    before: jax.Array
    gradient: jax.Array
    best: jax.Array
    best_gradient: jax.Array
    best_loss: jax.Array
    step: jax.Array
    memory: tuple
    done: jax.Array
    queries: jax.Array


def ascent(predict: Predict, images, labels, threat: Threat, start, done, *, aims, targets, measure, steps,
           settle=True):
    """One climb from `start`, (B,H,W,C) within the threat.

    Args:
      predict, images, labels, threat: of the attack.
      start: (B,H,W,C).
      done: (B,) bool, examples to leave alone.
      aims: (B,) classes that the objective is to reach, or None.
      targets: (B,) classes without which an example is not fooled, or None for any but the label.
      measure: the objective.
      steps: at most; a Python number, but for l1.
      settle: bool, stay where the network is fooled; else climb on.

    Returns:
      (B,H,W,C), where the network was fooled or else the best point; and (B,) queries.
    """
    moves, paces = (_sparse_move, _SparsePace(steps)) if threat.norm == "l1" else (_move, _Pace(steps))

    def look(x):
        gradient, logits, loss = ascend(predict, x, labels, aims, measure)
        return gradient, loss, fooled(logits, labels, targets) & settle

    def body(carry):
        i, at = carry
        x = jnp.where(over_pixels(at.done, at.x), at.x, moves(i, at, images, threat))
        gradient, loss, won = look(x)
        better = loss > at.best_loss
        pixels = over_pixels(better, x)
        at = at.replace(
            x=x, before=at.x, gradient=gradient, best=jnp.where(pixels, x, at.best),
            best_gradient=jnp.where(pixels, gradient, at.best_gradient),
            best_loss=jnp.where(better, loss, at.best_loss), done=at.done | won, queries=at.queries + ~at.done)
        step, memory, back = paces.adapt(i, at, loss, images, threat)
        back = over_pixels(back & ~at.done, x)
        return i + 1, at.replace(step=step, memory=memory, x=jnp.where(back, at.best, x),
                                 gradient=jnp.where(back, at.best_gradient, gradient))

    gradient, loss, won = look(start)
    step, memory = paces.begin(start, loss, images, threat)
    at = _Climb(start, start, gradient, start, gradient, loss, step, memory, done | won, (~done).astype(jnp.int32))
    _, at = jax.lax.while_loop(lambda c: (c[0] < steps) & ~jnp.all(c[1].done), body, (0, at))
    return jnp.where(over_pixels(at.done, start), at.x, at.best), at.queries


def _move(i, at, images, threat):
    keep = jnp.where(i == 0, 1.0, MOMENTUM)
    ahead = inside(at.x + over_pixels(at.step, at.x) * steepest(at.gradient, threat.norm), images, threat)
    return inside(at.x + keep * (ahead - at.x) + (1 - keep) * (at.x - at.before), images, threat)


def checkpoints(steps: int) -> tuple[int, ...]:
    """The steps after which step sizes are reviewed: 22, 41, 57, 70, 80, 87, 93, 99 of 100 (2020, section 3.1)."""
    window, at, found = max(int(0.22 * steps), 1), 0, []
    while at + window <= steps:
        at += window
        found.append(at)
        window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return tuple(found)


class _Pace:
    """Halves the step where at a checkpoint the objective rose too rarely, or the best one did not while s stayed."""

    def __init__(self, steps):
        self.window, last = [0] * steps, 0
        for at in checkpoints(steps):
            self.window[at - 1], last = at - last, at

    def begin(self, start, loss, images, threat):
        # The first step's objective is compared with 0, and s counts as halved before the first: both as in the
        # authors' code, with which published figures were made.
        step = 2.0 * jnp.broadcast_to(jnp.asarray(threat.eps, start.dtype), loss.shape)
        return step, (jnp.zeros_like(loss), jnp.zeros(loss.shape, jnp.int32), loss, jnp.ones(loss.shape, bool))

    def adapt(self, i, at, loss, images, threat):
        last, rises, best_then, halved_then = at.memory
        rises = rises + (loss > last)
        window = jnp.asarray(self.window)[i]
        halved = (rises <= RHO * window) | (~halved_then & (best_then >= at.best_loss))
        now = jnp.broadcast_to(window > 0, loss.shape)
        memory = (loss, jnp.where(now, 0, rises), jnp.where(now, at.best_loss, best_then),
                  jnp.where(now, halved, halved_then))
        return jnp.where(now & halved, at.step / 2, at.step), memory, now & halved


def _sparse_move(i, at, images, threat):
    """A step of l1 length s along the signs of the largest gradients, as many as the share says (2021, section 3.2)."""
    share, _ = at.memory
    strength = jnp.abs(at.gradient).reshape(len(images), -1)
    entries = strength.shape[1]
    rank = jnp.clip((1 - share) * entries, 0, entries - 1).astype(jnp.int32)
    least = jnp.take_along_axis(jnp.sort(strength, axis=-1), rank[:, None], 1)[:, 0]
    signs = jnp.where(jnp.abs(at.gradient) >= over_pixels(least, images), jnp.sign(at.gradient), 0.0)
    length = over_pixels(at.step / (size(signs, "l1") + 1e-10), images)
    return inside_l1(at.x + length * signs, images, threat)


class _SparsePace:
    """The share of entries that move follows the best point's own; while that gets sparser steps are eps long."""

    def __init__(self, steps):
        self.every = jnp.maximum(steps // 25, 1)

    def begin(self, start, loss, images, threat):
        step = jnp.broadcast_to(jnp.asarray(threat.eps, start.dtype), loss.shape)
        changed = _changed(start, images)
        return step, (changed / images[0].size / 1.5, changed)

    def adapt(self, i, at, loss, images, threat):
        share, before = at.memory
        now = (i + 1) % self.every == 0
        changed = _changed(at.best, images)
        sparser = changed < 0.95 * before
        full = jnp.broadcast_to(jnp.asarray(threat.eps, at.step.dtype), loss.shape)
        step = jnp.where(sparser, full, jnp.maximum(at.step / 1.5, full / 10))
        memory = (jnp.where(now, changed / images[0].size / 1.5, share), jnp.where(now, changed, before))
        return jnp.where(now, step, at.step), memory, now & sparser


def _changed(x, images):
    return (x != images).reshape(len(x), -1).sum(-1).astype(x.dtype)

"""Attacks that see nothing but the predicted class: the Boundary attack and HopSkipJump.

Both look for the smallest change, however far it is (see `minimal`). Both begin from an image that fools the network
already: `start` where it does, else uniform noise. An example for which none is found keeps its image and did not
succeed. One that is fooled without any change is left as it is, with norm 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dlcourse.adversarial import minimal
from dlcourse.adversarial import threat as threats
from dlcourse.adversarial.threat import AttackResult, Threat, example_keys, fooled, over_pixels, size
from dlcourse.contracts import InputError, Predict

WINDOW = 30
"""Tries over which the Boundary attack takes a rate of success before it changes a step's size."""


def nearest_start(predict: Predict, images, labels, pool, targets=None):
    """(B,H,W,C) the nearest image of the pool (l2) that fools the network, as a start for each of `images`.

    Targeted attacks need one, as noise is hardly ever taken for a given class. Where none of the pool fools the
    network, its first image.

    Args:
      predict: images -> logits.
      images: (B,H,W,C).
      labels: (B,).
      pool: (M,H,W,C), such as training images.
      targets: (B,) or None.
    """
    logits = predict(pool)
    many = functools.partial(jnp.full, len(pool))
    suits = jax.vmap(lambda label, target: fooled(logits, many(label), None if target is None else many(target)))(
        labels, targets)
    distances = jax.lax.map(lambda image: size(pool - image[None], "l2"), images)
    return pool[jnp.where(suits, distances, jnp.inf).argmin(-1)]


def _begin(keys, adversarial, images, threat, start, draws):
    """The images to begin from, (B,) whether one was found, (B,) whether no change was needed, (B,) queries."""
    already = adversarial(images)
    queries = jnp.ones(len(images), jnp.int32)
    if start is None:
        x, found = images, already
    else:
        x = jnp.where(over_pixels(already, images), images, start)
        found = adversarial(x)
        queries += ~already

    def draw(carry):
        number, x, found, queries = carry
        noise = jax.vmap(lambda k, image: jax.random.uniform(jax.random.fold_in(k, number), image.shape, image.dtype))(
            keys, images)
        tried = over_pixels(threat.low, x) + over_pixels(threat.high - threat.low, x) * noise
        tried = jnp.where(over_pixels(found, x), x, tried)
        return number + 1, tried, adversarial(tried), queries + ~found

    _, x, found, queries = jax.lax.while_loop(
        lambda c: (c[0] < draws) & ~jnp.all(c[2]), draw, (0, x, found, queries))
    return jnp.where(over_pixels(found, x), x, images), found, already, queries


@functools.partial(jax.jit, static_argnames=("steps", "start_draws"))
def boundary(key, predict: Predict, images, labels, threat: Threat, *, targets=None, start=None, steps: int = 25000,
             sphere_step: float = 0.01, source_step: float = 0.01, start_draws: int = 50) -> AttackResult:
    """A random walk along the boundary: a step on the sphere around the image, one towards it (Brendel et al. 2018).

    With d = |x' - x|, a normal draw, orthogonal to x' - x and of length sphere_step d, is added; the sum goes back to
    the sphere of radius d, then to that of (1 - source_step) d, and is kept if it still fools the network. Both steps
    adapt, as in section 2.3: every tenth step the point on the sphere is asked about as well; where more than half of
    these fool the network both steps grow by 1.5, where less than a fifth do both shrink. The source step alone grows
    where more than a quarter of its steps succeed and shrinks below a tenth. It ends an example when below 1e-7.

    Args:
      key: (), or (B,) keys.
      predict: images -> logits.
      images: (B,H,W,C) in the box.
      labels: (B,) the truth.
      threat: of norm l2; its eps only judges (see `minimal`).
      targets: (B,) classes to be taken for, or None.
      start: (B,H,W,C) that fool the network, or None.
      steps: at most, of one query each and a tenth more.
      sphere_step, source_step: at first, in units of the distance.
      start_draws: of noise, to begin from.

    Raises:
      InputError: another norm.
    """
    if threat.norm != "l2":
        raise InputError(f"norm {threat.norm!r}: the Boundary attack has l2; hop_skip_jump has linf, too")

    def adversarial(x):
        return fooled(predict(x), labels, targets)

    keys = example_keys(key, len(images))
    x, found, already, queries = _begin(keys, adversarial, images, threat, start, start_draws)
    ones, none = jnp.ones(len(images)), jnp.zeros((2, len(images)), jnp.int32)

    def step(carry):
        i, x, sphere, source, sphere_tries, source_tries, queries, alive = carry
        own = jax.vmap(lambda k: jax.random.fold_in(k, start_draws + i))(keys)
        on_sphere, nearer = _propose(own, x, images, threat, sphere, source)
        hit = adversarial(nearer) & (size(nearer - images, "l2") < size(x - images, "l2"))
        asks = i % 10 == 9
        on_boundary = jax.lax.cond(asks, adversarial, lambda x: jnp.zeros(len(x), bool), on_sphere)
        sphere_tries = sphere_tries + jnp.stack([on_boundary, jnp.full(len(x), asks)])
        source_tries = source_tries + jnp.stack([hit, jnp.ones(len(x), bool)])
        both, sphere_tries = _adapt(sphere_tries, 0.2, 0.5)
        alone, source_tries = _adapt(source_tries, 0.1, 0.25)
        x = jnp.where(over_pixels(hit & alive, x), nearer, x)
        queries = queries + alive * (1 + asks)
        # A step as long as the distance itself would land on the image.
        source = jnp.minimum(source * both * alone, 0.5)
        return i + 1, x, sphere * both, source, sphere_tries, source_tries, queries, alive & (source >= 1e-7)

    carry = (0, x, sphere_step * ones, source_step * ones, none, none, queries, found & ~already)
    _, x, *_, queries, _ = jax.lax.while_loop(lambda c: (c[0] < steps) & jnp.any(c[-1]), step, carry)
    return minimal.result(predict, x, images, labels, threat, queries, targets)


def _propose(keys, x, images, threat, sphere, source):
    """A point on the sphere around the image, and the one nearer to the image on the same ray; both in the box."""
    away = x - images
    distance = jnp.maximum(size(away, "l2"), 1e-12)
    drawn = jax.vmap(lambda k, image: jax.random.normal(k, image.shape, image.dtype))(keys, images)
    along = (drawn * away).sum(tuple(range(1, x.ndim))) / distance**2
    drawn = drawn - over_pixels(along, x) * away
    drawn = drawn * over_pixels(sphere * distance / jnp.maximum(size(drawn, "l2"), 1e-12), x)
    on_sphere = images + (away + drawn) * over_pixels(1 / jnp.sqrt(1 + sphere**2), x)
    on_sphere = jnp.clip(on_sphere, threat.low, threat.high)
    reached = on_sphere - images
    shorter = jnp.minimum((1 - source) * distance / jnp.maximum(size(reached, "l2"), 1e-12), 1.0)
    return on_sphere, jnp.clip(images + over_pixels(shorter, x) * reached, threat.low, threat.high)


def _adapt(tries, least, most):
    """The factor of a step's size by the rate of success, once WINDOW tries are there, and the tries still counted."""
    hits, count = tries
    full, rate = count >= WINDOW, hits / WINDOW
    factor = jnp.where(full & (rate > most), 1.5, jnp.where(full & (rate < least), 1 / 1.5, 1.0))
    return factor, jnp.where(full[None], 0, tries)


@functools.partial(jax.jit, static_argnames=("steps", "chunk", "start_draws"))
def hop_skip_jump(key, predict: Predict, images, labels, threat: Threat, *, targets=None, start=None, steps: int = 64,
                  first_draws: int = 100, most_draws: int = 10000, chunk: int = 25,
                  start_draws: int = 50) -> AttackResult:
    """Along the gradient that the decisions near the boundary imply, and back to the boundary (Chen et al. 2020).

    Algorithm 2: bisection between image and x' to the boundary; the gradient's direction from B_t = B_0 sqrt(t)
    decisions phi = ±1 at x' + delta u, as the mean of (phi - mean phi) u (eq. 16); a step of |x' - x| / sqrt(t),
    halved until it fools the network, along that direction, for linf along its sign. B_0 = 100, T = 64; with
    D pixels delta is 0.1 of the box at first, then |x' - x| / D, and bisection ends at D^-3/2 of the way (linf: D^-2).
    Where float32 images cannot resolve these, delta is 2^-20 of the box a pixel and bisection has 23 steps at most.

    Args:
      key: (), or (B,) keys.
      predict: images -> logits.
      images: (B,H,W,C) in the box.
      labels: (B,) the truth.
      threat: of norm linf or l2; its eps only judges (see `minimal`).
      targets: (B,) classes to be taken for, or None.
      start: (B,H,W,C) that fool the network, or None.
      steps: T, each a gradient and a bisection.
      first_draws: B_0, for the first gradient.
      most_draws: for any gradient.
      chunk: draws that are predicted together.
      start_draws: of noise, to begin from.

    Raises:
      InputError: another norm.
    """
    if threat.norm not in ("linf", "l2"):
        raise InputError(f"norm {threat.norm!r}: HopSkipJump has linf, l2")

    def adversarial(x):
        return fooled(predict(x), labels, targets)

    keys = example_keys(key, len(images))
    pixels, box = math.prod(images.shape[1:]), jnp.asarray(threat.high - threat.low, images.dtype)
    halvings = min(23, math.ceil((1.5 if threat.norm == "l2" else 2) * math.log2(pixels)))
    x, found, already, queries = _begin(keys, adversarial, images, threat, start, start_draws)
    alive = found & ~already
    x = _to_boundary(adversarial, x, images, threat.norm, halvings)

    def hop(carry):
        t, x, best, queries = carry
        own = jax.vmap(lambda k: jax.random.fold_in(k, start_draws + t))(keys)
        distance, root = size(x - images, threat.norm), jnp.sqrt(t + 1.0)
        delta = jnp.where(t == 0, 0.1 * box, jnp.maximum(distance / pixels, math.sqrt(pixels) * 2.0**-20 * box))
        draws = jnp.minimum(first_draws * root, most_draws).astype(jnp.int32)
        direction = threats.steepest(_gradient(own, adversarial, x, threat, delta, draws, chunk), threat.norm)
        landed, tries = _jump(adversarial, x, direction, distance / root, threat)
        x = _to_boundary(adversarial, landed, images, threat.norm, halvings)
        nearer = size(x - images, threat.norm) < size(best - images, threat.norm)
        return t + 1, x, jnp.where(over_pixels(nearer, x), x, best), queries + alive * (draws + tries + halvings)

    carry = (0, x, x, queries + alive * halvings)
    *_, best, queries = jax.lax.while_loop(lambda c: (c[0] < steps) & jnp.any(alive), hop, carry)
    best = jnp.where(over_pixels(alive, best), best, images)
    return minimal.result(predict, best, images, labels, threat, queries, targets)


def _to_boundary(adversarial: Callable, x, images, norm, halvings):
    """The point nearest to the image, among those bisection tried, that fools the network; x where none does.

    For l2 on the way from the image to x, for linf among x with its change clipped.
    """
    change, reach = x - images, size(x - images, norm)

    def halve(_, carry):
        low, high, best = carry
        middle = (low + high) / 2
        share = over_pixels(middle if norm == "l2" else middle * reach, x)
        tried = images + (share * change if norm == "l2" else jnp.clip(change, -share, share))
        hit = adversarial(tried)
        return jnp.where(hit, low, middle), jnp.where(hit, middle, high), jnp.where(over_pixels(hit, x), tried, best)

    return jax.lax.fori_loop(0, halvings, halve, (jnp.zeros(len(x)), jnp.ones(len(x)), x))[2]


def _gradient(keys, adversarial, x, threat, delta, draws, chunk):
    """Chen et al. 2020, eq. 16: the mean of (phi - mean phi) u; where all decisions agree, of phi u."""
    delta = over_pixels(delta, x)

    def body(carry):
        number, weighted, plain, says = carry
        kind = jax.random.normal if threat.norm == "l2" else functools.partial(jax.random.uniform, minval=-1.0)
        shape = (chunk, *x.shape[1:])
        drawn = jax.vmap(lambda k: kind(jax.random.fold_in(k, number), shape, x.dtype), out_axes=1)(keys)
        unit = jax.vmap(lambda d: d / over_pixels(size(d, "l2"), d))(drawn)
        near = jnp.clip(x[None] + delta[None] * unit, threat.low, threat.high)
        unit = (near - x[None]) / delta[None]
        counted = (number * chunk + jnp.arange(chunk) < draws)[:, None]
        phi = jnp.where(jax.vmap(adversarial)(near), 1.0, -1.0) * counted
        weigh = functools.partial(jnp.einsum, "mb,mb...->b...", precision=jax.lax.Precision.HIGHEST)
        every = jnp.broadcast_to(counted, phi.shape).astype(x.dtype)
        return number + 1, weighted + weigh(phi, unit), plain + weigh(every, unit), says + phi.sum(0)

    zero = jnp.zeros_like(x)
    _, weighted, plain, says = jax.lax.while_loop(
        lambda c: c[0] * chunk < draws, body, (0, zero, zero, jnp.zeros(len(x))))
    mean = says / draws
    return (weighted - over_pixels(jnp.where(jnp.abs(mean) < 1, mean, 0.0), x) * plain) / draws


def _jump(adversarial, x, direction, length, threat):
    """x moved along the direction by the longest of length, length / 2, ... that fools the network; (B,) tries."""
    def halve(carry):
        number, length, landed, hit, tries = carry
        tried = jnp.clip(x + over_pixels(length, x) * direction, threat.low, threat.high)
        landed = jnp.where(over_pixels(hit, x), landed, tried)
        return number + 1, length / 2, landed, hit | adversarial(tried), tries + ~hit

    none = jnp.zeros(len(x), bool)
    _, _, landed, hit, tries = jax.lax.while_loop(
        lambda c: (c[0] < 23) & ~jnp.all(c[3]), halve, (0, length, x, none, jnp.zeros(len(x), jnp.int32)))
    return jnp.where(over_pixels(hit, x), landed, x), tries

"""AutoAttack: several attacks without knobs, one after another on whom none before has fooled (Croce & Hein 2020)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dlcourse.adversarial import objectives
from dlcourse.adversarial import threat as threats
from dlcourse.adversarial.eot import Expectation
from dlcourse.adversarial.projections import inside_l1
from dlcourse.adversarial.threat import AttackResult, Threat, checked, example_keys
from dlcourse.contracts import InputError, Predict
from dlcourse.streams import stream

ATTACKS = {"apgd-ce": ("apgd", "apgd"), "apgd-dlr": ("apgd", "apgd"), "apgd-t": ("apgd", "apgd_t"),
           "fab": ("fab", "fab"), "fab-t": ("fab", "fab_t"), "square": ("square", "square")}
STANDARD = (("apgd-ce", {}), ("apgd-t", {"classes": 9}), ("fab-t", {"classes": 9}), ("square", {}))
STAGES = {
    ("standard", "linf"): STANDARD,
    ("standard", "l2"): STANDARD,
    ("standard", "l1"): (("apgd-ce", {"restarts": 5}), ("apgd-t", {"classes": 5}), *STANDARD[2:]),
    **{("plus", norm): (("apgd-ce", {"restarts": 5}), ("apgd-dlr", {"objective": "dlr", "restarts": 5}),
                        ("fab", {"restarts": 5}), ("square", {}), *STANDARD[1:3]) for norm in ("linf", "l2")},
    **{("rand", norm): (("apgd-ce", {}), ("apgd-dlr", {"objective": "dlr"})) for norm in ("linf", "l2")},
}


def autoattack(key, predict: Predict, images, labels, threat: Threat, *, targets=None, version: str = "standard",
               batch_size: int = 500) -> AttackResult:
    """The worst of all stages for every example: that which fools, else that of the largest margin.

    `standard` is APGD on cross-entropy, targeted APGD on DLR, targeted FAB, Square; for l1 with five restarts and five
    target classes (Croce & Hein 2021, section 5); `plus` adds untargeted APGD on DLR and FAB; `rand`, for networks
    that draw, is APGD on cross-entropy and on DLR in expectation (Croce & Hein 2020, section 6 and appendix). Where a
    network has fewer than ten classes, all wrong ones are aimed at.

    Between stages those who still stand are gathered into batches of at most three sizes, so this function itself is
    not to be traced; its stages are compiled, once a size.

    Args:
      key: (), or (N,) keys.
      predict: images -> logits, a pytree such as `evaluation.predictor` returns; for `rand` an `eot.Expectation`.
      images: (N,H,W,C) in the box.
      labels: (N,) the truth.
      threat: of norm linf, l2, or l1 (`standard` alone).
      targets: None; AutoAttack has its own.
      version: "standard", "plus" or "rand".
      batch_size: examples at a time.

    Raises:
      InputError: for another version or norm, given targets, fewer than 4 classes (`rand`: 3), `rand` without an
        Expectation, or what `threat.checked` refuses.
    """
    for _, found in autoattack_stages(key, predict, images, labels, threat, targets=targets, version=version,  # noqa: B007
                                      batch_size=batch_size):
        pass
    return found


def autoattack_stages(key, predict: Predict, images, labels, threat: Threat, *, targets=None,
                      version: str = "standard", batch_size: int = 500) -> Iterator[tuple[str, AttackResult]]:
    """(name, the worst so far) before all stages, as "clean", and after each; as of `autoattack`.

    What a stage returns is moved inside the threat and judged anew; what attacks a network that draws chose by its
    draws is judged by other draws.
    """
    classes = jax.eval_shape(predict, jnp.asarray(images[:1])).shape[-1]
    _check(predict, threat, targets, version, classes)
    checked(threat, images, labels)
    count = len(images)
    images, labels = np.asarray(images, np.float32), np.asarray(labels, np.int32)
    eps = np.broadcast_to(np.asarray(threat.eps, np.float32), count)
    keys = example_keys(key, count)
    sizes = bucket_sizes(min(batch_size, count))
    judge = predict.replace(key=stream(predict.key, "judge")) if isinstance(predict, Expectation) else predict

    def run(attack, name, kept, rows):
        for part, used in chunks(rows, sizes):
            given = (jnp.asarray(images[part]), jnp.asarray(labels[part]), threat.replace(eps=jnp.asarray(eps[part])))
            own = jax.vmap(lambda k: stream(k, name))(keys[part])
            reached, queries = attack(own, predict, *given)
            kept = _merged(kept, _judged(judge, reached, *given, queries), part[:used], used)
        return kept

    nothing = AttackResult(images, np.zeros(count, bool), np.full(count, -np.inf, np.float32),
                           np.zeros(count, np.float32), np.zeros(count, np.int32))
    kept = run(lambda key, predict, x, labels, threat: (x, jnp.zeros(len(x), jnp.int32)), "clean", nothing,
               np.arange(count))
    yield "clean", kept
    for name, settings in STAGES[version, threat.norm]:
        rows = np.flatnonzero(~kept.success)
        kept = run(_attack(name, settings, classes), name, kept, rows)
        yield name, kept


def bucket_sizes(size: int) -> tuple[int, ...]:
    """The batches that a stage may see: of `size`, a quarter and a sixteenth of it, smallest first."""
    return tuple(sorted({size, -(-size // 4), -(-size // 16)}))


def chunks(rows: np.ndarray, sizes: tuple[int, ...]) -> Iterator[tuple[np.ndarray, int]]:
    """(rows, how many of them count): the largest size while it can be filled, then the least that holds the rest.

    What is missing is filled with the first row again, which lasts no longer than it does once.
    """
    while len(rows):
        size = next((size for size in sizes if size >= len(rows)), sizes[-1])
        part, rows = rows[:size], rows[size:]
        yield np.concatenate([part, np.repeat(part[:1], size - len(part))]), len(part)


def _check(predict, threat, targets, version, classes):
    versions = tuple(dict.fromkeys(name for name, _ in STAGES))
    if version not in versions:
        raise InputError(f"version {version!r}: AutoAttack has {', '.join(versions)}")
    norms = [norm for name, norm in STAGES if name == version]
    if threat.norm not in norms:
        raise InputError(f"norm {threat.norm!r}: AutoAttack {version} has {', '.join(norms)}")
    if targets is not None:
        raise InputError("AutoAttack aims at classes of its own: for given targets take apgd")
    if version == "rand" and not isinstance(predict, Expectation):
        raise InputError("AutoAttack rand is for networks that draw: give an eot.Expectation, or take standard")
    least = least_classes(version, threat.norm)
    if classes < least:
        raise InputError(f"{classes} classes: AutoAttack {version} needs at least {least}")


def least_classes(version: str, norm: str) -> int:
    """What the DLR loss needs: 3 classes, 4 where it is targeted."""
    names = [name for name, _ in STAGES[version, norm]]
    return 4 if "apgd-t" in names else 3 if "apgd-dlr" in names else 2


def _attack(name, settings, classes):
    """(keys, predict, images, labels, threat) -> images reached, queries."""
    room, attack = ATTACKS[name]
    attack = getattr(importlib.import_module(f"dlcourse.adversarial.{room}"), attack)
    if "classes" in settings:
        settings = {**settings, "classes": min(settings["classes"], classes - 1)}

    def run(keys, predict, images, labels, threat):
        found = attack(keys, predict, images, labels, threat, **settings)
        return found.images, found.queries

    return run


@jax.jit
def _judged(predict, reached, images, labels, threat, queries):
    within = inside_l1 if threat.norm == "l1" else threats.inside
    reached = within(reached, images, threat)
    return threats.result(predict, reached, images, labels, threat, objectives.margin, queries)


def _merged(kept, found, rows, used):
    """`kept` with what is worse in `found`, whose first `used` examples are those of `rows`."""
    found = jax.tree.map(lambda leaf: np.asarray(leaf)[:used], found)
    better = ~kept.success[rows] & (found.success | (found.loss > kept.loss[rows]))
    queries = kept.queries.copy()
    queries[rows] += found.queries

    def put(old, new):
        merged = np.array(old)
        merged[rows[better]] = new[better]
        return merged

    return jax.tree.map(put, kept, found).replace(queries=queries)

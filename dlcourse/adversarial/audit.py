"""What makes a figure of robustness believable: every result measured anew, and signs that it might deceive.

    audit(key, predict, images, labels, threat, {"pgd": found, ...}, white=("pgd",), black=("square",))

returns what json.dumps takes. A sign that is flagged is no proof, but the figures should not be believed before its
advice was followed; one whose value is None was not looked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dlcourse.adversarial import masking
from dlcourse.adversarial import threat as threats
from dlcourse.adversarial.gradient import pgd
from dlcourse.adversarial.threat import AttackResult, Threat
from dlcourse.contracts import InputError, Predict
from dlcourse.streams import stream

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Sign:
    """Something that would make the figures doubtful.

    Attributes:
      name: of SIGNS.
      value: measured; None where there was nothing to measure it on.
      threshold: flagged where the value is greater, or is not a number.
      flagged: whether it is.
      advice: what the value is, and what to do where it is flagged.
    """

    name: str
    value: float | None
    threshold: float
    flagged: bool
    advice: str


SIGNS = {
    "norm_exceeded": "largest |x' - x| beyond eps, in units of float32's rounding: the attack leaves its threat; "
                     "mend it, its figures do not count",
    "box_exceeded": "largest distance outside of the box: clip images to it before success is judged",
    "success_misreported": "share whose reported success is not what the network says of the final image: judge "
                           "success on the image returned, with the network as it is deployed",
    "nonfinite": "share with logits, pixels or gradients that are not finite, on the images, the results or random "
                 "images within reach: attacks fail there for no good reason; mend the network's arithmetic",
    "lost_in_8_bits": "share of successes that rounding to 256 grey levels undoes: report the 8-bit figure, too, or "
                      "attack with a margin",
    "stochastic": "largest difference of logits between two calls, in standard deviations: attack the expectation "
                  "(EoT, AutoAttack's `rand`), and judge success over many calls",
    "batch_dependent": "largest difference of logits when half of the batch is away, in standard deviations: freeze "
                       "batch normalisation and noise",
    "quantised": "share whose logits do not change when every pixel moves by 1/16 grey level: the input is rounded; "
                 "let gradients pass the rounding (BPDA) and attack without gradients",
    "zero_gradient": "share with a gradient of zero in every pixel: replace what has no gradient (BPDA) and attack "
                     "without gradients (Square, SPSA, HopSkipJump)",
    "saturated_loss": "share whose cross-entropy has no gradient that float32 could resolve, while the margin has: "
                      "attack with the objective margin or dlr",
    "black_box_beats_white_box": "share fooled by black-box attacks alone: gradients mislead the white-box ones; "
                                 "look for what masks them, and count the worst case",
    "flat_curve": "largest share of the still right that survives a step to a larger eps, beyond the threat's: the "
                  "attack is stuck; more steps, another objective, other attacks",
    "survives_huge_eps": "accuracy at an eps that allows plain grey images: the attack fails, as nothing can be right "
                         "there; other objectives and attacks",
    "curve_rises": "largest rise of accuracy with eps: the attack does not use what it may; more steps and restarts",
    "restarts_gain": "share that only the later half of the restarts fools: more restarts and steps, until none",
    "order_violated": "share that withstands an attack, yet is fooled by a weaker one: count the worst case of both, "
                      "and give the stronger more steps",
    "certificate_broken": "share of certified images that an attack fooled: the certificate is unsound; mend it",
}


def audit(key, predict: Predict, images, labels, threat: Threat, results: Mapping[str, AttackResult], *,
          white: Sequence[str] = (), black: Sequence[str] = (), order: Sequence[str] = (),
          smallest: Sequence[str] = (), targets=None, certified=None, probe: Callable = pgd, restarts: int = 4,
          batch_size: int = 500) -> dict:
    """Measures the results of attacks anew, and the network for signs of masked gradients.

    Args:
      key: () for the probes.
      predict: images -> logits, as deployed; called outside of jit.
      images: (N,H,W,C), the originals.
      labels: (N,).
      threat: that the figures are about.
      results: an attack's name -> what it found for these images.
      white, black: names of those that use gradients, and of those that do not.
      order: names, the strongest first, as ("autoattack", "pgd", "fgsm").
      smallest: names of attacks for the smallest change, whose results may lie outside of the threat; these count as
        failures there.
      targets: (N,) where the attacks were targeted.
      certified: (N,) bool, or None.
      probe: an attack with random starts, for the accuracy-eps curve and the restarts; for threats of norm l1 and l0
        it is run on linf.
      restarts: of the probe, at least 2.
      batch_size: B.

    Returns:
      {"schema", "n", "threat", "clean": {"accuracy", "accuracy_8bit", "nonfinite"}, "attacks": {name: of `_measure`},
      "worst_case": {"accuracy", "accuracy_8bit", "certified"}, "curve": {"norm", "points"}, "restarts": accuracies,
      "signs": [Sign as a dict], "flagged": [names]}. Accuracies are shares of N; an attack succeeds by a finite
      prediction, on a finite image, within the threat, and NaN counts as its failure.

    Raises:
      InputError: names without results, or results of another number of images.
    """
    images, labels = np.asarray(images, np.float32), np.asarray(labels)
    _check(results, len(images), [*white, *black, *order, *smallest], restarts)
    clean = masking.logits(predict, images, batch_size)
    correct = masking.right(clean, labels)
    grey = masking.right(masking.logits(predict, masking.quantised(images, threat), batch_size), labels)
    found = {name: _measure(predict, result, images, labels, threat, targets, correct, grey, name in smallest,
                            batch_size) for name, result in results.items()}
    left, left_grey = {name: each.pop("left") for name, each in found.items()}, [e.pop("grey") for e in found.values()]
    wide = threat if threat.norm in ("linf", "l2") else threat.replace(norm="linf", eps=masking.huge(
        threat.replace(norm="linf"), images) / 4)
    points = masking.curve(stream(key, "curve"), probe, predict, images, labels, wide, batch_size)
    runs = masking.restarts(stream(key, "restarts"), probe, predict, images, labels, wide, restarts, batch_size)

    values = {name: _worst(each[name] for each in found.values())
              for name in ("norm_exceeded", "box_exceeded", "success_misreported", "lost_in_8_bits")}
    values |= _network(stream(key, "network"), predict, images, labels, threat, clean, batch_size)
    values["nonfinite"] = max([values["nonfinite"], *(each["nonfinite"] for each in found.values())])
    values |= _curve_signs(points, runs, wide, masking.huge(wide, images))
    values |= _comparisons(left, correct, white, black, order, certified)
    signs = [_sign(name, values[name], len(images)) for name in SIGNS]
    worst, worst_grey = np.all([correct, *left.values()], axis=0), np.all([grey, *left_grey], axis=0)
    return {
        "schema": SCHEMA, "n": len(images),
        "threat": {"norm": threat.norm, "eps": float(np.max(threat.eps)), "low": float(threat.low),
                   "high": float(threat.high)},
        "clean": {"accuracy": float(correct.mean()), "accuracy_8bit": float(grey.mean()),
                  "nonfinite": float((~np.isfinite(clean).all(-1)).mean())},
        "attacks": found,
        "worst_case": {"accuracy": float(worst.mean()), "accuracy_8bit": float(worst_grey.mean()),
                       "certified": None if certified is None else float(np.mean(certified))},
        "curve": {"norm": wide.norm, "points": points}, "restarts": runs,
        "signs": [dataclasses.asdict(sign) for sign in signs],
        "flagged": [sign.name for sign in signs if sign.flagged]}


def _check(results, count, names, restarts):
    for name in names:
        if name not in results:
            raise InputError(f"audit of {name!r}: no such result; there is {', '.join(results) or 'none'}")
    for name, result in results.items():
        if len(result.images) != count:
            raise InputError(f"audit of {name!r}: its {len(result.images)} images are not of these {count}")
    if restarts < 2:
        raise InputError(f"restarts={restarts}: the audit compares at least 2")


def norms(change: np.ndarray, norm: str) -> np.ndarray:
    """|change| of every example, (N,H,W,C) -> (N,), in float64 on the host."""
    flat = np.abs(np.asarray(change, np.float64)).reshape(len(change), -1)
    if norm == "l0":
        return np.any(np.asarray(change) != 0, axis=-1).reshape(len(change), -1).sum(-1).astype(np.float64)
    return {"linf": lambda: flat.max(-1), "l1": lambda: flat.sum(-1), "l2": lambda: np.sqrt((flat**2).sum(-1))}[norm]()


def _slack(threat, pixels):
    """What rounding each pixel, and eps itself, to float32 may add to a norm."""
    unit = 2.0**-23 * max(abs(float(threat.low)), abs(float(threat.high)))
    spread = {"linf": 1.0, "l2": math.sqrt(pixels), "l1": pixels, "l0": 0.0}[threat.norm]
    return unit * spread + 1e-5 * np.asarray(threat.eps, np.float64)


def _measure(predict, result, originals, labels, threat, targets, correct, correct_grey, smallest, batch_size):
    """An attack's figures, its own signs, and `left` and `grey`: (N,) bool, right despite it."""
    images = np.asarray(result.images, np.float32)
    change = np.asarray(images, np.float64) - originals
    eps, slack = np.asarray(threat.eps, np.float64), _slack(threat, math.prod(images.shape[1:]))
    size, finite = norms(change, threat.norm), np.isfinite(images).all((1, 2, 3))
    outside = np.max([float(threat.low) - images, images - float(threat.high)], axis=(0, 2, 3, 4))
    within = finite & (size <= eps + slack) & (outside <= 0)
    values = masking.logits(predict, images, batch_size)
    rounded = masking.logits(predict, masking.quantised(images, threat), batch_size)
    hit, hit_grey = (np.asarray(threats.fooled(jnp.asarray(logits), jnp.asarray(labels), targets))
                     for logits in (values, rounded))
    wrong, wrong_grey = (np.isfinite(v).all(-1) & (v.argmax(-1) != labels) for v in (values, rounded))
    ordered = np.sort(values, -1)
    # On the very boundary another batch size may round to the other side.
    decided = ~(ordered[:, -1] - ordered[:, -2] <= 1e-5 * np.abs(values).max(-1))
    success = within & hit
    claimed = success if smallest else finite & hit  # those count beyond eps as failures themselves
    if smallest:  # at eps itself rounding decides what they count
        decided &= ~(np.abs(size - eps) <= slack)
    excess = np.where(finite, np.maximum(size - eps, 0) / np.maximum(slack, 1e-300), 0)
    lost = float((success & ~hit_grey).sum() / max(success.sum(), 1))
    return {
        "claimed": float(np.mean(result.success)), "success": float(success.mean()),
        "success_8bit": float((within & hit_grey).mean()),
        "accuracy": float((correct & ~(within & wrong)).mean()),
        "accuracy_8bit": float((correct_grey & ~(within & wrong_grey)).mean()),
        "nonfinite": float((~finite | ~np.isfinite(values).all(-1)).mean()),
        "norm_median": float(np.median(size[success])) if success.any() else None,
        "norm_max": float(size[finite].max()) if finite.any() else None,
        "queries_mean": float(np.mean(result.queries)),
        "norm_exceeded": 0.0 if smallest else float(excess.max()),
        "box_exceeded": float(np.where(finite, np.maximum(outside, 0), 0).max()),
        "success_misreported": float(((np.asarray(result.success) != claimed) & decided).mean()),
        "lost_in_8_bits": None if smallest else lost,
        "left": correct & ~(within & wrong), "grey": correct_grey & ~(within & wrong_grey)}


def _network(key, predict, images, labels, threat, clean, batch_size):
    """Signs that the network shows without any attack."""
    again, half = masking.logits(predict, images, batch_size), max(1, min(batch_size, len(images)) // 2)
    apart = masking.logits(predict, images, half)
    slopes = masking.gradients(predict, images, labels, batch_size)
    far = threat.replace(norm="linf", eps=masking.huge(threat.replace(norm="linf"), images))
    keys = jax.random.split(stream(key, "far"), len(images))
    near = threat if threat.norm != "l0" else far
    reach = [np.asarray(threats.random_start(keys, jnp.asarray(images), reach)) for reach in (near, far)]
    broken = [~np.isfinite(masking.logits(predict, each, batch_size)).all(-1) for each in reach]
    broken.append(~np.isfinite(clean).all(-1))
    stochastic = masking.difference(clean, again)
    return {
        "stochastic": stochastic,
        # What differs between calls differs between batches as well.
        "batch_dependent": masking.difference(clean, apart) if stochastic <= THRESHOLDS["stochastic"] else None,
        "quantised": masking.unmoved(stream(key, "grey"), predict, images, threat, batch_size),
        "zero_gradient": slopes["zero"], "saturated_loss": slopes["saturated"],
        "nonfinite": float(max(slopes["nonfinite"], np.any(broken, axis=0).mean()))}


def _curve_signs(points, runs, threat, most):
    eps, accuracy = (np.array([point[name] for point in points]) for name in ("eps", "accuracy"))
    start = max(float(np.max(threat.eps)), most / 4)
    survive = [float(after / before) for at, before, after in zip(eps, accuracy, accuracy[1:], strict=False)
               if at >= start * (1 - 1e-6) and before > 0.05]
    half = len(runs) // 2
    return {"flat_curve": max(survive, default=0.0), "survives_huge_eps": float(accuracy[-1]),
            "curve_rises": float(max(np.diff(accuracy).max(), 0)), "restarts_gain": runs[half - 1] - runs[-1]}


def _comparisons(left, correct, white, black, order, certified):
    """Signs that show when attacks are compared image by image."""
    values = dict.fromkeys(("black_box_beats_white_box", "order_violated", "certificate_broken"))
    if white and black:
        white_left, black_left = (np.all([left[name] for name in names], axis=0) for names in (white, black))
        values["black_box_beats_white_box"] = float((white_left & ~black_left).mean())
    if len(order) > 1:
        values["order_violated"] = float(max((left[strong] & ~left[weak]).mean()
                                             for strong, weak in zip(order, order[1:], strict=False)))
    if certified is not None:
        held = np.all([correct, *left.values()], axis=0)
        values["certificate_broken"] = float((np.asarray(certified) & ~held).mean())
    return values


THRESHOLDS = dict.fromkeys(SIGNS, 0.0) | {
    "norm_exceeded": 1.0, "lost_in_8_bits": 0.25, "stochastic": 1e-3, "batch_dependent": 1e-3, "quantised": 0.05,
    "zero_gradient": 0.01, "saturated_loss": 0.05, "black_box_beats_white_box": 0.01, "flat_curve": 0.98,
    "survives_huge_eps": 0.01, "curve_rises": 0.02, "restarts_gain": 0.02, "order_violated": 0.01}
ONE_IS_CHANCE = ("black_box_beats_white_box", "survives_huge_eps", "curve_rises", "restarts_gain", "order_violated",
                 "zero_gradient")


def _sign(name, value, count):
    threshold = max(THRESHOLDS[name], 1 / count) if name in ONE_IS_CHANCE else THRESHOLDS[name]
    flagged = value is not None and not value <= threshold + 1e-9
    return Sign(name, value, threshold, bool(flagged), SIGNS[name])


def _worst(values):
    return max((value for value in values if value is not None), default=None)

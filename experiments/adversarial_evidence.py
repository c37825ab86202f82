"""What `adversarial_robustness` concludes from its attacks: claims, figures, tables, the audit."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dlcourse import streams
from dlcourse.adversarial import defences, gradient, masking, minimal
from dlcourse.adversarial.audit import audit
from dlcourse.adversarial.autoattack import STANDARD
from dlcourse.adversarial.evaluate import attacked, named
from dlcourse.adversarial.threat import Threat
from dlcourse.contracts import Claim, Evidence, InputError
from dlcourse.data import order
from dlcourse.reporting import attacks as drawings
from dlcourse.reporting import files
from dlcourse.reporting.run import read_result
from dlcourse.training import intervals
from experiments import adversarial_certificates as certificates
from experiments.adversarial_suite import (
    AFTER,
    BLACK,
    DRAWS,
    NOISE,
    SMALLEST,
    few,
    only,
    tabled,
    threat_of,
    worst,
)

SECTION = "Limit 2"
NEAREST = "fmn"
"""The attack of every network that looks for the smallest change beyond eps, too."""
SIZES = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the curves, in units of eps."""
GREY_LEVELS = 255
UNSEEN = 8
"""Grey levels that the field takes to be invisible (8/255, Madry et al. 2018 on CIFAR-10)."""
NOISE_LEVELS = (4, 8, 16, 32, 64, 128)
FITTED = 200
"""Training images that changes for all images are made from, and that single steps are compared on."""
ALIKE = ("norm", "attacked", "steps", "attacks", "eps")
"""What networks drawn beside each other share; under noise, whose deviation is eps, `noisy_copies` in its place."""


def chosen(split, seed: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """As many images of a split, (N,H,W,C) and (N,), drawn by the seed; 0: all."""
    rows = np.sort(order.permutation(len(split), seed, 0)[:wanted or None])
    batch = split[rows]
    return np.asarray(batch["image"], np.float32), np.asarray(batch["label"])


def claims(config, predict, images, labels, found, metrics) -> list[Claim]:
    """Those of L20, over the attacked images that the network is right about."""
    probabilities = np.asarray(jax.nn.softmax(predict(images)))
    right = probabilities.argmax(-1) == labels
    n = int(right.sum())
    if n < 10:
        return []
    flipped, by_noise = worst(found)[right], found[NOISE].success[right]
    gain, interval = intervals.paired_difference(flipped, by_noise)
    threat = f"{config.robustness.norm} {config.robustness.eps:g}"
    made = [Claim(
        "L20.fooled", SECTION, f"A change of at most {threat} gives most images another class; a random one does not.",
        interval[0] > 0.5, Evidence(float(flipped.mean()), float(by_noise.mean()), 0.5, interval, n),
        f"Share of images whose class changes: the worst of {len(found) - 1} attacks against the worst of {DRAWS} "
        f"random changes of each kind ({', '.join(gradient.KINDS)}) of the same norm, before the box cuts them. One "
        "network; the interval is over test images.")]
    made += surer(config, predict, images, labels, probabilities, right, found, metrics)
    return made + unseen(config, predict, images, labels, right, found, n)


def surer(config, predict, images, labels, before, right, found, metrics) -> list[Claim]:
    """Confidence in the wrong class at the end of an attack against that in the right class at its beginning."""
    fooled = right & found["pgd"].success
    if fooled.sum() < 10:
        return []
    target = np.asarray(predict(found["pgd"].images)).argmax(-1)[fooled]
    attack = functools.partial(gradient.pgd, steps=config.robustness.steps, early_stop=False)
    pushed = attacked(attack, named(streams.root(config.run.seed), "surer"), predict, images[fooled], labels[fooled],
                      threat_of(config), targets=target)
    after = np.asarray(jax.nn.softmax(predict(pushed.images)))[np.arange(fooled.sum()), target]
    was = before[fooled, labels[fooled]]
    interval = intervals.mean_interval(after - was)
    metrics |= {"pgd/confidence_wrong": float(after.mean()), "pgd/confidence_before": float(was.mean())}
    return [Claim("L20.surer", SECTION, "The network is surer of the wrong class than it was of the right one.",
                  interval[0] > 0, Evidence(float(after.mean()), float(was.mean()), 0.0, interval, int(fooled.sum())),
                  "Mean probabilities over the images that PGD fooled; it then goes on towards the class that they "
                  "were taken for, within the same eps.")]


def unseen(config, predict, images, labels, right, found, n) -> list[Claim]:
    """The largest pixel of the nearest image that fools, in grey levels, against that of noise that does."""
    if config.robustness.norm != "linf":
        return []
    nearest = np.min([how_far(found, name) for name in found if name != NOISE], axis=0)[right]
    nothing = int(np.isinf(nearest).sum())
    levels = np.sort(GREY_LEVELS * np.minimum(nearest, 1.0))
    # Order statistics: the ranks between which a median lies with 95 %.
    reach = intervals.Z * np.sqrt(n) / 2
    low, high = levels[max(0, int(n / 2 - reach))], levels[min(n - 1, int(np.ceil(n / 2 + reach)))]
    value = float(np.median(levels))
    share = float(np.mean(levels <= UNSEEN))
    by_noise = np.full(len(labels), float(GREY_LEVELS))
    for size in NOISE_LEVELS[::-1]:
        result = attacked(functools.partial(gradient.noise, draws=DRAWS, kind="sign"),
                          named(streams.root(config.run.seed), "unseen"), predict, images, labels,
                          Threat(eps=size / GREY_LEVELS))
        by_noise[result.success] = size
    control = float(np.median(by_noise[right]))
    return [Claim("L20.unseen", SECTION,
                  f"The smallest change that gives another class is less than {UNSEEN} grey levels.",
                  bool(high < UNSEEN) and control > high,
                  Evidence(value, control, float(UNSEEN), (float(low), float(high)), n),
                  f"Median over images, in levels of 255, of the nearest image that any attack finds, FMN among them; "
                  f"{share:.0%} of images are nearer than {UNSEEN}; where none finds any ({nothing} of {n}) it counts "
                  f"as {GREY_LEVELS}. Control: the smallest of {', '.join(map(str, NOISE_LEVELS))} levels at "
                  f"which one of {DRAWS} draws of a random sign in every pixel does it, {GREY_LEVELS} where none does. "
                  "The interval is that of the value.")]


CURVES = (NOISE, "fgsm", "pgd", "apgd", "apgd_dlr")
"""Attacks that are run anew at every size; the curve of NEAREST follows from the sizes that it found."""


def draw(config, run, predict, images, labels, class_names, found, metrics) -> None:
    """Accuracy by the size of the change, images before and after, and one after the single step of the panda."""
    key, attacks = streams.root(config.run.seed), few(config, len(class_names))
    clean = masking.right(np.asarray(predict(images)), labels)
    curves = {name: [float(clean.mean())] for name in (*CURVES, NEAREST) if name in found}
    for factor in SIZES[1:]:
        threat = threat_of(config, factor, images.shape[1:])
        for name in curves:
            fooled = how_far(found, name) <= threat.eps if name == NEAREST else attacked(
                attacks[name], named(key, name), predict, images, labels, threat).success
            curves[name].append(float((clean & ~fooled).mean()))
            metrics[f"{name}/accuracy_at_{factor:g}_eps"] = curves[name][-1]
    unit = GREY_LEVELS if config.robustness.norm == "linf" else 1
    name = {"linf": "grey levels of 255 (L-infinity)", "l2": "L2, pixels in [0, 1]", "l1": "L1, pixels in [0, 1]"}
    sizes = [unit * float(threat_of(config, factor, images.shape[1:]).eps) for factor in SIZES]
    run.figure("accuracy_by_size", **drawings.accuracy_by_size(sizes, curves, (NOISE,), name[config.robustness.norm],
                                                               len(labels)))
    surest = functools.partial(_surest, run, config, predict, images, clean, class_names)
    surest("strips", found["pgd"], 6, f"PGD with {config.robustness.steps} steps")
    surest("panda", found["fgsm"], 1, "One step of eps along the sign of the gradient (FGSM), as the panda that became "
           "a gibbon in Goodfellow et al. 2015, figure 1")


def _surest(run, config, predict, images, clean, class_names, name, result, count, how) -> None:
    """A figure of those images that an attack fooled of which the network is surest afterwards."""
    before, after = (np.asarray(jax.nn.softmax(predict(x))) for x in (images, result.images))
    fooled = np.flatnonzero(clean & result.success)
    rows = fooled[np.argsort(-after[fooled].max(-1), kind="stable")][:count]
    if not len(rows):
        return
    verdicts = [[drawings.verdict(class_names[p[i].argmax()], p[i].max()) for i in rows] for p in (before, after)]
    largest = max(float(np.abs(result.images[rows] - images[rows]).max()), 1e-6)
    run.figure(name, **drawings.strips(
        images[rows], result.images[rows], *verdicts, 0.5 / largest,
        f"An image, a change of at most {config.robustness.eps:g} ({config.robustness.norm}), and their sum.",
        f"{how}; of the {len(fooled)} images that it fooled those where the network is surest of the wrong class."))


def how_far(found, name) -> np.ndarray:
    """(N,) sizes of the changes by which an attack fooled the network, infinite where it did not."""
    result = found[name]
    return np.asarray(minimal.distances(result)) if name == NEAREST else np.where(result.success, result.norm, np.inf)


def table(config, labels, right, found, metrics, unknown: str = "") -> dict:
    """One row an attack; `unknown` says why there are no certificates."""
    def row(name, *more):
        accuracy, low, high = (100 * metrics[f"{name}/accuracy{end}"] for end in ("", "_low", "_high"))
        return [name, f"{accuracy:.1f} %", f"{low:.1f} to {high:.1f}", *more]

    def size(name):
        reached = how_far(found, name)[right]
        return f"{np.median(reached[np.isfinite(reached)]):.4g}" if np.isfinite(reached).any() else "–"

    rows = [row(name, size(name), f"{float(result.queries.mean()):.0f}") for name, result in found.items()]
    proved = (certificates.IBP, certificates.CROWN_IBP, certificates.WHOLE, certificates.ALPHA, "smoothed")
    rows += [row(name, "", "") for name in (*(AFTER + stage for stage, _ in STANDARD), "worst", *proved)
             if f"{name}/accuracy" in metrics]
    return {"title": f"Accuracy under attack, {config.robustness.norm} {config.robustness.eps:g}",
            "header": ["attack", "accuracy", "95 % interval", "median size where it fooled", "mean queries"],
            "rows": rows,
            "note": f"Over {len(labels)} test images; the first row is the control, worst counts all attacks together. "
                    "FMN looks for the nearest image, which may lie beyond the bound; there it does not count. "
                    "Sizes are of images that were right. "
                    + (f"Nothing is certified: {unknown}." if unknown else
                       "Certified: proved by CROWN-IBP for these images and, where any are, for those of the whole "
                       "test split.")}


def finished(config) -> dict[str, dict]:
    """The metrics of the runs that are to stand beside this one, by folder's name.

    Raises:
      InputError: no finished run there, one of other data, another threat or other attacks (under noise: without
        noise, or of another number of copies), or two folders of one name.
    """
    found, alike = {}, ALIKE
    if config.robustness.defence == "gaussian":
        alike = (*ALIKE[:-1], "defence", "noisy_copies")
    for folder in filter(None, config.robustness.beside.split(",")):
        result = read_result(folder)
        if result is None or result["experiment"] != "adversarial_robustness":
            raise InputError(f"--beside={folder}: no finished run of adversarial_robustness")
        there, here = result["config"], files.plain(dataclasses.asdict(config))
        for concern, name in (("data", "dataset"), *(("robustness", name) for name in alike)):
            if there[concern][name] != here[concern][name]:
                raise InputError(f"--beside={folder}: its {name} is {there[concern][name]}, here it is "
                                 f"{here[concern][name]}")
        if Path(folder).name in found:
            raise InputError(f"--beside={folder}: another one there is called {Path(folder).name}, too; rename one")
        found[Path(folder).name] = result["metrics"]
    return found


def trade_off(config, run, others, metrics, n) -> None:
    """Accuracy against accuracy under attack, of this network and of those beside it."""
    if config.robustness.defence == "gaussian":  # whose threats differ
        return
    networks = {**others, "this one": metrics}
    points = {name: tuple(each[f"{part}/accuracy"] for part in ("test", "worst")) for name, each in networks.items()}
    if others:
        run.figure("trade_off", **drawings.trade_off(points, f"{config.robustness.norm} {config.robustness.eps:g}", n))


def overfitting(config, predict, split) -> dict[str, float]:
    """Accuracy on training images under one step and under ten, and the alarm of catastrophic overfitting.

    For training by single steps, or few large ones (Wong et al. 2020, section 5.4). The alarm is a line on stderr.
    """
    images, labels = chosen(split, config.run.seed, FITTED)
    gap = defences.single_step_gap(named(streams.root(config.run.seed), "gap"), predict, jnp.asarray(images),
                                   jnp.asarray(labels), threat_of(config))
    gap = {name: float(value) for name, value in gap.items()}
    if defences.overfitted(gap["gap"]) and jax.process_index() == 0:
        print(f"alarm: catastrophic overfitting: on training images accuracy is {100 * gap['fgsm_accuracy']:.0f} % "
              f"under one step and {100 * gap['pgd_accuracy']:.0f} % under ten; train with --defence=pgd and more "
              "--defence_steps, or less long", file=sys.stderr, flush=True)
    return gap


def audited(config, predict, images, labels, found, certified, metrics) -> dict:
    """The audit of all results but the control's, as JSON."""
    result = _audit(config, predict, images, labels, found, certified)
    metrics |= {"audit/flagged": float(len(result["flagged"])),
                "audit/worst_case_accuracy": result["worst_case"]["accuracy"],
                "audit/worst_case_accuracy_8bit": result["worst_case"]["accuracy_8bit"]}
    return result


def audited_all(config, predict, images, labels, found, rest, certified) -> dict:
    """The audit of all attacks there are within the threat, on the images that the `rest` of them had."""
    some = tabled(config, labels)
    return _audit(config, predict, images[some], labels[some], {**only(found, some), **rest},
                  None if certified is None else certified[some])


def _audit(config, predict, images, labels, found, certified) -> dict:
    found = {name: one for name, one in found.items() if name != NOISE}
    black = [name for name in BLACK if name in found]
    order = [name for name in ("autoattack", "pgd", "fgsm") if name in found]
    return audit(named(streams.root(config.run.seed), "audit"), predict, images, labels, threat_of(config), found,
                 white=[name for name in found if name not in (*black, "autoattack")], black=black, order=order,
                 smallest=[name for name in ("fab", NEAREST, *SMALLEST) if name in found], certified=certified)


def signs(audited: dict, what: str = "these figures") -> dict:
    """The audit's signs as a table."""
    rows = [[sign["name"], "–" if sign["value"] is None else f"{sign['value']:.4g}", f"{sign['threshold']:.4g}",
             "FLAGGED" if sign["flagged"] else "–" if sign["value"] is None else "ok", sign["advice"]]
            for sign in audited["signs"]]
    return {"title": f"Audit: signs that {what} might deceive",
            "header": ["sign", "value", "flagged above", "", "what it is, and what to do where it is flagged"],
            "rows": rows, "note": "All of it, with every attack measured anew, is in audit.json."}

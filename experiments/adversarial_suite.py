"""What `adversarial_robustness` runs: a few attacks on every network; all there are, and corruptions, where asked."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dlcourse import streams
from dlcourse.adversarial import corruptions, gradient, masking, minimal, patch, spatial, universal
from dlcourse.adversarial.apgd import apgd
from dlcourse.adversarial.autoattack import autoattack_stages, least_classes
from dlcourse.adversarial.carlini_wagner import carlini_wagner
from dlcourse.adversarial.ddn import ddn
from dlcourse.adversarial.decision import boundary, hop_skip_jump
from dlcourse.adversarial.deepfool import deepfool
from dlcourse.adversarial.ead import ead
from dlcourse.adversarial.estimated import nes, spsa
from dlcourse.adversarial.evaluate import attacked, named
from dlcourse.adversarial.fab import fab
from dlcourse.adversarial.fmn import fmn
from dlcourse.adversarial.square import square
from dlcourse.adversarial.threat import Threat, better_of, checked, size, width
from dlcourse.contracts import InputError
from dlcourse.data import order
from dlcourse.training import intervals

NOISE = "noise"
DRAWS = 20
TABLED = 100
"""Images of the table of all attacks, at most: those that see decisions alone ask thousands of times for each."""
MCE = "corruption/mce_against_"
TARGET = 0
"""The class that the patch is made for."""
SMALLEST = {"deepfool": ("l2", "linf"), "ddn": ("l2",), "carlini_wagner": ("l2",), "boundary": ("l2",),
            "hop_skip_jump": ("l2", "linf"), "ead": ("l1",), "fmn (l1)": ("l1",), "fmn (l0)": ("l0",)}
"""The norms of attacks for the smallest change; they are run in the threat's, or where they lack it in the first."""
BLACK = ("square", "spsa", "nes", "boundary", "hop_skip_jump")
"""Attacks that see no gradients."""
AFTER = "autoattack after "


def threat_of(config, factor: float = 1.0, shape: tuple[int, int, int] = ()) -> Threat:
    """The threat, with `factor` times its eps; not beyond the box, where the `shape` of images is given."""
    threat = Threat(eps=config.robustness.eps * factor, norm=config.robustness.norm)
    return threat.replace(eps=min(threat.eps, width(threat, shape))) if shape else threat


def control(key, predict, images, labels, threat, *, targets=None):
    """The worst of DRAWS changes of each kind of noise."""
    found = None
    for kind in gradient.KINDS:
        one = gradient.noise(key, predict, images, labels, threat, targets=targets, draws=DRAWS, kind=kind)
        found = one if found is None else better_of(one, found)[0].replace(queries=found.queries + one.queries)
    return found


def few(config, classes: int) -> dict:
    """Attack by name, weakest first; noise is the control."""
    steps = config.robustness.steps
    attacks = {NOISE: control,
               "fgsm": gradient.fgsm,
               "pgd": functools.partial(gradient.pgd, steps=steps, restarts=2),
               "apgd": functools.partial(apgd, steps=steps)}
    if classes >= 3:
        attacks["apgd_dlr"] = functools.partial(apgd, steps=steps, objective="dlr")
    return attacks | {"fab": functools.partial(fab, steps=steps), "square": functools.partial(square, queries=1000)}


def others() -> dict:
    """The attacks of an image at a time that only `--attacks=all` runs, by name: (attack, what it sees)."""
    return {"n_fgsm": (gradient.n_fgsm, "gradients"),
            "deepfool": (deepfool, "gradients"),
            "ddn": (ddn, "gradients"),
            "carlini_wagner": (functools.partial(carlini_wagner, steps=500, rounds=5), "gradients"),
            "ead": (functools.partial(ead, steps=500, rounds=5), "gradients"),
            "fmn (l1)": (fmn, "gradients"),
            "fmn (l0)": (fmn, "gradients"),
            "spsa": (functools.partial(spsa, steps=20, pairs=64), "logits"),
            "nes": (functools.partial(nes, steps=40), "logits"),
            "boundary": (functools.partial(boundary, steps=2000), "the class"),
            "hop_skip_jump": (functools.partial(hop_skip_jump, steps=10, most_draws=1000), "the class")}


SHORT = ("Carlini-Wagner and EAD 5 rounds of 500 steps, SPSA 20 steps of 64 pairs, NES 40 steps, Boundary 2000 steps, "
         "HopSkipJump 10")


def check(config, dataset, images, labels) -> None:
    """Raises InputError, before anything is trained, for what cannot be attacked."""
    checked(threat_of(config), jnp.asarray(images), jnp.asarray(labels), classes=dataset.num_classes)
    least = least_classes("standard", config.robustness.norm)
    if config.robustness.attacks != "few" and dataset.num_classes < least:
        raise InputError(f"--attacks={config.robustness.attacks}: AutoAttack needs at least {least} classes, "
                         f"{dataset.name} has {dataset.num_classes}; take --attacks=few")


def finite(predict, images) -> None:
    """Raises InputError where a trained network's logits are not finite: there is nothing to attack."""
    logits = np.asarray(predict(images))
    broken = int((~np.isfinite(logits).all(-1)).sum())
    if broken:
        raise InputError(f"the logits of {broken} of {len(logits)} images are not finite, there is nothing to attack: "
                         "train with a smaller --learning_rate, or with --clip=1")


def run(config, predict, images, labels, metrics) -> dict:
    """Results of the few by attack's name, among them "fmn", the nearest images; accuracies go to `metrics`."""
    logits = np.asarray(predict(images))
    right, classes = masking.right(logits, labels), logits.shape[-1]
    key = streams.root(config.run.seed)
    found = {name: attacked(attack, named(key, name), predict, images, labels, threat_of(config))
             for name, attack in few(config, classes).items()}
    if config.robustness.attacks != "few":
        keys = jax.vmap(lambda i: jax.random.fold_in(named(key, "autoattack"), i))(jnp.arange(len(labels)))
        for stage, result in autoattack_stages(keys, predict, images, labels, threat_of(config)):
            if stage != "clean":
                metrics |= scores(AFTER + stage, right & ~result.success)
        found["autoattack"] = jax.tree.map(np.asarray, result)
    found["fmn"] = attacked(fmn, named(key, "fmn"), predict, images, labels, threat_of(config))
    for name, result in found.items():
        metrics |= scores(name, right & ~result.success)
    metrics |= scores("worst", right & ~worst(found))
    return found


def worst(found) -> np.ndarray:
    """(N,) whether any attack fooled the network."""
    return np.any([result.success for name, result in found.items() if name != NOISE], axis=0)


def scores(name: str, right: np.ndarray) -> dict[str, float]:
    """Accuracy with its interval, as metrics of an attack."""
    low, high = intervals.wilson(int(right.sum()), len(right))
    return {f"{name}/accuracy": float(right.mean()), f"{name}/accuracy_low": low, f"{name}/accuracy_high": high}


def tabled(config, labels) -> np.ndarray:
    """Which images the table of all attacks is of."""
    return np.sort(order.permutation(len(labels), config.run.seed, 0)[:TABLED])


def only(found: dict, some) -> dict:
    """The results of these images alone."""
    return {name: jax.tree.map(lambda leaf: np.asarray(leaf)[some], result) for name, result in found.items()}


def all_of_them(config, predict, images, labels, fitting, metrics) -> tuple[dict, dict]:
    """The table of the attacks that the few leave out, each in its own norm or by what else it may do; their results.

    Results are those of attacks in the threat's norm.

    Args:
      config: of the experiment.
      predict: images -> logits, a pytree.
      images, labels: attacked; at most TABLED of them are, drawn by the seed.
      fitting: (images, labels) that the universal change and the patch are made from, none of those above.
      metrics: to add accuracies to.
    """
    some, results = tabled(config, labels), {}
    key, images, labels = streams.root(config.run.seed), images[some], labels[some]
    clean = masking.right(np.asarray(predict(images)), labels)
    rows = [["none", "", "", *_accuracy(clean), "", ""]]
    threat = threat_of(config)
    for name, (attack, sees) in others().items():
        norms = SMALLEST.get(name, (threat.norm,))
        norm = threat.norm if threat.norm in norms else norms[0]
        found = attacked(attack, named(key, name), predict, images, labels, threat.replace(norm=norm))
        smallest = np.asarray(minimal.distances(found))[clean] if name in SMALLEST else found.norm[clean]
        within = norm == threat.norm
        if within:
            results[name] = found
            metrics |= scores(name, clean & ~found.success)
        metrics[f"{name}/median_size"] = float(np.median(smallest))
        rows.append([name, norm if name in SMALLEST else f"{norm} {float(threat.eps):g}", sees,
                     *(_accuracy(clean & ~found.success) if within else ("", "")), f"{np.median(smallest):.4g}",
                     f"{found.queries.mean():.0f}"])
    rows += _of_all_images(key, predict, images, labels, clean, fitting, threat, metrics)
    table = {"title": "All other attacks",
             "header": ["attack", "what it may do", "it sees", "accuracy", "95 % interval", "median size", "queries"],
             "rows": rows,
             "note": f"Over {len(labels)} test images. Sizes are medians over those that were right, in an attack's "
                     "own norm; an accuracy stands where that is the threat's. Searches are shorter than published: "
                     f"{SHORT}. The universal change and the patch were made from {len(fitting[1])} training images."}
    return table, results


def _of_all_images(key, predict, images, labels, clean, fitting, threat, metrics) -> list[list[str]]:
    """Rows of attacks that are no small change of one image: one change for all, a patch, turning and shifting."""
    fit, fit_labels = (jnp.asarray(each) for each in fitting)
    change = universal.universal(named(key, "universal"), predict, fit, fit_labels, threat)
    random = jax.random.rademacher(named(key, "random"), change.shape, change.dtype)
    random *= threat.eps / size(random[None], threat.norm)[0]
    right = {name: clean & ~np.asarray(universal.applied(each, predict, images, jnp.asarray(labels), threat).success)
             for name, each in {"universal": change, "random universal": random}.items()}
    learnt, _ = patch.learn(named(key, "patch"), predict, fit, jnp.asarray(TARGET))
    others = labels != TARGET
    for name, each in {"patch": learnt, "grey patch": jnp.full_like(learnt, 0.5)}.items() if others.any() else ():
        right[name] = ~np.asarray(patch.hits(named(key, "patch"), predict, images, jnp.asarray(TARGET), each))[others]
    turn = functools.partial(spatial.grid, angles=13)
    right["spatial"] = clean & ~attacked(turn, named(key, "spatial"), predict, images, labels, threat).success
    said = {"universal": (f"{threat.norm} {float(threat.eps):g}, the same for all", "gradients"),
            "random universal": ("control: the same of random signs", "nothing"),
            "patch": (f"a patch, anywhere, for class {TARGET}; right: not taken for it", "gradients"),
            "grey patch": ("control: the same of middle grey", "nothing"),
            "spatial": ("turn by 30 degrees, shift by 3 pixels", "the class")}
    for name, each in right.items():
        metrics |= scores(name.replace(" ", "_"), each)
    return [[name, *said[name], *_accuracy(each), "", ""] for name, each in right.items()]


def corrupted(config, predict, images, labels, others, metrics) -> dict:
    """The table of the common corruptions: errors by severity, and mCE against every run beside that measured them."""
    found = corruptions.errors(named(streams.root(config.run.seed), "corruptions"), predict, images, labels)
    metrics |= {_error(name, severity): float(error) for name, errors in found.items()
                for severity, error in zip(corruptions.SEVERITIES, errors, strict=True)}
    metrics["corruption/mean_error"] = float(np.mean(list(found.values())))
    for run, theirs in others.items():
        reference = {name: [theirs.get(_error(name, severity), 0.0) for severity in corruptions.SEVERITIES]
                     for name in found}
        if all(map(any, reference.values())):
            metrics[MCE + run] = corruptions.mean_corruption_error(found, reference)
    mces = [["mCE", *[""] * 5, f"{100 * value:.1f} % of {name.removeprefix(MCE)}"] for name, value in metrics.items()
            if name.startswith(MCE)]
    return {"title": "Common corruptions: share misclassified",
            "header": ["corruption", *(f"severity {severity}" for severity in corruptions.SEVERITIES), "mean"],
            "rows": [*([name, *(f"{100 * error:.1f} %" for error in (*errors, errors.mean()))]
                       for name, errors in found.items()),
                     ["all", *[""] * 5, f"{100 * metrics['corruption/mean_error']:.1f} %"], *mces],
            "note": f"Over {len(labels)} test images, each damaged once (Hendrycks & Dietterich 2019). mCE is the mean "
                    "of the ratios to the errors of another network, a run given to --beside."}


def _error(name: str, severity: int) -> str:
    return f"corruption/{name}_{severity}"


def _accuracy(right) -> tuple[str, str]:
    low, high = intervals.wilson(int(np.sum(right)), len(right))
    return f"{100 * np.mean(right):.1f} %", f"{100 * low:.1f} to {100 * high:.1f}"

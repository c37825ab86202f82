"""What `adversarial_robustness` attacks with, and its claims, figures and tables."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dlcourse import streams
from dlcourse.adversarial import bounds, gradient, minimal
from dlcourse.adversarial.apgd import apgd
from dlcourse.adversarial.audit import audit
from dlcourse.adversarial.autoattack import autoattack
from dlcourse.adversarial.evaluate import attacked, named
from dlcourse.adversarial.fab import fab
from dlcourse.adversarial.fmn import fmn
from dlcourse.adversarial.square import square
from dlcourse.adversarial.threat import Threat, checked
from dlcourse.contracts import Claim, Evidence, InputError
from dlcourse.data import order
from dlcourse.reporting import attacks as drawings
from dlcourse.training import intervals

SECTION = "Limit 2"
NOISE = "noise"
DRAWS = 20
CERTIFIED = 50
"""Images that are certified at a time: bounds take far more memory than images."""
SIZES = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the curves, in units of eps."""
GREY_LEVELS = 255
UNSEEN = 8
"""Grey levels that the field takes to be invisible (8/255, Madry et al. 2018 on CIFAR-10)."""
NOISE_LEVELS = (4, 8, 16, 32, 64, 128)


def chosen(split, config) -> tuple[np.ndarray, np.ndarray]:
    """The test images that are attacked, (N,H,W,C) and (N,)."""
    wanted = min(config.robustness.attacked or len(split), len(split))
    rows = np.sort(order.permutation(len(split), config.run.seed, 0)[:wanted])
    batch = split[rows]
    return np.asarray(batch["image"], np.float32), np.asarray(batch["label"])


def threat_of(config, factor: float = 1.0) -> Threat:
    eps = config.robustness.eps * factor
    return Threat(eps=min(eps, 1.0) if config.robustness.norm == "linf" else eps, norm=config.robustness.norm)


def suite(config, classes: int) -> dict:
    """Attack by name, weakest first; noise is the control."""
    steps = config.robustness.steps
    attacks = {NOISE: functools.partial(gradient.noise, draws=DRAWS),
               "fgsm": gradient.fgsm,
               "pgd": functools.partial(gradient.pgd, steps=steps, restarts=2),
               "apgd": functools.partial(apgd, steps=steps)}
    if classes >= 3:
        attacks["apgd_dlr"] = functools.partial(apgd, steps=steps, objective="dlr")
    return attacks | {"fab": functools.partial(fab, steps=steps), "square": functools.partial(square, queries=1000)}


def run_attacks(config, predict, images, labels, metrics) -> dict:
    """Results by attack's name, among them "fmn", the nearest images; accuracies go to `metrics`."""
    classes = predict(images[:1]).shape[-1]
    checked(threat_of(config), jnp.asarray(images), jnp.asarray(labels), classes=classes)
    key = streams.root(config.run.seed)
    found = {name: attacked(attack, named(key, name), predict, images, labels, threat_of(config))
             for name, attack in suite(config, classes).items()}
    if config.robustness.autoattack:
        keys = jax.vmap(lambda i: jax.random.fold_in(named(key, "autoattack"), i))(jnp.arange(len(labels)))
        result = autoattack(keys, predict, jnp.asarray(images), jnp.asarray(labels), threat_of(config))
        found["autoattack"] = jax.tree.map(np.asarray, result)
    found["fmn"] = attacked(fmn, named(key, "fmn"), predict, images, labels, threat_of(config))
    for name, result in found.items():
        metrics |= scores(name, ~result.success)
    metrics |= scores("worst", ~worst(found))
    return found


def worst(found) -> np.ndarray:
    """(N,) whether any attack fooled the network."""
    return np.any([result.success for name, result in found.items() if name != NOISE], axis=0)


def scores(name: str, right: np.ndarray) -> dict[str, float]:
    """Accuracy with its interval, as metrics of an attack."""
    low, high = intervals.wilson(int(right.sum()), len(right))
    return {f"{name}/accuracy": float(right.mean()), f"{name}/accuracy_low": low, f"{name}/accuracy_high": high}


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
        "random changes of the same norm. One network; the interval is over test images.")]
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
    distance = np.asarray(minimal.distances(found["fmn"]))[right]
    levels = np.sort(GREY_LEVELS * distance)
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
                  f"Median over images, in levels of 255, of the nearest image that FMN finds; {share:.0%} of images "
                  f"are nearer than {UNSEEN}. Control: the smallest of {', '.join(map(str, NOISE_LEVELS))} levels at "
                  f"which one of {DRAWS} draws of a random sign in every pixel does it, {GREY_LEVELS} where none does. "
                  "The interval is that of the value.")]


CURVES = (NOISE, "fgsm", "pgd", "apgd")


def draw(config, run, predict, images, labels, class_names, found, metrics) -> None:
    """Accuracy by the size of the change, and images before and after."""
    key, attacks = streams.root(config.run.seed), suite(config, len(class_names))
    clean = np.asarray(predict(images)).argmax(-1) == labels
    curves = {name: [float(clean.mean())] for name in CURVES}
    for factor in SIZES[1:]:
        for name in CURVES:
            result = attacked(attacks[name], named(key, name), predict, images, labels, threat_of(config, factor))
            curves[name].append(float(1 - result.success.mean()))
            metrics[f"{name}/accuracy_at_{factor:g}_eps"] = curves[name][-1]
    unit = GREY_LEVELS if config.robustness.norm == "linf" else 1
    name = {"linf": "grey levels of 255 (L-infinity)", "l2": "L2, pixels in [0, 1]"}
    sizes = [unit * float(threat_of(config, factor).eps) if factor else 0.0 for factor in SIZES]
    run.figure("accuracy_by_size", **drawings.accuracy_by_size(sizes, curves, (NOISE,), name[config.robustness.norm],
                                                               len(labels)))
    before, after = (np.asarray(jax.nn.softmax(predict(x))) for x in (images, found["pgd"].images))
    fooled = np.flatnonzero(clean & found["pgd"].success)
    rows = fooled[np.argsort(-after[fooled].max(-1), kind="stable")][:6]
    if len(rows):
        verdicts = [[drawings.verdict(class_names[p[i].argmax()], p[i].max()) for i in rows] for p in (before, after)]
        largest = max(float(np.abs(found["pgd"].images[rows] - images[rows]).max()), 1e-6)
        run.figure("strips", **drawings.strips(
            images[rows], found["pgd"].images[rows], *verdicts, 0.5 / largest,
            f"An image, a change of at most {config.robustness.eps:g} ({config.robustness.norm}), and their sum.",
            f"PGD with {config.robustness.steps} steps; of the {len(fooled)} images that it fooled those where the "
            "network is surest of the wrong class."))


def table(config, labels, found, metrics) -> dict:
    """One row an attack."""
    def row(name, *more):
        accuracy, low, high = (100 * metrics[f"{name}/accuracy{end}"] for end in ("", "_low", "_high"))
        return [name, f"{accuracy:.1f} %", f"{low:.1f} to {high:.1f}", *more]

    rows = [row(name, f"{float(np.median(result.norm)):.4g}", f"{float(result.queries.mean()):.0f}")
            for name, result in found.items()]
    return {"title": f"Accuracy under attack, {config.robustness.norm} {config.robustness.eps:g}",
            "header": ["attack", "accuracy", "95 % interval", "median size of the change", "mean queries"],
            "rows": [*rows, row("worst", "", "")],
            "note": f"Over {len(labels)} test images; the first row is the control, the last one the worst of all "
                    "others. FMN looks for the nearest image, which may lie beyond the bound; there it does not count."}


def certify(config, predict, images, labels, metrics) -> np.ndarray | None:
    """(N,) images whose class no change within the threat can alter, proved by CROWN-IBP; None for unknown networks."""
    proved = []
    try:
        for low in range(0, len(labels), CERTIFIED):
            rows = np.minimum(np.arange(low, low + CERTIFIED), len(labels) - 1)
            x, y = jnp.asarray(images[rows]), jnp.asarray(labels[rows])
            below = bounds.crown(predict, x, y, threat_of(config), intermediate="ibp")
            proved.append(np.asarray(bounds.certified(below, y)))
    except InputError:  # an operation of this network that the bounds do not know
        return None
    found = np.concatenate(proved)[: len(labels)]
    metrics |= scores("certified", found)
    return found


def audited(config, predict, images, labels, found, certified, metrics) -> dict:
    """The audit of all results but the control's, as JSON."""
    white = [name for name in found if name in ("fgsm", "pgd", "apgd", "apgd_dlr", "fab", "fmn")]
    order = [name for name in ("autoattack", "pgd", "fgsm") if name in found]
    result = audit(named(streams.root(config.run.seed), "audit"), predict, images, labels, threat_of(config),
                   {name: one for name, one in found.items() if name != NOISE}, white=white, black=["square"],
                   order=order, smallest=["fab", "fmn"], certified=certified)
    metrics |= {"audit/flagged": float(len(result["flagged"])),
                "audit/worst_case_accuracy": result["worst_case"]["accuracy"],
                "audit/worst_case_accuracy_8bit": result["worst_case"]["accuracy_8bit"]}
    return result


def signs(audited: dict) -> dict:
    """The audit's signs as a table."""
    rows = [[sign["name"], "–" if sign["value"] is None else f"{sign['value']:.4g}", f"{sign['threshold']:.4g}",
             "FLAGGED" if sign["flagged"] else "–" if sign["value"] is None else "ok", sign["advice"]]
            for sign in audited["signs"]]
    return {"title": "Audit: signs that these figures might deceive",
            "header": ["sign", "value", "flagged above", "", "what it is, and what to do where it is flagged"],
            "rows": rows, "note": "All of it, with every attack measured anew, is in audit.json."}

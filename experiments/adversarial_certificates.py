"""What is proved of a network in `adversarial_robustness`: bounds on its logits, and smoothing under noise."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dlcourse import streams
from dlcourse.adversarial import bounds, smoothing
from dlcourse.adversarial.evaluate import named
from dlcourse.contracts import InputError
from dlcourse.reporting import attacks as drawings
from experiments.adversarial_suite import scores, tabled, threat_of

CERTIFIED = 50
"""Images that are certified at a time: bounds take far more memory than images."""
CROWN_IBP, WHOLE, IBP, ALPHA = "certified", "certified (all)", "certified by IBP", "certified by alpha-CROWN"
"""Metrics: CROWN-IBP's, here and of the whole split, those of weaker bounds, and those of stronger ones."""
AT = "smoothed/certified_at_"
RADII = np.arange(80) / 20
"""Of certificates by smoothing, in units of the noise's deviation."""


def certify(config, predict, split, images, labels, metrics) -> tuple[np.ndarray | None, str]:
    """(N,) images whose class no change within the threat can alter, proved by CROWN-IBP; or None, and why.

    Where there are any, those of the whole split are counted, too; by IBP these images; by alpha-CROWN, which takes its
    inner bounds of IBP, at most TABLED of them where all attacks are wanted.
    """
    crown_ibp, alpha = (functools.partial(by, intermediate="ibp") for by in (bounds.crown, bounds.alpha_crown))

    def proved(by, x, y):
        return _in_parts(lambda x, y: np.asarray(bounds.certified(by(predict, x, y, threat_of(config)), y)), x, y)

    try:
        found = proved(crown_ibp, images, labels)
    except InputError as unknown:  # an operation of this network that the bounds do not follow
        return None, str(unknown)
    metrics |= scores(CROWN_IBP, found)
    metrics |= scores(IBP, proved(bounds.ibp, images, labels))
    if config.robustness.attacks == "all":
        some = tabled(config, labels)
        metrics |= scores(ALPHA, proved(alpha, images[some], labels[some]))
    if found.any():
        starts = range(0, len(split), CERTIFIED * 20)
        parts = (split[np.arange(start, min(start + CERTIFIED * 20, len(split)))] for start in starts)
        metrics |= scores(WHOLE, np.concatenate(
            [proved(crown_ibp, part["image"], part["label"]) for part in parts]))
    return found, ""


def _in_parts(call, *columns):
    """What `call` says of CERTIFIED rows at a time, of all rows."""
    count, parts = len(columns[0]), []
    for low in range(0, count, CERTIFIED):
        rows = np.minimum(np.arange(low, low + CERTIFIED), count - 1)
        parts.append(call(*(jnp.asarray(column)[rows] for column in columns)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)


def smoothed(config, run, others, predict, images, labels, metrics) -> None:
    """Certificates of the network under noise, whose deviation is eps: their average radius (ACR) and their curve.

    In the figure stand the `others`, networks under other noise, too.
    """
    if config.robustness.defence != "gaussian":
        return
    sigma, key = config.robustness.eps, named(streams.root(config.run.seed), "smoothing")
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(labels)))
    found = _in_parts(lambda keys, x: smoothing.certify(keys, predict, x, sigma,
                                                        samples=config.robustness.noisy_copies), keys, images)
    metrics |= scores("smoothed", found.predicted == labels)
    metrics |= {"smoothed/average_certified_radius": smoothing.average_radius(found, labels),
                "smoothed/sigma": sigma, "smoothed/abstained": float((found.predicted == smoothing.ABSTAIN).mean())}
    radii = sigma * RADII
    metrics |= {f"{AT}{radius:g}": float(share) for radius, share in
                zip(radii, smoothing.certified_accuracy(found, labels, radii), strict=True)}
    curves = [_by_radius(each) for each in (*others.values(), metrics)]
    run.figure("certified_by_radius", **drawings.certified_by_radius(curves, config.robustness.noisy_copies,
                                                                     len(labels)))


def _by_radius(metrics):
    at = {float(name.removeprefix(AT)): share for name, share in metrics.items() if name.startswith(AT)}
    return metrics["smoothed/sigma"], list(at), list(at.values()), metrics["smoothed/average_certified_radius"]

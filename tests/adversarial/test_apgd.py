"""APGD against its authors' code from the same noise, and against what a linear network allows in closed form."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from dlcourse.adversarial import apgd, objectives
from dlcourse.adversarial.l1_box import inside_l1
from dlcourse.adversarial.threat import Threat, inside, size
from dlcourse.contracts import InputError

GOLDEN = pathlib.Path(__file__).parent / "golden" / "apgd.npz"


def layered(weights, images):
    """The network of golden/make_apgd.py."""
    x = images.reshape(len(images), -1)
    for n in (1, 2, 3):
        x = (x if n == 1 else jax.nn.relu(x)) @ weights[f"kernel{n}"].T + weights[f"bias{n}"][None]
    return x


def linear(weights, images):
    return images.reshape(len(images), -1) @ weights["kernel"] + weights["bias"][None]


@pytest.fixture(scope="module")
def golden():
    stored = dict(np.load(GOLDEN))
    names = [f"{kind}{n}" for kind in ("kernel", "bias") for n in (1, 2, 3)]
    stored["predict"] = jax.tree_util.Partial(jax.jit(layered), {name: jnp.asarray(stored[name]) for name in names})
    stored["images"] = jnp.asarray(stored["grey"], jnp.float32)[..., None] / 16
    stored["labels"] = jnp.asarray(stored["labels"], jnp.int32)
    stored["noise"] = jnp.asarray(stored["noise"][..., None] / 127, jnp.float32)
    return stored


@functools.partial(jax.jit, static_argnames="objective")
def climbed(predict, images, labels, threat, noise, aims, objective):
    """Success and the largest objective of one climb from the noise."""
    measure, nobody = objectives.OBJECTIVES[objective], jnp.zeros(len(images), bool)
    climb = functools.partial(apgd.ascent, predict, images, labels, aims=aims, targets=None, measure=measure)
    if threat.norm == "l1":
        start = inside_l1(images + noise, images, threat.replace(eps=3 * threat.eps))
        x, _ = apgd.shrinking(climb, start, images, threat, 100, nobody)
    else:
        unit = noise / size(noise, threat.norm)[:, None, None, None]
        x, _ = climb(threat, inside(images + threat.eps * unit, images, threat), nobody, steps=100)
    logits = predict(x)
    return logits.argmax(-1) != labels, measure(logits, labels, aims), size(x - images, threat.norm)


@pytest.mark.parametrize("run", ["linf_cross_entropy", "linf_dlr", "l2_cross_entropy", "linf_targeted_dlr",
                                 "l1_cross_entropy", "l1_targeted_dlr"])
def test_fools_whom_the_authors_code_fools(golden, run):
    norm, objective = run.split("_", 1)
    predict, images, labels = golden["predict"], golden["images"], golden["labels"]
    aims = apgd.wrong_classes(predict(images), labels)[:, 0] if "targeted" in run else None
    threat = Threat(jnp.asarray(golden[f"eps_{norm}"]), norm)
    flags, best, norms = climbed(predict, images, labels, threat, golden["noise"], aims, objective.split("_")[-1]
                                 if "targeted" in run else objective)
    agree = np.mean(np.asarray(flags) == golden[run])
    print(run, f"agreement {agree:.4f} of {len(labels)}; ours {flags.mean():.3f} theirs {golden[run].mean():.3f}")
    both = ~np.asarray(flags) & ~golden[run]
    print("   best", np.abs(np.asarray(best) - golden[f"{run}_best"])[both].max(), "of", both.sum())
    assert agree >= 0.995
    assert float(norms.max()) <= golden[f"eps_{norm}"] * (1 + 1e-5)



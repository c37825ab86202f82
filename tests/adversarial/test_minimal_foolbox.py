"""The same successes and distances as Foolbox 3.3.4 on the same weights (golden/make_minimal.py)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from dlcourse.adversarial import gradient, minimal
from dlcourse.adversarial.carlini_wagner import carlini_wagner
from dlcourse.adversarial.ddn import ddn
from dlcourse.adversarial.deepfool import deepfool
from dlcourse.adversarial.ead import ead
from dlcourse.adversarial.fmn import fmn
from dlcourse.adversarial.threat import Threat
from dlcourse.training.evaluation import predictor
from tests.adversarial.golden import minimal_cases as cases

pytestmark = pytest.mark.slow

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "minimal.npz")
ATTACKS = {"deepfool": deepfool, "ddn": ddn, "fmn": fmn, "carlini_wagner": carlini_wagner, "ead": ead}
PUBLISHED = {"fmn": {"overshoot": 0.0}}


def network():
    model = cases.model()
    like = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    return predictor(model, ravel_pytree(like)[1](GOLDEN["weights"]))


@pytest.mark.parametrize("case", cases.PGD)
def test_pgd_fools_whom_it_fools_there(case):
    """Step by step the same, but for one image at most that rounding decides."""
    norm, eps, targeted = cases.PGD[case]
    images, labels = map(jnp.asarray, cases.digits(cases.ATTACKED))
    targets = cases.targets(labels) if targeted else None
    found = gradient.pgd(jax.random.key(0), network(), images, labels, Threat(norm=norm, eps=eps), targets=targets,
                         steps=cases.PGD_STEPS, step_size=eps / 5, random_start=False, early_stop=False)
    assert 0.2 < GOLDEN[case].mean() < 0.9
    assert (np.asarray(found.success) != GOLDEN[case]).sum() <= 1


@pytest.mark.parametrize("case", cases.CASES)
def test_agrees_with_foolbox(case):
    """Successes to one image, the median to 3 %, most distances to 3 % each: rounding decides some long searches."""
    name, norm, options, targeted = cases.CASES[case]
    images, labels = map(jnp.asarray, cases.digits(cases.ATTACKED))
    targets = cases.targets(labels) if targeted else None
    found = ATTACKS[name](jax.random.key(0), network(), images, labels, Threat(norm=norm, eps=100.0), targets=targets,
                          **options, **PUBLISHED.get(name, {}))
    ours, theirs = np.asarray(minimal.distances(found)), GOLDEN[case]
    won = np.isfinite(ours), np.isfinite(theirs)
    both = won[0] & won[1]
    assert abs(won[0].sum() - won[1].sum()) <= 1
    np.testing.assert_allclose(np.median(ours[both]), np.median(theirs[both]), rtol=0.03)
    assert np.isclose(ours[both], theirs[both], rtol=0.03, atol=1e-5).mean() >= 0.9

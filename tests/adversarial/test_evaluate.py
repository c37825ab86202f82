"""Attacks on whole splits are the same whatever the batches, and PGD may go on where it has succeeded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlcourse.adversarial import gradient
from dlcourse.adversarial.evaluate import attacked, named
from dlcourse.adversarial.threat import Threat
from dlcourse.contracts import InputError
from dlcourse.streams import root
from tests.adversarial import linear

KEY = root(0)


def test_batches_do_not_matter():
    predict, *_ = linear.network()
    images, labels = linear.examples(10)
    eps = jnp.linspace(0.01, 0.05, 10)
    attack = functools.partial(gradient.pgd, steps=3)
    whole = attacked(attack, KEY, predict, images, labels, Threat(eps=eps), targets=(labels + 1) % 3)
    parts = attacked(attack, KEY, predict, images, labels, Threat(eps=eps), targets=(labels + 1) % 3, batch_size=4)
    assert len(parts.images) == 10 and isinstance(parts.images, np.ndarray)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, parts)


def test_what_no_attack_can_work_with_is_refused():
    predict, *_ = linear.network()
    images, labels = linear.examples(4)
    with pytest.raises(InputError, match="own label"):
        attacked(gradient.fgsm, KEY, predict, images, labels, Threat(eps=0.1), targets=labels)
    with pytest.raises(InputError, match="divide bytes"):
        attacked(gradient.fgsm, KEY, predict, np.asarray(255 * images, np.uint8), labels, Threat(eps=0.1))


def test_attacks_draw_apart():
    assert not jnp.array_equal(jax.random.key_data(named(KEY, "pgd")), jax.random.key_data(named(KEY, "fgsm")))


def test_without_early_stop_the_objective_goes_on_rising():
    predict, *_ = linear.network()
    images, labels = linear.examples()
    threat = Threat(eps=jnp.asarray(3 * linear.smallest(images, labels, "linf")))
    stopped, whole = (gradient.pgd(KEY, predict, images, labels, threat, steps=20, early_stop=stop)
                      for stop in (True, False))
    assert bool(stopped.success.all()) and bool(whole.success.all())
    assert bool(jnp.all(whole.loss >= stopped.loss)) and float((whole.loss - stopped.loss).mean()) > 0.1
    assert int(whole.queries.min()) > int(stopped.queries.max())

"""Attacks work under jit, vmap and shard_map, and find there what they find alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dlcourse import models
from dlcourse.adversarial import estimated, gradient, spatial
from dlcourse.adversarial.apgd import apgd
from dlcourse.adversarial.carlini_wagner import carlini_wagner
from dlcourse.adversarial.ddn import ddn
from dlcourse.adversarial.decision import boundary, hop_skip_jump
from dlcourse.adversarial.deepfool import deepfool
from dlcourse.adversarial.ead import ead
from dlcourse.adversarial.fab import fab
from dlcourse.adversarial.fmn import fmn
from dlcourse.adversarial.square import square
from dlcourse.adversarial.threat import Threat
from dlcourse.training.evaluation import predictor

pytestmark = pytest.mark.slow

ATTACKS = {
    "noise": functools.partial(gradient.noise, draws=3),
    "fgsm": gradient.fgsm,
    "n_fgsm": gradient.n_fgsm,
    "pgd": functools.partial(gradient.pgd, steps=5, restarts=2),
    "apgd": functools.partial(apgd, steps=10),
    "fab": functools.partial(fab, steps=5),
    "square": functools.partial(square, queries=20),
    "fmn": functools.partial(fmn, steps=10),
    "deepfool": functools.partial(deepfool, steps=5),
    "ddn": functools.partial(ddn, steps=10),
    "carlini_wagner": functools.partial(carlini_wagner, steps=20, rounds=2),
    "ead": functools.partial(ead, steps=20, rounds=2),
    "spsa": functools.partial(estimated.spsa, steps=3, pairs=8),
    "boundary": functools.partial(boundary, steps=20),
    "hop_skip_jump": functools.partial(hop_skip_jump, steps=2, first_draws=10, most_draws=20),
    "spatial": functools.partial(spatial.worst_of, draws=3),
}
NORMS = {"deepfool": "l2", "ddn": "l2", "carlini_wagner": "l2", "ead": "l1", "boundary": "l2", "hop_skip_jump": "l2"}


@functools.cache
def setting():
    model = models.create("mlp,width=16,depth=1", 4, (4, 4, 1))
    variables = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    images = jax.random.uniform(jax.random.key(1), (8, 4, 4, 1))
    predict = predictor(model, variables)
    return predict, images, predict(images).argmax(-1), jax.random.split(jax.random.key(2), 8)


def same(found, alone):
    np.testing.assert_array_equal(found.success, alone.success)
    np.testing.assert_allclose(found.images, alone.images, atol=2e-4)
    np.testing.assert_allclose(found.norm, alone.norm, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_finds_the_same_alone_mapped_and_sharded(name):
    predict, images, labels, keys = setting()
    threat = Threat(eps=0.2, norm=NORMS.get(name, "linf"))
    attack = jax.jit(lambda keys, images, labels: ATTACKS[name](keys, predict, images, labels, threat))
    alone = attack(keys, images, labels)
    pairs = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), (keys, images, labels))
    mapped = jax.jit(jax.vmap(attack))(*pairs)
    same(jax.tree.map(lambda x: x.reshape(8, *x.shape[2:]), mapped), alone)
    mesh = Mesh(np.array(jax.devices()[:4]), ("batch",))
    sharded = jax.jit(jax.shard_map(attack, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"), check_vma=False))
    same(sharded(keys, images, labels), alone)

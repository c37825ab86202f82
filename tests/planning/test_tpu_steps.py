"""The plain steps that ours are compared with are the same networks, and what cannot be compared is refused."""

import jax
import jax.numpy as jnp
import pytest

from dlcourse import models
from dlcourse.models import size
from experiments import command, plain, tpu_steps


@pytest.mark.parametrize("name", ["resnet50", "vit_s"])
def test_the_plain_network_is_as_large(name):
    make, _, _ = plain.STEPS[name]
    ours, shape = models.create(name, 1000, (224, 224, 3), "bfloat16"), (224, 224, 3)
    variables = jax.eval_shape(lambda key: make().init(key, jnp.zeros((1, *shape))), jax.random.key(0))
    assert size.parameters(variables) == size.parameters(size.abstract_variables(ours, shape))


@pytest.mark.parametrize("flag", ["--topology=h100:8", "--topology=v5e:3x3", "--models=vit_b", "--per_chip_batch=0"])
def test_what_cannot_be_compared_is_refused(flag, tmp_path, capsys):
    flags = [flag, f"--workdir={tmp_path / 'run'}"]
    assert command.status(tpu_steps.main, tpu_steps.Config, "tpu_steps", flags) == 2
    assert flag in capsys.readouterr().err

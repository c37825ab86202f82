"""The convnet and its training step against the same in PyTorch, from the same weights."""

import functools

import jax
import numpy as np
import pytest

from dlcourse import models, streams
from dlcourse.training import losses, optimizers
from dlcourse.training import state as states
from dlcourse.training.step import train_step
from experiments.benchmark_peers import torch_convnet

torch = pytest.importorskip("torch", reason="torch is not installed (launch/local --with=peers test)")


def batch():
    rng = np.random.default_rng(0)
    return rng.random((16, 12, 12, 1), np.float32), rng.integers(0, 10, 16).astype(np.int32)


def trained_here(images, labels, nesterov, smoothing, steps=3):
    model = models.create("convnet,width=4", 10, (12, 12, 1))
    tx = optimizers.create("nesterov" if nesterov else "sgd", 0.1, momentum=0.9)
    loss = losses.cross_entropy(model, label_smoothing=smoothing)
    start = states.create(model, (12, 12, 1), tx, streams.root(0))
    step, state, values = jax.jit(functools.partial(train_step, loss=loss, tx=tx)), start, []
    for _ in range(steps):
        state, metrics = step(state, {"image": images, "label": labels})
        values.append(float(metrics["loss"]))
    return model, start, state, values


@pytest.mark.parametrize(("nesterov", "smoothing"), [(False, 0.0), (True, 0.1)])
def test_training_is_pytorchs_training(nesterov, smoothing):
    images, labels = batch()
    model, start, state, values = trained_here(images, labels, nesterov, smoothing)
    net = torch_convnet(model, start.variables)
    rule = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=nesterov)
    x, y = torch.from_numpy((images.transpose(0, 3, 1, 2) - 0.5) / 0.25), torch.from_numpy(labels).long()
    for value in values:
        loss = torch.nn.functional.cross_entropy(net(x), y, label_smoothing=smoothing)
        np.testing.assert_allclose(value, float(loss.detach()), rtol=2e-4)
        rule.zero_grad()
        loss.backward()
        rule.step()
    ours = np.asarray(state.params["conv3"]["kernel"]).transpose(3, 2, 0, 1)
    theirs = [m for m in net if isinstance(m, torch.nn.Conv2d)][2].weight.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=2e-4)

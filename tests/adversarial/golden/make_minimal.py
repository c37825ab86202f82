"""Foolbox's results on a small convnet, written a second time in torch, for tests/adversarial/test_minimal_foolbox.py.

    pip install foolbox==3.3.4 torch; python -m tests.adversarial.golden.make_minimal

Carlini-Wagner and EAD are run image by image, since their early stop there looks at the batch as a whole; where they
find nothing they return a black image, which the network may take for the target: it counts as nothing found. Two
projections of FMN in Foolbox 3.3.4 are corrected as in the attack's authors' code: for l2 it projects nothing
(norms / norms), for l0 it keeps one value more than asked.
"""

from __future__ import annotations

import pathlib

import foolbox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from foolbox import attacks
from jax.flatten_util import ravel_pytree

from tests.adversarial.golden import minimal_cases as cases


class L2FMN(attacks.L2FMNAttack):
    def project(self, x, x0, epsilon):
        change = x.raw - x0.raw
        length = change.flatten(1).norm(dim=1).clamp(min=1e-12)
        factor = torch.minimum(torch.ones_like(length), epsilon.raw / length)
        return x0 + foolbox.devutils.ep.astensor(change * factor[:, None, None, None])


class L0FMN(attacks.L0FMNAttack):
    def project(self, x, x0, epsilon):
        change = (x.raw - x0.raw).flatten(1)
        rank = change.abs().argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        kept = torch.where(rank < epsilon.raw[:, None], change, torch.zeros_like(change))
        return x0 + foolbox.devutils.ep.astensor(kept.reshape(x.shape))


PEERS = {
    "deepfool": {"linf": attacks.LinfDeepFoolAttack, "l2": attacks.L2DeepFoolAttack},
    "ddn": {"l2": attacks.DDNAttack},
    "fmn": {"linf": attacks.LInfFMNAttack, "l2": L2FMN, "l1": attacks.L1FMNAttack, "l0": L0FMN},
    "carlini_wagner": {"l2": lambda **o: attacks.L2CarliniWagnerAttack(
        steps=o["steps"], binary_search_steps=o["rounds"], initial_const=o["constant"])},
    "ead": {"l1": lambda **o: attacks.EADAttack(
        steps=o["steps"], binary_search_steps=o["rounds"], decision_rule=o["rule"], regularization=o["beta"],
        initial_const=o["constant"])},
}
DISTANCES = {"linf": foolbox.distances.linf, "l2": foolbox.distances.l2, "l1": foolbox.distances.l1,
             "l0": foolbox.distances.l0}


def trained():
    """Variables of cases.MODEL after some steps on digits; normalisation statistics stay as they are at first."""
    images, labels = cases.digits(slice(0, 1500))
    model = cases.model()
    variables = model.init(jax.random.key(0), images[:1])
    adam = optax.adam(1e-2)

    def loss(params):
        logits = model.apply({**variables, "params": params}, images)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, moments):
        updates, moments = adam.update(jax.grad(loss)(params), moments)
        return optax.apply_updates(params, updates), moments

    params, moments = variables["params"], adam.init(variables["params"])
    for _ in range(150):
        params, moments = step(params, moments)
    return {**variables, "params": params}


class Torch(torch.nn.Module):
    """cases.MODEL with the same weights; images (B,C,H,W)."""

    def __init__(self, variables):
        super().__init__()
        self.v = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), variables)

    def forward(self, x):
        p, stats = self.v["params"], self.v["batch_stats"]
        x = (x - 0.5) / 0.25
        for layer in (1, 2):
            kernel = p[f"conv{layer}"]["kernel"].permute(3, 2, 0, 1)
            x = torch.nn.functional.conv2d(x, kernel, padding=1)
            norm, own = p[f"norm{layer}"], stats[f"norm{layer}"]
            x = torch.nn.functional.batch_norm(x, own["mean"], own["var"], norm["scale"], norm["bias"], eps=1e-5)
            x = torch.relu(x)
            if layer == 1:
                x = torch.nn.functional.max_pool2d(x, 2)
        return x.mean((2, 3)) @ p["classifier"]["kernel"] + p["classifier"]["bias"]


def attacked(network, name, norm, options, images, labels, targets):
    """(N,) the norm of the smallest change that Foolbox finds; infinite where it finds none."""
    model = foolbox.PyTorchModel(network.eval(), bounds=(0, 1))
    attack = PEERS[name][norm](**options)
    found = []
    count = len(images)
    size = 1 if name in ("carlini_wagner", "ead") else count
    for i in range(0, count, size):
        x, y = images[i:i + size], labels[i:i + size]
        criterion = foolbox.criteria.Misclassification(y) if targets is None else \
            foolbox.criteria.TargetedMisclassification(targets[i:i + size])
        moved = attack.run(model, x, criterion)
        won = criterion(foolbox.devutils.ep.astensor(moved), foolbox.devutils.ep.astensor(network(moved))).raw
        distance = DISTANCES[norm](x, moved)
        some = moved.flatten(1).any(1)
        found.append(torch.where(won & some, distance, torch.inf).detach().numpy())
    return np.concatenate(found).astype(np.float32)


def climbed(network, norm, eps, images, labels, targets):
    """(N,) whether Foolbox's PGD fools the network."""
    model = foolbox.PyTorchModel(network.eval(), bounds=(0, 1))
    criterion = foolbox.criteria.Misclassification(labels) if targets is None else \
        foolbox.criteria.TargetedMisclassification(targets)
    attack = {"linf": attacks.LinfPGD, "l2": attacks.L2PGD}[norm](
        abs_stepsize=eps / 5, steps=cases.PGD_STEPS, random_start=False)
    return np.asarray(attack(model, images, criterion, epsilons=eps)[2].numpy())


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    variables = trained()
    images, labels = cases.digits(cases.ATTACKED)
    network = Torch(variables)
    x, y = torch.tensor(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels, dtype=torch.int64)
    logits = cases.model().apply(variables, jnp.asarray(images))[0]
    np.testing.assert_allclose(network(x).numpy(), logits, atol=1e-4)
    print("accuracy", float((logits.argmax(-1) == labels).mean()))
    results = {"weights": np.asarray(ravel_pytree(variables)[0])}
    for case, (name, norm, options, targeted) in cases.CASES.items():
        targets = torch.tensor(cases.targets(labels), dtype=torch.int64) if targeted else None
        results[case] = attacked(network, name, norm, options, x, y, targets)
        finite = np.isfinite(results[case])
        print(case, finite.mean(), np.median(results[case][finite]), flush=True)
    for case, (norm, eps, targeted) in cases.PGD.items():
        targets = torch.tensor(cases.targets(labels), dtype=torch.int64) if targeted else None
        results[case] = climbed(network, norm, eps, x, y, targets)
        print(case, results[case].mean(), flush=True)
    np.savez_compressed(pathlib.Path(__file__).with_name("minimal.npz"), **results)


if __name__ == "__main__":
    main()

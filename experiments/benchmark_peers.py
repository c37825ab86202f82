"""What benchmarks compare with: other projects' attacks, and our convnet copied into PyTorch."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import time
from pathlib import Path

from dlcourse.contracts import InputError


def foolbox_pgd(predict, batch, eps: float, steps: int = 40):
    """The same by Foolbox: as many steps of the same size, from a random start."""
    import foolbox
    import jax
    import jax.numpy as jnp

    images, labels = jnp.asarray(batch["image"]), jnp.asarray(batch["label"])
    network = foolbox.JAXModel(predict, bounds=(0, 1))
    attack = foolbox.attacks.LinfPGD(rel_stepsize=2.5 / steps, steps=steps, random_start=True)
    return lambda: jax.block_until_ready(attack(network, images, labels, epsilons=eps))[2]


def authors(folder: str):
    """The authors' package in this folder, or None where none is named.

    Raises:
      InputError: the folder has no such package, or PyTorch is missing.
    """
    if not folder:
        return None
    path = Path(folder).expanduser()
    if not (path / "autoattack" / "autopgd_base.py").exists():
        raise InputError(f"--autoattack_folder={folder}: no checkout of the authors' AutoAttack "
                         "(github.com/fra31/auto-attack), which has a folder autoattack/ with autopgd_base.py")
    if not importlib.util.find_spec("torch"):
        raise InputError(f"--autoattack_folder={folder}: PyTorch is not installed (launch/local --with=peers)")
    sys.path.insert(0, str(path))
    try:
        return importlib.import_module("autoattack").AutoAttack
    finally:
        sys.path.remove(str(path))


class Clock:
    """Takes the place of the authors' logger: seconds of every stage, and the accuracy after it."""

    def __init__(self):
        self.seconds, self.accuracies, self.began = {}, {}, time.perf_counter()

    def log(self, line: str) -> None:
        words = line.lower().split()
        if words[:3] == ["robust", "accuracy", "after"] or words[:2] == ["initial", "accuracy:"]:
            stage, share = ("clean", words[2]) if words[0] == "initial" else (words[3].rstrip(":"), words[4])
            now = time.perf_counter()
            self.seconds[stage], self.began = now - self.began, now
            self.accuracies[stage] = float(share.rstrip("%")) / 100


def their_autoattack(make, network, batch, config):
    """As `our_autoattack`."""
    import torch

    images = torch.from_numpy(batch["image"].transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(batch["label"]).long()
    attack, clock = make(network, norm="Linf", eps=config.eps, seed=0, version="standard", device="cpu"), Clock()
    attack.logger = clock
    with contextlib.redirect_stdout(io.StringIO()):
        attack.run_standard_evaluation(images, labels, bs=config.peer_batch_size)
    return clock.seconds, clock.accuracies


def torch_convnet(model, variables):
    """Our convnet in PyTorch, (B,C,H,W) pixels less 0.5 and divided by 0.25 -> logits, with these variables.

    Args:
      model: a `models.convnet.ConvNet`.
      variables: its `params` and `batch_stats`.
    """
    import numpy as np
    import torch

    params, stats = variables["params"], variables["batch_stats"]

    def tensor(values, *axes):
        values = torch.from_numpy(np.array(values, np.float32))
        return values.permute(axes).contiguous() if axes else values

    def norm(make, name):
        made = make(len(params[name]["scale"]))
        made.load_state_dict({"weight": tensor(params[name]["scale"]), "bias": tensor(params[name]["bias"]),
                              "running_mean": tensor(stats[name]["mean"]), "running_var": tensor(stats[name]["var"])},
                             strict=False)
        return [made, torch.nn.ReLU()]

    layers = []
    for layer, (stage, first) in enumerate(model.plan(), start=1):
        halve = model.halve if first and stage else ""
        kernel = tensor(params[f"conv{layer}"]["kernel"], 3, 2, 0, 1)
        conv = torch.nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2], 2 if halve == "stride" else 1,
                               kernel.shape[2] // 2, bias=False)
        conv.weight.data = kernel
        layers += [torch.nn.MaxPool2d(2)] * (halve == "pool") + [conv, *norm(torch.nn.BatchNorm2d, f"norm{layer}")]
    if model.hidden:
        weights = tensor(params["hidden"]["kernel"])
        side = int((weights.shape[0] / kernel.shape[0]) ** 0.5)
        weights = weights.reshape(side, side, -1, weights.shape[1]).permute(3, 2, 0, 1).flatten(1).contiguous()
        hidden = torch.nn.Linear(weights.shape[1], weights.shape[0], bias=False)
        hidden.weight.data = weights
        layers += [torch.nn.Flatten(), hidden, *norm(torch.nn.BatchNorm1d, "norm_hidden")]
    else:
        layers += [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    last = torch.nn.Linear(*params["classifier"]["kernel"].shape)
    last.weight.data = tensor(params["classifier"]["kernel"], 1, 0)
    last.bias.data = tensor(params["classifier"]["bias"])
    return torch.nn.Sequential(*layers, last)


def torch_copy(model, variables):
    """As `torch_convnet`, from pixels in [0, 1], as it is evaluated."""
    import torch

    class Centred(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = torch_convnet(model, variables)

        def forward(self, images):
            return self.network((images - 0.5) / 0.25)

    return Centred().eval().requires_grad_(False)

"""What benchmarks compare with: other projects' attacks, and our networks copied into PyTorch."""

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
    import torch

    params, stats = variables["params"], variables["batch_stats"]

    def norm(make, name):
        made = make(len(params[name]["scale"]))
        made.load_state_dict({"weight": _tensor(params[name]["scale"]), "bias": _tensor(params[name]["bias"]),
                              "running_mean": _tensor(stats[name]["mean"]), "running_var": _tensor(stats[name]["var"])},
                             strict=False)
        return [made, torch.nn.ReLU()]

    layers = []
    for layer, (stage, first) in enumerate(model.plan(), start=1):
        halve = model.halve if first and stage else ""
        weights = params[f"conv{layer}"]
        conv = _conv(weights, 2 if halve == "stride" else 1, weights["kernel"].shape[0] // 2)
        layers += [torch.nn.MaxPool2d(2)] * (halve == "pool") + [conv, *norm(torch.nn.BatchNorm2d, f"norm{layer}")]
    if model.hidden:
        hidden = _linear(params["hidden"], conv.out_channels)
        layers += [torch.nn.Flatten(), hidden, *norm(torch.nn.BatchNorm1d, "norm_hidden")]
    else:
        layers += [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    return torch.nn.Sequential(*layers, _linear(params["classifier"]))


def torch_plain(model, variables):
    """A `models.plain.PlainConvNet` in PyTorch, (B,C,H,W) pixels in [0, 1] -> logits, with these variables."""
    import torch

    params, plan, layers = variables["params"], model.plan(), []
    for layer, (_, _, stride) in enumerate(plan.convolutions, start=1):
        layers += [_conv(params[f"conv{layer}"], stride, 1), torch.nn.ReLU()]
    channels = layers[-2].out_channels
    layers.append(torch.nn.Flatten())
    for layer in range(1, len(plan.hidden) + 1):
        layers += [_linear(params[f"dense{layer}"], channels if layer == 1 else 1), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, _linear(params["classifier"]))


def _tensor(values, *axes):
    import numpy as np
    import torch

    values = torch.from_numpy(np.array(values, np.float32))
    return values.permute(axes).contiguous() if axes else values


def _conv(weights, stride, padding):
    import torch

    kernel = _tensor(weights["kernel"], 3, 2, 0, 1)
    conv = torch.nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2], stride, padding, bias="bias" in weights)
    conv.load_state_dict({"weight": kernel, **({"bias": _tensor(weights["bias"])} if "bias" in weights else {})})
    return conv


def _linear(weights, channels=1):
    """A layer that sees pixels of so many channels, which PyTorch has in another order."""
    import torch

    kernel = _tensor(weights["kernel"])
    kernel = kernel.reshape(-1, channels, kernel.shape[1]).permute(2, 1, 0).flatten(1).contiguous()
    linear = torch.nn.Linear(kernel.shape[1], kernel.shape[0], bias="bias" in weights)
    linear.load_state_dict({"weight": kernel, **({"bias": _tensor(weights["bias"])} if "bias" in weights else {})})
    return linear


def torch_copy(model, variables):
    """Either of our networks as it is evaluated, from pixels in [0, 1]."""
    import torch

    from dlcourse.models.plain import PlainConvNet

    class Centred(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = torch_convnet(model, variables)

        def forward(self, images):
            return self.network((images - 0.5) / 0.25)

    network = torch_plain(model, variables) if isinstance(model, PlainConvNet) else Centred()
    return network.eval().requires_grad_(False)

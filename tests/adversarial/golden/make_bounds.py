"""Makes bounds.npz: bounds of small networks by auto_LiRPA 0.7.1 (Verified-Intelligence/auto_LiRPA, commit a050a3d).

    python tests/adversarial/golden/make_bounds.py

needs auto_LiRPA and torch on the path; the weights are drawn here, in the names of this project's networks.
"""

import pathlib

import numpy as np
import torch
from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm
from torch import nn

rng = np.random.default_rng(0)
ROOT = pathlib.Path(__file__).parent
SHAPE, BATCH = (8, 8, 1), 8


def dense(width, features):
    return {"kernel": rng.normal(size=(width, features)) / width**0.5, "bias": rng.normal(size=features) / 10}


def norm(features):
    return ({"scale": rng.uniform(0.5, 1.5, features), "bias": rng.normal(size=features) / 5},
            {"mean": rng.normal(size=features) / 5, "var": rng.uniform(0.5, 1.5, features)})


class Scaled(nn.Module):
    def forward(self, x):
        return (x - 0.5) / 0.25


class Averaged(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def linear(weights):
    layer = nn.Linear(*weights["kernel"].shape)
    layer.weight.data, layer.bias.data = (torch.tensor(a, dtype=torch.float32) for a in
                                          (weights["kernel"].T, weights["bias"]))
    return layer


def convolution(weights):
    k, _, inputs, features = weights["kernel"].shape
    layer = nn.Conv2d(inputs, features, k, padding=k // 2, bias=False)
    layer.weight.data = torch.tensor(weights["kernel"].transpose(3, 2, 0, 1), dtype=torch.float32)
    return layer


def normalisation(weights, state):
    layer = nn.BatchNorm2d(len(weights["scale"]), eps=1e-5)
    for name, value in {"weight": weights["scale"], "bias": weights["bias"]}.items():
        getattr(layer, name).data = torch.tensor(value, dtype=torch.float32)
    layer.running_mean, layer.running_var = (torch.tensor(state[n], dtype=torch.float32) for n in ("mean", "var"))
    return layer


def mlp():
    """The first layer takes in that pixels are scaled: auto_LiRPA 0.7.1 agrees for l2 balls only so."""
    params = {"dense1": dense(64, 16), "dense2": dense(16, 16), "classifier": dense(16, 10)}
    first = {"kernel": params["dense1"]["kernel"] / 0.25,
             "bias": params["dense1"]["bias"] - params["dense1"]["kernel"].sum(0) * 0.5 / 0.25}
    layers = [linear(first), nn.ReLU(), linear(params["dense2"]), nn.ReLU(), linear(params["classifier"])]
    return {"params": params}, nn.Sequential(nn.Flatten(), *layers)


def convnet():
    params, state, layers = {}, {}, [Scaled()]
    for i, inputs in enumerate((1, 4), 1):
        params[f"conv{i}"] = {"kernel": rng.normal(size=(3, 3, inputs, 4)) / (9 * inputs) ** 0.5}
        params[f"norm{i}"], state[f"norm{i}"] = norm(4)
        layers += [convolution(params[f"conv{i}"]), normalisation(params[f"norm{i}"], state[f"norm{i}"]), nn.ReLU()]
    params["classifier"] = dense(4, 10)
    return {"params": params, "batch_stats": state}, nn.Sequential(*layers, Averaged(), linear(params["classifier"]))


def flat(tree, path):
    if isinstance(tree, dict):
        return {k: v for name, value in tree.items() for k, v in flat(value, f"{path}/{name}").items()}
    return {path: np.float32(tree)}


def ball(images, norm, eps):
    """The linf ball is cut with [0, 1]; the l2 ball is not, which auto_LiRPA cannot."""
    x = torch.tensor(images.transpose(0, 3, 1, 2))
    ends = {"x_L": (x - eps).clamp(0, 1), "x_U": (x + eps).clamp(0, 1)} if norm == np.inf else {}
    return BoundedTensor(x, PerturbationLpNorm(norm=norm, eps=eps, **ends))


def bounded(net, around):
    return BoundedModule(net, around.data, bound_opts={"conv_mode": "matrix"}, verbose=False)


def met(net, around):
    """What precedes the second relu, bounded by CROWN and by intervals, whichever is tighter."""
    before = bounded(net.eval(), around)
    (a, b), (c, d) = (before.compute_bounds(x=(around,), method=method) for method in ("CROWN", "IBP"))
    return torch.maximum(a, c).detach(), torch.minimum(b, d).detach()


def bounds(net, around, labels):
    """{method: (B,K) lower bounds of z_label - z_k}."""
    rows = torch.eye(10)[torch.tensor(labels)][:, None] - torch.eye(10)[None]
    network, common = bounded(net, around), {"x": (around,), "C": rows, "bound_upper": False}
    found = {method: network.compute_bounds(method=method, **common)[0] for method in ("IBP", "CROWN-IBP", "CROWN")}
    second = [i for i, layer in enumerate(net) if isinstance(layer, nn.ReLU)][1]
    low, high = met(net[:second], around)
    carried = network.compute_bounds(method="CROWN", interm_bounds={network.relus[1].inputs[0].name: (low, high)},
                                     **common)[0]
    rest = BoundedTensor((low + high) / 2, PerturbationLpNorm(norm=np.inf, x_L=low, x_U=high))
    intervals = bounded(net[second:].eval(), rest).compute_bounds(**{**common, "x": (rest,)}, method="IBP")[0]
    found["CROWN-met"] = torch.maximum(carried, intervals)
    return {method: value.detach().numpy() for method, value in found.items()}


stored = {}
for name, make in {"mlp": mlp, "convnet": convnet}.items():
    variables, net = make()
    images = rng.uniform(size=(BATCH, *SHAPE)).astype(np.float32)
    logits = net.eval()(torch.tensor(images.transpose(0, 3, 1, 2))).detach().numpy()
    labels = logits.argmax(1).astype(np.int32)
    stored |= {**flat(variables, name), f"{name}:images": images, f"{name}:labels": labels, f"{name}:logits": logits}
    balls = [("linf", np.inf, 0.02), ("linf", np.inf, 0.1)] + [("l2", 2, 0.1)] * (name == "mlp")
    for norm_name, p, eps in balls:
        for method, value in bounds(net, ball(images, p, eps), labels).items():
            stored[f"{name}:{norm_name}:{eps}:{method}"] = value
np.savez_compressed(ROOT / "bounds.npz", **stored)

"""Makes apgd.npz: whom the authors' APGD, from given noise, and AutoAttack fool.

    PYTHONPATH=<fra31/auto-attack at commit a392200> python tests/adversarial/golden/make_apgd.py

Needs torch and scikit-learn. A small network is trained on digits; its weights, the images and the starts' noise
(as bytes) are stored with the success flags.

For l1 the authors count a pixel as changed where x + u - u differs from x by float32 rounding, some 0.5 % more than
are; their steps' sparsity follows that count. So l1 is run twice: as it is, and counting changes above 1e-6.
"""

import pathlib

import autoattack.autopgd_base as theirs
import numpy as np
import torch
from autoattack import AutoAttack
from autoattack.autopgd_base import APGDAttack, APGDAttack_targeted, L1_projection
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

EPS = {"linf": 0.1, "l2": 0.55, "l1": 1.5}
RUNS = {"linf_cross_entropy": ("linf", "ce"), "linf_dlr": ("linf", "dlr"), "l2_cross_entropy": ("l2", "ce"),
        "linf_targeted_dlr": ("linf", "dlr-targeted"), "l1_cross_entropy": ("l1", "ce"),
        "l1_targeted_dlr": ("l1", "dlr-targeted")}
WHOLE = (("linf", "standard"), ("l2", "standard"), ("l1", "standard"), ("linf", "plus"), ("l2", "plus"))
COUNT, STEPS, SOME = 400, 100, 120
RAND = ("linf", "l2")
NOISE, DRAWS = 0.1, 500


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))


def trained(images, labels):
    torch.manual_seed(0)
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(300):
        rows = torch.randint(len(images), (128,))
        noisy = images[rows] + 0.1 * torch.randn_like(images[rows])
        optimizer.zero_grad()
        F.cross_entropy(net(noisy), labels[rows]).backward()
        optimizer.step()
    return net


def attacked(net, x, y, noise, norm, loss):
    """Success flags of one run from the noise."""
    name = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    kind = APGDAttack_targeted if loss == "dlr-targeted" else APGDAttack
    attack = kind(net, n_iter=STEPS, norm=name, eps=EPS[norm], device="cpu")
    attack.loss = loss
    attack.init_hyperparam(x)
    if loss == "dlr-targeted":
        attack.y_target = net(x).sort(dim=1)[1][:, -2]
    if norm == "l1":
        start = x + noise
        start = start + L1_projection(x, noise, 3 * EPS[norm])
        for radius, steps in ((3, 30), (2, 30), (1, 40)):
            attack.eps, attack.n_iter = radius * EPS[norm], steps
            start = start + L1_projection(x, start - x, attack.eps)
            start, correct, _, _ = attack.attack_single_run(x, y, x_init=start)
    else:
        _, correct, _, _ = attack.attack_single_run(x, y, x_init=x + EPS[norm] * attack.normalize(noise))
    return (~correct.bool()).numpy()


class Drawing(nn.Module):
    """The network under normal noise on its pixels, drawn anew each time."""

    def __init__(self, net, noise):
        super().__init__()
        self.net, self.noise = net, noise

    def forward(self, x):
        return self.net(x + self.noise * torch.randn_like(x))


def expected(net, x, y):
    """Whom AutoAttack `rand` fools, judged by the mean of DRAWS draws; where nothing is drawn, from five starts."""
    def flags(norm, noise, seed=0):
        drawing = Drawing(net, noise)
        whole = AutoAttack(drawing, norm=norm.capitalize(), eps=EPS[norm], seed=seed, device="cpu", verbose=False,
                           version="rand")
        reached = whole.run_standard_evaluation(x, y, bs=SOME)
        with torch.no_grad():
            return (sum(drawing(reached) for _ in range(DRAWS)).argmax(1) != y).numpy()

    return {f"{norm}_rand": flags(norm, NOISE) for norm in RAND} | {
        f"{norm}_rand_still": np.stack([flags(norm, 0.0, seed) for seed in range(5)]) for norm in RAND}


def main():
    torch.set_num_threads(1)
    data = load_digits()
    grey, labels = data.data.reshape(-1, 1, 8, 8).astype(np.uint8), torch.tensor(data.target)
    images = torch.tensor(grey / 16, dtype=torch.float32)
    net = trained(images[:1200], labels[:1200])
    with torch.no_grad():
        right = (net(images[1200:]).argmax(1) == labels[1200:]).numpy().nonzero()[0][:COUNT] + 1200
    noise = np.random.default_rng(0).integers(-127, 128, (COUNT, 1, 8, 8)).astype(np.int8)
    stored = {"grey": grey[right, 0], "labels": labels[right].numpy().astype(np.int8), "noise": noise[:, 0]}
    for name, value in zip(("kernel1", "bias1", "kernel2", "bias2", "kernel3", "bias3"), net.parameters(), strict=True):
        stored[name] = value.detach().numpy()
    noise = torch.tensor(noise / 127, dtype=torch.float32)
    for name, (norm, loss) in RUNS.items():
        stored[name] = attacked(net, images[right], labels[right], noise, norm, loss)
        print(f"{name}: {stored[name].mean():.1%} fooled at {EPS[norm]}")
    for norm, version in WHOLE:
        whole = AutoAttack(net, norm=norm.capitalize(), eps=EPS[norm], seed=0, device="cpu", verbose=False,
                           version=version)
        x, y = images[right][:SOME], labels[right][:SOME]
        name = f"{norm}_{version}"
        stored[name] = (net(whole.run_standard_evaluation(x, y, bs=SOME)).argmax(1) != y).numpy()
        print(f"{norm} {version}: {stored[name].mean():.1%} of {SOME} fooled")
    stored |= expected(net, x, y)
    theirs.L0_norm = lambda change: (change.abs() > 1e-6).flatten(1).sum(-1)
    for name, (norm, loss) in RUNS.items():
        if norm == "l1":
            stored[f"{name}_counted"] = attacked(net, images[right], labels[right], noise, norm, loss)
    for norm, eps in EPS.items():
        stored[f"eps_{norm}"] = np.float32(eps)
    np.savez_compressed(pathlib.Path(__file__).with_name("apgd.npz"), **stored)


if __name__ == "__main__":
    main()

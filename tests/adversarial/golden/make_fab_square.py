"""Makes fab_square.npz: what FAB and Square of the authors' code do, draw by draw, to a small network.

    PYTHONPATH=AUTO_ATTACK python tests/adversarial/golden/make_fab_square.py

AUTO_ATTACK is a clone of github.com/fra31/auto-attack at commit a392200. Needs torch and scikit-learn. The draws of
Square are recorded as bits; those of FAB are replaced by ones that numpy repeats, `unit_draws`.
"""

import pathlib
import sys

import numpy as np
from sklearn.datasets import load_digits

COUNT, QUERIES = 200, 600
EPS = {"linf": 0.06, "l2": 0.6, "l1": 2.5}
SQUARE_EPS = {"linf": 0.09, "l2": 1.2, "l1": 5.0}
BLACK_BOX = 100
FILE = pathlib.Path(__file__).with_name("fab_square.npz")


def digits(first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Digits on 10 x 10 pixels in three unlike channels: (N,10,10,3) in [0,1], many pixels at 0 and at 1; labels."""
    data = load_digits()
    grey = np.pad(data.images[first:first + count].astype(np.float32) / 16, ((0, 0), (1, 1), (1, 1)))
    return np.stack([grey, 1 - grey, 0.5 * grey + 0.25], -1), data.target[first:first + count].astype(np.int32)


def unit_draws(kind: str, shape) -> np.ndarray:
    """What replaces torch's random numbers in FAB's restart: uniform in [0,1], or normal; the channels come second."""
    random = np.random.default_rng(11)
    return (random.random(shape) if kind == "rand" else random.normal(size=shape)).astype(np.float32)


def main():
    import torch
    from autoattack.fab_pt import FABAttack_PT
    from autoattack.square import SquareAttack

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 2, stride=2), torch.nn.ReLU(), torch.nn.Flatten(),
                              torch.nn.Linear(200, 10))

    def tensors(images, labels):
        return torch.tensor(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels, dtype=torch.long)

    x, y = tensors(*digits(0, 1200))
    adam = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(150):
        adam.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        adam.step()
    for weight in net.parameters():
        weight.requires_grad_(False)
    conv, dense = net[0], net[3]
    kept = {"patch": conv.weight.permute(2, 3, 1, 0).reshape(12, 8).numpy(), "patch_bias": conv.bias.numpy(),
            # rows in the order of (H,W,C)
            "dense": dense.weight.reshape(10, 8, 5, 5).permute(2, 3, 1, 0).reshape(200, 10).numpy(),
            "dense_bias": dense.bias.numpy()}
    x, y = tensors(*digits(1300, COUNT))
    print("clean accuracy", (net(x).argmax(1) == y).float().mean().item())

    def lengths(change, norm):
        change = change.reshape(len(change), -1)
        return torch.linalg.vector_norm(change, {"linf": float("inf"), "l2": 2, "l1": 1}[norm], dim=1).numpy()

    names = {"linf": "Linf", "l2": "L2", "l1": "L1"}
    for norm, eps in EPS.items():
        attack = FABAttack_PT(net, norm=names[norm], eps=eps, n_iter=100, n_target_classes=9)
        for form, targeted in (("fab", False), ("fab_t", True)):
            attack.targeted = targeted
            adv = attack.perturb(x, y)
            kept[f"{form}_{norm}_success"] = (net(adv).argmax(1) != y).numpy()
            kept[f"{form}_{norm}_norm"] = lengths(adv - x, norm)
        attack.targeted = False
        for form, start in (("smallest", False), ("restart", True)):
            real = torch.rand, torch.randn
            torch.rand = lambda shape: torch.tensor(unit_draws("rand", tuple(shape)))
            torch.randn = lambda shape: torch.tensor(unit_draws("randn", tuple(shape)))
            # Runs on what it classifies rightly alone: given no labels it does on all.
            adv = attack.attack_single_run(x, None, use_rand_start=start)
            torch.rand, torch.randn = real
            kept[f"{form}_{norm}_norm"] = lengths(adv - x, norm)
        print(norm, {name: (value.mean() if value.dtype == bool else np.median(value)).round(4)
                     for name, value in kept.items() if f"_{norm}_" in name})

    # Square in float64: the authors' code divides what rounding leaves in a window by its own length, so that in
    # float32 noise of 1e-8 becomes a change of full size.
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # of its own casts
    net, x, y = net.double(), x[:BLACK_BOX].double(), y[:BLACK_BOX]
    right = net(x).argmax(1) == y
    for norm, eps in SQUARE_EPS.items():
        attack = recorder(SquareAttack)(net, norm=names[norm], eps=eps, n_queries=QUERIES, resc_schedule=False)
        attack.alive = None
        attack.right = right.numpy()
        adv = attack.perturb(x, y)
        kept[f"square_{norm}_success"] = (net(adv).argmax(1) != y).numpy()
        kept[f"square_{norm}_loss"] = attack.reached
        kept[f"square_{norm}_queries"] = attack.spent
        for name, value in attack.draws(norm).items():
            kept[f"square_{norm}_{name}"] = value
        print(norm, "square", kept[f"square_{norm}_success"].mean(), attack.spent.mean())
    np.savez_compressed(FILE, **kept)
    print(FILE.stat().st_size, "bytes")


def recorder(base):
    """The authors' attack, noting what it draws and who still took part when it did."""
    import torch

    class Recorder(base):
        def attack_single_run(self, x, y):
            self.alive = np.ones(len(x), bool)
            self.best = np.full(len(x), np.inf, np.float32)
            self.integers, self.choices, self.turns = [], [], []
            spent, adv = super().attack_single_run(x, y)
            where = np.flatnonzero(self.right)
            self.spent, self.reached = np.zeros(len(self.right), np.int32), np.zeros(len(self.right), np.float32)
            self.spent[where] = spent.numpy()
            self.reached[where] = super().margin_and_loss(adv, y)[1].numpy()
            return spent, adv

        def margin_and_loss(self, x, y):
            margin, loss = super().margin_and_loss(x, y)
            if len(x) == self.alive.sum():
                self.alive[np.flatnonzero(self.alive)] = (margin > 0).numpy()
            return margin, loss

        def random_int(self, low=0, high=1, shape=(1,)):
            drawn = super().random_int(low, high, list(shape))
            self.integers.append(int(drawn))
            return drawn

        def random_choice(self, shape):
            drawn = super().random_choice(shape)
            whole = drawn.numpy()
            if len(shape) == 4:
                whole = np.ones((len(self.right), *shape[1:]), np.float32)
                whole[np.flatnonzero(self.right)[self.alive]] = drawn.numpy()
            self.choices.append(whole.squeeze() > 0)
            return drawn

        def eta(self, s):
            real = torch.rand

            def noted(*arguments):
                drawn = real(*arguments)
                self.turns.append(bool(drawn > 0.5))
                return drawn

            torch.rand = noted
            delta = super().eta(s)
            torch.rand = real
            return delta

        def draws(self, norm):
            each = 2 if norm == "linf" else 4
            moves = np.array(self.integers, np.uint8).reshape(-1, each)
            first = len(self.choices) - len(moves)
            packed = {"places": moves, "signs": np.packbits(np.stack(self.choices[first:]))}
            packed["signs_shape"] = np.array(np.stack(self.choices[first:]).shape)
            start = np.stack(self.choices[:first])
            return packed | {"start": np.packbits(start), "start_shape": np.array(start.shape),
                             "turns": np.array(self.turns, bool)}

    return Recorder


if __name__ == "__main__":
    sys.exit(main())

"""Makes decision.npz: what Foolbox 3.3.4 reaches with decisions alone, on a small network's weights that go along.

    python tests/adversarial/golden/make_decision.py       (needs torch and foolbox; some minutes)

One image at a time: Foolbox's HopSkipJump divides the gradients of a batch by one common norm.
"""

import pathlib

import foolbox
import numpy as np
import torch
from sklearn.datasets import load_digits

COUNT = 12

torch.manual_seed(0)
torch.set_num_threads(1)
np.random.seed(0)
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
hidden, last = torch.nn.Linear(64, 32), torch.nn.Linear(32, 10)
network = torch.nn.Sequential(torch.nn.Flatten(), hidden, torch.nn.ReLU(), last)
optimizer = torch.optim.Adam(network.parameters(), 5e-3, weight_decay=1e-4)
for _ in range(300):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(network(images[:1500]), labels[:1500]).backward()
    optimizer.step()
network.eval().requires_grad_(False)

predicted = network(images).argmax(-1)
rest = [i for i in range(1500, len(images)) if predicted[i] == labels[i]][:COUNT]
x, y = images[rest], labels[rest]
distances = torch.cdist(x.flatten(1), images[:1500].flatten(1))
distances[predicted[:1500][None] == y[:, None]] = torch.inf
start = images[distances.argmin(-1)]

model = foolbox.PyTorchModel(network, bounds=(0, 1))
attacks = {
    "boundary_l2": foolbox.attacks.BoundaryAttack(steps=25000),
    "hop_skip_jump_l2": foolbox.attacks.HopSkipJumpAttack(constraint="l2"),
    "hop_skip_jump_linf": foolbox.attacks.HopSkipJumpAttack(constraint="linf"),
}
found = {}
for name, attack in attacks.items():
    reached = torch.cat([attack.run(model, x[i:i + 1], y[i:i + 1], starting_points=start[i:i + 1])
                         for i in range(COUNT)])
    order = float("inf") if name.endswith("linf") else 2
    found[name] = torch.linalg.vector_norm((reached - x).flatten(1), order, -1).numpy()
    print(name, np.median(found[name]), found[name])

np.savez_compressed(
    pathlib.Path(__file__).with_name("decision.npz"), hidden=hidden.weight.numpy().T, hidden_bias=hidden.bias.numpy(),
    last=last.weight.numpy().T, last_bias=last.bias.numpy(), images=x.permute(0, 2, 3, 1).numpy(),
    labels=y.numpy().astype(np.int32), start=start.permute(0, 2, 3, 1).numpy(), **found)

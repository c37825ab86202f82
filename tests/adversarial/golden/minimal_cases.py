"""Which attacks are compared with Foolbox, on what."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from dlcourse import models

ATTACKED = slice(1500, 1600)

SHORT = {"steps": 100, "rounds": 5, "constant": 0.1}
CASES = {
    "deepfool linf": ("deepfool", "linf", {}, False),
    "deepfool l2": ("deepfool", "l2", {}, False),
    "ddn": ("ddn", "l2", {}, False),
    "ddn targeted": ("ddn", "l2", {}, True),
    "fmn linf": ("fmn", "linf", {}, False),
    "fmn l2": ("fmn", "l2", {}, False),
    "fmn l2 targeted": ("fmn", "l2", {}, True),
    "fmn l1": ("fmn", "l1", {}, False),
    "fmn l0": ("fmn", "l0", {}, False),
    "carlini_wagner": ("carlini_wagner", "l2", SHORT, False),
    "carlini_wagner targeted": ("carlini_wagner", "l2", SHORT, True),
    "ead EN": ("ead", "l1", {**SHORT, "rule": "EN", "beta": 1e-3}, False),
    "ead L1": ("ead", "l1", {**SHORT, "rule": "L1", "beta": 1e-2}, False),
    "ead L1 targeted": ("ead", "l1", {**SHORT, "rule": "L1", "beta": 1e-2}, True),
}
"""Name: (attack, norm, options, targeted)."""
PGD = {"pgd linf": ("linf", 0.06, False), "pgd l2": ("l2", 0.3, False), "pgd linf targeted": ("linf", 0.15, True),
       "pgd l2 targeted": ("l2", 0.7, True)}
"""Name: (norm, eps, targeted), of PGD with PGD_STEPS steps of eps / 5 from the image itself."""
PGD_STEPS = 20


def model():
    return models.create("convnet,width=8,stages=2,depth=1", 10, (8, 8, 1))


def digits(part: slice) -> tuple[np.ndarray, np.ndarray]:
    """Images (N,8,8,1) in [0, 1] and labels (N,) int32."""
    images, labels = load_digits(return_X_y=True)
    return (images[part] / 16).astype(np.float32).reshape(-1, 8, 8, 1), labels[part].astype(np.int32)


def targets(labels: np.ndarray) -> np.ndarray:
    return (labels + 1) % 10

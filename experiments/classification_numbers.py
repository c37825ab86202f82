"""The lecture's question: can a hundred numbers represent an image, and can good ones be found?

A linear classifier on D numbers an image: those that the network learned, random projections, principal components;
and on all pixels. Everything is fitted anew on each of several random splits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.decomposition import PCA

from dlcourse.contracts import Claim, Evidence
from dlcourse.data import splits
from dlcourse.data.arrays import ArraySplit
from dlcourse.reporting import figures
from dlcourse.training import intervals
from dlcourse.transfer import probes
from experiments import train

HELD_OUT = 0.4
"""Share of the images that each split keeps for testing."""

CHOOSING = 0.25
"""Share of the others that choose the decay of the linear classifiers; the network does not see them."""


def hundred_numbers(config, run, dataset, model, trained, test, metrics) -> list[Claim]:
    """Accuracy of a linear classifier on the learned numbers against the same on others."""
    if not config.analysis.splits or config.model.model.startswith("linear"):
        return []
    parts = [split[np.arange(len(split))] for split in dataset.splits.values()]
    images, labels = (np.concatenate([part[name] for part in parts]) for name in ("image", "label"))
    share = (1 - HELD_OUT) * (1 - CHOOSING) * len(labels) / len(dataset.splits["train"])
    steps = max(1, round(int(trained.state.step) * share))  # as many epochs as the run itself
    learn = learner(config, dataset, model, steps)
    rows = []
    first = config.run.seed * config.analysis.splits
    for repeat in range(first, first + config.analysis.splits):
        rest, held_out = splits.stratified(labels, HELD_OUT, repeat, "test", dataset.class_names)
        on = splits.stratified(labels[rest], CHOOSING, repeat, "validation", dataset.class_names)
        numbers = {"learned numbers": learn(images, labels, rest[on[0]], repeat)}
        width = numbers["learned numbers"].shape[1]
        numbers |= controls(images.reshape(len(images), -1), width, rest, repeat)
        rows.append({name: _accuracy_of_line(x, labels, rest, on, held_out, dataset.num_classes)
                     for name, x in numbers.items()})
    counts = len(rest), len(held_out), width
    names = list(rows[0])
    scores = np.array([[row[name] for name in names] for row in rows])
    best = 1 + int(scores[:, 1:].mean(0).argmax())
    metrics |= {
        f"numbers/{name.replace(' ', '_')}": float(value) for name, value in zip(names, scores.mean(0), strict=True)
    }
    run.figure(
        "numbers",
        **figures.comparison(
            names,
            scores.mean(0),
            [intervals.resampled_interval(column, *counts[:2]) for column in scores.T],
            names[1:],
            "test accuracy of a linear classifier",
            f"{len(rows)} random splits into {counts[0]} training and {counts[1]} test images; everything, the network "
            f"included, is fitted on the training images alone. {counts[2]} numbers an image, except for all pixels.",
        ),
    )
    interval = intervals.resampled_interval(scores[:, 0] - scores[:, best], *counts[:2])
    return [
        Claim(
            "L01.numbers",
            "Representation learning",
            f"{counts[2]} learned numbers represent an image better for a linear classifier than {names[best]}.",
            interval[0] > 0,
            Evidence(float(scores[:, 0].mean()), float(scores[:, best].mean()), 0.0, interval, len(rows)),
            f"n counts splits of the same {len(images)} images; the interval corrects for their overlap (Nadeau & "
            f"Bengio 2003). The control is the best of {', '.join(names[1:])}. The network learns "
            "from three quarters of the training images, augmented; the last quarter chooses every classifier's decay.",
        )
    ]


def learner(config, dataset, model, steps: int):
    """(images, labels, chosen, seed) -> the last features of all images, learned from the images `chosen` alone."""
    _, tx = train.make_optimizer(config.optimizer, steps, lambda warmup: 0)
    loss = train.classifier_loss(model, config, dataset)
    wanted = config.optimizer
    fitted = train.fitter(model, dataset.image_shape, loss, tx, ema=wanted.ema, accumulate=wanted.accumulate)
    read = jax.jit(lambda variables, images: model.apply(variables, images)[1]["features"])

    def learn(images, labels, chosen, seed):
        state = fitted(ArraySplit(images[chosen], labels[chosen]), steps, config.data.batch_size, seed)
        return np.asarray(read(state.variables, images))

    return learn


def controls(pixels, width: int, rest, seed: int) -> dict[str, np.ndarray]:
    """What was not learned from labels: random projections, principal components of the images `rest`, all pixels."""
    directions = np.random.default_rng(seed).standard_normal((pixels.shape[1], width)) / np.sqrt(pixels.shape[1])
    principal = PCA(min(width, len(rest) - 1), svd_solver="full").fit(pixels[rest])
    return {f"{width} random projections": pixels @ directions,
            f"{principal.n_components_} principal components": principal.transform(pixels), "all pixels": pixels}


def _accuracy_of_line(x, labels, rest, on, held_out, num_classes) -> float:
    """Test accuracy of a linear classifier on `rest` whose decay was chosen among them, on[1] judging on[0]."""

    def part(indices):
        return jnp.asarray(x[indices], jnp.float32), labels[indices]

    _, l2 = probes.select_linear(part(rest[on[0]]), part(rest[on[1]]), num_classes)
    return float(probes.accuracy(probes.fit_linear(*part(rest), num_classes, l2), *part(held_out)))

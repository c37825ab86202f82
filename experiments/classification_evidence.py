"""The claims and figures of `classification`, each measured beside its control.

Every claim is a function (config, run, dataset, model, trained, test, metrics) -> a list of at most one Claim
(none where the question has no meaning for this model or data); it adds its figures to the run and its numbers to
`metrics`.
"""

from __future__ import annotations

import itertools

import numpy as np

from dlcourse import models
from dlcourse.contracts import Claim, Evidence
from dlcourse.data import batches
from dlcourse.interpretation import receptive_field
from dlcourse.reporting import figures, pictures
from dlcourse.training import evaluation, intervals, losses, optimizers
from dlcourse.transfer import probes
from experiments import train

FIELD_IMAGE = 64
"""Receptive fields are measured on images of at least this side, so that the border does not cut them off."""


def learned_beats_pixels(config, run, dataset, model, trained, test, metrics) -> list[Claim]:
    """The network against the best linear classifier of its pixels that the same number of updates finds."""
    if config.model.model.startswith("linear"):
        return []
    linear = models.create("linear", dataset.num_classes, dataset.image_shape)
    steps, candidates = int(trained.state.step), []
    for rate in (1e-4, 1e-3, 1e-2):
        tx = optimizers.create("adamw", optimizers.schedule("one_cycle", rate, steps), weight_decay=1e-2)
        fitted = train.fitter(linear, dataset.image_shape, losses.cross_entropy(linear), tx)
        state = fitted(dataset.splits["train"], steps, config.data.batch_size, config.run.seed)
        seen = train.predictions(linear, state.variables, dataset.splits["validation"])
        candidates.append((float(seen.nll.mean()), rate, state))
    _, rate, state = min(candidates, key=lambda candidate: candidate[0])
    control = train.predictions(linear, state.variables, dataset.splits["test"])
    metrics |= {f"linear/{name}": value for name, value in evaluation.summarise(control)}
    difference, interval = intervals.paired_difference(test.correct, control.correct)
    run.figure(
        "learned_against_pixels",
        **figures.comparison(
            [config.model.model, "linear on pixels"],
            [test.correct.mean(), control.correct.mean()],
            [intervals.wilson(int(p.correct.sum()), len(p.label)) for p in (test, control)],
            ["linear on pixels"],
            "test accuracy",
            f"Both trained on the same images for {steps} updates of {config.data.batch_size} images.",
        ),
    )
    return [
        Claim(
            "L01.learned",
            "Representation learning",
            "Features learned end to end classify better than a linear classifier on fixed pixels.",
            interval[0] > 0,
            Evidence(float(test.correct.mean()), float(control.correct.mean()), 0.0, interval, len(test.label)),
            f"One training run (seed {config.run.seed}); the interval is over test images. The linear classifier has "
            f"the same images and number of updates, no augmentation, and AdamW with its rate ({rate:g}) chosen on "
            "validation among three.",
        )
    ]


def depth_helps(config, run, dataset, model, trained, test, metrics) -> list[Claim]:
    """What a line can read from the last layer beyond the first: trained, against the same network untrained."""
    nets = {"trained": trained.state.variables, "untrained": trained.initial.variables}
    right = {name: read_taps(config, model, variables, dataset) for name, variables in nets.items()}
    taps = list(right["trained"])
    if len(taps) < 2:
        return []
    accuracy = {name: [right[name][tap].mean() for tap in taps] for name in nets}
    metrics |= {f"probe_{name}/{tap}": float(a) for name in nets for tap, a in zip(taps, accuracy[name], strict=True)}
    bands = [[intervals.wilson(int(right[name][tap].sum()), right[name][tap].size) for tap in taps] for name in nets]
    run.figure("probes", **figures.probe_curve(taps, *accuracy.values(), *bands))
    gain = {name: right[name][taps[-1]].astype(float) - right[name][taps[0]] for name in nets}
    own, interval = (intervals.mean_interval(x) for x in (gain["trained"], gain["trained"] - gain["untrained"]))
    return [
        Claim(
            "L07.depth",
            "Deep learning",
            f"Trained end to end, depth helps: from {taps[0]} to {taps[-1]} a linear probe gains accuracy, and more "
            "than in the same network untrained.",
            own[0] > 0 and interval[0] > 0,
            Evidence(gain["trained"].mean(), gain["untrained"].mean(), 0.0, interval, len(gain["trained"])),
            f"The gain itself must also be above zero; its 95 % interval is [{own[0]:.4f}, {own[1]:.4f}]. One network "
            f"(seed {config.run.seed}), intervals over test images. Probes see each map averaged to a small grid, the "
            f"same in both networks, and at most {config.analysis.probe_examples} training images; their decay is "
            "chosen on validation.",
        )
    ]


def read_taps(config, model, variables, dataset) -> dict[str, np.ndarray]:
    """For every tap, in order, whether a linear probe of it is right on each test image."""
    size, seed, taps = 100, config.run.seed, spaced(receptive_field.theoretical(model, dataset.image_shape))
    count = -(-min(config.analysis.probe_examples, len(dataset.splits["train"])) // size)
    feeds = {
        "train": itertools.islice(batches.train_batches(dataset.splits["train"], size, seed=seed), count),
        **{name: batches.eval_batches(dataset.splits[name], size) for name in ("validation", "test")},
    }
    features, labels = {}, {}
    for name, feed in feeds.items():
        features[name], labels[name] = probes.tap_features(model, variables, feed, taps)
    right = {}
    for tap in features["train"]:
        probe, _ = probes.select_linear(
            *((features[name][tap], labels[name]) for name in ("train", "validation")), dataset.num_classes
        )
        right[tap] = np.asarray(probes.predict_linear(probe, features["test"][tap])).argmax(-1) == labels["test"]
    return right


def spaced(taps, most: int = 8) -> tuple[str, ...]:
    """At most so many of a network's taps, evenly, the first and the last before the logits among them."""
    names = [name for name in taps if name != "logits"]
    chosen = np.unique(np.linspace(0, len(names) - 1, most).round().astype(int))
    return tuple(names[i] for i in chosen)


def fields_grow(config, run, dataset, model, trained, test, metrics) -> list[Claim]:
    """Receptive fields by arithmetic and by differentiation, layer by layer."""
    shape = (*(max(side, FIELD_IMAGE) for side in dataset.image_shape[:2]), dataset.image_shape[2])
    theory = {tap: field for tap, field in receptive_field.theoretical(model, shape).items() if not field.is_global}
    if len(theory) < 2:
        return []
    boxes = receptive_field.measured(model, shape)
    taps = list(theory)
    theory, measured = [_side(theory[tap].box) for tap in taps], [_side(boxes[tap]) for tap in taps]
    equal = sum(a == b for a, b in zip(theory, measured, strict=True))
    growing = all(a <= b for a, b in zip(measured, measured[1:], strict=False)) and measured[-1] > measured[0]
    metrics |= {f"receptive_field/{tap}": size for tap, size in zip(taps, measured, strict=True)}
    run.figure("receptive_fields", **figures.receptive_fields(taps, theory, measured))
    return [
        Claim(
            "L11.fields",
            "Hierarchical CNNs",
            "Receptive fields grow from layer to layer, and arithmetic agrees with differentiation at every one.",
            growing and equal == len(taps),
            Evidence(float(measured[-1]), float(measured[0]), 0.0, (float(measured[-1] - measured[0]),) * 2, equal),
            "Sides in pixels of what one unit of the last and of the first local layer sees, in an image of "
            f"{shape[0]} x {shape[1]}; n counts the layers, of {len(taps)}, at which both agree. Exact, so the "
            "interval has no width.",
        )
    ]


def _side(box) -> int:
    return max(box.bottom - box.top, box.right - box.left)


def draw_predictions(run, dataset, test) -> None:
    """Learning curves, confusions, and the surest, least sure and most wrong test images."""
    run.figure("learning_curves", **figures.learning_curves(run.metrics()))
    run.figure(
        "confusion", **pictures.confusion_matrix(evaluation.confusion(test, dataset.num_classes), dataset.class_names)
    )
    run.figure(
        "predictions",
        **pictures.sample_predictions(
            lambda chosen: dataset.splits["test"][test.index[chosen]]["image"],
            test.label,
            test.predicted,
            test.confidence,
            dataset.class_names,
        ),
    )


def draw_filters(run, trained) -> None:
    """The first layer's filters, with the same filters before training beside them; nothing for networks without."""
    kernels = [_first_kernel(state.variables["params"]) for state in (trained.state, trained.initial)]
    if kernels[0] is not None:
        run.figure("filters", **pictures.filters(*kernels))


def _first_kernel(params):
    """The kernel (k, k, C, F) that reads the image: the one named conv1, stem or patches; None where there is none."""
    for name in ("conv1", "stem", "patches"):
        if name in params and np.ndim(params[name]["kernel"]) == 4:
            return np.asarray(params[name]["kernel"])
    return None


def class_table(dataset, test) -> dict:
    """One row a class: how many, recall, precision, F1."""
    rows = [
        [name, row["n"], row["recall"], row["precision"], row["f1"]]
        for name, row in zip(dataset.class_names, evaluation.per_class(test, dataset.num_classes), strict=True)
    ]
    return {
        "title": "Class by class",
        "header": ["class", "test images", "recall", "precision", "F1"],
        "rows": rows,
        "note": f"Over {len(test.label)} test images.",
    }

"""The claims and figures of `classification`, each measured beside its control.

Every claim is a function (config, run, dataset, model, trained, test, metrics) -> a list of at most one Claim
(none where the question has no meaning for this model or data); it adds its figures to the run and its numbers to
`metrics`.
"""

from __future__ import annotations

import itertools

import jax
import numpy as np

from dlcourse import models
from dlcourse.contracts import Claim, Evidence
from dlcourse.data import batches, order
from dlcourse.interpretation import receptive_field
from dlcourse.reporting import figures, pictures
from dlcourse.training import evaluation, intervals, losses, optimizers
from dlcourse.transfer import probes
from experiments import train

FIELD_IMAGE = 256
"""Receptive fields are measured on images of at most this side where the data's are smaller."""

SETTLING = 50
"""Batches that settle running averages of momentum 0.9: what they began with then weighs 0.5 %."""

PROBE_L2 = (1e-3, 1e-2, 1e-1)


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
        seen = evaluation.predictions(evaluation.predictor(linear, state.variables), dataset.splits["validation"])
        candidates.append((float(seen.nll.mean()), rate, state))
    _, rate, state = min(candidates, key=lambda candidate: candidate[0])
    control = evaluation.predictions(evaluation.predictor(linear, state.variables), dataset.splits["test"])
    metrics |= {f"linear/{name}": value for name, value in evaluation.summarise(control)}
    _, interval = intervals.paired_difference(test.correct, control.correct)
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
    """How the accuracy of linear probes rises with depth: trained, against the same network untrained."""
    feed = batches.train_batches(dataset.splits["train"], config.data.batch_size, seed=config.run.seed)
    untrained = settled(model, trained.untrained.variables, itertools.islice(feed, SETTLING))
    nets = {"trained": trained.state.variables, "untrained": untrained}
    right = {name: read_taps(config, model, variables, dataset) for name, variables in nets.items()}
    taps = list(right["trained"])
    if len(taps) < 2:
        return []
    accuracy = {name: [right[name][tap].mean() for tap in taps] for name in nets}
    metrics |= {f"probe_{name}/{tap}": float(a) for name in nets for tap, a in zip(taps, accuracy[name], strict=True)}
    bands = [[intervals.wilson(int(right[name][tap].sum()), right[name][tap].size) for tap in taps] for name in nets]
    run.figure("probes", **figures.probe_curve(taps, *accuracy.values(), *bands))
    rise = {name: trend(np.stack([right[name][tap] for tap in taps])) for name in nets}
    own, interval = (intervals.mean_interval(x) for x in (rise["trained"], rise["trained"] - rise["untrained"]))
    return [
        Claim(
            "L07.depth",
            "Deep learning",
            "Trained end to end, depth helps: the deeper the layer, the better a linear probe reads the class, and "
            "more so than in the same network untrained.",
            own[0] > 0 and interval[0] > 0,
            Evidence(float(rise["trained"].mean()), float(rise["untrained"].mean()), 0.0, interval, len(test.label)),
            f"Value: rise of the straight line through the probes' accuracies from {taps[0]} to {taps[-1]}; it must be "
            f"above zero itself (its 95 % interval: {own[0]:.4f} to {own[1]:.4f}). One network (seed "
            f"{config.run.seed}), intervals over test images. The untrained network's normalisation statistics are "
            "those of training images. Probes see each map averaged to a small grid, the same in both networks, and "
            f"at most {config.analysis.probe_examples} training images; their decay is chosen on validation.",
        )
    ]


def settled(model, variables, feed):
    """The variables with the running averages of normalisation that these batches give, the parameters untouched.

    Without, an untrained network would be read with an identity in place of every normalisation: a weaker control.
    """
    if "batch_stats" not in variables:
        return variables

    @jax.jit
    def step(variables, images):
        rngs = {"dropout": jax.random.key(0)}
        _, new = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)
        return {**variables, **new}

    for batch in feed:
        variables = step(variables, batch["image"])
    return variables


def trend(right: np.ndarray) -> np.ndarray:
    """(T, N) right or wrong at each depth -> (N,) rise over all depths of each image's least-squares line."""
    depth = np.arange(len(right)) - (len(right) - 1) / 2
    return depth @ right * (len(right) - 1) / np.square(depth).sum()


def read_taps(config, model, variables, dataset) -> dict[str, np.ndarray]:
    """For every tap, in order, whether a linear probe of it is right on each test image."""
    train_split = dataset.splits["train"]
    chosen = order.permutation(len(train_split), config.run.seed, 0)[: config.analysis.probe_examples]
    parts = {**dataset.splits, "train": train_split.take(np.sort(chosen))}
    taps = spaced(receptive_field.theoretical(model, dataset.image_shape))
    features, labels = {}, {}
    for name, part in parts.items():
        features[name], labels[name] = probes.tap_features(model, variables, batches.eval_batches(part, 100), taps)
    right = {}
    for tap in taps:
        probe, _ = probes.select_linear(
            *((features[name][tap], labels[name]) for name in ("train", "validation")), dataset.num_classes, PROBE_L2
        )
        right[tap] = np.asarray(probes.predict_linear(probe, features["test"][tap])).argmax(-1) == labels["test"]
    return right


def spaced(taps, most: int = 16) -> tuple[str, ...]:
    """All of a network's taps before the logits; of more than `most`, so many evenly, the first and last among them."""
    names = [name for name in taps if name != "logits"]
    chosen = np.unique(np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int))
    return tuple(names[i] for i in chosen)


def fields_grow(config, run, dataset, model, trained, test, metrics) -> list[Claim]:
    """Receptive fields by arithmetic and by differentiation, layer by layer."""
    local = {t: f for t, f in receptive_field.theoretical(model, dataset.image_shape).items() if not f.is_global}
    if len(local) < 2:
        return []
    # Large enough that the border cuts no field off, as far as the measurement stays cheap.
    side = min(2 * max(field.size for field in local.values()), FIELD_IMAGE)
    shape = (*(max(side, pixels) for pixels in dataset.image_shape[:2]), dataset.image_shape[2])
    theory = {tap: field for tap, field in receptive_field.theoretical(model, shape).items() if not field.is_global}
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
            f"{shape[0]} x {shape[1]}; n counts the layers, of {len(taps)}, at which both agree. Derivatives "
            "are taken at positive weights, where nothing cancels or is switched off. Exact: an interval of no width.",
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
    kernels = [_first_kernel(state.variables["params"]) for state in (trained.state, trained.untrained)]
    if kernels[0] is not None:
        run.figure("filters", **pictures.filters(*kernels))


def _first_kernel(params):
    """The kernel (k, k, C, F) that reads the image; None where there is none."""
    for name in ("conv1", "stem"):
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


def data_table(dataset) -> dict:
    """How many images each split has, where they come from and on what terms."""
    rows = [[name, len(split)] for name, split in dataset.splits.items()]
    note = f"{dataset.name}, licence: {dataset.licence}. {' '.join(dataset.citation.split())}"
    return {"title": "Data", "header": ["split", "images"], "rows": rows, "note": note}

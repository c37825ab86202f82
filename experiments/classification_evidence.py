"""The claims and figures of `classification`, each measured beside its control.

Every claim is a function (config, run, dataset, model, trained, test, metrics) -> a list of at most one Claim
(none where the question has no meaning for this model or data); it adds its figures to the run and its numbers to
`metrics`.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from sklearn.decomposition import PCA

from dlcourse import models, streams
from dlcourse.contracts import Claim, Evidence
from dlcourse.data import batches, splits
from dlcourse.data.arrays import ArraySplit
from dlcourse.interpretation import receptive_field
from dlcourse.reporting import figures, pictures
from dlcourse.training import evaluation, losses, optimizers
from dlcourse.training import state as states
from dlcourse.training.loop import fit
from dlcourse.training.step import train_step
from dlcourse.transfer import probes
from experiments import train

FIELD_IMAGE = 64
"""Receptive fields are measured on images of at least this side, so that the border does not cut them off."""

CASCADE = "Representation learning", "Deep learning", "Hierarchical CNNs"


def learned_beats_pixels(config, run, dataset, model, trained, test, metrics) -> list[Claim]:
    """The network against the best linear classifier of its pixels that the same number of updates finds."""
    if config.model.model.startswith("linear"):
        return []
    linear = models.create("linear", dataset.num_classes, dataset.image_shape)
    steps, candidates = int(trained.state.step), []
    for rate in (1e-4, 1e-3, 1e-2):
        state = quick_fit(
            linear,
            losses.cross_entropy(linear),
            dataset.splits["train"],
            rate,
            steps,
            config.data.batch_size,
            config.run.seed,
        )
        seen = train.predictions(linear, state.variables, dataset.splits["validation"])
        candidates.append((float(seen.nll.mean()), rate, state))
    _, rate, state = min(candidates, key=lambda candidate: candidate[0])
    control = train.predictions(linear, state.variables, dataset.splits["test"])
    metrics |= {f"linear/{name}": value for name, value in evaluation.summarise(control)}
    difference, interval = evaluation.paired_difference(test.correct, control.correct)
    run.figure(
        "learned_against_pixels",
        **figures.comparison(
            [config.model.model, "linear on pixels"],
            [test.correct.mean(), control.correct.mean()],
            [evaluation.wilson(int(p.correct.sum()), len(p.label)) for p in (test, control)],
            ["linear on pixels"],
            "test accuracy",
            f"Both trained on the same images for {steps} updates of {config.data.batch_size} images.",
        ),
    )
    return [
        Claim(
            "L01.learned",
            CASCADE[0],
            "Features learned end to end classify better than a linear classifier on fixed pixels.",
            interval[0] > 0,
            Evidence(float(test.correct.mean()), float(control.correct.mean()), 0.0, interval, len(test.label)),
            f"One training run (seed {config.run.seed}); the interval is over test images. The linear classifier has the "
            f"same images and number of updates, no augmentation, and AdamW with its rate ({rate:g}) chosen on "
            "validation among three.",
        )
    ]


def quick_fit(model, loss, split, rate, steps, batch_size, seed):
    """A state after `steps` updates of AdamW on a one-cycle schedule; nothing is written."""
    tx = optimizers.create("adamw", optimizers.schedule("one_cycle", rate, steps), weight_decay=1e-2)
    state = states.create(model, split[np.zeros(1, int)]["image"].shape[1:], tx, streams.root(seed))
    step = jax.jit(functools.partial(train_step, loss=loss, tx=tx), donate_argnums=0)
    return fit(state, step, batches.train_batches(split, batch_size, seed=seed), steps=steps)


def hundred_numbers(config, run, dataset, model, trained, test, metrics) -> list[Claim]:
    """A linear classifier on D numbers an image: learned, random, principal, and on all pixels."""
    if not config.analysis.splits:
        return []
    parts = [split[np.arange(len(split))] for split in dataset.splits.values()]
    images, labels = (np.concatenate([part[name] for part in parts]) for name in ("image", "label"))
    pixels = images.reshape(len(images), -1)
    rows, counts = [], None
    for repeat in range(config.analysis.splits):
        rest, held_out = splits.stratified(labels, 0.4, repeat, "test", dataset.class_names)
        fit_on, choose_on = (
            rest[part] for part in splits.stratified(labels[rest], 0.25, repeat, "validation", dataset.class_names)
        )
        numbers = representations(config, dataset, model, images, labels, rest, repeat)
        counts = len(rest), len(held_out), numbers["learned"].shape[1]
        rows.append(
            {
                name: _accuracy_of_line(x, labels, fit_on, choose_on, rest, held_out, dataset.num_classes)
                for name, x in {**numbers, "all pixels": pixels}.items()
            }
        )
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
            [resampled_interval(column, *counts[:2]) for column in scores.T],
            names[1:],
            "test accuracy of a linear classifier",
            f"{len(rows)} random splits into {counts[0]} training and {counts[1]} test images; everything, the network "
            f"included, is fitted on the training images alone. {counts[2]} numbers an image, except for all pixels.",
        ),
    )
    interval = resampled_interval(scores[:, 0] - scores[:, best], *counts[:2])
    return [
        Claim(
            "L01.numbers",
            CASCADE[0],
            f"{counts[2]} learned numbers represent an image better for a linear classifier than {names[best]}.",
            interval[0] > 0,
            Evidence(float(scores[:, 0].mean()), float(scores[:, best].mean()), 0.0, interval, len(rows)),
            f"n counts splits of the same {len(images)} images; the interval corrects for their overlap (Nadeau & "
            f"Bengio 2003). The control is the best of {', '.join(names[1:])}.",
        )
    ]


def representations(config, dataset, model, images, labels, rest, repeat) -> dict[str, np.ndarray]:
    """D numbers for every image: learned from the images `rest` alone, random, and principal components of `rest`."""
    wanted = config.optimizer
    steps = train.durations.parse(config.run.train_for).steps(config.data.batch_size, len(rest))
    split = ArraySplit(images[rest], labels[rest])
    loss = train.classifier_loss(model, config, dataset)
    state = quick_fit(model, loss, split, wanted.learning_rate, steps, config.data.batch_size, repeat)
    logits, taps = jax.jit(functools.partial(model.apply, train=False))(state.variables, images)
    learned = np.asarray(taps["features"])
    pixels = images.reshape(len(images), -1)
    width = learned.shape[1]
    directions = np.random.default_rng(repeat).standard_normal((pixels.shape[1], width)) / np.sqrt(pixels.shape[1])
    principal = PCA(min(width, len(rest) - 1), svd_solver="full").fit(pixels[rest])
    return {
        "learned": learned,
        f"{width} random projections": pixels @ directions,
        f"{principal.n_components_} principal components": principal.transform(pixels),
    }


def _accuracy_of_line(x, labels, fit_on, choose_on, rest, held_out, num_classes) -> float:
    """Test accuracy of a linear classifier whose decay was chosen inside the training images."""

    def part(indices):
        return jnp.asarray(x[indices], jnp.float32), labels[indices]

    _, l2 = probes.select_linear(part(fit_on), part(choose_on), num_classes)
    return float(probes.accuracy(probes.fit_linear(*part(rest), num_classes, l2), *part(held_out)))


def resampled_interval(scores, train_size: int, test_size: int) -> tuple[float, float]:
    """95 % interval of a mean over random splits: mean ± t sqrt((1/R + n_test/n_train) var).

    Source: Nadeau & Bengio 2003, eq. 9: splits of the same examples overlap, so that their results are not independent.
    """
    repeats = len(scores)
    if repeats < 2:
        return -np.inf, np.inf
    spread = np.sqrt((1 / repeats + test_size / train_size) * np.var(scores, ddof=1))
    reach = float(scipy.stats.t.ppf(0.975, repeats - 1) * spread)
    return float(np.mean(scores)) - reach, float(np.mean(scores)) + reach


def depth_helps(config, run, dataset, model, trained, test, metrics) -> list[Claim]:
    """What a line can read from the last layer beyond the first: trained, against the same network untrained."""
    nets = {"trained": trained.state.variables, "untrained": trained.initial.variables}
    right = {name: read_taps(config, model, variables, dataset) for name, variables in nets.items()}
    taps = list(right["trained"])
    if len(taps) < 2:
        return []
    accuracy = {name: [right[name][tap].mean() for tap in taps] for name in nets}
    metrics |= {f"probe_{name}/{tap}": float(a) for name in nets for tap, a in zip(taps, accuracy[name], strict=True)}
    bands = [[evaluation.wilson(int(right[name][tap].sum()), right[name][tap].size) for tap in taps] for name in nets]
    run.figure("probes", **figures.probe_curve(taps, *accuracy.values(), *bands))
    gain = {name: right[name][taps[-1]].astype(float) - right[name][taps[0]] for name in nets}
    interval = evaluation.mean_interval(gain["trained"] - gain["untrained"])
    return [
        Claim(
            "L07.depth",
            CASCADE[1],
            f"Trained end to end, depth helps: from {taps[0]} to {taps[-1]} a linear probe gains accuracy that it does "
            "not gain in the same network untrained.",
            interval[0] > 0,
            Evidence(
                float(gain["trained"].mean()), float(gain["untrained"].mean()), 0.0, interval, len(gain["trained"])
            ),
            f"One network (seed {config.run.seed}); the interval is over test images. Probes see each map averaged to "
            "a small grid, the same in both networks, and at most "
            f"{config.analysis.probe_examples} training images; their decay is chosen on validation.",
        )
    ]


def read_taps(config, model, variables, dataset) -> dict[str, np.ndarray]:
    """For every tap, in order, whether a linear probe of it is right on each test image."""
    size, seed = 100, config.run.seed
    count = -(-min(config.analysis.probe_examples, len(dataset.splits["train"])) // size)
    feeds = {
        "train": itertools.islice(batches.train_batches(dataset.splits["train"], size, seed=seed), count),
        **{name: batches.eval_batches(dataset.splits[name], size) for name in ("validation", "test")},
    }
    features, labels = {}, {}
    for name, feed in feeds.items():
        features[name], labels[name] = probes.tap_features(model, variables, feed)
    right = {}
    for tap in features["train"]:
        probe, _ = probes.select_linear(
            *((features[name][tap], labels[name]) for name in ("train", "validation")), dataset.num_classes
        )
        right[tap] = np.asarray(probes.predict_linear(probe, features["test"][tap])).argmax(-1) == labels["test"]
    return right


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
            CASCADE[2],
            "Receptive fields grow from layer to layer, and arithmetic agrees with differentiation at every one.",
            growing and equal == len(taps),
            Evidence(
                float(measured[-1]),
                float(measured[0]),
                float(measured[0]),
                (float(measured[-1] - measured[0]),) * 2,
                equal,
            ),
            "Sides in pixels of what one unit of the last and of the first local layer sees, in an image of "
            f"{shape[0]} x {shape[1]}; n counts the layers, of {len(taps)}, at which both agree. Exact, so the interval "
            "has no width.",
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

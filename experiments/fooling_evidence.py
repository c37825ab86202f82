"""What `fooling` measures: the search for images of nothing, and every claim beside its control.

Every claim is a function (config, run, dataset, study, metrics) -> a list of claims; it adds its figures to the run and
its numbers to `metrics`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dlcourse import models
from dlcourse.adversarial import fooling, ood
from dlcourse.contracts import Claim, Evidence, Predict, Split
from dlcourse.data import order
from dlcourse.data.arrays import ArraySplit
from dlcourse.reporting import figures, galleries
from dlcourse.streams import root, stream
from dlcourse.training import evaluation, intervals
from experiments import train

SAYS = {"cppn": "Images evolved as functions of position", "direct": "Images evolved pixel by pixel",
        "gradient": "Images that follow the gradient"}
METHODS = (*SAYS, "gradient, regularised")
MLP = "transfer_to_mlp"
TRAINING = 5000
"""Training images, at most, that Mahalanobis' score is fitted on and that distances are measured to."""


@dataclasses.dataclass(frozen=True)
class Study:
    """A network and what it was shown.

    Attributes:
      model, variables, predict: the network.
      key: of all draws.
      found: method -> one Fooled a search.
      real: (N,H,W,C) test images.
      training: (M,H,W,C) and (M,) some training images and their labels.
      controls: kind -> (N,H,W,C) random images.
    """

    model: object
    variables: dict
    predict: Predict
    key: jax.Array
    found: dict[str, list[fooling.Fooled]]
    real: np.ndarray
    training: tuple[np.ndarray, np.ndarray]
    controls: dict[str, np.ndarray]

    def images(self, method: str) -> np.ndarray:
        """Those of all searches, class after class."""
        return np.concatenate([fooled.images for fooled in self.found[method]])

    def confidence(self, method: str) -> np.ndarray:
        return np.concatenate([fooled.confidence for fooled in self.found[method]])


def network(config, run, dataset, model):
    """The variables of the network, the seconds and the speed of training it: as of --init_from, or trained here."""
    if not config.model.init_from:
        trained = train.train(config, run, dataset, model, train.classifier_loss(model, config, dataset))
        return trained.state.variables, trained.seconds, trained.speed
    loss = train.classifier_loss(model, config, dataset)
    made = train.recipe(config, model, dataset.image_shape, len(dataset.splits["train"]), loss)
    plan, _ = train.plan_and_step(config, made)
    state = plan.local(train.start_from(config.model.init_from, plan.create(made.fresh), plan))
    return state.variables, {"compile": 0.0, "train": 0.0, "earlier": 0.0}, {}


def make(config, key, predict, shape, classes: int, method: str) -> fooling.Fooled:
    """One search by one method."""
    wanted = config.fooling
    if method in fooling.ENCODINGS:
        return fooling.evolved(key, predict, shape, classes, method, population=wanted.population,
                               generations=wanted.generations)
    how = fooling.PLAIN if method == "gradient" else fooling.Regularisers()
    return fooling.ascended(key, predict, shape, classes, regularisers=how, steps=wanted.ascent_steps)


def search(config, dataset, model, variables, metrics) -> Study:
    """All searches, and the random images beside them."""
    key, predict = stream(root(config.run.seed), "fooling"), evaluation.predictor(model, variables)
    found = {}
    for method in METHODS:
        began = time.monotonic()
        found[method] = [make(config, stream(key, method, number), predict, dataset.image_shape, dataset.num_classes,
                              method) for number in range(config.fooling.searches)]
        metrics[f"{method}/seconds"] = (time.monotonic() - began) / config.fooling.searches
    metrics["seconds/three_methods"] = sum(metrics[f"{method}/seconds"] for method in SAYS)
    test, training = dataset.splits["test"], dataset.splits["train"]
    real = test[order.permutation(len(test), config.run.seed, 0)[: config.fooling.controls]]["image"]
    some = order.permutation(len(training), config.run.seed, 0)[:TRAINING]
    # Of every class one at least, which Mahalanobis' score needs.
    part = training[np.union1d(some, np.unique(training.labels, return_index=True)[1])]
    controls = {kind: np.asarray(fooling.random_images(stream(key, kind), jnp.asarray(real), kind))
                for kind in fooling.RANDOM}
    return Study(model, variables, predict, key, found, real, (part["image"], part["label"]), controls)


def fooled(config, run, dataset, study, metrics) -> list[Claim]:
    """How many classes reach the confidence, against how many random images do."""
    sure = {kind: _sureness(study.predict, images) >= fooling.CONFIDENCE for kind, images in study.controls.items()}
    sure = {**{method: study.confidence(method) >= fooling.CONFIDENCE for method in METHODS}, **sure}
    counts = {name: (int(reached.sum()), len(reached)) for name, reached in sure.items()}
    nearest = {"real": _nearest(study.real, study.training[0])}
    for method in METHODS:
        nearest[method] = _nearest(study.images(method), study.training[0])
        metrics[f"{method}/lowest_confidence"] = float(study.confidence(method).min())
        metrics[f"{method}/queries"] = float(np.mean([one.queries for one in study.found[method]]))
    metrics |= {f"{name}/share_sure": hits / n for name, (hits, n) in counts.items()}
    metrics |= {f"{name}/distance_to_training": value for name, value in nearest.items()}
    shares = [hits / n for hits, n in counts.values()]
    run.figure("sure", **figures.comparison(
        list(counts), shares, [intervals.wilson(*count) for count in counts.values()], fooling.RANDOM,
        "share with 99.6 % confidence or more",
        f"{config.fooling.searches} searches in each of {dataset.num_classes} classes by every method, and "
        f"{len(study.real)} random images of each kind, all of 8 bits a channel and judged as such."))
    worst = max(fooling.RANDOM, key=lambda kind: counts[kind][0] / counts[kind][1])
    claims = []
    for method, says in SAYS.items():
        value, control, interval = _difference(counts[method], counts[worst])
        claims.append(Claim(
            f"L19.{method}", "Limit 2",
            f"{says} are classified with at least 99.6 % confidence in every class; random images more rarely.",
            value == 1.0 and interval[0] > 0, Evidence(value, control, 0.0, interval, counts[method][1]),
            f"n counts classes times searches. The control is the surest kind of random images, {worst}. That nobody "
            "would recognise the images was not asked of people; their root mean square distance to the nearest "
            f"training image is {nearest[method]:.2f}, that of real test images {nearest['real']:.2f}."))
    return claims


def transfers(config, run, dataset, study, metrics) -> list[Claim]:
    """Whether networks trained from other random numbers take the images for the same class: its like, and an MLP."""
    classes, taken = dataset.num_classes, {}
    mlp = models.create("mlp", classes, dataset.image_shape, config.model.dtype)
    for name, model in (("transfer", study.model), (MLP, mlp)):
        other, same = _trainer(config, dataset, model)(dataset.splits["train"], config.run.seed + 1), {}
        for method in METHODS:
            images = study.images(method)
            same[method] = np.asarray(other(jnp.asarray(images)).argmax(-1)) == np.arange(len(images)) % classes
            metrics[f"{method}/{name}"] = float(same[method].mean())
        taken[name] = np.concatenate(list(same.values()))
        metrics[f"all/{name}"] = float(taken[name].mean())
    hits, n, chance = int(taken["transfer"].sum()), len(taken["transfer"]), 1 / classes
    low, high = intervals.wilson(hits, n)
    return [Claim(
        "L19.transfer", "Limit 2",
        "Images that fool one network are taken for the same class by another, more often than by chance.",
        low > chance, Evidence(hits / n, chance, 0.0, (low - chance, high - chance), n),
        "The control is chance, one in so many classes: with as many images of every class, whatever a network prefers "
        f"gives that. The other network has the same layers and data, and other random numbers (seed "
        f"{config.run.seed + 1}); an MLP with these takes {metrics[f'all/{MLP}']:.0%} for the same class. Images of "
        "one search are not independent of each other, which the interval ignores.")]


def retrained(config, run, dataset, study, metrics) -> list[Claim]:
    """Round after round: train with a class of fooling images, look whether it knows them, and fool it anew."""
    if not config.fooling.rounds:
        return []
    classes, split = dataset.num_classes, dataset.splits["train"]
    wider = models.create(config.model.model, classes + 1, dataset.image_shape, config.model.dtype)
    bank = np.concatenate([study.images(method) for method in METHODS])
    trained = _trainer(config, dataset, wider)
    for number in range(1, config.fooling.rounds + 1):
        predict = trained(_with_fooling(split, bank, classes), config.run.seed + number)
        accuracy = evaluation.predictions(predict, dataset.splits["test"]).correct.mean()
        p = np.asarray(jax.nn.softmax(predict(jnp.asarray(bank))))[:, :classes].max(-1)
        old = int((p >= fooling.CONFIDENCE).sum()), len(bank)
        anew = {method: make(config, stream(stream(study.key, "retrained", number), method), predict,
                             dataset.image_shape, classes, method) for method in SAYS}
        reached = np.concatenate([one.confidence >= fooling.CONFIDENCE for one in anew.values()])
        metrics |= {f"round{number}/accuracy": float(accuracy), f"round{number}/old_still_fool": old[0] / old[1],
                    f"round{number}/fooled_anew": float(reached.mean())}
        metrics |= {f"round{number}/{method}_queries": float(one.queries) for method, one in anew.items()}
        bank = np.concatenate([bank, *(one.images for one in anew.values())])
    value, control, interval = _difference((int(reached.sum()), len(reached)), old)
    return [Claim(
        "L19.retrained", "Limit 2",
        "A class of its own for fooling images does not make a network immune: it knows those it was trained with and "
        "is fooled anew.", interval[0] > 0, Evidence(value, control, 0.0, interval, len(reached)),
        f"After {number} rounds. Value: share of classes, over {len(anew)} methods, in which new images reach 99.6 %. "
        f"Control: share of the {old[1]} images it was trained with that still do. A search that ends without may "
        f"have been too short ({config.fooling.generations} generations).")]


def caught(config, run, dataset, study, metrics) -> list[Claim]:
    """AUROC of telling fooling images from real ones, by scores of being unlike the training data."""
    features = jax.jit(lambda images: study.model.apply(study.variables, images)[1]["features"])
    images, labels = study.training
    fitted = ood.fit_mahalanobis(_in_parts(features, images), labels, dataset.num_classes)
    scores = {name: lambda x, score=score: score(study.predict(x)) for name, score in ood.OF_LOGITS.items()}
    scores |= {"ODIN": lambda x: ood.odin(study.predict, x), "Mahalanobis": lambda x: fitted(features(x))}
    shown = {method: study.images(method) for method in METHODS} | study.controls
    judged = {}
    for name, score in scores.items():
        real, others = _in_parts(score, study.real), {kind: _in_parts(score, x) for kind, x in shown.items()}
        for kind, values in others.items():
            metrics |= {f"{name}/{kind}_{figure}": value for figure, value in ood.judge(real, values).items()}
        judged[name] = real, np.concatenate([others[method] for method in METHODS])
        metrics[f"{name}/fooling_auroc"] = ood.auroc(*judged[name])
    value, control = (ood.auroc(*judged[name]) for name in ("Mahalanobis", "max softmax"))
    interval = _resampled(judged["Mahalanobis"], judged["max softmax"], config.run.seed)
    return [Claim(
        "L19.caught", "Limit 2",
        "A score of being unlike the training data tells fooling images from real ones better than confidence does.",
        interval[0] > 0, Evidence(value, control, 0.0, interval, len(judged["Mahalanobis"][1])),
        f"AUROC of Mahalanobis' score on the last features, against that of the confidence, over {len(study.real)} "
        "test images and n fooling images; the interval resamples both. The images were made to raise the confidence, "
        "not to pass this score, which another search could aim at.")]


def draw(run, dataset, study) -> None:
    """The fooling images of the first search, and for each class the surest image of noise."""
    rows = {method: study.found[method][0].images for method in METHODS}
    confidence = {method: study.found[method][0].confidence for method in METHODS}
    noise = study.controls["uniform noise"]
    p = _in_parts(lambda x: jax.nn.softmax(study.predict(x)), noise)[:, :dataset.num_classes]
    rows["uniform noise"], confidence["uniform noise"] = noise[p.argmax(0)], p.max(0)
    run.figure("gallery", **galleries.gallery(
        rows, confidence, dataset.class_names, caption="Images of nothing, and how sure the network is of each.",
        how="The first search of each method, an image a class; nobody picked them. The last row is the control: for "
            f"each class, the surest of {len(noise)} images of noise. Confidence is the network's probability of that "
            "class, on the very images that are shown."))


def method_table(study, metrics) -> dict:
    """One row a method, then one a kind of random images."""
    figures_of = ("lowest_confidence", "queries", "seconds", "transfer", MLP)
    rows = [[name, metrics[f"{name}/share_sure"], *(metrics.get(f"{name}/{figure}") for figure in figures_of)]
            for name in (*METHODS, *study.controls)]
    return {"title": "Fooling", "header": ["images", "share at 99.6 % or more", "lowest confidence",
                                           "images tried a search", "seconds a search",
                                           "same class by another network", "by an MLP"], "rows": rows,
            "note": "The last rows are controls: random images that nothing searched for. Seconds include compilation, "
                    "shared among the searches of a method."}


def score_table(study, metrics) -> dict:
    """AUROC of every score against every kind of images."""
    kinds = (*METHODS, *study.controls)
    rows = [[name, *(metrics[f"{name}/{kind}_auroc"] for kind in kinds)]
            for name in (*ood.OF_LOGITS, "ODIN", "Mahalanobis")]
    return {"title": "Caught by a score? AUROC against real images", "header": ["score", *kinds], "rows": rows,
            "note": "1 tells them apart without error, 0.5 not at all; below, fooling images look more real than real "
                    "ones."}


def _sureness(predict, images) -> np.ndarray:
    return _in_parts(lambda x: jax.nn.softmax(predict(x)).max(-1), images)


def _in_parts(function, images, size: int = 500) -> np.ndarray:
    return np.concatenate([np.asarray(function(jnp.asarray(images[i:i + size]))) for i in range(0, len(images), size)])


def _nearest(images, training) -> float:
    """The median root mean square distance to the nearest training image."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (images, training))
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * a @ b.T
    return float(np.median(np.sqrt(np.maximum(squares.min(1), 0) / a.shape[1])))


def _difference(one: tuple[int, int], other: tuple[int, int]):
    """Two shares and the 95 % interval of their difference (Newcombe 1998, method 10), from (hits, n) each."""
    (p, q), ((pl, ph), (ql, qh)) = (hits / n for hits, n in (one, other)), map(lambda c: intervals.wilson(*c),
                                                                              (one, other))
    return p, q, (p - q - math.hypot(p - pl, qh - q), p - q + math.hypot(ph - p, q - ql))


def _resampled(one, other, seed: int, draws: int = 1000) -> tuple[float, float]:
    """The 95 % bootstrap interval of the difference of two AUROC over the same (N,) real and (M,) other images."""
    rng, differences = np.random.default_rng(seed), []
    for _ in range(draws):
        i, j = (rng.integers(0, len(scores), len(scores)) for scores in one)
        differences.append(ood.auroc(one[0][i], one[1][j]) - ood.auroc(other[0][i], other[1][j]))
    low, high = np.quantile(differences, (0.025, 0.975))
    return float(low), float(high)


def _trainer(config, dataset, model) -> Callable[[Split, int], Predict]:
    """(split, seed) -> a network trained anew by the same recipe, as long as the first; compiled once."""
    loss = train.classifier_loss(model, config, dataset)
    made = train.recipe(config, model, dataset.image_shape, len(dataset.splits["train"]), loss)
    fitted = train.fitter(model, dataset.image_shape, loss, made.tx, ema=config.optimizer.ema,
                          accumulate=config.optimizer.accumulate)
    return lambda split, seed: evaluation.predictor(
        model, fitted(split, made.steps, config.data.batch_size, seed).variables)


def _with_fooling(split, bank: np.ndarray, classes: int) -> ArraySplit:
    """The training images, and as many fooling images as a class has on average, repeated, as class K."""
    everything = split[np.arange(len(split))]
    chosen = np.arange(max(len(split) // classes, len(bank))) % len(bank)
    return ArraySplit(np.concatenate([everything["image"], bank[chosen]]).astype(np.float32), np.concatenate(
        [everything["label"], np.full(len(chosen), classes)]).astype(np.int32))

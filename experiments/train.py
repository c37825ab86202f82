"""From settings to a trained state: what every experiment that trains has in common."""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

import jax
import numpy as np

from dlcourse import data, models, streams
from dlcourse.contracts import Dataset, Loss, Predict
from dlcourse.data import augment, batches
from dlcourse.models import size
from dlcourse.reporting import terminal
from dlcourse.reporting.run import Run
from dlcourse.training import checkpoint, durations, evaluation, losses, optimizers
from dlcourse.training import state as states
from dlcourse.training.loop import fit
from dlcourse.training.state import TrainState
from dlcourse.training.step import train_step
from experiments import settings


class Trained(NamedTuple):
    """What training leaves: the last state, one that no step ever touched, and the seconds that all sessions took."""

    state: TrainState
    untrained: TrainState
    seconds: dict[str, float]


def load_data(wanted: settings.Data, seed: int) -> Dataset:
    return data.load(
        wanted.dataset, image_size=wanted.image_size, validation_fraction=wanted.validation_fraction, seed=seed
    )


def build_model(wanted: settings.Model, dataset: Dataset):
    return models.create(wanted.model, dataset.num_classes, dataset.image_shape, wanted.dtype)


def classifier_loss(model, config, dataset: Dataset) -> Loss:
    """Cross-entropy on augmented batches, as the settings say."""
    loss = losses.cross_entropy(model, label_smoothing=config.optimizer.label_smoothing)
    if not config.data.augment:
        return loss
    return losses.augmented(loss, augment.create(config.data.augment, dataset.num_classes))


def banner(config, dataset: Dataset, model, run: Run) -> None:
    devices = jax.devices()
    sizes = ", ".join(f"{len(split)} {name}" for name, split in dataset.splits.items())
    shape = "x".join(map(str, dataset.image_shape))
    parameters = size.parameters(size.abstract_variables(model, dataset.image_shape))
    terminal.banner(
        {
            "devices": f"{len(devices)} x {devices[0].device_kind}",
            "data": f"{dataset.name}: {sizes}; {shape}, {dataset.num_classes} classes",
            "model": f"{config.model.model}: {parameters:,} parameters, {config.model.dtype}",
            "run": run.path,
        }
    )


def make_optimizer(wanted: settings.Optimizer, total: int | None, period):
    """The optimizer with its schedule over `total` updates; `period` turns a duration into updates."""
    rate = optimizers.schedule(wanted.schedule, wanted.learning_rate, total or 0, period(wanted.warmup))
    return optimizers.create(
        wanted.optimizer, rate, weight_decay=wanted.weight_decay, momentum=wanted.momentum, clip=wanted.clip
    )


def train(config, run: Run, dataset: Dataset, model, loss: Loss) -> Trained:
    """Train `model` by `loss` in the run's folder, from its newest checkpoint if it has one.

    Args:
      config: with the concerns `data`, `model`, `optimizer` and `run` of settings.
      run: the open run folder; metrics and checkpoints go there.
      dataset: trained on `train`, watched on `validation`; `test` is not touched.
      model: a Flax module under the Model contract.
      loss: a Loss of it.
    """
    batch_size, split = config.data.batch_size, dataset.splits["train"]

    def period(text):
        return durations.parse(text).steps(batch_size, len(split))

    total, wanted = period(config.run.train_for), config.optimizer
    minutes = durations.parse(config.run.train_for).value if total is None else None
    tx = make_optimizer(wanted, total, period)
    untrained = states.create(model, dataset.image_shape, tx, streams.root(config.run.seed), ema=wanted.ema > 0)
    start = start_from(config.model.init_from, untrained) if config.model.init_from else untrained
    first = next(batches.train_batches(split, batch_size, seed=config.run.seed))
    jax.eval_shape(loss, start.params, start.model_state, first, start.key)  # mistakes show before anything is written
    with checkpoint.Checkpoints(run.path / "checkpoints") as saved:
        state = saved.restore(start) or jax.tree.map(jax.numpy.copy, start)
        step = int(state.step)
        run.truncate_metrics(step)
        earlier = max((record["seconds"] for record in run.metrics()), default=0.0)
        began = time.monotonic() - earlier
        feed = batches.train_batches(split, batch_size, seed=config.run.seed, start=step)
        run_step, compiled, feed = _compile(state, feed, loss=loss, tx=tx, ema=wanted.ema, accumulate=wanted.accumulate)
        with terminal.Progress(total, batch_size, done=step) as progress:
            watch = _Watch(
                run, progress, functools.partial(judge, config.model, model), dataset.splits["validation"],
                log_every=max(1, (total or 1000) // 200), began=began,
            )
            state = fit(
                state,
                run_step,
                feed,
                steps=total,
                seconds=minutes and max(0.0, 60 * minutes - earlier),
                on_step=watch.step,
                every=[
                    (period(config.run.eval_every) or 1, watch.evaluate),
                    (period(config.run.checkpoint_every) or 1, lambda _, state: saved.save(state)),
                ],
            )
    spent = {"compile": compiled, "train": time.monotonic() - began - compiled, "earlier": earlier}
    return Trained(state, untrained, spent)


def start_from(folder: str, fresh: TrainState) -> TrainState:
    """`fresh` with the variables that the run in `folder` ended with."""
    variables = dict(checkpoint.load_variables(folder, fresh))
    params = variables.pop("params")
    average = None if fresh.ema is None else jax.tree.map(jax.numpy.copy, params)
    return fresh.replace(params=params, model_state=variables, ema=average)


def fitter(model, image_shape: tuple[int, int, int], loss: Loss, tx, *, ema: float = 0.0, accumulate: int = 1):
    """(split, steps, batch_size, seed) -> the state after so many updates, compiled once; nothing is written."""
    how = {"loss": loss, "tx": tx, "ema": ema, "accumulate": accumulate}
    step = jax.jit(functools.partial(train_step, **how), donate_argnums=0)

    def fitted(split, steps: int, batch_size: int, seed: int) -> TrainState:
        state = states.create(model, image_shape, tx, streams.root(seed), ema=ema > 0)
        return fit(state, step, batches.train_batches(split, batch_size, seed=seed), steps=steps)

    return fitted


def judge(wanted: settings.Model, model, variables) -> Predict:
    """images -> logits, as the settings say that images are judged."""
    predict = evaluation.predictor(model, variables)
    return evaluation.mirrored(predict) if wanted.mirror else predict


def _compile(state, feed, **how):
    """The compiled step, the seconds that took, and the batches from the first one on."""
    first, began = next(feed), time.monotonic()
    step = jax.jit(functools.partial(train_step, **how), donate_argnums=0).lower(state, first).compile()

    def whole():
        yield first
        yield from feed

    return step, time.monotonic() - began, whole()


class _Watch:
    """Looks on while the loop runs: means of the training metrics, validation, progress."""

    def __init__(self, run, progress, judge, validation, *, log_every, began):
        self.run, self.progress, self.judge, self.validation = run, progress, judge, validation
        self.log_every, self.began = log_every, began
        self.window: list[dict[str, float]] = []

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.window.append(metrics)
        if step % self.log_every == 0:
            means = {name: float(np.mean([m[name] for m in self.window])) for name in metrics}
            self.run.log(step, "train", means, self._seconds())
            self.window.clear()
        shown = {name: metrics[name] for name in ("loss", "accuracy") if name in metrics}
        self.progress.update(step, shown)

    def evaluate(self, step: int, state: TrainState) -> None:
        values = dict(evaluation.classification(self.judge(state.variables), self.validation))
        self.run.log(step, "validation", values, self._seconds())

    def _seconds(self) -> float:
        return time.monotonic() - self.began

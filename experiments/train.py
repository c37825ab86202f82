"""From settings to a trained state: what every experiment that trains has in common."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import optax

from dlcourse import data, models, streams
from dlcourse.contracts import Dataset, InputError, Loss, Predict
from dlcourse.data import augment, batches
from dlcourse.models import size
from dlcourse.reporting import terminal
from dlcourse.reporting.run import Run, read_config
from dlcourse.training import checkpoint, durations, evaluation, losses, optimizers, parallel
from dlcourse.training import state as states
from dlcourse.training.loop import Every, fit, stop_signals
from dlcourse.training.parallel import Plan
from dlcourse.training.state import TrainState
from experiments import settings
from experiments.watch import Watch


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training leaves.

    Attributes:
      placed: the last state, laid out over the devices as `plan` says.
      plan: of the run.
      fresh: makes a state that no step ever touched.
      seconds: that the compiler, this session and earlier ones took.
      speed: of this session, as `Watch.speed` says.
    """

    placed: TrainState
    plan: Plan
    fresh: Callable[[], TrainState]
    seconds: dict[str, float]
    speed: dict[str, float]

    @functools.cached_property
    def state(self) -> TrainState:
        """The last state on one device, for work that every process does for itself."""
        return self.plan.local(self.placed)

    @functools.cached_property
    def untrained(self) -> TrainState:
        return self.fresh()


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
    if not run.writes:
        return
    devices = jax.devices()
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    sizes = ", ".join(f"{len(split)} {name}" for name, split in dataset.splits.items())
    shape = "x".join(map(str, dataset.image_shape))
    parameters = size.parameters(size.abstract_variables(model, dataset.image_shape))
    terminal.banner(
        {
            "devices": f"{len(devices)} x {devices[0].device_kind}{processes}, {config.devices.parallel}",
            "data": f"{dataset.name}: {sizes}; {shape}, {dataset.num_classes} classes",
            "model": f"{config.model.model}: {parameters:,} parameters, {config.model.dtype}",
            "run": run.path,
        }
    )


def make_optimizer(wanted: settings.Optimizer, total: int | None, period):
    """The learning rate by step and the optimizer, for `total` updates; `period` turns a duration into updates."""
    total = 0 if total is None else max(total, 1)  # one cycle needs a length even where nothing is trained
    rate = optimizers.schedule(wanted.schedule, wanted.learning_rate, total, period(wanted.warmup))
    return rate, optimizers.create(
        wanted.optimizer, rate, weight_decay=wanted.weight_decay, momentum=wanted.momentum, clip=wanted.clip
    )


class Recipe(NamedTuple):
    """What a step of training is made of, before a device or an example is touched.

    Attributes:
      loss: on batches as the readers here give them.
      tx: the optimizer.
      rate: step -> learning rate.
      fresh: makes the state that training begins with.
      steps: updates in all; None where a clock ends the run.
      period: a duration such as "10epochs" -> updates; None for minutes.
    """

    loss: Loss
    tx: optax.GradientTransformation
    rate: optax.Schedule
    fresh: Callable[[], TrainState]
    steps: int | None
    period: Callable[[str], int | None]


def recipe(config, model, image_shape: tuple[int, int, int], examples: int, loss: Loss) -> Recipe:
    """The recipe of a config for a training split of so many examples."""
    def period(text):
        return durations.parse(text).steps(config.data.batch_size, examples)

    steps = period(config.run.train_for)
    rate, tx = make_optimizer(config.optimizer, steps, period)
    key, average = streams.root(config.run.seed), config.optimizer.ema > 0
    fresh = functools.partial(states.create, model, image_shape, tx, key, ema=average)
    return Recipe(losses.from_bytes(loss), tx, rate, fresh, steps, period)


def plan_and_step(config, made: Recipe, devices=None) -> tuple[Plan, parallel.Step]:
    """How a config is spread over devices (by default all there are), and its training step, not yet compiled."""
    wanted = config.devices
    plan = parallel.create(wanted.parallel, fsdp=wanted.fsdp, batch_stats=wanted.batch_stats, devices=devices)
    parallel.check_batch(config.data.batch_size, config.optimizer.accumulate, plan)
    step = plan.step(loss=made.loss, tx=made.tx, ema=config.optimizer.ema, accumulate=config.optimizer.accumulate)
    return plan, step


def train(config, run: Run, dataset: Dataset, model, loss: Loss,
          also: Callable[[dict], dict[str, float]] | None = None) -> Trained:
    """Train `model` by `loss` in the run's folder, from its newest checkpoint if it has one.

    Args:
      config: with the concerns `data`, `model`, `optimizer`, `run` and `devices` of settings.
      run: the open run folder; metrics and checkpoints go there.
      dataset: trained on `train`, watched on `validation`; `test` is not touched.
      model: a Flax module under the Model contract.
      loss: a Loss of it.
      also: variables -> further figures, computed by each process for itself, to stand beside those of `validation`.
    """
    split = dataset.splits["train"]
    made = recipe(config, model, dataset.image_shape, len(split), loss)
    plan, step = plan_and_step(config, made)
    start = plan.create(made.fresh)
    start = start_from(config.model.init_from, start, plan) if config.model.init_from else start
    read = functools.partial(batches.train_batches, split, config.data.batch_size, seed=config.run.seed, part=plan.part,
                             sharding=plan.batch_sharding, as_bytes=True)
    first = next(read())
    # Mistakes show before anything is written.
    jax.eval_shape(made.loss, start.params, start.model_state, {**first, "step": start.step}, start.key)
    with checkpoint.Checkpoints(run.path / "checkpoints", keep=config.run.keep) as saved:
        state, notes = saved.restore(start) or checkpoint.Restored(start, {})
        run.truncate_metrics(notes.get("lines", 0), int(state.step))
        began, at_once = time.monotonic(), steps_at_once(config.devices.steps_per_dispatch, first)
        step.compile(state, first, {1, at_once})
        compiled = time.monotonic() - began
        validate = functools.partial(_validation, config.model, model, dataset.splits["validation"], plan, also)
        state, speed = _fit(config, run, made, plan, step, state, read, saved, notes, at_once, validate)
    earlier = notes.get("seconds", 0.0)
    spent = {"compile": compiled, "train": time.monotonic() - began - compiled, "earlier": earlier}
    return Trained(state, plan, made.fresh, spent, speed)


def _fit(config, run, made, plan, step, state, read, saved, notes, at_once, validate):
    """The loop with all that looks on; signals stop it, and are held back until what it saves is safe."""
    earlier, log_every = notes.get("seconds", 0.0), max(1, (made.steps or 1000) // 200)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(terminal.Progress(
            made.steps, config.data.batch_size, done=int(state.step), quiet=not run.writes))
        stopped = stack.enter_context(stop_signals())
        stack.callback(saved.wait)
        watch = stack.enter_context(contextlib.closing(Watch(
            run, progress, validate, made.rate, log_every=log_every, batch_size=config.data.batch_size,
            earlier=earlier, profile=made.period(config.run.profile), notes=notes)))
        state = fit(
            state,
            step,
            watch.timed(read(start=int(state.step))),
            steps=made.steps,
            seconds=None if made.steps is not None else 60 * durations.parse(config.run.train_for).value - earlier,
            on_steps=watch.on_steps,
            evaluate=every(config.run.eval_every, made.period, watch.evaluate),
            save=every(config.run.checkpoint_every, made.period,
                       lambda step, state: saved.save(state, watch.notes(), watch.score(step))),
            at_once=at_once,
            stopped=stopped,
            agree=parallel.Agreement(plan),
            owed=notes.get("owed", False),
        )
    return state, watch.speed()


def every(text: str, period, call) -> Every:
    """The hook for a duration such as "10epochs" or "5minutes"."""
    duration = durations.parse(text)
    return Every(call, period(text), 60 * duration.value if duration.unit == "minutes" else None)


def steps_at_once(wanted: int, batch) -> int:
    """Updates in one dispatch: as wanted, or enough to hide the dispatch where batches are small."""
    small = sum(values.nbytes for values in batch.values()) <= 2**23
    return wanted or (8 if small and jax.default_backend() != "cpu" else 1)


def _validation(wanted, model, split, plan, also, state: TrainState, check) -> dict[str, float]:
    predict = judge(wanted, model, state.variables)

    def checked(images):
        check()
        return predict(images)

    judged = dict(evaluation.classification(checked, split, plan))
    return judged | also(plan.local(state.variables)) if also else judged


def start_from(folder: str, fresh: TrainState, plan: Plan) -> TrainState:
    """`fresh` with the variables that the run in `folder` ended with."""
    variables = dict(checkpoint.load_variables(folder, fresh))
    params = variables.pop("params")
    average = None if fresh.ema is None else plan.place(params)
    return fresh.replace(params=plan.place(params), model_state=plan.place(variables), ema=average)


def same_data(config) -> None:
    """Raises InputError where --init_from is a run on other images: its network would not know these."""
    folder, here = config.model.init_from, dataclasses.asdict(config.data)
    there = (read_config(Path(folder)) or {}).get("config", {}).get("data", {}) if folder else {}
    for name in ("dataset", "image_size"):
        if there.get(name, here[name]) != here[name]:
            raise InputError(f"--init_from={folder}: its --{name} is {there[name]}, here it is {here[name]}; judge it "
                             "on what it was trained on")


def fitter(model, image_shape: tuple[int, int, int], loss: Loss, tx, *, ema: float = 0.0, accumulate: int = 1):
    """(split, steps, batch_size, seed) -> the state after so many updates, compiled once; nothing is written."""
    plan = parallel.create(devices=jax.local_devices()[:1])
    step = plan.step(loss=loss, tx=tx, ema=ema, accumulate=accumulate)

    def fitted(split, steps: int, batch_size: int, seed: int) -> TrainState:
        state = states.create(model, image_shape, tx, streams.root(seed), ema=ema > 0)
        return fit(state, step, batches.train_batches(split, batch_size, seed=seed), steps=steps)

    return fitted


def judge(wanted: settings.Model, model, variables) -> Predict:
    """images -> logits, as the settings say that images are judged."""
    predict = evaluation.predictor(model, variables)
    return evaluation.mirrored(predict) if wanted.mirror else predict

"""The loop: batches in, states out, until the run is long enough or somebody stops it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from dlcourse.contracts import Batch, InputError
from dlcourse.training.state import TrainState


class Interrupted(Exception):
    """A signal asked the run to stop; its state was saved first."""


class Diverged(InputError):
    """The loss is not finite."""


@dataclasses.dataclass(frozen=True)
class Every:
    """What is called with (step, state) at multiples of `steps`, or once `seconds` have passed since the last time."""

    call: Callable[..., None]
    steps: int | None = None
    seconds: float | None = None


def fit(
    state: TrainState,
    train_step: Callable[[TrainState, Sequence[Batch]], tuple[TrainState, dict]],
    batches: Iterator[Batch],
    *,
    steps: int | None = None,
    seconds: float | None = None,
    on_steps: Callable[[int, list[dict[str, float]]], None] = lambda step, metrics: None,
    evaluate: Every | None = None,
    save: Every | None = None,
    at_once: int = 1,
    stopped: Callable[[], bool] = lambda: False,
    agree: Callable[..., tuple[bool, bool, bool]] = lambda *asked, wait=False: asked,
    owed: bool = False,
) -> TrainState:
    """Apply `train_step` until `steps` updates or `seconds` of wall clock have passed.

    Metrics are read one dispatch late, while the next one runs, so that looking costs no waiting; a loss that is not
    finite stops the run before anybody sees the state it made. At the end the state is evaluated and saved, after a
    signal only saved: what a run leaves does not tell whether it was stopped.

    Args:
      state: where to begin; `state.step` counts towards `steps`.
      train_step: (state, batches) -> (state, metrics with `loss`, each with a leading axis of one entry a batch);
        usually compiled and donating.
      batches: starting at the batch of `state.step`.
      steps: updates in all.
      seconds: of wall clock from now.
      on_steps: called after each dispatch with the last of its steps (counted from 1) and the metrics of each.
      evaluate: when and what to evaluate, before a save of the same step; called with a third argument, a function
        to call now and then, which raises Interrupted once somebody wants the run to stop.
      save: when and how to save.
      at_once: batches that go into one dispatch, where nothing is due among them.
      stopped: whether this process was asked to stop.
      agree: (stop, end, save) that this process asks for -> those that all processes do; it may answer later, since
        who asks goes on asking.
      owed: begin with the evaluation that a stop kept `state` from.

    Returns:
      The last state.

    Raises:
      Diverged: with the step and the batch's examples.
      Interrupted: this process or another was asked to stop; the state reached was saved.
    """
    step, pending = int(state.step), None
    first, clock = step, _Clock(seconds, save and save.seconds)

    def check():
        if agree(stopped(), False, False)[0]:
            raise Interrupted

    def settle():
        nonlocal pending
        if pending is not None:
            on_steps(pending[0], _finite(*pending))
            pending = None

    try:
        if owed:
            evaluate.call(step, state, check)
        while steps is None or step < steps:
            stop, end, due = agree(stopped(), clock.over(), clock.due())
            if stop:
                raise Interrupted
            if end:
                break
            if due:
                settle()
                save.call(step, state)
                clock.saved()
            group = list(itertools.islice(batches, _room(step, at_once, steps, evaluate, save)))
            state, metrics = train_step(state, group)
            settle()
            step += len(group)
            pending = (step, group, metrics)
            if _due(evaluate, step) and step != steps:
                settle()
                evaluate.call(step, state, check)
            if _due(save, step) and step != steps:
                settle()
                save.call(step, state)
        settle()
        if evaluate and step > first and (step == steps or not _due(evaluate, step)):  # once, where a clock ends it
            evaluate.call(step, state, check)
        stop = agree(stopped(), False, False, wait=True)[0]
    except Interrupted:
        settle()
        stop = True
    if save and (step > first or owed):
        save.call(step, state)
    if stop:
        raise Interrupted(f"stopped by a signal after step {step}")
    return state


def _due(hook: Every | None, step: int) -> bool:
    return bool(hook and hook.steps) and step % hook.steps == 0


def _room(step: int, at_once: int, steps: int | None, *hooks: Every | None) -> int:
    """`at_once`, or 1 where something is due sooner: two programs are compiled, no more."""
    ends = [] if steps is None else [steps - step]
    ends += [hook.steps - step % hook.steps for hook in hooks if hook and hook.steps]
    return at_once if all(end >= at_once for end in ends) else 1


class _Clock:
    """What the time of day asks for: an end, a save."""

    def __init__(self, seconds: float | None, save_every: float | None):
        self._end = math.inf if seconds is None else time.monotonic() + seconds
        self._save_every = math.inf if save_every is None else save_every
        self.saved()

    def over(self) -> bool:
        return time.monotonic() >= self._end

    def due(self) -> bool:
        return time.monotonic() - self._saved >= self._save_every

    def saved(self) -> None:
        self._saved = time.monotonic()


def _finite(step: int, group: Sequence[Batch], metrics: dict[str, Any]) -> list[dict[str, float]]:
    """The metrics of every step of a dispatch that ended at `step`, oldest first."""
    columns = jax.device_get(metrics)
    found = [{name: float(column[i]) for name, column in columns.items()} for i in range(len(group))]
    for i, (batch, values) in enumerate(zip(group, found, strict=True)):
        if not math.isfinite(values["loss"]):
            examples = ", ".join(str(int(index)) for index in batch["index"][:8])
            raise Diverged(
                f"the loss is {values['loss']} at step {step - len(group) + i + 1} (examples {examples}, … of the "
                "training split): try a lower --learning_rate, --clip=1 or a --warmup, and look at those examples"
            )
    return found


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGTERM or SIGINT came, which inside do not kill the process mid-step."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped.is_set
        return
    names = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(name, lambda *_: stopped.set()) for name in names]
    try:
        yield stopped.is_set
    finally:
        for name, handler in zip(names, before, strict=True):
            signal.signal(name, handler)

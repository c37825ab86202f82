"""The loop: batches in, states out, until the run is long enough or somebody stops it."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from dlcourse.contracts import Batch, InputError
from dlcourse.training.state import TrainState


class Interrupted(Exception):
    """A signal asked the run to stop; its state was handed to every callback first."""


class Diverged(InputError):
    """The loss is not finite."""


Callback = Callable[[int, TrainState], None]


def fit(
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict]],
    batches: Iterator[Batch],
    *,
    steps: int | None = None,
    seconds: float | None = None,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    every: Sequence[tuple[int, Callback]] = (),
) -> TrainState:
    """Apply `train_step` until `steps` updates or `seconds` of wall clock have passed.

    Metrics are read one step late, while the next step runs, so that looking costs no waiting; a
    loss that is not finite stops the run before any callback sees the state it made.

    Args:
      state: where to begin; `state.step` counts towards `steps`.
      train_step: (state, batch) -> (state, metrics with `loss`), usually jitted and donating.
      batches: starting at the batch of `state.step`.
      steps: updates in all.
      seconds: of wall clock from now.
      on_step: called after each step with its number (from 1) and metrics as floats.
      every: (period in steps, callback) pairs, called at multiples of the period and at the end,
        unless not a single step was left to make.

    Returns:
      The last state.

    Raises:
      Diverged: with the step and the batch's examples.
      Interrupted: SIGTERM or SIGINT came; all callbacks were called with the state reached.
    """
    began, step, pending = time.monotonic(), int(state.step), None
    first = step

    def settle():
        if pending is not None:
            on_step(pending[0], _finite(*pending))

    with _stop_signals() as stopped:
        while (steps is None or step < steps) and (seconds is None or time.monotonic() - began < seconds):
            batch = next(batches)
            state, metrics = train_step(state, batch)
            settle()
            step, pending = step + 1, (step + 1, batch, metrics)
            due = [callback for period, callback in every if step % period == 0 and step != steps]
            if due or stopped.is_set():
                settle()
                pending = None
            if stopped.is_set():
                break
            for callback in due:
                callback(step, state)
        settle()
        for _, callback in every if step > first else ():
            callback(step, state)
        if stopped.is_set():
            raise Interrupted(f"stopped by a signal after step {step}")
    return state


def _finite(step: int, batch: Batch, metrics) -> dict[str, float]:
    values = {name: float(value) for name, value in metrics.items()}
    if not math.isfinite(values["loss"]):
        examples = ", ".join(str(int(i)) for i in batch["index"][:8])
        raise Diverged(
            f"the loss is {values['loss']} at step {step} (examples {examples}, … of the training split): "
            "try a lower --learning_rate, --clip=1 or a --warmup, and look at those examples"
        )
    return values


@contextlib.contextmanager
def _stop_signals():
    """An event that SIGTERM and SIGINT set, in place of killing the process mid-step."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    names = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(name, lambda *_: stopped.set()) for name in names]
    try:
        yield stopped
    finally:
        for name, handler in zip(names, before, strict=True):
            signal.signal(name, handler)

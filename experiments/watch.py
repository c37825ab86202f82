"""What is noted while a run trains: means of its metrics, its speed, validation, the best so far, a profile."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from dlcourse.reporting.run import Run
from dlcourse.reporting.terminal import Progress
from dlcourse.training.state import TrainState

SPEED_EVERY = 10
"""Lines of training metrics for one line about speed."""
PROFILE_AFTER = 10
"""Updates before a profile begins: the first ones are not like the rest."""


class Watch:
    """Looks on while the loop runs, and remembers what a resumed run must know to write the same lines.

    Attributes:
      run: where lines of metrics go.
      progress: what a person sees.
      judge: (state, check) -> validation metrics by name; calls `check` now and then.
      rate: step -> learning rate.
      log_every: updates between two lines of training metrics.
      batch_size: B, for the speed.
      earlier: seconds that earlier sessions of the run took.
      profile: updates to record a profile of; 0 for none.
      notes: what `self.notes()` said in the session that this one goes on from.
    """

    def __init__(self, run: Run, progress: Progress, judge: Callable[..., dict[str, float]], rate: Callable[[int], Any],
                 *, log_every: int, batch_size: int, earlier: float, profile: int, notes: dict[str, Any]):
        self.run, self.progress, self.judge, self.rate = run, progress, judge, rate
        self.log_every, self.batch_size, self.profile = log_every, batch_size, profile
        self._window: list[dict[str, float]] = notes.get("window", [])
        self._best: dict[str, float] | None = notes.get("best")
        self._owed: bool = notes.get("owed", False)
        self._evaluated: tuple[int, float] | None = None
        self._began = time.monotonic() - earlier
        self._times: list[tuple[float, float]] = []
        self._told, self._waited, self._made, self._last = 0, 0.0, 0, time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._began

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; how long they were waited for is noted."""
        while True:
            began = time.monotonic()
            batch = next(batches)
            self._waited += time.monotonic() - began
            yield batch

    def on_steps(self, step: int, found: list[dict[str, float]]) -> None:
        """Metrics of the updates of one dispatch, the last of which was `step`."""
        now = time.monotonic()
        self._times += [((now - self._last) / len(found), self._waited / len(found))] * len(found)
        self._last, self._waited = now, 0.0
        for number, metrics in enumerate(found, step - len(found) + 1):
            self._window.append(metrics)
            if number % self.log_every == 0:
                self._log(number)
        self.progress.update(step, {name: found[-1][name] for name in ("loss", "accuracy") if name in found[-1]})
        self._profile(len(found))

    def _log(self, step: int) -> None:
        means = {name: float(np.mean([metrics[name] for metrics in self._window])) for name in self._window[-1]}
        means["learning_rate"] = float(self.rate(step - 1))
        self.run.log(step, "train", means, self.seconds())
        self._window.clear()
        if step % (SPEED_EVERY * self.log_every) == 0:
            self.run.log(step, "speed", self._speed(self._told), self.seconds())
            self._told = len(self._times)

    def speed(self) -> dict[str, float]:
        """Examples a second, seconds a step, share of the time that data was waited for, bytes: of this session."""
        return self._speed(0)

    def _speed(self, since: int) -> dict[str, float]:
        if not self._times[since:]:
            return {}
        took, waited = np.array(self._times[since:]).T
        p50, p99 = np.percentile(took, [50, 99])
        return {"examples_per_second": self.batch_size * len(took) / took.sum(),
                "step_seconds_p50": p50, "step_seconds_p99": p99,
                "data_wait_share": waited.sum() / took.sum(), "memory_peak_bytes": memory_peak()}

    def _profile(self, count: int) -> None:
        """Records updates PROFILE_AFTER .. PROFILE_AFTER + profile of this session, to whole dispatches."""
        before, self._made = self._made, self._made + count
        if self.profile and before <= PROFILE_AFTER < self._made:
            jax.profiler.start_trace(str(self.run.path / "profile"))
        if self.profile and before <= PROFILE_AFTER + self.profile < self._made:
            self.close()

    def close(self) -> None:
        """Ends a profile that is being recorded."""
        if self.profile and self._made > PROFILE_AFTER:
            self.profile = 0
            jax.profiler.stop_trace()

    def evaluate(self, step: int, state: TrainState, check: Callable[[], None]) -> None:
        self._owed = True
        values = self.judge(state, check)
        self.run.log(step, "validation", values, self.seconds())
        self._owed, self._evaluated = False, (step, values["accuracy"])
        if self._best is None or values["accuracy"] > self._best["accuracy"]:
            self._best = {"step": step, "accuracy": values["accuracy"]}
        self._last = time.monotonic()

    def score(self, step: int) -> float | None:
        """Validation accuracy of this step, None where it was not evaluated."""
        return self._evaluated[1] if self._evaluated and self._evaluated[0] == step else None

    def notes(self) -> dict[str, Any]:
        """To be saved beside a state, once all that was logged is safe on disk."""
        return {"window": self._window, "best": self._best, "owed": self._owed, "seconds": self.seconds(),
                "lines": self.run.sync_metrics()}


def memory_peak() -> float:
    """Bytes at most in use so far: of the first device, or of the process where devices do not tell."""
    stats = jax.local_devices()[0].memory_stats()
    return float(stats["peak_bytes_in_use"] if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

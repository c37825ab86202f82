"""Scalars for TensorBoard, written at once and in this thread, so that an error is seen where it happens."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """tensorboardX imports torch wherever it is installed, which takes seconds and serves nothing here."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def _module(name: str) -> Any:
    with _without_torch():
        return importlib.import_module(f"tensorboardX.{name}")


class Events:
    """An event file in `folder`; curves of an earlier session beyond `resume_step` are hidden by TensorBoard."""

    def __init__(self, folder: Path, resume_step: int | None = None):
        folder.mkdir(exist_ok=True)
        self._proto = _module("proto.event_pb2")
        self._scalar = _module("summary").scalar
        self._writer = _module("event_file_writer").EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        if resume_step is not None:
            start = self._proto.SessionLog(status=self._proto.SessionLog.START)
            self._write(self._proto.Event(step=resume_step + 1, session_log=start))

    def scalars(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Adds `split/quantity` at `step` for every value."""
        for name, value in values.items():
            self._write(self._proto.Event(step=step, summary=self._scalar(f"{split}/{name}", value)))
        self._writer.flush()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)

    def close(self) -> None:
        self._writer.close()

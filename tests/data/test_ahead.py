"""Batches made ahead: the same ones, a bounded number of them, by threads that end, with errors that arrive."""

import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from test_batches import first, numbered, same

from dlcourse.contracts import InputError
from dlcourse.data import ahead, batches


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_large_batches_of_arrays_are_made_ahead_and_are_the_same(monkeypatch, dtype, as_bytes):
    how = {"seed": 5, "start": 1, "as_bytes": as_bytes}
    plain, evaluated = first(numbered(40, dtype), 16, 6, **how), list(batches.eval_batches(numbered(40, dtype), 16))
    monkeypatch.setattr(batches, "AHEAD", 0)
    monkeypatch.setattr(ahead, "cores", lambda: 3)
    monkeypatch.setattr(ahead, "ROWS", 18)  # bytes: a few examples at a time
    feed = batches.train_batches(numbered(40), 16, seed=0)
    assert next(feed) and readers()
    for one, other in [*zip(plain, first(numbered(40, dtype), 16, 6, **how), strict=True),
                       *zip(evaluated, batches.eval_batches(numbered(40, dtype), 16), strict=True)]:
        same(one, other)


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]


def wait_until_none_reads():
    for thread in readers():
        thread.join(10)
    assert not readers()


class Slow:
    """Ten numbered examples; those from `broken` on cannot be read; counts what was read."""

    labels, image_shape, dtype, decodes = np.zeros(10, np.int32), (2, 2, 1), np.dtype(np.uint8), True

    def __init__(self, broken=10):
        self.broken, self.read = broken, 0

    def __len__(self):
        return 10

    def facts(self, indices):
        return {"label": self.labels[indices]}

    def fill(self, indices, out):
        self.read += len(indices)
        if indices.max() >= self.broken:
            raise InputError(f"example {indices.max()} is broken")
        out[...] = indices.reshape(-1, 1, 1, 1)


def test_threads_read_a_bounded_number_of_batches_ahead_and_end_with_their_consumer(monkeypatch):
    monkeypatch.setattr(ahead, "cores", lambda: 2)
    wait_until_none_reads()
    split = Slow()
    feed = batches.train_batches(split, 4, seed=0)
    assert split.read == 0
    next(feed)
    deadline = time.monotonic() + 10
    while split.read < 12 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert split.read == 12  # one handed over, two waiting
    assert readers()
    del feed
    wait_until_none_reads()
    assert len(list(batches.eval_batches(split, 4))) == 3
    wait_until_none_reads()


def test_what_goes_wrong_in_a_thread_is_raised_where_it_belongs(monkeypatch):
    monkeypatch.setattr(ahead, "cores", lambda: 1)
    feed = batches.eval_batches(Slow(broken=3), 1)
    assert [next(feed)["index"].tolist() for _ in range(3)] == [[0], [1], [2]]
    with pytest.raises(InputError, match="example 3 is broken"):
        next(feed)
    with pytest.raises(StopIteration):
        next(feed)
    wait_until_none_reads()


def test_threads_stop_in_the_middle_of_a_batch(monkeypatch):
    monkeypatch.setattr(ahead, "cores", lambda: 1)
    split, met, go_on = Slow(), threading.Event(), threading.Event()

    def fill(indices, out):
        split.read += len(indices)
        if split.read > 100:
            met.set()
            assert go_on.wait(10)

    split.fill, rows = fill, 4
    monkeypatch.setattr(ahead, "ROWS", rows * 4)
    feed = batches.train_batches(split, 100, seed=0)
    next(feed)
    assert met.wait(10)
    del feed
    go_on.set()
    wait_until_none_reads()
    assert split.read == 100 + rows


def test_an_iterator_left_open_does_not_keep_the_program_from_ending():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from test_ahead import Slow, batches; "
            "feed = batches.train_batches(Slow(), 4, seed=0); next(feed)")
    done = subprocess.run([sys.executable, "-c", code, str(pathlib.Path(__file__).parent)], timeout=60,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

"""The loop stops where it should, says why, and goes on from what it saved."""

import functools
import itertools
import os
import signal

import jax
import numpy as np
import pytest

from dlcourse import streams
from dlcourse.contracts import InputError
from dlcourse.training import checkpoint, loop, losses, optimizers
from dlcourse.training import state as states
from dlcourse.training.step import train_step
from tests.training.test_step import Tiny, batch

TX = optimizers.create("adamw", 0.1)
STEP = jax.jit(functools.partial(train_step, loss=losses.cross_entropy(Tiny()), tx=TX))


def fresh(ema=False):
    return states.create(Tiny(), (2, 2, 1), TX, streams.root(0), ema=ema)


def feed(start=0):
    return (batch(seed=s) for s in itertools.count(start))


def same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def test_callbacks_come_at_their_multiples_and_at_the_end():
    seen, steps = [], []
    loop.fit(
        fresh(),
        STEP,
        feed(),
        steps=7,
        every=[(3, lambda step, state: seen.append((step, int(state.step))))],
        on_step=lambda step, metrics: steps.append(step),
    )
    assert seen == [(3, 3), (6, 6), (7, 7)] and steps == list(range(1, 8))


def test_a_run_that_is_complete_is_left_as_it_is():
    done = loop.fit(fresh(), STEP, feed(), steps=3)
    again = loop.fit(done, STEP, feed(3), steps=3, every=[(1, lambda step, state: pytest.fail("called again"))])
    assert int(again.step) == 3


def test_a_loss_that_is_not_finite_stops_at_its_step_and_names_the_batch():
    saved = []

    def poisoned():
        for step, b in enumerate(feed()):
            yield {**b, "image": b["image"] * np.nan} if step == 2 else b

    with pytest.raises(loop.Diverged, match=r"step 3 \(examples 0, 1, .*learning_rate"):
        loop.fit(fresh(), STEP, poisoned(), steps=9, every=[(3, lambda step, state: saved.append(step))])
    assert saved == []


def test_a_signal_saves_and_stops():
    saved = []

    def signalled():
        for step, b in enumerate(feed()):
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            yield b

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(loop.Interrupted):
        loop.fit(fresh(), STEP, signalled(), steps=100, every=[(50, lambda step, state: saved.append(step))])
    assert saved == [5] and signal.getsignal(signal.SIGTERM) is before


def test_the_clock_ends_a_run():
    assert int(loop.fit(fresh(), STEP, feed(), seconds=0.05).step) > 0


def test_stopped_and_restored_is_the_same_as_never_stopped(tmp_path):
    straight = loop.fit(fresh(ema=True), STEP, feed(), steps=10)
    with checkpoint.Checkpoints(tmp_path) as saved:
        saved.save(loop.fit(fresh(ema=True), STEP, feed(), steps=5))
    with checkpoint.Checkpoints(tmp_path) as saved:
        restored = saved.restore(fresh(ema=True))
    assert int(restored.step) == 5
    same(straight, loop.fit(restored, STEP, feed(5), steps=10))


def test_nothing_saved_restores_nothing(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as saved:
        assert saved.restore(fresh()) is None


def saved_run(path):
    with checkpoint.Checkpoints(path / "checkpoints") as saved:
        saved.save(fresh())
    return path


def test_init_from_gives_the_variables_back(tmp_path):
    same(checkpoint.load_variables(saved_run(tmp_path), fresh()), fresh().variables)


@pytest.mark.parametrize("damage", ["empty", "truncated"])
def test_init_from_a_damaged_checkpoint_is_one_line(tmp_path, damage):
    for file in (saved_run(tmp_path) / "checkpoints" / "0" / "default").rglob("*"):
        if file.is_file():
            file.write_bytes(b"" if damage == "empty" else file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match="cannot be read"):
        checkpoint.load_variables(tmp_path, fresh())


def test_init_from_another_shape_names_the_parameter(tmp_path):
    saved_run(tmp_path)
    wider = states.create(Tiny(), (3, 3, 1), TX, streams.root(0))
    with pytest.raises(InputError, match="params/classifier/kernel is .4, 3. there and .9, 3. here"):
        checkpoint.load_variables(tmp_path, wider)


def test_init_from_nothing(tmp_path):
    with pytest.raises(InputError, match="no checkpoint there"):
        checkpoint.load_variables(tmp_path / "absent", fresh())

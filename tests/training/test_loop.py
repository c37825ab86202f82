"""The loop stops where it should, says why, and goes on from what it saved."""

import itertools
import os
import pathlib
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlcourse import streams
from dlcourse.contracts import InputError
from dlcourse.training import checkpoint, loop, losses, optimizers, parallel
from dlcourse.training import state as states
from dlcourse.training.loop import Every
from tests.training.test_step import Tiny, batch

TX = optimizers.create("adamw", 0.1)
STEP = parallel.create(devices=jax.devices()[:1]).step(loss=losses.cross_entropy(Tiny()), tx=TX)


def fresh(ema=False):
    return states.create(Tiny(), (2, 2, 1), TX, streams.root(0), ema=ema)


def feed(start=0):
    return (batch(seed=s) for s in itertools.count(start))


def same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("at_once", [1, 2])
def test_what_is_due_comes_at_its_steps_and_at_the_end(at_once):
    seen, steps, losses_seen = [], [], []

    def on_steps(step, found):
        steps.append((step, len(found)))
        losses_seen.extend(metrics["loss"] for metrics in found)

    def note(what):
        return lambda step, state, *_: seen.append((what, step, int(state.step)))

    done = loop.fit(fresh(), STEP, feed(), steps=9, on_steps=on_steps, at_once=at_once,
                    evaluate=Every(note("evaluate"), 4), save=Every(note("save"), 8))
    assert seen == [(w, s, s) for w, s in [("evaluate", 4), ("evaluate", 8), ("save", 8), ("evaluate", 9), ("save", 9)]]
    assert steps == ([(s, 1) for s in range(1, 10)] if at_once == 1 else [(2, 2), (4, 2), (6, 2), (8, 2), (9, 1)])
    assert len(set(losses_seen)) == 9
    same(done, loop.fit(fresh(), STEP, feed(), steps=9))


def test_a_run_that_is_complete_is_left_as_it_is():
    done = loop.fit(fresh(), STEP, feed(), steps=3)
    never = Every(lambda *_: pytest.fail("called again"), 1)
    assert int(loop.fit(done, STEP, feed(3), steps=3, evaluate=never, save=never).step) == 3


def test_a_loss_that_is_not_finite_stops_at_its_step_and_names_the_batch():
    def poisoned():
        for step, b in enumerate(feed()):
            yield {**b, "image": b["image"] * np.nan, "index": b["index"] + 50} if step == 2 else b

    for at_once in (1, 3):
        with pytest.raises(loop.Diverged, match=r"step 3 \(examples 50, 51, .*learning_rate"):
            loop.fit(fresh(), STEP, poisoned(), steps=9, at_once=at_once,
                     save=Every(lambda *_: pytest.fail("saved"), 3))


def stopping(at):
    """Batches, with a signal to this process while the one number `at` is made."""
    for step, b in enumerate(feed()):
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        yield b


def test_a_signal_saves_but_does_not_evaluate():
    saved, before = [], signal.getsignal(signal.SIGTERM)
    with loop.stop_signals() as stopped, pytest.raises(loop.Interrupted, match="after step 5"):
        loop.fit(fresh(), STEP, stopping(4), steps=100, stopped=stopped,
                 save=Every(lambda step, _: saved.append(step), 50),
                 evaluate=Every(lambda *_: pytest.fail("evaluated"), 50))
    assert saved == [5] and signal.getsignal(signal.SIGTERM) is before


def test_a_signal_during_evaluation_leaves_it_to_the_next_session():
    seen = []

    def evaluate(step, state, check):
        seen.append(("begun", step))
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        check()
        seen.append(("evaluated", step))

    hooks = {"evaluate": Every(evaluate, 2), "save": Every(lambda step, _: seen.append(("saved", step)), 10)}
    with loop.stop_signals() as stopped, pytest.raises(loop.Interrupted, match="after step 2"):
        loop.fit(fresh(), STEP, feed(), steps=3, stopped=stopped, **hooks)
    assert seen == [("begun", 2), ("saved", 2)]
    loop.fit(loop.fit(fresh(), STEP, feed(), steps=2), STEP, feed(2), steps=3, owed=True, **hooks)
    assert [what for what in seen[2:] if what[0] != "begun"] == [("evaluated", 2), ("evaluated", 3), ("saved", 3)]


def test_the_clock_ends_a_run_and_saves(monkeypatch):
    saved, ticks = [], itertools.count()
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: 0.01 * next(ticks)))
    done = loop.fit(fresh(), STEP, feed(), seconds=0.3, save=Every(lambda step, _: saved.append(step), seconds=1e-9))
    assert int(done.step) > 0 and saved[-1] == int(done.step) and len(saved) > 2


@pytest.mark.parametrize("ends_after", [4, 5])
def test_a_run_that_a_clock_ends_is_evaluated_once_at_its_last_step(ends_after):
    seen, asked = [], []

    def agree(stop, end, save, wait=False):
        asked.append(wait)
        return stop, len(asked) > ends_after, save

    loop.fit(fresh(), STEP, feed(), seconds=1000.0, agree=agree, evaluate=Every(lambda step, *_: seen.append(step), 2))
    assert seen == [2, 4] + [5] * (ends_after == 5)


def test_what_another_process_asks_for_is_done_here():
    asked = []

    def agree(*questions, wait=False):
        asked.append(questions)
        return (len(asked) > 3, *questions[1:])

    with pytest.raises(loop.Interrupted, match="after step 3"):
        loop.fit(fresh(), STEP, feed(), steps=100, agree=agree)
    assert not any(any(questions) for questions in asked)


# --- checkpoints ---


def test_stopped_and_restored_is_the_same_as_never_stopped(tmp_path):
    straight = loop.fit(fresh(ema=True), STEP, feed(), steps=10)
    with checkpoint.Checkpoints(tmp_path) as saved:
        saved.save(loop.fit(fresh(ema=True), STEP, feed(), steps=5), {"note": [0.1, 1 / 3]})
    with checkpoint.Checkpoints(tmp_path) as saved:
        restored = saved.restore(fresh(ema=True))
    assert int(restored.state.step) == 5 and restored.notes == {"note": [0.1, 1 / 3]}
    same(straight, loop.fit(restored.state, STEP, feed(5), steps=10))


def at_step(step):
    state = fresh()
    return state.replace(step=jnp.int32(step), params=jax.tree.map(lambda x: x + step, state.params))


def save_all(path, scores, keep=2):
    with checkpoint.Checkpoints(path, keep) as saved:
        for step, score in enumerate(scores, 1):
            saved.save(at_step(step), {}, score)
            saved.wait()


def test_the_newest_and_the_best_are_kept(tmp_path):
    save_all(tmp_path, [0.3, 0.9, None, 0.5, 0.2, None])
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [2, 5, 6]


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 8
    file.write_bytes(content)


def damage_of(kind):
    def spoil(path: pathlib.Path):
        files = sorted((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
        for file in files:
            if kind == "emptied":
                file.write_bytes(b"")
            if kind == "truncated":
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            if kind == "no files":
                file.unlink()
        if kind == "a changed note":
            file = path / "notes" / "metadata"
            file.write_text(file.read_text().replace("digest", "dig\u00e9st"))
        if kind == "another number":
            other = path.parent.parent / "other"
            save_all(other, [None])
            for file in (path / "state").rglob("*"):
                if file.is_file():
                    file.unlink()
            for file in (other / "1" / "state").rglob("*"):
                to = path / "state" / file.relative_to(other / "1" / "state")
                to.mkdir(exist_ok=True, parents=True) if file.is_dir() else to.write_bytes(file.read_bytes())

    return spoil


DAMAGED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's, on its way out


@DAMAGED
@pytest.mark.parametrize("kind", ["emptied", "truncated", "no files", "a changed note", "another number"])
def test_from_a_damaged_checkpoint_the_one_before_is_taken_loudly(tmp_path, kind, caplog):
    save_all(tmp_path / "checkpoints", [None] * 3)
    damage_of(kind)(tmp_path / "checkpoints" / "3")
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as saved:
        restored = saved.restore(fresh())
        same(restored.state, at_step(2))
        saved.save(at_step(3), {})  # the damaged one is out of the way
        saved.wait()
    assert "step 3 is damaged" in caplog.text and (tmp_path / "damaged_checkpoints" / "3").is_dir()
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as saved:
        same(saved.restore(fresh()).state, at_step(3))


@DAMAGED
def test_a_flipped_byte_anywhere_is_noticed_or_does_no_harm(tmp_path):
    save_all(tmp_path / "checkpoints", [None])
    (source,) = (tmp_path / "checkpoints").iterdir()
    files = [file for file in source.rglob("*") if file.is_file() and file.stat().st_size]
    originals = {file: file.read_bytes() for file in files}
    noticed = 0
    for file in files:
        flip(file)
        with checkpoint.Checkpoints(tmp_path / "checkpoints") as saved:
            try:
                same(saved.restore(fresh()).state, at_step(1))
            except InputError:
                noticed += 1
        aside = tmp_path / "damaged_checkpoints" / "1"
        if aside.exists():
            aside.rename(source)
        file.write_bytes(originals[file])
    assert noticed > 2  # others are seldom read, or never


@DAMAGED
def test_where_no_checkpoint_is_whole_nothing_is_begun_anew(tmp_path):
    save_all(tmp_path / "checkpoints", [None, None])
    for path in (tmp_path / "checkpoints").iterdir():
        damage_of("truncated")(path)
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as saved:
        with pytest.raises(InputError, match="none of the 2 checkpoints.*--overwrite"):
            saved.restore(fresh())


def test_a_checkpoint_of_another_model_is_refused_and_left_alone(tmp_path):
    save_all(tmp_path / "checkpoints", [None])
    wider = states.create(Tiny(), (3, 3, 1), TX, streams.root(0))
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as saved:
        with pytest.raises(InputError, match=r"/1 does not fit this model: opt_state.*kernel is float32\[4, 3\] there"):
            saved.restore(wider)
    assert (tmp_path / "checkpoints" / "1").is_dir()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_a_digest_tells_every_bit_and_place(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 2, (6, 5)), dtype)
    mesh = parallel.create(fsdp=2)
    (one,) = checkpoint.digest([x]).values()
    (spread,) = checkpoint.digest([mesh.place([x])[0]]).values()
    (turned,) = checkpoint.digest([x.T]).values()
    assert one == spread != turned
    found = {one}
    for place in np.ndindex(6, 5):
        changed = ~x[place] if dtype == "bool" else x[place] + 1
        found.update(checkpoint.digest([x.at[place].set(changed)]).values())
    assert len(found) == 31


def test_nothing_saved_restores_nothing(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as saved:
        assert saved.restore(fresh()) is None


def saved_run(path):
    with checkpoint.Checkpoints(path / "checkpoints") as saved:
        saved.save(fresh(), {})
    return path


def test_init_from_gives_the_variables_back(tmp_path):
    same(checkpoint.load_variables(saved_run(tmp_path), fresh()), fresh().variables)


@pytest.mark.parametrize("damage", ["empty", "truncated"])
def test_init_from_a_damaged_checkpoint_is_one_line(tmp_path, damage):
    for file in (saved_run(tmp_path) / "checkpoints" / "0").rglob("*"):
        if file.is_file():
            file.write_bytes(b"" if damage == "empty" else file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match="cannot be read"):
        checkpoint.load_variables(tmp_path, fresh())


def test_init_from_another_shape_names_the_parameter(tmp_path):
    saved_run(tmp_path)
    wider = states.create(Tiny(), (3, 3, 1), TX, streams.root(0))
    with pytest.raises(InputError, match=r"params/classifier/kernel is float32\[4, 3\] there and float32\[9, 3\]"):
        checkpoint.load_variables(tmp_path, wider)


def test_init_from_nothing(tmp_path):
    with pytest.raises(InputError, match="no checkpoint there"):
        checkpoint.load_variables(tmp_path / "absent", fresh())

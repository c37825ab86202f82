"""A run's folder and exit status, tried on a toy experiment."""

import asyncio
import os
import subprocess
import sys

import pytest
import tensorstore
from commands import TOY, assert_mistake, run, surroundings, toy

from experiments import command


def test_a_finished_run_is_shown_again_at_once(tmp_path):
    first, second = toy(tmp_path), toy(tmp_path)
    assert first.returncode == second.returncode == 0
    assert "config:" in first.stdout and "config:" not in second.stdout
    assert "test/accuracy" in second.stdout and "report.html" in second.stdout
    assert "jax imported: False" in second.stdout
    assert "config:" in toy(tmp_path, "--overwrite").stdout
    assert not first.stderr, "no chatter of libraries"


def test_exit_statuses_tell_ends_apart(tmp_path):
    assert_mistake(toy(tmp_path, "--end=refused"), "refused in two lines")
    stopped = toy(tmp_path, "--end=stopped")
    assert stopped.returncode == 75 and "saved" in stopped.stderr and "Traceback" not in stopped.stderr
    broken = toy(tmp_path, "--end=broken")
    assert broken.returncode == 1 and "ZeroDivisionError: a defect" in broken.stderr and "Traceback" in broken.stderr


def test_a_refused_run_leaves_no_folder(tmp_path):
    toy(tmp_path, "--end=refused")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "mine").mkdir()
    toy(tmp_path, "--end=refused", "--workdir=mine")
    assert list((tmp_path / "mine").iterdir()) == []


def test_an_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    assert_mistake(toy(tmp_path, "--workdir=file/run"), "--workdir=file/run")  # root may write to any folder
    assert_mistake(toy(tmp_path, "--workdir=/proc/run"), "--workdir=/proc/run")
    assert_mistake(toy(tmp_path, "--workdir=gs://bucket/run"), "--workdir=gs:/", "file system")


def test_a_full_disk(tmp_path):
    assert_mistake(toy(tmp_path, "--end=full"), "No space left on device", "--workdir")


def test_a_disk_that_fills_up_under_a_library(tmp_path):
    """Written past the run's folder, as orbax does: a small file system where we may mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], capture_output=True).returncode == 0
    try:
        if mounted:
            assert_mistake(toy(tmp_path, "--end=fills", f"--workdir={small}/run"), "no space left", "--workdir")
    finally:
        if mounted:
            subprocess.run(["umount", str(small)], check=True)


def test_a_write_that_ends_after_its_event_loop_is_not_heard(monkeypatch, capfd):
    """What orbax's writers do once a full disk has ended the loop that they report to; other errors are told."""
    monkeypatch.setattr(sys, "unraisablehook", command._unraisablehook)

    async def awaited():
        promise, written = tensorstore.Promise.new()
        waiting = written.__await__()
        next(waiting)
        return promise, waiting

    promise, _waiting = asyncio.run(awaited())
    promise.set_result(None)
    assert capfd.readouterr().err == ""

    class Defect:
        def __del__(self):
            raise ZeroDivisionError("a defect")

    Defect()
    assert "a defect" in capfd.readouterr().err


@pytest.mark.parametrize(("raised", "said"), [
    ("OSError(28, 'No space left on device', 'x/state')", "x/state"),
    ("ValueError('Error writing local file: No space left on device')", "--workdir"),
    ("ValueError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes')", "--batch_size"),
    ("MemoryError()", "out of memory"),
    ("RuntimeError('Unable to initialize backend cuda')", "JAX_PLATFORMS")])
def test_what_a_user_can_mend_is_one_line(raised, said, tmp_path):
    script = tmp_path / "raises.py"
    wrapped = f'raise RuntimeError("in a library") from {raised}'
    script.write_text(TOY.replace('raise ZeroDivisionError("a defect")', wrapped))
    assert_mistake(run([sys.executable, str(script), "--end=broken"], tmp_path), said)


def test_a_workdir_in_use(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(TOY)
    words = [sys.executable, str(script), "--end=waits", "--workdir=run"]
    with subprocess.Popen(words, cwd=tmp_path, env=surroundings(tmp_path), stdout=subprocess.PIPE, text=True) as first:
        while "waiting" not in first.stdout.readline():
            assert first.poll() is None
        assert_mistake(toy(tmp_path, "--end=waits", "--workdir=run"), "--workdir=run", "in use", str(first.pid))
        assert (tmp_path / "run/config.json").exists()
        first.kill()


def test_a_workdir_of_another_config(tmp_path):
    assert toy(tmp_path, "--workdir=run", "--seed=1").returncode == 0
    before = (tmp_path / "run/config.json").read_bytes()
    assert_mistake(toy(tmp_path, "--workdir=run", "--seed=2"), "--workdir=run", "--seed", "1", "2", "--overwrite")
    assert (tmp_path / "run/config.json").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("")
    assert_mistake(toy(tmp_path, "--workdir=other", "--overwrite"), "thesis.tex")
    assert (tmp_path / "other/thesis.tex").exists()

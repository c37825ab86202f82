"""A run that is ended at any moment, in any way, goes on to be the run that nobody touched."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from commands import ROOT, experiment, surroundings

from dlcourse.training import checkpoint

pytestmark = pytest.mark.slow
FLAGS = ["--model=mlp,width=16", "--train_for=150steps", "--batch_size=32", "--eval_every=25steps", "--noclaims",
         "--checkpoint_every=10steps", "--ema=0.9", "--augment=crop=1", "--notensorboard"]


def killing(tmp_path, *words):
    program = [sys.executable, str(ROOT / "tests/commands/killing.py"), *words]
    environment = surroundings(tmp_path, PYTHONPATH=f"{ROOT}:{ROOT / 'tests/commands'}")
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def saved_steps(run):
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def arrays(run):
    """The newest checkpoint's step and digests of all its arrays."""
    newest = saved_steps(run)[-1]
    notes = json.loads((run / "checkpoints" / str(newest) / "notes" / "metadata").read_text())
    return newest, checkpoint._unsealed(notes)["digest"]


def lines(run):
    """What metrics.jsonl says, without the time of day."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["split"], None if r["split"] == "speed" else r["values"]) for r in records]


def scores(run):
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    return {name: value for name, value in metrics.items() if not name.startswith("speed/")}


def assert_same(one, other):
    assert arrays(one) == arrays(other) and lines(one) == lines(other) and scores(one) == scores(other)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untouched")
    assert experiment(folder, "classification", *FLAGS, "--workdir=run").returncode == 0
    return folder / "run"


def test_killed_thirty_times_it_is_the_same_run_bit_by_bit(untouched, tmp_path):
    """In one run after another, since each session may reach a checkpoint more; a complete one must be whole."""
    killed, stopped, number = 0, 0, 0
    while killed < 30:
        ended = killing(tmp_path, str(number), str(30 - killed), *FLAGS, f"--workdir=run{number}")
        assert ended[-1][2] == 0
        for how, moment, status, seconds in ended[:-1]:
            # A signal that comes before the handler is there ends Python as it always would.
            allowed = {"SIGKILL": {-9}, "SIGTERM": {75, -15}, "SIGINT": {75, 1, -2}}[how]
            assert status in allowed, (how, moment, status)
            if how != "SIGKILL" and moment != "the start":
                assert status == 75 and seconds < 30, (how, moment, status)
            killed += status == -signal.SIGKILL
            stopped += status == 75
        assert_same(untouched, tmp_path / f"run{number}")
        number += 1
    assert stopped >= 2


@contextlib.contextmanager
def small_disk(folder, size):
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("needs root, to make a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_on_a_full_disk_it_stops_with_one_line_and_goes_on_when_there_is_room(untouched, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, "400k"):
        words = ("classification", *FLAGS, f"--workdir={disk}/run")
        full = experiment(tmp_path, *words)
        assert full.returncode == 2 and full.stderr.count("\n") == 1, full.stderr
        assert "no space left" in full.stderr and "--workdir" in full.stderr
        before = saved_steps(disk / "run")
        subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
        assert experiment(tmp_path, *words).returncode == 0
        assert_same(untouched, disk / "run")
        assert 0 < before[-1] < 150


def test_a_damaged_newest_checkpoint_costs_no_more_than_the_way_from_the_one_before(untouched, tmp_path):
    words = ("classification", *FLAGS, "--workdir=run")
    run = shutil.copytree(untouched, tmp_path / "run")
    (run / "result.json").unlink()
    newest = run / "checkpoints" / "150"
    for file in (newest / "state").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    again = experiment(tmp_path, *words)
    assert again.returncode == 0 and "step 150 is damaged" in again.stderr
    assert_same(untouched, run)
    assert [path.name for path in (run / "damaged_checkpoints").iterdir()] == ["150"]

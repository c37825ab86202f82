"""A run's folder: whole or absent, held by one, resumed without duplicates."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from dlcourse.contracts import Claim, Evidence, InputError
from dlcourse.reporting import environment, files
from dlcourse.reporting import run as runs

CONFIG = {"data": {"dataset": "digits", "batch_size": 64}, "run": {"seed": 0, "workdir": "x", "tensorboard": True}}
CLAIM = Claim("L07a", "Deep learning", "Depth helps.", np.bool_(True),
              Evidence(np.float32(0.5), 0.25, 0.0, (0.1, 0.4), 9), "")
ENVIRONMENT = {"python": "3.11", "jax": "0", "flax": "0", "devices": "1 cpu", "commit": None}


def open_run(path, config=CONFIG, flags=("--dataset=digits",), **options):
    return runs.open_run(path, "classification", config, flags, **{"tensorboard": False, **options})


def leftovers(path):
    return [str(file) for file in path.rglob("*.tmp")]


def test_result_says_what_the_schema_says_and_never_nan(tmp_path):
    with open_run(tmp_path / "r") as run:
        run.log(1, "train", {"loss": float("nan"), "accuracy": np.float32(0.5)}, 0.25)
        assert run.finished is None
        run.finish({"test/accuracy": np.float64(0.75), "test/nll": float("inf")}, [CLAIM], {"total": 1.0}, ENVIRONMENT)
        assert run.finished["status"] == "finished"

    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    result = json.loads((tmp_path / "r/result.json").read_text(), parse_constant=no_constants)
    line = json.loads((tmp_path / "r/metrics.jsonl").read_text(), parse_constant=no_constants)
    assert line == {"step": 1, "split": "train", "values": {"loss": None, "accuracy": 0.5}, "seconds": 0.25}
    assert {"schema", "experiment", "status", "config", "environment", "seconds", "metrics", "claims",
            "figures"} <= set(result)
    assert result["schema"] == 1 and result["metrics"] == {"test/accuracy": 0.75, "test/nll": None}
    assert result["claims"][0] == {
        "id": "L07a", "section": "Deep learning", "statement": "Depth helps.", "holds": True, "caveat": "",
        "evidence": {"value": 0.5, "control": 0.25, "threshold": 0.0, "ci95": [0.1, 0.4], "n": 9}}
    assert result["config"] == {"data": CONFIG["data"], "run": {"seed": 0, "tensorboard": True}}


def test_flag_file_repeats_the_run_without_its_place(tmp_path):
    flags = ["--dataset=folder:my pictures", "--workdir=x", "--overwrite", "--nooverwrite", "--overwrite=true",
             "--seed=3"]
    with open_run(tmp_path / "r", flags=flags) as run:
        assert run.command == "python -m experiments.classification '--dataset=folder:my pictures' --seed=3"
    assert (tmp_path / "r/flags.txt").read_text() == "--dataset=folder:my pictures\n--seed=3\n"


def test_resumed_metrics_have_no_duplicates_and_no_torn_line(tmp_path):
    with open_run(tmp_path / "r") as run:
        for step in (1, 2, 3):
            assert run.sync_metrics() == step - 1
            run.log(step, "train", {"loss": step}, step)
    with open(tmp_path / "r/metrics.jsonl", "a") as file:
        file.write('{"step": 4, "spl')
    with open_run(tmp_path / "r") as run:
        run.truncate_metrics(2, step=2)
        run.log(3, "train", {"loss": 30}, 3)
        assert [(r["step"], r["values"]["loss"]) for r in run.metrics()] == [(1, 1), (2, 2), (3, 30)]
    assert len((tmp_path / "r/metrics.jsonl").read_text().splitlines()) == 3


def test_a_line_after_a_torn_one_survives(tmp_path):
    with open_run(tmp_path / "r") as run:
        run.log(1, "train", {"loss": 1}, 1)
    with open(tmp_path / "r/metrics.jsonl", "a") as file:
        file.write('{"step": 2')
    with open_run(tmp_path / "r") as run:  # no truncation: the run had not reached a checkpoint
        run.log(2, "train", {"loss": 2}, 2)
        assert [r["step"] for r in run.metrics()] == [1, 2]


def test_events_hold_the_scalars_and_hide_what_a_resumed_run_repeats(tmp_path):
    for steps in ((1, 2, 3), (3, 4)):
        with open_run(tmp_path / "r", tensorboard=True) as run:
            if steps[0] > 1:
                run.truncate_metrics(2, step=2)
            for step in steps:
                run.log(step, "train", {"loss": step / 2}, step)
    events = [event for file in sorted((tmp_path / "r/tensorboard").iterdir()) for event in read_events(file)]
    scalars = [(e.step, e.summary.value[0].tag, e.summary.value[0].simple_value) for e in events if e.summary.value]
    assert scalars == [(1, "train/loss", 0.5), (2, "train/loss", 1), (3, "train/loss", 1.5), (3, "train/loss", 1.5),
                       (4, "train/loss", 2)]
    assert [e.step for e in events if e.session_log.status] == [3]


def read_events(file):
    """The records of an event file: length (8 bytes), its checksum (4), data, its checksum (4)."""
    from tensorboardX.proto import event_pb2

    content, at = file.read_bytes(), 0
    while at < len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        yield event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
        at += 16 + length


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with open_run(tmp_path / "r"):
        with pytest.raises(InputError, match=rf"in use by another run \(process {os.getpid()}\)"):
            open_run(tmp_path / "r").__enter__()
    with open_run(tmp_path / "r"):
        pass


def test_a_killed_run_lets_go_of_its_folder(tmp_path):
    code = textwrap.dedent(f"""
        from dlcourse.reporting.run import open_run
        with open_run({str(tmp_path / "r")!r}, "classification", {CONFIG!r}, ["--dataset=digits"]) as run:
            print("open", flush=True)
            input()
    """)
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as child:
        assert child.stdout.readline() == "open\n"
        with pytest.raises(InputError, match=f"process {child.pid}"):
            open_run(tmp_path / "r").__enter__()
        child.kill()
    with open_run(tmp_path / "r"):
        pass


def test_another_config_is_refused_by_the_names_of_its_flags(tmp_path):
    with open_run(tmp_path / "r") as run:
        run.log(1, "train", {"loss": 1}, 1)
    other = {"data": {"dataset": "digits", "batch_size": 32}, "run": {"seed": 0, "workdir": "y", "tensorboard": False}}
    with pytest.raises(InputError, match=r"\(--batch_size was 64 and is 32\).*--overwrite"):
        open_run(tmp_path / "r", other).__enter__()
    with pytest.raises(InputError, match="a run of classification, not of fooling"):
        runs.open_run(tmp_path / "r", "fooling", CONFIG, []).__enter__()
    with open_run(tmp_path / "r", other, overwrite=True) as run:
        assert run.metrics() == []
    assert json.loads((tmp_path / "r/config.json").read_text())["config"]["data"]["batch_size"] == 32


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path, overwrite):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds thesis.txt but no run"):
        open_run(tmp_path, overwrite=overwrite).__enter__()
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("path", ["file/run", "gs://bucket/run"])
def test_an_unusable_folder_is_one_line(tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as caught:
        open_run(path).__enter__()
    assert "--workdir" in str(caught.value) and "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_full_disk_while_opening_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match="No space left on device"):
        open_run(tmp_path / "a/b/r").__enter__()
    assert list(tmp_path.iterdir()) == []


def test_full_disk_while_finishing_leaves_no_result(tmp_path, monkeypatch):
    with open_run(tmp_path / "r") as run:
        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(InputError, match="No space left on device"):
            run.finish({}, [], {"total": 1.0}, ENVIRONMENT)
        assert run.finished is None
    assert leftovers(tmp_path) == [] and not (tmp_path / "r/report.html").exists()


def full_disk(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_log_line_that_does_not_fit_is_not_begun(tmp_path):
    """The kernel itself stops the writing here: a limit on file size cuts the line in its middle."""
    code = textwrap.dedent(f"""
        import resource, signal
        from dlcourse.contracts import InputError
        from dlcourse.reporting.run import open_run
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with open_run({str(tmp_path / "r")!r}, "classification", {CONFIG!r}, [], tensorboard=False) as run:
            run.log(1, "train", {{"loss": 1}}, 1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
            try:
                run.log(2, "train", {{"loss": 2}}, 2)
            except InputError as error:
                print(error)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "" and "File too large" in done.stdout
    assert [r["step"] for r in files.read_json_lines(tmp_path / "r/metrics.jsonl")] == [1]
    assert (tmp_path / "r/metrics.jsonl").read_text().endswith("}\n")


def test_killed_between_writing_and_renaming_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    files.write_atomically(path, "old")
    code = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from dlcourse.reporting import files
        os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
        files.write_atomically(Path({str(path)!r}), "new")
    """)
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert path.read_text() == "old" and len(leftovers(tmp_path)) == 1


def test_what_a_killed_run_left_is_swept(tmp_path):
    with open_run(tmp_path / "r"):
        pass
    (tmp_path / "r/.result.json.1.tmp").write_text("half")
    with open_run(tmp_path / "r"):
        assert leftovers(tmp_path) == []


def test_processes_that_do_not_write_leave_the_disk_alone(tmp_path):
    with open_run(tmp_path / "r", writes=False, tensorboard=True) as run:
        run.log(1, "train", {"loss": 1}, 1)
        run.truncate_metrics(0, step=0)
        assert run.finish({"test/accuracy": 1}, [], {"total": 1.0}, ENVIRONMENT)["metrics"] == {"test/accuracy": 1}
    assert list(tmp_path.iterdir()) == []


def test_commit_is_that_of_the_code_or_none(tmp_path):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    code = tmp_path / "code"
    code.mkdir()
    assert environment.commit(code) is None
    git("init")
    git("commit", "--allow-empty", "-m", "somebody else's")
    (code / "a.py").write_text("1")
    assert environment.commit(code) is None  # in a checkout, but not of it
    git("add", "."), git("commit", "-m", "m")
    clean = environment.commit(code)
    assert len(clean) == 40 and int(clean, 16) >= 0
    (code / "a.py").write_text("2")
    assert environment.commit(code) == f"{clean}-dirty"


def test_environment_names_what_a_reader_asks_for():
    found = environment.describe()
    assert {"python", "jax", "flax", "devices", "commit", "cpu"} <= set(found)
    assert found["devices"] == "4 cpu"
    json.dumps(found)


def test_reporting_imports_no_middle_room():
    code = textwrap.dedent("""
        import sys
        from dlcourse.reporting import environment, figures, files, pictures, report, run, svg, tensorboard, terminal
        rooms = ("models", "data", "training", "adversarial", "interpretation", "transfer")
        bad = [name for name in sys.modules if name.startswith(tuple(f"dlcourse.{room}" for room in rooms))]
        print(bad + [name for name in ("jax", "torch", "matplotlib.pyplot", "tensorboardX") if name in sys.modules])
    """)
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"

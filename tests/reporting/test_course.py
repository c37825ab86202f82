"""The course on two tiny experiments, one of which fails; the table of recipes; the terminal."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlcourse.contracts import InputError
from dlcourse.reporting import terminal
from experiments import course, recipes

TINY = '''
import sys
from dlcourse.contracts import Claim, Evidence
from dlcourse.reporting.run import open_run
flags = dict(flag[2:].split("=", 1) for flag in sys.argv[1:])
if "flagfile" in flags:
    print(open(flags["flagfile"]).read(), file=sys.stderr)
    sys.exit(3)
claim = lambda id, holds: Claim(id, "s", f"{id} was tried.", holds, Evidence(1., 0., 0., (.5, 1.5), 9), "")
with open_run(flags["workdir"], "tiny", {}, [], tensorboard=False) as run:
    run.finish({}, [claim("L11b", False), claim("L01a", True), claim("L11a", True)], {"total": 1.0}, {})
'''


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A package of one experiment and one preset, in place of the real one."""
    package = tmp_path / "src/experiments"
    (package / "presets").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "tiny.py").write_text(TINY)
    (package / "presets/broken.flags").write_text("the preset was found")
    monkeypatch.setattr(course, "PACKAGE", package)
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}:{course.__file__.rsplit('/', 2)[0]}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(course, "LECTURE", tuple(
        said._replace(experiments=("tiny",)) if said.id in ("L01", "L02", "L11") else said for said in course.LECTURE))
    return tmp_path


def test_course_goes_on_after_a_failure_and_keeps_the_lecture_s_order(tiny, monkeypatch, capfd):
    monkeypatch.setattr(course, "COMMANDS", (
        ("tiny", "--flagfile=experiments/presets/broken.flags"), ("unwritten",), ("tiny",)))
    assert course.main(["--workdir=out"]) == 1
    assert "the preset was found" in capfd.readouterr().err
    html = (tiny / "out/index.html").read_text()
    assert "<h1>2 of 3 claims hold</h1>" in html and "failed with exit status 3" in html and "unwritten" not in html
    assert re.findall(r"(L\d\d[ab]) was tried", html) == ["L01a", "L11b", "L11a"]
    assert sorted(re.findall(r'href="([^"]+)"', html)) == ["02-tiny/report.html"] * 4
    assert (tiny / "out/02-tiny/report.html").exists()
    assert re.findall(r"(L\d\d) ·", html) == [f"L{number:02d}" for number in range(1, 28)]
    assert html.count("not yet executable") == 24 and html.count("its experiment failed") == 1


def test_course_that_all_ran_exits_with_zero(tiny, monkeypatch):
    monkeypatch.setattr(course, "COMMANDS", (("tiny",),))
    assert course.main(["--workdir=out"]) == 0
    assert "no claim of its own yet" in (tiny / "out/index.html").read_text()


def test_a_course_that_cannot_write_is_one_line_and_runs_nothing(tiny, monkeypatch, capsys):
    monkeypatch.setattr(course, "COMMANDS", (("tiny",),))
    (tiny / "file").write_text("")
    assert course.main(["--workdir=file/out"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: --workdir=file/out: cannot write") and said.err.count("\n") == 1 and not said.out


def test_a_claim_of_no_row_is_not_lost_silently():
    with pytest.raises(ValueError, match="'X1'"):
        course.lecture_rows([{"id": "X1"}], [])


def test_help_answers_at_once():
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "experiments.course", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--workdir" in done.stdout and time.monotonic() - began < 3


def test_a_mistyped_flag_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        course.main(["--workdri=x"])
    assert capsys.readouterr().err == "error: unrecognized arguments: --workdri=x; see --help\n"


PLACE = Path.home() / "of_mine"
RESULT = {
    "schema": 1, "experiment": "classification", "status": "finished", "date": "2026-01-02",
    "command": f"python -m experiments.classification '--dataset=folder:{PLACE}/my_pictures' --augment=flip,crop=2",
    "config": {"data": {"dataset": f"folder:{PLACE}/my_pictures"}, "model": {"init_from": f"{PLACE}/old"},
               "run": {"seed": 7}},
    "environment": {"devices": "1 cpu", "cpu": "A | B (2 cores)"}, "seconds": {"total": 90.0},
    "metrics": {"test/accuracy": 0.98, "test/accuracy_low": 0.97, "test/accuracy_high": 0.99, "test/n": 360},
    "claims": [{"id": "L01a", "holds": True}, {"id": "L07a", "holds": False}], "figures": [], "tables": []}


@pytest.fixture
def kept(tmp_path):
    """A README with an empty table and one kept result."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/result.json").write_text(json.dumps(RESULT))
    (tmp_path / "README.md").write_text(f"# Title\n{recipes.BEGIN}\n{recipes.END}\nThe end.\n")
    recipes.keep(tmp_path / "run", "mine", tmp_path / "results")
    return tmp_path


def test_a_kept_result_holds_no_place_of_the_machine(kept):
    text = (kept / "results/mine.json").read_text()
    assert str(PLACE) not in text
    recipe = json.loads(text)
    assert recipe["data"] == "folder:my_pictures" and recipe["config"]["model"]["init_from"] == "old"
    assert recipe["command"].endswith("'--dataset=folder:my_pictures' --augment=flip,crop=2")
    assert recipe["score"] == {"metric": "test/accuracy", "value": 0.98, "ci95": [0.97, 0.99], "n": 360}


def test_table_is_written_once_and_checked(kept, capsys):
    readme, results = kept / "README.md", kept / "results"
    assert recipes.update(readme, results, check=True) == 1
    assert "The end." in readme.read_text() and "mine" not in readme.read_text()
    assert recipes.update(readme, results) == 0 and recipes.update(readme, results, check=True) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n") and text.endswith("The end.\n")
    row = next(line for line in text.splitlines() if "[mine]" in line)
    cells = ["98.00 % (97.00 to 99.00, 360)", "1 min 30 s", "A \\| B (2 cores)", "1 of 2 hold", "| 7 |", "2026-01-02"]
    assert all(cell in row for cell in cells)
    readme.write_text(text.replace("98.00 %", "99.00 %"))
    assert recipes.update(readme, results, check=True) == 1


def test_recipes_without_a_place_or_a_result_say_so(tmp_path):
    with pytest.raises(InputError, match="README.md is missing"):
        recipes.update(tmp_path / "README.md", tmp_path)
    (tmp_path / "README.md").write_text("no table")
    with pytest.raises(InputError, match="has no <!-- recipes -->"):
        recipes.update(tmp_path / "README.md", tmp_path)
    with pytest.raises(InputError, match="is no finished run"):
        recipes.keep(tmp_path, "mine", tmp_path)


def test_the_readme_s_table_is_that_of_the_kept_results():
    kept = {path.stem for path in recipes.RESULTS.glob("*.json")}
    assert {"digits", "faces", "fashion_mnist", "fashion_mnist_95"} <= kept
    assert recipes.update(recipes.README, recipes.RESULTS, check=True) == 0


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with terminal.Progress(40, 64, done=10) as progress:
        for step in (15, 20, 30, 40):
            progress.update(step, {"loss": 0.5})
    assert capsys.readouterr().out == (
        "step 20/40  loss 0.5  107 examples/s  12.0 s left\nstep 40/40  loss 0.5  240 examples/s\n")


def test_summary_says_claims_and_report_and_takes_no_text_for_markup(capsys):
    claim = {"id": "L01a", "statement": "[bold]x[/nothing] helps", "holds": False,
             "evidence": {"value": 0.5, "control": None, "threshold": 0, "ci95": [0.25, 0.75], "n": 1234}}
    terminal.banner({"data": "[red]digits"})
    terminal.summary({"metrics": {"test/[x]": 0.98765}, "claims": [claim]}, "runs/x")
    out = capsys.readouterr().out
    for said in ("data  [red]digits", "test/[x]", "0.9877", "does not hold", "[bold]x[/nothing] helps",
                 "0.5 against –, 95 % interval [0.25, 0.75], threshold 0, n = 1,234", "runs/x/report.html"):
        assert said in out


@pytest.mark.parametrize("seconds, said", [(4.21, "4.2 s"), (59.99, "1 min 00 s"), (65, "1 min 05 s"),
                                           (3599.8, "1 h 00 min"), (7500, "2 h 05 min")])
def test_durations(seconds, said):
    assert terminal.duration(seconds) == said

"""The whole course: every experiment in its default version, in order, and one page "N of M claims hold".

    python -m experiments.course

Takes as long as its experiments together; those already finished below --workdir are not run again.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from dlcourse.contracts import InputError
from dlcourse.reporting import files, report

PACKAGE = Path(__file__).resolve().parent


class Said(NamedTuple):
    """One row of the lecture: `id`, the `section` it stands in, what it `says`, and the `experiments` that test it."""

    id: str
    section: str
    says: str
    experiments: tuple[str, ...] = ()


LECTURE = (
    Said("L01", "Representation learning", "Good features can be learned from data. Is a picture a face? "
         "Can 100 numbers stand for an image, and can good ones be found?", ("classification",)),
    Said("L02", "Representation is not easy", "Where people see a scene, a computer is given a table of numbers.",
         ("classification",)),
    Said("L03", "Edge detection", "Seeing begins with edges: cells of V1 answer to lines of one orientation."),
    Said("L04", "Edge detection", "An edge is a sharp change of brightness. It has many causes and is hard to find."),
    Said("L05", "Grouping", "People continue lines, turn to colour all at once and change their rules as needed."),
    Said("L06", "Mid-level cues", "Continuation, parallels, junctions and corners lead to parts of objects, which are "
         "too hard to design by hand: learn them."),
    Said("L07", "Deep learning", "Several levels of representation, each more abstract: layers of nonlinear "
         "processing, trained end to end from pixels to classifier.", ("classification", "feature_visualization")),
    Said("L08", "Learning of object parts", "Parts emerge when categories of objects are learned.",
         ("feature_visualization",)),
    Said("L09", "Deep hierarchies in vision", "The visual system is about ten levels deep, from photoreceptors to TE; "
         "receptive fields grow and the features become those of textures, curves, shapes and faces."),
    Said("L10", "From the visual system to a ConvNet", "Encoding turns a stimulus into activity, decoding turns "
         "activity into behaviour."),
    Said("L11", "Hierarchical CNNs", "Each layer filters, thresholds, pools and normalises. A filter is a template; "
         "receptive fields keep growing.", ("classification", "feature_visualization")),
    Said("L12", "Traditional recognition",
         "Before: fixed features, a middle level found without labels, a classifier."),
    Said("L13", "Hierarchical compositionality",
         "Images, speech and text are all made of parts that are made of parts."),
    Said("L14", "How it revived", "Until 2006 deep training failed; pre-training without labels, better estimation and "
         "regularisation mended it."),
    Said("L15", "How it revived", "There came to be many data.", ("input_pipeline", "transfer")),
    Said("L16", "How it revived", "Uniform parallel operations on dense vectors are fast.",
         ("benchmark", "scaling", "tpu_steps")),
    Said("L17", "Tools", "Frameworks that anyone can use are free.", ("benchmark", "transfer")),
    Said("L18", "Limit 1", "Many clean data are needed: where they exist it works, elsewhere it does not.",
         ("transfer",)),
    Said("L19", "Limit 2", "Images that nobody can recognise are classified with 99.6 % confidence and more.",
         ("fooling",)),
    Said("L20", "Limit 2", "A change that cannot be seen gives another class: 57.7 % panda becomes 99.3 % gibbon.",
         ("adversarial_robustness",)),
    Said("L21", "Limit 3", "A brain runs on 20 W, a machine took 1 MW. Brains grow connections, then prune them."),
    Said("L22", "Limit 4", "A child learns a class from one picture, by attributes such as a tail or an egg.",
         ("few_shot", "zero_shot")),
    Said("L23", "Limit 4", "People generalise first, to a big cat, and then specialise, by its tear marks.",
         ("transfer",)),
    Said("L24", "Limit 4", "Knowledge is hard to transfer: a new class needs new data. Zero and one shot, transfer, "
         "several tasks at once and learning with few or no labels are the way.",
         ("transfer", "few_shot", "zero_shot")),
    Said("L25", "Limit 5", "Networks of 10 to 100 million parameters are black boxes: accuracy is paid for with "
         "explanation.", ("explanation",)),
    Said("L26", "Limit 5", "Six questions stay open: why, why not something else, when does it succeed, when fail, "
         "when to trust it, how to correct it.", ("explanation",)),
    Said("L27", "Limit 6", "Two agents that gather fruit turn on each other as fruit grows scarce."),
)

COMMANDS = (
    ("classification",),
    ("classification", "--flagfile=experiments/presets/faces.flags"),
    ("adversarial_robustness",),
    ("fooling",),
    ("benchmark",),
    ("input_pipeline",),
    ("scaling",),
)
"""Experiment and flags of each run; a flag file's path is relative to the folder that holds `experiments/`."""


def main(argv: Sequence[str]) -> int:
    """Runs the course; returns 0 when all of it ran, 1 otherwise, 2 where it cannot write."""
    folder = Path(_parse(argv).workdir).expanduser()
    try:
        runs = run_all(existing(COMMANDS), folder)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\nindex  {folder / 'index.html'}")
    return 0 if all(run["outcome"] == "finished" for run in runs) else 1


def run_all(commands: Sequence[tuple[str, ...]], folder: Path) -> list[dict]:
    """Runs one command after the other; the index is up to date after each."""
    runs: list[dict] = []
    write_index(folder, runs)
    for number, command in enumerate(commands, start=1):
        print(f"\n== {shlex.join(command)}", flush=True)
        runs.append(execute(command, folder / f"{number:02d}-{_short_name(command)}"))
        write_index(folder, runs)
    return runs


def existing(commands: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Those commands whose experiment is there."""
    return [command for command in commands if (PACKAGE / f"{command[0]}.py").exists()]


def execute(command: Sequence[str], workdir: Path) -> dict:
    """Runs one experiment in a process of its own.

    Args:
      command: experiment and flags.
      workdir: the folder of that run.

    Returns:
      `command`, `experiment`, `outcome` ("finished" or what went wrong), `seconds`, `workdir`.
    """
    began = time.monotonic()
    flags = [re.sub(r"^--flagfile=experiments/", f"--flagfile={PACKAGE}/", flag) for flag in command[1:]]
    done = subprocess.run([sys.executable, "-m", f"experiments.{command[0]}", *flags, f"--workdir={workdir}"])
    finished = done.returncode == 0 and (workdir / "result.json").exists()
    return {"command": shlex.join(command), "experiment": command[0], "workdir": workdir,
            "seconds": time.monotonic() - began,
            "outcome": "finished" if finished else f"failed with exit status {done.returncode}"}


def write_index(folder: Path, runs: Sequence[dict]) -> None:
    """Writes FOLDER/index.html from the runs' result.json.

    Raises:
      InputError: FOLDER cannot be written.
    """
    claims, shown = [], []
    for run in runs:
        link = f"{run['workdir'].name}/report.html" if run["outcome"] == "finished" else None
        shown.append({**run, "report": link})
        if link:
            result = json.loads((run["workdir"] / "result.json").read_text())
            claims += [{**claim, "report": link} for claim in result["claims"]]
    html = report.render_course(lecture_rows(claims, runs), shown)
    with files.in_one_line(folder):
        folder.mkdir(parents=True, exist_ok=True)
        files.write_atomically(folder / "index.html", html)


def lecture_rows(claims: Sequence[dict], runs: Sequence[dict]) -> list[dict]:
    """The lecture in its order, each row with its claims or with why it has none.

    Raises:
      ValueError: a claim whose id begins with no row of the lecture would be lost.
    """
    ids = [said.id for said in LECTURE]
    lost = [claim["id"] for claim in claims if claim["id"][:3] not in ids]
    if lost:
        raise ValueError(f"claim {lost[0]!r} begins with no row of the lecture")
    return [{"id": said.id, "section": said.section, "says": said.says, "status": _status(said, runs),
             "claims": [claim for claim in claims if claim["id"][:3] == said.id]} for said in LECTURE]


def _status(said: Said, runs: Sequence[dict]) -> str:
    """Why a row has no claims."""
    outcomes = [run["outcome"] for run in runs if run["experiment"] in said.experiments]
    if any(outcome != "finished" for outcome in outcomes):
        return "its experiment failed"
    if any((PACKAGE / f"{name}.py").exists() for name in said.experiments):
        return "no claim of its own yet" if outcomes else "not run yet"
    return "not yet executable"


def _short_name(command: Sequence[str]) -> str:
    presets = [Path(flag).stem for flag in command[1:] if flag.startswith("--flagfile=")]
    return "-".join((command[0], *presets))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see --help", file=sys.stderr)
        sys.exit(2)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m experiments.course", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/course", help="folder of the course (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

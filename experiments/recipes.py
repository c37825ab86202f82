"""The table of recipes in README.md, made from experiments/results/*.json.

    python -m experiments.recipes                                  rewrites the table
    python -m experiments.recipes --check                          exits with 1 where it differs
    python -m experiments.recipes --keep=RUNFOLDER --name=NAME     condenses a finished run into results/NAME.json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dlcourse.contracts import InputError
from dlcourse.reporting import files, run
from dlcourse.reporting.terminal import duration

PACKAGE = Path(__file__).resolve().parent
README = PACKAGE.parent / "README.md"
RESULTS = PACKAGE / "results"
BEGIN, END = "<!-- recipes -->", "<!-- /recipes -->"
HEADER = ("recipe", "command", "data", "hardware", "time", "seed", "test accuracy (95 % interval, N)", "claims", "date")


def main(argv: Sequence[str]) -> int:
    """Does what the command line says; returns the exit status."""
    given = _parse(argv)
    try:
        if given.keep:
            keep(Path(given.keep), given.name, RESULTS)
            return 0
        return update(README, RESULTS, check=given.check)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def update(readme: Path, results: Path, *, check: bool = False) -> int:
    """Rewrites the table in `readme`, or with `check` only compares; returns 1 where it then differs, else 0.

    Raises:
      InputError: `readme` is missing or has no place for the table.
    """
    try:
        text = readme.read_text()
    except FileNotFoundError:
        raise InputError(f"{readme.name} is missing; write it, with {BEGIN} and {END} for the table") from None
    found = re.search(re.escape(BEGIN) + "\n.*?" + re.escape(END), text, re.S)
    if not found:
        raise InputError(f"{readme.name} has no {BEGIN} … {END}; add both lines where the table belongs")
    wanted = text[: found.start()] + f"{BEGIN}\n{table(results)}{END}" + text[found.end() :]
    if wanted == text:
        return 0
    if check:
        print(f"the recipes in {readme.name} differ from {results.name}/; run python -m experiments.recipes")
        return 1
    files.write_atomically(readme, wanted)
    return 0


def table(results: Path) -> str:
    """The recipes as a Markdown table, in the order of their names; nothing where there are none."""
    rows = [_row(path.stem, json.loads(path.read_text())) for path in sorted(results.glob("*.json"))]
    lines = [HEADER, ("---",) * len(HEADER), *rows] if rows else []
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _row(name: str, recipe: dict[str, Any]) -> tuple[str, ...]:
    claims, seed = recipe["claims"], "–" if recipe["seed"] is None else str(recipe["seed"])
    return (f"[{name}](experiments/results/{name}.json)", f"`{recipe['command']}`", recipe["data"], recipe["hardware"],
            duration(60 * recipe["minutes"]), seed, _score(recipe["score"]),
            f"{sum(claim['holds'] for claim in claims)} of {len(claims)} hold" if claims else "–", recipe["date"])


def _score(score: dict[str, Any] | None) -> str:
    if score is None:
        return "–"
    low, high = score["ci95"]
    return f"{100 * score['value']:.2f} % ({100 * low:.2f} to {100 * high:.2f}, {score['n']})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def keep(folder: Path, name: str, results: Path) -> None:
    """Condenses a finished run into RESULTS/NAME.json.

    Raises:
      InputError: no finished run there, or no usable name.
    """
    if not re.fullmatch(r"[a-z0-9_]+", name or ""):
        raise InputError(f"--name={name}: give the recipe a name of a-z, 0-9 and _")
    result = run.read_result(folder)
    if not result or result.get("status") != "finished":
        raise InputError(f"--keep={folder} is no finished run; name a folder that holds a result.json")
    results.mkdir(exist_ok=True)
    files.write_atomically(results / f"{name}.json", files.to_json(condense(result), indent=1) + "\n")


def condense(result: dict[str, Any]) -> dict[str, Any]:
    """What a recipe's reader needs of a result.json, without a path of the machine that it was made on."""
    environment, settings = result["environment"], _leaves(result["config"])
    return _without_folders({
        "schema": 1, "experiment": result["experiment"], "command": result["command"], "date": result["date"],
        "data": settings.get("dataset", "–"), "hardware": _hardware(environment),
        "minutes": round(result["seconds"]["total"] / 60, 2), "seed": settings.get("seed"),
        "score": _score_of(result["metrics"]), "metrics": result["metrics"], "claims": result["claims"],
        "config": result["config"], "environment": environment})


def _hardware(environment: dict[str, Any]) -> str:
    """The accelerators where there are any, else the processor."""
    devices = environment.get("devices", "")
    return environment.get("cpu", devices) if re.fullmatch(r"\d+ cpu", devices) else devices


def _score_of(metrics: dict[str, float]) -> dict[str, Any] | None:
    parts = [metrics.get(f"test/{name}") for name in ("accuracy", "accuracy_low", "accuracy_high", "n")]
    if None in parts:
        return None
    value, low, high, n = parts
    return {"metric": "test/accuracy", "value": value, "ci95": [low, high], "n": int(n)}


def _leaves(config: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat.update(_leaves(value) if isinstance(value, dict) else {name: value})
    return flat


def _without_folders(value: Any) -> Any:
    """Cuts absolute paths in every string to their last part: they mean nothing on another machine."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return re.sub(r"(?<![\w./])~?(?:/[^/\s'\",]+)+/(?=[^/\s'\",])", "", value) if isinstance(value, str) else value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see --help", file=sys.stderr)
        sys.exit(2)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m experiments.recipes", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where the table differs")
    parser.add_argument("--keep", metavar="RUNFOLDER", help="condense this finished run")
    parser.add_argument("--name", help="name of the recipe, with --keep")
    given = parser.parse_args(argv)
    if given.check and given.keep:
        parser.error("--check contradicts --keep; give one of them")
    if bool(given.name) != bool(given.keep):
        parser.error("--keep=RUNFOLDER and --name=NAME belong together")
    return given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What all launchers share: the words of their command lines, mistakes, and how a run ends.

    launch/NAME [machine flags] EXPERIMENT [experiment flags]

The standard library alone: this runs before anything is installed.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DONE, FAILED, MISTAKE, STOPPED = 0, 1, 2, 75
"""How an experiment ends. Never started again: DONE, MISTAKE. Without limit: STOPPED, by a signal after saving.
Any other status is a failure, started again at most --retries times."""

GET_GCLOUD = "install the Google Cloud CLI (see cloud.google.com/sdk/docs/install), then `gcloud init`"


class Mistake(Exception):
    """Said in one line, exit status 2."""


def start(main: Callable[[list[str]], int | None]) -> None:
    """Runs a launcher's `main` on the command line and exits with its status."""
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except Mistake as mistake:
        sys.exit(print(f"error: {mistake}", file=sys.stderr) or MISTAKE)
    except KeyboardInterrupt:
        sys.exit(130)


def split(words: list[str], usage: str) -> tuple[dict[str, str], list[str]]:
    """Machine flags (name -> value) and all words from the experiment's name on.

    Args:
      words: of the command line.
      usage: the launcher's help, where each flag begins a line: "  --name=VALUE  what it is" or "  --name  …".
    """
    valued = re.findall(r"^  --([\w-]+)=", usage, re.MULTILINE)
    plain = re.findall(r"^  --([\w-]+) ", usage, re.MULTILINE)
    machine: dict[str, str] = {}
    for place, word in enumerate(words):
        word = "--help" if word == "-h" else word
        if not word.startswith("-"):
            return machine, words[place:]
        name, equals, value = word.removeprefix("--").partition("=")
        if name not in (valued if equals else plain) or (equals and not value):
            hint = _hint(name, valued, plain)
            raise Mistake(f"{word} is no machine flag{hint} (an experiment's flags follow its name)")
        machine[name] = value
    return machine, []


def _hint(name: str, valued: list[str], plain: list[str]) -> str:
    near = difflib.get_close_matches(name.replace("_", "-"), [*valued, *plain], n=1)
    if not near:
        return ", see --help"
    return f"; did you mean --{near[0]}{'=VALUE' if near[0] in valued else ''}?"


def count(machine: dict[str, str], name: str, default: int, least: int = 1) -> int:
    """A flag that counts something."""
    text = machine.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise Mistake(f"--{name}={text}: give a whole number of at least {least}")
    return int(text)


def seconds(machine: dict[str, str], name: str, default: float) -> float:
    """A flag that is a time."""
    text = machine.get(name, str(default))
    if not re.fullmatch(r"\d*\.?\d+", text) or not float(text):
        raise Mistake(f"--{name}={text}: give a number of seconds above 0")
    return float(text)


def bucket(machine: dict[str, str], kinds: tuple[str, ...]) -> str:
    """Where the run is written, since it must outlive the machines: the address of a bucket."""
    text = need(machine, "bucket", f"name the bucket that the run is written to, such as --bucket={kinds[0]}://mine")
    if not re.fullmatch(rf"({'|'.join(kinds)})://[a-z0-9][a-z0-9._-]+", text):
        raise Mistake(f"--bucket={text}: give {' or '.join(f'{kind}://NAME' for kind in kinds)}")
    return text


def name_of(machine: dict[str, str], rest: list[str]) -> str:
    """The name of the machine or job, made from the command where none is given."""
    name = machine.get("name") or run_name(rest)
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?", name):
        raise Mistake(f"--name={name}: give up to 50 small letters, digits and hyphens, a letter first")
    return name


def need(machine: dict[str, str], name: str, why: str) -> str:
    if name not in machine:
        raise Mistake(f"--{name}=… is missing: {why}")
    return machine[name]


def tool(name: str, way: str) -> None:
    """Refuses to go on without the program `name`; `way` says how to get it."""
    if not shutil.which(name):
        raise Mistake(f"{name} is not on PATH; {way}")


def experiments() -> dict[str, str]:
    """Name and first line of every experiment in the checkout."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "experiments").glob("*.py"))}
    return {name: (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
            for name, source in sources.items() if re.search(r"^if __name__ ==", source, re.MULTILINE)}


def listing() -> str:
    found = experiments() | {"test": "the tests"}
    width = max(map(len, found))
    return "\n".join(["experiments (launch/local EXPERIMENT --help shows its flags):",
                      *(f"  {name:<{width}}  {line}" for name, line in found.items())])


def known(name: str) -> None:
    """Refuses what is neither an experiment nor `test`."""
    there = [*experiments(), "test"]
    if name not in there:
        near = difflib.get_close_matches(name, there, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(there)}"
        raise Mistake(f"unknown experiment {name}; {hint}")


def words_or_help(words: list[str], usage: str) -> tuple[dict[str, str], list[str]]:
    """`split`, after which there is a known experiment; the help is shown where it is asked for or nothing is."""
    machine, rest = split(words, usage)
    if "help" in machine or not rest:
        print((usage.strip() + "\n\n" if "help" in machine else "") + listing())
        sys.exit(DONE)
    known(rest[0])
    return machine, rest


def run_name(rest: list[str]) -> str:
    """A name for a command that is the same whenever the command is, and fits clouds: a-z, 0-9 and hyphens."""
    digest = hashlib.sha256(shlex.join(rest).encode()).hexdigest()[:8]
    return f"dlcourse-{re.sub('[^a-z0-9]+', '-', rest[0].lower())}-{digest}"


def in_folder(rest: list[str], name: str) -> tuple[list[str], str]:
    """The command with a --workdir that this side knows too, and that folder, which is below runs/."""
    if "--workdir" in rest:
        raise Mistake("--workdir: write it as one word, --workdir=runs/mine")
    given = [word.partition("=")[2] for word in rest if re.match("--?workdir=", word)]
    folder = given[-1] if given else f"runs/{name}"
    if not re.fullmatch(r"runs/[\w./=-]+", folder) or ".." in folder:
        raise Mistake(f"--workdir={folder}: on another machine give a folder below runs/, such as runs/mine")
    return (rest if given else [*rest, f"--workdir={folder}"]), folder


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

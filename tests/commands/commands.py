"""Commands as a user types them: a process of its own, its exit status and what it said."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMPILED = tempfile.mkdtemp(prefix="dlcourse-compiled-")
"""What one test compiled, the others need not compile again."""
atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)

TOY = '''"""A toy experiment: nothing is learned."""

import dataclasses
import os
import sys
import time
from pathlib import Path

from dlcourse.contracts import InputError
from experiments import command, settings


@dataclasses.dataclass(frozen=True)
class Toy:
    end: str = settings.setting("well", "how it ends")


@dataclasses.dataclass(frozen=True)
class Config:
    data: settings.Data = settings.Data(batch_size=32)
    model: settings.Model = settings.Model()
    optimizer: settings.Optimizer = settings.Optimizer()
    run: settings.Run = settings.Run()
    toy: Toy = Toy()


class Interrupted(Exception):
    pass


def main(config, run):
    print("config:", config)
    if config.toy.end == "refused":
        raise InputError("--end=refused: refused\\nin two lines")
    if config.toy.end == "stopped":
        raise Interrupted("saved")
    if config.toy.end == "broken":
        raise ZeroDivisionError("a defect")
    if config.toy.end == "full":
        (run.path / "metrics.jsonl").symlink_to("/dev/full")
        run.log(1, "train", {"loss": 1.0}, 0.0)
    if config.toy.end == "fills":
        with open(run.path / "checkpoint", "wb") as file:
            file.write(bytes(10**7))
    if config.toy.end == "waits":
        print("waiting", flush=True)
        time.sleep(60)
    run.finish({"test/accuracy": 0.5}, [], {"total": 1.0, "compile": 0.0, "train": 1.0}, {"python": "3"})


if __name__ == "__main__":
    import atexit
    atexit.register(lambda: print("jax imported:", "jax" in sys.modules))
    command.run(main, Config, name="toy")
'''


def surroundings(tmp_path: Path, **more: str) -> dict[str, str]:
    """A user's environment: nothing of this test session's, and a home of its own."""
    keep = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    return keep | {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
                   "JAX_COMPILATION_CACHE_DIR": COMPILED} | more


def run(words: list[str], cwd: Path, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(words, cwd=cwd, env=surroundings(cwd, **more), capture_output=True, text=True, timeout=600)


def toy(tmp_path: Path, *flags: str, **more: str) -> subprocess.CompletedProcess:
    script = tmp_path / "toy.py"
    script.write_text(TOY)
    return run([sys.executable, str(script), *flags], tmp_path, **more)


def experiment(tmp_path: Path, name: str, *flags: str, **more: str) -> subprocess.CompletedProcess:
    return run([sys.executable, "-m", f"experiments.{name}", *flags], tmp_path, **more)


def assert_mistake(said: subprocess.CompletedProcess, *words: str) -> None:
    """One line on standard error that holds all the words, no traceback, exit status 2."""
    assert said.returncode == 2, said.stderr
    lines = said.stderr.strip().split("\n")
    assert len(lines) == 1 and lines[0].startswith("error: "), said.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])

"""launch/local, from other folders and with other Pythons on PATH; nothing is installed here."""

import fcntl
import subprocess
import sys
from pathlib import Path

import checkout
import pytest
from commands import ROOT

SHELL = "/usr/bin:/bin"


def launch(cwd: Path, *words: str, path: str | None = None, **more: str) -> subprocess.CompletedProcess:
    own = str(Path(getattr(sys, "_base_executable", sys.executable)).parent)
    environment = {"PATH": path or f"{own}:{SHELL}", "DLCOURSE_VENV": str(cwd / "venv"), "JAX_PLATFORMS": "cpu"} | more
    words = [str(ROOT / "launch/local"), *words]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)


def stub(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture(scope="module")
def environment():
    return checkout.module("environment")


def test_it_lists_experiments_before_anything_is_installed(tmp_path):
    said = launch(tmp_path)
    assert said.returncode == 0 and "classification" in said.stdout and "test " in said.stdout
    assert "--dry-run" in launch(tmp_path, "--help").stdout
    assert not (tmp_path / "venv").exists()


def test_it_says_what_it_would_run(tmp_path):
    said = launch(tmp_path, "--dry-run", "classification", "--dataset=folder:a b", "--help").stdout.splitlines()
    assert said[0].endswith(f"-m venv {tmp_path}/venv")
    assert said[2].endswith(f"-e '{ROOT}[dev]' -c {ROOT}/constraints.txt")
    assert said[-1] == f"{tmp_path}/venv/bin/python -P -m experiments.classification '--dataset=folder:a b' --help"
    assert not any(line.startswith("cd ") for line in said), "an experiment runs where the user is"
    said = launch(tmp_path, "--dry-run", "--with=peers", "test", "-x").stdout.splitlines()
    assert said[-2] == f"cd {ROOT}" and "[dev,peers]" in said[2]
    assert said[-1].startswith(f"{tmp_path}/venv/bin/python -m pytest ") and said[-1].endswith(" -x")
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(("words", "said"), [
    (["clasification"], "did you mean classification?"), (["--wiht=peers", "test"], "--wiht=peers"),
    (["--with=torch", "test"], "choose from cuda"), (["--python=nowhere", "test"], "--python=nowhere")])
def test_a_mistake_is_one_line(words, said, tmp_path):
    done = launch(tmp_path, *words)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "venv").exists()


def test_the_newest_python_that_really_works_is_taken(tmp_path):
    tools = checkout.tools(tmp_path / "tools")
    stub(tmp_path / "shims", "python3.13", "echo 'not installed' >&2; exit 127")
    stub(tmp_path / "future", "python3", "echo usable 3.99")
    stub(tmp_path / "bare", "python3", "echo lacks 3.12 ensurepip")
    stub(tmp_path / "old", "python3.11", '[ "$2" = -c ] && echo usable 3.11 || echo ran 3.11 "$@"')
    stub(tmp_path / "new", "python3", '[ "$2" = -c ] && echo usable 3.12 || echo ran 3.12 "$@"')

    def path(*names):
        return ":".join([*(str(tmp_path / name) for name in names), str(tools)])

    assert "ran 3.12" in launch(tmp_path, "test", path=path("shims", "future", "old", "new", "bare")).stdout
    assert "ran 3.11" in launch(tmp_path, "test", path=path("shims", "old", "bare")).stdout
    lacking = launch(tmp_path, "test", path=path("shims", "bare"))
    assert lacking.returncode == 2 and "apt-get install python3.12-venv" in lacking.stderr
    none = launch(tmp_path, "test", path=path("shims", "future"))
    assert none.returncode == 2 and "Python 3.11 to 3.14" in none.stderr


def test_a_folder_that_it_did_not_make_is_left_alone(tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/thesis.tex").write_text("")
    said = launch(tmp_path, "test")
    assert said.returncode == 2 and "not made by launch/local" in said.stderr
    assert (tmp_path / "venv/thesis.tex").exists()
    (tmp_path / "file").write_text("")
    said = launch(tmp_path, "test", DLCOURSE_VENV=str(tmp_path / "file/venv"))
    assert said.returncode == 2 and "cannot write" in said.stderr and "--venv=PATH" in said.stderr


def test_an_environment_is_made_once_and_again_only_when_it_must(environment, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(environment, "check", lambda command: calls.append("venv"))
    monkeypatch.setattr(environment, "install", lambda venv, extras: calls.append(sorted(extras)))
    monkeypatch.setattr(environment, "accelerator_extras", lambda have: set())
    venv = tmp_path / "venv"

    def keep(*extras):
        calls.clear()
        environment.keep(venv, set(extras), None)
        return list(calls)

    assert keep("dev") == ["venv", ["dev"]]
    assert keep("dev") == []
    assert keep("dev", "peers") == [["dev", "peers"]], "more extras need no new environment"
    assert keep("dev") == []
    monkeypatch.setattr(environment, "stamp_of", lambda version: "other")
    assert keep("dev") == ["venv", ["dev"]]

    def interrupted(venv, extras):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(environment, "install", interrupted)
        keep("dev", "peers")
    assert keep("dev") == ["venv", ["dev"]], "an interrupted installation is begun again"


def test_a_second_call_waits_for_the_first(environment, tmp_path):
    with environment.locked(tmp_path / "venv"), open(tmp_path / "venv" / environment.LOCK) as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_uv_looks_where_pip_would(environment):
    flags, variables = environment.settings_for_uv({
        "index-url": "https://mirror/simple", "extra-index-url": "https://a\\nhttps://b", "find-links": "/wheels",
        "no-index": "true", "cert": "/ca.pem"})
    assert flags == ["--index-strategy=unsafe-best-match", "--index-url=https://mirror/simple",
                     "--extra-index-url=https://a", "--extra-index-url=https://b", "--find-links=/wheels", "--no-index"]
    assert variables.get("SSL_CERT_FILE", "/ca.pem") == "/ca.pem"
    assert environment.settings_for_uv({}) == ([], {})

"""launch/setup on machines with and without a Python that will do; apt-get is made up."""

import subprocess
from pathlib import Path

import pytest
from commands import ROOT


@pytest.fixture
def machine(tmp_path):
    """A checkout whose launch/local works once `python` is there; apt-get brings Python 3.12 and has no other."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/setup").write_bytes((ROOT / "launch/setup").read_bytes())
    (tmp_path / "launch/local").write_text(
        f'#!/bin/sh\necho local "$@" >>{tmp_path}/calls\n[ -e {tmp_path}/python ] || exit 2\n'
        f'case $* in *--dry-run*) ;; *) [ ! -e {tmp_path}/broken ] || exit 2 ;; esac\n')
    (tmp_path / "bin").mkdir()
    apt = f'#!/bin/sh\necho apt "$@" >>{tmp_path}/calls\n' \
        f'case "$*" in *3.12*) touch {tmp_path}/python ;; *3.*) exit 100 ;; esac\n'
    (tmp_path / "bin/apt-get").write_text(apt)
    (tmp_path / "bin/sudo").write_text('#!/bin/sh\nexec "$@"\n')
    for file in ("launch/setup", "launch/local", "bin/apt-get", "bin/sudo"):
        (tmp_path / file).chmod(0o755)
    return tmp_path


def setup(machine: Path, *words: str) -> tuple[int, list[str]]:
    (machine / "calls").unlink(missing_ok=True)
    done = subprocess.run([machine / "launch/setup", *words], env={"PATH": f"{machine}/bin:/usr/bin:/bin"})
    return done.returncode, (machine / "calls").read_text().splitlines()


def test_a_python_is_installed_where_none_will_do_and_only_there(machine):
    status, calls = setup(machine, "--with=tpu")
    packages = [call.split()[-2:] for call in calls if "install" in call]
    assert status == 0 and packages == [["python3.13", "python3.13-venv"], ["python3.12", "python3.12-venv"]]
    assert calls[-1] == "local --with=tpu test --version"
    status, calls = setup(machine)
    assert status == 0 and not any("apt" in call for call in calls)


def test_whatever_fails_may_be_tried_again(machine):
    (machine / "broken").touch()
    assert setup(machine)[0] == 1, "2 would say that trying again is of no use"

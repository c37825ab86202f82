"""The benchmark of attacks refuses what it cannot compare with."""

import pytest

from experiments import benchmark_attacks, command


@pytest.mark.parametrize(("flag", "said"), [
    ("--repeats=2", "--repeats=2"), ("--eps=0", "--eps=0"), ("--attacked=-1", "--attacked=-1"),
    ("--autoattack_folder=nowhere", "--autoattack_folder=nowhere")])
def test_what_cannot_be_compared_is_refused(flag, said, tmp_path, capsys):
    words = [flag, f"--workdir={tmp_path / 'run'}"]
    assert command.status(benchmark_attacks.main, benchmark_attacks.Config, "benchmark_attacks", words) == 2
    assert said in capsys.readouterr().err

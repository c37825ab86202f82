"""launch/slurm without a cluster: its job script, and what it refuses before anything is submitted."""

from pathlib import Path

import checkout
import pytest
from checkout import launch
from commands import assert_mistake

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    return checkout.make(tmp_path_factory.mktemp("user"))


def test_the_script_is_the_one_kept(user, tmp_path):
    (tmp_path / "sweep").write_text("--seed=0  # the first\n\n--seed=1 '--model=mlp,width=3'\n")
    words = ["--gpus=2", "--nodes=3", "--time=1:00:00", "--partition=fast", "--sbatch=--mem=4G --exclusive",
             "--sweep=sweep", "--retries=1", "classification", "--dataset=folder:a b"]
    said = launch("slurm", "--dry-run", *words, cwd=tmp_path, env=user)
    root = str(Path(user["LAUNCH"]).parent)
    assert said.stdout.replace(root, "CHECKOUT") == (GOLDEN / "slurm.txt").read_text()
    assert list(tmp_path.iterdir()) == [tmp_path / "sweep"], "nothing is written"


@pytest.mark.parametrize(("words", "says"), [
    (["--gpus=2", "--processes=4", "stub"], ["--processes=4", "--gpus=2"]),
    (["--nodes=0", "stub"], ["--nodes=0", "at least 1"]),
    (["--node=2", "stub"], ["--node=2", "did you mean --nodes"]),
    (["--sweep=nowhere", "stub"], ["--sweep=nowhere", "No such file"]),
    (["--sweep=empty", "stub"], ["--sweep=empty", "empty"]),
    (["--sweep=words", "stub"], ["--sweep=words", "seed=1"]),
    (["--sweep=quotes", "stub"], ["--sweep=quotes", "quotation"]),
    (["--sweep=good", "stub", "--workdir=runs/x"], ["--sweep=good", "--workdir"]),
    (["--sbatch=--mem='4G", "stub"], ["--sbatch=--mem='4G", "quotation"]),
    (["--with=cdua", "stub"], ["--with=cdua", "cuda"]),
    (["stubb"], ["stubb", "did you mean stub"]),
    (["stub"], ["sbatch is not on PATH", "login node", "launch/local"])])
def test_a_mistake_is_one_line(words, says, user, tmp_path):
    for name, text in {"empty": "# nothing\n", "words": "seed=1\n", "good": "--seed=1\n", "quotes": "--a='b\n"}.items():
        (tmp_path / name).write_text(text)
    tools = checkout.tools(tmp_path / "tools")
    assert_mistake(launch("slurm", *words, cwd=tmp_path, env=user | {"PATH": str(tools)}), *says)
    assert not (tmp_path / "runs").exists()


def test_help_explains_every_flag(user, tmp_path):
    for name in ("local", "slurm", "tpu_vm", "sky", "gke"):
        said = launch(name, "--help", cwd=tmp_path, env=user)
        assert said.returncode == 0 and f"usage: launch/{name}" in said.stdout and "--dry-run" in said.stdout
        bare = launch(name, cwd=tmp_path, env=user)
        assert bare.returncode == 0 and "classification" in bare.stdout and "usage" not in bare.stdout

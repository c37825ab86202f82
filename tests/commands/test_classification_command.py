"""Mistakes in a command that really trains: said before anything is trained, nothing left behind."""

import pytest
from commands import assert_mistake, experiment

EARLY = {
    "--epochs=3": ("unknown flag --epochs",),
    "--dtype=float16": ("--dtype=float16", "float32, bfloat16"),
    "--validation_fraction=0.9": ("--validation_fraction=0.9", "(0, 0.5]"),
    "--require_accelerator": ("CPU",),
}
LATE = {
    "--model=resnet19": ("resnet19", "resnet18"),
    "--model=convnet,wdith=3": ("wdith", "width"),
    "--dataset=minst": ("minst", "digits"),
    "--dataset=folder:nowhere": ("nowhere",),
    "--dataset=npz:nowhere.npz": ("nowhere.npz",),
    "--augment=flop": ("flop", "flip"),
    "--init_from=nowhere": ("nowhere",),
}


@pytest.mark.parametrize("flag", EARLY)
def test_a_mistake_in_a_flag(flag, tmp_path):
    assert_mistake(experiment(tmp_path, "classification", flag), *EARLY[flag])
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("flag", LATE)
def test_a_mistake_that_needs_data_or_model_to_be_seen(flag, tmp_path):
    assert_mistake(experiment(tmp_path, "classification", flag), *LATE[flag])
    assert not (tmp_path / "runs").exists()


def test_help(tmp_path):
    said = experiment(tmp_path, "classification", "--help")
    assert said.returncode == 0 and not said.stderr
    assert said.stdout.startswith("Image classification") and "--train_for=" in said.stdout

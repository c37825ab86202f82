"""Flags of every experiment, tried on a toy one."""

import dataclasses
import re
import time
import typing

import pytest
from commands import ROOT, assert_mistake, toy

from dlcourse.contracts import InputError
from experiments import checks, command, parsing, settings

MISTAKES = {
    "--batchsize=3": ("unknown flag --batchsize", "did you mean --batch_size?"),
    "--Learning-Rate=1": ("did you mean --learning_rate?",),
    "--qqqqqq": ("--help lists all flags",),
    "--batch_size=many": ("--batch_size=many", "whole number"),
    "--batch_size=0": ("--batch_size=0", "at least 1"),
    "--learning_rate=nan": ("--learning_rate=nan", "finite"),
    "--overwrite=perhaps": ("--overwrite=perhaps", "true or false"),
    "--optimizer=adam": ("--optimizer=adam", "adamw, lamb"),
    "--train_for=10": ("--train_for=10:", "10epochs"),
    "--train_for=1.5steps": ("--train_for=1.5steps", "whole"),
    "--train_for=0epochs": ("--train_for=0epochs", "longer than nothing"),
    "digits": ("unexpected argument 'digits'", "--flag=value"),
    "--flagfile=none.flags": ("--flagfile=none.flags", "No such file"),
    "--flagfile=experiments/presets/none.flags": ("No such file",),
    "--momentum=0.9": ("--momentum=0.9", "--optimizer=adamw", "sgd"),
    "--warmup=5steps": ("--warmup=5steps", "--schedule=one_cycle", "cosine"),
    "--accumulate=5": ("--accumulate=5", "--batch_size=32"),
    "--train_for=5minutes": ("--train_for=5minutes", "--schedule=one_cycle", "--schedule=constant"),
    "--require_accelerator": ("--require_accelerator", "CPU"),
}


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(flag, tmp_path):
    assert_mistake(toy(tmp_path, flag), *MISTAKES[flag])
    assert not (tmp_path / "runs").exists()


def test_help_explains_every_flag_at_once(tmp_path):
    began = time.monotonic()
    said = toy(tmp_path, "--help")
    assert time.monotonic() - began < 3
    assert said.returncode == 0 and "jax imported: False" in said.stdout
    concerns = (settings.Data, settings.Model, settings.Optimizer, settings.Run)
    for field in (field for concern in concerns for field in dataclasses.fields(concern)):
        start = said.stdout.index(f"--{field.name}=")
        assert field.metadata["help"].split()[0] in said.stdout[start:start + 200]
    flags = re.findall(r"^  --(\w+)", said.stdout, re.MULTILINE)
    named = {field.name for concern in concerns for field in dataclasses.fields(concern)}
    assert set(flags) == {"end", "flagfile", "doctor", "help"} | named
    assert "[32]" in said.stdout, "the experiment's own default is shown"
    headings = re.findall(r"^(\w+)[ \w]*:$", said.stdout, re.MULTILINE)
    assert headings == ["data", "model", "optimizer", "run", "toy", "any"]


def test_typed_flags_beat_flagfiles_and_presets_are_found_from_anywhere(tmp_path):
    (tmp_path / "a.flags").write_text("# a comment\n\n--seed=1\n--batch_size=8\n--nooverwrite\n")
    said = toy(tmp_path, "--seed=2", "--flagfile=a.flags")
    assert "seed=2" in said.stdout and "batch_size=8" in said.stdout
    for preset in (ROOT / "experiments" / "presets").glob("*.flags"):
        assert parsing.expand_flagfiles([f"--flagfile=experiments/presets/{preset.name}"])


def test_flags_txt_repeats_the_run(tmp_path):
    first = toy(tmp_path, "--workdir=a", "--seed=7", "--notensorboard", "--clip=0.5", "--model=convnet,width=8")
    again = toy(tmp_path, "--workdir=b", "--flagfile=a/flags.txt")
    assert again.returncode == 0
    assert first.stdout.replace("a/", "b/").replace("'a'", "'b'") == again.stdout
    assert (tmp_path / "a/config.json").read_bytes() == (tmp_path / "b/config.json").read_bytes()


@pytest.mark.parametrize(("kind", "text", "value"), [
    (int, "-3", -3), (float, "1e-3", 1e-3), (bool, "false", False), (bool, "1", True), (str, "a b,c=d", "a b,c=d"),
    (typing.Literal["x", "y"], "y", "y")])
def test_every_kind_of_setting_keeps_its_type(kind, text, value):
    default = {int: 1, float: 2.0, bool: True, str: "z"}.get(kind, "x")
    config = dataclasses.make_dataclass("Config", [("it", kind, settings.setting(default, "it"))], frozen=True)
    parsed, given = parsing.parse(config(), [f"--it={text}"])
    assert (parsed.it, type(parsed.it), given) == (value, type(value), {"it": value})
    assert parsing.parse(config(), []) == (config(), {})
    assert parsing.parse(config(), parsing.as_flags(given)) == (parsed, given)


def test_the_folder_tells_apart_what_changes_the_result_and_nothing_else():
    config = dataclasses.make_dataclass(
        "Config", [("data", settings.Data, settings.Data()), ("model", settings.Model, settings.Model()),
                   ("run", settings.Run, settings.Run())], frozen=True)

    def folder(*words):
        return str(command.default_workdir("toy", parsing.parse(config(), list(words))[0]))

    assert folder() == folder("--workdir=x") == folder("--overwrite") == folder("--notensorboard")
    assert len({folder(), folder("--seed=1"), folder("--dataset=faces"), folder("--model=mlp,width=3")}) == 4
    odd = folder("--dataset=folder:../a b/$c", "--model=mlp,width=3")
    assert re.fullmatch(r"runs/toy/folder-a-b-c-mlp-width-3-[0-9a-f]{8}", odd)


def test_only_given_settings_can_contradict():
    values = command.by_name(settings.Optimizer()) | {"batch_size": 32}
    checks.check(values, {})
    with pytest.raises(InputError, match="momentum"):
        checks.check(values, {"momentum": 0.9})
    checks.check(values | {"optimizer": "sgd"}, {"momentum": 0.9})

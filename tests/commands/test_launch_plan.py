"""launch/plan from words to result.json: what the TPU compiler says, against what is known without it."""

import json
import sys

import pytest
from commands import run

from dlcourse import models
from dlcourse.contracts import InputError
from dlcourse.models import size
from dlcourse.planning import libtpu

NETWORK, SHAPE, CLASSES = "convnet,width=16", (32, 32, 3), 10
STEP = ["--classes=10", "--examples=50000", "classification", "--dataset=tfds:cifar10", "--image_size=32",
        f"--model={NETWORK}", "--dtype=bfloat16", "--augment=", "--batch_size=1024"]


@pytest.fixture(scope="module")
def compiler():
    """The variable that names the folder of libtpu, brought there where it is missing."""
    try:
        return {"DLCOURSE_LIBTPU": str(libtpu.find().parents[1])}
    except InputError as error:
        pytest.skip(f"no TPU compiler: {error}")


def planned(tmp_path, *flags, **variables):
    """(result.json, what was said) of a plan for STEP."""
    words = [sys.executable, "-m", "experiments.plan", f"--workdir={tmp_path / 'run'}", *flags]
    said = run(words, tmp_path, **variables)
    assert said.returncode == 0, said.stderr
    return json.loads((tmp_path / "run" / "result.json").read_text())["metrics"], said.stdout


def parameters_and_flops(per_chip):
    model = models.create(NETWORK, CLASSES, SHAPE, "bfloat16")
    return (size.parameters(size.abstract_variables(model, SHAPE)), 3 * per_chip * size.flops(model, SHAPE))


@pytest.fixture(scope="module")
def plan(tmp_path_factory, compiler):
    flags = ["--topology=v5e:2x2,v5e:16x16", "--per_chip_batch=256", "--hours=1", "--price=1.2", *STEP]
    return planned(tmp_path_factory.mktemp("plan"), *flags, **compiler)


@pytest.mark.slow
def test_a_step_is_compiled_for_tpus_that_are_not_here(plan):
    found, said = plan
    parameters, flops = parameters_and_flops(256)
    for name in ("v5e:2x2/256", "v5e:16x16/256"):
        assert found[f"{name}/fits"] == 1 and 0 < found[f"{name}/share_of_peak"] < 1
        # Gradients of kernels are summed as they were computed; the batch's statistics are little beside them.
        assert 1 <= found[f"{name}/collective_bytes"] / (2 * parameters) < 1.1
        # The images need no gradient; the compiler also counts the optimizer, normalisation and augmentation.
        assert 0.7 < found[f"{name}/compiled_flops"] / flops < 1.2
    assert found["v5e:2x2/256/step_ms"] == pytest.approx(found["v5e:16x16/256/step_ms"], rel=0.03)
    assert "chips within hours" in said and "Left out:" in said


@pytest.mark.slow
def test_parameters_in_parts_are_gathered(tmp_path, plan, compiler):
    whole, _ = plan
    parts, said = planned(tmp_path, "--topology=v5e:2x2", "--per_chip_batch=256", *STEP, "--fsdp=4", **compiler)
    assert "all-gather" in said
    assert parts["v5e:2x2/256/collective_bytes"] > whole["v5e:2x2/256/collective_bytes"]


@pytest.mark.slow
def test_what_does_not_fit_is_said(tmp_path, compiler):
    found, said = planned(tmp_path, "--topology=v5e:2x2", "--per_chip_batch=262144", *STEP, **compiler)
    assert found == {"v5e:2x2/262144/fits": 0.0} and "does not fit" in said


@pytest.mark.slow
def test_gpus_have_a_bound_from_the_data_sheet(tmp_path):
    found, said = planned(tmp_path, "--topology=h100:8", "--per_chip_batch=128", *STEP)
    flops = parameters_and_flops(128)[1]
    assert found["h100:8/128/step_ms"] >= 1e3 * 0.8 * flops / 989e12
    assert "nothing was compiled" in said and "at best (data sheet)" in said

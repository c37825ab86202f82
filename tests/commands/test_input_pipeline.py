"""The input pipeline is measured as it says, at a size where that takes seconds."""

import json

import pytest

from experiments import command, input_pipeline


@pytest.mark.slow
def test_the_input_pipeline_is_held_against_its_decoder(tmp_path):
    flags = [f"--workdir={tmp_path / 'run'}", "--repeats=10", "--images=12", "--batch_size=4", "--image_size=32"]
    assert command.status(input_pipeline.main, input_pipeline.Config, "input_pipeline", flags) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    metrics = result["metrics"]
    for name in ("jpeg_folder", "array_record", "limit"):
        assert metrics[f"input/{name}_images_per_second_per_core"] > 0
    assert 90 < metrics["input/kilobytes_an_image"] < 130
    assert metrics["overlap/ahead_waiting_share"] < metrics["overlap/not_ahead_waiting_share"] < 1
    assert [claim["id"] for claim in result["claims"]] == ["L15.jpeg_folder", "L15.array_record", "L15.overlap"]


def test_a_rate_is_held_against_that_of_the_same_round():
    times = {"limit": [0.9, 1.8, 2.7] * 5, "jpeg_folder": [1.0, 2.0, 3.0] * 5}
    claim = input_pipeline.limit_claim("jpeg_folder", times)
    assert claim.holds and claim.evidence.value == pytest.approx(0.9) and claim.evidence.n == 15
    times["jpeg_folder"] = [1.01 * seconds for seconds in times["jpeg_folder"]]
    assert not input_pipeline.limit_claim("jpeg_folder", times).holds
    waits = {"ahead": [0.01] * 10, "not_ahead": [0.4] * 10}
    assert input_pipeline.overlap_claim(waits).holds
    assert not input_pipeline.overlap_claim({**waits, "ahead": [0.01] * 5 + [0.03] * 5}).holds


@pytest.mark.parametrize("flag", ["--repeats=3", "--images=2", "--image_size=4", "--batch_size=0"])
def test_what_cannot_be_measured_is_refused(flag, tmp_path, capsys):
    flags = [flag, f"--workdir={tmp_path / 'run'}"]
    assert command.status(input_pipeline.main, input_pipeline.Config, "input_pipeline", flags) == 2
    assert flag in capsys.readouterr().err

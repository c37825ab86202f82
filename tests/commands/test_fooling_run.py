"""The fooling command from its flags to its report, on a small network."""

import json

import numpy as np
import pytest
from commands import assert_mistake, experiment

from dlcourse.adversarial import ood
from experiments import command, fooling, fooling_evidence, parsing
from experiments.fooling import Config

SMALL = ["--model=mlp,width=32", "--train_for=8epochs", "--notensorboard", "--generations=300", "--population=100",
         "--searches=1", "--controls=100"]


def run(*flags):
    return command.status(fooling.main, Config, "fooling", list(flags))


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_a_run_and_one_that_begins_with_its_network(tmp_path):
    assert run(f"--workdir={tmp_path / 'one'}", "--rounds=2", *SMALL) == 0
    got = result(tmp_path / "one")
    claims = {claim["id"]: claim for claim in got["claims"]}
    assert set(claims) == {f"L19.{name}" for name in ("cppn", "direct", "gradient", "transfer", "retrained", "caught")}
    assert claims["L19.gradient"]["holds"] and claims["L19.direct"]["holds"]
    timed = [got["metrics"][f"{method}/seconds"] for method in fooling_evidence.SAYS]
    np.testing.assert_allclose(got["metrics"]["seconds/three_methods"], sum(timed))
    assert min(timed) > 0 and sum(timed) < got["seconds"]["total"]
    for claim in claims.values():
        low, high = claim["evidence"]["ci95"]
        assert low <= claim["evidence"]["value"] - claim["evidence"]["control"] <= high
    # The retrained network knows the images that it was shown.
    assert claims["L19.retrained"]["evidence"]["control"] < 0.5 and got["metrics"]["round1/accuracy"] > 0.85
    assert got["metrics"]["round2/accuracy"] > 0.85 and got["metrics"]["all/transfer_to_mlp"] > 0.1
    assert {figure["file"] for figure in got["figures"]} == {"figures/sure.svg", "figures/gallery.svg"}
    assert len(got["tables"]) == 2 and "Mahalanobis" in (tmp_path / "one" / "report.html").read_text()
    again = ["--rounds=0", f"--init_from={tmp_path / 'one'}", f"--workdir={tmp_path / 'two'}"]
    assert run(*again, *SMALL) == 0
    second = result(tmp_path / "two")
    assert second["metrics"]["test/accuracy"] == got["metrics"]["test/accuracy"]
    assert second["metrics"]["gradient/lowest_confidence"] == got["metrics"]["gradient/lowest_confidence"]
    assert "L19.retrained" not in {claim["id"] for claim in second["claims"]}
    assert "seconds/retrained" in got["metrics"] and "seconds/retrained" not in second["metrics"]


def test_the_preset_is_one_of_this_command():
    config, _ = parsing.parse(Config(), ["--flagfile=experiments/presets/fooling_fashion_mnist.flags"])
    assert config.data.dataset == "fashion_mnist" and config.fooling.rounds == 0


@pytest.mark.parametrize("flag", ["--generations=0", "--rounds=-1", "--mirror", "--train_for=5minutes",
                                  "--train_for=1minute", "--train_for=0epochs"])
def test_a_mistake_in_a_flag(flag, tmp_path):
    assert_mistake(experiment(tmp_path, "fooling", flag), flag)
    assert not (tmp_path / "runs").exists()


def test_the_interval_of_two_shares_is_newcombes():
    # Newcombe 1998, table II: 56/70 against 48/80, and 9/10 against 3/10, method 10.
    np.testing.assert_allclose(fooling_evidence._difference((56, 70), (48, 80))[2], (0.0524, 0.3339), atol=5e-5)
    np.testing.assert_allclose(fooling_evidence._difference((9, 10), (3, 10))[2], (0.1705, 0.8090), atol=5e-5)


def test_a_bootstrap_of_one_score_against_itself_has_no_width():
    rng = np.random.default_rng(0)
    one, other = (rng.normal(1, 1, 60), rng.normal(0, 1, 40)), (rng.normal(0, 1, 60), rng.normal(0, 1, 40))
    assert fooling_evidence._resampled(one, one, 0, 50) == (0.0, 0.0)
    low, high = fooling_evidence._resampled(one, other, 0, 200)
    assert low < ood.auroc(*one) - ood.auroc(*other) < high and low > 0

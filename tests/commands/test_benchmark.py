"""The benchmark measures what it says, at a size where that takes seconds."""

import json

import numpy as np
import pytest

from experiments import benchmark, command


@pytest.mark.slow
def test_the_benchmark_reports_ratios_and_recompiles_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "start_up", lambda repeats: {})  # many processes of their own: measured, not tested
    flags = [f"--workdir={tmp_path / 'run'}", "--repeats=10", "--batch_size=8", "--width=4", "--image_size=8"]
    assert command.status(benchmark.main, benchmark.Config, "benchmark", flags) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    metrics = result["metrics"]
    assert metrics["compile/first_step"] > 0 and metrics["compile/later_steps"] == 0
    assert metrics["ours/step_ms"] > 0
    ids = {claim["id"] for claim in result["claims"]}
    assert "L16.batch" in ids and ("L17.torch" in ids) == bool(benchmark.peers())
    for peer in benchmark.peers():
        assert {f"{peer}/{part}_ratio" for part in ("forward", "backward", "step")} <= metrics.keys()


def test_the_interval_of_a_median_covers_it():
    rng = np.random.default_rng(0)
    covered = [low <= 1.0 <= high for low, high in
               (benchmark.ratio_interval(rng.lognormal(0.0, 0.5, 15)) for _ in range(1000))]
    assert 0.94 <= np.mean(covered) <= 0.99


def test_tasks_take_turns():
    order = []

    def task(name):
        return lambda: order.append(name) or {name: 1.0}

    times = benchmark.interleave(3, {"a": task("a"), "b": task("b")})
    assert order == ["a", "b"] * 5 and times == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_a_median_of_few_is_refused(tmp_path, capsys):
    assert command.status(benchmark.main, benchmark.Config, "benchmark", ["--repeats=3"]) == 2
    assert "--repeats=3" in capsys.readouterr().err

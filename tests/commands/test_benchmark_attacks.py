"""Attacks are compared on one network: the copy in PyTorch is ours, and what is missing or wrong is said."""

import json

import jax
import numpy as np
import pytest

from dlcourse import models
from dlcourse.training.evaluation import predictor
from experiments import benchmark_attacks, benchmark_peers, command

SPECS = ["convnet,width=3,stages=2,depth=1,halve=stride,hidden=7", "convnet,width=3,stages=3,depth=2",
         "convnet,width=2,stages=3,depth=1,hidden=5", "plain,width=3", "plain,size=medium,width=2"]


def status(*flags):
    return command.status(benchmark_attacks.main, benchmark_attacks.Config, "benchmark_attacks", list(flags))


@pytest.mark.parametrize("spec", SPECS)
def test_the_copy_in_pytorch_says_the_same(spec):
    torch = pytest.importorskip("torch", reason="torch is not installed (launch/local --with=peers test)")
    model = models.create(spec, 10, (12, 12, 1))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.2, 1.0, leaf.shape).astype(np.float32) * rng.choice([-1, 1]),
                             model.init(jax.random.key(0), np.zeros((1, 12, 12, 1), np.float32)))
    variables = {name: jax.tree.map(abs, tree) if name == "batch_stats" else tree for name, tree in variables.items()}
    images = rng.random((5, 12, 12, 1), np.float32)
    ours = np.asarray(predictor(model, variables)(images))
    theirs = benchmark_peers.torch_copy(model, variables)(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    assert np.ptp(ours) > 0
    np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-4, atol=1e-4 * np.abs(ours).max())


def test_training_is_the_same_every_time():
    from dlcourse import data

    dataset = data.load("fake:8x8x1,4")
    runs = [benchmark_attacks.trained("convnet,width=2,stages=1,depth=1", dataset, 3, 0.1)[1] for _ in range(2)]
    for one, other in zip(*(jax.tree.leaves(variables) for variables in runs), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_clock_reads_the_authors_log():
    clock = benchmark_peers.Clock()
    for line in ("setting parameters for standard version", "initial accuracy: 84.60%",
                 "apgd-ce - 1/4 - 50 out of 250 successfully perturbed",
                 "robust accuracy after APGD-CE: 70.40% (total time 2.7 s)", "robust accuracy: 70.40%"):
        clock.log(line)
    assert clock.accuracies == pytest.approx({"clean": 0.846, "apgd-ce": 0.704})
    assert list(clock.seconds) == ["clean", "apgd-ce"] and min(clock.seconds.values()) >= 0


def test_stages_are_compared_one_by_one():
    run = ({"clean": 1.0, "apgd-ce": 2.0, "apgd-t": 3.0, "fab-t": 4.0, "square": 5.0}, {})
    theirs = ({"clean": 0.0, "apgd-ce": 4.0, "apgd-t": 3.0, "fab-t": 8.0}, {})
    found = benchmark_attacks.against_authors(
        {"ours": [run], "authors": [theirs]},
        {"ours/autoattack": [15.0], "authors/autoattack": [30.0], "compiling/autoattack": [45.0]})
    assert found == {"authors/autoattack_ratio": 0.5, "authors/autoattack_with_compiling_ratio": 1.5,
                     "authors/autoattack_seconds": 30.0, "authors/apgd-ce_ratio": 0.5, "authors/apgd-t_ratio": 1.0,
                     "authors/fab-t_ratio": 0.5}


def test_a_claim_holds_where_the_interval_is_beyond_it():
    assert benchmark_attacks.faster("autoattack", [2.2], [1.0], "authors").holds
    assert not benchmark_attacks.faster("autoattack", [2.2, 1.9], [1.0, 1.0], "authors").holds
    assert benchmark_attacks.faster("pgd_500", [3.1] * 20, [1.0] * 20, "foolbox").holds
    assert not benchmark_attacks.faster("pgd_500", [3.1, 2.9] * 10, [1.0] * 20, "foolbox_compiled").holds


@pytest.mark.parametrize(("flag", "words"), [
    ("--repeats=3", "--repeats=3"), ("--rounds=0", "--rounds=0"), ("--eps=0", "--eps=0"),
    ("--autoattack_folder=nowhere", "--autoattack_folder=nowhere: no checkout of the authors' AutoAttack")])
def test_what_cannot_be_measured_is_refused_in_one_line(flag, words, tmp_path, capsys):
    assert status(flag, f"--workdir={tmp_path / 'run'}") == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_without_the_authors_folder_ours_alone_is_timed(tmp_path):
    small = "convnet,width=2,stages=1,depth=1"
    assert status("--dataset=fake:8x8x1,4", f"--model={small}", "--training_steps=2",
                  "--repeats=0", "--attacked=6", f"--workdir={tmp_path / 'run'}") == 0
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert metrics["ours/autoattack_seconds"] > 0 and "authors/autoattack_ratio" not in metrics
    accuracies = [metrics[f"ours/{stage}_accuracy"] for stage in ("clean", *benchmark_attacks.STAGES)]
    assert accuracies == sorted(accuracies, reverse=True)

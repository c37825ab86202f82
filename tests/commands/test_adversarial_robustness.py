"""A network is trained, attacked, certified and audited in one command."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from commands import ROOT

from dlcourse.adversarial.autoattack import STANDARD
from dlcourse.contracts import InputError
from experiments import (
    adversarial_certificates,
    adversarial_evidence,
    adversarial_robustness,
    adversarial_suite,
    classification,
    command,
    fooling,
    parsing,
    train,
)
from experiments.adversarial_robustness import Config, Robustness

SMALL = ["--model=mlp,width=32", "--train_for=3epochs", "--attacked=20", "--steps=5", "--notensorboard"]


def status(tmp_path, *flags):
    words = [*flags, f"--workdir={tmp_path / 'run'}"]
    return command.status(adversarial_robustness.main, adversarial_robustness.Config, "adversarial_robustness", words)


@pytest.mark.slow
def test_a_run_leaves_curves_strips_an_audit_and_claims(tmp_path):
    assert status(tmp_path, *SMALL, "--eps=0.2") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    metrics, audit = result["metrics"], json.loads((tmp_path / "run" / "audit.json").read_text())
    assert metrics["worst/accuracy"] <= min(metrics[f"{name}/accuracy"] for name in ("fgsm", "pgd", "apgd", "square"))
    assert metrics["certified/accuracy"] <= metrics["worst/accuracy"] < metrics["noise/accuracy"]
    assert ("certified (all)/accuracy" in metrics) == (metrics["certified/accuracy"] > 0)
    curve = [metrics[f"pgd/accuracy_at_{factor:g}_eps"] for factor in (0.125, 0.5, 1, 4)]
    assert curve == sorted(curve, reverse=True) and curve[-1] < curve[0]
    assert audit["attacks"]["pgd"]["norm_max"] <= 0.2 + 1e-6
    assert "success_misreported" not in audit["flagged"] and "certificate_broken" not in audit["flagged"]
    assert [claim["id"] for claim in result["claims"]] == ["L20.fooled", "L20.surer", "L20.unseen"]
    assert result["claims"][2]["evidence"]["value"] <= 51 + 1e-4  # most are fooled within eps, whatever FMN finds
    assert metrics["certified by IBP/accuracy"] <= metrics["certified/accuracy"]
    assert metrics["fmn/accuracy_at_1_eps"] == metrics["fmn/accuracy"]
    assert {figure["file"].rsplit("/")[-1].split(".")[0] for figure in result["figures"]} == {
        "accuracy_by_size", "strips", "panda"}


def test_networks_are_drawn_beside_finished_runs_of_the_same_threat_alone(tmp_path):
    there = tmp_path / "earlier"
    there.mkdir()
    config = dataclasses.asdict(Config())
    record = {"experiment": "adversarial_robustness", "config": config,
              "metrics": {"test/accuracy": 0.9, "worst/accuracy": 0.5}}
    (there / "result.json").write_text(json.dumps(record))
    beside = Config(robustness=Robustness(beside=str(there)))
    others, drawn = adversarial_evidence.finished(beside), {}
    run = types.SimpleNamespace(figure=lambda name, **drawing: drawn.setdefault(name, drawing))
    adversarial_evidence.trade_off(beside, run, others, {"test/accuracy": 0.8, "worst/accuracy": 0.7}, 100)
    assert "earlier 90" in drawn["trade_off"]["alt"] and "this one 80" in drawn["trade_off"]["alt"]
    with pytest.raises(InputError, match="its eps is"):
        adversarial_evidence.finished(Config(robustness=Robustness(beside=str(there), eps=0.2)))
    with pytest.raises(InputError, match="its attacked is 200, here it is 100"):
        adversarial_evidence.finished(Config(robustness=Robustness(beside=str(there), attacked=100)))
    with pytest.raises(InputError, match="another one there is called earlier, too"):
        adversarial_evidence.finished(Config(robustness=Robustness(beside=f"{there},{there}")))
    with pytest.raises(InputError, match="no finished run"):
        adversarial_evidence.finished(Config(robustness=Robustness(beside=str(tmp_path))))


@pytest.mark.slow
def test_all_attacks_make_a_table_of_their_own(tmp_path):
    assert status(tmp_path, *SMALL, "--attacks=all", "--eps=0.2", "--model=mlp,width=8,depth=1") == 0
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert metrics["autoattack/accuracy"] <= metrics["apgd/accuracy"]
    stages = [metrics[f"autoattack after {stage}/accuracy"] for stage, _ in STANDARD]
    assert stages == sorted(stages, reverse=True) and stages[-1] == metrics["autoattack/accuracy"]
    assert metrics["certified/accuracy"] <= metrics["certified by alpha-CROWN/accuracy"] <= metrics["worst/accuracy"]
    assert {"deepfool/accuracy", "hop_skip_jump/accuracy"} <= metrics.keys()  # in the threat's own norm
    audited = json.loads((tmp_path / "run" / "audit.json").read_text())["all"]
    assert {"autoattack", "spsa", "hop_skip_jump", "deepfool"} <= audited["attacks"].keys()
    assert "boundary" not in audited["attacks"] and "success_misreported" not in audited["flagged"]
    assert metrics["spsa/accuracy"] < metrics["noise/accuracy"]
    assert metrics["universal/accuracy"] < metrics["random_universal/accuracy"]
    # The longest search by gradients can find nothing farther in l2 than one by the class alone, up to what it leaves.
    assert metrics["carlini_wagner/median_size"] <= 1.05 * metrics["boundary/median_size"]
    assert metrics["fmn (l0)/median_size"] >= 1
    errors = {name: value for name, value in metrics.items() if name.startswith("corruption/") and name[-1].isdigit()}
    assert len(errors) == 75 and metrics["corruption/mean_error"] == pytest.approx(np.mean(list(errors.values())))
    assert errors["corruption/gaussian_noise_1"] < errors["corruption/contrast_5"]
    bright = jax.tree_util.Partial(lambda x: x.reshape(len(x), -1)[:, :10])
    others = {"earlier": metrics, "without": {}}
    table = adversarial_suite.corrupted(Config(), bright, np.ones((3, 8, 8, 1)), np.arange(3), others, metrics)
    assert table["rows"][-1][0] == "mCE" and "earlier" in table["rows"][-1][-1] and table["rows"][-2][0] == "all"


@pytest.mark.slow
def test_a_network_trained_under_noise_is_judged_under_noise(tmp_path):
    assert status(tmp_path, *SMALL, "--defence=gaussian", "--norm=l2", "--eps=0.25", "--noisy_copies=200") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    metrics = result["metrics"]
    assert 0 < metrics["smoothed/average_certified_radius"] < 1
    assert metrics["smoothed/certified_at_0.25"] <= metrics["smoothed/accuracy"] <= 1
    assert any("certified_by_radius" in figure["file"] for figure in result["figures"])
    shares = [share for name, share in metrics.items() if name.startswith(adversarial_certificates.AT)]
    assert len(shares) == 80 and shares == sorted(shares, reverse=True)
    there = str(tmp_path / "run")
    noisier = Config(robustness=Robustness(defence="gaussian", norm="l2", eps=0.5, beside=there, noisy_copies=200,
                                           attacked=20, steps=5))
    assert adversarial_evidence.finished(noisier) == {"run": metrics}
    sigma, radii, accuracies, average = adversarial_certificates._by_radius(metrics)
    assert sigma == radii[20] == 0.25 and accuracies == shares
    assert average == metrics["smoothed/average_certified_radius"]
    # The area below the curve of certified accuracy, in steps of 0.0125, is the average radius.
    assert 0.0125 * sum(shares[1:]) <= average <= 0.0125 * sum(shares)


@pytest.mark.slow
def test_a_network_of_an_earlier_run_is_attacked_as_it_is(tmp_path):
    assert status(tmp_path / "earlier", *SMALL) == 0
    earlier = tmp_path / "earlier" / "run"
    assert status(tmp_path, *SMALL, f"--init_from={earlier}", "--train_for=0steps") == 0
    there, here = (json.loads((run / "result.json").read_text())["metrics"] for run in (earlier, tmp_path / "run"))
    assert {name: here[name] for name in ("test/nll", "pgd/accuracy", "worst/accuracy")} == {
        name: there[name] for name in ("test/nll", "pgd/accuracy", "worst/accuracy")}


@pytest.mark.slow
def test_sums_of_pixels_bound_a_change_too(tmp_path):
    assert status(tmp_path, *SMALL, "--norm=l1", "--eps=4", "--attacks=autoattack") == 0
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert metrics["certified/accuracy"] <= metrics["autoattack/accuracy"] <= metrics["apgd/accuracy"] < 0.9


def test_a_network_that_was_trained_on_other_images_is_refused(tmp_path, capsys):
    assert command.status(classification.main, classification.Config, "classification", [
        "--model=mlp,width=4", "--train_for=1steps", "--notensorboard", "--noclaims",
        f"--workdir={tmp_path / 'digits'}"]) == 0
    for flags, said in ((["--dataset=fake:8x8x1,10"], "--dataset is digits, here it is fake:8x8x1,10"),
                        (["--image_size=10"], "--image_size is 0, here it is 10")):
        assert status(tmp_path, *flags, "--model=mlp,width=4", f"--init_from={tmp_path / 'digits'}") == 2
        assert said in capsys.readouterr().err
        assert command.status(fooling.main, fooling.Config, "fooling", [
            *flags, "--model=mlp,width=4", f"--init_from={tmp_path / 'digits'}", f"--workdir={tmp_path / 'two'}"]) == 2
        assert said in capsys.readouterr().err


def test_a_network_whose_training_has_diverged_is_not_attacked():
    broken = jax.tree_util.Partial(lambda images: np.nan * images.reshape(len(images), -1)[:, :10])
    with pytest.raises(InputError, match="the logits of 20 of 20 images are not finite"):
        adversarial_suite.finite(broken, np.ones((20, 4, 4, 1), np.float32))


@pytest.mark.slow
@pytest.mark.parametrize(("defence", "gap"), [("fast", -0.8), ("fast", -0.1), ("pgd", -0.8)])
def test_an_overfitted_network_raises_the_alarm_while_it_is_trained(defence, gap, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(adversarial_evidence.defences, "single_step_gap",
                        lambda *_, **__: {"fgsm_accuracy": 0.9, "pgd_accuracy": 0.9 + gap, "gap": gap})
    assert status(tmp_path, *SMALL, f"--defence={defence}", "--eval_every=1epochs") == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["values"]["gap"] for record in records if record["split"] == "validation"] == 3 * [gap]
    assert capsys.readouterr().err.count("alarm: catastrophic overfitting") == (3 if gap == -0.8 else 0)


@pytest.mark.parametrize("flags, said", [
    (["--defence=mart", "--augment=mixup=0.2"], "leave mixup and cutmix out"),
    (["--defence=ibp", "--augment=cutmix=1"], "leave mixup and cutmix out"),
    (["--dataset=fake:8x8x1,3", "--attacks=autoattack"], "AutoAttack needs at least 4 classes"),
    (["--defence=pgd", "--label_smoothing=0.1"], "no meaning for --defence=pgd")])
def test_what_cannot_be_meant_is_said_before_training(flags, said, tmp_path, capsys):
    assert status(tmp_path, *SMALL, *flags) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_logits_that_are_not_finite_are_never_right():
    broken = jax.tree_util.Partial(lambda images: np.nan * images.reshape(len(images), -1)[:, :10])
    images, labels = np.full((20, 4, 4, 1), 0.5, np.float32), np.zeros(20, np.int32)
    metrics = {}
    adversarial_suite.run(Config(robustness=Robustness(steps=2)), broken, images, labels, metrics)
    assert {name: value for name, value in metrics.items() if name.endswith("/accuracy") and value} == {}


@pytest.mark.slow
@pytest.mark.parametrize("defence", ["pgd", "fast", "trades", "trades --awp=0.005", "mart", "ibp", "crown_ibp"])
def test_every_defence_trains(defence, tmp_path):
    assert status(tmp_path, *SMALL, *f"--defence={defence}".split(), "--train_for=4steps",
                  "--norm=l2", "--eps=0.5") == 0


def loss_of(*flags):
    """The loss that the flags ask for, and what to give it, on a small network."""
    config, _ = parsing.parse(Config(), ["--dataset=fake:8x8x1,10", "--batch_size=4", "--model=plain,width=2", *flags])
    dataset = train.load_data(config.data, 0)
    model = train.build_model(config.model, dataset)
    batch = {**dataset.splits["train"][range(4)], "mask": np.ones(4, bool)}
    params = model.init(jax.random.key(0), batch["image"])["params"]
    return adversarial_robustness.training_loss(model, config, dataset), (params, {}, batch, jax.random.key(0))


@pytest.mark.parametrize("defence", ["pgd", "trades", "mart"])
def test_a_defence_takes_the_steps_it_is_given(defence):
    loss, args = loss_of(f"--defence={defence}", "--defence_steps=3")
    looks = str(jax.make_jaxpr(loss)(*args))
    assert "length=3\n" in looks and "length=10\n" not in looks


@pytest.mark.parametrize("defence", ["pgd", "trades", "mart"])
def test_a_defence_is_judged_at_weights_as_far_off_as_asked(defence):
    values = []
    for share in ("0", "0.005", "0.05"):
        loss, args = loss_of(f"--defence={defence}", "--defence_steps=1", f"--awp={share}")
        values.append(float(jax.jit(loss)(*args)[0]))
    assert values[0] < values[1] < values[2]


SHAPES = {"robust_digits": "8x8x1,10", "robust_fashion_mnist": "28x28x1,10", "robust_mnist": "28x28x1,10",
          "robust_fashion_mnist_certified": "28x28x1,10", "robust_cifar10": "32x32x3,10"}


def test_every_preset_is_tried_here():
    assert {path.stem for path in (ROOT / "experiments/presets").glob("robust_*.flags")} == set(SHAPES)


@pytest.mark.slow
@pytest.mark.parametrize("preset", SHAPES)
def test_a_preset_takes_a_step_on_made_up_data_of_its_shape(preset):
    overrides = [f"--dataset=fake:{SHAPES[preset]}", "--batch_size=4"]
    config, _ = parsing.parse(adversarial_robustness.Config(),
                              [f"--flagfile=experiments/presets/{preset}.flags", *overrides])
    dataset = train.load_data(config.data, 0)
    model = train.build_model(config.model, dataset)
    loss = adversarial_robustness.training_loss(model, config, dataset)
    made = train.recipe(config, model, dataset.image_shape, len(dataset.splits["train"]), loss)
    state, batch = made.fresh(), dataset.splits["train"][range(4)]
    batch = {**batch, "mask": np.ones(4, bool), "step": 0}
    value, _ = jax.jit(made.loss)(state.params, state.model_state, batch, state.key)
    assert np.isfinite(value)


@pytest.mark.parametrize(("flag", "said"), [
    ("--eps=0", "--eps=0"), ("--eps=2", "beyond the box"), ("--attacked=5", "--attacked=5"), ("--steps=0", "--steps=0"),
    ("--growth=1", "--growth=1"), ("--clean_weight=2", "--clean_weight=2"), ("--noisy_copies=0", "--noisy_copies=0"),
    ("--defence_steps=0", "--defence_steps=0"), ("--defence_steps=5", "no meaning for --defence=none"),
    ("--awp=1", "--awp=1"), ("--awp=-0.1", "--awp=-0.1"), ("--awp=0.01", "no meaning for --defence=none"),
    ("--attacks=some", "some"),
    ("--growth=0.5", "no meaning for --defence=none"), ("--noisy_copies=5", "no meaning for --defence=none"),
    ("--mirror", "leave it out"), ("--train_for=0steps", "longer than nothing"), ("--norm=l7", "l7"),
    ("--defence=prayer", "prayer")])
def test_what_cannot_be_attacked_is_refused(flag, said, tmp_path, capsys):
    assert status(tmp_path, flag) == 2
    assert said in capsys.readouterr().err

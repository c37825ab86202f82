"""The classification command from its flags to its report, on small networks."""

import json
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from commands import ROOT, surroundings
from PIL import Image

from experiments import classification, command, parsing, train
from experiments.classification import Config

pytestmark = pytest.mark.slow
SMALL = ["--model=convnet,width=4,stages=2", "--train_for=3epochs", "--notensorboard"]


def run(*flags):
    return command.status(classification.main, Config, "classification", list(flags))


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert run(f"--workdir={folder}", *SMALL) == 0
    return folder


def test_a_run_leaves_what_it_should(finished):
    got = result(finished)
    assert got["schema"] == 1 and got["status"] == "finished" and got["experiment"] == "classification"
    assert {claim["id"] for claim in got["claims"]} == {"L01.learned", "L07.depth", "L11.fields"}
    for claim in got["claims"]:
        evidence = claim["evidence"]
        assert evidence["control"] is not None and evidence["n"] > 0 and claim["caveat"]
    for split in ("validation", "test"):
        assert 0.2 < got["metrics"][f"{split}/accuracy"] <= 1
    assert {"total", "compile", "train"} <= got["seconds"].keys()
    drawn = {figure["file"] for figure in got["figures"]}
    names = ("learning_curves", "confusion", "predictions", "filters", "learned_against_pixels", "probes",
             "receptive_fields")
    assert drawn == {f"figures/{name}.svg" for name in names} and all((finished / file).exists() for file in drawn)
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert {line["split"] for line in lines} == {"train", "validation", "speed"}
    assert [line["step"] for line in lines if line["split"] == "validation"] == [21, 42, 61]
    assert "how we know" in (finished / "report.html").read_text().lower()


def test_the_same_command_shows_the_finished_result(finished, capsys):
    before = (finished / "result.json").stat().st_mtime_ns
    assert run(f"--workdir={finished}", *SMALL) == 0
    assert (finished / "result.json").stat().st_mtime_ns == before
    assert "report.html" in capsys.readouterr().out


def test_its_flagfile_repeats_it(finished, tmp_path):
    assert run(f"--flagfile={finished / 'flags.txt'}", f"--workdir={tmp_path / 'again'}", "--noclaims") == 0
    first, again = result(finished)["metrics"], result(tmp_path / "again")["metrics"]
    scores = [name for name in again if not name.startswith("speed/")]
    assert {name: first[name] for name in scores} == {name: again[name] for name in scores}


def test_init_from_begins_where_the_other_run_ended(finished, tmp_path):
    flags = [*SMALL, f"--init_from={finished}", "--train_for=1steps", "--learning_rate=1e-9", "--noclaims"]
    assert run(f"--workdir={tmp_path / 'more'}", *flags) == 0
    # One batch moves the running averages by a tenth: a few images may change sides.
    gap = result(tmp_path / "more")["metrics"]["test/accuracy"] - result(finished)["metrics"]["test/accuracy"]
    assert abs(gap) < 0.05


@pytest.mark.parametrize(("spoil", "says"), [
    (lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]), "cannot be read"),
    (lambda file: file.unlink(), "cannot be read"),
    (None, "does not fit this model"),
])
def test_init_from_something_unusable(finished, tmp_path, spoil, says, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(finished, broken)
    model = SMALL[0] if spoil else "--model=convnet,width=8,stages=2"
    for file in (broken / "checkpoints").rglob("*"):
        if spoil and file.is_file():
            spoil(file)
    assert run(f"--workdir={tmp_path / 'new'}", f"--init_from={broken}", *SMALL[1:], model) == 2
    said = capsys.readouterr().err.strip()
    assert says in said and len(said.splitlines()) == 1 and not (tmp_path / "new").exists()


def no_class(folder):
    return f"folder:{folder}"


def one_class(folder):
    picture(folder / "only" / "1.png")
    return f"folder:{folder}"


def truncated(folder):
    for name in ("a/1.png", "a/2.png", "a/3.png", "b/1.png", "b/2.png", "b/3.png"):
        picture(folder / name)
    spoilt = folder / "b" / "2.png"
    spoilt.write_bytes(spoilt.read_bytes()[:60])
    return f"folder:{folder}"


def pickled(folder):
    np.savez(folder / "x.npz", image=np.array([{}, {}], object), label=np.array([0, 1]))
    return f"npz:{folder}/x.npz"


def not_finite(folder):
    images = np.full((20, 4, 4, 1), 0.5, np.float32)
    images[3, 1, 1] = np.nan
    np.savez(folder / "x.npz", image=images, label=np.arange(20) % 2)
    return f"npz:{folder}/x.npz"


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(path)


@pytest.mark.parametrize(("make", "says"), [
    (no_class, "0 subfolders"), (one_class, "1 subfolder"),
    (truncated, "2.png"), (pickled, "pickle"), (not_finite, "finite")])
def test_data_that_will_not_do_is_one_line(make, says, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    status = run(f"--dataset={make(tmp_path / 'data')}", f"--workdir={tmp_path / 'run'}", *SMALL)
    said = capsys.readouterr().err.strip()
    assert status == 2 and says in said and len(said.splitlines()) == 1, said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["mlp,width=16", "wide_resnet,depth=10,widen=1", "linear"])
def test_claims_that_have_no_meaning_for_a_network_are_left_out(model, tmp_path):
    flags = [f"--workdir={tmp_path / 'run'}", f"--model={model}", "--train_for=5steps", "--notensorboard"]
    assert run(*flags) == 0
    ids = {claim["id"] for claim in result(tmp_path / "run")["claims"]}
    local, learned = model.startswith("wide"), model != "linear"
    assert ("L11.fields" in ids) == local and ("L01.learned" in ids) == learned


def test_the_faces_question(tmp_path):
    preset = "--flagfile=experiments/presets/faces.flags"
    flags = [preset, f"--workdir={tmp_path / 'run'}", "--train_for=6epochs", "--splits=3", "--notensorboard"]
    assert run(*flags) == 0
    got = result(tmp_path / "run")
    claim = next(claim for claim in got["claims"] if claim["id"] == "L01.numbers")
    assert claim["evidence"]["n"] == 3 and claim["statement"].startswith("100 learned numbers")
    scores = {name: value for name, value in got["metrics"].items() if name.startswith("numbers/")}
    assert set(scores) == {"numbers/learned_numbers", "numbers/100_random_projections",
                           "numbers/100_principal_components", "numbers/all_pixels"}
    # Faces are far from chance for any of them: a broken split or label order would not be.
    assert all(value > 0.7 for name, value in scores.items() if "random" not in name)


SHAPES = {"digits": "8x8x1,10", "faces": "25x25x1,2", "fashion_mnist": "28x28x1,10", "fashion_mnist_95": "28x28x1,10",
          "cifar10_wrn": "32x32x3,10", "imagenet_resnet50": "224x224x3,100"}


def test_every_preset_is_tried_here():
    presets = {path.stem for path in (ROOT / "experiments/presets").glob("*.flags")}
    assert {name for name in presets if not name.startswith(("robust_", "fooling_"))} == set(SHAPES)


@pytest.mark.parametrize("preset", SHAPES)
def test_a_preset_trains_on_made_up_data_of_its_shape(preset, tmp_path):
    overrides = [f"--dataset=fake:{SHAPES[preset]}", "--image_size=0", "--train_for=1steps", "--warmup=0steps",
                 "--batch_size=4", "--validation_fraction=0.005", "--norequire_accelerator"]
    config, _ = parsing.parse(Config(), [f"--flagfile=experiments/presets/{preset}.flags", *overrides])
    dataset = train.load_data(config.data, 0)
    model = train.build_model(config.model, dataset)
    from dlcourse.reporting.run import open_run

    with open_run(tmp_path / "run", "classification", {}, [], tensorboard=False) as opened:
        trained = train.train(config, opened, dataset, model, train.classifier_loss(model, config, dataset))
        steps = [record for record in opened.metrics() if record["split"] == "train"]
    assert int(trained.state.step) == 1 and np.isfinite(steps[0]["values"]["loss"])
    moved = [np.abs(np.asarray(a) - np.asarray(b)).max() > 0 for a, b in
             zip(jax.tree.leaves(trained.state.params), jax.tree.leaves(trained.untrained.params), strict=True)]
    assert any(moved)


def test_stopped_by_a_signal_it_resumes(tmp_path):
    words = [sys.executable, "-m", "experiments.classification", *SMALL[:1], "--train_for=3000steps", "--noclaims",
             f"--workdir={tmp_path / 'run'}", "--notensorboard"]
    line = tmp_path / "run" / "metrics.jsonl"
    reached = []
    for _ in range(2):
        seen = line.stat().st_size if line.exists() else 0
        process = subprocess.Popen(words, cwd=tmp_path, env=surroundings(tmp_path), stderr=subprocess.PIPE, text=True,
                                   stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (line.exists() and line.stat().st_size > seen) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 75, said
        reached.append(json.loads(line.read_text().splitlines()[-1])["step"])
    assert 0 < reached[0] < reached[1] < 3000

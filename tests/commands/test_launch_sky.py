"""launch/sky: its file as SkyPilot's own parser reads it, its run script as a shell runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import checkout
import pytest
import yaml
from checkout import launch
from commands import ROOT, assert_mistake

GOLDEN = Path(__file__).parent / "golden"
TPU = ["--accelerators=tpu-v5litepod-8", "--infra=gcp/us-central1", "--bucket=gs://mine", "--spot", "--name=box"]
GPU = ["--accelerators=H100:8", "--nodes=2", "--bucket=s3://mine", "--name=box", "--retries=1"]
VERSION = "0.14.1"
PARSE = """
import inspect, json, sys, sky
from sky.jobs import recovery_strategy
task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
source = inspect.getsource(recovery_strategy)  # the parser does not look into job_recovery
unknown = [key for key in resources.job_recovery if f"pop('{key}'" not in source and key != "strategy"]
print(json.dumps([task.num_nodes, str(resources), resources.use_spot, resources.job_recovery, unknown,
                  list(task.storage_mounts)]))
"""


@pytest.fixture
def user(tmp_path):
    return checkout.make(tmp_path)


def files(user, tmp_path, *words):
    """The YAML and the commands of a dry run, with the checkout's place left out."""
    said = launch("sky", "--dry-run", *words, cwd=tmp_path, env=user)
    assert said.returncode == 0, said.stderr
    return said.stdout.replace(str(tmp_path / "checkout"), "CHECKOUT")


@pytest.mark.parametrize(("name", "words"), [("tpu", TPU), ("gpu", GPU)])
def test_the_file_is_the_one_kept(name, words, user, tmp_path):
    said = files(user, tmp_path, *words, "classification", "--dataset=folder:a b")
    assert said == (GOLDEN / f"sky_{name}.txt").read_text()


@pytest.fixture(scope="module")
def skypilot(tmp_path_factory):
    """A Python with SkyPilot, installed as launch/local installs: its dependencies do not go with ours."""
    environment = checkout.module("environment")
    venv = tmp_path_factory.mktemp("skypilot") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = str(venv / "bin/python")
    flags, more = environment.settings_for_uv(environment.pip_settings(venv))
    by_uv = [[python, "-m", "pip", "install", "-qq", "uv"],
             [f"{venv}/bin/uv", "pip", "install", "--quiet", "--python", python, f"skypilot=={VERSION}", *flags]]
    by_pip = [[python, "-m", "pip", "install", "-qq", f"skypilot=={VERSION}"]]
    for commands in (by_uv, by_pip):
        if all(subprocess.run(command, env=os.environ | more).returncode == 0 for command in commands):
            return python
    pytest.skip(f"skypilot {VERSION} could not be installed")


@pytest.mark.slow
def test_skypilots_own_parser_takes_it(skypilot, user, tmp_path):
    """Strictly: a setting that it does not know is refused."""
    def parsed(text):
        (tmp_path / "job.yaml").write_text(text)
        words = [skypilot, "-c", PARSE, str(tmp_path / "job.yaml")]
        return subprocess.run(words, cwd=tmp_path, env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
                              capture_output=True, text=True)

    for words, nodes, kind in ((TPU, 1, "tpu-v5litepod-8"), (GPU, 2, "H100")):
        text = files(user, tmp_path, *words, "classification").split("# ---")[1].partition("\n")[2]
        done = parsed(text.replace("CHECKOUT", str(ROOT)))
        assert done.returncode == 0, done.stderr
        got = json.loads(done.stdout.strip().splitlines()[-1])
        assert got[0] == nodes and kind in got[1] and got[2] == (words is TPU)
        assert got[3].items() >= {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}.items()
        assert got[4:] == [[], ["/bucket"]]
    refused = parsed(text.replace("use_spot", "use_spt"))
    assert refused.returncode != 0 and "use_spt" in refused.stderr


@pytest.mark.parametrize(("end", "status", "count"),
                         [("0", 0, 1), ("2", 2, 1), ("75", 75, 1), ("1", 1, 2), ("1,0", 0, 2)])
def test_a_failure_is_started_again_by_the_script_alone(end, status, count, user, tmp_path):
    """What was saved after a signal is SkyPilot's to start again; the bucket is a folder here."""
    said = files(user, tmp_path, *GPU, "stub", f"--end={end}")
    job = yaml.safe_load(said.split("# ---")[1].partition("\n")[2].replace("CHECKOUT", str(tmp_path / "checkout")))
    assert yaml.safe_load(job["run"].split("\n")[0].replace("=", ": ")) == {"checkout": "$PWD"}
    (tmp_path / "bucket").mkdir()
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    done = subprocess.run(["bash", "-c", job["run"].replace("cd /bucket", f"cd {tmp_path}/bucket")],
                          cwd=job["workdir"], env=user | nodes, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    starts = (tmp_path / "bucket/runs/box/starts-0").read_text().splitlines()
    assert len(starts) == count
    assert starts[0].endswith("--coordinator=10.0.0.1:8476 --num_processes=2 --process_id=1 --coordinator_timeout=1800")


@pytest.mark.parametrize(("words", "says"), [
    (["--bucket=gs://b"], ["--accelerators"]), (["--accelerators=H100"], ["--bucket"]),
    (["--accelerators=H100", "--bucket=mine"], ["--bucket=mine", "gs://NAME"]),
    (["--accelerators=H 100", "--bucket=gs://b"], ["--accelerators=H 100"]),
    (["--accelerators=H100", "--bucket=gs://mine", "--runtime=x"], ["--runtime=x", "H100"]),
    (["--accelerator=H100"], ["did you mean --accelerators"]),
    (["--accelerators=H100", "--bucket=gs://mine"], ["sky is not on PATH", "skypilot"])])
def test_a_mistake_is_one_line(words, says, user, tmp_path):
    assert_mistake(launch("sky", *words, "stub", cwd=tmp_path, env=user), *says)
    assert not (tmp_path / "runs").exists()


def test_it_hands_the_file_to_sky(user, tmp_path):
    program = tmp_path / "bin/sky"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$@"; cat "$5"\n')
    program.chmod(0o755)
    said = launch("sky", *TPU, "stub", cwd=tmp_path, env=user | {"PATH": f"{program.parent}:{user['PATH']}"})
    assert said.stdout.startswith("jobs launch --yes --detach-run runs/sky/box.yaml\nname: box\n")
    for word in ("sky jobs logs -n box", "sky jobs cancel -n box", "rsync --recursive gs://mine/runs/box runs/box"):
        assert word in said.stderr

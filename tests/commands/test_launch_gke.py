"""launch/gke: its JobSet against a strict schema of the fields it uses, its pod's script, its commands."""

import subprocess
import tarfile
from pathlib import Path

import checkout
import pytest
import yaml
from checkout import launch
from commands import assert_mistake

GOLDEN = Path(__file__).parent / "golden"
TPU = ["--tpu=v5e:4x4", "--bucket=gs://mine", "--spot", "--name=box"]
GPU = ["--gpu=nvidia-h100-80gb:8", "--bucket=gs://mine", "--namespace=lab", "--name=box", "--retries=0"]

STATUS = {"action": str, "onExitCodes": {"containerName": str, "operator": str, "values": [int]}}
CONDITION = {"action": str, "onPodConditions": [{"type": str, "status": str}]}
CONTAINER = {"name": str, "image": str, "command": [str], "resources": {"limits": {str: int}},
             "volumeMounts": [{"name": str, "mountPath": str}], "env?": [{"name": str, "value": str}]}
POD = {"restartPolicy": str, "terminationGracePeriodSeconds": int, "serviceAccountName": str,
       "nodeSelector": {str: str},
       "containers": [CONTAINER],
       "volumes": [{"name": str, "csi": {"driver": str, "volumeAttributes": {str: str}}}]}
JOB = {"parallelism": int, "completions": int, "completionMode": str, "backoffLimit": int,
       "podFailurePolicy": {"rules": [(STATUS, CONDITION)]},
       "template": {"metadata": {"annotations": {str: str}}, "spec": POD}}
SCHEMA = {"apiVersion": str, "kind": str, "metadata": {"name": str, "namespace?": str},
          "spec": {"failurePolicy": {"maxRestarts": int,
                                     "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}]},
                   "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}]}}
"""The part of the JobSet API (v1alpha2) and of batch/v1 that is used, no more than that. "?": optional."""


def wrong(value, schema, path="") -> list[str]:
    """Where a document leaves its schema."""
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{path}: {value!r} is no {schema.__name__}"]
    if isinstance(schema, tuple):
        found = [wrong(value, one, path) for one in schema]
        return [] if [] in found else found[0]
    if isinstance(schema, list):
        return [line for i, one in enumerate(value) for line in wrong(one, schema[0], f"{path}[{i}]")]
    if str in schema:
        return [line for key, one in value.items() for line in wrong(one, schema[str], f"{path}.{key}")]
    needed, known = {key for key in schema if key[-1] != "?"}, {key.rstrip("?"): kind for key, kind in schema.items()}
    lines = [f"{path}: lacks {key}" for key in needed - value.keys()]
    return lines + [line for key, one in value.items() for line in
                    (wrong(one, known[key], f"{path}.{key}") if key in known else [f"{path}.{key}: unknown"])]


@pytest.fixture
def user(tmp_path):
    return checkout.make(tmp_path)


def job_set(user, tmp_path, *words):
    said = launch("gke", "--dry-run", *words, cwd=tmp_path, env=user)
    assert said.returncode == 0, said.stderr
    return yaml.safe_load(said.stdout.split("# ---")[1].partition("\n")[2])


@pytest.mark.parametrize(("name", "words"), [("tpu", TPU), ("gpu", GPU)])
def test_the_file_is_the_one_kept_and_fits_the_schema(name, words, user, tmp_path):
    said = launch("gke", "--dry-run", *words, "classification", "--dataset=folder:a b", cwd=tmp_path, env=user)
    assert said.stdout == (GOLDEN / f"gke_{name}.txt").read_text()
    document = job_set(user, tmp_path, *words, "classification")
    assert wrong(document, SCHEMA) == []
    document["spec"]["failurePolicy"]["maxRestart"] = 3
    assert wrong(document, SCHEMA) == [".spec.failurePolicy.maxRestart: unknown"]


@pytest.mark.parametrize(("shape", "pods", "chips"), [
    ("v5e:1x1", 1, 1), ("v5e:2x4", 1, 8), ("v5e:4x4", 4, 4), ("v5p:2x2x1", 1, 4), ("v5p:2x2x4", 4, 4),
    ("v4:4x4x4", 16, 4)])
def test_a_slice_has_a_pod_for_every_host(shape, pods, chips, user, tmp_path):
    job = job_set(user, tmp_path, f"--tpu={shape}", "--bucket=gs://mine", "stub")["spec"]["replicatedJobs"][0]
    job = job["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["completions"] == job["parallelism"] == pods
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert (f"--num_processes={pods} " in container["command"][2]) == (pods > 1)


def test_which_end_leads_to_what(user, tmp_path):
    spec = job_set(user, tmp_path, *TPU, "stub")["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    actions = {rule["onExitCodes"]["values"][0]: rule["action"] for rule in job["podFailurePolicy"]["rules"][:2]}
    assert actions == {2: "FailJob", 75: "Ignore"} and job["backoffLimit"] == 0
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert spec["failurePolicy"]["maxRestarts"] == 3, "any other end restarts the JobSet so often"


@pytest.mark.parametrize("status", [0, 1, 2, 75])
def test_a_pod_ends_as_its_experiment_does(status, user, tmp_path):
    (tmp_path / "bucket/checkouts").mkdir(parents=True)
    root = Path(user["LAUNCH"]).parent
    (root / "launch/setup").write_text("#!/bin/sh\ntrue\n")
    (root / "launch/local").write_text(f'#!/bin/sh\necho "$@"\nexit {status}\n')
    with tarfile.open(tmp_path / "bucket/checkouts/box.tar.gz", "w:gz") as archive:
        archive.add(root / "launch", "checkout/launch")
    job = job_set(user, tmp_path, *TPU, "stub", "--end=a b")["spec"]["replicatedJobs"][0]["template"]["spec"]
    script = job["template"]["spec"]["containers"][0]["command"][2]
    script = script.replace("/bucket", f"{tmp_path}/bucket").replace("/tmp/checkout", f"{tmp_path}/pod/checkout")
    (tmp_path / "pod").mkdir()
    done = subprocess.run(["sh", "-c", script.replace("-C /tmp", f"-C {tmp_path}/pod")], capture_output=True, text=True,
                          env=user | {"JOB_COMPLETION_INDEX": "3"})
    assert done.returncode == status, done.stderr
    assert done.stdout.strip() == ("--with=tpu stub --end=a b --workdir=runs/box --coordinator=box-main-0-0.box:8476 "
                                   "--num_processes=4 --process_id=3 --coordinator_timeout=1800")


def test_it_uploads_the_checkout_and_creates_the_job_set(user, tmp_path):
    (tmp_path / "bin").mkdir()
    for name, does in {"gcloud": f'cp "$3" {tmp_path}/uploaded', "kubectl": "true"}.items():
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{tmp_path}/calls\n{does}\n')
        (tmp_path / "bin" / name).chmod(0o755)
    env = user | {"PATH": f"{tmp_path}/bin:{user['PATH']}"}
    said = launch("gke", *GPU, "stub", cwd=tmp_path, env=env)
    assert said.returncode == 0, said.stderr
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert first.startswith("gcloud storage cp ") and first.endswith(" gs://mine/checkouts/box.tar.gz")
    assert second == "kubectl --namespace=lab create --filename=runs/gke/box.yaml"
    with tarfile.open(tmp_path / "uploaded") as archive:
        names = archive.getnames()
    assert {"checkout/launch/local", "checkout/experiments/stub.py", "checkout/pyproject.toml"} <= set(names)
    assert not any("__pycache__" in name for name in names)
    for word in ("state ", "follow ", "stop ", "results "):
        assert word in said.stderr
    (tmp_path / "bin/kubectl").write_text("#!/bin/sh\necho AlreadyExists >&2\nexit 1\n")
    assert_mistake(launch("gke", *GPU, "stub", cwd=tmp_path, env=env), "AlreadyExists", "delete jobset box")


@pytest.mark.parametrize(("words", "says"), [
    ([], ["--tpu=KIND:SHAPE"]), (["--tpu=v5e:2x4", "--gpu=x:1"], ["either"]),
    (["--tpu=v5e:2x4"], ["--bucket"]), (["--tpu=v5e:2x4", "--bucket=s3://mine"], ["--bucket=s3://mine"]),
    (["--tpu=v7:2x4", "--bucket=gs://mine"], ["--tpu=v7:2x4", "v5e"]),
    (["--tpu=v5e:8", "--bucket=gs://mine"], ["--tpu=v5e:8"]),
    (["--tpu=v5e:4x4", "--nodes=2", "--bucket=gs://mine"], ["--nodes=2"]),
    (["--tpu=v5p:3x3x1", "--bucket=gs://mine"], ["9 chips"]),
    (["--gpu=h100", "--bucket=gs://mine"], ["--gpu=h100"])])
def test_a_mistake_is_one_line(words, says, user, tmp_path):
    assert_mistake(launch("gke", *words, "stub", cwd=tmp_path, env=user), *says)


def test_without_kubectl(user, tmp_path):
    said = launch("gke", *GPU, "stub", cwd=tmp_path, env=user | {"PATH": str(checkout.tools(tmp_path / "tools"))})
    assert_mistake(said, "kubectl is not on PATH", "gcloud components install")

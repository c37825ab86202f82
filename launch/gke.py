"""Runs an experiment on a Kubernetes cluster (GKE) as a JobSet, on TPU slices or GPUs. Called by launch/gke.

usage: launch/gke [machine flags] EXPERIMENT [--flag=value ...]

machine flags, before EXPERIMENT:
  --tpu=KIND:SHAPE   a TPU slice, such as v5e:2x4 or v5p:2x2x4
  --gpu=KIND:N       or N GPUs a pod, such as nvidia-h100-80gb:8
  --nodes=N          how many such pods (GPUs only); default 1
  --bucket=URI       where the run is written: gs://NAME, which must be there
  --spot             cheap nodes that may be taken away: the pods come back, and the run goes on
  --image=IMAGE      with a Python, or apt-get to install one; default python:3.12
  --account=NAME     the Kubernetes service account that may write to the bucket; default "default"
  --namespace=NAME   default kubectl's own
  --name=NAME        of the JobSet; default made from the command
  --retries=N        how often an experiment that failed is started again; default 3
  --dry-run          print the file and the commands, and stop
  --help             show this and stop; after EXPERIMENT, show the experiment's flags

The cluster needs JobSet (`kubectl get crd jobsets.jobset.x-k8s.io`) and the Cloud Storage FUSE CSI driver.
"""

from __future__ import annotations

import math
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

import command_line
import travel
import yaml_text
from command_line import MISTAKE, STOPPED, Mistake, say

PORT = 8476
PATIENCE = 1800
"""Seconds that pods wait for each other: nodes come, images are pulled and environments made at different times."""
SLICES = {"v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice",
          "tpu7x": "tpu7x"}
"""GKE's names for kinds of TPU."""
GRACE = 120
"""Seconds between the signal and the end of a pod, to save in."""
SCRIPT = """set -eu
tar -xzf /bucket/checkouts/{name}.tar.gz -C /tmp || exit 1
cd /bucket
/tmp/checkout/launch/setup --with={extra}
exec /tmp/checkout/launch/local --with={extra} {command}
"""


def main(words: list[str]) -> None:
    machine, rest = command_line.words_or_help(words, __doc__)
    name = command_line.name_of(machine, rest)
    rest, folder = command_line.in_folder(rest, name)
    text, bucket = yaml_text.dump(job_set(machine, rest, name)) + "\n", machine["bucket"]
    file = Path("runs/gke", f"{name}.yaml")
    kubectl = ["kubectl", *([f"--namespace={machine['namespace']}"] if "namespace" in machine else [])]
    upload = ["gcloud", "storage", "cp", "TMP/checkout.tar.gz", f"{bucket}/checkouts/{name}.tar.gz"]
    create = [*kubectl, "create", f"--filename={file}"]
    if "dry-run" in machine:
        print(f"# --- {file}", text + "# --- commands", shlex.join(upload), shlex.join(create), sep="\n")
        return
    command_line.tool("kubectl", "`gcloud components install kubectl gke-gcloud-auth-plugin`, then `gcloud container "
                      "clusters get-credentials CLUSTER`")
    command_line.tool("gcloud", command_line.GET_GCLOUD)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    with tempfile.TemporaryDirectory() as temporary:
        travel.pack_checkout(Path(temporary, "checkout.tar.gz"))
        do([word.replace("TMP", temporary) for word in upload], "see `gcloud auth list` and --bucket")
    do(create, f"if it is there from an earlier start, first: {shlex.join([*kubectl, 'delete', 'jobset', name])}")
    pods = f"jobset.sigs.k8s.io/jobset-name={name},batch.kubernetes.io/job-completion-index=0"
    say(f"""{name}: {shlex.join(rest)}
  state    {shlex.join([*kubectl, "get", "jobset", name])}
  follow   {shlex.join([*kubectl, "logs", "--follow", f"--selector={pods}"])}
  stop     {shlex.join([*kubectl, "delete", "jobset", name])}    (it saves; the same command goes on from there)
  results  gcloud storage rsync --recursive {bucket}/{folder} {folder}""")


def do(command: list[str], way: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Mistake(f"{' '.join(command[:3])} failed: {' '.join(done.stderr.split())}; {way}")


def pods_of(machine: dict[str, str]) -> tuple[int, dict[str, str], dict[str, int], str]:
    """How many pods, the nodes they need, the devices of each, and the extra of pyproject.toml for them."""
    if ("tpu" in machine) == ("gpu" in machine):
        raise Mistake("give either --tpu=KIND:SHAPE, such as --tpu=v5e:2x4, or --gpu=KIND:N")
    if "gpu" in machine:
        found = re.fullmatch(r"([a-z0-9-]+):([1-9]\d*)", machine["gpu"])
        if not found:
            raise Mistake(f"--gpu={machine['gpu']}: give KIND:N, such as nvidia-h100-80gb:8")
        nodes = command_line.count(machine, "nodes", 1)
        return nodes, {"cloud.google.com/gke-accelerator": found[1]}, {"nvidia.com/gpu": int(found[2])}, "cuda"
    kind, _, shape = machine["tpu"].partition(":")
    if kind not in SLICES or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise Mistake(f"--tpu={machine['tpu']}: give KIND:SHAPE with one of {', '.join(SLICES)}, such as v5e:2x4")
    if "nodes" in machine:
        raise Mistake(f"--nodes={machine['nodes']}: the shape of --tpu={machine['tpu']} says how many; leave it out")
    chips = math.prod(map(int, shape.split("x")))
    per_host = chips if chips <= (8 if kind in ("v5e", "v6e") else 4) else 4
    if chips % per_host:
        raise Mistake(f"--tpu={machine['tpu']}: {chips} chips do not fill hosts of {per_host}")
    place = {"cloud.google.com/gke-tpu-accelerator": SLICES[kind], "cloud.google.com/gke-tpu-topology": shape}
    return chips // per_host, place, {"google.com/tpu": per_host}, "tpu"


def job_set(machine: dict[str, str], rest: list[str], name: str) -> dict:
    """The JobSet. A mistake ends it, what was saved after a signal comes back without limit, a failure a few times."""
    pods, place, devices, extra = pods_of(machine)
    restarts = command_line.count(machine, "retries", 3, least=0)
    command_line.bucket(machine, ("gs",))
    place |= {"cloud.google.com/gke-spot": "true"} if "spot" in machine else {}

    def status(action: str, value: int) -> dict:
        return {"action": action, "onExitCodes": {"containerName": "main", "operator": "In", "values": [value]}}

    disruption = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    job = {"parallelism": pods, "completions": pods, "completionMode": "Indexed", "backoffLimit": 0,
           "podFailurePolicy": {"rules": [status("FailJob", MISTAKE), status("Ignore", STOPPED), disruption]},
           "template": {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}},
                        "spec": pod(machine, rest, name, pods, place, devices, extra)}}
    mistake = {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet",
            "metadata": {"name": name} | ({"namespace": machine["namespace"]} if "namespace" in machine else {}),
            "spec": {"failurePolicy": {"maxRestarts": restarts, "rules": [mistake]},
                     "replicatedJobs": [{"name": "main", "replicas": 1, "template": {"spec": job}}]}}


def pod(machine, rest, name, pods, place, devices, extra) -> dict:
    command = shlex.join(rest)
    if pods > 1:  # pod 0 of job 0 has this name in the network that a JobSet makes
        command += (f" --coordinator={name}-main-0-0.{name}:{PORT} --num_processes={pods}"
                    f" --process_id=$JOB_COMPLETION_INDEX --coordinator_timeout={PATIENCE}")
    container = {"name": "main", "image": machine.get("image", "python:3.12"),
                 "command": ["sh", "-c", SCRIPT.format(name=name, extra=extra, command=command)],
                 "resources": {"limits": devices}, "volumeMounts": [{"name": "bucket", "mountPath": "/bucket"}]}
    if extra == "cuda":  # where GKE puts the driver
        container["env"] = [{"name": "LD_LIBRARY_PATH", "value": "/usr/local/nvidia/lib64"}]
    volume = {"bucketName": machine["bucket"].removeprefix("gs://"),
              "mountOptions": "implicit-dirs,rename-dir-limit=10000"}
    return {"restartPolicy": "Never", "terminationGracePeriodSeconds": GRACE,
            "serviceAccountName": machine.get("account", "default"), "nodeSelector": place, "containers": [container],
            "volumes": [{"name": "bucket",
                         "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": volume}}]}


if __name__ == "__main__":
    command_line.start(main)

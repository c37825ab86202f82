"""launch/slurm on a real SLURM of two virtual nodes: what is started again, what is not, and what survives."""

import json
import re
import subprocess

import checkout
import pytest
import slurm_cluster
from checkout import launch

STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if slurm_cluster.missing():
        pytest.skip(slurm_cluster.missing())
    variables = checkout.make(tmp_path_factory.mktemp("checkout"))
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield variables | found


@pytest.fixture(scope="module", autouse=True)
def limited(slurm, tmp_path_factory):
    """A job on two nodes that will not end by itself, begun first since it takes half a minute to reach its limit.

    The signal comes 90 s before the end of two minutes.
    """
    folder = tmp_path_factory.mktemp("limited")
    words = ["--nodes=2", "--time=2", "--retries=0", "stub", "--workdir=runs/x", "--waits=1"]
    return submit(slurm, folder, *words), folder


def submit(slurm, tmp_path, *words, **more) -> str:
    said = launch("slurm", *words, cwd=tmp_path, env=slurm | more)
    assert said.returncode == 0, said.stderr
    return re.search(r"submitted job (\d+)", said.stderr)[1]


def job(slurm, name: str) -> dict[str, str]:
    shown = subprocess.run(["scontrol", "show", "job", name], env=slurm, capture_output=True, text=True).stdout
    return dict(re.findall(r"(\w+)=(\S+)", shown))


def ended(slurm, *names: str, seconds: float = 120) -> list[str]:
    """The ends of these jobs, such as "FAILED 2:0"."""
    slurm_cluster.wait(lambda: all(job(slurm, name)["JobState"] in STATES for name in names), seconds, f"jobs {names}")
    return ["{JobState} {ExitCode}".format(**job(slurm, name)) for name in names]


def starts(folder, rank: int = 0) -> list[str]:
    file = folder / f"starts-{rank}"
    return file.read_text().splitlines() if file.exists() else []


def running(slurm, name: str) -> bool:
    words = ["squeue", "--noheader", f"--job={name}"]
    return bool(subprocess.run(words, env=slurm, capture_output=True, text=True).stdout.strip())


pytestmark = pytest.mark.slow


def test_a_failure_is_started_again_a_few_times_a_success_and_a_mistake_never(slurm, tmp_path):
    ways = {"success": "0", "mistake": "2", "failure": "1", "flaky": "1,134,0"}
    jobs = {way: submit(slurm, tmp_path, "--retries=2", "stub", f"--workdir=runs/{way}", f"--end={end}")
            for way, end in ways.items()}
    assert dict(zip(jobs, ended(slurm, *jobs.values()), strict=True)) == {
        "success": "COMPLETED 0:0", "mistake": "FAILED 2:0", "failure": "FAILED 1:0", "flaky": "COMPLETED 0:0"}
    assert {way: len(starts(tmp_path / "runs" / way)) for way in ways} == {
        "success": 1, "mistake": 1, "failure": 3, "flaky": 3}
    assert not list(tmp_path.glob("runs/slurm/*.failures"))


def test_a_cancelled_job_stays_cancelled(slurm, tmp_path):
    name = submit(slurm, tmp_path, "stub", "--workdir=runs/x", "--waits=9")
    slurm_cluster.wait(lambda: starts(tmp_path / "runs/x"), 30, "its start")
    subprocess.run(["scancel", name], env=slurm, check=True)
    assert ended(slurm, name)[0].startswith("CANCELLED")
    slurm_cluster.wait(lambda: "EndTime" in job(slurm, name) and not running(slurm, name), 60, "its end")
    assert len(starts(tmp_path / "runs/x")) == 1 and job(slurm, name)["JobState"] == "CANCELLED"


def test_a_sweep_is_an_array_of_jobs(slurm, tmp_path):
    (tmp_path / "sweep.txt").write_text("# two of them\n--workdir=runs/a --end=0\n--workdir='runs/b c' --end=2\n")
    name = submit(slurm, tmp_path, "--sweep=sweep.txt", "stub")
    assert ended(slurm, f"{name}_0", f"{name}_1") == ["COMPLETED 0:0", "FAILED 2:0"]
    assert len(starts(tmp_path / "runs/a")) == len(starts(tmp_path / "runs/b c")) == 1


def test_a_job_that_does_not_see_the_gpus_it_asked_for_is_refused(slurm, tmp_path):
    """The GPUs are made up, so JAX sees none; two devices of the CPU stand for them where a user says so."""
    blind = submit(slurm, tmp_path, "--gpus=2", "stub", "--workdir=runs/blind", JAX_PLATFORMS="")
    one = submit(slurm, tmp_path, "--gpus=2", "stub", "--workdir=runs/one")
    flag = "--xla_force_host_platform_device_count=2"
    both = submit(slurm, tmp_path, "--nodes=2", "--gpus=2", "stub", "--workdir=runs/both", XLA_FLAGS=flag)
    assert ended(slurm, blind, one, both) == ["FAILED 2:0", "FAILED 2:0", "COMPLETED 0:0"]
    assert "2 were asked for" in (tmp_path / f"runs/slurm/stub-{one}.out").read_text()
    assert not starts(tmp_path / "runs/blind") and not starts(tmp_path / "runs/one")
    assert [len(starts(tmp_path / "runs/both", rank)) for rank in range(4)] == [1, 1, 1, 1]
    log = (tmp_path / f"runs/slurm/stub-{both}.out").read_text()
    assert log.count("2 nodes x 2 tasks, 2 GPUs visible") == 2


def test_what_a_signal_interrupted_ends_as_if_nothing_had_happened(slurm, tmp_path):
    """The real experiment, of one process and of two on two nodes: signal, save, queue again, resume.

    Parameters, optimizer, metrics and losses are those of a run without the signal, to the last bit.
    """
    flags = ["classification", "--model=mlp,width=8", "--eval_every=300steps", "--checkpoint_every=5000steps",
             "--noclaims", "--notensorboard"]
    steps, jobs = {1: 6000, 2: 600}, {}  # long enough for the signal to come before the end
    ports = slurm_cluster.free_ports(4)
    for nodes, how in ((1, "plain"), (1, "stopped"), (2, "plain"), (2, "stopped")):
        jobs[nodes, how] = submit(
            slurm, tmp_path, f"--nodes={nodes}", *flags, f"--train_for={steps[nodes]}steps",
            f"--workdir=runs/{how}-{nodes}",
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{ports.pop()}")  # virtual nodes have no names that a network knows
    for nodes in (1, 2):
        metrics = tmp_path / f"runs/stopped-{nodes}/metrics.jsonl"
        slurm_cluster.wait(lambda file=metrics: file.exists() and file.stat().st_size, 90, "training")
        subprocess.run(["scancel", "--signal=TERM", jobs[nodes, "stopped"]], env=slurm, check=True)
    logs = [file.read_text() for file in (tmp_path / "runs/slurm").glob("*.out")]
    assert ended(slurm, *jobs.values()) == ["COMPLETED 0:0"] * 4, logs
    for nodes in (1, 2):
        assert job(slurm, jobs[nodes, "stopped"])["Restarts"] == "1", "it was over before the signal came"
        runs = [tmp_path / f"runs/{how}-{nodes}" for how in ("plain", "stopped")]
        first, second = (json.loads((run / "result.json").read_text()) for run in runs)
        assert first["environment"]["processes"] == second["environment"]["processes"] == nodes
        assert scores(first) == scores(second)
        assert digests(runs[0]) == digests(runs[1])
        assert losses(runs[0]) == losses(runs[1]) and len(losses(runs[0])) >= 200


def test_a_job_at_its_time_limit_saves_and_goes_on_with_all_its_processes(slurm, limited):
    name, folder = limited
    assert ended(slurm, name) == ["COMPLETED 0:0"]
    assert job(slurm, name)["Restarts"] == "1"
    nodes = {line.split()[0] for rank in (0, 1) for line in starts(folder / "runs/x", rank)}
    assert nodes == {"n1", "n2"} and [len(starts(folder / "runs/x", rank)) for rank in (0, 1)] == [2, 2]
    assert "queued again" in (folder / f"runs/slurm/stub-{name}.out").read_text(), "one log for all its starts"


def scores(result) -> dict:
    """Its metrics but for those that a clock made."""
    return {name: value for name, value in result["metrics"].items() if not name.startswith("speed/")}


def digests(run) -> dict[str, int]:
    """Of parameters, optimizer and random key as they were saved at the end."""
    newest = max((run / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    notes = json.loads(json.loads((newest / "notes/metadata").read_text())["content"])
    assert len(notes["digest"]) > 20
    return notes["digest"]


def losses(run) -> list[tuple[int, str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["split"], line["values"]["loss"]) for line in lines if "loss" in line["values"]]

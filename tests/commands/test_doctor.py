"""The doctor finds what is wrong with a machine: every check against a planted fault, and against its absence."""

import shutil
from types import SimpleNamespace

import checkout
import pytest
from commands import assert_mistake, experiment, surroundings

from experiments import doctor, doctor_machine

WELL = {"platform": "gpu", "kind": "H100", "devices": 2, "reduced": 3.0, "expected": 3.0, "steps": 10, "seconds": 2.0,
        "compile": 0.1, "tflops": 50.0}
TASKS = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}
ON_CPU = WELL | {"platform": "cpu", "kind": "cpu"}


def worst(findings) -> tuple[str, str]:
    """The worst level, and all that was said of findings at that level."""
    findings = list(findings)
    level = max((finding.level for finding in findings), key=["ok", "warn", "fail"].index, default="ok")
    assert all(finding.way for finding in findings if finding.level != "ok"), "each says what to do"
    return level, "; ".join(f"{found.said} -> {found.way}" for found in findings if found.level == level)


def test_a_fit_machine_in_one_command(tmp_path):
    said = experiment(tmp_path, "doctor")
    assert said.returncode == 0 and "FAIL" not in said.stdout and not said.stderr
    lines = said.stdout.splitlines()
    for what in ("versions", "devices", "all-reduce", "disk", "data", "cache"):
        assert any(line[6:].startswith(what) for line in lines), what
    assert lines[-1].startswith("fit to run") and not (tmp_path / "runs").exists()


def test_an_unfit_machine_in_one_command(tmp_path):
    smi(tmp_path, "590.1", 2)
    path = f"{tmp_path}:{surroundings(tmp_path)['PATH']}"
    flags = ["--dataset=folder:nowhere", "--workdir=/proc/run"]
    said = experiment(tmp_path, "doctor", *flags, PATH=path, JAX_PLATFORMS="")
    failed = [line[6:18].strip() for line in said.stdout.splitlines() if line.startswith("FAIL")]
    assert said.returncode == 2
    assert failed == ["devices", "disk", "data"], said.stdout
    assert "--with=cuda" in said.stdout and said.stdout.splitlines()[-1].startswith("3 to mend")


def test_devices_that_do_not_answer(tmp_path, monkeypatch):
    said = experiment(tmp_path, "doctor", JAX_PLATFORMS="cuda")
    assert said.returncode == 2 and "JAX cannot use them" in said.stdout and "Traceback" not in said.stdout
    monkeypatch.setattr(doctor, "PATIENCE", 0.1)
    assert "no answer" in worst(doctor.step(doctor.probe(), {}, 0, 0))[1]


def test_a_mistyped_flag(tmp_path):
    assert_mistake(experiment(tmp_path, "doctor", "--devcies=2"), "--devices")
    assert_mistake(experiment(tmp_path, "doctor", "--devices=-2"), "--devices=-2")


@pytest.mark.parametrize(("seen", "environ", "gpus", "asked", "level", "says"), [
    (WELL, {}, 2, 2, "ok", "2 x H100"),
    (ON_CPU, {}, 0, 0, "ok", "2 x cpu"),
    (ON_CPU, {}, 2, 0, "fail", "--with=cuda"),
    (ON_CPU, {"JAX_PLATFORMS": "cpu"}, 2, 0, "warn", "JAX_PLATFORMS"),
    (ON_CPU, {"JAX_PLATFORMS": "cpu"}, 2, 2, "warn", "JAX_PLATFORMS"),
    (ON_CPU, {}, 0, 2, "fail", "2 were asked for"),
    (WELL, {}, 4, 0, "warn", "the others are idle"),
    (WELL, {"CUDA_VISIBLE_DEVICES": "0,1"}, 4, 0, "warn", "visible are 0,1"),
    (WELL, {}, 4, 4, "fail", "4 were asked for"),
    (WELL | {"reduced": 2.0}, {}, 2, 0, "fail", "not 3.0"),
])
def test_devices(seen, environ, gpus, asked, level, says, monkeypatch):
    monkeypatch.setattr(doctor, "chips", lambda: [])
    got, said = worst(doctor.step(seen, environ, gpus, asked))
    assert got == level and says in said


def test_versions():
    have = doctor_machine.installed()
    assert worst(doctor_machine.versions(have))[0] in ("ok", "warn")  # warn: from PYTHONPATH alone
    if worst(doctor_machine.versions(have))[0] == "ok":
        for spoil in ({"flax": "0.1.0"}, {"optax": None}):
            level, said = worst(doctor_machine.versions({k: v for k, v in (have | spoil).items() if v}))
            assert level == "fail" and next(iter(spoil)) in said
    assert worst(doctor_machine.versions(have | {"jaxlib": "0.1"}))[0] == "fail"
    plugin = {"jax-cuda13-plugin": have["jaxlib"], "jax-cuda13-pjrt": "0.4.1"}
    level, said = worst(doctor_machine.versions(have | plugin))
    assert level == "fail" and "jax-cuda13-pjrt 0.4.1" in said and "plugin" not in said.split("->")[0]


def smi(folder, driver: str, gpus: int) -> None:
    listed = "\n".join(f"echo 'GPU {index}: NVIDIA H100 (UUID: x)'" for index in range(gpus))
    (folder / "nvidia-smi").write_text(f'#!/bin/sh\nif [ "$1" = -L ]; then\n:\n{listed}\nelse echo {driver}\nfi\n')
    (folder / "nvidia-smi").chmod(0o755)


@pytest.mark.parametrize(("driver", "gpus", "level", "says"), [
    ("590.11.01", 2, "ok", "2 GPUs"), ("535.1", 2, "fail", "needs 580"), ("590.1", 0, "warn", "no GPU")])
def test_drivers(driver, gpus, level, says, tmp_path, monkeypatch):
    smi(tmp_path, driver, gpus)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    counted, found = doctor_machine.drivers({"jax-cuda13-plugin": "1"})
    assert counted == gpus and worst(found)[0] == level and says in worst(found)[1]


@pytest.mark.parametrize(("environ", "level", "says"), [
    ({}, "ok", ""),
    (TASKS | {"SLURM_NTASKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, "ok", "job 7"),
    (TASKS | {"SLURM_NTASKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "0"}, "fail", "--gres=gpu:2"),
    (TASKS | {"SLURM_NTASKS_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, "fail", "--ntasks-per-node=2"),
    ({"SLURM_JOB_ID": "7"}, "ok", "0 GPUs"),
    ({"TPU_ACCELERATOR_TYPE": "v4-16", "TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, "ok", "worker 1 of 2"),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}, "ok", "index 3")])
def test_schedulers(environ, level, says):
    got, said = worst(doctor_machine.surroundings(environ, 0))
    assert got == level and says in said


def test_disk(tmp_path, monkeypatch):
    assert worst(doctor_machine.disk(tmp_path / "not" / "yet"))[0] == "ok" and not list(tmp_path.iterdir())
    assert worst(doctor_machine.disk(doctor_machine.Path("/proc/run")))[0] == "fail"
    for free, level in ((10**8, "fail"), (10**9, "warn")):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
            assert worst(doctor_machine.disk(tmp_path))[0] == level


def test_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)  # commands that ran before in this process set it
    (tmp_path / "program").write_bytes(bytes(3 * 10**6))
    assert "1 files, 3 MB" in worst(doctor_machine.cache(tmp_path))[1]
    assert worst(doctor_machine.cache(None))[0] == "warn"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/proc/nowhere")
    assert worst(doctor_machine.cache(tmp_path))[0] == ("warn" if not doctor_machine.os.access("/proc", 2) else "ok")


def test_launch_doctor_is_this_doctor(tmp_path):
    variables = checkout.make(tmp_path)
    said = checkout.launch("doctor", "--help", cwd=tmp_path, env=variables)
    assert said.returncode == 0 and "--devices" in said.stdout and not said.stderr

"""Several processes as one run, started by hand: they agree, they stop together, none is left waiting."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time

import pytest
from commands import assert_mistake, experiment, surroundings
from test_never_lose_work import lines, saved_steps, scores

pytestmark = pytest.mark.slow
FLAGS = ["--model=mlp,width=16", "--batch_size=32", "--eval_every=25steps", "--checkpoint_every=20steps", "--noclaims",
         "--notensorboard", "--workdir=run", "--augment="]  # replicas augment by numbers of their own
TWO_DEVICES = "--xla_force_host_platform_device_count=2"


@contextlib.contextmanager
def together(folder, *flags, count=2):
    """`count` processes of two devices each, that have met; killed at the end if they have not ended."""
    with socket.socket() as free, contextlib.ExitStack() as stack:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        words = [sys.executable, "-m", "experiments.classification", *FLAGS, *flags, f"--coordinator={address}",
                 f"--num_processes={count}"]
        running, how = [], {"cwd": folder, "env": surroundings(folder, XLA_FLAGS=TWO_DEVICES), "text": True}
        for number in range(count):
            process = subprocess.Popen([*words, f"--process_id={number}"], **how, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE)
            stack.enter_context(process)
            stack.callback(process.kill)
            running.append(process)
        yield running


def ended(running, timeout=120):
    said = [process.communicate(timeout=timeout) for process in running]
    return [process.returncode for process in running], said


def reach(folder, step):
    """Waits until the run has logged this step."""
    end = time.monotonic() + 120
    file = folder / "run" / "metrics.jsonl"
    while time.monotonic() < end:
        if file.exists() and any(json.loads(line)["step"] >= step for line in file.read_text().splitlines(True)
                                 if line.endswith("\n")):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


def test_two_processes_write_what_one_would(tmp_path):
    (tmp_path / "two").mkdir()
    with together(tmp_path / "two", "--train_for=60steps", "--parallel=shard_map") as running:
        codes, said = ended(running)
    assert codes == [0, 0], said
    assert "4 x cpu in 2 processes, shard_map" in said[0][0] and "report" in said[0][0]
    assert said[1][0].replace("[Gloo]", "").count("step") == 0  # the first one speaks
    one = experiment(tmp_path, "classification", *FLAGS, "--train_for=60steps")
    assert one.returncode == 0
    ours, alone = tmp_path / "two" / "run", tmp_path / "run"
    assert scores(ours) == pytest.approx(scores(alone), abs=1e-4)
    for (step, split, values), (its_step, its_split, its_values) in zip(lines(ours), lines(alone), strict=True):
        assert (step, split) == (its_step, its_split)
        assert values is None or values == pytest.approx(its_values, abs=1e-3)


def test_a_signal_to_one_stops_all_at_one_step_and_they_go_on(tmp_path):
    long = "--train_for=100000steps"
    with together(tmp_path, long) as running:
        reach(tmp_path, 500)
        running[1].send_signal(signal.SIGTERM)
        began = time.monotonic()
        codes, said = ended(running)
    assert codes == [75, 75] and time.monotonic() - began < 30, said
    stopped = saved_steps(tmp_path / "run")[-1]
    assert all(f"stopped by a signal after step {stopped}" in err for _, err in said)
    with together(tmp_path, long) as running:
        reach(tmp_path, stopped + 100)
        running[0].send_signal(signal.SIGINT)
        codes, said = ended(running)
    assert codes == [75, 75] and saved_steps(tmp_path / "run")[-1] > stopped
    told = [step for step, split, _ in lines(tmp_path / "run") if split == "validation"]
    assert told == list(range(25, told[-1] + 1, 25))


@pytest.mark.parametrize("victim", [0, 1])
def test_where_one_dies_the_other_says_so_and_ends(tmp_path, victim):
    with together(tmp_path, "--train_for=100000steps") as running:
        reach(tmp_path, 50)
        running[victim].kill()
        began = time.monotonic()
        codes, said = ended(running)
    assert time.monotonic() - began < 60
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, 2, 75)
    assert "another process of this run is gone" in said[1 - victim][1] or "another task died" in said[1 - victim][1]
    assert saved_steps(tmp_path / "run")


def test_who_comes_alone_gives_up_with_one_line(tmp_path):
    for number in (0, 1):
        flags = ["--coordinator=127.0.0.1:9", "--num_processes=2", f"--process_id={number}", "--coordinator_timeout=2"]
        flags[0] = flags[0] if number else "--coordinator=127.0.0.1:23987"
        alone = experiment(tmp_path, "classification", *FLAGS, *flags)
        assert_mistake(alone, "--coordinator=127.0.0.1", "2 seconds", "--coordinator_timeout")
        assert not (tmp_path / "run").exists()


def test_a_mistake_is_a_mistake_in_all(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with together(tmp_path) as running:
        codes, said = ended(running)
    assert codes == [2, 2], said
    assert all("holds thesis.tex but no run" in err for _, err in said)


@pytest.mark.parametrize(("flags", "says"), [
    (["--coordinator=here:1234"], ["--num_processes=0", "all three"]),
    (["--coordinator=here", "--num_processes=2", "--process_id=0"], ["--coordinator=here", "HOST:PORT"]),
    (["--coordinator=here:1", "--num_processes=2", "--process_id=2"], ["--process_id=2", "0..1"]),
    (["--fsdp=3"], ["--fsdp=3", "1, 2, 4"]), (["--batch_size=30"], ["--batch_size=30", "28 or 32"])])
def test_sizes_that_do_not_fit_are_one_line(tmp_path, flags, says):
    four = TWO_DEVICES.replace("2", "4")
    assert_mistake(experiment(tmp_path, "classification", *FLAGS, *flags, XLA_FLAGS=four), *says)
    assert not (tmp_path / "run").exists()


def test_saved_on_four_devices_it_goes_on_with_one(tmp_path):
    words = [sys.executable, "-m", "experiments.classification", *FLAGS, "--train_for=400steps"]
    four = TWO_DEVICES.replace("2", "4")
    with subprocess.Popen([*words, "--fsdp=2"], cwd=tmp_path, env=surroundings(tmp_path, XLA_FLAGS=four)) as process:
        reach(tmp_path, 50)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    stopped = saved_steps(tmp_path / "run")[-1]
    assert subprocess.run(words, cwd=tmp_path, env=surroundings(tmp_path)).returncode == 0
    assert 50 <= stopped < 400
    other = experiment(tmp_path, "classification", *FLAGS, "--train_for=400steps", "--workdir=other")
    assert other.returncode == 0
    ours, alone = scores(tmp_path / "run"), scores(tmp_path / "other")
    assert ours["test/accuracy"] == pytest.approx(alone["test/accuracy"], abs=0.02)

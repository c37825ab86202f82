"""Speed, side by side: the same step here and in PyTorch, start-up, compilations.

Lecture: uniform parallel operations on dense vectors are faster (L16); open-source frameworks (L17).
Everything compared is run in one process, in turns, and reported as a ratio of medians (ours / theirs): machines are
noisy, ratios less so. `launch/local benchmark` brings PyTorch; without it that comparison is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dlcourse.contracts import Claim, Evidence, InputError
from experiments import benchmark_peers, command, settings


@dataclasses.dataclass(frozen=True)
class Config:
    repeats: int = settings.setting(15, "timings of each thing; medians are reported (at least 10)")
    batch_size: int = settings.setting(128, "images in a step")
    width: int = settings.setting(32, "filters of the convnet's first stage")
    image_size: int = settings.setting(28, "pixels a side")
    workdir: str = settings.setting("", "folder of the run; default runs/benchmark/HASH")
    overwrite: bool = settings.setting(False, "measure again")

    def __post_init__(self):
        if self.repeats < 10:
            raise InputError(f"--repeats={self.repeats}: a median of fewer than 10 says little; give at least 10")


def main(config: Config, run) -> None:
    from dlcourse.reporting import environment

    began = time.monotonic()
    times = interleave(config.repeats, steps_to_time(config))
    metrics = {
        f"ours/{name.split('/')[1]}_ms": 1e3 * median(ts) for name, ts in times.items() if name.startswith("ours/")
    }
    for peer in peers():
        for part in ("forward", "backward", "step"):
            metrics[f"{peer}/{part}_ratio"] = median(times[f"ours/{part}"]) / median(times[f"{peer}/{part}"])
    metrics |= start_up(10) | compilations(config)
    run.finish(
        metrics,
        [*framework_claims(times), batch_claim(times, config.batch_size)],
        {"total": time.monotonic() - began},
        environment.describe(),
    )


def median(values) -> float:
    return sorted(values)[len(values) // 2]


def interleave(repeats: int, tasks: dict) -> dict[str, list[float]]:
    """Seconds of each task, all tasks once a round so that the machine's moods strike all alike; two rounds warm up.

    A task returns seconds by name: one run of it may time several parts.
    """
    times: dict[str, list[float]] = {}
    for turn in range(repeats + 2):
        for task in tasks.values():
            for name, seconds in task().items():
                if turn >= 2:
                    times.setdefault(name, []).append(seconds)
    return times


def steps_to_time(config: Config) -> dict:
    """Tasks that each make one training step of the same network from the same weights on the same images."""
    import numpy as np

    rng = np.random.default_rng(0)
    images = rng.random((config.batch_size, config.image_size, config.image_size, 1), np.float32)
    labels = rng.integers(0, 10, config.batch_size).astype(np.int32)
    ours, model, state, loss = jax_step(config, images, labels)
    tasks = {"ours": ours, "single": jax_step(config, images[:1], labels[:1], "single")[0]}
    for name in peers():
        network = benchmark_peers.torch_convnet(model, state.variables)
        tasks[name], their_loss = torch_step(network, images, labels, name)
        if abs(their_loss - loss) > 1e-3 * abs(loss):
            raise AssertionError(f"the networks differ: loss {loss} here and {their_loss} in PyTorch")
    return tasks


def peers() -> tuple[str, ...]:
    """What our step is compared with: PyTorch's default layout and channels_last, where PyTorch is installed."""
    return ("torch", "torch_channels_last") if importlib.util.find_spec("torch") else ()


def jax_step(config: Config, images, labels, name: str = "ours"):
    """A task that times our forward pass and step, the model, the state it starts from, and the first loss."""
    import jax

    from dlcourse import models, streams
    from dlcourse.training import losses, optimizers
    from dlcourse.training import state as states
    from dlcourse.training.step import train_step

    model = models.create(f"convnet,width={config.width}", 10, images.shape[1:])
    tx, loss = optimizers.create("sgd", 1e-3), losses.cross_entropy(model)
    batch = {"image": images, "label": labels}
    start = states.create(model, images.shape[1:], tx, streams.root(0))
    forward = jax.jit(lambda state, batch: loss(state.params, state.model_state, batch, state.key)[0])
    step = jax.jit(functools.partial(train_step, loss=loss, tx=tx), donate_argnums=0)
    held = [jax.tree.map(jax.numpy.copy, start)]

    def task():
        began = time.perf_counter()
        jax.block_until_ready(forward(held[0], batch))
        middle = time.perf_counter()
        held[0] = jax.block_until_ready(step(held[0], batch)[0])
        return split(name, middle - began, time.perf_counter() - middle)

    return task, model, start, float(forward(start, batch))


def split(name: str, forward: float, step: float) -> dict[str, float]:
    return {f"{name}/forward": forward, f"{name}/step": step, f"{name}/backward": step - forward}


def torch_step(net, images, labels, name: str):
    """A task that times PyTorch's forward pass and step, and the first loss."""
    import torch

    layout = torch.channels_last if name.endswith("channels_last") else torch.contiguous_format
    net = net.to(memory_format=layout)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(memory_format=layout)
    y = torch.from_numpy(labels).long()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)

    def loss():
        return torch.nn.functional.cross_entropy(net((x - 0.5) / 0.25), y)

    def task():
        began = time.perf_counter()
        value = loss()
        middle = time.perf_counter()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return split(name, middle - began, time.perf_counter() - began)

    with torch.no_grad():
        net.train()
        first = float(loss())
    return task, first


def framework_claims(times) -> list[Claim]:
    """L17: the step here against the same step in PyTorch's default layout, where PyTorch is there."""
    import jax
    import numpy as np

    if "torch/step" not in times:
        return []

    ratios = np.array(times["ours/step"]) / np.array(times["torch/step"])
    low, high = ratio_interval(ratios)
    allowed = 1.2 if jax.__version_info__ >= (0, 12) else 1.8  # older convolutions are slower on a CPU
    return [
        Claim(
            "L17.torch",
            "Tools",
            f"The training step of the convnet takes at most {allowed} times as long as in PyTorch on this CPU.",
            high <= allowed,
            Evidence(float(np.median(ratios)), 1.0, allowed, (low, high), len(ratios)),
            "Ratio of times in turns within one process; the interval is that of the median ratio (order statistics).",
        )
    ]


def batch_claim(times, batch_size: int) -> Claim:
    """L16: time an image in a batch against one image at a time."""
    import numpy as np

    ratios = np.array(times["single/step"]) * batch_size / np.array(times["ours/step"])
    low, high = ratio_interval(ratios)
    return Claim(
        "L16.batch",
        "How it revived",
        "One uniform operation on a whole batch is faster than image after image.",
        low > 1,
        Evidence(float(np.median(ratios)), 1.0, 1.0, (low, high), len(ratios)),
        f"Times as fast an image, in a batch of {batch_size}; both sides are the same compiled step.",
    )


def ratio_interval(ratios) -> tuple[float, float]:
    """A 95 % interval of the median by order statistics (binomial), which assumes no distribution."""
    import numpy as np
    from scipy.stats import binom

    ordered, n = np.sort(ratios), len(ratios)
    k = max(int(binom.ppf(0.025, n, 0.5)), 1)
    return float(ordered[k - 1]), float(ordered[n - k])


def start_up(repeats: int) -> dict[str, float]:
    """Seconds from the command to the first logged step: with an empty compilation cache, and again with it filled."""
    cold, warm = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(first_step(cache))
            warm.append(first_step(cache))
    return {"startup/cold_seconds": median(cold), "startup/warm_seconds": median(warm), "startup/n": float(repeats)}


def first_step(cache: str) -> float:
    """Starts the default training in a process of its own and waits for its first line of metrics."""
    surroundings = {**os.environ, "XDG_CACHE_HOME": cache}
    surroundings.pop("JAX_COMPILATION_CACHE_DIR", None)
    with tempfile.TemporaryDirectory() as folder:
        line, began = Path(folder, "run", "metrics.jsonl"), time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.classification", "--train_for=200steps", f"--workdir={folder}/run"],
            env=surroundings,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not (line.exists() and line.stat().st_size):
                if process.poll() is not None or time.monotonic() - began > 300:
                    raise RuntimeError("the training that start-up is measured with did not start")
                time.sleep(0.02)
            return time.monotonic() - began
        finally:
            process.kill()
            process.wait()


def compilations(config: Config) -> dict[str, float]:
    """Programs compiled for the first training step, and for the steps after it (which should be none)."""
    import numpy as np

    images = np.zeros((8, config.image_size, config.image_size, 1), np.float32)
    with counted() as compiled:
        task = jax_step(config, images, np.zeros(8, np.int32))[0]
        task()
        first = len(compiled)
        for _ in range(5):
            task()
    return {"compile/first_step": float(first), "compile/later_steps": float(len(compiled) - first)}


@contextlib.contextmanager
def counted():
    """A list that grows with every program that XLA compiles inside the block."""
    import jax

    compiled: list[str] = []
    listening = [True]

    def listen(event: str, duration: float, **_) -> None:
        if listening[0] and event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        listening[0] = False


if __name__ == "__main__":
    command.run(main, Config, name="benchmark")

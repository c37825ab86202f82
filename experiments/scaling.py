"""What it costs to be spread over devices, and never to lose work: measured beside the bare training step.

Lecture: uniform parallel operations on dense vectors are faster (L16): they are so on many devices only if dividing
them, and saving what they reached, costs little. Fake devices share this machine's cores: at equal work the best
possible ratio is 1, and what is above it is overhead.

    launch/local scaling        about 5 min on 2 CPU cores
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from pathlib import Path

from dlcourse.contracts import Claim, Evidence, InputError
from experiments import command, settings

SAVED = {"1M": ("wide_resnet,depth=16,widen=2", 64, 32), "25M": ("resnet50", 8, 32)}
"""Networks that are saved: millions of parameters -> model, batch size, pixels a side."""
FAKE_DEVICES = 4


@dataclasses.dataclass(frozen=True)
class Config:
    repeats: int = settings.setting(10, "timings of each thing; medians are reported (at least 6, for an interval)")
    window: float = settings.setting(4.0, "seconds of training in which a save is written")
    workdir: str = settings.setting("", "folder of the run; default runs/scaling/HASH")
    overwrite: bool = settings.setting(False, "measure again")

    def __post_init__(self):
        if self.repeats < 6:
            raise InputError(f"--repeats={self.repeats}: fewer than 6 have no 95 % interval of the median")
        if not self.window > 0:
            raise InputError(f"--window={self.window}: give a number of seconds above 0")


def main(config: Config, run) -> None:
    import jax

    from dlcourse.reporting import environment

    if jax.config.jax_platforms in (None, "cpu"):
        jax.config.update("jax_num_cpu_devices", FAKE_DEVICES)
    began, metrics, claims = time.monotonic(), spreading(config.repeats), []
    for name in SAVED:
        measured, claim = saving(config, name)
        metrics |= measured
        claims.append(claim)
    run.finish(metrics, claims, {"total": time.monotonic() - began}, environment.describe())


def work(model_name: str, batch_size: int, side: int):
    """A loss, an optimizer, a maker of fresh states and a batch, for images of `side` pixels."""
    import numpy as np

    from dlcourse import models, streams
    from dlcourse.training import losses, optimizers
    from dlcourse.training import state as states

    rng, shape = np.random.default_rng(0), (side, side, 3)
    batch = {"image": rng.random((batch_size, *shape), np.float32), "label": np.arange(batch_size, dtype=np.int32) % 10}
    model, tx = models.create(model_name, 10, shape), optimizers.create("adamw", 1e-4)
    return losses.cross_entropy(model), tx, functools.partial(states.create, model, shape, tx, streams.root(0)), batch


def updater(step, state):
    """A function that makes one update of a state held inside, and one that shows it."""
    import jax

    held = [state]

    def update() -> None:
        held[0] = jax.block_until_ready(step(held[0])[0])

    return update, lambda: held[0]


def planned(plan, *what):
    """An update as runs make it."""
    loss, tx, fresh, batch = work(*what)
    step = plan.step(loss=loss, tx=tx)
    return updater(lambda state: step(state, [batch]), plan.create(fresh))


def bare(*what):
    """The same update by `jax.jit` alone, as one would write it for one device."""
    import jax

    from dlcourse.training.step import train_step

    loss, tx, fresh, batch = work(*what)
    step = jax.jit(functools.partial(train_step, loss=loss, tx=tx), donate_argnums=0)
    return updater(lambda state: step(state, batch), fresh())


def spreading(repeats: int) -> dict[str, float]:
    """Time of a step spread over devices, as ratios to the bare step on one device with the same whole batch."""
    import jax

    from dlcourse.training import parallel
    from experiments.benchmark import interleave, median

    what = "wide_resnet,depth=10,widen=2", 64, 32
    counts = [n for n in (1, 2, 4, 8) if n <= jax.device_count()]
    tasks = {"bare": bare(*what)[0]}
    for mode in ("jit", "shard_map"):
        for count in counts:
            plan = parallel.create(mode, devices=jax.devices()[:count])
            tasks[f"{mode}_{count}"] = planned(plan, *what)[0]
    most = counts[-1]
    tasks[f"fsdp_{most}"] = planned(parallel.create(fsdp=most, devices=jax.devices()[:most]), *what)[0]
    times = interleave(repeats, {name: functools.partial(timed, name, task) for name, task in tasks.items()})
    alone = median(times.pop("bare"))
    return {f"spread/{name}_devices_step_ratio": median(seconds) / alone for name, seconds in times.items()}


def timed(name: str, task, count: int = 1) -> dict[str, float]:
    began = time.perf_counter()
    for _ in range(count):
        task()
    return {name: time.perf_counter() - began}


def saving(config: Config, name: str) -> tuple[dict[str, float], Claim]:
    """Seconds that a save takes from training, as longer time of the same steps with a save begun before them."""
    import jax
    import numpy as np

    from dlcourse.training import checkpoint, parallel
    from experiments.benchmark import interleave, ratio_interval

    update, state = planned(parallel.create(devices=jax.devices()[:1]), *SAVED[name])
    for _ in range(3):
        once = timed("step", update)["step"]
    count = max(2, round(config.window / once))
    with tempfile.TemporaryDirectory() as folder, checkpoint.Checkpoints(Path(folder)) as saved:

        def with_save():
            began = time.perf_counter()
            saved.save(state(), {})
            blocked = time.perf_counter() - began
            taken = timed("with", update, count)["with"]
            saved.wait()
            return {"with": blocked + taken, "blocked": blocked}

        times = interleave(config.repeats, {"with": with_save, "without": lambda: timed("without", update, count)})
    cost = np.array(times["with"]) - np.array(times["without"])
    low, high = ratio_interval(cost / 60)
    share = float(np.median(cost)) / 60
    metrics = {f"saving/{name}_step_seconds": float(np.median(times["without"])) / count,
               f"saving/{name}_blocked_seconds": float(np.median(times["blocked"])),
               f"saving/{name}_cost_seconds": float(np.median(cost)), f"saving/{name}_share_every_minute": share}
    return metrics, Claim(
        f"L16.saving_{name}", "How it revived",
        f"Saving {name} parameters with their optimizer state every minute takes at most 2 % of the time.",
        high <= 0.02, Evidence(share, 0.0, 0.02, (low, high), len(cost)),
        f"Time of {count} steps with a save begun before them, less that of as many without, in turns; over 60 s. "
        "The interval is that of the median difference (order statistics). The control is no saving at all.")


if __name__ == "__main__":
    command.run(main, Config, name="scaling")

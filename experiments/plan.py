"""Will it fit, how fast, how many chips? An experiment's exact training step, compiled for chips that are not here.

    launch/plan --topology=v5e:4x4 classification --flagfile=experiments/presets/imagenet_resnet50.flags
    launch/plan --topology=v5e:2x2,v5e:16x16,v6e:4x4 --per_chip_batch=64,128 --hours=5 --price=1.2 classification ...

The flags of the plan come first, then the experiment and its flags, as launch/local takes them. For TPUs (v4, v5e, v5p,
v6e, up to 256 chips) the real compiler runs, here, without a TPU; it is brought on first use into a folder of its own.
For GPUs (h100:8, a100:8, h200:8) the step is lowered and bounded by the data sheet, which is said beside each figure.
The step is compiled once for each topology and batch size: ResNet-50 takes some two minutes on 2 CPU cores.
--dry-run prints what would be done.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time

from dlcourse.contracts import InputError
from dlcourse.planning import hardware, libtpu
from experiments import command, settings


@dataclasses.dataclass(frozen=True)
class Config:
    topology: str = settings.setting("v5e:4x4", "chips to plan for, such as v5e:4x4 or v5p:2x2x4, h100:8; several, "
                                     "separated by commas, are compared")
    per_chip_batch: str = settings.setting("", "images a chip in a step, such as 64,128; empty divides the "
                                           "experiment's own batch over the chips")
    classes: int = settings.setting(0, "classes of data that is not here; 0 asks the data")
    examples: int = settings.setting(0, "training images of data that is not here; 0 asks the data")
    hours: float = settings.setting(0.0, "how long training may take: says how many chips that needs")
    price: float = settings.setting(0.0, "of one chip for one hour, in any currency: says what training costs")
    command: str = settings.setting("", "the experiment and its flags, when not given as words")
    workdir: str = settings.setting("", "folder of the plan; default runs/plan/HASH")
    overwrite: bool = settings.setting(False, "compile again")

    def __post_init__(self):
        for name in ("classes", "examples", "hours", "price"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name}={getattr(self, name)}: must be 0 or greater")
        for text in self.topology.split(","):
            hardware.parse(text)


def main(config: Config, run) -> None:
    began = time.monotonic()
    if not config.command.split():
        raise InputError("no experiment to plan: launch/plan [--topology=v5e:4x4 ...] EXPERIMENT [--flag=value ...]")
    topologies = [hardware.parse(text) for text in config.topology.split(",")]
    if any(topology.chip.maker == "tpu" for topology in topologies):
        os.environ.update(libtpu.surroundings(libtpu.find()))
    os.environ["JAX_PLATFORMS"] = "cpu"  # this machine's own accelerator has no part in it
    from dlcourse.reporting import environment
    from experiments import plan_report, planned

    wanted = planned.from_words(shlex.split(config.command), config.classes, config.examples)
    rows = []
    for topology in topologies:
        for batch_size in planned.per_chip(topology, config.per_chip_batch, wanted):
            print(f"compiling for {topology.name}, {batch_size // topology.chips} images a chip", flush=True)
            rows.append(plan_report.Row(topology, planned.batched(wanted, batch_size),
                                        estimate_one(topology, planned.batched(wanted, batch_size))))
            print(rows[-1].line(), flush=True)
    tables = plan_report.tables(rows, config.hours, config.price)
    run.figure("speed", **plan_report.draw(rows))
    plan_report.show(tables)
    compiling = sum(row.estimate.compile_seconds for row in rows)
    run.finish(plan_report.metrics(rows), [], {"total": time.monotonic() - began, "compile": compiling, "train": 0.0},
               environment.describe(), tables=tables)


def estimate_one(topology, wanted):
    """The step of an experiment on one topology, as an Estimate."""
    import jax

    from dlcourse.planning import estimate
    from experiments import planned

    images = wanted.config.data.batch_size
    if topology.chip.maker == "tpu":
        step, state, batch = planned.step(wanted, estimate.devices(topology))
        return estimate.of_tpu(topology, lambda: step.jitted(state).lower(state, [batch]), planned.parts(state, batch),
                               images)
    if images % topology.chips:
        raise InputError(f"{images} images do not divide over {topology.name}: give --per_chip_batch")
    share = planned.batched(wanted, images // topology.chips)
    step, state, batch = planned.step(share, jax.devices()[:1])
    return estimate.of_gpu(topology, step.jitted(state), (state, [batch]), planned.parts(state, batch), images)


def words(argv: list[str]) -> list[str]:
    """Flags for the plan alone: the experiment and what follows it become --command."""
    place = next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv))
    return argv[:place] + ([f"--command={shlex.join(argv[place:])}"] if argv[place:] else [])


def dry_run(argv: list[str]) -> None:
    """Prints what would be run."""
    library = libtpu.folder() / "libtpu" / "libtpu.so"
    if not library.exists():
        print(shlex.join(libtpu.install_command(libtpu.folder())))
    surroundings = [f"{name}={value}" for name, value in libtpu.surroundings(library).items()]
    print(shlex.join(["env", *surroundings, sys.executable, "-m", "experiments.plan", *argv]))


if __name__ == "__main__":
    if "--dry-run" in sys.argv:
        sys.argv.remove("--dry-run")
        sys.exit(dry_run(sys.argv[1:]))
    sys.argv[1:] = words(sys.argv[1:])
    command.run(main, Config, name="plan")

"""Is our step quicker on a TPU than the same network written plainly? Both compiled by the TPU compiler in one run.

Lecture: uniform parallel operations on dense vectors are faster (L16).
ResNet-50 (SGD with momentum) and ViT-S/16 (AdamW), bfloat16, 128 images of 224 x 224 a chip, batch statistics over all
chips; the plain ones as the Flax examples write them (experiments/plain.py). No TPU is needed: what is compared are the
cycles that the compiler estimates, plus the bytes of what it gives no cycles for.

    python -m experiments.tpu_steps                  5 min on 2 CPU cores
"""

from __future__ import annotations

import dataclasses
import os
import time

from dlcourse.contracts import InputError
from dlcourse.planning import hardware, libtpu
from experiments import command, settings


@dataclasses.dataclass(frozen=True)
class Config:
    topology: str = settings.setting("v5e:2x2", "TPUs to compile for, one topology as launch/plan takes it")
    models: str = settings.setting("resnet50,vit_s", "networks to compare, of resnet50 and vit_s")
    per_chip_batch: int = settings.setting(128, "images a chip in a step")
    workdir: str = settings.setting("", "folder of the run; default runs/tpu_steps/HASH")
    overwrite: bool = settings.setting(False, "compile again")

    def __post_init__(self):
        if hardware.parse(self.topology).chip.maker != "tpu":
            raise InputError(f"--topology={self.topology}: name TPUs, such as v5e:2x2")
        if self.per_chip_batch < 1:
            raise InputError(f"--per_chip_batch={self.per_chip_batch}: must be at least 1")
        for name in self.models.split(","):
            if name not in ("resnet50", "vit_s"):
                raise InputError(f"--models={self.models}: {name!r} is neither resnet50 nor vit_s")


def main(config: Config, run) -> None:
    began = time.monotonic()
    topology = hardware.parse(config.topology)
    os.environ.update(libtpu.surroundings(libtpu.find()))
    from dlcourse.reporting import environment

    metrics, compiling = {}, 0.0
    for name in config.models.split(","):
        both = {"plain": plain(name, topology, config), "ours": ours(name, topology, config)}
        for which, found in both.items():
            compiling += found.compile_seconds
            metrics |= {f"{which}/{name}_images_per_second_chip": found.images_per_second,
                        f"{which}/{name}_cycles": float(found.cycles),
                        f"{which}/{name}_unpriced_bytes": float(sum(size for _, size in found.unpriced.values()))}
        metrics[f"{name}/speed_ratio"] = both["plain"].seconds / both["ours"].seconds
        metrics[f"{name}/cycles_ratio"] = both["plain"].cycles / both["ours"].cycles
    run.finish(metrics, [], {"total": time.monotonic() - began, "compile": compiling, "train": 0.0},
               environment.describe())


def plain(name: str, topology, config: Config):
    """The Estimate of the plain step."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from dlcourse.planning import estimate
    from experiments import plain as written

    mesh = Mesh(np.array(estimate.devices(topology)), ("data",))
    whole, spread = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    update, start = written.step(name)
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), start)
    rows = config.per_chip_batch * topology.chips
    batch = {"image": jax.ShapeDtypeStruct((rows, 224, 224, 3), jnp.float32, sharding=spread),
             "label": jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=spread)}
    step = jax.jit(update, donate_argnums=0, out_shardings=whole)
    return estimate.of_tpu(topology, lambda: step.lower(state, batch), {"state": state, "batch": batch}, rows)


def ours(name: str, topology, config: Config):
    """The Estimate of the step that `classification` trains by, without augmentation, which the plain one has not."""
    from experiments import plan, planned

    rule = "nesterov --weight_decay=1e-4" if name == "resnet50" else "adamw --weight_decay=0.1"
    words = f"classification --dataset=fake:224x224x3,1000 --augment= --model={name} --dtype=bfloat16 " \
            f"--optimizer={rule} --batch_size={config.per_chip_batch * topology.chips}"
    return plan.estimate_one(topology, planned.from_words(words.split(), 0, 0))


if __name__ == "__main__":
    command.run(main, Config, name="tpu_steps")

"""Is our step quicker on a TPU than the same network written plainly? Both compiled by the TPU compiler in one run.

Lecture: uniform parallel operations on dense vectors are faster (L16).
ResNet-50 (SGD with momentum) and ViT-S/16 (AdamW), bfloat16, 128 images of 224 x 224 a chip, batch statistics over all
chips; the plain ones as the Flax examples write them (experiments/plain.py). No TPU is needed: what is compared are the
cycles that the compiler estimates, plus the bytes of what it gives no cycles for. Ours is compiled for more chips, too:
with as many images a chip, the time of a step should stay.

    python -m experiments.tpu_steps                  some 10 min on 2 CPU cores
"""

from __future__ import annotations

import dataclasses
import os
import time

from dlcourse.contracts import Claim, Evidence, InputError
from dlcourse.planning import hardware, libtpu
from experiments import command, settings


@dataclasses.dataclass(frozen=True)
class Config:
    topology: str = settings.setting("v5e:2x2,v5e:16x16", "TPUs to compile for, as launch/plan takes them: both steps "
                                     "for the first, ours for the others")
    models: str = settings.setting("resnet50,vit_s", "networks to compare, of resnet50 and vit_s")
    per_chip_batch: int = settings.setting(128, "images a chip in a step")
    workdir: str = settings.setting("", "folder of the run; default runs/tpu_steps/HASH")
    overwrite: bool = settings.setting(False, "compile again")

    def __post_init__(self):
        if any(hardware.parse(text).chip.maker != "tpu" for text in self.topology.split(",")):
            raise InputError(f"--topology={self.topology}: name TPUs, such as v5e:2x2")
        if self.per_chip_batch < 1:
            raise InputError(f"--per_chip_batch={self.per_chip_batch}: must be at least 1")
        for name in self.models.split(","):
            if name not in ("resnet50", "vit_s"):
                raise InputError(f"--models={self.models}: {name!r} is neither resnet50 nor vit_s")


def main(config: Config, run) -> None:
    began = time.monotonic()
    topology, *others = map(hardware.parse, config.topology.split(","))
    os.environ.update(libtpu.surroundings(libtpu.find()))
    os.environ["JAX_PLATFORMS"] = "cpu"  # this machine's own accelerator has no part in it
    from dlcourse.reporting import environment

    metrics, claims, compiling = {}, [], 0.0
    for name in config.models.split(","):
        found = {"plain": plain(name, topology, config), "ours": ours(name, topology, config)}
        spread = {other.chips: ours(name, other, config) for other in others}
        compiling += sum(one.compile_seconds for one in [*found.values(), *spread.values()])
        for which, one in found.items():
            metrics |= {f"{which}/{name}_images_per_second_chip": one.images_per_second,
                        f"{which}/{name}_cycles": float(one.cycles),
                        f"{which}/{name}_unpriced_bytes": float(sum(size for _, size in one.unpriced.values()))}
        metrics[f"{name}/cycles_ratio"] = found["plain"].cycles / found["ours"].cycles
        metrics[f"{name}/speed_ratio"] = speed = found["plain"].seconds / found["ours"].seconds
        times = {chips: one.seconds / found["ours"].seconds for chips, one in spread.items()}
        metrics |= {f"{name}/step_ratio_{chips}_chips": ratio for chips, ratio in times.items()}
        claims.append(quicker(name, speed))
        claims += [flat(name, topology.chips, chips, ratio) for chips, ratio in times.items()]
    run.finish(metrics, claims, {"total": time.monotonic() - began, "compile": compiling, "train": 0.0},
               environment.describe())


CAVEAT = "The TPU compiler's estimate, which is the same at every run: no interval. No TPU took part."


def quicker(name: str, ratio: float) -> Claim:
    """The speed of our step against that of the plain one."""
    return Claim(f"L16.tpu_{name}", "How it revived", f"Compiled for a TPU, our step of {name} is no slower than "
                 "the same network as the Flax examples write it.", ratio >= 1,
                 Evidence(ratio, 1.0, 1.0, (ratio, ratio), 1), f"Images a second, ours / plain. {CAVEAT}")


def flat(name: str, few: int, many: int, ratio: float) -> Claim:
    """The time of our step on many chips against that on few."""
    return Claim(f"L16.tpu_{name}_{many}", "How it revived", f"With as many images a chip, a step of {name} takes "
                 f"within 3 % as long on {many} chips as on {few}.", abs(ratio - 1) <= 0.03,
                 Evidence(ratio, 1.0, 1.03, (ratio, ratio), 1), f"Time, {many} / {few} chips. {CAVEAT} Collectives "
                 "count by their bytes over the links, without latency.")


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

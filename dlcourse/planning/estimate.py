"""A step compiled for chips that are not here, and what that says of its time and memory."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax

from dlcourse.models import layers
from dlcourse.planning import program
from dlcourse.planning.hardware import Topology

LEFT_OUT = ("reading and moving data to the chips, the host, the start of programs, checkpoints and evaluations",
            "waiting between operations, and for copies between memories that computing does not hide",
            "latency of collectives, which are counted by their bytes over the links alone")
"""What no estimate here contains: a real step takes longer."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one training step on one chip.

    Attributes:
      topology: as it was named.
      chips: in it.
      images: in a step, of one chip.
      source: "compiler" (cycles of the TPU compiler) or "roofline" (data sheet alone, a lower bound).
      seconds: of the step: computing, plus collectives where they are known.
      collective_seconds: the part of it that bytes over the links take, were they never hidden.
      flops: operations of the step as the compiler, or XLA before it compiles, counts them.
      memory: bytes by what holds them: parameters, optimizer, batch, activations, program.
      capacity: bytes that the chip has.
      cycles: the compiler's estimate, 0 for a roofline.
      collectives: operation -> (how many, bytes).
      unpriced: operation -> (how many, bytes) that the compiler gives no cycles for; counted by their bytes.
      compile_seconds: how long the compiler took here.
      refused: what the compiler said, where the step does not fit.
    """

    topology: str
    chips: int
    images: float
    source: str
    capacity: float
    seconds: float = 0.0
    collective_seconds: float = 0.0
    flops: float = 0.0
    memory: dict[str, float] = dataclasses.field(default_factory=dict)
    cycles: int = 0
    collectives: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    unpriced: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    compile_seconds: float = 0.0
    refused: str = ""

    @property
    def fits(self) -> bool:
        return not self.refused and sum(self.memory.values()) <= self.capacity

    @property
    def images_per_second(self) -> float:
        """Of one chip; 0 where the step does not fit."""
        return self.images / self.seconds if self.seconds else 0.0


def devices(topology: Topology) -> list[Any]:
    """Stand-ins for the devices of a TPU topology; `libtpu.surroundings` must have been set before JAX was imported."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(topology_name=topology.name, platform="tpu").devices


def of_tpu(topology: Topology, lower: Callable[[], Any], parts: dict[str, Any], images: int) -> Estimate:
    """Compiles for a TPU.

    Args:
      topology: of TPUs.
      lower: () -> the step, lowered for that topology's devices.
      parts: name -> abstract arrays with shardings, of what the step is given: parameters, optimizer, batch.
      images: in a step, on all chips.
    """
    chip, began = topology.chip, time.monotonic()
    plain = Estimate(topology.name, topology.chips, images / topology.chips, "compiler", chip.memory)
    try:
        with layers.compiled_for("tpu"):
            compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return dataclasses.replace(plain, refused=_out_of_memory(error), compile_seconds=time.monotonic() - began)
    here, found = len(devices(topology)) // topology.chips, program.read(compiled.as_text())
    links = sum(_over_links(name, size, topology.chips) for name, (_, size) in found.collectives.items()) / chip.links
    unpriced = sum(size for _, size in found.unpriced.values()) * here / chip.bandwidth
    used = compiled.memory_analysis()
    memory = {name: here * _held(tree) for name, tree in parts.items()}
    memory["activations"] = here * float(used.temp_size_in_bytes)
    memory["program"] = float(used.generated_code_size_in_bytes)
    return dataclasses.replace(
        plain, seconds=found.cycles / chip.clock + unpriced + links, collective_seconds=links,
        flops=here * compiled.cost_analysis()["flops"], memory=memory, cycles=found.cycles,
        collectives=found.collectives, unpriced=found.unpriced, compile_seconds=time.monotonic() - began)


def of_gpu(topology: Topology, step: Callable, arguments: tuple, parts: dict[str, Any], images: int) -> Estimate:
    """Lowers for CUDA, and bounds the step by the data sheet: nothing compiles for a GPU that is not here.

    The time is the longer of operations / peak and (parameters and optimizer, read and written once) / bandwidth. No
    program can be quicker; real ones are slower, since activations move too. Memory is without activations.

    Args:
      topology: of GPUs.
      step: the step of one chip's share of the batch, a jitted function.
      arguments: of it, abstract.
      parts: as for `of_tpu`, of one chip.
      images: in a step, on all chips.
    """
    chip, began = topology.chip, time.monotonic()
    jax.export.export(step, platforms=["cuda"])(*arguments)
    flops = float(step.lower(*arguments).cost_analysis()["flops"])
    memory = {name: _held(tree) for name, tree in parts.items()}
    moved = 2 * (memory.get("parameters", 0) + memory.get("optimizer", 0))
    links = _over_links("all-reduce", memory.get("parameters", 0), topology.chips) / chip.links
    return Estimate(topology.name, topology.chips, images / topology.chips, "roofline", chip.memory,
                    max(flops / chip.flops, moved / chip.bandwidth) + links, links, flops, memory,
                    compile_seconds=time.monotonic() - began)


def _over_links(name: str, size: float, chips: int) -> float:
    """Bytes that a chip sends in the best known algorithms (Thakur et al. 2005): an all-reduce twice (n - 1) / n."""
    return (2 if name == "all-reduce" else 1) * size * (chips - 1) / chips


def _held(tree: Any) -> float:
    """Bytes that one device holds of these abstract arrays."""
    def held(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return 0
        shape = leaf.sharding.shard_shape(leaf.shape) if getattr(leaf, "sharding", None) else leaf.shape
        return jax.numpy.dtype(leaf.dtype).itemsize * int(jax.numpy.prod(jax.numpy.array(shape or (1,))))

    return float(sum(held(leaf) for leaf in jax.tree.leaves(tree)))


def _out_of_memory(error: Exception) -> str:
    """What the compiler says of a program that does not fit, in one line; any other error goes on."""
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        raise error
    said = re.search(r"Used [\d.]+[KMGT]? of [\d.]+[KMGT]? hbm", text)
    return said[0] if said else text[:160]

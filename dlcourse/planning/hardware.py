"""Chips and the shapes they are sold in, from their makers' data sheets."""

from __future__ import annotations

import dataclasses
import difflib
import math

from dlcourse.contracts import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: as users write it.
      maker: "tpu", whose compiler runs anywhere, or "cuda", of which only the data sheet is used.
      flops: bfloat16 operations a second, dense.
      memory: bytes of HBM.
      bandwidth: bytes a second from and to it.
      links: bytes a second to the other chips, all links together, both ways.
      clock: cycles a second of the matrix units, for TPUs: flops / (operations a cycle).
      accelerator: what libtpu wants in TPU_ACCELERATOR_TYPE.
    """

    name: str
    maker: str
    flops: float
    memory: float
    bandwidth: float
    links: float
    clock: float = 0.0
    accelerator: str = ""


CHIPS = {chip.name: chip for chip in (
    Chip("v4", "tpu", 275e12, 32 * 2**30, 1228e9, 300e9, 275e12 / 2**18, "v4-8"),
    Chip("v5e", "tpu", 197e12, 16 * 2**30, 819e9, 200e9, 197e12 / 2**17, "v5litepod-4"),
    Chip("v5p", "tpu", 459e12, 95 * 2**30, 2765e9, 600e9, 459e12 / 2**18, "v5p-8"),
    Chip("v6e", "tpu", 918e12, 32 * 2**30, 1640e9, 448e9, 918e12 / 2**19, "v6e-4"),
    Chip("a100", "cuda", 312e12, 80e9, 2039e9, 600e9),
    Chip("h100", "cuda", 989e12, 80e9, 3350e9, 900e9),
    Chip("h200", "cuda", 989e12, 141e9, 4800e9, 900e9),
)}
"""cloud.google.com/tpu/docs (v4, v5e, v5p, v6e) and NVIDIA's data sheets (SXM boards, without sparsity). A TPU's
operations a cycle: two for each cell of its matrix units, 4 of 128 x 128 a v5e, twice that a v4 and a v5p, 4 of
256 x 256 a v6e; a product of two 4096 x 4096 matrices is compiled to 87 to 97 % of it."""

FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
SHAPES = {"v4": CUBIC, "v5e": FLAT, "v5p": CUBIC, "v6e": FLAT}
"""Shapes of up to 256 chips that can be rented."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """`chips` of a kind; `name` is as it was given."""

    name: str
    chip: Chip
    chips: int


def parse(text: str) -> Topology:
    """A topology from its name: v5e:4x4, v5p:2x2x4, h100:8.

    Raises:
      InputError: no such chip or shape, naming those there are.
    """
    kind, _, shape = text.strip().partition(":")
    if kind == "cuda":
        kind = "h100"
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"--topology={text}: no such chip; {hint}There are "
                         + ", ".join(f"{name}:{SHAPES[name][2] if name in SHAPES else 'N'}" for name in CHIPS))
    if kind in SHAPES:
        if shape not in SHAPES[kind]:
            raise InputError(f"--topology={text}: {kind} comes as {', '.join(SHAPES[kind])}")
        return Topology(f"{kind}:{shape}", CHIPS[kind], math.prod(map(int, shape.split("x"))))
    if not shape.isdigit() or not 1 <= int(shape) <= 1024:
        raise InputError(f"--topology={text}: give the number of GPUs, 1 to 1024, such as {kind}:8")
    return Topology(f"{kind}:{shape}", CHIPS[kind], int(shape))


def smallest(chip: Chip, needed: float) -> int | None:
    """The fewest chips, at least `needed`, that can be rented together; None where there are not so many."""
    sizes = [math.prod(map(int, shape.split("x"))) for shape in SHAPES[chip.name]] if chip.name in SHAPES else \
        [2**i for i in range(9)]
    return next((size for size in sizes if size >= needed), None)

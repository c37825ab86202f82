"""What a compiled TPU program says of itself: cycles, collectives, and what it leaves unsaid."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
         "s64": 8, "u64": 8}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "copy-start", "copy-done",
        "slice-start", "slice-done", "async-start", "async-done", "custom-call", "after-all", "opt-barrier"}
"""Operations that take no time of their own: names for what is there, and copies made while others compute."""

_ARRAY = re.compile(r"\b(" + "|".join(BYTES) + r")\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<kind>[a-z][\w-]*)\(", re.M)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"\b(?:body|calls|to_apply|branch_computations)=\{?%?([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Program:
    """Of one device, in one run of the program.

    Attributes:
      cycles: the compiler's estimates, added up.
      kinds: cycles by the name that the compiler gives to operations of a sort, largest first.
      collectives: operation -> (how many, bytes they carry).
      unpriced: operation -> (how many, bytes read and written) where the compiler makes no estimate.
    """

    cycles: int
    kinds: dict[str, int]
    collectives: dict[str, tuple[int, int]]
    unpriced: dict[str, tuple[int, int]]


def size(type_text: str) -> int:
    """Bytes of the arrays that a type such as `(f32[64]{0}, bf16[8,2])` names."""
    arrays = _ARRAY.findall(type_text)
    return sum(BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in arrays)


def read(text: str) -> Program:
    """A Program from the text of a compiled module, `compiled.as_text()`.

    A loop's body counts as often as the compiler knows it to run.
    """
    bodies = {match[1]: match[2] for match in re.finditer(r"^(?:ENTRY )?%?([\w.-]+) \(.*?\) -> .*?\{\n(.*?)^\}", text,
                                                          re.M | re.S)}
    entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.M)
    kinds: collections.Counter = collections.Counter()
    tallies: dict[str, dict[str, list[int]]] = {"collectives": {}, "unpriced": {}}
    if entry:
        _walk(bodies, entry[1], 1, kinds, tallies)
    found = {name: {kind: tuple(pair) for kind, pair in tally.items()} for name, tally in tallies.items()}
    return Program(sum(kinds.values()), dict(kinds.most_common()), **found)


def _walk(bodies, name, times, kinds, tallies) -> None:
    types = {}
    for line in bodies.get(name, "").splitlines():
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        types[match["name"]] = match["type"]
        kind, cycles = match["kind"], _CYCLES.search(line)
        if kind in ("while", "call", "conditional"):
            trips = _TRIPS.search(line)
            for called in _CALLED.findall(line):
                _walk(bodies, called, times * int(trips[1] if trips else 1), kinds, tallies)
        elif cycles:
            kinds[re.sub(r"[.\d]+$", "", match["name"])] += times * int(cycles[1])
        elif kind.removesuffix("-start") in COLLECTIVES:
            started = kind.endswith("-start")  # its type names what goes in beside what comes out
            _count(tallies["collectives"], kind.removesuffix("-start"), times, size(match["type"]) // (1 + started))
        elif kind not in FREE and kind.removesuffix("-done") not in COLLECTIVES:
            operands = re.findall(r"%([\w.-]+)", line[match.end():].split(")")[0])
            moved = size(match["type"]) + sum(size(types.get(operand, "")) for operand in operands)
            _count(tallies["unpriced"], kind, times, moved)


def _count(tally, kind, times, moved) -> None:
    pair = tally.setdefault(kind, [0, 0])
    pair[0] += times
    pair[1] += times * moved

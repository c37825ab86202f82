"""Estimates as people read them: a line, tables, a figure."""

from __future__ import annotations

import dataclasses

from dlcourse.planning import hardware
from dlcourse.planning.estimate import LEFT_OUT, Estimate
from dlcourse.planning.hardware import Topology
from dlcourse.reporting import figures
from experiments.planned import Planned

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Row:
    """One topology and batch size."""

    topology: Topology
    planned: Planned
    estimate: Estimate

    @property
    def name(self) -> str:
        return f"{self.topology.name}/{self.estimate.images:g}"

    @property
    def share(self) -> float:
        """Of the chip's peak, by the operations of the network as they are usually counted."""
        return self.estimate.images_per_second * self.planned.flops() / self.topology.chip.flops

    def hours(self) -> float | None:
        images, each = self.planned.images(), self.estimate.images_per_second
        return images / each / self.topology.chips / 3600 if images and each else None

    def chips_for(self, hours: float) -> int | None:
        """The fewest chips of this kind that train within so many hours, at this row's speed a chip."""
        alone = self.hours()
        return hardware.smallest(self.topology.chip, alone * self.topology.chips / hours) if alone else None

    def line(self) -> str:
        found = self.estimate
        used = f"{sum(found.memory.values()) / GIB:.2f} of {found.capacity / GIB:.4g} GiB"
        if not found.fits:
            return f"{self.name}: does not fit ({found.refused or used}); fewer images a chip, --accumulate or --fsdp"
        bound = "at best (data sheet), " if found.source == "roofline" else ""
        return (f"{self.name}: {bound}{_ms(found.seconds)} ms a step, {found.images_per_second:.0f} images/s/chip, "
                f"{100 * self.share:.1f} % of peak, {used}")


def tables(rows: list[Row], hours: float, price: float) -> list[dict]:
    """Speed, memory and, where the length of the run is known, its hours, chips and cost."""
    made = [_speed(rows), _memory(rows)]
    if any(row.hours() for row in rows):
        made.append(_length(rows, hours, price))
    return made


def _speed(rows):
    header = ["topology/images a chip", "from", "ms a step", "images/s/chip", "images/s", "% of peak",
              "TFLOP counted / compiled", "collectives", "their ms", "compiled in s"]
    lines = []
    for row in rows:
        found = row.estimate
        counted = row.planned.flops() * found.images
        lines.append([row.name, found.source, _ms(found.seconds), f"{found.images_per_second:.0f}",
                      f"{found.images_per_second * found.chips:.0f}", f"{100 * row.share:.1f}",
                      f"{counted / 1e12:.3g} / {found.flops / 1e12:.3g}",
                      ", ".join(f"{count} {kind} {size / 2**20:.1f} MiB" for kind, (count, size)
                                in found.collectives.items()) or "–",
                      _ms(found.collective_seconds), f"{found.compile_seconds:.0f}"] if found.fits
                     else [row.name, found.source, "does not fit", *["–"] * 6, f"{found.compile_seconds:.0f}"])
    return {"title": "Speed", "header": header, "rows": lines, "note": _note(rows)}


def _note(rows):
    chips = {row.topology.chip.name: row.topology.chip for row in rows}.values()
    clocks = ", ".join(f"{chip.name} {chip.clock / 1e9:.2f} GHz" for chip in chips if chip.clock)
    unpriced = sorted({kind for row in rows for kind, (_, size) in row.estimate.unpriced.items() if size > 2**20})
    words = [f"compiler: the cycles that the TPU compiler estimates, at {clocks}" if clocks else "",
             f"what it gives no cycles for ({', '.join(unpriced)}) counts by its bytes" if unpriced else "",
             "roofline: a bound from the data sheet, nothing was compiled"
             if any(row.estimate.source == "roofline" for row in rows) else "",
             "collectives are added by their bytes over the links, as if nothing hid them",
             "peak: operations of the network, three times those of classifying, against the chip's bfloat16 peak",
             f"left out: {'; '.join(LEFT_OUT)}"]
    return ". ".join(word[0].upper() + word[1:] for word in words if word) + "."


def _memory(rows):
    names = list(dict.fromkeys(name for row in rows for name in row.estimate.memory))
    lines = []
    for row in rows:
        found = row.estimate
        verdict = "yes" if found.fits else f"no: {found.refused}" if found.refused else "no"
        if found.source == "roofline":
            verdict += ", without activations"
        lines.append([row.name, *(f"{found.memory.get(name, 0) / GIB:.3f}" if found.memory else "–" for name in names),
                      f"{sum(found.memory.values()) / GIB:.3f}" if found.memory else "–",
                      f"{found.capacity / GIB:.4g}", verdict])
    return {"title": "Memory of one chip, in GiB", "rows": lines,
            "header": ["topology/images a chip", *names, "in all", "capacity", "fits"],
            "note": "The state is updated in place. Activations: all that the program holds beside what it is given."}


def _length(rows, hours, price):
    header = ["topology/images a chip", "hours"] + ["cost"] * bool(price) + ["chips within hours"] * bool(hours)
    header += ["their cost"] * bool(hours and price)
    lines = []
    for row in rows:
        alone = row.hours()
        if not alone:
            lines.append([row.name, *["–"] * (len(header) - 1)])
            continue
        line = [row.name, f"{alone:.3g}"] + [f"{alone * row.topology.chips * price:.2f}"] * bool(price)
        if hours:
            chips = row.chips_for(hours)
            line.append(str(chips) if chips else "more than can be rented together")
            line += [f"{alone * row.topology.chips * price:.2f}" if chips else "–"] * bool(price)
        lines.append(line)
    images = rows[0].planned.images()
    note = (f"Training alone, {images:.4g} images. Another number of chips is taken to be as quick a chip as the "
            "row's, with as many images a chip: an assumption, which a row for that topology would check.")
    return {"title": f"How long{f', and chips for {hours:g} h' if hours else ''}", "header": header, "rows": lines,
            "note": note}


def metrics(rows: list[Row]) -> dict[str, float]:
    """`topology/images a chip/quantity`, as kept in result.json."""
    found = {}
    for row in rows:
        one = row.estimate
        found[f"{row.name}/fits"] = float(one.fits)
        if one.fits:
            found |= {f"{row.name}/step_ms": 1e3 * one.seconds,
                      f"{row.name}/images_per_second_chip": one.images_per_second,
                      f"{row.name}/share_of_peak": row.share, f"{row.name}/memory_gib": sum(one.memory.values()) / GIB,
                      f"{row.name}/cycles": float(one.cycles), f"{row.name}/compiled_flops": one.flops,
                      f"{row.name}/collective_bytes": float(sum(size for _, size in one.collectives.values())),
                      f"{row.name}/unpriced_bytes": float(sum(size for _, size in one.unpriced.values())),
                      f"{row.name}/compile_seconds": one.compile_seconds}
            if hours := row.hours():
                found[f"{row.name}/hours"] = hours
    return found


@figures.styled
def draw(rows: list[Row]) -> figures.Drawing:
    """Images a second of all chips, by their number; a line a kind of chip and batch size."""
    fig = figures.Figure(figsize=(4.6, 3))
    ax = fig.subplots()
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.estimate.fits:
            lines.setdefault(f"{row.topology.chip.name}, {row.estimate.images:g} a chip", []).append(row)
    for name, members in lines.items():
        members.sort(key=lambda row: row.topology.chips)
        ax.plot([row.topology.chips for row in members],
                [row.estimate.images_per_second * row.topology.chips for row in members], "o-", label=name)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set(xlabel="chips", ylabel="images a second")
    if lines:
        ax.legend()
    said = "; ".join(row.line() for row in rows)
    return figures.Drawing(fig=fig, caption="How fast the step would be.", alt=f"Images a second by chips. {said}.",
                           how=_note(rows))


def show(made: list[dict]) -> None:
    """Prints tables in columns."""
    for table in made:
        print(f"\n{table['title']}")
        cells = [table["header"], *table["rows"]]
        widths = [max(len(str(row[i])) for row in cells) for i in range(len(table["header"]))]
        for row in cells:
            print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        print(table["note"])


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"

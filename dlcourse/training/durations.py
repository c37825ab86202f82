"""Durations carry their unit: `10epochs`, `2000steps`, `50000examples`, `5minutes`."""

from __future__ import annotations

import dataclasses
import math
import re

from dlcourse.contracts import InputError

UNITS = ("epochs", "steps", "examples", "minutes")


@dataclasses.dataclass(frozen=True)
class Duration:
    """`value` of `unit`, one of `UNITS`."""

    value: float
    unit: str

    def steps(self, batch_size: int, num_examples: int) -> int | None:
        """Training steps that last at least this long: ceil(examples / batch_size).

        Args:
          batch_size: B, examples in a step.
          num_examples: N, examples in an epoch.

        Returns:
          A number of steps, or None for minutes, which only a clock can tell.
        """
        if self.unit == "minutes":
            return None
        if self.unit == "steps":
            return math.ceil(self.value)
        examples = self.value * num_examples if self.unit == "epochs" else self.value
        return math.ceil(round(examples / batch_size, 9))  # 0.1 * 30 epochs is 3, not 3.0000000000000004

    def __str__(self) -> str:
        return f"{self.value:g}{self.unit}"


def parse(text: str, flag: str = "") -> Duration:
    """A duration from its text; a unit may be in the singular, and epochs and minutes may be fractions.

    Args:
      text: such as "10epochs", "2000steps", "50000examples", "0.5minutes".
      flag: the flag it was given to, for the message.

    Returns:
      The duration, not negative.

    Raises:
      InputError: where the number or the unit is missing or unknown.
    """
    given = f"--{flag}={text}" if flag else repr(text)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]+)\s*", text)
    unit = match and next((unit for unit in UNITS if match[2] in (unit, unit[:-1])), None)
    if not unit:
        raise InputError(f"{given}: a duration is a number with a unit: 10epochs, 2000steps, 50000examples or 5minutes")
    value = float(match[1])
    if unit in ("steps", "examples") and not value.is_integer():
        raise InputError(f"{given}: {unit} come whole")
    return Duration(value, unit)

"""What can be said against a config before any data is read: ranges, durations and contradictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dlcourse.contracts import InputError
from dlcourse.training import durations
from experiments import cluster

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "batch_size": (lambda v: v >= 1, "at least 1"),
    "image_size": (lambda v: v >= 0, "0 (as they are) or a number of pixels"),
    "validation_fraction": (lambda v: 0 < v <= 0.5, "in (0, 0.5]"),
    "learning_rate": (lambda v: v > 0, "greater than 0"),
    "weight_decay": (lambda v: v >= 0, "0 or greater"),
    "momentum": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "clip": (lambda v: v >= 0, "0 (never) or greater"),
    "ema": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "accumulate": (lambda v: v >= 1, "at least 1"),
    "label_smoothing": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "seed": (lambda v: 0 <= v < 2**32, "in [0, 2^32)"),
    "keep": (lambda v: v >= 1, "at least 1"),
    "fsdp": (lambda v: v >= 1, "at least 1"),
    "steps_per_dispatch": (lambda v: v >= 0, "0 (choose) or a number of steps"),
    "coordinator_timeout": (lambda v: v > 0, "greater than 0 seconds"),
}
DURATIONS = ("train_for", "eval_every", "checkpoint_every", "warmup", "profile")

MEANT_FOR = {"momentum": ("optimizer", ("sgd", "nesterov")), "label_smoothing": ("defence", ("none",)),
             "growth": ("defence", ("ibp", "crown_ibp")), "clean_weight": ("defence", ("ibp", "crown_ibp")),
             "noisy_copies": ("defence", ("gaussian",)),
             "defence_steps": ("defence", ("pgd", "trades", "mart")), "awp": ("defence", ("pgd", "trades", "mart"))}
"""A flag, and the values of another one without which it would be ignored."""


def check(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuses what cannot be meant.

    Args:
      values: every setting of the run by its name; those that an experiment lacks are not looked at.
      given: those that were typed or read from a flagfile: only they can be ignored against someone's will.

    Raises:
      InputError: naming the flag, its value and what is allowed.
    """
    for name, (allowed, words) in RANGES.items():
        if name in values and not allowed(values[name]):
            raise InputError(f"--{name}={values[name]}: must be {words}")
    times = {name: durations.parse(values[name], name) for name in DURATIONS if name in values}
    for name, duration in times.items():
        if duration.unit == "minutes" and name in ("eval_every", "profile"):
            raise InputError(f"--{name}={values[name]}: give it in epochs, steps or examples")
        untrained = name == "train_for" and values.get("init_from")  # what is there is judged as it is
        if duration.value == 0 and name not in ("warmup", "profile") and not untrained:
            raise InputError(f"--{name}={values[name]}: must be longer than nothing")
    for name, (other, choices) in MEANT_FOR.items():
        if name in given and other in values and values[other] not in choices:
            raise InputError(f"--{name}={given[name]} has no meaning for --{other}={values[other]}; leave it out or "
                             f"take {' or '.join(choices)}")
    if "coordinator" in values:
        cluster.check(values)
    if "optimizer" in values:
        _check_optimizer(values, given, times)


def _check_optimizer(values, given, times) -> None:
    schedule = values.get("schedule")
    if values.get("batch_size", 0) % values.get("accumulate", 1):
        raise InputError(f"--accumulate={values['accumulate']} does not divide --batch_size={values['batch_size']}; "
                         "its parts must be of one size")
    if schedule != "constant" and "train_for" in times and times["train_for"].unit == "minutes":
        raise InputError(f"--train_for={values['train_for']}: --schedule={schedule} must know the number of steps; "
                         "give epochs, steps or examples, or take --schedule=constant")
    if "warmup" in times:
        _check_warmup(values, schedule, times["warmup"], times.get("train_for"))


def _check_warmup(values, schedule, warmup, train_for) -> None:
    if warmup.unit == "minutes":
        raise InputError(f"--warmup={values['warmup']}: warm-up is counted in epochs, steps or examples")
    if schedule == "one_cycle" and warmup.value:
        raise InputError(f"--warmup={values['warmup']} contradicts --schedule=one_cycle, which warms up by itself; "
                         "leave it out or take --schedule=cosine")
    if train_for and train_for.value and warmup.unit == train_for.unit and warmup.value >= train_for.value:
        raise InputError(f"--warmup={values['warmup']} leaves nothing of --train_for={values['train_for']}")

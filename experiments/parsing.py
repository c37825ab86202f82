"""Flags from frozen dataclasses: one dataclass a concern, one flag a field.

Light on purpose: nothing here imports JAX, so that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import shutil
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from dlcourse.contracts import InputError

REPOSITORY = Path(__file__).resolve().parent.parent
PRESETS = "experiments/presets"


class _Integer(flags.ArgumentParser):
    def parse(self, argument):
        try:
            return int(argument)
        except ValueError:
            raise ValueError("a whole number is needed") from None


class _Float(flags.ArgumentParser):
    def parse(self, argument):
        try:
            value = float(argument)
        except ValueError:
            raise ValueError("a number is needed") from None
        if not math.isfinite(value):
            raise ValueError("a finite number is needed")
        return value


class _Boolean(flags.BooleanParser):
    def parse(self, argument):
        try:
            return super().parse(argument)
        except ValueError:
            raise ValueError("true or false is needed") from None


class _Choice(flags.ArgumentParser):
    def __init__(self, choices: tuple[str, ...]):
        self.choices = choices

    def parse(self, argument):
        if argument in self.choices:
            return argument
        raise ValueError(f"choose one of {', '.join(self.choices)}")


PARSERS = {int: _Integer, float: _Float, bool: _Boolean, str: flags.ArgumentParser}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a config: `concern` is the field that holds its dataclass, "" for the config itself."""

    concern: str
    name: str
    kind: Any
    default: Any
    help: str

    @property
    def choices(self) -> tuple[str, ...]:
        return typing.get_args(self.kind)


def settings_of(default) -> list[Setting]:
    """All settings of a config, in the order they are written; nested dataclasses are concerns."""
    found = list(_settings_of(default, ""))
    names = [setting.name for setting in found]
    if len(set(names)) < len(names):
        raise TypeError(f"{type(default).__name__} has two settings of one name: {sorted(names)}")
    return found


def _settings_of(config, concern: str) -> Iterator[Setting]:
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _settings_of(value, field.name)
        else:
            yield Setting(concern, field.name, kinds[field.name], value, field.metadata.get("help", ""))


def parse(default, argv: list[str]) -> tuple[Any, dict[str, Any]]:
    """A config from the words of a command line.

    A flag that is typed beats the same flag in a `--flagfile`, wherever it stands; among equals the last one wins.

    Args:
      default: the config that holds where no flag says otherwise.
      argv: the words after the command's name.

    Returns:
      The config, and the flags that were given (name -> value).

    Raises:
      InputError: on an unknown flag, a bad value, a positional argument or an unreadable flagfile.
    """
    found = settings_of(default)
    values = _define(found)
    try:
        rest = values(["", *expand_flagfiles(argv)])[1:]
    except flags.UnrecognizedFlagError as error:
        meant = nearest(error.flagname, [*(setting.name for setting in found), "flagfile", "help"])
        hint = f"did you mean --{meant}?" if meant else "--help lists all flags"
        raise InputError(f"unknown flag --{error.flagname}; {hint}") from None
    except (flags.Error, ValueError) as error:
        raise InputError(_one_line(error)) from None
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; settings are given as --flag=value")
    given = {setting.name: values[setting.name].value for setting in found if values[setting.name].present}
    return _replace(default, found, given), given


def _define(found: list[Setting]) -> flags.FlagValues:
    values = flags.FlagValues()
    values.set_gnu_getopt()  # a positional argument must not hide the flags behind it
    for setting in found:
        parser = _Choice(setting.choices) if setting.choices else PARSERS[setting.kind]()
        boolean = setting.kind is bool  # may be written --flag and --noflag
        flag = flags.Flag(parser, None, setting.name, setting.default, setting.help, boolean=boolean)
        flags.DEFINE_flag(flag, values)
    return values


def _replace(default, found: list[Setting], given: dict[str, Any]):
    """The default config with the given values put in, concern by concern."""
    concerns: dict[str, dict[str, Any]] = {}
    for setting in found:
        if setting.name in given:
            concerns.setdefault(setting.concern, {})[setting.name] = given[setting.name]
    changes = concerns.pop("", {})
    changes |= {name: dataclasses.replace(getattr(default, name), **values) for name, values in concerns.items()}
    return dataclasses.replace(default, **changes)


def expand_flagfiles(argv: list[str]) -> list[str]:
    """The words with each `--flagfile` read in place of itself, before all typed flags (so that those win)."""
    read, typed = [], []
    words = iter(argv)
    for word in words:
        name, equals, path = word.partition("=")
        if name in ("--flagfile", "-flagfile"):
            path = path if equals else next(words, "")
            read += _read_flagfile(path)
        else:
            typed.append(word)
    return read + typed


def _read_flagfile(path: str) -> list[str]:
    found = Path(path).expanduser()
    if not found.is_file() and path.startswith(PRESETS + "/"):
        found = REPOSITORY / path
    try:
        lines = found.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        presets = ", ".join(sorted(f"{PRESETS}/{p.name}" for p in (REPOSITORY / PRESETS).glob("*.flags")))
        raise InputError(f"--flagfile={path}: {reason}{'; presets: ' + presets if presets else ''}") from None
    words = [line.strip() for line in lines]
    for word in words:
        if word.lstrip("-").startswith("flagfile"):
            raise InputError(f"--flagfile={path}: a flagfile cannot hold another one ({word})")
    return [word for word in words if word and not word.startswith("#")]


def as_flags(given: dict[str, Any]) -> list[str]:
    """The given settings as they are typed: what a flagfile holds."""
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in given.items()]


def help_text(default, name: str, about: str) -> str:
    """All flags with their meaning and default, grouped by concern."""
    width = min(100, shutil.get_terminal_size().columns)
    lines = [about.strip(), "", f"usage: python -m experiments.{name} [--flag=value ...]   (launch/local {name} ...)"]
    concern = None
    for setting in settings_of(default):
        if setting.concern != concern:
            concern = setting.concern
            lines += ["", f"{concern or name}:"]
        lines.append(f"  --{setting.name}={'|'.join(setting.choices) or _kind_name(setting)}")
        shown = f"{setting.help} [{_show(setting.default)}]"
        lines += textwrap.wrap(shown, width - 8, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ["", "any experiment:",
              "  --flagfile=PATH", f"      read flags from a file, one a line, such as {PRESETS}/*.flags",
              "  --doctor", "      examine this machine, as launch/doctor does, and stop",
              "  --help", "      show this and stop"]
    return "\n".join(lines)


def _kind_name(setting: Setting) -> str:
    return {int: "INTEGER", float: "NUMBER", bool: "true|false", str: "TEXT"}[setting.kind]


def _show(default) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default) or "empty"


def nearest(name: str, known) -> str | None:
    """The known name that was probably meant; dashes, underscores and case do not count."""
    plain = {other.replace("_", ""): other for other in known}
    near = difflib.get_close_matches(name.lower().replace("_", "").replace("-", ""), plain, n=1)
    return plain[near[0]] if near else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).removeprefix("flag ")

"""YAML from dicts, lists, strings, numbers and truth values: enough for what launchers write, without a library."""

from __future__ import annotations

import json
import re


def dump(value, indent: int = 0) -> str:
    """The lines of a dict or list, indented by so many spaces."""
    space, lines = " " * indent, []
    if isinstance(value, dict):
        for key, inner in value.items():
            lines.append(f"{space}{scalar(key)}:{_after(inner, indent)}")
    else:
        for inner in value:
            if isinstance(inner, dict) and inner:
                lines.append(f"{space}- {dump(inner, indent + 2)[indent + 2:]}")
            else:
                lines.append(f"{space}-{_after(inner, indent)}")
    return "\n".join(lines)


def _after(value, indent: int) -> str:
    if isinstance(value, dict | list) and value:
        return "\n" + dump(value, indent + 2)
    if isinstance(value, str) and "\n" in value:
        return " |\n" + "\n".join(" " * (indent + 2) + line if line else "" for line in value.rstrip("\n").split("\n"))
    return f" {json.dumps(value) if isinstance(value, dict | list) else scalar(value)}"


def scalar(value) -> str:
    """A string is quoted wherever YAML could take it for something else."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z/][\w./-]*(://[\w./-]+)?", value):
        words = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
        return f'"{value}"' if value.lower() in words else value
    return json.dumps(value, ensure_ascii=False)

"""Files that are whole or absent: atomic writes, JSON without NaN, locks, errors in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dlcourse.contracts import InputError

LOCK = ".lock"


def plain(value: Any) -> Any:
    """Turns `value` into what JSON can say: arrays to lists, dataclasses to objects, non-finite numbers to None.

    Raises:
      TypeError: for anything that has no obvious JSON form.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as strict JSON: never NaN or Infinity, which other readers refuse."""
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all: a reader, or a crash, meets the old content or the new.

    Args:
      path: where; the temporary file lies beside it, since a rename is atomic only within a file system.
      content: the new content.

    Raises:
      OSError: what the file system said; the old file is untouched and no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def append_line(path: Path, line: str) -> None:
    """Adds one line; where the disk has no room for all of it, none of it stays.

    Raises:
      OSError: what the file system said.
    """
    data = line.encode() + b"\n"
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data):]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


def sync_lines(path: Path) -> int:
    """The number of lines in a file, 0 where there is none, once the disk itself holds them."""
    try:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            return file.read().count(b"\n")
    except FileNotFoundError:
        return 0


def read_json_lines(path: Path) -> list[dict]:
    """The objects of a file of one JSON object a line, up to the first line that a crash tore.

    Returns:
      A list, empty where the file is missing.
    """
    records = []
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n"):
                    break
                records.append(json.loads(line))
            except ValueError:
                break
    return records


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process; the system lets go of it however the process ends.

    Raises:
      InputError: another process holds it.
      OSError: the file system cannot lock.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise InputError(f"--workdir={folder} is in use by another run (process {holder}); "
                             "wait for it, or name another folder with --workdir") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def in_one_line(folder: Path) -> Iterator[None]:
    """Turns what a file system says against writing in `folder` into an InputError.

    Raises:
      InputError: for every OSError inside.
    """
    try:
        yield
    except OSError as error:
        where = error.filename if error.filename and not str(error.filename).endswith(".tmp") else folder
        raise InputError(f"--workdir={folder}: cannot write {where}: {error.strerror or error}; "
                         "make room or name another folder with --workdir") from error

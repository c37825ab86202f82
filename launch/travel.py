"""What travels to another machine: the checkout, and the folder of a run there and back."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

from command_line import ROOT

CHECKOUT = ("dlcourse", "experiments", "launch", "tests", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")


def pack_checkout(file: Path) -> None:
    """Writes the checkout as it is now, committed or not, to a .tar.gz with the one folder `checkout`."""

    def keep(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if "__pycache__" in entry.name else entry

    with tarfile.open(file, "w:gz") as archive:
        for name in CHECKOUT:
            if (ROOT / name).exists():
                archive.add((ROOT / name).resolve(), f"checkout/{name}", filter=keep)


def pack_run(folder: Path, file: Path) -> None:
    """Writes a run's folder to a .tar.gz; an empty archive where there is none."""
    with tarfile.open(file, "w:gz") as archive:
        if folder.is_dir():
            archive.add(folder, str(folder))


def unpack_run(file: Path, folder: Path) -> None:
    """Puts the run in `file` in the place of `folder`, whole or not at all: a fetch may break off at any moment."""
    fresh, old = folder.with_name(f".{folder.name}.fetched"), folder.with_name(f".{folder.name}.before")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with tarfile.open(file) as archive:
        archive.extractall(fresh, filter="data")
    if not (fresh / folder).is_dir():
        shutil.rmtree(fresh)
        return
    if folder.exists():
        os.rename(folder, old)
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.rename(fresh / folder, folder)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)

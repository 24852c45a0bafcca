"""Files and folders that no crash leaves half-written.

    write_json(partial / "manifest.json", manifest)     # flushed to disk
    flush_tree(partial)                                 # everything below it, names included
    put_in_place(partial, final)                        # whole under its name, or not at all

A file system may write a rename before the bytes that it names. So whatever gets a name here was
flushed before, and what had that name before goes last.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PARTIAL, REPLACED = ".tmp", ".replaced"
"""Endings of what is still being written, and of what its successor is taking the name of."""


def write_text(path: Path, text: str) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`write_text` of readable JSON. Raises ValueError for NaN and infinity, which JSON lacks."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Change a file as a whole: at any moment it holds the old text or the new one."""
    partial = path.with_name(path.name + PARTIAL)
    write_text(partial, text)
    put_in_place(partial, path)


def flush(path: Path) -> None:
    """Wait until the disk has a file's content, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Wait until the disk has a folder and everything below it."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def put_in_place(new: Path, final: Path, *, aside: Path | None = None) -> None:
    """Give a flushed file or folder its name. What had the name before goes last.

    A folder cannot be replaced in one call: the old one stands at `aside` (FINAL.replaced) for a
    moment, and for good if a crash comes just then; after that the next call removes it. Give an
    `aside` of its own where several processes may put the same folder in place.

    Raises FileExistsError when another process gave the folder's name away in between.
    """
    if not new.is_dir():
        new.replace(final)
        flush(final.parent)
        return
    aside = aside or final.with_name(final.name + REPLACED)
    if final.exists():
        if aside.exists():  # of a crash; without `final` it would be the only whole one
            shutil.rmtree(aside)
        final.rename(aside)
    claim_name(new, final)
    shutil.rmtree(aside, ignore_errors=True)  # a file still open elsewhere must not undo success


def claim_name(new: Path, final: Path) -> None:
    """Give a flushed folder a name that nothing has.

    Raises FileExistsError when something has it: of two processes exactly one gets a name.
    """
    try:
        new.rename(final)
    except OSError as error:
        if final.exists():
            raise FileExistsError(f"{final} exists already") from error
        raise
    flush(final.parent)

"""What shards are named by: their items and the code that converts them, in a form that is the same
in every process and on every machine."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = Path(__file__).resolve().parents[2]


def stable_form(item: Any) -> str:
    """One line of JSON that is the same in every process for equal items. Raises ValueError for
    what has no such form."""
    return json.dumps(item, sort_keys=True, separators=(",", ":"), default=_plain)


def code_fingerprint(convert: Callable[..., Any], about: list[Any]) -> str:
    """Of a function (or a functools.partial), its arguments, what it imports of this project, and
    whatever else decides the result."""
    arguments = []
    while isinstance(convert, functools.partial):
        arguments.append([convert.args, convert.keywords])
        convert = convert.func
    digest = hashlib.sha256()
    for path in sorted(sources_of(Path(inspect.getfile(convert)))):
        digest.update(path.read_bytes())
    digest.update(stable_form([about, convert.__qualname__, arguments]).encode())
    return digest.hexdigest()


def sources_of(path: Path, known: Iterable[Path] = ()) -> set[Path]:
    """A source file and what it imports of this project, directly or not."""
    found = {*known, path.resolve()}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            imported = PROJECT / f"{name.replace('.', '/')}.py"
            if imported not in found and imported.is_file():
                found |= sources_of(imported, found)
    return found


def _plain(value: Any) -> Any:
    """What json cannot write by itself, in plain types."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise ValueError(
        f"items and arguments of a converter are paths, strings, numbers and tuples, lists, dicts "
        f"or dataclasses of them; got {type(value).__name__}"
    )

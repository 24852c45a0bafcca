"""What shards are named by: their items, the code that converts them and the options it is given,
in a form that is the same in every process and on every machine.

Options are kept apart from code, because they end differently: a folder of other options is not
what the user asks for, a folder of older code is.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = Path(__file__).resolve().parents[2]

MAX_OPTION = 80
"""Characters of an option that a manifest quotes; of longer ones, such as tables, it keeps a
digest."""


def stable_form(item: Any) -> str:
    """One line of JSON that is the same in every process for equal items. Raises ValueError for
    what has no such form."""
    return json.dumps(item, sort_keys=True, separators=(",", ":"), default=_plain)


def code_fingerprint(convert: Callable[..., Any], about: list[Any]) -> str:
    """Of a function (or a functools.partial of one, see `options_of` for its arguments), what it
    imports of this project, and whatever else decides the result."""
    function = convert.func if isinstance(convert, functools.partial) else convert
    digest = hashlib.sha256()
    # Sorted and by content alone: the same checkout in another folder has the same fingerprint.
    for path in sorted(sources_of(Path(inspect.getfile(function)))):
        digest.update(path.read_bytes())
    # One module may hold two converters.
    digest.update(stable_form([about, function.__qualname__]).encode())
    return digest.hexdigest()


def options_of(convert: Callable[..., Any]) -> dict[str, str]:
    """The bound arguments of a functools.partial: name -> value as JSON; {} for a plain function.

    A NamedTuple counts as its fields. Of a path and of a long value only "#" and a digest is kept.
    """
    if not isinstance(convert, functools.partial):
        return {}
    bound = inspect.signature(convert.func).bind_partial(*convert.args, **convert.keywords)
    options: dict[str, str] = {}
    for argument, value in bound.arguments.items():
        parts = value._asdict() if hasattr(value, "_asdict") else {argument: value}
        for name, part in parts.items():
            is_text_path = isinstance(part, str) and os.path.isabs(part)
            if is_text_path or isinstance(part, os.PathLike):
                # Digests of paths, because manifests travel with the records and a path may name
                # a person or a hospital; absolute first, as its spelling does not matter.
                text = f"#{_digest(os.path.abspath(part))}"
            else:
                text = json.dumps(part, sort_keys=True, ensure_ascii=False, default=_without_paths)
                text = text if len(text) <= MAX_OPTION else f"#{_digest(text)}"
            options[name if name not in options else f"{argument}.{name}"] = text
    return options


def changed_options(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What to tell the user of options that differ."""
    return [
        f"{name} is another one"
        if before[name][0] == now[name][0] == "#"
        else f"{name} was {_quoted(before[name])}, is {_quoted(now[name])}"
        for name in now
        # What only one side knows came with another version of the code, which is told elsewhere.
        if name in before and before[name] != now[name]
    ]


def sources_of(path: Path, known: Iterable[Path] = ()) -> set[Path]:
    """A source file and what it imports of this project, directly or not."""
    found = {*known, path.resolve()}
    # Parsed and not imported: a module of optional packages must not be needed for its name.
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` names a file only as the two together.
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            module = PROJECT / name.replace(".", "/")
            for imported in (module.with_suffix(".py"), module / "__init__.py"):
                if imported not in found and imported.is_file():
                    found |= sources_of(imported, found)
    return found


def _without_paths(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return f"path {_digest(os.path.abspath(value))}"
    return _plain(value)


def _quoted(option: str) -> str:
    if option[0] == "#":
        return "a path or long value"
    return "none" if option == "null" else option


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
        # The order of a set of strings differs between processes.
        return sorted(value)
    raise ValueError(
        f"items and arguments of a converter are paths, strings, numbers and tuples, lists, dicts "
        f"or dataclasses of them; got {type(value).__name__}"
    )

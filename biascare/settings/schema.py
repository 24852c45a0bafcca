"""Plain values into a tree of frozen dataclasses: every problem at once, in a person's words.

    result = build(Config, tree)          # .value, .problems, .bad_keys
    rows = list(describe(Config))         # one KeyHelp per key, for --help

A dataclass field says everything about its key: the type, the default, and in its metadata the
`help` line and the `bounds` (`ge`, `gt`, `le`, `lt`). Pydantic finds what does not fit, in strict
mode; the words are ours, so that an error and `--help` describe a key alike.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import operator
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from biascare.choices import did_you_mean, nearest
from biascare.settings.strict_yaml import Location, Problem, Tree, dotted, show

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

UNSET = "???"
"""A value that a file leaves to its reader: reported as missing until it is set."""


class KeyHelp(NamedTuple):
    """One key for `--help`."""

    key: str
    type: str
    default: str
    help: str


@dataclass(frozen=True)
class Build(Generic[T]):
    """What `build` made, and what it found wrong.

    `value` is complete even where keys are bad (defaults stand in), so that checks across keys can
    still run on the good ones; None only where not even that could be built.
    """

    value: T | None
    problems: list[Problem]
    bad_keys: frozenset[str]


def describe(cls: type, prefix: Location = ()) -> Iterator[KeyHelp]:
    """Every key of a dataclass tree, in order of writing."""
    for item, hint in _typed_fields(cls):
        here = (*prefix, item.name)
        if is_dataclass(hint):
            yield from describe(hint, here)  # type: ignore[arg-type]
        else:
            default = "required" if _required(item) else json.dumps(item.default)
            text = type_text(hint, item.metadata["bounds"])
            yield KeyHelp(dotted(here), text, default, item.metadata["help"])


def build(cls: type[T], tree: Tree) -> Build[T]:
    """Check the plain values against the dataclass tree and make it.

    Every dataclass carries `__pydantic_config__` with `extra="forbid"` and `strict=True`. Validated
    as JSON: tuples come from lists, an integer may stand for a float, nothing else is converted.
    """
    from pydantic import TypeAdapter  # only here: nothing below the boundary needs it

    # Repairs are made in a copy, because messages show what was written.
    adapter, values = TypeAdapter(cls), copy.deepcopy(tree.values)
    found: dict[Location, Problem] = {}
    for _ in range(10):  # repairs of one kind uncover the next; a few rounds always settle it
        _add_sections(cls, values)
        # In turns: bounds can only be asked of values of the right type, and ??? has no type.
        findings = _unset(values) or _type_errors(adapter, values) or _out_of_bounds(cls, values)
        if not findings:
            value = adapter.validate_json(json.dumps(values))
            return Build(value, list(found.values()), frozenset(map(dotted, found)))
        for raw, kind in findings:
            # `data.ratio[1]` -> `data.ratio`: a tuple is judged as a whole.
            depth, item, hint = _lookup(cls, raw)
            location = raw[:depth] if item else raw
            # Once: what a repair brings up below a bad key is the repair's fault, not the person's.
            if not any(location[:end] in found for end in range(1, len(location) + 1)):
                # Of a tuple that is too short, pydantic says that an element is missing.
                kind = kind if location == raw or kind != "missing" else "value"
                message = _explain(cls, location, kind, tree.values)
                found[location] = Problem(tree.where(location), dotted(location), message)
            # The default stands in, or any value for a required key: the rest can then be judged.
            parent: Any = values
            for part in location[:-1]:
                parent = parent[part]
            parent.pop(location[-1], None)
            if item and _required(item) and not is_dataclass(hint):
                parent[location[-1]] = {int: 1, float: 1.0, bool: False}.get(hint, "unset")
    return Build(None, list(found.values()), frozenset(map(dotted, found)))


def _typed_fields(cls: Any) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    hints = get_type_hints(cls)
    return ((item, hints[item.name]) for item in fields(cls))


def _element(hint: Any) -> Any:
    """The dataclass inside `tuple[X, ...]`, else None."""
    args = get_args(hint)
    return args[0] if len(args) == 2 and args[1] is Ellipsis and is_dataclass(args[0]) else None


def _required(item: dataclasses.Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _add_sections(cls: Any, values: dict[str, Any]) -> None:
    """An absent section is an empty one, so that its own missing keys are named one by one."""
    for item, hint in _typed_fields(cls):
        if is_dataclass(hint) and isinstance(values.setdefault(item.name, {}), dict):
            _add_sections(hint, values[item.name])


# A finding before it is explained: its location and its kind (unset, missing, unknown, value).
_Finding = tuple[Location, str]


def _unset(value: Any, location: Location = ()) -> list[_Finding]:
    if value == UNSET:
        return [(location, "unset")]
    if not isinstance(value, dict | list):
        return []
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [found for key, child in inner for found in _unset(child, (*location, key))]


def _type_errors(adapter: TypeAdapter[Any], values: dict[str, Any]) -> list[_Finding]:
    from pydantic import ValidationError

    kinds = {"missing": "missing", "unexpected_keyword_argument": "unknown"}
    try:
        # As JSON: in strict mode, Python's own lists would not be taken for tuples.
        adapter.validate_json(json.dumps(values))
    except ValidationError as error:
        return [(item["loc"], kinds.get(item["type"], "value")) for item in error.errors()]
    return []


def _out_of_bounds(cls: Any, values: dict[str, Any], prefix: Location = ()) -> list[_Finding]:
    found: list[_Finding] = []
    for item, hint in _typed_fields(cls):
        here, value = (*prefix, item.name), values.get(item.name)
        if is_dataclass(hint):
            found += _out_of_bounds(hint, values[item.name], here)
        elif _element(hint):  # a list of sections, such as data.segmentation
            for index, child in enumerate(value or ()):
                found += _out_of_bounds(_element(hint), child, (*here, index))
        elif not _within(value, item.metadata["bounds"]):
            found.append((here, "value"))
    return found


_COMPARISONS = {
    "ge": (">=", operator.ge),
    "gt": (">", operator.gt),
    "le": ("<=", operator.le),
    "lt": ("<", operator.lt),
}


def _within(value: Any, bounds: Mapping[str, float]) -> bool:
    """Whether a number, or every number of a list, keeps the bounds."""
    numbers = value if isinstance(value, list) else [value]  # null keeps every bound, where allowed
    comparisons = [(_COMPARISONS[name][1], bound) for name, bound in bounds.items()]
    return all(
        number is None or compare(number, bound)
        for compare, bound in comparisons
        for number in numbers
    )


def _lookup(cls: Any, location: Location) -> tuple[int, dataclasses.Field[Any] | None, Any]:
    """How much of the location leads to a known field, that field and its type."""
    depth, item, hint, inside = 0, None, cls, cls
    for end, part in enumerate(location, start=1):
        if isinstance(part, int):  # an index belongs to the field before it
            continue
        known = (
            {found.name: (found, kind) for found, kind in _typed_fields(inside)} if inside else {}
        )
        if part not in known:
            return depth, None, None
        item, hint = known[part]
        depth, inside = end, hint if is_dataclass(hint) else _element(hint)
    return depth, item, hint


def _explain(cls: Any, location: Location, kind: str, values: Any) -> str:
    _, item, hint = _lookup(cls, location)
    if kind == "unknown" or item is None:
        return _explain_unknown(cls, location)
    allowed = f"allowed: {type_text(hint, item.metadata['bounds'])}"
    if kind in ("missing", "unset"):
        return f"required, and not set: {item.metadata['help']}; {allowed}"
    for part in location:
        values = values[part]
    # Only of a choice of words there is a nearest one; "did you mean 5?" would help nobody.
    choices = [str(choice) for choice in get_args(hint)] if get_origin(hint) is Literal else []
    return f"got {show(values)}, {allowed}{did_you_mean(str(values), choices)}"


def _explain_unknown(cls: Any, location: Location) -> str:
    """Names the nearest key of this section and the same key of other sections."""
    *parent, name = location
    _, _, section = _lookup(cls, tuple(parent))
    siblings = [item.name for item in fields(_element(section) or section)]
    known = [key.key for key in describe(cls)]
    sibling = nearest(str(name), siblings)
    near = [] if sibling is None else [dotted((*parent, sibling))]
    # The key may be right and its section wrong.
    near += [key for key in known if key.rpartition(".")[2] == name]
    if not near:
        meant = nearest(str(name), [key.rpartition(".")[2] for key in known])
        near = [key for key in known if key.rpartition(".")[2] == meant]
    if not near:
        return f"unknown key; known here: {', '.join(siblings)}"
    return f"unknown key; did you mean {' or '.join(map(repr, near))}?"


def type_text(hint: Any, bounds: Mapping[str, float]) -> str:
    """A type and its bounds for a person: `float > 0 | null`, `[int, int]`, `bf16 | fp32`."""
    limits = ", ".join(f"{_COMPARISONS[name][0]} {bound}" for name, bound in bounds.items())
    args = get_args(hint)
    if get_origin(hint) is Literal:
        return " | ".join(map(str, args))
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(type_text(arg, bounds) for arg in args)
    if get_origin(hint) is tuple and args[-1] is Ellipsis:
        return f"list of {type_text(args[0], bounds)}"
    if get_origin(hint) is tuple:
        each = f", each {limits}" if limits else ""
        return f"[{', '.join(type_text(arg, {}) for arg in args)}]{each}"
    if is_dataclass(hint):
        return f"{{{', '.join(item.name for item in fields(hint))}}}"
    if hint in (int, float):
        return f"{hint.__name__} {limits}".strip()
    return {bool: "true | false", str: "text", type(None): "null"}[hint]

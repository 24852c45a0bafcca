"""YAML files read strictly: plain values, with the file and line of every key.

    tree = read_tree("configs/stage2.yaml", ["train.max_steps=100"])
    tree.values, tree.where(("train", "max_steps")), tree.problems

Scalars are those of YAML 1.2 (`1e-5` is a number, `yes` is text), a key written twice is a problem,
`_extends: other.yaml` merges one file over another, overrides come last. PyYAML parses; the values
are made here from its nodes, because only nodes still know their line.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from biascare.choices import did_you_mean

Location = tuple[str | int, ...]

EXTENDS = "_extends"
"""Key at the top of a file: the one file, relative to this one, that it is merged over."""

COMMAND_LINE = "command line"


class Problem(NamedTuple):
    """One thing that is wrong, where it stands and under which dotted key."""

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in self if part)


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one line per problem."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"{count} in the configuration:", *map(str, problems)]))


@dataclass
class Tree:
    """Plain values of one or several merged files, and the place each of them was written."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Location, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def where(self, location: Location) -> str:
        """File and line of the key, else of its nearest written parent, else the file."""
        # A key that is missing has no line; that of its section is where it should be written.
        for end in range(len(location), 0, -1):
            if location[:end] in self.origins:
                return self.origins[location[:end]]
        return self.source


def dotted(location: Location) -> str:
    """`("data", "segmentation", 0, "path")` -> `data.segmentation[0].path`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


# YAML 1.2 core scalars. PyYAML's own YAML 1.1 rules read 1e-5 as text, 010 as 8 and `off` as false.
_SCALARS: tuple[tuple[str, str], ...] = (
    ("null", r"^(?:~|null|)$"),
    ("bool", r"^(?:true|false|True|False)$"),
    ("int", r"^[-+]?[0-9][0-9_]*$"),
    ("float", r"^[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    ("float", r"^[-+]?\.(?:inf|nan)$"),
)
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Composes nodes only; values are made by `_plain`."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def compose_node(self, parent: Any, index: Any) -> Any:
        # An alias can make a small file expand without end; inheritance has `_extends`.
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read", problem_mark=mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly what `_Loader` would otherwise not read back as text."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Escaped where it holds a line break of Unicode, which a plain scalar would fold."""
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar(_TAG + "str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


for _name, _pattern in _SCALARS:
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), None)
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(_pattern), None)


def dump(values: dict[str, Any]) -> str:
    """YAML that `read_tree` reads back as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> Tree:
    """A file with all it extends, then the overrides, the later one winning.

    Raises ConfigError at once where nothing more can be read (missing file, bad syntax, not a
    mapping); everything else is collected in `Tree.problems`.
    """
    tree = _read_file(Path(path), ())
    # In order and all of them: a later override may take back an earlier one.
    for text in overrides:
        _merge(tree, _read_override(text))
    return tree


def _read_file(path: Path, children: tuple[Path, ...]) -> Tree:
    tree = Tree(source=str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError([Problem(str(path), "", f"cannot be read: {reason}")]) from error
    values = _parse(text, tree, ())
    # Raised at once: without sections, every key would be reported as missing.
    if not isinstance(values, dict):
        got = "an empty file" if values is None else show(values)
        message = f"got {got}, expected a mapping of sections such as 'train:'"
        raise ConfigError([*tree.problems, Problem(str(path), "", message)])
    tree.values = values
    if EXTENDS not in values:
        return tree
    return _extend(tree, path, children)


def _extend(tree: Tree, path: Path, children: tuple[Path, ...]) -> Tree:
    """The file named by `_extends` (relative to this one) with this one merged over it."""
    parent, chain = tree.values.pop(EXTENDS), (*children, path.resolve())
    where = tree.origins.pop((EXTENDS,))
    base_path = Path(os.path.normpath(path.parent / parent)) if isinstance(parent, str) else None
    if base_path is None:
        problem = f"got {show(parent)}, expected one path relative to this file"
    # Messages quote what they find wrong: a stranger's configuration could have them quote any
    # file. Of the target too, a link may be named as it likes.
    elif not {base_path.suffix, base_path.resolve().suffix} <= {".yaml", ".yml"}:
        problem = f"got {show(parent)}, expected a file that ends in .yaml or .yml"
    elif base_path.resolve() in chain:  # resolved, so that a link cannot hide a circle
        names = [step.name for step in (*chain, base_path)]
        problem = f"a circle: {' extends '.join(names)}; remove one of them"
    elif not base_path.is_file():
        near = did_you_mean(base_path.name, (p.name for p in base_path.parent.glob("*.y*ml")))
        problem = f"no file {base_path}{near}"
    else:
        base = _read_file(base_path, chain)
        _merge(base, tree)
        base.source = tree.source  # the file that was named is the one to look at for a missing key
        return base
    tree.problems.append(Problem(where, EXTENDS, problem))
    return tree


def _read_override(text: str) -> Tree:
    """`section.key=value` as a tree of its own; the value is YAML."""
    tree = Tree(source=COMMAND_LINE)
    key, equals, value = text.partition("=")
    location = tuple(part.strip() for part in key.split("."))
    # `key=` is refused and not taken for null: a shell variable that is not set looks like it.
    if not (equals and value.strip() and all(location)):
        fix = "expected section.key=value; an unset value is null, an empty text is '\"\"'"
        tree.problems.append(Problem(COMMAND_LINE, "", f"got {text!r}, {fix}"))
        return tree
    try:
        parsed = _parse(value, tree, location)
    except ConfigError as error:
        message = error.problems[0].message
        tree.problems.append(Problem(COMMAND_LINE, key, f"{message} in {value!r}"))
        return tree
    # Parents too come from the command line now, as far as they hold nothing but this key.
    for depth in range(len(location), 0, -1):
        tree.origins[location[:depth]] = COMMAND_LINE
        parsed = {location[depth - 1]: parsed}
    tree.values = parsed
    return tree


def _merge(base: Tree, layer: Tree) -> None:
    """Mappings are merged key by key; everything else, lists too, is replaced."""
    # Lists as well, because a person who writes two folders does not expect three.
    mappings: list[tuple[dict[str, Any], dict[str, Any], Location]]
    mappings = [(base.values, layer.values, ())]
    for old, new, location in mappings:
        for key, value in new.items():
            here = (*location, key)
            if isinstance(value, dict) and isinstance(old.get(key), dict):
                mappings.append((old[key], value, here))
                continue
            old[key] = value
            # The lines of what was replaced would point at text that counts no more.
            for stale in [known for known in base.origins if known[: len(here)] == here]:
                del base.origins[stale]
    base.origins.update(layer.origins)
    base.problems.extend(layer.problems)


def _parse(text: str, tree: Tree, location: Location) -> Any:
    try:
        node = yaml.compose(text, Loader=_Loader)
    except RecursionError as error:  # brackets alone can do it, and PyYAML does not count them
        raise ConfigError([Problem(tree.source, "", "nested too deeply")]) from error
    except yaml.YAMLError as error:
        # Characters that YAML forbids are an error of another class, without a mark or a problem.
        mark = getattr(error, "problem_mark", None)
        where = _line(tree.source, mark) if mark else tree.source
        reason = getattr(error, "problem", None) or getattr(error, "reason", str(error))
        raise ConfigError([Problem(where, "", f"bad YAML: {reason}")]) from error
    return None if node is None else _plain(node, tree, location)


def _line(source: str, mark: Any) -> str:
    return source if source == COMMAND_LINE else f"{source}:{mark.line + 1}"


def _plain(node: yaml.Node, tree: Tree, location: Location) -> Any:
    """A node's plain value; remembers the line of every key and list item below it."""
    kind = node.tag.removeprefix(_TAG)
    # Dates, sets and Python objects are refused with their tag; to guess would hide a typing error.
    known = kind in ("map", "seq", *_READ_AS)
    if known and isinstance(node, yaml.MappingNode):
        return _plain_mapping(node, tree, location)
    if known and isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            here = (*location, index)
            tree.origins[here] = _line(tree.source, item.start_mark)
            items.append(_plain(item, tree, here))
        return items
    text = str(node.value)
    # Half of a surrogate pair can be written as an escape, and then nothing can encode it as UTF-8.
    if kind in _READ_AS and not any("\ud800" <= letter <= "\udfff" for letter in text):
        try:
            return _READ_AS[kind](text)
        except ValueError:  # an integer of thousands of digits, or `!!int x`: reported as text
            return text
    message = f"only plain values and Unicode text are read, got {node.tag} {node.value!r:.60}"
    tree.problems.append(Problem(_line(tree.source, node.start_mark), dotted(location), message))
    return None


_READ_AS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    # YAML writes .inf and .nan, Python inf and nan.
    "float": lambda text: float(re.sub(r"\.(?=inf|nan)", "", text)),
}


def _plain_mapping(node: yaml.MappingNode, tree: Tree, location: Location) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where, key = _line(tree.source, key_node.start_mark), str(key_node.value)
        here = (*location, key)
        if key_node.tag != _TAG + "str":
            message = f"got the key {key!r}, expected a name in plain text"
            tree.problems.append(Problem(where, dotted(location), message))
            continue
        # YAML lets the later one win, and a run would quietly take half of what was written.
        if key in mapping:
            message = f"written twice, first at {tree.origins[here]}; keep one"
            tree.problems.append(Problem(where, dotted(here), message))
            continue
        tree.origins[here] = where
        mapping[key] = _plain(value_node, tree, here)
    return mapping


def show(value: Any) -> str:
    """A plain value as a person wrote it, shortened, with its kind where that explains an error."""
    kinds = {str: "text", bool: "true/false", int: "integer", float: "float", list: "list"}
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= 60 else text[:57] + "..."
    kind = kinds.get(type(value))  # by exact type, because a bool is an int as well
    return f"{text} ({kind})" if kind else text

"""A user's thresholds and the verdict: PASS, FAIL or INSUFFICIENT DATA, for every group.

    limits = read_thresholds("limits.yaml")        # every mistake of the file at once
    verdict(tables, limits, draws)["overall"]

The rule: PASS where even the bad end of the 95 % interval clears the threshold, FAIL where even its
good end misses it, INSUFFICIENT DATA where the threshold lies inside the interval or a group is
smaller than `min_group`. A point estimate decides nothing. The overall verdict is the worst of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from biascare.evaluation.audit.rows import AuditTable
from biascare.evaluation.audit.tables import Draws, Row, means
from biascare.evaluation.metrics.fairness import MISSING, disparity
from biascare.evaluation.metrics.groups import ATTRIBUTES
from biascare.settings.keys import StrictSection, key
from biascare.settings.schema import build
from biascare.settings.strict_yaml import ConfigError, Problem, read_tree

PASS, FAIL, INSUFFICIENT = "PASS", "FAIL", "INSUFFICIENT DATA"
WORST_FIRST = (FAIL, INSUFFICIENT, PASS)


@dataclass(frozen=True, kw_only=True)
class Limit(StrictSection):
    """What is asked of one metric."""

    min: float | None = key("mean of every group, at least", None, ge=0, le=1)
    max: float | None = key("mean of every group, at most", None, ge=0, le=1)
    max_gap: float | None = key("between the best and the worst group, at most", None, ge=0, le=1)


@dataclass(frozen=True, kw_only=True)
class Limits(StrictSection):
    """A limit for every metric; empty ones ask nothing."""

    dice: Limit = key("limits of a metric", default_factory=Limit)
    dice_hard: Limit = key("limits of a metric", default_factory=Limit)
    missed: Limit = key("limits of a metric", default_factory=Limit)
    iou: Limit = key("limits of a metric", default_factory=Limit)
    nsd: Limit = key("limits of a metric", default_factory=Limit)
    dice_text: Limit = key("limits of a metric", default_factory=Limit)
    dice_corrected: Limit = key("limits of a metric", default_factory=Limit)
    accuracy: Limit = key("limits of a metric", default_factory=Limit)
    option_accuracy: Limit = key("limits of a metric", default_factory=Limit)
    open_recall: Limit = key("limits of a metric", default_factory=Limit)
    true_yes: Limit = key("limits of a metric", default_factory=Limit)
    false_yes: Limit = key("limits of a metric", default_factory=Limit)
    rouge1: Limit = key("limits of a metric", default_factory=Limit)
    top_label: Limit = key("limits of a metric", default_factory=Limit)
    label_agreement: Limit = key("limits of a metric", default_factory=Limit)


@dataclass(frozen=True, kw_only=True)
class ByAttribute(StrictSection):
    """Limits of one attribute, where they differ from those of all."""

    sex: Limits = key("of sexes", default_factory=Limits)
    age: Limits = key("of age bands", default_factory=Limits)
    race: Limits = key("of races", default_factory=Limits)
    sex_and_age: Limits = key("of sexes within age bands", default_factory=Limits)


@dataclass(frozen=True, kw_only=True)
class Thresholds(Limits):
    """A file of thresholds."""

    min_group: int = key("a smaller group has too few cases for a verdict", 20, ge=2)
    # An intersection has small groups, which would leave every audit without a verdict.
    attributes: tuple[Literal["sex", "age", "race", "sex and age"], ...] = key(
        "whose groups are held against the limits", ("sex", "age", "race", "sex and age")
    )
    by_attribute: ByAttribute = key("other limits of one attribute", default_factory=ByAttribute)


def read_thresholds(path: str | Path) -> Thresholds:
    """Raises ConfigError, a ValueError, that names everything wrong with the file: unknown keys
    with the nearest known one, types, bounds, and a file that asks nothing."""
    tree = read_tree(path)
    built = build(Thresholds, tree)
    problems = [*tree.problems, *built.problems]
    if not problems and not list(_asked(built.value)):
        problems.append(Problem(str(path), "", "asks nothing; write for example dice: {min: 0.6}"))
    if problems or built.value is None:
        raise ConfigError(problems)
    return built.value


def _asked(thresholds: Thresholds | None) -> Iterator[tuple[str, str | None]]:
    """(metric, attribute) of every limit that asks something."""
    if thresholds is not None:
        for name in _metric_names():
            if getattr(thresholds, name) != Limit():
                yield name, None
            for attribute in fields(ByAttribute):
                if getattr(getattr(thresholds.by_attribute, attribute.name), name) != Limit():
                    yield name, attribute.name


def _metric_names() -> list[str]:
    return [item.name for item in fields(Limits)]


def verdict(tables: Sequence[AuditTable], thresholds: Thresholds, draws: Draws) -> Row:
    """{"overall", "rows", "min_group"}: one row for every limit and group it was held against."""
    rows = [row for name in _metric_names() for row in _judged(name, tables, thresholds, draws)]
    counts = {word: sum(row["verdict"] == word for row in rows) for word in WORST_FIRST}
    overall = next(word for word in WORST_FIRST if counts[word])
    return {
        "overall": overall,
        "counts": counts,
        "min_group": thresholds.min_group,
        "rows": rows,
    }


def _judged(
    metric: str, tables: Sequence[AuditTable], thresholds: Thresholds, draws: Draws
) -> Iterator[Row]:
    general = getattr(thresholds, metric)
    table = next((t for t in tables if metric in t.metrics), None)
    specific = {
        name: getattr(getattr(thresholds.by_attribute, name.replace(" ", "_")), metric)
        for name in thresholds.attributes
    }
    if table is None:
        for attribute, limit in [("all", general), *specific.items()]:
            for which, bound in _bounds(limit):
                yield _row(metric, attribute, "all", which, bound, None, thresholds.min_group)
        return
    values = table.metrics[metric]
    everyone = list(means(table, metric, values, "all", ["all"] * len(values), draws))
    for which, bound in _bounds(general):
        if which != "max_gap":
            yield _row(metric, "all", "all", which, bound, everyone[0], thresholds.min_group)
    for attribute, own in specific.items():
        limit = {**dict(_bounds(general)), **dict(_bounds(own))}
        groups = [ATTRIBUTES[attribute](f) for f in table.facts]
        if not limit or (not any(groups) and own == Limit()):
            continue
        for row in means(table, metric, values, attribute, groups, draws):
            # Who is unknown is no group to be fair to; overall limits hold for these cases too.
            if row["group"] != MISSING:
                for which in ("min", "max"):
                    if which in limit:
                        yield _row(
                            metric,
                            attribute,
                            row["group"],
                            which,
                            limit[which],
                            row,
                            thresholds.min_group,
                        )
        if "max_gap" in limit:
            found = disparity(
                values, groups, table.patients, min_group=thresholds.min_group, **draws._asdict()
            )
            compared = [g for g in found.groups if g.compared]
            gap = {
                "num": sum(g.num for g in compared),
                "mean": found.gap,
                "low": found.gap_low,
                "high": found.gap_high,
            }
            between = f"{found.worst} against {found.best}" if found.gap is not None else "all"
            cell = None if found.gap is None else gap
            minimum = thresholds.min_group
            yield _row(metric, attribute, between, "max_gap", limit["max_gap"], cell, minimum)


def _bounds(limit: Limit) -> list[tuple[str, float]]:
    named = ((name, getattr(limit, name)) for name in ("min", "max", "max_gap"))
    return [(name, bound) for name, bound in named if bound is not None]


def _row(
    metric: str,
    attribute: str,
    group: str,
    which: str,
    bound: float,
    cell: Row | None,
    min_group: int,
) -> Row:
    row: Row = {
        "metric": metric,
        "attribute": attribute,
        "group": group,
        "limit": which,
        "threshold": bound,
    }
    keys = ("num", "mean", "low", "high")
    found = {key: None for key in keys} if cell is None else {key: cell[key] for key in keys}
    return row | found | {"verdict": _decide(which, bound, cell, min_group)}


def _decide(which: str, bound: float, cell: Row | None, min_group: int) -> str:
    if cell is None or cell["num"] < min_group:
        return INSUFFICIENT
    if which == "min":
        good, bad = cell["high"] >= bound, cell["low"] >= bound
    else:
        good, bad = cell["low"] <= bound, cell["high"] <= bound
    if bad:
        return PASS
    return INSUFFICIENT if good else FAIL

"""The worst slices: combinations of up to three facts in which a model does worst.

    found = worst_slices(table, "dice", draws)
    found.confirmed, found.num_searched

Among hundreds of combinations the worst looks bad by chance alone. So half of the patients are
searched, and what is found there is tested on the other half, adjusted for how many were tested
(Benjamini and Hochberg: of what is called confirmed, at most 5 % are expected to be nothing).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control  # type: ignore[import-untyped, unused-ignore]

from biascare.evaluation.audit.rows import METRICS, AuditTable, Column
from biascare.evaluation.audit.tables import Draws, Row
from biascare.evaluation.metrics.bootstrap import p_value
from biascare.evaluation.metrics.fairness import MIN_GROUP, named_groups, permuted_means
from biascare.evaluation.metrics.groups import age_band
from biascare.interfaces import Facts

DEPTH = 3
"""Facts of one slice."""

MAX_TESTED = 20
"""Slices that go on to the other half: the more are tested, the less is confirmed."""

MOST_SHARED = 0.8
"""Overlap from which two slices are one (shared cases by cases of either); the simpler stays."""

LEVEL = 0.05

FACTS: dict[str, Callable[[Facts], str | None]] = {
    "modality": lambda facts: facts.modality,
    "target": lambda facts: facts.target,
    "kind": lambda facts: facts.kind,
    "sex": lambda facts: facts.sex,
    "age": age_band,
    "race": lambda facts: facts.race,
    "source": lambda facts: facts.source,
}


class WorstSlices(NamedTuple):
    """What a search came to."""

    tested: list[Row]  # the worst in one half of the patients, as they are in the other
    num_searched: int  # slices of at least `MIN_GROUP` cases
    num_confirmed: int


class _Slice(NamedTuple):
    facts: tuple[tuple[str, str], ...]
    member: NDArray[np.bool_]  # [N]
    deficit: float  # standard errors below the other cases, in the searched half


def worst_slices(table: AuditTable, metric: str, draws: Draws) -> WorstSlices:
    """Search one metric of one kind of case."""
    sign = 1.0 if METRICS[metric].higher_is_better else -1.0
    values = table.metrics[metric] * sign
    valid = ~np.isnan(values)
    searched = _half(table.patients, draws.seed)
    columns = _columns(table)
    candidates = list(_candidates(columns, values, valid & searched))
    chosen: list[_Slice] = []
    for found in sorted(candidates, key=lambda s: (-s.deficit, len(s.facts), s.facts)):
        if len(chosen) == MAX_TESTED or found.deficit < 1e-3:  # equal but for rounding
            break
        if all(_overlap(found.member, other.member) <= MOST_SHARED for other in chosen):
            chosen.append(found)
    rows, p_values = [], []
    held_out = valid & ~searched
    for found in chosen:
        row, p = _confirm(found, values, held_out, table, draws)
        rows.append(row | {"metric": metric, "mean": _signed(row["mean"], sign)})
        rows[-1] |= {name: _signed(row[name], sign) for name in ("others", "same_kind_elsewhere")}
        p_values.append(p)
    testable = [i for i, p in enumerate(p_values) if p is not None]
    q_values = false_discovery_control([p_values[i] for i in testable]) if testable else []
    for row in rows:
        row["q"], row["confirmed"] = None, False
    for i, q in zip(testable, q_values, strict=True):
        rows[i]["q"] = float(q)
        rows[i]["confirmed"] = bool(q <= LEVEL)
    # By how much worse they are: a slice of two facts and each fact alone may be as sure.
    rows.sort(key=lambda row: (not row["confirmed"], -_deficit(row, sign), row["slice"]))
    return WorstSlices(rows, len(candidates), sum(row["confirmed"] for row in rows))


def _signed(value: float | None, sign: float) -> float | None:
    return None if value is None else sign * value


def _deficit(row: Row, sign: float) -> float:
    if row["mean"] is None or row["others"] is None:
        return -np.inf
    return float(sign * (row["others"] - row["mean"]))


def _half(patients: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """[N] rows of the patients that are searched: a random half of them, whole."""
    number = np.unique(patients)
    chosen = np.random.default_rng(seed).permutation(number)[: len(number) // 2]
    return np.isin(patients, chosen)


def _columns(table: AuditTable) -> dict[str, tuple[NDArray[np.int64], list[str]]]:
    """Facts that tell cases apart; one that has a single value for all does not."""
    known = {name: [of(f) for f in table.facts] for name, of in FACTS.items()}
    if table.sizes is not None:
        known["size of the mask"] = list(table.sizes)
    return {name: named_groups(groups) for name, groups in known.items() if len(set(groups)) > 1}


def _candidates(
    columns: dict[str, tuple[NDArray[np.int64], list[str]]],
    values: Column,
    use: NDArray[np.bool_],
) -> Iterator[_Slice]:
    """Every combination of facts with enough cases in the searched half."""
    if use.sum() < 2 * MIN_GROUP:
        return
    total, num_all = values[use].sum(), int(use.sum())
    spread = max(float(values[use].std()), 1e-9)
    for depth in range(1, DEPTH + 1):
        for names in combinations(columns, depth):
            sizes = [len(columns[name][1]) for name in names]
            code = np.ravel_multi_index([columns[name][0] for name in names], sizes)
            _, place = np.unique(code, return_inverse=True)
            num = np.bincount(place[use], minlength=int(place.max()) + 1)
            sums = np.bincount(place[use], values[use], len(num))
            for cell in np.flatnonzero((num >= MIN_GROUP) & (num_all - num >= MIN_GROUP)):
                member = place == cell
                first = int(np.flatnonzero(member)[0])
                facts = tuple((name, columns[name][1][columns[name][0][first]]) for name in names)
                others = (total - sums[cell]) / (num_all - num[cell])
                error = spread / np.sqrt(num[cell])
                yield _Slice(facts, member, float((others - sums[cell] / num[cell]) / error))


def _overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def _confirm(
    found: _Slice, values: Column, held_out: NDArray[np.bool_], table: AuditTable, draws: Draws
) -> tuple[Row, float | None]:
    """The slice in the half that was not searched: its row, and a one-sided p."""
    mine = found.member & held_out
    others = ~found.member & held_out
    row: Row = {
        "slice": ", ".join(f"{name}: {value}" for name, value in found.facts),
        "depth": len(found.facts),
        "num": int(mine.sum()),
        "num_patients": len(np.unique(table.patients[mine])),
        "mean": float(values[mine].mean()) if mine.any() else None,
        "others": float(values[others].mean()) if others.any() else None,
        "same_kind_elsewhere": _expected(table.case_mix, values, mine, others),
        "p": None,
    }
    if min(mine.sum(), others.sum()) < MIN_GROUP:
        return row, None
    member = found.member[held_out].astype(np.int64)
    dealt = permuted_means(
        values[held_out], member, table.patients[held_out], draws.num_draws, draws.seed
    )
    row["p"] = p_value(row["others"] - row["mean"], dealt[:, 0] - dealt[:, 1])
    return row, row["p"]


def _expected(
    case_mix: Sequence[str], values: Column, mine: NDArray[Any], others: NDArray[Any]
) -> float | None:
    """Mean of the same kinds of case outside the slice, as often as they are in it: hard kinds
    are no fault of a group. None where all of a kind lie inside."""
    mix, strata = named_groups(case_mix)
    num = np.bincount(mix[others], minlength=len(strata))
    sums = np.bincount(mix[others], values[others], len(strata))
    inside = np.bincount(mix[mine], minlength=len(strata)) * (num > 0)
    if not inside.sum():
        return None
    return float(inside @ (sums / np.maximum(num, 1)) / inside.sum())

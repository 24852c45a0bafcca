"""Two runs on the same cases: what changed, for whom.

    compare(run, baseline, tables, baseline_tables, draws)["rows"]

Cases are paired by their names, and differences are drawn by patient: what both runs find hard
cancels, so that far smaller changes are seen than in two separate intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from biascare.evaluation.audit.rows import METRICS, AuditTable, Column
from biascare.evaluation.audit.tables import BREAKDOWNS, Draws, Row
from biascare.evaluation.cases import FinishedCase, LabelCase, MaskCase
from biascare.evaluation.metrics.bootstrap import clustered
from biascare.evaluation.metrics.fairness import MIN_GROUP, named_groups
from biascare.evaluation.metrics.groups import ATTRIBUTES

CHANGED = 0.05
"""A case counts as better or worse from this difference on."""

GAINED, PAID, UNCLEAR = "gained", "paid", "no clear change"


def compare(run: Sequence[AuditTable], baseline: Sequence[AuditTable], draws: Draws) -> Row:
    """{"rows", "num_shared", "num_only_run", "num_only_baseline"}.

    Raises ValueError where the two runs share no case, or a shared case has another truth.
    """
    theirs = {table.unit: table for table in baseline}
    rows: list[Row] = []
    shared = only_run = 0
    for table in run:
        other = theirs.get(table.unit)
        places = {} if other is None else {_key(c): i for i, c in enumerate(other.cases)}
        pairs = [(i, places[k]) for i, c in enumerate(table.cases) if (k := _key(c)) in places]
        shared += len(pairs)
        only_run += len(table.cases) - len(pairs)
        if other is None or not pairs:
            continue
        _refuse_other_truth(table, other, pairs)
        mine, old = (np.array(side) for side in zip(*pairs, strict=True))
        for metric, values in table.metrics.items():
            about = METRICS[metric]
            if metric in other.metrics and about.judged and about.paired:
                rows += _changes(
                    table, metric, values[mine], other.metrics[metric][old], mine, draws
                )
    total = sum(len(table.cases) for table in baseline)
    if not shared:
        raise ValueError(
            "the two runs share no case: a comparison is of the same targets and questions; "
            "evaluate both models on the same record folders"
        )
    return {
        "rows": rows,
        "num_shared": shared,
        "num_only_run": only_run,
        "num_only_baseline": total - shared,
    }


def _key(case: FinishedCase) -> tuple[str, str, str]:
    return case.facts.source, case.facts.split, case.id


def _truth(case: FinishedCase) -> Any:
    if isinstance(case, MaskCase):
        return case.height, case.width, case.truth
    if isinstance(case, LabelCase):
        return case.labels, case.present
    return case.question, case.reference, case.options


def _refuse_other_truth(
    table: AuditTable, other: AuditTable, pairs: Sequence[tuple[int, int]]
) -> None:
    differing = [i for i, j in pairs if _truth(table.cases[i]) != _truth(other.cases[j])]
    if differing:
        example = "/".join(_key(table.cases[differing[0]]))
        raise ValueError(
            f"{len(differing)} of {len(pairs)} shared {table.unit} have another truth in the "
            f"baseline ({example} for one): the data were changed in between; evaluate the "
            "baseline again on the same records"
        )


def _changes(
    table: AuditTable, metric: str, new: Column, old: Column, places: Any, draws: Draws
) -> list[Row]:
    """Of all cases and of every group; a group of fewer than `MIN_GROUP` cases is not judged."""
    sign = 1.0 if METRICS[metric].higher_is_better else -1.0
    facts = [table.facts[i] for i in places]
    patients = table.patients[places]
    groupings: dict[str, list[str | None]] = {"all": ["all"] * len(facts)}
    for by, of in (ATTRIBUTES | BREAKDOWNS).items():
        groups = [of(f) for f in facts]
        if len(set(groups)) > 1:
            groupings[by] = groups
    rows = []
    for by, groups in groupings.items():
        number, names = named_groups(groups)
        difference = new - old
        drawn = clustered(difference, patients, number, len(names), **draws._asdict())
        low, high = drawn.interval()
        for g, name in enumerate(names):
            mine = (number == g) & ~np.isnan(difference)
            if not mine.any():
                continue
            gain = sign * difference[mine]
            word = UNCLEAR
            if mine.sum() >= MIN_GROUP and (low[g] > 0 or high[g] < 0):
                word = GAINED if sign * low[g] > 0 and sign * high[g] > 0 else PAID
            rows.append(
                {
                    "metric": metric,
                    "by": by,
                    "group": name,
                    "num": int(mine.sum()),
                    "baseline": float(old[mine].mean()),
                    "run": float(new[mine].mean()),
                    "difference": float(drawn.estimate[g]),
                    "low": float(low[g]),
                    "high": float(high[g]),
                    "num_better": int((gain >= CHANGED).sum()),
                    "num_worse": int((gain <= -CHANGED).sum()),
                    "who": word,
                }
            )
    return rows

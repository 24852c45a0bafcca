"""The tables of an audit: cohort, performance, disparities, calibration, deferral.

Every function takes `AuditTable`s and returns flat rows, which JSON, CSV and pages show as they
are. A number that does not exist is None.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from biascare.evaluation.audit.rows import METRICS, AuditTable, Column
from biascare.evaluation.metrics.bootstrap import NUM_DRAWS, clustered, widened
from biascare.evaluation.metrics.calibration import (
    calibration_errors,
    excess_ece,
    excess_score_error,
    ranking,
    reliability_bins,
)
from biascare.evaluation.metrics.fairness import (
    MIN_CALIBRATION_GROUP,
    MISSING,
    calibration_gap,
    disparity,
    equity_scaled,
    holm,
    kept_rows,
    named_groups,
)
from biascare.evaluation.metrics.groups import ATTRIBUTES, Measured, group_order, summarise_groups
from biascare.interfaces import Facts

Row = dict[str, Any]


class Draws(NamedTuple):
    """How often and with which seed chance is drawn."""

    num_draws: int = NUM_DRAWS
    seed: int = 0


BREAKDOWNS: dict[str, Callable[[Facts], str | None]] = {
    "prevalence": lambda facts: facts.prevalence,
    "kind": lambda facts: facts.kind,
    "modality": lambda facts: facts.modality,
    "target": lambda facts: facts.target,
    "source": lambda facts: facts.source,
}
"""What performance is given by, besides all cases together."""

COVERAGES = (0.9, 0.8, 0.5)
"""Shares of all cases that are kept, for the table of deferral."""


def cohort(tables: Sequence[AuditTable]) -> tuple[dict[str, int], list[Row]]:
    """(totals, rows of what is known: per attribute and value the cases, images, patients)."""
    facts = [f for table in tables for f in table.facts]
    patients = {(f.source, f.patient_id) for f in facts if f.patient_id}
    totals = {f"num_{table.unit}": len(table.facts) for table in tables} | {
        "num_images": len({(f.source, f.split, f.image_id) for f in facts}),
        "num_patients": len(patients),
        "num_cases_without_patient": sum(not f.patient_id for f in facts),
        "num_not_finite": sum(table.num_not_finite for table in tables),
    }
    rows = []
    of = ATTRIBUTES | {"modality": BREAKDOWNS["modality"], "source": BREAKDOWNS["source"]}
    for attribute, value in of.items():
        groups = [[value(f) for f in table.facts] for table in tables]
        names = sorted({g for mine in groups for g in mine if g is not None}, key=group_order)
        for name in (*names, None):
            here = [f for f in facts if value(f) == name]
            row: Row = {"attribute": attribute, "group": MISSING if name is None else name}
            for table, mine in zip(tables, groups, strict=True):
                row[table.unit] = sum(g == name for g in mine)
            row["images"] = len({(f.source, f.split, f.image_id) for f in here})
            row["patients"] = len({(f.source, f.patient_id) for f in here if f.patient_id})
            # Missing is told even where nothing is: "none missing" is a statement.
            rows.append(row | {"share": len(here) / max(len(facts), 1)})
    return totals, rows


def performance(tables: Sequence[AuditTable], draws: Draws) -> list[Row]:
    """Every metric over all cases and by the `BREAKDOWNS` that have several groups."""
    rows: list[Row] = []
    for table in tables:
        for metric, values in table.metrics.items():
            rows += means(table, metric, values, "all", ["all"] * len(values), draws)
            for by, of in BREAKDOWNS.items():
                groups = [of(f) for f in table.facts]
                if len(set(groups)) > 1:
                    rows += means(table, metric, values, by, groups, draws)
    return rows


def means(
    table: AuditTable,
    metric: str,
    values: Column,
    by: str,
    groups: Sequence[str | None],
    draws: Draws,
) -> Iterator[Row]:
    """One row per group that has a value."""
    group, names = named_groups(groups)
    valid = ~np.isnan(values)
    drawn = clustered(values, table.patients, group, len(names), **draws._asdict())
    patients = [len(np.unique(table.patients[valid & (group == g)])) for g in range(len(names))]
    low, high = widened(drawn, patients)
    num = np.bincount(group[valid], minlength=len(names))
    sums = np.bincount(group[valid], values[valid], len(names))
    for g, name in enumerate(names):
        if num[g]:
            yield {
                "metric": metric,
                "by": by,
                "group": name,
                "num": int(num[g]),
                "num_patients": patients[g],
                "mean": float(drawn.estimate[g]),
                "low": float(low[g]),
                "high": float(high[g]),
                "count": round(float(sums[g])) if METRICS[metric].is_share else None,
            }


def disparities(
    tables: Sequence[AuditTable], draws: Draws
) -> tuple[list[Row], list[Row], list[Row]]:
    """(comparisons, their groups, error types of closed questions).

    There are two families. Findings come from the primary metrics alone: one for each kind of
    case. All others are adjusted among themselves, so that how many there are does not hide a
    difference in what matters most.
    """
    comparisons: list[Row] = []
    groups: list[Row] = []
    for family, primary in (("primary", True), ("secondary", False)):
        measured = [
            Measured(
                metric,
                table.facts,
                values.tolist(),
                table.case_mix,
                METRICS[metric].higher_is_better,
            )
            for table in tables
            for metric, values in table.metrics.items()
            if METRICS[metric].primary == primary
        ]
        found = summarise_groups(measured, **draws._asdict())
        columns = {name: np.asarray(m.values) for m in measured for name in [m.name]}
        of_metric = {m.name: m.facts for m in measured}
        for metric, by_name in found.items():
            for attribute, cell in by_name.items():
                comparisons.append(_comparison(family, metric, attribute, cell, columns[metric]))
                mine = [ATTRIBUTES[attribute](f) for f in of_metric[metric]]
                groups += _group_rows(metric, attribute, cell["groups"], columns[metric], mine)
    return comparisons, groups, list(_error_types(comparisons))


def _comparison(family: str, metric: str, attribute: str, cell: Row, values: Column) -> Row:
    compared = {g["name"]: g["mean"] for g in cell["groups"] if g["compared"]}
    overall = float(np.nanmean(values))
    scaled: Row = {"equity_scaled_std": None, "equity_scaled_deviation": None}
    # A score that is lower for the better cannot be lowered by how groups differ.
    if METRICS[metric].higher_is_better and METRICS[metric].judged and len(compared) > 1:
        scaled = {
            f"equity_scaled_{kind}": equity_scaled(overall, compared, kind)
            for kind in ("std", "deviation")
        }
    rest = {key: value for key, value in cell.items() if key != "groups"}
    about = {"family": family, "metric": metric, "attribute": attribute}
    return about | {"num_compared": len(compared), "overall": overall} | rest | scaled


def _group_rows(
    metric: str, attribute: str, groups: list[Row], values: Column, names: list[str | None]
) -> Iterator[Row]:
    sums = Counter[str]()
    for name, value in zip(names, values, strict=True):
        if not math.isnan(value):
            sums[MISSING if name is None else name] += value
    for group in groups:
        about: Row = {"metric": metric, "attribute": attribute, "group": group["name"]}
        rest = {key: value for key, value in group.items() if key != "name"}
        share = METRICS[metric].is_share
        yield about | rest | {"count": round(sums[group["name"]]) if share else None}


def _error_types(comparisons: Sequence[Row]) -> Iterator[Row]:
    """Equalised odds and demographic parity of closed questions, as fairlearn defines them."""
    found = {(row["metric"], row["attribute"]): row for row in comparisons}
    for attribute in ATTRIBUTES:
        parts = {
            name: found.get((name, attribute)) for name in ("true_yes", "false_yes", "said_yes")
        }
        if any(row is None or row["gap"] is None for row in parts.values()):
            continue
        true, false, said = (row for row in parts.values() if row is not None)
        larger = max(true, false, key=lambda row: row["gap"])
        yield {
            "attribute": attribute,
            "equalized_odds_difference": larger["gap"],
            "decided_by": larger["metric"],
            # Each of the two is a comparison of the secondary family; the larger gap has its p.
            "equalized_odds_p_holm": larger["p_holm"],
            "true_positive_gap": true["gap"],
            "false_positive_gap": false["gap"],
            "equalized_odds_ratio": _smaller(true["ratio"], false["ratio"]),
            "demographic_parity_difference": said["gap"],
            "demographic_parity_ratio": said["ratio"],
            "demographic_parity_p_holm": said["p_holm"],
        }


def _smaller(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else min(a, b)


# ---------------------------------------------------------------- calibration


def calibration(
    tables: Sequence[AuditTable], draws: Draws
) -> tuple[list[Row], list[Row], list[Row]]:
    """(errors of all and of every group, gaps between groups, bins of the reliability diagrams)."""
    errors: list[Row] = []
    gaps: list[Row] = []
    bins: list[Row] = []
    for table in tables:
        for name, (claimed, true) in table.confidences.items():
            stated = ~np.isnan(claimed) & ~np.isnan(true)
            if not stated.any():
                continue
            conf, right, who = claimed[stated], true[stated], table.patients[stated]
            facts = [f for f, use in zip(table.facts, stated, strict=True) if use]
            missing = int((~stated).sum())
            everyone = np.ones(len(conf), bool)
            errors.append(
                _calibration_row(name, "all", "all", conf, right, who, everyone, draws)
                | {"num_missing": missing}
            )
            bins += _bin_rows(name, conf, right)
            for attribute, of in ATTRIBUTES.items():
                groups = [of(f) for f in facts]
                if not any(g is not None for g in groups):
                    continue
                number, names = named_groups(groups)
                errors += (
                    _calibration_row(name, attribute, group, conf, right, who, number == g, draws)
                    for g, group in sorted(enumerate(names), key=lambda pair: group_order(pair[1]))
                )
                found = calibration_gap(conf, right, groups, who, **draws._asdict())
                row = found._asdict()
                row |= {"num_compared": len(found.compared), "compared": ", ".join(found.compared)}
                del row["ece"], row["num"]
                gaps.append({"confidence": name, "attribute": attribute} | row)
    _add_holm(gaps)
    return errors, gaps, bins


def _calibration_row(
    name: str,
    attribute: str,
    group: str,
    conf: Column,
    right: Column,
    patients: Any,
    mine: Any,
    draws: Draws,
) -> Row:
    conf, right = conf[mine], right[mine]
    row: Row = {"confidence": name, "attribute": attribute, "group": group, "num": len(conf)}
    if np.isin(right, (0, 1)).all() and name != "predicted Dice":
        found = excess_ece(conf, right, num_draws=draws.num_draws, seed=draws.seed)
        errors = calibration_errors(conf, right)
        more: Row = {"mce": errors.mce, "brier": errors.brier} | ranking(conf, right)
    else:
        found = excess_score_error(
            conf, right, patients[mine], num_draws=draws.num_draws, seed=draws.seed
        )
        more = {"mce": None, "brier": None, "auroc": None, "auprc": None}
    return (
        row
        | {key: value for key, value in found._asdict().items() if key != "num"}
        | {"signed": float(conf.mean() - right.mean())}
        | more
        | {"supports_statement": len(conf) >= MIN_CALIBRATION_GROUP, "num_missing": 0}
    )


def _bin_rows(name: str, conf: Column, right: Column) -> Iterator[Row]:
    bins = reliability_bins(conf, right)
    for number, (num, claimed, true) in enumerate(zip(*bins, strict=True)):
        if num:
            yield {
                "confidence": name,
                "bin": number + 1,
                "num": int(num),
                "claimed": float(claimed),
                "true": float(true),
            }


def _add_holm(rows: Sequence[Row]) -> None:
    stated = [row for row in rows if row["p"] is not None]
    for row in rows:
        row["p_holm"] = None
    for row, p in zip(stated, holm([row["p"] for row in stated]), strict=True):
        row["p_holm"] = p


# ---------------------------------------------------------------- deferral


def deferral_table(tables: Sequence[AuditTable], draws: Draws) -> list[Row]:
    """Whose cases are kept where the surest share of all is, and how good the kept ones are."""
    rows: list[Row] = []
    for table in tables:
        for name, (claimed, true) in table.confidences.items():
            stated = ~np.isnan(claimed) & ~np.isnan(true)
            # Of one score for all there is no order to defer by.
            if len(np.unique(claimed[stated])) < 2:
                continue
            facts = [f for f, use in zip(table.facts, stated, strict=True) if use]
            conf, right, who = claimed[stated], true[stated], table.patients[stated]
            for attribute, of in ATTRIBUTES.items():
                groups = [of(f) for f in facts]
                if not any(g is not None for g in groups):
                    continue
                for coverage in COVERAGES:
                    rows += _deferral_rows(
                        {"confidence": name, "attribute": attribute, "coverage": coverage},
                        kept_rows(conf, coverage),
                        right,
                        groups,
                        who,
                        draws,
                    )
    comparisons = {
        (r["confidence"], r["attribute"], r["coverage"]): r for r in rows if r["p"] is not None
    }
    adjusted = holm([row["p"] for row in comparisons.values()])
    found = dict(zip(comparisons, adjusted, strict=True))
    for row in rows:
        row["p_holm"] = found.get((row["confidence"], row["attribute"], row["coverage"]))
    return rows


def _deferral_rows(
    about: Row, kept: Column, right: Column, groups: list[str | None], who: Any, draws: Draws
) -> Iterator[Row]:
    found = disparity(kept, groups, who, **draws._asdict())
    number, _ = named_groups(groups)
    order = sorted(enumerate(found.groups), key=lambda pair: group_order(pair[1].name))
    for g, group in order:
        mine = kept * (number == g)
        yield about | {
            "group": group.name,
            "num": group.num,
            "kept": group.mean,
            "mean_kept": float(mine @ right / mine.sum()) if mine.sum() else None,
            "mean_all": float(right[number == g].mean()),
            "gap": found.gap,
            "null_mean": found.null_mean,
            "p": found.p,
        }

"""The audit: everything that is stated of a run, as one JSON-ready dict computed from its cases.

    found = audit(read_cases("outputs/evaluation/cases.jsonl"))
    found["disparities"][0]["p_case_mix_holm"]

Equal cases and an equal seed give equal numbers. Pages and tables show this dict and compute
nothing; `FORMAT_VERSION` rises whenever a field changes its meaning.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from biascare.evaluation.audit.comparison import compare
from biascare.evaluation.audit.examples import surest_errors, worst_masks
from biascare.evaluation.audit.rows import METRICS, MISSED_DICE, AuditTable, audit_tables
from biascare.evaluation.audit.slices import worst_slices
from biascare.evaluation.audit.summaries import (
    asked_otherwise_rows,
    label_tables,
    volume_tables,
)
from biascare.evaluation.audit.tables import (
    Draws,
    Row,
    calibration,
    cohort,
    deferral_table,
    disparities,
    performance,
)
from biascare.evaluation.audit.thresholds import Thresholds, verdict
from biascare.evaluation.audit.training import training_facts
from biascare.evaluation.benchmarks import (
    benchmark_of,
    benchmark_table,
    labels_and_groups,
    scored_items,
)
from biascare.evaluation.cases import Cases, MaskCase
from biascare.evaluation.metrics.fairness import MIN_CALIBRATION_GROUP, MIN_GROUP, MISSING
from biascare.evaluation.metrics.triage import summarise_triage
from biascare.records import Records

FORMAT, FORMAT_VERSION = "biascare-audit", 1

LEVEL = 0.05
"""A difference is called found at this p, adjusted over its family."""

DRAWS = Draws()

FEW_PATIENTS = 20
"""Below it, percentile intervals of a bootstrap by patient are too narrow."""


def audit(
    cases: Cases,
    *,
    baseline: Cases | None = None,
    thresholds: Thresholds | None = None,
    validation: Cases | None = None,
    training: Sequence[Records] = (),
    draws: Draws = DRAWS,
) -> Row:
    """Raises ValueError for a file without cases, and for a baseline of other truth."""
    tables = audit_tables(cases)
    if not tables:
        raise ValueError("the file holds a header and no case; evaluate again to finish it")
    totals, attributes = cohort(tables)
    comparisons, groups, errors = disparities(tables, draws)
    errors_of_confidence, gaps, bins = calibration(tables, draws)
    slices = {
        name: worst_slices(table, name, draws)
        for table in tables
        for name in table.metrics
        if METRICS[name].primary
    }
    by_unit = {table.unit: table for table in tables}
    label_scores, labels = label_tables(*labels_and_groups(cases))
    volume_means, volumes = volume_tables(cases.masks, cases.header, draws)
    found: Row = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "settings": draws._asdict()
        | {
            "level": LEVEL,
            "min_group": MIN_GROUP,
            "min_calibration_group": MIN_CALIBRATION_GROUP,
            "missed_dice": MISSED_DICE,
        },
        "provenance": _provenance(cases),
        "verdict": None if thresholds is None else verdict(tables, thresholds, draws),
        "cohort": totals,
        "attributes": attributes,
        "metrics": {
            name: METRICS[name]._asdict()
            for name in METRICS
            if any(name in table.metrics for table in tables)
        },
        "performance": performance(tables, draws),
        "benchmark": _benchmark(cases, by_unit.get("masks")),
        **asked_otherwise_rows(cases.answers, draws),
        "labels": labels,
        "label_scores": label_scores,
        "volumes": volumes,
        "volume_means": volume_means,
        "disparities": comparisons,
        "groups": groups,
        "error_types": errors,
        "calibration": errors_of_confidence,
        "calibration_gaps": gaps,
        "reliability_bins": bins,
        "triage": _triage(by_unit.get("masks"), validation),
        "deferral": deferral_table(tables, draws),
        "slices": [row for s in slices.values() for row in s.tested],
        "slice_search": [
            {
                "metric": name,
                "num_searched": s.num_searched,
                "num_tested": sum(row["q"] is not None for row in s.tested),
                "num_confirmed": s.num_confirmed,
            }
            for name, s in slices.items()
        ],
        "worst_masks": [row for _, row in worst_masks(by_unit["masks"])]
        if "masks" in by_unit
        else [],
        "surest_errors": surest_errors(by_unit["answers"]) if "answers" in by_unit else [],
        "training": training_facts(training, tables, cases.header, draws) if training else None,
        "comparison": None
        if baseline is None
        else {"baseline": _provenance(baseline)} | compare(tables, audit_tables(baseline), draws),
    }
    found["warnings"] = list(_warnings(tables, found))
    limit = cases.header.settings.get("limit")
    if limit and any(case.place is not None for case in cases.masks):
        found["warnings"].append(
            f"Volumes are not scored: a limit of {limit} left slices out, and they would count as "
            "slices without the target."
        )
    return _plain(found)


def _benchmark(cases: Cases, masks: AuditTable | None) -> list[Row]:
    """Every number of the benchmark's own protocol, by the path to it; [] for record folders."""
    if cases.header.benchmark is None:
        return []
    benchmark = benchmark_of(cases.header.benchmark)
    pairs = list(zip(cases.masks, masks.scores if masks else [], strict=True))
    items = scored_items(benchmark, pairs, cases.answers, cases.labels)
    return [
        {"what": path, "value": value} for path, value in _leaves(benchmark_table(benchmark, items))
    ]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path} / {key}" if path else str(key))
    elif not isinstance(value, list | tuple):
        yield path, value


def _triage(masks: AuditTable | None, validation: Cases | None) -> Row | None:
    """None without masks that have an uncertainty."""
    if masks is None:
        return None
    known = None
    if validation is not None and validation.masks:
        other = audit_tables(validation._replace(answers=[], labels=[]))[0]
        known = validation.masks, other.scores
    cases = [case for case in masks.cases if isinstance(case, MaskCase)]
    return summarise_triage(cases, masks.scores, known)


def _provenance(cases: Cases) -> Row:
    header = dataclasses.asdict(cases.header)
    # Discs and groups of every target are long, and stand in the cases.
    for name in ("prevalence", "disc_share_by_target"):
        header[f"num_{name}"] = len(header.pop(name))
    return header


def _warnings(tables: Sequence[AuditTable], found: Row) -> Iterator[str]:
    """What makes numbers of this audit weak, with the counts."""
    for table in tables:
        num = len(set(table.patients.tolist()))
        if num < FEW_PATIENTS:
            yield (
                f"The {len(table.facts)} {table.unit} come from {num} patient"
                f"{'' if num == 1 else 's'}: intervals are too narrow below {FEW_PATIENTS}."
            )
    without = found["cohort"]["num_cases_without_patient"]
    total = sum(len(table.facts) for table in tables)
    if without:
        yield (
            f"{without} of {total} cases name no patient: each of their images counts as a patient "
            "of its own, and intervals are too narrow where patients have several images."
        )
    if num := found["cohort"]["num_not_finite"]:
        yield f"{num} numbers of the model are NaN, infinite or no probability and were left out."
    attributes: dict[str, list[Row]] = {}
    for row in found["attributes"]:
        attributes.setdefault(row["attribute"], []).append(row)
    for attribute, rows in attributes.items():
        known = [row for row in rows if row["group"] != MISSING]
        missing = next(row for row in rows if row["group"] == MISSING)
        if not known:
            yield f"{attribute.capitalize()} is not recorded for any case: nothing is compared."
        elif len(known) == 1 and attribute not in ("modality", "source"):
            yield f"All cases of known {attribute} are of one group: nothing is compared."
        elif missing["share"] > 0.1:
            yield f"{attribute.capitalize()} is missing for {missing['share']:.0%} of the cases."
    small: dict[tuple[str, str], list[str]] = {}
    for row in found["groups"]:
        primary = METRICS[row["metric"]].primary
        if primary and row["num"] and row["num"] < MIN_GROUP and row["group"] != MISSING:
            small.setdefault((row["metric"], row["attribute"]), []).append(
                f"{row['group']} ({row['num']})"
            )
    for (metric, attribute), names in small.items():
        title = METRICS[metric].title
        yield (
            f"{title} by {attribute}: groups of fewer than {MIN_GROUP} {METRICS[metric].unit} are "
            f"shown and not compared: {'; '.join(names)}."
        )


def _plain(value: Any) -> Any:
    """JSON-ready: NaN and infinity, which JSON lacks, become None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

"""What is a number of many cases at once, as flat rows: questions asked otherwise, labels, volumes.

    found = asked_otherwise_rows(answers, draws)
    found["image_reliance"][0]["with_image"], found["image_reliance"][0]["num_right_blind"]

Every number is one of `evaluation/metrics`; here they lose their nesting, and none of them its
count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from biascare.evaluation.audit.rows import volume_table
from biascare.evaluation.audit.tables import Draws, Row, means
from biascare.evaluation.cases import AnswerCase, Header, LabelCase, MaskCase
from biascare.evaluation.metrics.answers import asked_otherwise, best_constant, is_correct
from biascare.evaluation.metrics.classification import summarise_labels
from biascare.evaluation.metrics.segmentation import summarise_volumes

CONSTANT = "most frequent answer"
"""A blind baseline that nobody has to be asked for: one answer to all questions of a source."""

KIND_ORDER = ("closed", "choice", "open")


# ---------------------------------------------------------------- questions asked otherwise


def asked_otherwise_rows(cases: Sequence[AnswerCase], draws: Draws) -> dict[str, list[Row]]:
    """`blind`, `image_reliance`, `counterfactual` and `counterfactual_ways`, each [] where no
    question was asked so."""
    by_kind: dict[str, list[AnswerCase]] = defaultdict(list)
    for case in cases:
        if case.facts.kind != "report":
            by_kind[case.facts.kind].append(case)
    found: dict[str, list[Row]] = {
        name: [] for name in ("blind", "image_reliance", "counterfactual", "counterfactual_ways")
    }
    order = [*KIND_ORDER, *sorted(by_kind.keys() - set(KIND_ORDER))]
    for kind in (name for name in order if name in by_kind):
        mine = by_kind[kind]
        tables = asked_otherwise(mine, **draws._asdict())
        if "blind" in tables:
            found["blind"] += _blind_rows(kind, mine, tables["blind"])
            found["image_reliance"] += [
                {"kind": kind, "measure": measure} | cell | _counts(measure, cell)
                for measure, cell in tables["blind"]["image_reliance"].items()
            ]
        for attribute, cell in tables.get("counterfactual", {}).items():
            about = {"kind": kind, "attribute": attribute}
            found["counterfactual"].append(about | _flips(cell))
            found["counterfactual_ways"] += [
                about | {"asked": name} | way for name, way in cell.get("by_variant", {}).items()
            ]
    return found


def _blind_rows(kind: str, cases: Sequence[AnswerCase], table: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for name, by_measure in table["variants"].items():
        missing = by_measure["num_missing"]
        for measure, cell in by_measure.items():
            if measure != "num_missing":
                about = {"kind": kind, "measure": measure, "asked": name}
                rows.append(about | cell | _counts(measure, cell) | {"num_missing": missing})
    right = float(np.mean([is_correct(case.text, case) for case in cases]))
    constant = best_constant(cases)
    cell = {"num": len(cases), "with_image": right, "blind": constant}
    # Chosen among the references themselves: an interval of it would promise what it cannot.
    cell |= {"difference": right - constant, "low": None, "high": None}
    about = {"kind": kind, "measure": "text", "asked": CONSTANT}
    return [*rows, about | cell | _counts("text", cell) | {"num_missing": 0}]


def _counts(measure: str, cell: Mapping[str, Any]) -> Row:
    """Right answers of both sides; None where a measure is no share of answers."""
    return {
        f"num_right_{side}": None if measure == "recall" else round(cell[side] * cell["num"])
        for side in ("with_image", "blind")
    }


def _flips(cell: Mapping[str, Any]) -> Row:
    row: Row = {"num": cell["num"], "num_without": cell["num_without"]}
    for name in ("flipped", "moved"):
        found = cell.get(name, {})
        for key in ("words", "neutral", "difference", "low", "high"):
            row[f"{name}_{key}"] = found.get(key)
    return row


# ---------------------------------------------------------------- labels


def label_tables(
    cases: Sequence[LabelCase], prevalence: Mapping[str, str]
) -> tuple[list[Row], list[Row]]:
    """(one row for every set of labels, one for every label of it, rarest first). A label without a
    positive image has a row like any other, and no AUROC."""
    spaces: dict[tuple[str, ...], list[LabelCase]] = defaultdict(list)
    for case in cases:
        # A probability that is NaN has no rank; the audit counts such numbers.
        if np.isfinite(case.probabilities).all():
            spaces[tuple(case.labels)].append(case)
    totals: list[Row] = []
    rows: list[Row] = []
    for number, (names, mine) in enumerate(spaces.items(), 1):
        table = summarise_labels(mine, prevalence)
        by_label = table.pop("by_label")
        table.pop("by_prevalence")
        flat: Row = {"set": number, "num_labels": len(names), "exclusive": mine[0].exclusive}
        for key, value in table.items():
            # An interval is two columns of a table.
            ends = value if isinstance(value, list) else None
            stem = key.removesuffix("_interval")
            flat |= (
                {key: value}
                if ends is None
                else dict(zip((f"{stem}_low", f"{stem}_high"), ends, strict=True))
            )
        totals.append(flat)
        labels = []
        for name, cell in by_label.items():
            # Of exclusive classes `num` are the images of the class: all were judged for each.
            positive = cell.get("num_positive", cell["num"])
            num = cell["num"] if "num_positive" in cell else table["num"]
            labels.append(
                {
                    "set": number,
                    "label": name,
                    "group": prevalence.get(name),
                    "num": num,
                    "num_positive": positive,
                    "prevalence": positive / num if num else None,
                }
                | {key: cell.get(key) for key in LABEL_SCORES}
                | {
                    f"{key}_{end}": (cell.get(f"{key}_interval") or (None, None))[place]
                    for key in ("auroc", "average_precision")
                    for place, end in enumerate(("low", "high"))
                }
            )
        rows += sorted(labels, key=lambda row: row["num_positive"])
    return totals, rows


LABEL_SCORES = ("auroc", "average_precision", "recall", "precision", "f1", "accuracy", "threshold")
"""What a label may have; recall and precision are of exclusive classes, a threshold of findings."""


# ---------------------------------------------------------------- volumes


def volume_tables(
    cases: Sequence[MaskCase], header: Header, draws: Draws
) -> tuple[list[Row], list[Row]]:
    """(means over volumes and by target with intervals, one row per volume and target, worst Dice
    first); ([], []) where no slice says where it lies, or a limit left slices out."""
    found = summarise_volumes(cases, header)
    if not found:
        return [], []
    table = volume_table(cases, found["each"])
    rows: list[Row] = []
    for metric, values in table.metrics.items():
        rows += means(table, metric, values, "all", ["all"] * len(values), draws)
        targets = [facts.target for facts in table.facts]
        if len(set(targets)) > 1:
            rows += means(table, metric, values, "target", targets, draws)
    return rows, sorted(found["each"], key=lambda row: (row["dice"], row["nsd"]))

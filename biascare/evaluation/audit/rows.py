"""Cases as columns: one number per case and metric, and what is known of the case.

    tables = audit_tables(cases)                    # masks, answers, reports, label cases
    tables[0].metrics["dice"], tables[0].patients

Everything that an audit computes is computed from these columns, so that a metric added here
appears in every table of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from biascare.evaluation.cases import AnswerCase, Cases, FinishedCase, LabelCase, MaskCase
from biascare.evaluation.metrics.answers import (
    CLOSED,
    is_correct,
    normalise_answer,
    open_recall,
    option_confidence,
    option_is_correct,
    read_closed,
    text_confidence,
)
from biascare.evaluation.metrics.bootstrap import patients_of
from biascare.evaluation.metrics.classification import case_score
from biascare.evaluation.metrics.fairness import named_groups
from biascare.evaluation.metrics.reports import rouge1_each
from biascare.evaluation.metrics.segmentation import mask_scores, volumes_of
from biascare.interfaces import Facts
from biascare.records import decode_mask

Column = NDArray[np.float64]


MISSED_DICE = 0.5
"""A mask below this Dice has missed its target: it may overlap, but shows something else."""


class MetricKind(NamedTuple):
    """What a metric is called and which way is good."""

    title: str
    unit: str  # what is counted: masks, answers, reports, images
    primary: bool = False  # its comparisons between groups are the family that findings come from
    higher_is_better: bool = True
    is_share: bool = False  # of rows that are 0 or 1: shown as k of n too
    judged: bool = True  # better or worse; False for what is only a rate
    paired: bool = True  # may be compared between runs; not what a run's own scores have chosen


METRICS: dict[str, MetricKind] = {
    "dice": MetricKind("Dice", "masks", primary=True),
    "dice_hard": MetricKind("Dice of hard targets", "masks", primary=True, paired=False),
    "missed": MetricKind(
        f"masks with a Dice below {MISSED_DICE}", "masks", higher_is_better=False, is_share=True
    ),
    "iou": MetricKind("IoU", "masks"),
    "nsd": MetricKind("normalised surface Dice", "masks"),
    "dice_text": MetricKind("Dice of the text alone", "masks"),
    "dice_corrected": MetricKind("Dice after all corrections", "masks"),
    "accuracy": MetricKind("right answers", "answers", primary=True, is_share=True),
    "option_accuracy": MetricKind("right by the likeliest option", "answers", is_share=True),
    "open_recall": MetricKind("recall of words, open questions", "answers"),
    "true_yes": MetricKind("yes where yes is true (true positive rate)", "answers", is_share=True),
    "false_yes": MetricKind(
        "yes where no is true (false positive rate)",
        "answers",
        higher_is_better=False,
        is_share=True,
    ),
    "said_yes": MetricKind("yes said (selection rate)", "answers", is_share=True, judged=False),
    "rouge1": MetricKind("ROUGE-1 of reports", "reports", primary=True),
    "top_label": MetricKind("likeliest label is present", "images", primary=True, is_share=True),
    "label_agreement": MetricKind(
        "1 - mean squared error of label probabilities", "images", primary=True
    ),
}
"""Every metric that an audit may state, in the order of its tables."""

SIZE_BANDS = ((0.001, "below 0.1 %"), (0.01, "0.1 to 1 %"), (0.1, "1 to 10 %"))
"""Share of the image where a band of mask sizes ends, and its name; above is `LARGEST`."""

LARGEST = "10 % and over"


class AuditTable(NamedTuple):
    """N cases of one kind."""

    unit: str
    cases: Sequence[FinishedCase]
    facts: list[Facts]
    patients: NDArray[np.int64]  # [N], of the image where no patient is known
    case_mix: list[str]  # what makes a case easy or hard
    metrics: dict[str, Column]  # name of `METRICS` -> [N], NaN where a case does not have it
    confidences: dict[str, tuple[Column, Column]]  # name -> what was claimed, what came true
    sizes: list[str] | None  # band of the true mask's size
    scores: list[dict[str, float]]  # `mask_scores` of masks, else empty
    num_not_finite: int  # numbers of the model that are NaN or infinite, and left out


def audit_tables(cases: Cases) -> list[AuditTable]:
    """One table for each kind of case that there is."""
    answers = [case for case in cases.answers if case.facts.kind != "report"]
    reports = [case for case in cases.answers if case.facts.kind == "report"]
    tables = []
    if cases.masks:
        tables.append(_mask_table(cases))
    if answers:
        tables.append(_answer_table(answers))
    if reports:
        tables.append(_report_table(reports))
    if cases.labels:
        tables.append(_label_table(cases.labels))
    return tables


def _table(unit: str, cases: Sequence[Any], mix: list[str], **more: Any) -> AuditTable:
    facts = [case.facts for case in cases]
    patients = patients_of(facts)
    defaults: dict[str, Any] = {"confidences": {}, "sizes": None, "scores": []}
    metrics = {
        # Some cases may lack a metric, and a metric that all lack is none.
        name: column
        for name, column in more.pop("metrics").items()
        if not np.isnan(column).all()
    }
    not_finite = 0
    for name, (claimed, true) in list(more.get("confidences", {}).items()):
        # Infinite or outside of [0, 1] is what a broken head gives: counted, never clipped to look
        # like a statement. NaN is a case that has none.
        broken = ~np.isnan(claimed) & ~((claimed >= 0) & (claimed <= 1))
        not_finite += int(broken.sum())
        more["confidences"][name] = (np.where(broken, np.nan, claimed), true)
    more.setdefault("num_not_finite", 0)
    more["num_not_finite"] += not_finite
    return AuditTable(unit, cases, facts, patients, mix, metrics=metrics, **(defaults | more))


def _mask_table(cases: Cases) -> AuditTable:
    masks = cases.masks
    scores = [mask_scores(case, cases.header) for case in masks]
    dice = np.array([score["dice"] for score in scores])
    last = [max(len(case.predictions) - 1, 0) for case in masks]
    corrected = [
        score[f"dice_click_{n}"] if n else float("nan")
        for score, n in zip(scores, last, strict=True)
    ]
    predicted = np.array([case.predictions[0].predicted_dice for case in masks], np.float64)
    doubts = [v for case in masks for v in case.predictions[0].uncertainty.values()]
    mix = [f"{case.facts.modality}, {case.facts.target}" for case in masks]
    return _table(
        "masks",
        masks,
        mix,
        metrics={
            "dice": dice,
            "dice_hard": of_hard_kinds(dice, mix),
            "missed": (dice < MISSED_DICE).astype(np.float64),
            "iou": np.array([score["iou"] for score in scores]),
            "nsd": np.array([score["nsd"] for score in scores]),
            "dice_text": np.array([score.get("dice_text", np.nan) for score in scores]),
            "dice_corrected": np.array(corrected),
        },
        confidences={"predicted Dice": (predicted, dice)},
        sizes=[size_band(true_share(case)) for case in masks],
        scores=scores,
        num_not_finite=int(np.isnan(predicted).sum()) + sum(not math.isfinite(v) for v in doubts),
    )


def volume_table(cases: Sequence[MaskCase], each: Sequence[Mapping[str, Any]]) -> AuditTable:
    """`each` volume of `summarise_volumes`, as cases that stand for their slices; no part of
    `audit_tables`, where they would count what their masks count already."""
    firsts = [slices[0] for slices in volumes_of(cases).values()]
    return _table(
        "volumes",
        firsts,
        [f"{case.facts.modality}, {case.facts.target}" for case in firsts],
        metrics={
            name: np.array([row[name] for row in each], np.float64)
            for name in ("dice", "iou", "nsd")
        },
    )


def of_hard_kinds(values: Column, case_mix: Sequence[str]) -> Column:
    """[N] `values` of the kinds of case whose mean is below that of all, else NaN.

    A bias that acts on findings alone is lost among organs, which are many and easy. Which kinds
    are hard is decided without looking at groups, so that dealing groups anew stays a fair null.
    """
    mix, strata = named_groups(case_mix)
    means = np.bincount(mix, values, len(strata)) / np.bincount(mix, minlength=len(strata))
    return np.where(means[mix] < values.mean(), values, np.nan)


def true_share(case: MaskCase) -> float:
    """Share of the image that the true mask covers."""
    return float(decode_mask(case.truth.encode("ascii"), case.height, case.width).mean())


def size_band(share: float) -> str:
    if not share:
        return "empty"
    return next((name for end, name in SIZE_BANDS if share < end), LARGEST)


def _answer_table(cases: list[AnswerCase]) -> AuditTable:
    right = _column(cases, lambda case: is_correct(case.text, case))
    option_right = _column(cases, option_is_correct)
    said_yes = _column(cases, _says_yes)
    truth = [normalise_answer(case.reference) for case in cases]
    is_open = [case.facts.kind == "open" for case in cases]
    return _table(
        "answers",
        cases,
        [f"{case.facts.modality}, {case.facts.kind}" for case in cases],
        metrics={
            "accuracy": right,
            "option_accuracy": option_right,
            "open_recall": _column(
                cases,
                lambda case: (
                    open_recall(case.text, case.reference) if case.facts.kind == "open" else None
                ),
            )
            if any(is_open)
            else np.full(len(cases), np.nan),
            "true_yes": np.where([t == "yes" for t in truth], said_yes, np.nan),
            "false_yes": np.where([t == "no" for t in truth], said_yes, np.nan),
            "said_yes": said_yes,
        },
        confidences={
            "confidence of the option": (_column(cases, option_confidence), option_right),
            "confidence of the text": (_column(cases, text_confidence), right),
        },
    )


def _says_yes(case: AnswerCase) -> bool | None:
    """None where yes or no is not the answer; what cannot be read says no yes."""
    if normalise_answer(case.reference) not in CLOSED:
        return None
    return read_closed(case.text, CLOSED) == "yes"


def _report_table(cases: list[AnswerCase]) -> AuditTable:
    overlap = rouge1_each([case.text for case in cases], [case.reference for case in cases])
    return _table(
        "reports",
        cases,
        [case.facts.modality for case in cases],
        metrics={"rouge1": np.array(overlap, np.float64)},
    )


def _label_table(cases: list[LabelCase]) -> AuditTable:
    return _table(
        "images",
        cases,
        [case.facts.modality for case in cases],
        metrics={
            "top_label": _column(cases, _top_label_is_present),
            "label_agreement": _column(
                cases, lambda case: None if case.exclusive else case_score(case)
            ),
        },
        num_not_finite=sum(not math.isfinite(p) for case in cases for p in case.probabilities),
    )


def _top_label_is_present(case: LabelCase) -> bool | None:
    if not case.exclusive or not all(map(math.isfinite, case.probabilities)):
        return None
    return case.present[int(np.argmax(case.probabilities))]


def _column(cases: Sequence[Any], value: Callable[[Any], float | None]) -> Column:
    found = (value(case) for case in cases)
    return np.array([math.nan if v is None else float(v) for v in found], np.float64)

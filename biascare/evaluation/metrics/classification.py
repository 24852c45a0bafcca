"""Label cases to numbers: one of several classes, or any number of findings.

    table = summarise_labels(cases, prevalence)          # of the cases of one benchmark
    rows = choices_as_labels(answers)

The set of classes is fixed by the cases. A class without a positive (or a negative) case has no
average precision and no AUROC: it is named and left out of the macro means, never counted as 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score, precision_recall_curve, precision_recall_fscore_support

from biascare.evaluation.cases import AnswerCase, LabelCase
from biascare.evaluation.metrics.bootstrap import (
    NUM_DRAWS,
    patients_of,
    percentile_interval,
    row_weights,
)

DEVELOPMENT = "val"
"""Split whose cases choose thresholds; scores are of the others."""

BLOCK = 4_000_000
"""Weights held at a time."""

Table = NDArray[np.float64]


def choices_as_labels(answers: Sequence[AnswerCase]) -> list[LabelCase]:
    """Answers whose options are the classes, with the probability of each among the options; those
    without scored options are left out."""
    # In one order: each question shows its options in an order of its own.
    classes = sorted({option for case in answers for option in case.options})
    found = []
    for case in answers:
        if case.option_log_probs is None or sorted(case.options) != classes:
            continue
        share = dict(zip(case.options, option_shares(case.option_log_probs).tolist(), strict=True))
        found.append(
            LabelCase(
                id=case.id,
                facts=case.facts,
                labels=classes,
                probabilities=[share[name] for name in classes],
                present=[name == case.reference for name in classes],
                exclusive=True,
                seconds=case.seconds,
            )
        )
    return found


def option_shares(log_probs: Sequence[float]) -> Table:
    """Probabilities among the options, which are what was scored and not all there is to say."""
    found = np.exp(np.asarray(log_probs, np.float64) - max(log_probs))
    return np.asarray(found / found.sum())


def summarise_labels(
    cases: Sequence[LabelCase], prevalence: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Scores of the cases, per class and by prevalence group of the classes.

    Exclusive classes: accuracy, balanced accuracy, macro F1. Findings: macro average precision (the
    ranking of CXR-LT), macro AUROC, and F1 and accuracy at thresholds that are chosen on the cases
    of the development split, where there are some. Raises ValueError where cases differ in labels.
    """
    names = cases[0].labels if cases else []
    if any(case.labels != names for case in cases):
        raise ValueError("label cases of one table have the same labels in the same order")
    scored = scored_labels(cases)
    if not scored:
        return {"num": 0}
    development = [case for case in cases if case.facts.split == DEVELOPMENT]
    development = development if scored[0].facts.split != DEVELOPMENT else []
    table = _exclusive(scored) if scored[0].exclusive else _findings(scored, development)
    groups = {name: (prevalence or {}).get(name) for name in names}
    known = sorted({group for group in groups.values() if group is not None})
    table["by_prevalence"] = {
        group: {
            "labels": [name for name in names if groups[name] == group],
            **_means([cell for name, cell in table["by_label"].items() if groups[name] == group]),
        }
        for group in known
    }
    return table


def scored_labels(cases: Sequence[LabelCase]) -> list[LabelCase]:
    """All but those of the development split, unless there are no others."""
    return [case for case in cases if case.facts.split != DEVELOPMENT] or list(cases)


def case_score(case: LabelCase) -> float:
    """One number of one image, for comparisons of groups: whether the likeliest class is the true
    one; of findings, 1 minus the mean squared difference of probability and presence over those
    that were judged (NaN without any)."""
    probabilities, present = arrays([case])
    if case.exclusive:
        return float(probabilities.argmax() == present.argmax())
    # A probability that is no number is counted by who reads cases, and judges nothing.
    judged = ~np.isnan(present) & np.isfinite(probabilities)
    return float(1 - ((probabilities - present)[judged] ** 2).mean()) if judged.any() else np.nan


def arrays(cases: Sequence[LabelCase]) -> tuple[Table, Table]:
    """(probabilities [N, K], presence [N, K] of 1, 0 and NaN where nobody judged)."""
    present = [[np.nan if p is None else float(p) for p in case.present] for case in cases]
    return np.array([case.probabilities for case in cases], np.float64), np.array(present)


# ---------------------------------------------------------------- one class of several


def _exclusive(cases: Sequence[LabelCase]) -> dict[str, Any]:
    names = cases[0].labels
    probabilities, present = arrays(cases)
    truth, said = present.argmax(1), probabilities.argmax(1)
    numbers = list(range(len(names)))
    precision, recall, f1, num = precision_recall_fscore_support(
        truth, said, labels=numbers, zero_division=0
    )
    seen = num > 0
    clusters = _clusters(cases)
    draws = np.array(
        [
            (
                _ratio((weights * (truth == said)).sum(), weights.sum()),
                # A draw without a case of a class leaves the class out of this draw.
                np.nanmean(
                    _ratio(
                        np.bincount(truth, weights * (truth == said), len(names)),
                        np.bincount(truth, weights, len(names)),
                    )
                ),
            )
            for weights in row_weights(clusters, NUM_DRAWS)
        ]
    )
    low, high = percentile_interval(draws)
    ranks = class_scores(probabilities, present)
    _, each = _bootstrapped(probabilities, present, clusters)
    return {
        "num": len(cases),
        "accuracy": float((truth == said).mean()),
        "accuracy_interval": [float(low[0]), float(high[0])],
        "balanced_accuracy": float(recall[seen].mean()),
        "balanced_accuracy_interval": [float(low[1]), float(high[1])],
        "macro_f1": float(f1_score(truth, said, labels=numbers, average="macro", zero_division=0)),
        "num_absent": int((~seen).sum()),
        "macro_auroc": _mean(ranks["auroc"]),
        "by_label": {
            name: {
                "num": int(num[k]),
                "recall": float(recall[k]) if seen[k] else None,
                "precision": float(precision[k]),
                "f1": float(f1[k]) if seen[k] else None,
                "average_precision": _or_none(ranks["average_precision"][k]),
                "auroc": _or_none(ranks["auroc"][k]),
                **each[k],
            }
            for k, name in enumerate(names)
        },
    }


# ---------------------------------------------------------------- any number of findings


def _findings(cases: Sequence[LabelCase], development: Sequence[LabelCase]) -> dict[str, Any]:
    names = cases[0].labels
    probabilities, present = arrays(cases)
    scores = class_scores(probabilities, present)
    positives = np.nansum(present, 0)
    judged = (~np.isnan(present)).sum(0)
    intervals, each = _bootstrapped(probabilities, present, _clusters(cases))
    by_label: dict[str, dict[str, Any]] = {
        name: {
            "num": int(judged[k]),
            "num_positive": int(positives[k]),
            "average_precision": _or_none(scores["average_precision"][k]),
            "auroc": _or_none(scores["auroc"][k]),
            **each[k],
        }
        for k, name in enumerate(names)
    }
    table: dict[str, Any] = {
        "num": len(cases),
        "macro_average_precision": _mean(scores["average_precision"]),
        "macro_auroc": _mean(scores["auroc"]),
        # What a ranking by chance has: AP follows the prevalence, AUROC does not.
        "prevalence": float(np.mean(positives / np.maximum(judged, 1))),
        "num_without_positive": int((positives == 0).sum()),
        **intervals,
    }
    if development:
        thresholds = best_thresholds(*arrays(development))
        said = probabilities >= thresholds
        known = ~np.isnan(present)
        for k, name in enumerate(names):
            truth, mine = present[known[:, k], k], said[known[:, k], k]
            # None: nobody had it in the development split, so it is never called.
            by_label[name]["threshold"] = float(thresholds[k]) if thresholds[k] <= 1 else None
            # A label nobody has: its F1 is 0 / 0, and says nothing of the model.
            f1 = f1_score(truth, mine, zero_division=0) if truth.any() else None
            by_label[name]["f1"] = None if f1 is None else float(f1)
            by_label[name]["accuracy"] = float((truth == mine).mean()) if len(truth) else None
        means = _means(list(by_label.values()))
        table |= {"macro_f1": means.get("f1"), "macro_accuracy": means.get("accuracy")}
    return table | {"by_label": by_label}


def class_scores(
    probabilities: Table, present: Table, weights: Table | None = None
) -> dict[str, Table]:
    """`average_precision` and `auroc` of every class, [..., K]; NaN where a class lacks positives
    or negatives.

    `weights` [D, N]: of the cases in each of D draws; the results are then [D, K]. Cases that
    nobody judged for a class are left out of it. Ties count as scikit-learn counts them.
    """
    drawn = np.ones((1, len(present))) if weights is None else weights
    found = [
        _ranked(probabilities[known, k], present[known, k], drawn[:, known])
        for k, known in enumerate((~np.isnan(present)).T)
    ]
    precision, auroc = (np.stack(column, 1) for column in zip(*found, strict=True))
    if weights is None:
        precision, auroc = precision[0], auroc[0]
    return {"average_precision": precision, "auroc": auroc}


def _ranked(score: Table, truth: Table, weights: Table) -> tuple[Table, Table]:
    """([D] average precision, [D] AUROC) of one class."""
    order = np.argsort(-score, kind="stable")
    # Cases of equal score stand at one threshold; the last of each run is where it is read.
    ends = np.flatnonzero(np.diff(score[order], append=-np.inf))
    weighted = weights[:, order]
    hits = np.cumsum(weighted * truth[order], 1)[:, ends]
    taken = np.cumsum(weighted, 1)[:, ends]
    if not len(ends):
        return np.full(len(weights), np.nan), np.full(len(weights), np.nan)
    positives, negatives = hits[:, -1:], taken[:, -1:] - hits[:, -1:]
    gained = np.diff(hits, axis=1, prepend=0.0)
    average = _ratio((_ratio(hits, taken, 0.0) * gained).sum(1), positives[:, 0])
    misses = taken - hits
    # The area under the curve by trapezoids: ties count half.
    before = np.concatenate([np.zeros((len(weights), 1)), hits[:, :-1]], 1)
    area = (np.diff(misses, axis=1, prepend=0.0) * (hits + before) / 2).sum(1)
    auroc = _ratio(area, (positives * negatives)[:, 0])
    return np.where(negatives[:, 0] > 0, average, np.nan), auroc


def best_thresholds(probabilities: Table, present: Table) -> Table:
    """[K] probability from which each finding is called present: the one of highest F1; infinite
    for a class without positives here, which is then never called."""
    result = np.full(probabilities.shape[1], np.inf)
    for k, known in enumerate((~np.isnan(present)).T):
        truth = present[known, k]
        if truth.any():
            precision, recall, at = precision_recall_curve(truth, probabilities[known, k])
            f1 = _ratio(2 * precision * recall, precision + recall, 0.0)
            result[k] = at[int(f1[:-1].argmax())]
    return result


def _bootstrapped(
    probabilities: Table, present: Table, clusters: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(95 % intervals of both macro means, and how often a draw had no positive of a class; those
    of each class). A draw of patients without a positive of a class leaves the class out of it."""
    drawn = list(row_weights(clusters, NUM_DRAWS))
    block = max(1, BLOCK // max(1, len(present)))
    blocks = [
        class_scores(probabilities, present, np.stack(drawn[first : first + block]))
        for first in range(0, len(drawn), block)
    ]
    macro: dict[str, Any] = {}
    each: list[dict[str, Any]] = [{} for _ in range(present.shape[1])]
    for name in ("average_precision", "auroc"):
        scores = np.concatenate([found[name] for found in blocks])
        low, high = percentile_interval(_nanmean(scores)[:, None])
        macro[f"macro_{name}_interval"] = [_or_none(low[0]), _or_none(high[0])]
        # Of the draws times the classes.
        macro["num_left_out_of_draws"] = int(np.isnan(scores).sum())
        for cell, a, b in zip(each, *percentile_interval(scores), strict=True):
            # Three positives in front give 1 in every draw: that is no certainty.
            cell[f"{name}_interval"] = [float(a), float(b)] if a < b else None
    return macro, each


# ---------------------------------------------------------------- small things


def _clusters(cases: Sequence[LabelCase]) -> NDArray[np.int64]:
    return patients_of([case.facts for case in cases])


def _means(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean over classes of everything that is a score; None where no class has it."""
    names = dict.fromkeys(name for cell in cells for name in cell)
    names = {name: None for name in names if not name.endswith("_interval")}
    counts = ("num", "num_positive", "threshold")
    means: dict[str, Any] = {"num_labels": len(cells)}
    for name in names:
        found = [cell[name] for cell in cells if cell.get(name) is not None]
        if name in counts:
            if name != "threshold":
                means[name] = int(sum(found))
        else:
            means[name] = float(np.mean(found)) if found else None
    return means


def _ratio(above: Any, below: Any, empty: float = np.nan) -> Any:
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    return np.divide(above, below, out=np.full(above.shape, empty), where=below > 0)


def _nanmean(values: Table) -> Table:
    known = ~np.isnan(values)
    result: Table = _ratio(np.where(known, values, 0).sum(1), known.sum(1))
    return result


def _mean(values: Table) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)

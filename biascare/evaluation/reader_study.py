"""Readers' answers against the truth: who got better with the model, at what, and for whom.

    study = make_study(label_cases, log.answers)
    found = analyse(study)
    found["comparison"]["accuracy"], found["readers"], found["groups"]

Truth, categories, patients and the model's own answers come from label cases, readers' answers from
logs; statistics over readers and cases from `metrics/readers.py`. `found` is JSON: what cannot be
computed is None, with a sentence in `found["notes"]` that says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

from biascare.evaluation.cases import LabelCase
from biascare.evaluation.metrics.bootstrap import NUM_DRAWS, patients_of
from biascare.evaluation.metrics.classification import arrays
from biascare.evaluation.metrics.fairness import disparity, holm
from biascare.evaluation.metrics.groups import ATTRIBUTES, group_order
from biascare.evaluation.metrics.readers import (
    Array,
    against_alone,
    compare_tests,
    delong,
    jackknife,
    mean_of_readers,
    unbiased_covariance,
)
from biascare.evaluation.reader_log import ROUNDS, ReaderAnswer

ALL_READERS = "all readers"
GROUPED_BY = ("sex", "age", "race")
Z = float(norm.ppf(0.975))


class Study(NamedTuple):
    """R readers in T = 2 rounds of the N cases that at least one of them answered; NaN where a
    reader did not."""

    readers: list[str]
    cases: Sequence[LabelCase]
    categories: list[str]
    present: Array  # [N, K] 1, 0, NaN where nobody judged
    correct: Array  # [T, R, N] 1 where everything that was judged is ticked rightly
    ticked: Array  # [T, R, N, K] 1, 0
    seconds: Array  # [T, R, N]
    confidence: Array  # [T, R, N], NaN where not asked too
    suggested: Array  # [R, N] whether the suggestion that was shown is right, NaN for none
    model: Array  # [N] whether the model alone is right
    num_other_suggestions: int  # shown, but not what the model finds likeliest
    num_unread: int  # cases that no reader answered, left out, for the model alone too
    num_unjudged: int  # cases without any judged category, left out
    patients: NDArray[np.int64]  # [N]


def make_study(cases: Sequence[LabelCase], answers: Sequence[ReaderAnswer]) -> Study:
    """Answers as tables. Cases without any judged category, and those that nobody answered, are
    left out and counted. Raises ValueError for cases of different categories or with equal ids."""
    if any(case.labels != cases[0].labels for case in cases):
        raise ValueError("the cases of one study have the same categories in the same order")
    if len({case.id for case in cases}) < len(cases):
        raise ValueError(
            "two cases have the same id, so an answer could mean either: make one file"
        )
    known = [case for case in cases if any(value is not None for value in case.present)]
    answered = {answer.case for answer in answers}
    judged = [case for case in known if case.id in answered]
    if not judged:
        raise ValueError(
            "no answered case has a judged category: without truth nothing can be right"
        )
    readers = sorted({answer.reader for answer in answers})
    categories = list(cases[0].labels)
    place = {case.id: number for number, case in enumerate(judged)}
    probabilities, present = arrays(judged)
    shape = (len(ROUNDS), len(readers), len(judged))
    correct, seconds, confidence = (np.full(shape, np.nan) for _ in range(3))
    ticked = np.full((*shape, len(categories)), np.nan)
    shown = np.full((*shape[1:], len(categories)), np.nan)
    for answer in answers:
        if answer.case not in place:
            continue
        at = (ROUNDS.index(answer.round), readers.index(answer.reader), place[answer.case])
        ticked[at] = [name in answer.choices for name in categories]
        correct[at] = _is_right(ticked[at], present[at[2]])
        seconds[at] = answer.seconds
        confidence[at] = np.nan if answer.confidence is None else answer.confidence
        if answer.suggestion is not None:
            shown[at[1:]] = [name in answer.suggestion for name in categories]
    suggested = np.full(shape[1:], np.nan)
    for reader, number in zip(*np.nonzero(~np.isnan(shown[..., 0])), strict=True):
        suggested[reader, number] = _is_right(shown[reader, number], present[number])
    model, num_other = np.full(len(judged), np.nan), 0
    for number, case in enumerate(judged):
        seen = shown[:, number][~np.isnan(shown[:, number, 0])]
        if case.exclusive:
            said = np.eye(len(categories))[probabilities[number].argmax()]
            # A study may show wrong suggestions on purpose; the model alone did not say them.
            num_other += int((seen != said).any(1).sum())
            model[number] = _is_right(said, present[number])
        elif len(seen) and (seen == seen[0]).all():
            # Findings have thresholds that cases do not state; what was shown has passed them.
            model[number] = _is_right(seen[0], present[number])
    return Study(
        readers,
        judged,
        categories,
        present,
        correct,
        ticked,
        seconds,
        confidence,
        suggested,
        model,
        num_other,
        len(known) - len(judged),
        len(cases) - len(known),
        patients_of([case.facts for case in judged]),
    )


def _is_right(ticked: Array, present: Array) -> float:
    known = ~np.isnan(present)
    return float((ticked[known] == present[known]).all())


# ---------------------------------------------------------------- the analysis


def analyse(study: Study, *, num_draws: int = NUM_DRAWS, seed: int = 0) -> dict[str, Any]:
    """Everything that a study states, as JSON."""
    notes: list[str] = []
    readers = list(_readers(study))
    for row, p in zip(readers, holm([row["p"] for row in readers]), strict=True):
        row["p_holm"] = p
    groups = list(_groups(study, num_draws, seed))
    tested = [row for row in groups if row["p"] is not None]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    read = ~np.isnan(study.correct)
    if study.num_unread:
        notes.append(f"{study.num_unread:,} cases were answered by no reader and are left out.")
    if study.num_unjudged:
        notes.append(f"{study.num_unjudged:,} cases have no judged category and are left out.")
    expected = read.shape[1] * read.shape[2]
    for number, name in enumerate(ROUNDS):
        if (missing := expected - int(read[number].sum())) > 0:
            notes.append(
                f"{missing:,} of {expected:,} answers {name} the model are missing: the readers "
                "are compared on what each has read, and the intervals allow for it."
            )
    if study.num_other_suggestions:
        notes.append(
            f"{study.num_other_suggestions:,} suggestions that were shown are not what the model "
            "finds likeliest; the model alone is judged by what it finds likeliest."
        )
    return _plain(
        {
            "num_cases": len(study.cases),
            "num_patients": int(study.patients.max(initial=-1)) + 1,
            "num_answers": int(read.sum()),
            "categories": study.categories,
            "one_choice": study.cases[0].exclusive,
            "patients_repeat": _patients_repeat(study),
            "comparison": _comparison(study, notes),
            "alone": _alone(study, notes),
            "readers": readers,
            "rounds": list(_rounds(study)),
            "categories_changed": list(_categories(study)),
            "suggestions": list(_suggestions(study)),
            "groups": groups,
            "notes": notes,
        }
    )


def _patients_repeat(study: Study) -> bool:
    return len(np.unique(study.patients)) < len(study.patients)


def _mean_covariance(study: Study, values: Array) -> Array:
    """[U, U] of the means of `values` [U, N]."""
    if _patients_repeat(study):
        return jackknife(lambda kept, _: float(kept.mean()), values, study.patients)[1]
    return unbiased_covariance(values)


def _comparable(study: Study, values: Array) -> list[int]:
    """Readers with values [T, R, N] of two patients in every round: a variance needs two."""
    return [
        reader
        for reader in range(values.shape[1])
        if all(_num_patients(study, ~np.isnan(values[k, reader])) >= 2 for k in range(len(values)))
    ]


def _num_patients(study: Study, chosen: NDArray[np.bool_]) -> int:
    return len(np.unique(study.patients[chosen]))


def _comparison(study: Study, notes: list[str]) -> dict[str, Any]:
    """With the model against without it, for readers and cases like these."""
    found: dict[str, Any] = {"accuracy": None, "auc": None, "seconds_ratio": None}
    chosen = _comparable(study, study.correct)
    for number, name in enumerate(study.readers):
        if number not in chosen:
            notes.append(
                f"Reader {name} has answers on fewer than two patients in one of the rounds and "
                "takes no part in the comparison of the rounds."
            )
    if len(chosen) < 2:
        notes.append(
            f"{len(chosen)} reader has answered in both rounds: nothing can be said of readers in "
            "general; at least two are needed."
        )
        return found
    correct = study.correct[:, chosen]
    units = correct.reshape(-1, correct.shape[2])
    estimates = np.nanmean(correct, 2)
    found["accuracy"] = _named(estimates, _mean_covariance(study, units))
    # Half the time is as far from the same time as twice the time: ratios, so logarithms.
    ratio = np.log(np.maximum(study.seconds[:, chosen], 0.01))
    lasted = _named(
        np.nanmean(ratio, 2), _mean_covariance(study, ratio.reshape(-1, ratio.shape[2]))
    )
    found["seconds_ratio"] = {
        "ratio": np.exp(lasted["difference"]),
        "low": np.exp(lasted["low"]),
        "high": np.exp(lasted["high"]),
        "p": lasted["p"],
    }
    ratings = _ratings(study)
    if ratings is not None:
        rated = [r for r in range(len(study.readers)) if _has_both(study, ratings[:, r])]
        if len(rated) >= 2:
            area = _areas(study, ratings[:, rated].reshape(-1, ratings.shape[2]))
            found["auc"] = _named(area[0].reshape(2, -1), area[1])
        else:
            notes.append("No AUC: fewer than two readers have three patients of each category.")
    return found


def _named(estimates: Array, covariance: Array) -> dict[str, Any]:
    """The comparison, and each round's mean with an interval of its own."""
    size = estimates.shape[1]
    rounds = {
        name: mean_of_readers(
            estimates[k], covariance[k * size : (k + 1) * size, k * size : (k + 1) * size]
        )._asdict()
        for k, name in enumerate(ROUNDS)
    }
    return compare_tests(estimates, covariance)._asdict() | {"num_readers": size, "rounds": rounds}


def _ratings(study: Study) -> Array | None:
    """[T, R, N] how sure a reader is of the second of two categories; None where readers choose
    among more, or said no confidence."""
    if not study.cases[0].exclusive or len(study.categories) != 2:
        return None
    second = study.ticked[..., 1] == 1
    ratings = np.where(second, study.confidence, 1 - study.confidence)
    return None if np.isnan(ratings).all() else ratings


def _has_both(study: Study, ratings: Array) -> bool:
    """Whether every round of `ratings` [T, N] has three patients of each category: one may be left
    out, and a variance needs two."""
    second, read = study.present[:, 1] == 1, ~np.isnan(ratings)
    return all(_num_patients(study, row & of) >= 3 for row in read for of in (second, ~second))


def _areas(study: Study, ratings: Array) -> tuple[Array, Array]:
    positive = study.present[:, 1] == 1
    if _patients_repeat(study):

        def area(values: Array, kept: NDArray[np.int64]) -> float:
            return float(delong(values[None], positive[kept])[0][0])

        return jackknife(area, ratings, study.patients)
    return delong(ratings, positive)


def _alone(study: Study, notes: list[str]) -> dict[str, Any] | None:
    """The model alone, and readers less the model, by round."""
    known = ~np.isnan(study.model)
    if not known.any():
        notes.append(
            "The model alone is not judged: the cases are findings, and no log states what was "
            "suggested."
        )
        return None
    row: dict[str, Any] = {"num": int(known.sum()), "auc": None}
    row["accuracy"], row["low"], row["high"] = _share(study.model, study.patients)
    ratings = _ratings(study)
    for number, name in enumerate(ROUNDS):
        less = study.correct[number] - study.model
        less = less[_comparable(study, less[None])]
        row[name] = None
        if len(less) >= 2:
            covariance = _mean_covariance(study, less)
            row[name] = mean_of_readers(np.nanmean(less, 1), covariance)._asdict()
        row[f"{name}_auc"] = None
        if ratings is not None:
            both = [r for r in range(len(study.readers)) if _has_both(study, ratings[[number], r])]
            if len(both) >= 2:
                own = np.array([case.probabilities[1] for case in study.cases])
                areas, covariance = _areas(study, np.vstack([ratings[number, both], own]))
                row["auc"] = areas[-1]
                row[f"{name}_auc"] = against_alone(areas[:-1], areas[-1], covariance)._asdict()
    return row


def _share(values: Array, patients: NDArray[np.int64]) -> tuple[float, float, float]:
    """(mean of 0 and 1 [N], NaN left out; Wilson's 95 % interval for as many independent cases)."""
    kept = ~np.isnan(values)
    num = int(kept.sum())
    mean = float(values[kept].mean())
    size = float(len(np.unique(patients[kept])))
    if 1 < size < num:
        variance = jackknife(lambda v, _: float(v.mean()), values[None], patients)[1][0, 0]
        # Images of one patient say less than as many patients.
        size = min(mean * (1 - mean) / variance, num) if variance > 0 else size
    middle, spread = (mean + Z**2 / (2 * size)), mean * (1 - mean) / size + Z**2 / (4 * size**2)
    scale = 1 + Z**2 / size
    reach = Z * np.sqrt(spread)
    return mean, max((middle - reach) / scale, 0.0), min((middle + reach) / scale, 1.0)


# ---------------------------------------------------------------- reader by reader


def _rounds(study: Study) -> Iterator[dict[str, Any]]:
    """Accuracy and time of each reader in each round."""
    for reader, name in enumerate(study.readers):
        for number, which in enumerate(ROUNDS):
            correct, seconds = study.correct[number, reader], study.seconds[number, reader]
            if np.isnan(correct).all():
                continue
            accuracy, low, high = _share(correct, study.patients)
            first, median, third = np.nanquantile(seconds, (0.25, 0.5, 0.75))
            yield {
                "reader": name,
                "round": which,
                "num": int((~np.isnan(correct)).sum()),
                "accuracy": accuracy,
                "low": low,
                "high": high,
                "seconds_median": median,
                "seconds_first_quartile": first,
                "seconds_third_quartile": third,
                "seconds_total": np.nansum(seconds),
            }


def _readers(study: Study) -> Iterator[dict[str, Any]]:
    """What changed for each reader, on the cases of both rounds."""
    for reader, name in enumerate(study.readers):
        before, after = study.correct[:, reader]
        both = ~np.isnan(before + after)
        if not both.any():
            continue
        lost, won = _changes(before[both], after[both])
        num, change = int(both.sum()), after - before
        if _patients_repeat(study) and len(np.unique(study.patients[both])) > 1:
            spread = np.sqrt(_mean_covariance(study, change[None])[0, 0])
            middle = (won - lost) / num
        else:
            # Bonett and Price (2012): one imagined change each way, so that no change among few
            # cases is not taken for certainty.
            up, down = (won + 1) / (num + 2), (lost + 1) / (num + 2)
            middle, spread = up - down, np.sqrt((up + down - (up - down) ** 2) / (num + 2))
        yield {
            "reader": name,
            "num": num,
            "accuracy_without": float(before[both].mean()),
            "accuracy_with": float(after[both].mean()),
            "difference": (won - lost) / num,
            "low": max(middle - Z * spread, -1.0),
            "high": min(middle + Z * spread, 1.0),
            "wrong_to_right": won,
            "right_to_wrong": lost,
            "p": float(binomtest(won, won + lost).pvalue) if won + lost else 1.0,
            "worse": won < lost,
        }


def _changes(before: Array, after: Array) -> tuple[int, int]:
    """(right before and wrong after, the other way round)."""
    return int(((before == 1) & (after == 0)).sum()), int(((before == 0) & (after == 1)).sum())


def _change_counts(before: Array, after: Array) -> dict[str, int]:
    lost, won = _changes(before, after)
    return {
        "num": len(before),
        "right_without": int(before.sum()),
        "right_with": int(after.sum()),
        "wrong_to_right": won,
        "right_to_wrong": lost,
    }


def _categories(study: Study) -> Iterator[dict[str, Any]]:
    """For each category, by reader and over all: ticked where it is present, and where it is not;
    on the cases of both rounds."""
    right = np.where(np.isnan(study.ticked), np.nan, study.ticked == study.present)
    both = ~np.isnan(study.ticked).any((0, 3))
    for k, category in enumerate(study.categories):
        for state, value in (("present", 1), ("absent", 0)):
            mine = both & (study.present[:, k] == value)
            for name, rows in _each_reader(study):
                chosen = mine & rows[:, None]
                if not chosen.any():
                    continue
                before, after = right[0, ..., k][chosen], right[1, ..., k][chosen]
                yield {
                    "category": category,
                    "state": state,
                    "reader": name,
                    **_change_counts(before, after),
                }


def _suggestions(study: Study) -> Iterator[dict[str, Any]]:
    """What a right and what a wrong suggestion did: readers follow wrong ones too."""
    for name, rows in _each_reader(study):
        for kind, value in (("right", 1), ("wrong", 0)):
            chosen = (study.suggested == value) & ~np.isnan(study.correct).any(0) & rows[:, None]
            if chosen.any():
                before, after = study.correct[0][chosen], study.correct[1][chosen]
                yield {
                    "reader": name,
                    "suggestion": kind,
                    **_change_counts(before, after),
                }


def _each_reader(study: Study) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    yield ALL_READERS, np.ones(len(study.readers), bool)
    for reader, name in enumerate(study.readers):
        yield name, np.arange(len(study.readers)) == reader


def _groups(study: Study, num_draws: int, seed: int) -> Iterator[dict[str, Any]]:
    """Accuracy by group of patients, for every reader and round, with the spread beside chance."""
    facts = [case.facts for case in study.cases]
    for attribute in GROUPED_BY:
        values = [ATTRIBUTES[attribute](one) for one in facts]
        if all(value is None for value in values):
            continue
        for number, which in enumerate(ROUNDS):
            for name, rows in _each_reader(study):
                correct = study.correct[number][rows]
                read = ~np.isnan(correct).all(0)
                if not read.any():
                    continue
                # Of all readers a case counts once, with the share of readers who are right: as
                # so many cases the same patient would be drawn apart from itself.
                mean = np.full(len(values), np.nan)
                mean[read] = np.nanmean(correct[:, read], 0)
                found = disparity(mean, values, study.patients, num_draws=num_draws, seed=seed)
                row = found._asdict()
                groups = sorted(row.pop("groups"), key=lambda group: group_order(group.name))
                kept = ("worst", "best", "gap", "gap_low", "gap_high", "null_mean", "detectable")
                yield {
                    "attribute": attribute,
                    "round": which,
                    "reader": name,
                    "groups": [group._asdict() for group in groups if group.num],
                    **{key: row[key] for key in kept},
                    "p": row["p"],
                    "p_holm": None,
                }


def _plain(value: Any) -> Any:
    """JSON: numbers of numpy as Python's, and None for what is not finite."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value

"""Which masks should a person look at first: how well each label-free uncertainty tells.

    found = summarise_triage(cases, scores)                                     # of one evaluation
    found = summarise_triage(cases, scores, (validation_cases, validation_scores))
    found["signals"]["semantic"]["auroc"], found["review"]["orders"]["semantic"]["overall"]

A mask with a Dice below `FAILURE_DICE` has failed. Everything is of the first prediction, because
that is what decides whether an expert is called. A mix of the signals and thresholds that promise
something are fitted on cases of the validation split, never on those that they are judged on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import trapezoid  # type: ignore[import-untyped, unused-ignore]
from scipy.stats import beta, rankdata, t  # type: ignore[import-untyped, unused-ignore]
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold

from biascare.evaluation.cases import MaskCase
from biascare.evaluation.metrics.bootstrap import (
    BLOCK,
    NUM_DRAWS,
    cluster_weights,
    clustered,
    patients_of,
    percentile_interval,
)
from biascare.evaluation.metrics.calibration import risk_coverage
from biascare.evaluation.metrics.fairness import named_groups
from biascare.evaluation.metrics.groups import ATTRIBUTES
from biascare.interfaces import Facts

Array = NDArray[np.float64]

FAILURE_DICE = 0.7
"""A mask below this Dice has failed: an expert would draw it again rather than mend it."""

MIX = "mix"
"""Name of the mix beside the signals that it is made of."""

AXES: dict[str, Callable[[Facts], str | None]] = {
    **ATTRIBUTES,
    "prevalence": lambda facts: facts.prevalence,
    "modality": lambda facts: facts.modality,
}
"""What groups are formed by."""

REVIEWED = np.linspace(0, 1, 21)
"""Shares of the cases that are corrected, for the review curve."""

MAX_RISK = 0.1
"""Share of failed masks that is allowed among those accepted without review."""

RISK_ERROR = 0.1
"""Probability that a threshold breaks its promise."""

NUM_STARTS = 4
"""Places on the ladder of thresholds from which it is climbed: a single failed mask among the most
certain ones would otherwise end it at its first rung."""

NUM_FOLDS = 5


class Doubts(NamedTuple):
    """What is known of N cases."""

    cases: Sequence[MaskCase]
    signals: dict[str, Array]  # [N] each; NaN where a case lacks it
    failed: NDArray[np.bool_]  # [N]
    patients: NDArray[np.int64]  # [N], see `patients_of`


def summarise_triage(
    cases: Sequence[MaskCase],
    scores: Sequence[Mapping[str, float]],
    validation: tuple[Sequence[MaskCase], Sequence[Mapping[str, float]]] | None = None,
) -> dict[str, Any]:
    """How well uncertainties find failed masks, and what a review in their order would gain.

    `scores` are the `mask_scores` of the cases. `validation`: cases of the same model on other
    patients, with their scores. The result is plain JSON:

    - `num`, `num_failed`, `failure_dice`
    - `signals`: {name: num, num_failed, mean, auroc, low, high, aurc, by_group {axis: {group:
      num, num_failed, auroc, low, high}}}; an AUROC is None where all or no masks failed
    - `review`: num (cases that have a correction), fraction, orders {name, "random" or "oracle":
      overall, tail, found, area, area_low, area_high, share_of_oracle}, by_group {axis: {group:
      num, orders {name: Dice}}}
    - `mix`: signals, center, scale, weights, intercept; None with `why_no_mix`
    - `risk_control`: {name: threshold (None with `why`), validation, test, by_group}; None without
      validation

    Raises ValueError where a case or a patient of the validation is among the cases.
    """
    doubts = _doubts(cases, scores)
    mix: dict[str, Any] | None = None
    why: str | None = "no validation cases were given"
    risk_control = None
    if validation is not None:
        check_apart(cases, validation[0])
        known = _doubts(*validation)
        shared = [
            name
            for name in known.signals
            if name in doubts.signals
            and np.isfinite(known.signals[name]).all()
            and np.isfinite(doubts.signals[name]).all()
        ]
        mix, why = fit_mix(known, shared)
        if mix is not None:
            doubts.signals[MIX] = apply_mix(mix, doubts.signals)
        # Of the mix, what it says of patients it was not fitted on: of its own it is too sure.
        apart = mix_out_of_fold(known, shared) if mix is not None else None
        calibrated = known.signals if apart is None else known.signals | {MIX: apart}
        risk_control = {
            name: _risk_table(known._replace(signals=calibrated), doubts, name)
            for name in calibrated
            if name in doubts.signals
        }
    return {
        "num": len(cases),
        "num_failed": int(doubts.failed.sum()),
        "failure_dice": FAILURE_DICE,
        "signals": {name: _signal_table(doubts, name) for name in doubts.signals},
        "review": _review_table(doubts, scores),
        "mix": mix,
        "why_no_mix": why,
        "risk_control": risk_control,
    }


def check_apart(cases: Sequence[MaskCase], validation: Sequence[MaskCase]) -> None:
    """Raises ValueError where a case or a patient is in both."""
    # By name and source: what was fitted on a patient is not judged on the same.
    ours = {(case.facts.source, case.id) for case in cases}
    ours |= {(f.source, f.patient_id) for f in (case.facts for case in cases) if f.patient_id}
    for case in validation:
        facts = case.facts
        if (facts.source, case.id) in ours or (facts.source, facts.patient_id) in ours:
            raise ValueError(
                f"validation: case {case.id!r} of {facts.source} (patient {facts.patient_id}) is "
                "among the cases to judge, or another of its patient; expected cases of other "
                "patients, such as those of the validation split"
            )


def _doubts(cases: Sequence[MaskCase], scores: Sequence[Mapping[str, float]]) -> Doubts:
    names = dict.fromkeys(n for case in cases for n in case.predictions[0].uncertainty)
    found = {
        name: np.array(
            [case.predictions[0].uncertainty.get(name, np.nan) for case in cases], np.float64
        )
        for name in names
    }
    facts = [case.facts for case in cases]
    return Doubts(
        cases=cases,
        # A model that diverged says inf or NaN: that is no place in an order.
        signals={name: np.where(np.isfinite(v), v, np.nan) for name, v in found.items()},
        failed=np.array([score["dice"] < FAILURE_DICE for score in scores], bool),
        patients=patients_of(facts),
    )


# ---------------------------------------------------------------- ranking


def _signal_table(doubts: Doubts, name: str) -> dict[str, Any]:
    values, failed, patients = doubts.signals[name], doubts.failed, doubts.patients
    stated = ~np.isnan(values)
    by_group: dict[str, dict[str, Any]] = {}
    for axis, group, mine in _groups(doubts.cases):
        rows = mine & stated
        by_group.setdefault(axis, {})[group] = _auroc_cell(
            values[rows], failed[rows], patients[rows]
        )
    values, failed, patients = values[stated], failed[stated], patients[stated]
    return {
        **_auroc_cell(values, failed, patients),
        "mean": float(values.mean()) if len(values) else None,
        "aurc": aurc(values, failed),
        "by_group": by_group,
    }


def _groups(cases: Sequence[MaskCase]) -> list[tuple[str, str, NDArray[np.bool_]]]:
    """(axis, group, [N] its cases) of every axis that at least one case states."""
    found = []
    for axis, of in AXES.items():
        values = [of(case.facts) for case in cases]
        if any(value is not None for value in values):
            number, names = named_groups(values)
            found += [(axis, name, number == g) for g, name in enumerate(names)]
    return found


def _auroc_cell(
    doubt: Array, failed: NDArray[np.bool_], patients: NDArray[np.int64]
) -> dict[str, Any]:
    low, high = auroc_interval(doubt, failed, patients)
    return {
        "num": len(failed),
        "num_failed": int(failed.sum()),
        "auroc": failure_auroc(doubt, failed),
        "low": low,
        "high": high,
    }


def failure_auroc(doubt: Array, failed: NDArray[np.bool_]) -> float | None:
    """How well an uncertainty ranks failed masks before good ones; None without both kinds."""
    # Without both kinds there is nothing to rank; 0.5 would read as a measured chance level.
    if len(np.unique(failed)) < 2:
        return None
    return float(roc_auc_score(failed, doubt))


def auroc_interval(
    doubt: Array,
    failed: NDArray[np.bool_],
    patients: NDArray[np.int64],
    *,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> tuple[float | None, float | None]:
    """95 % interval of `failure_auroc` over draws of whole patients; draws without failed or
    without good masks are left out. (None, None) where there is no AUROC."""
    if len(np.unique(failed)) < 2:
        return None, None
    order = np.argsort(doubt[~failed], kind="stable")
    good = doubt[~failed][order]
    # Of every failed mask, the good ones that are doubted less, and those that are no more.
    less, no_more = (np.searchsorted(good, doubt[failed], side) for side in ("left", "right"))
    _, cluster = np.unique(patients, return_inverse=True)
    draws = []
    for block in cluster_weights(int(cluster.max()) + 1, num_draws, seed):
        # Patients may have many rows each: as much memory again is held as for the patients.
        for part in np.array_split(block, max(1, len(block) * len(failed) // BLOCK)):
            # Draws along the last axis: rows are then gathered whole. Counts are exact in fp32.
            weight = np.ascontiguousarray(part.T, dtype=np.float32)
            bad = weight[cluster[failed]]
            below = np.zeros((len(good) + 1, len(part)), np.float32)
            np.cumsum(weight[cluster[~failed][order]], axis=0, out=below[1:])
            # Equal doubts count half.
            ranked = np.einsum("nd,nd->d", bad, below[less] + below[no_more], dtype=np.float64) / 2
            pairs = bad.sum(0, dtype=np.float64) * below[-1]
            draws.append(np.divide(ranked, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0))
    low, high = percentile_interval(np.concatenate(draws)[:, None])
    return float(low[0]), float(high[0])


def aurc(doubt: Array, failed: NDArray[np.bool_]) -> float | None:
    """Mean share of failed masks among the most certain, over all shares kept; None without any
    case. See `risk_coverage`."""
    if not len(doubt):
        return None
    # Only the order counts, and uncertainties have no common scale.
    certainty = 1 - rankdata(doubt, "dense") / len(doubt)
    return risk_coverage(certainty, ~failed).aurc


# ---------------------------------------------------------------- review


def reviewed(doubt: Array) -> Array:
    """[S, N]: how far each case is reviewed when the most doubtful `REVIEWED` [S] of all are. Cases
    that tie share what is left to them: no order of the rows decides."""
    _, place, num = np.unique(-doubt, return_inverse=True, return_counts=True)
    before = (np.cumsum(num) - num)[place]
    budget = REVIEWED[:, None] * len(doubt)
    return np.clip((budget - before) / num[place], 0.0, 1.0)


def _review_table(doubts: Doubts, scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What one correction of the most doubtful cases makes of the Dice of all."""
    # Only those that were corrected can show what a correction gives.
    has = np.array(["dice_click_1" in score for score in scores], bool)
    rows: list[int] = np.flatnonzero(has).tolist()
    table: dict[str, Any] = {
        "num": len(rows),
        "fraction": REVIEWED.tolist(),
        "orders": {},
        "by_group": {},
    }
    if not len(rows):
        return table
    before = np.array([scores[i]["dice"] for i in rows])
    gain = np.array([scores[i]["dice_click_1"] for i in rows]) - before
    cases = [doubts.cases[i] for i in rows]
    signals = {name: values[rows] for name, values in doubts.signals.items()}
    shares = {name: reviewed(v) for name, v in signals.items() if not np.isnan(v).any()}
    # In random order each case is reviewed as often as any other; the oracle knows every gain.
    shares["random"] = np.repeat(REVIEWED[:, None], len(rows), axis=1)
    shares["oracle"] = reviewed(gain)
    failed, patients = doubts.failed[rows], doubts.patients[rows]
    tail = np.array([case.facts.prevalence == "tail" for case in cases])

    def dice(share: Array, mine: NDArray[np.bool_]) -> list[float] | None:
        return (before + share * gain)[:, mine].mean(1).tolist() if mine.any() else None

    best = float(_worth(shares["oracle"], gain).mean())
    for name, share in shares.items():
        drawn = clustered(_worth(share, gain), patients)
        area, (low, high) = float(drawn.estimate[0]), drawn.interval()
        table["orders"][name] = {
            "overall": dice(share, np.ones(len(rows), bool)),
            "tail": dice(share, tail),
            "found": share[:, failed].mean(1).tolist() if failed.any() else None,
            "area": area,
            "area_low": float(low[0]),
            "area_high": float(high[0]),
            "share_of_oracle": area / best if best > 0 else None,
        }
    for axis, group, mine in _groups(cases):
        table["by_group"].setdefault(axis, {})[group] = {
            "num": int(mine.sum()),
            "orders": {name: dice(share, mine) for name, share in shares.items()},
        }
    return table


def _worth(share: Array, gain: Array) -> Array:
    """[N] Dice that each case wins over a review in random order, mean over all shares reviewed."""
    return np.asarray((trapezoid(share, REVIEWED, axis=0) - 0.5) * gain)


# ---------------------------------------------------------------- a mix of signals


def fit_mix(doubts: Doubts, names: Sequence[str]) -> tuple[dict[str, Any] | None, str | None]:
    """(logistic regression of failing on standardised signals as plain numbers, None), or (None,
    why there is none)."""
    if not names:
        return None, "no signal is known of all cases"
    if len(np.unique(doubts.failed)) < 2:
        kind = "every" if doubts.failed.all() else "no"
        return None, f"{kind} mask of the validation cases failed"
    table = np.stack([doubts.signals[name] for name in names], axis=1)
    center, spread = table.mean(0), table.std(0)
    # A constant signal says nothing, and 0 / 0 would spoil the others.
    scale = np.where(spread > 0, spread, 1.0)
    model = LogisticRegression(max_iter=1000).fit((table - center) / scale, doubts.failed)
    return {
        "signals": list(names),
        "center": center.tolist(),
        "scale": scale.tolist(),
        "weights": model.coef_[0].tolist(),
        "intercept": float(model.intercept_[0]),
        "num": len(table),
        "num_failed": int(doubts.failed.sum()),
        "num_patients": len(np.unique(doubts.patients)),
    }, None


def apply_mix(mix: Mapping[str, Any], signals: Mapping[str, Array]) -> Array:
    """[N] probability of having failed."""
    table = np.stack([np.asarray(signals[name], np.float64) for name in mix["signals"]], axis=-1)
    standard = (table - np.array(mix["center"])) / np.array(mix["scale"])
    return np.asarray(1 / (1 + np.exp(-(standard @ np.array(mix["weights"]) + mix["intercept"]))))


def mix_out_of_fold(doubts: Doubts, names: Sequence[str]) -> Array | None:
    """[N] what mixes that were fitted without a case's patient say of it; None where a part has
    too few patients or only masks of one kind."""
    num_folds = min(NUM_FOLDS, len(np.unique(doubts.patients)))
    if num_folds < 2:
        return None
    said = np.full(len(doubts.failed), np.nan)
    folds = GroupKFold(num_folds).split(said, groups=doubts.patients)
    for fitted, held in folds:
        part = Doubts(
            [doubts.cases[int(i)] for i in fitted],
            {name: doubts.signals[name][fitted] for name in names},
            doubts.failed[fitted],
            doubts.patients[fitted],
        )
        mix, _ = fit_mix(part, names)
        if mix is None:
            return None
        said[held] = apply_mix(mix, {name: doubts.signals[name][held] for name in names})
    return said


# ---------------------------------------------------------------- a threshold that promises


class Promise(NamedTuple):
    """Masks of an uncertainty up to `threshold` may be accepted without review."""

    threshold: float | None  # None where nothing can be promised
    why: str | None  # there is none
    num_accepted: int
    num_failed: int  # among them
    bound: float | None  # upper bound of their share


def risk_threshold(
    doubt: Array,
    failed: NDArray[np.bool_],
    patients: NDArray[np.int64],
    *,
    max_risk: float = MAX_RISK,
    error: float = RISK_ERROR,
) -> Promise:
    """The largest threshold of which at most `max_risk` of the accepted masks fail, wrong with a
    probability of at most `error` over draws of the cases.

    Learn then Test (Angelopoulos et al. 2021, fixed sequences from several starts): thresholds that
    accept 5 %, 10 %, ... of the cases are tested from the strictest on, each by `exact_counts`, and
    the last before the first failure is taken. The share of failures among the accepted need not
    grow with the threshold, so conformal risk control, which needs that, does not apply.
    """
    shares: list[float] = REVIEWED[1:].tolist() if len(doubt) else []
    ladder = np.unique([np.quantile(doubt, share, method="higher") for share in shares])
    best = None
    starts = range(0, len(ladder), max(1, -(-len(ladder) // NUM_STARTS)))
    for start in starts:
        for threshold in ladder[start:]:
            taken = doubt <= threshold
            bad, num = exact_counts(failed[taken], patients[taken])
            # P(as few failures | a share of max_risk), shared out among the starts.
            if bad >= num or beta.sf(max_risk, bad + 1, num - bad) > error / len(starts):
                break
            best = float(threshold) if best is None else max(best, float(threshold))
    if best is None:
        needed = int(np.ceil(np.log(error / max(len(starts), 1)) / np.log(1 - max_risk)))
        few = len(np.unique(patients)) < needed
        why = (
            f"{needed} patients without any failure would be needed, and there are "
            f"{len(np.unique(patients))}"
            if few
            else f"too many of the most certain masks failed to promise at most {max_risk:.0%}"
        )
        return Promise(None, why, 0, 0, None)
    taken = doubt <= best
    bad, num = exact_counts(failed[taken], patients[taken])
    bound = float(beta.ppf(1 - error / len(starts), bad + 1, num - bad))
    return Promise(best, None, int(taken.sum()), int(failed[taken].sum()), bound)


def exact_counts(failed: NDArray[np.bool_], patients: NDArray[np.int64]) -> tuple[float, float]:
    """(failures, masks) that say as much as these do, one mask per patient: for exact binomial
    bounds (Korn and Graubard 1998). Masks of a patient fail together, and counted one by one they
    would promise too much; with one mask each these are the plain counts."""
    num = len(failed)
    _, cluster = np.unique(patients, return_inverse=True)
    size = np.bincount(cluster)
    num_patients = len(size)
    if num_patients == num:
        return float(failed.sum()), float(num)
    share = failed.mean()
    if num_patients < 2 or share in (0, 1):
        # Nothing shows how alike masks of a patient are: taken as the same one.
        return float(share * num_patients), float(num_patients)
    excess = np.bincount(cluster, failed) - share * size
    variance = num_patients / (num_patients - 1) * float(excess @ excess) / num**2
    effect = max(1.0, variance * (num - 1) / (share * (1 - share)))
    # Few patients say little about their own variance.
    spread = (t.ppf(0.975, num - 1) / t.ppf(0.975, num_patients - 1)) ** 2
    effective = num / effect * float(spread)
    return float(share * effective), float(effective)


def _risk_table(known: Doubts, doubts: Doubts, name: str) -> dict[str, Any]:
    """A threshold from validation cases, and what it does to those that are judged."""
    usable = ~np.isnan(known.signals[name])
    promise = risk_threshold(
        known.signals[name][usable], known.failed[usable], known.patients[usable]
    )
    table: dict[str, Any] = {
        "threshold": promise.threshold,
        "why": promise.why,
        "max_risk": MAX_RISK,
        "error": RISK_ERROR,
        "validation": {
            "num": int(usable.sum()),
            "num_accepted": promise.num_accepted,
            "num_failed": promise.num_failed,
            "bound": promise.bound,
        },
        "test": None,
        "by_group": {},
    }
    if promise.threshold is None:
        return table
    # What lacks the signal is never accepted.
    accepted = np.nan_to_num(doubts.signals[name], nan=np.inf) <= promise.threshold
    table["test"] = _accepted(doubts, accepted, np.ones(len(accepted), bool))
    for axis, group, mine in _groups(doubts.cases):
        table["by_group"].setdefault(axis, {})[group] = _accepted(doubts, accepted, mine)
    return table


def _accepted(
    doubts: Doubts, accepted: NDArray[np.bool_], mine: NDArray[np.bool_]
) -> dict[str, Any]:
    """Failures among the accepted cases of a group, with an exact 95 % interval of their share."""
    taken = accepted & mine
    bad, num = exact_counts(doubts.failed[taken], doubts.patients[taken]) if taken.any() else (0, 0)
    return {
        "num": int(mine.sum()),
        "num_accepted": int(taken.sum()),
        "num_failed": int(doubts.failed[taken].sum()),
        "share": float(doubts.failed[taken].mean()) if num else None,
        "low": float(beta.ppf(0.025, bad, num - bad + 1)) if num and bad else 0.0,
        "high": float(beta.ppf(0.975, bad + 1, num - bad)) if num and bad < num else 1.0,
    }

"""Questions asked otherwise, to numbers: what is answered without looking, and what words change.

    table = blind_table(cases)
    table["variants"]["black image"]["text"]["difference"], table["image_reliance"]["text"]["value"]
    table = counterfactual_table(cases)
    table["by_option"]["sex"]["flip_rate"], table["by_option"]["sex"]["difference"]

Every comparison is of the same cases, paired, with an interval that draws patients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from biascare.data.variants import BLIND, STATEMENTS
from biascare.evaluation.cases import AnswerCase, Variant
from biascare.evaluation.metrics.bootstrap import (
    NUM_DRAWS,
    clustered,
    patients_of,
    percentile_interval,
)
from biascare.evaluation.metrics.classification import option_shares

ScoreOf = Callable[[AnswerCase, AnswerCase | Variant], float]
"""(case, what was answered) -> how right it is; NaN where that cannot be said."""


def blind_table(
    cases: Sequence[AnswerCase],
    measures: Mapping[str, ScoreOf],
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """By measure, every blind variant beside the answer with the image, over the cases that have
    both; {} where no case was asked blindly.

    `image_reliance` is the score with the image less that of the best blind variant, over cases
    that have all; the best is chosen anew in every draw, so that the choice is in the interval.
    """
    asked = [case for case in cases if case.variants.keys() & BLIND.keys()]
    if not asked:
        return {}
    found: dict[str, Any] = {"num": len(asked), "variants": {}, "image_reliance": {}}
    patients = _patients(asked)
    for measure, score in measures.items():
        with_image = np.array([score(case, case) for case in asked])
        blind = {
            name: np.array(
                [score(c, c.variants[name]) if name in c.variants else np.nan for c in asked]
            )
            for name in BLIND
        }
        for name, values in blind.items():
            missing = sum(name not in case.variants for case in asked)
            table = found["variants"].setdefault(name, {"num_missing": missing})
            compared = _compared(with_image, values, patients, num_draws, seed)
            table |= {measure: compared} if compared else {}
        present = {n: v for n, v in blind.items() if not np.isnan(v).all()}
        whole = ~np.isnan([with_image, *present.values()]).any(0)
        if not whole.any() or not present:
            continue
        # The same seed draws the same patients for each, so draws are compared one by one.
        drawn = {
            name: clustered(
                np.where(whole, values, np.nan), patients, num_draws=num_draws, seed=seed
            )
            for name, values in [("", with_image), *present.items()]
        }
        best = max(present, key=lambda name: float(drawn[name].estimate[0]))
        most = np.max([drawn[name].draws for name in present], axis=0)
        low, high = percentile_interval(drawn[""].draws - most)
        found["image_reliance"][measure] = {
            "with_image": float(drawn[""].estimate[0]),
            "blind": float(drawn[best].estimate[0]),
            "value": float(drawn[""].estimate[0] - drawn[best].estimate[0]),
            "low": float(low[0]),
            "high": float(high[0]),
            "num": int(whole.sum()),
            "best_blind": best,
        }
    return found


class _Change(NamedTuple):
    """How much an answer changes, mean over the variants of one attribute."""

    flipped: float  # share of them with another answer
    moved: float  # mean |change| of the probability of the option first chosen; NaN without options


def counterfactual_table(
    cases: Sequence[AnswerCase],
    answer: Callable[[AnswerCase, AnswerCase | Variant], str],
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """By attribute, how often other words about the patient flip the answer, and how far they move
    the probability of the option first chosen, beside the same for neutral words; {} where no case
    was asked so. `answer` says what counts as one answer."""
    table: dict[str, Any] = {}
    asked = [case for case in cases if any(name.startswith("neutral: ") for name in case.variants)]
    for attribute in STATEMENTS if asked else ():
        mine = [c for c in asked if any(n.startswith(f"{attribute}: ") for n in c.variants)]
        # They ask for the attribute itself.
        found: dict[str, Any] = {"num": len(mine), "num_without": len(asked) - len(mine)}
        if mine:
            changed = [_change(case, attribute, answer) for case in mine]
            control = [_change(case, "neutral", answer) for case in mine]
            patients = _patients(mine)
            for name in _Change._fields:
                ours, theirs = (
                    np.array([getattr(c, name) for c in side]) for side in (changed, control)
                )
                names = ("words", "neutral")
                compared = _compared(ours, theirs, patients, num_draws, seed, names)
                found |= {name: compared} if compared else {}
            ways = sorted({n for c in mine for n in c.variants if n.startswith(f"{attribute}: ")})
            found["by_variant"] = {
                name: {"num": len(flips), "flipped": sum(flips) / len(flips)}
                for name in ways
                for flips in [
                    [
                        answer(c, c.variants[name]) != answer(c, c)
                        for c in mine
                        if name in c.variants
                    ]
                ]
            }
        table[attribute] = found
    return table


def _change(
    case: AnswerCase, attribute: str, answer: Callable[[AnswerCase, AnswerCase | Variant], str]
) -> _Change:
    ways = [v for name, v in case.variants.items() if name.startswith(f"{attribute}: ")]
    first = answer(case, case)
    flipped = sum(answer(case, way) != first for way in ways) / len(ways)
    scored = [way.option_log_probs for way in ways if way.option_log_probs is not None]
    if case.option_log_probs is None or len(scored) < len(ways):
        return _Change(flipped, math.nan)
    chosen = int(np.argmax(case.option_log_probs))
    usual = option_shares(case.option_log_probs)[chosen]
    moved = [abs(option_shares(s)[chosen] - usual) for s in scored]
    return _Change(flipped, float(np.mean(moved)))


def _compared(
    ours: NDArray[np.float64],
    theirs: NDArray[np.float64],
    patients: NDArray[np.int64],
    num_draws: int,
    seed: int,
    names: tuple[str, str] = ("with_image", "blind"),
) -> dict[str, Any]:
    """Both means over the pairs, and their difference with its interval; {} without a pair."""
    both = ~np.isnan(ours) & ~np.isnan(theirs)
    if not both.any():
        return {}
    drawn = clustered(ours - theirs, patients, num_draws=num_draws, seed=seed)
    low, high = drawn.interval()
    return {
        "num": int(both.sum()),
        names[0]: float(ours[both].mean()),
        names[1]: float(theirs[both].mean()),
        "difference": float(drawn.estimate[0]),
        "low": float(low[0]),
        "high": float(high[0]),
    }


def _patients(cases: Sequence[AnswerCase]) -> NDArray[np.int64]:
    return patients_of([case.facts for case in cases])

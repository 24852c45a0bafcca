"""How a model serves groups of patients: every metric by every attribute, beside what chance shows.

    found = summarise_groups([Measured("dice", facts, values, mix)])
    found["dice"]["sex"]["gap"], found["dice"]["sex"]["p_holm"]

All comparisons of a call are one family: `p_holm` is the chance of any false alarm among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from biascare.evaluation.metrics.bootstrap import NUM_DRAWS, patients_of
from biascare.evaluation.metrics.fairness import (
    MISSING,
    adjusted,
    disparity,
    gap_p_value,
    holm,
    standardised,
)
from biascare.interfaces import Facts

AGE_BANDS = ((40, "under 40"), (60, "40 to 59"), (80, "60 to 79"))
"""First age that is no longer in the band; above the last one is `OLDEST`."""

OLDEST = "80 and over"


def age_band(facts: Facts) -> str | None:
    if facts.age is None:
        return None
    return next((name for end, name in AGE_BANDS if facts.age < end), OLDEST)


def sex_and_age(facts: Facts) -> str | None:
    """The intersection; unknown where one of the two is."""
    band = age_band(facts)
    return None if facts.sex is None or band is None else f"{facts.sex}, {band}"


def group_order(name: str) -> tuple[bool, list[tuple[int, str]]]:
    """Sorts groups as a reader expects them: ages from young to old, missing last."""
    bands = [*(band for _, band in AGE_BANDS), OLDEST]
    parts = [(bands.index(p), "") if p in bands else (-1, p) for p in name.split(", ")]
    return name == MISSING, parts


ATTRIBUTES: dict[str, Callable[[Facts], str | None]] = {
    "sex": lambda facts: facts.sex,
    "age": age_band,
    "race": lambda facts: facts.race,
    "sex and age": sex_and_age,
}


class Measured(NamedTuple):
    """One metric of N cases; NaN where a case does not have it."""

    name: str
    facts: Sequence[Facts]
    values: Sequence[float]
    case_mix: Sequence[str]  # what makes a case easy or hard: modality, target, kind of question
    higher_is_better: bool = True


def summarise_groups(
    metrics: Sequence[Measured], num_draws: int = NUM_DRAWS, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """{metric: {attribute: comparison}} for attributes that at least one case states.

    A comparison holds the fields of `Disparity`; the same p of values adjusted for their case mix
    (`p_case_mix`); both adjusted over the family (`_holm`); and each group's mean over a common
    case mix.
    """
    result: dict[str, dict[str, Any]] = {}
    for metric in metrics:
        patients = patients_of(metric.facts)
        values = np.asarray(metric.values, np.float64)
        for name, of in ATTRIBUTES.items():
            groups = [of(facts) for facts in metric.facts]
            if not any(group is not None for group in groups):
                continue
            mix = metric.case_mix
            plain = disparity(
                values,
                groups,
                patients,
                higher_is_better=metric.higher_is_better,
                num_draws=num_draws,
                seed=seed,
            )
            compared = [group.name for group in plain.groups if group.compared]
            # Its p alone: the bootstrap of the adjusted scores would be drawn for nobody.
            level = adjusted(values, mix)
            within = gap_p_value(level, groups, patients, compared, num_draws=num_draws, seed=seed)
            common = standardised(values, groups, mix)
            shown = [g._asdict() for g in sorted(plain.groups, key=lambda g: group_order(g.name))]
            for group in shown:
                named = [(MISSING if g is None else g) == group["name"] for g in groups]
                mine = np.array(named) & ~np.isnan(values)
                group["adjusted"] = float(level[mine].mean()) if mine.any() else float("nan")
                group["standardised"], group["mix_covered"] = common[group["name"]]
            result.setdefault(metric.name, {})[name] = plain._asdict() | {
                "groups": shown,
                **_adjusted_gap(shown, metric.higher_is_better),
                "p_case_mix": within,
            }
    family = [found for by_name in result.values() for found in by_name.values()]
    for key in ("p", "p_case_mix"):
        stated = [found for found in family if found[key] is not None]
        for found in family:
            found[f"{key}_holm"] = None
        for found, p in zip(stated, holm([f[key] for f in stated]), strict=True):
            found[f"{key}_holm"] = p
    return result


def _adjusted_gap(groups: Sequence[dict[str, Any]], higher_is_better: bool) -> dict[str, Any]:
    """What `p_case_mix` is the p of: within the case mix the order of groups may be another."""
    compared = sorted((g for g in groups if g["compared"]), key=lambda g: g["adjusted"])
    if len(compared) < 2:
        return dict.fromkeys(("adjusted_gap", "adjusted_worst", "adjusted_best"))
    worst, best = (compared[0], compared[-1]) if higher_is_better else (compared[-1], compared[0])
    return {
        "adjusted_gap": compared[-1]["adjusted"] - compared[0]["adjusted"],
        "adjusted_worst": worst["name"],
        "adjusted_best": best["name"],
    }

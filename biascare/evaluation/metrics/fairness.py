"""Differences between groups of patients, each beside what chance alone would show.

    found = disparity(correct, sex, patients)          # gap, null, p, minimum detectable gap
    p = holm([one.p for one in family])
    cceg({"F": 0.08, "M": 0.12}), esce(0.1, {"F": 0.08, "M": 0.12})

The largest of several means is larger than the smallest on any finite data, so a gap and even its
bootstrap interval exclude 0 where nothing differs. What a gap means is read from its null: the same
numbers with the groups dealt anew among the patients.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from biascare.evaluation.metrics.bootstrap import NUM_DRAWS, clustered, p_value

MISSING = "missing"
"""Group of the rows whose attribute is not known: a group of its own, never left out."""

MIN_GROUP = 20
"""A group of fewer rows is shown with its number and takes part in no comparison."""

POWER = 0.8


class GroupMean(NamedTuple):
    """One group of an attribute."""

    name: str
    num: int
    num_patients: int
    mean: float
    low: float  # 95 % interval, patients drawn together
    high: float
    compared: bool  # large enough


class Disparity(NamedTuple):
    """How far groups of one attribute are apart in one metric. Numbers of a comparison that cannot
    be made (fewer than two groups that are large enough) are None."""

    groups: list[GroupMean]
    worst: str | None
    best: str | None
    gap: float | None  # largest mean minus smallest
    ratio: float | None  # smallest mean by largest
    std: float | None  # of the means, population
    null_mean: float | None  # of the gap when groups are dealt anew
    null_95: float | None
    excess: float | None  # gap - null_mean
    p: float | None  # share of such gaps at least as large
    detectable: float | None  # gap that would be found in 80 of 100 such data sets


def named_groups(values: Sequence[Hashable]) -> tuple[NDArray[np.int64], list[str]]:
    """(number of each row's group, names in order); None is `MISSING`, which comes last."""
    names = sorted({str(v) for v in values if v is not None})
    names += [MISSING] if any(v is None for v in values) else []
    place = {name: number for number, name in enumerate(names)}
    return np.array([place[MISSING if v is None else str(v)] for v in values], np.int64), names


def disparity(
    values: ArrayLike,
    attribute: Sequence[Hashable],
    clusters: NDArray[np.int64],
    *,
    higher_is_better: bool = True,
    min_group: int = MIN_GROUP,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> Disparity:
    """Means of `values` [N] by `attribute` [N], and their gap beside its null.

    `clusters` [N]: patient of each row (see `bootstrap.cluster_numbers`). NaN values leave their
    rows out. Rows without the attribute are a group that is shown and not compared. Of values that
    are `adjusted` for the case mix, the comparison is that within the mix.
    """
    found = np.asarray(values, np.float64)
    group, names = named_groups(attribute)
    valid = ~np.isnan(found)
    drawn = clustered(found, clusters, group, len(names), num_draws=num_draws, seed=seed)
    low, high = drawn.interval()
    num = np.bincount(group[valid], minlength=len(names))
    patients = [len(np.unique(clusters[valid & (group == g)])) for g in range(len(names))]
    sizes: list[int] = num.tolist()
    compared = [n >= min_group and name != MISSING for n, name in zip(sizes, names, strict=True)]
    groups = [
        GroupMean(*row)
        for row in zip(
            names,
            sizes,
            patients,
            drawn.estimate.tolist(),
            low.tolist(),
            high.tolist(),
            compared,
            strict=True,
        )
    ]
    chosen = np.flatnonzero(compared)
    if len(chosen) < 2:
        return Disparity(groups, *[None] * 10)
    means = drawn.estimate[chosen]
    keep = valid & np.isin(group, chosen)
    null = permuted_gaps(found[keep], group[keep], clusters[keep], num_draws, seed)
    gap = float(np.ptp(means))
    order = means.argsort() if higher_is_better else (-means).argsort()
    null_95 = float(np.quantile(null, 0.95))
    # Of the signed difference: that of the gap itself is folded at 0, and too small.
    spread = np.nanstd(drawn.draws[:, chosen[order[-1]]] - drawn.draws[:, chosen[order[0]]])
    return Disparity(
        groups,
        worst=names[chosen[order[0]]],
        best=names[chosen[order[-1]]],
        gap=gap,
        ratio=float(means.min() / means.max()) if means.max() else None,
        std=float(means.std()),
        null_mean=float(null.mean()),
        null_95=null_95,
        excess=float(gap - null.mean()),
        p=p_value(gap, null),
        # Found means above the null's 95th percentile; a true gap scatters around itself.
        detectable=float(null_95 + norm.ppf(POWER) * spread),
    )


def gap_p_value(
    values: NDArray[np.float64],
    attribute: Sequence[Hashable],
    clusters: NDArray[np.int64],
    compared: Sequence[str],
    *,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> float | None:
    """The p of `disparity` between the groups named `compared`, without its intervals; None for
    fewer than two."""
    group, names = named_groups(attribute)
    chosen = [number for number, name in enumerate(names) if name in compared]
    if len(chosen) < 2:
        return None
    keep = ~np.isnan(values) & np.isin(group, chosen)
    found, mine = values[keep], group[keep]
    sums, counts = np.bincount(mine, found)[chosen], np.bincount(mine)[chosen]
    null = permuted_gaps(found, mine, clusters[keep], num_draws, seed)
    return p_value(float(np.ptp(sums / counts)), null)


def permuted_gaps(
    values: NDArray[np.float64],
    group: NDArray[np.int64],
    clusters: NDArray[np.int64],
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> NDArray[np.float64]:
    """[D] largest minus smallest mean of the groups, each patient's group dealt anew.

    Patients keep their rows together: dealt row by row, one patient's many images would count as
    so many patients. A patient whose rows have several groups (an age that passes a border) is one
    unit per group.
    """
    size = int(group.max()) + 1
    _, unit = np.unique(clusters * size + group, return_inverse=True)
    num_units = int(unit.max()) + 1
    sums, counts = np.bincount(unit, values), np.bincount(unit).astype(np.float64)
    label = np.zeros(num_units, np.int64)
    label[unit] = group
    present, label = np.unique(label, return_inverse=True)
    rng, gaps = np.random.default_rng(seed), np.empty(num_draws)
    for draw in range(num_draws):
        dealt = rng.permutation(label)
        means = np.bincount(dealt, sums, len(present)) / np.bincount(dealt, counts, len(present))
        gaps[draw] = np.ptp(means)
    return gaps


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted over a family: the chance of any false alarm in it stays below the level
    they are compared with."""
    order = np.argsort(p_values, kind="stable")
    factors = len(order) - np.arange(len(order))
    adjusted = np.minimum(np.maximum.accumulate(np.asarray(p_values)[order] * factors), 1.0)
    result = np.empty(len(order))
    result[order] = adjusted
    return [float(p) for p in result]


def cceg(ece_by_group: Mapping[str, float]) -> float:
    """Confidence calibration error gap: mean over unordered pairs of groups of |ECE_a - ECE_b|;
    0 for one group."""
    gaps = [abs(a - b) for a, b in combinations(ece_by_group.values(), 2)]
    return float(np.mean(gaps)) if gaps else 0.0


def esce(ece: float, ece_by_group: Mapping[str, float]) -> float:
    """Equity-scaled calibration error: ECE / (1 - population std of the groups' ECE)."""
    return float(ece / (1 - np.std(list(ece_by_group.values()))))


def equity_scaled(overall: float, by_group: Mapping[str, float], kind: str = "std") -> float:
    """A score that is higher for the better, lowered by how groups differ.

    "std": overall * (1 - population std of the groups); "deviation": overall / (1 + sum of
    |overall - group|), as in FairSeg and Harvard-GF.
    """
    means = np.array(list(by_group.values()))
    if kind == "std":
        return float(overall * (1 - means.std()))
    if kind == "deviation":
        return float(overall / (1 + np.abs(overall - means).sum()))
    raise ValueError(f"kind: got {kind!r}, expected 'std' or 'deviation'")


def adjusted(values: ArrayLike, case_mix: Sequence[Hashable]) -> NDArray[np.float64]:
    """`values` [N] less the mean of their stratum of `case_mix`, plus the mean of all.

    What the mix explains is gone, and with it the part of its spread that hides a difference. A
    stratum that one group has alone says nothing of the group.
    """
    found = np.asarray(values, np.float64)
    mix, strata = named_groups(case_mix)
    valid = ~np.isnan(found)
    num = np.maximum(np.bincount(mix[valid], minlength=len(strata)), 1)
    means = np.bincount(mix[valid], found[valid], minlength=len(strata)) / num
    return found - means[mix] + (found[valid].mean() if valid.any() else 0.0)


def standardised(
    values: ArrayLike,
    attribute: Sequence[Hashable],
    case_mix: Sequence[Hashable],
) -> dict[str, tuple[float, float]]:
    """{group: (mean over a common case mix, share of that mix it has rows for)}.

    Each stratum of `case_mix` counts as it does among all rows, whoever it comes from: a group
    that is seen in harder cases is not called worse for them. Strata that a group lacks are left
    out and the others raised; the share tells how much of the mix its number stands on.
    """
    found = np.asarray(values, np.float64)
    group, names = named_groups(attribute)
    mix, strata = named_groups(case_mix)
    valid = ~np.isnan(found)
    share = np.bincount(mix[valid], minlength=len(strata)) / max(int(valid.sum()), 1)
    result = {}
    for g, name in enumerate(names):
        mine = valid & (group == g)
        num = np.bincount(mix[mine], minlength=len(strata))
        sums = np.bincount(mix[mine], found[mine], minlength=len(strata))
        seen = num > 0
        covered = float(share[seen].sum())
        mean = float(share[seen] @ (sums[seen] / num[seen]) / covered) if covered else float("nan")
        result[name] = (mean, covered)
    return result


def deferral(score: ArrayLike, attribute: Sequence[Hashable], coverage: float) -> dict[str, float]:
    """{group: share of its rows kept} where the rows of highest `score` are kept until `coverage`
    of all are: equal treatment by one threshold need not treat groups equally."""
    found = np.asarray(score, np.float64)
    group, names = named_groups(attribute)
    num = round(coverage * len(found))
    threshold = np.sort(found)[::-1][num - 1] if num else np.inf
    above, tied = found > threshold, found == threshold
    # Of rows that tie at the threshold each is kept in part, so that no order decides.
    kept = above + tied * ((num - above.sum()) / max(tied.sum(), 1))
    sizes = np.bincount(group, minlength=len(names))
    shares = np.bincount(group, kept, minlength=len(names)) / np.maximum(sizes, 1)
    return dict(zip(names, shares.tolist(), strict=True))

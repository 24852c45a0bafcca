"""Differences between groups of patients, each beside what chance alone would show.

    found = disparity(correct, sex, patients)          # gap, null, p, minimum detectable gap
    p = holm([one.p for one in family])
    cceg({"F": 0.08, "M": 0.12}), esce(0.1, {"F": 0.08, "M": 0.12})

The largest of several means is larger than the smallest on any finite data, so a gap and even its
bootstrap interval exclude 0 where nothing differs. What a gap means is read from its null: the same
numbers with the groups dealt anew among the patients.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from biascare.evaluation.metrics.bootstrap import (
    NUM_DRAWS,
    clustered,
    p_value,
    percentile_interval,
    widened,
)
from biascare.evaluation.metrics.calibration import NUM_BINS, bin_index

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
    gap_low: float | None  # what the gap is at least and at most, by the pairs' simultaneous 95 %
    gap_high: float | None
    ratio: float | None  # smallest mean by largest
    std: float | None  # of the means, population
    null_worst: float | None  # the worst mean, the ratio and the std when groups are dealt anew
    null_ratio: float | None
    null_std: float | None
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
    num = np.bincount(group[valid], minlength=len(names))
    patients = [len(np.unique(clusters[valid & (group == g)])) for g in range(len(names))]
    low, high = widened(drawn, patients)
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
        return Disparity(groups, *[None] * 15)
    means = drawn.estimate[chosen]
    keep = valid & np.isin(group, chosen)
    dealt = permuted_means(found[keep], group[keep], clusters[keep], num_draws, seed)
    null = np.ptp(dealt, axis=1)
    gap = float(np.ptp(means))
    gap_low, gap_high = gap_interval(drawn.draws[:, chosen])
    order = means.argsort() if higher_is_better else (-means).argsort()
    null_95 = float(np.quantile(null, 0.95))
    # Of the signed difference: that of the gap itself is folded at 0, and too small.
    spread = np.nanstd(drawn.draws[:, chosen[order[-1]]] - drawn.draws[:, chosen[order[0]]])
    return Disparity(
        groups,
        worst=names[chosen[order[0]]],
        best=names[chosen[order[-1]]],
        gap=gap,
        gap_low=gap_low,
        gap_high=gap_high,
        ratio=float(means.min() / means.max()) if means.max() else None,
        std=float(means.std()),
        null_worst=float((dealt.min(1) if higher_is_better else dealt.max(1)).mean()),
        null_ratio=float((dealt.min(1) / top).mean()) if (top := dealt.max(1)).all() else None,
        null_std=float(dealt.std(1).mean()),
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
    null = np.ptp(permuted_means(found, mine, clusters[keep], num_draws, seed), axis=1)
    return p_value(float(np.ptp(sums / counts)), null)


def gap_interval(draws: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """(at least, at most) of the largest difference between groups, from draws [D, G] of their
    means.

    Largest minus smallest of the draws themselves would never reach 0; so every pair has its
    interval, all of them together at `level` (Bonferroni), and the widest counts.
    """
    pairs = list(combinations(range(draws.shape[1]), 2))
    each = 1 - (1 - level) / len(pairs)
    ends = [percentile_interval((draws[:, a] - draws[:, b])[:, None], each) for a, b in pairs]
    low, high = (np.array([end[k][0] for end in ends]) for k in (0, 1))
    # An interval around 0 says that this pair may not differ at all.
    least = np.where(low > 0, low, np.where(high < 0, -high, 0.0))
    return float(least.max()), float(np.maximum(-low, high).max())


def dealt_anew(
    group: NDArray[np.int64],
    clusters: NDArray[np.int64],
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> tuple[NDArray[np.int64], int, Iterator[NDArray[np.int64]]]:
    """(unit [N] of each row, number of groups, a group [U] of every unit per draw).

    Units are patients. They keep their rows together: dealt row by row, one patient's many images
    would count as so many patients. A patient whose rows have several groups (an age that passes a
    border) is one unit per group. Groups are numbered anew, without those that have no row.
    """
    size = int(group.max()) + 1
    _, unit = np.unique(clusters * size + group, return_inverse=True)
    label = np.zeros(int(unit.max()) + 1, np.int64)
    label[unit] = group
    present, label = np.unique(label, return_inverse=True)
    rng = np.random.default_rng(seed)
    return unit, len(present), (rng.permutation(label) for _ in range(num_draws))


def permuted_means(
    values: NDArray[np.float64],
    group: NDArray[np.int64],
    clusters: NDArray[np.int64],
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> NDArray[np.float64]:
    """[D, G] means of the groups that have rows, each patient's group dealt anew."""
    unit, size, draws = dealt_anew(group, clusters, num_draws, seed)
    sums, counts = np.bincount(unit, values), np.bincount(unit).astype(np.float64)
    means = np.empty((num_draws, size))
    for draw, dealt in enumerate(draws):
        means[draw] = np.bincount(dealt, sums, size) / np.bincount(dealt, counts, size)
    return means


class CalibrationGap(NamedTuple):
    """How far groups are apart in calibration, beside what chance shows. Numbers of a comparison
    that cannot be made are None."""

    ece: dict[str, float]  # of every group, the small ones too
    num: dict[str, int]
    compared: list[str]  # groups that are large enough
    cceg: float | None
    null_mean: float | None  # of the CCEG when groups are dealt anew
    null_95: float | None
    excess: float | None
    p: float | None
    detectable: float | None  # CCEG that would be found in about 80 of 100 such data sets
    esce: float | None
    esce_null_mean: float | None
    esce_p: float | None


MIN_CALIBRATION_GROUP = 100
"""Below it a calibration error is mostly chance: it is shown and supports no statement."""


def calibration_gap(
    confidence: NDArray[np.float64],
    outcome: NDArray[np.float64],
    attribute: Sequence[Hashable],
    clusters: NDArray[np.int64],
    *,
    min_group: int = MIN_CALIBRATION_GROUP,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> CalibrationGap:
    """CCEG and ESCE of `confidence` [N] in [0, 1] against `outcome` [N] (being right, or a score
    that the confidence predicts) between groups, patients dealt anew for the null."""
    group, names = named_groups(attribute)
    place = bin_index(confidence, NUM_BINS)

    def errors(groups: NDArray[np.int64], rows: NDArray[np.float64], size: int) -> NDArray[Any]:
        gaps = np.bincount(groups * NUM_BINS + place[kept], rows, size * NUM_BINS)
        num = np.bincount(groups, minlength=size)
        return np.abs(gaps.reshape(size, NUM_BINS)).sum(1) / np.maximum(num, 1)

    kept = np.ones(len(group), bool)
    num = np.bincount(group, minlength=len(names))
    ece = dict(zip(names, errors(group, confidence - outcome, len(names)).tolist(), strict=True))
    sizes = dict(zip(names, num.tolist(), strict=True))
    chosen = [n for n, name in enumerate(names) if num[n] >= min_group and name != MISSING]
    compared = [names[n] for n in chosen]
    if len(compared) < 2:
        return CalibrationGap(ece, sizes, compared, *[None] * 9)
    kept = np.isin(group, chosen)
    differences = (confidence - outcome)[kept]
    unit, size, draws = dealt_anew(group[kept], clusters[kept], num_draws, seed)
    of_all = float(errors(np.zeros(kept.sum(), np.int64), differences, 1)[0])
    null, scaled = np.empty(num_draws), np.empty(num_draws)
    for draw, dealt in enumerate(draws):
        by_group = errors(dealt[unit], differences, size)
        null[draw] = np.mean([abs(a - b) for a, b in combinations(by_group, 2)])
        scaled[draw] = of_all / (1 - by_group.std())
    mine = {name: ece[name] for name in compared}
    found, equity = cceg(mine), esce(of_all, mine)
    null_95 = float(np.quantile(null, 0.95))
    return CalibrationGap(
        ece,
        sizes,
        compared,
        cceg=found,
        null_mean=float(null.mean()),
        null_95=null_95,
        excess=float(found - null.mean()),
        p=p_value(found, null),
        # The null's own spread stands in for that of a true gap, which no bootstrap of an ECE shows
        # without its bias.
        detectable=float(null_95 + norm.ppf(POWER) * null.std()),
        esce=equity,
        esce_null_mean=float(scaled.mean()),
        esce_p=p_value(equity, scaled),
    )


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


def kept_rows(score: ArrayLike, coverage: float) -> NDArray[np.float64]:
    """[N] 1 for the rows of highest `score` until `coverage` of all are kept, else 0; of rows that
    tie at the threshold each is kept in part, so that no order decides."""
    found = np.asarray(score, np.float64)
    num = round(coverage * len(found))
    threshold = np.sort(found)[::-1][num - 1] if num else np.inf
    above, tied = found > threshold, found == threshold
    kept: NDArray[np.float64] = above + tied * ((num - above.sum()) / max(tied.sum(), 1))
    return kept


def deferral(score: ArrayLike, attribute: Sequence[Hashable], coverage: float) -> dict[str, float]:
    """{group: share of its rows kept} where the rows of highest `score` are kept until `coverage`
    of all are: equal treatment by one threshold need not treat groups equally."""
    kept = kept_rows(score, coverage)
    group, names = named_groups(attribute)
    sizes = np.bincount(group, minlength=len(names))
    shares = np.bincount(group, kept, minlength=len(names)) / np.maximum(sizes, 1)
    return dict(zip(names, shares.tolist(), strict=True))

"""Intervals that respect patients: rows of one patient are drawn together or not at all.

    patients = cluster_numbers(patient_ids, image_ids)
    drawn = clustered(correct, patients, groups=group_numbers, num_groups=3)
    drawn.estimate, drawn.interval()                    # [G], ([G], [G])
    for weights in row_weights(patients): ...           # for what is no mean

A draw is a number of times that each patient is taken. Means of groups are ratios of sums over
patients, so a thousand draws are one product of the draws with the sums: 200,000 rows in 30 groups
take seconds. The trade-off: the interval is the percentile one, which is a little narrow below some
20 patients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biascare.interfaces import Facts

NUM_DRAWS = 1000
BLOCK = 8_000_000
"""Patient weights held at a time."""


class Bootstrap(NamedTuple):
    """Means of G groups and their draws; NaN where a group has no row, or had none in a draw."""

    estimate: NDArray[np.float64]  # [G]
    draws: NDArray[np.float64]  # [D, G]

    def interval(self, level: float = 0.95) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """([G], [G]) percentile interval over the draws that had the group."""
        return percentile_interval(self.draws, level)

    def num_empty(self) -> NDArray[np.int64]:
        """[G] draws without any row of the group."""
        return np.isnan(self.draws).sum(0)


def percentile_interval(
    draws: NDArray[np.float64], level: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Along the first axis; NaN is left out, and a column of nothing else stays NaN."""
    empty = np.isnan(draws).all(0)
    ends = np.nanquantile(np.where(empty, 0.0, draws), [(1 - level) / 2, (1 + level) / 2], axis=0)
    low, high = np.where(empty, np.nan, ends)
    return low, high


def widened(
    drawn: Bootstrap, num_clusters: Sequence[int], level: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The interval of `drawn`, of values in [0, 1], with what draws cannot show.

    Where all rows of a group are 0, or all are 1, every draw says the same and the interval would
    be a point. The exact binomial (Clopper-Pearson) end for as many patients stands in: 0 failures
    of 20 may still be 17 %.
    """
    low, high = drawn.interval(level)
    num = np.maximum(np.asarray(num_clusters, np.float64), 1)
    end = ((1 - level) / 2) ** (1 / num)
    sure = (low == high) & np.isin(drawn.estimate, (0.0, 1.0))
    ones = drawn.estimate == 1
    return np.where(sure & ones, end, low), np.where(sure & ~ones, 1 - end, high)


def p_value(statistic: float, null: NDArray[np.float64]) -> float:
    """Share of null draws at least as large, the data themselves counted: never 0."""
    # What differs in the last bits is a tie, and a tie counts.
    larger = int((null >= statistic - 1e-12).sum())
    return (1 + larger) / (1 + len(null))


def cluster_numbers(patients: Sequence[str | None], images: Sequence[str]) -> NDArray[np.int64]:
    """[N] whole numbers, equal for rows of one patient; of one image where no patient is known."""
    known = {name: number for number, name in enumerate(dict.fromkeys(p for p in patients if p))}
    unknown = (i for p, i in zip(patients, images, strict=True) if not p)
    alone = {name: len(known) + number for number, name in enumerate(dict.fromkeys(unknown))}
    pairs = zip(patients, images, strict=True)
    return np.array([known[p] if p else alone[i] for p, i in pairs], np.int64)


def patients_of(facts: Sequence[Facts]) -> NDArray[np.int64]:
    """`cluster_numbers` of cases, by what is known of them."""
    return cluster_numbers([f.patient_id for f in facts], [f.image_id for f in facts])


def cluster_weights(num_clusters: int, num_draws: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Blocks [d, C] of how often each cluster is taken when C are drawn with replacement."""
    rng = np.random.default_rng(seed)
    block = max(1, BLOCK // max(num_clusters, 1))
    for first in range(0, num_draws, block):
        size = min(block, num_draws - first)
        chosen = rng.integers(0, num_clusters, (size, num_clusters))
        # One count over all draws of the block: each draw has numbers of its own.
        chosen += np.arange(size)[:, None] * num_clusters
        counts = np.bincount(chosen.ravel(), minlength=size * num_clusters)
        yield counts.reshape(size, num_clusters).astype(np.float64)


def row_weights(
    clusters: NDArray[np.int64], num_draws: int = NUM_DRAWS, seed: int = 0
) -> Iterator[NDArray[np.float64]]:
    """[N] weights per draw, for statistics that are no ratio of sums."""
    for block in cluster_weights(int(clusters.max(initial=-1)) + 1, num_draws, seed):
        for weights in block:
            yield weights[clusters]


def clustered(
    values: ArrayLike,
    clusters: NDArray[np.int64],
    groups: ArrayLike | None = None,
    num_groups: int | None = None,
    *,
    weights: ArrayLike | None = None,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> Bootstrap:
    """Mean of `values` [N] in every group, with draws of whole clusters.

    `groups` [N]: group of each row, below 0 for none; None is one group. `weights` [N] >= 0 make it
    a weighted mean (0 leaves a row out). NaN among the values leaves its row out. The same seed
    draws the same clusters, so two metrics, or two runs on the same cases, are compared draw by
    draw.
    """
    found = np.asarray(values, np.float64)
    group = np.zeros(len(found), np.int64) if groups is None else np.asarray(groups, np.int64)
    size = num_groups if num_groups is not None else int(group.max(initial=-1)) + 1
    weight = np.ones(len(found)) if weights is None else np.asarray(weights, np.float64)
    used = (group >= 0) & ~np.isnan(found)
    num_clusters = int(clusters.max(initial=-1)) + 1
    place = clusters[used] * size + group[used]
    shape, length = (num_clusters, size), num_clusters * size
    sums = np.bincount(place, (weight * np.where(used, found, 0))[used], length).reshape(shape)
    counts = np.bincount(place, weight[used], length).reshape(shape)
    estimate = _ratio(sums.sum(0), counts.sum(0))
    blocks = cluster_weights(num_clusters, num_draws, seed)
    draws = [_ratio(block @ sums, block @ counts) for block in blocks]
    return Bootstrap(estimate, np.concatenate(draws) if draws else np.zeros((0, size)))


def _ratio(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)

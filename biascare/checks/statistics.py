"""What a mixture is made of, from columns alone: no image is read, millions of rows take seconds.

    profile = profile_sources([(Records("train"), "segmentation", 5000)], target_power=0.5)
    profile["modality"].raw            # {"ct": 120000, "mri": 800, "missing": 3}: images
    profile["modality"].stream         # {"ct": 0.81, ...}: shares of the samples of the run
    imbalance(profile["modality"].raw).effective_number

Two weightings, because they answer two questions: `raw` counts what lies on disk, each folder once;
`stream` is what the model gets to see, by the number of samples the run draws from each source.
What a source does not know is a category of its own, `MISSING`, and never left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from biascare.data.mixture import Task
from biascare.data.prevalence import total_counts
from biascare.records import Records

MISSING = "missing"
AXES = ("modality", "anatomy", "target", "label", "age", "sex", "race")
COLUMNS = ("modality", "anatomy", "targets", "labels", "age", "sex", "race", "conversations")
AGE_BANDS = (*(f"{low}-{low + 9}" for low in range(0, 90, 10)), "90+")

_DRAWS = 16  # of all images together, where the K targets of an image have no closed form


class Distribution(NamedTuple):
    """One axis. Targets are counted in masks, everything else in images or samples."""

    raw: dict[str, float]  # category -> images (masks) on disk, largest first
    stream: dict[str, float]  # category -> share of the samples (drawn targets); {} without a run


class Imbalance(NamedTuple):
    """How uneven a distribution is; missing values do not enter. None where all are missing."""

    num_categories: int
    ratio: float | None  # largest over smallest
    entropy: float | None  # nats
    evenness: float | None  # entropy over its maximum, 1 for equal counts; 1 for a single category
    effective_number: float | None  # exp(entropy): that many equal categories would be as uneven
    missing_share: float  # of all, missing included


class SourceUse(NamedTuple):
    """A prepared folder in a run."""

    records: Records
    task: Task
    num_drawn: int  # samples of it in the run


def imbalance(counts: Mapping[str, float]) -> Imbalance:
    """Of a mapping category -> count or share. Categories with 0 are no categories."""
    # Unknown is no category: a release that names no sex would look evenly balanced by it.
    known = np.array([n for name, n in counts.items() if name != MISSING and n > 0], float)
    total = float(sum(counts.values()))
    if len(known) == 0:
        return Imbalance(0, None, None, None, None, missing_share=1.0 if total else 0.0)
    shares = known / known.sum()
    entropy = float(-(shares * np.log(shares)).sum())
    return Imbalance(
        num_categories=len(known),
        ratio=float(known.max() / known.min()),
        entropy=entropy,
        evenness=entropy / math.log(len(known)) if len(known) > 1 else 1.0,
        effective_number=math.exp(entropy),
        missing_share=counts.get(MISSING, 0.0) / total,
    )


def profile_folders(folders: Sequence[Records]) -> dict[str, Distribution]:
    """Distribution of every axis over prepared folders, each counted once."""
    raw: dict[str, dict[str, float]] = {axis: {} for axis in AXES}
    for records in folders:
        table = column_table(records)
        for axis, counts in _count(table, np.ones(len(records))).items():
            _add(raw[axis], counts)
    return {axis: Distribution(raw=_sorted(raw[axis]), stream={}) for axis in AXES}


def profile_sources(
    uses: Sequence[SourceUse], *, targets_per_image: int = 1, target_power: float = 0.5
) -> dict[str, Distribution]:
    """Distribution of every axis over the folders of a run, on disk and in its stream.

    `targets_per_image` and `target_power` are those of the run: they decide which of an image's
    targets it trains on. Up to rounding, the stream's shares sum to 1 on each axis but `label`,
    where an image may have several.
    """
    # A folder may serve both tasks; on disk it is there once.
    folders = {use.records.folder: use.records for use in uses}
    disk = profile_folders(list(folders.values()))
    segmented = {u.records.folder: u.records for u in uses if u.task == "segmentation"}
    # Of the folders that are segmented: the run itself weighs targets by these counts alone.
    counts = total_counts(records.target_counts for records in segmented.values())
    drawn: dict[str, dict[str, float]] = {axis: {} for axis in AXES}
    for use in uses:
        table = column_table(use.records)
        # [rows] stream units of the task in each row; see `Records.segmentation_units`.
        if use.task == "segmentation":
            units = (_lengths(table["targets"]) > 0).astype(np.float64)
        else:
            units = (_lengths(table["conversations"]) // 2).astype(np.float64)
        scale = use.num_drawn / max(units.sum(), 1)
        for axis, found in _count(table, units * scale).items():
            # A segmentation sample shows every target of its image but trains on those that it
            # draws.
            if axis != "target":
                _add(drawn[axis], found)
        if use.task == "segmentation":
            rows = expected_targets(table, counts, targets_per_image, target_power)
            _add(drawn["target"], {name: n * scale for name, n in rows.items()})
    samples = sum(use.num_drawn for use in uses)
    totals = dict.fromkeys(AXES, float(samples)) | {"target": sum(drawn["target"].values())}
    return {
        axis: disk[axis]._replace(
            stream={n: v / totals[axis] for n, v in _sorted(drawn[axis]).items() if totals[axis]}
        )
        for axis in AXES
    }


def column_table(records: Records, columns: Iterable[str] = COLUMNS) -> pa.Table:
    """The named columns of a folder, memory-mapped: pages of other columns stay untouched."""
    table: pa.Table = datasets.load_from_disk(str(records.folder)).data.table
    return table.select(list(columns))


def expected_targets(
    table: pa.Table, counts: Mapping[str, int], num_drawn: int, power: float
) -> dict[str, float]:
    """Expected rows of each target when every image is drawn once.

    An image with n targets fills its `num_drawn` rows by an order drawn with weights
    count**-power, repeated from its start. So each target gets num_drawn // n rows, and one more
    with the probability that it is among the first num_drawn % n. That is a closed form when the
    remainder is 0 or 1; else it is averaged over `_DRAWS` seeded draws of every image.
    """
    names, codes, lengths = _list_codes(table["targets"], "name")
    # Images without a target are never drawn for segmentation.
    lengths = lengths[lengths > 0]
    weights = np.array([float(max(counts.get(name, 1), 1)) for name in names]) ** -power
    image = np.repeat(np.arange(len(lengths)), lengths)
    more = (num_drawn % lengths)[image]
    share = weights[codes] / np.bincount(image, weights[codes], len(lengths))[image]
    extra = np.where(more == 1, share, 0.0)
    several = more > 1
    if several.any():
        # Only where it must be: the rest is exact, and each draw sorts all targets.
        extra[several] = _inclusion(image[several], weights[codes[several]], more[several])
    return _weighted(names, codes, extra + (num_drawn // lengths)[image])


def _inclusion(
    image: NDArray[np.int64], weights: NDArray[np.float64], wanted: NDArray[np.int64]
) -> NDArray[np.float64]:
    """[n] share of draws in which each target is among the first `wanted` of its image.

    Ordering by exponential waiting times over the weights is drawing without replacement.
    """
    # Seeded: the figure of a mixture must be the same when it is drawn again.
    rng = np.random.default_rng(0)
    starts = np.flatnonzero(np.diff(image, prepend=-1))
    first = np.repeat(starts, np.diff(starts, append=len(image)))
    hits = np.zeros(len(image))
    for _ in range(_DRAWS):
        order = np.lexsort((rng.exponential(size=len(image)) / weights, image))
        hits[order] += np.arange(len(image)) - first < wanted
    return hits / _DRAWS


def _count(table: pa.Table, weights: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    """Axis -> weighted count of each category; `weights` [rows]."""
    counts = {
        axis: _weighted(*_codes(table[axis]), weights)
        for axis in ("modality", "anatomy", "sex", "race")
    }
    ages = np.asarray(table["age"].to_numpy(), np.float64)
    known = np.isfinite(ages)
    # The last band is open: whoever is older is counted in it.
    bands = np.clip(np.where(known, ages, 0) // 10, 0, len(AGE_BANDS) - 1).astype(np.int64)
    bands[~known] = len(AGE_BANDS)
    counts["age"] = _weighted([*AGE_BANDS, MISSING], bands, weights)
    for axis, column, child in (("target", "targets", "name"), ("label", "labels", None)):
        names, codes, lengths = _list_codes(table[column], child)
        counts[axis] = _weighted(names, codes, np.repeat(weights, lengths))
        # An image without any label is a case of its own; without it the axis would hide how many.
        if axis == "label" and (without := float(weights[lengths == 0].sum())):
            _add(counts[axis], {MISSING: without})
    return counts


def _weighted(
    names: list[str], codes: NDArray[np.int64], weights: NDArray[np.float64]
) -> dict[str, float]:
    totals = np.bincount(codes, weights, len(names)).tolist()
    counts: dict[str, float] = {}
    for name, total in zip(names, totals, strict=True):
        if total:
            _add(counts, {name or MISSING: total})  # an empty anatomy says nothing
    return counts


def _add(counts: dict[str, float], more: Mapping[str, float]) -> None:
    for name, number in more.items():
        counts[name] = counts.get(name, 0.0) + number


def _codes(column: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int64]]:
    """A string column as (names, [n] index of each value); null is the last name, `MISSING`."""
    encoded = column.dictionary_encode().unify_dictionaries()
    if not encoded.num_chunks:
        return [MISSING], np.zeros(0, np.int64)
    names = [str(name) for name in encoded.chunk(0).dictionary.to_pylist()]
    codes = [
        chunk.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)
        for chunk in encoded.chunks
    ]
    return [*names, MISSING], np.concatenate(codes).astype(np.int64)


def _list_codes(
    column: pa.ChunkedArray, child: str | None
) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    """A column of lists, or of lists of structs by one field: names, codes [items], lengths [rows].

    Chunk by chunk and without joining them: the masks beside the names are never copied.
    """
    flat = [chunk.flatten() for chunk in column.chunks]
    values = [items if child is None else items.field(child) for items in flat]
    names, codes = _codes(pa.chunked_array(values, pa.string()))
    return names, codes, _lengths(column)


def _lengths(column: pa.ChunkedArray) -> NDArray[np.int64]:
    lengths = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate([np.zeros(0, np.int64), *lengths]).astype(np.int64)


def _sorted(counts: Mapping[str, float]) -> dict[str, float]:
    """Largest first, equal ones by name; ages in order; missing last."""
    ages = {band: index for index, band in enumerate(AGE_BANDS)}
    by_age = set(counts) <= {*AGE_BANDS, MISSING}

    def key(name: str) -> tuple[bool, float, str]:
        return name == MISSING, ages.get(name, 0) if by_age else -counts[name], name

    return {name: counts[name] for name in sorted(counts, key=key)}

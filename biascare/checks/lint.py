"""Checks of prepared folders: what is wrong, what is doubtful, what leaks between splits.

    report = lint(["prepared/btcv/train", "prepared/btcv/test"], settings)
    report.findings[0]       # Finding(code="leak-patient", level="error", num=3, ...)

Rows are checked in parallel by `rows.py`, all folders together by `leaks.py`. Here: columns
(ids, units, histograms, names), and the report of everything.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from biascare.checks.findings import CODES, Finding, Issues, LintSettings, Vocabulary
from biascare.checks.leaks import ID_FAMILIES, cross_findings, patient_findings, plain_id
from biascare.checks.rows import RADIOLOGICAL, FolderScan, name_of, names_of, scan_folders
from biascare.checks.statistics import column_table, profile_folders
from biascare.choices import unknown
from biascare.records import Records

TRAIN = "train"
_SIDE = re.compile(r"\b(left|right)\b")
_OTHER_SIDE = {"left": "right", "right": "left"}
_HISTOGRAMS = {"targets": "target", "labels": "label", "modality": "modality", "sex": "sex"}


class FolderSummary(NamedTuple):
    """Facts of one folder that are no findings."""

    where: str
    folder: str
    num_rows: int
    num_masks: int
    native_areas: dict[int, int]  # pixels, rounded down to a power of two -> masks
    training_areas: dict[int, int]
    num_thin: int  # masks that nearest-neighbour resizing would have erased
    sides_right: int  # pairs with the right structure at image left
    sides_wrong: int


class Report(NamedTuple):
    """Everything a run of the linter found."""

    findings: list[Finding]  # errors first, then by code
    folders: list[FolderSummary]
    near: list[tuple[tuple[int, int], tuple[int, int]]]  # ((folder, row), (folder, row)) to look at
    records: list[Records]  # the folders that could be opened, in order

    def num_findings(self, level: str) -> int:
        """Kinds of finding, not cases, of a level."""
        return sum(finding.level == level for finding in self.findings)


def lint(
    paths: Sequence[str | Path],
    settings: LintSettings,
    *,
    allowed: Iterable[str] = (),
    begin: Callable[[int], None] = lambda total: None,
    advance: Callable[[int], None] = lambda rows: None,
) -> Report:
    """Check folders one by one and together.

    `allowed` are codes whose findings are shown but no longer count. `begin` hears the number of
    rows, `advance` those done. Raises ValueError for an unknown code.
    """
    # Before anything is read: a misspelt code would be told after hours of reading.
    check_codes(allowed := tuple(allowed))
    findings, records = _open(paths)
    begin(sum(len(r) for r in records))
    scans = scan_folders(records, settings, advance)
    names = names_of(records)
    for r, scan, name in zip(records, scans, names, strict=True):
        issues = Issues(settings.num_examples)
        issues.merge(scan.issues)
        for code, example, count in _column_issues(r):
            issues.add(code, example, count)
        # A vote of all pairs: single organs do lie on the wrong side (situs inversus, a shifted
        # kidney), a mirrored folder has most of them there.
        wrong, total = scan.sides[False], scan.sides.total()
        if wrong > scan.sides[True]:
            example = f"right lies at image right in {wrong} of {total} pairs"
            issues.add("sides-disagree", example, wrong)
        findings += _findings(issues, name)
    findings += _vocabulary_findings(records, settings)
    findings += patient_findings(records, names)
    near: list[Any] = []
    if records:
        found, near = cross_findings(records, names, scans, settings)
        findings += found
    # Shown all the same: what is accepted today should be seen by who reads the report next.
    findings = [f._replace(level="allowed") if f.code in allowed else f for f in findings]
    order = list(CODES)
    findings.sort(key=lambda f: (_LEVELS.index(f.level), order.index(f.code), f.where))
    summaries = [_summary(*one) for one in zip(records, names, scans, strict=True)]
    return Report(findings=findings, folders=summaries, near=near, records=records)


_LEVELS = ("error", "warning", "allowed")


def check_codes(codes: Iterable[str]) -> None:
    """Raises ValueError for a code that no finding has, naming the nearest."""
    for code in codes:
        if code not in CODES:
            raise ValueError(unknown("--allow", code, CODES))


def _open(paths: Sequence[str | Path]) -> tuple[list[Finding], list[Records]]:
    # A folder that does not open is a finding: the others are checked all the same.
    findings, records = [], []
    # A folder that is named twice would be a duplicate of itself, in every row.
    for path in dict.fromkeys(Path(p).absolute() for p in paths):
        # Ledgers lie beside the folders, and come along with a shell's "*".
        if path.name.endswith(".skipped.jsonl"):
            continue
        try:
            records.append(Records(path))
        except (ValueError, OSError) as error:
            code = "folder-unreadable"
            findings.append(Finding(code, CODES[code][0], path.name, 1, [str(error)]))
    return findings, records


def _findings(issues: Issues, where: str) -> list[Finding]:
    return [
        Finding(code=code, level=CODES[code][0], where=where, num=count, examples=examples)
        for code, (count, examples) in issues.found.items()
    ]


def _summary(records: Records, name: str, scan: FolderScan) -> FolderSummary:
    return FolderSummary(
        where=name,
        folder=str(records.folder),
        num_rows=len(records),
        num_masks=scan.native_areas.total(),
        native_areas=dict(sorted(scan.native_areas.items())),
        training_areas=dict(sorted(scan.training_areas.items())),
        num_thin=scan.num_thin,
        sides_right=scan.sides[True],
        sides_wrong=scan.sides[False],
    )


# ---------------------------------------------------------------- one folder


def _column_issues(records: Records) -> Iterator[tuple[str, str, int]]:
    """(code, example, count) of what columns show."""
    table = column_table(records, ("id", "targets", "conversations"))
    ids = table["id"].value_counts()
    repeated = ids.filter(pc.greater(ids.field("counts"), 1))
    for entry in repeated.to_pylist():
        yield "duplicate-id", str(entry["values"]), entry["counts"]
    # Counted anew from the columns: the unit files decide what is trained on, and nothing else
    # notices rows that they leave out.
    targets = np.asarray(pc.list_value_length(table["targets"]).to_numpy())
    if not np.array_equal(np.flatnonzero(targets), records.segmentation_units):
        yield "units", "segmentation", 1
    pairs = np.asarray(pc.list_value_length(table["conversations"]).to_numpy()) // 2
    rows = np.repeat(np.arange(len(pairs)), pairs)
    if not np.array_equal(rows, records.language_units[:, 0]):
        yield "units", "language", 1
    if not len(records.segmentation_units) and not len(records.language_units):
        yield "no-units", f"{len(records):,} images, 0 masks, 0 questions", len(records)
    elif (num_idle := int(((targets == 0) & (pairs == 0)).sum())) > 0:
        idle = str(table["id"][int(np.flatnonzero((targets == 0) & (pairs == 0))[0])])
        yield "no-lesson", f"{idle}, {num_idle:,} of {len(records):,} records", num_idle
    preparation = records.manifest.get("preparation", {})
    # What the converter knew of its release; a folder that no converter wrote promises nothing.
    # Where each record's lack is noted, the release is known to have none for these images.
    is_known = not preparation.get("num_incomplete") and (
        preparation.get("num_noted", 0) >= len(records)
    )
    promised = preparation.get("promises_masks") and not is_known
    if promised and not len(records.segmentation_units):
        yield "masks-missing", f"{len(records):,} records", len(records)
    elif preparation.get("num_incomplete"):
        num_lost = preparation["num_incomplete"]
        yield "masks-lost", f"{num_lost:,} of {preparation['num_items']:,} items", num_lost
    profile = profile_folders([records])
    for name, axis in _HISTOGRAMS.items():
        stated = records.manifest.get(name, {})
        found = dict(profile[axis].raw)
        if axis == "label":
            # The manifest counts labels and not images without any.
            found.pop("missing", None)
        for category in sorted({*stated, *found}):
            if stated.get(category, 0) != found.get(category, 0):
                counts = f"{stated.get(category, 0)} stated, {found.get(category, 0):.0f} found"
                yield "manifest-counts", f"{name}: {category}: {counts}", 1


# ---------------------------------------------------------------- names


def _vocabulary_findings(records: Sequence[Records], settings: LintSettings) -> list[Finding]:
    """Names of all folders together: a variant in the test folder is as bad as one in the same."""
    issues = Issues(settings.num_examples)
    targets: Counter[str] = Counter()
    for r in records:
        targets.update(r.target_counts)
    modalities = {name for r in records for name in r.manifest.get("modality", {})}
    labels = {name for r in records for name in r.manifest.get("labels", {})}
    for code, example, count in (
        *_modality_issues(modalities, settings.vocabulary),
        *_target_issues(targets, settings.vocabulary),
        *(("label-variants", f"{a!r} and {b!r}", 1) for a, b in target_variants(labels)),
        *_unseen_issues(records),
    ):
        issues.add(code, example, count)
    return _findings(issues, "all folders")


def _modality_issues(
    names: Iterable[str], vocabulary: Vocabulary
) -> Iterator[tuple[str, str, int]]:
    for name in sorted(names):
        try:
            # Of all folders together: "CT" here and "ct" there would be two modalities of one
            # mixture.
            wanted = vocabulary.modality(name)
        except ValueError as error:
            yield "modality-name", f"{name!r}: {str(error)[:80]}", 1
        else:
            if wanted != name:
                yield "modality-name", f"{name!r}: {wanted!r} in the vocabulary", 1


def _target_issues(targets: Counter[str], vocabulary: Vocabulary) -> Iterator[tuple[str, str, int]]:
    canonical = {name: vocabulary.target(name) for name in targets}
    for name, wanted in sorted(canonical.items()):
        if wanted != name:
            yield "target-name", f"{name!r} ({targets[name]}): {wanted!r} in the vocabulary", 1
    for first, second in target_variants(canonical.values()):
        # Of canonical names: what the vocabulary unites already is no second target.
        yield "target-variants", f"{first!r} and {second!r}", 1
    for name in sorted(set(canonical.values())):
        other = _SIDE.sub(lambda match: _OTHER_SIDE[match[1]], name)
        # One side alone is often a forgotten or misspelt label of the other.
        if other != name and other not in canonical.values():
            yield "target-one-side", f"{name!r} without {other!r}", 1


def target_variants(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names that may be one: the same letters, words or word stems in another form."""
    by_form: dict[tuple[str, ...], str] = {}
    pairs = []
    for name in sorted(set(names)):
        stems = []
        for word in re.findall(r"[a-z0-9]+", name.lower()):
            # British to American, plural to singular: enough to compare by, and a person decides.
            stem = word.replace("oe", "e").replace("ae", "e").replace("our", "or")
            plural = len(stem) > 3 and stem.endswith("s") and not stem.endswith("ss")
            if word not in ("the", "of", "and"):
                stems.append(stem[:-1] if plural else stem)
        # In any order ("kidney left"), and as one word ("gall bladder").
        form = tuple(sorted(stems))
        joined = ("".join(stems),)
        for key in dict.fromkeys((form, joined)):
            if key in by_form and (by_form[key], name) not in pairs:
                pairs.append((by_form[key], name))
            by_form.setdefault(key, name)
    return pairs


def _unseen_issues(records: Sequence[Records]) -> Iterator[tuple[str, str, int]]:
    trained = [r for r in records if r.manifest["split"] == TRAIN]
    seen = {name for r in trained for name in r.target_counts}
    # Without any training folder here, every target would be unseen.
    for r in records if trained else ():
        if r.manifest["split"] != TRAIN:
            for name, count in sorted(r.target_counts.items()):
                if name not in seen:
                    yield "target-unseen", f"{name!r} in {name_of(r)} ({count})", 1


__all__ = [
    "CODES",
    "ID_FAMILIES",
    "RADIOLOGICAL",
    "Finding",
    "FolderSummary",
    "LintSettings",
    "Report",
    "Vocabulary",
    "check_codes",
    "lint",
    "name_of",
    "plain_id",
    "target_variants",
]

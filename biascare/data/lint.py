"""Checks of prepared folders: what is wrong, what is doubtful, what leaks between splits.

    report = lint(["prepared/btcv/train", "prepared/btcv/test"], settings)
    report.findings[0]       # Finding(code="leak-patient", level="error", num=3, ...)

Rows are checked in parallel by `lint_rows.py`. Here: columns (ids, units, histograms, names), and
all folders together (duplicates, leaks, contradictions). About 100 bytes per image and per question
are kept. Ids are compared within a source, and between sources only where they are known to share
them (`ID_FAMILIES`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from biascare.data.duplicates import key_of, near_pairs, shared_keys
from biascare.data.lint_rows import (
    CODES,
    RADIOLOGICAL,
    FolderScan,
    Issues,
    LintSettings,
    Vocabulary,
    scan_folders,
)
from biascare.data.records import Records
from biascare.data.statistics import column_table, profile_folders

ID_FAMILIES = {
    "mimic": ("mimic", "cxr_lt", "cxr-lt", "cxrlt"),  # CXR-LT labels images of MIMIC-CXR-JPG
    "pmc": ("pmc_vqa", "pmc-vqa", "pubmedvision"),  # figures of PubMed Central
    "isic": ("isic", "ham10000"),  # HAM10000 is the training set of ISIC 2018 task 3
}
"""Sources that name the same images and patients: family -> beginnings of source names."""

TRAIN = "train"
MIN_SHARED_ID = 6
"""Characters. Equal ids of unrelated sources are worth a look from this length; "12" is chance."""

MAX_WITHOUT_PATIENT = 0.1
"""Share of the records of a folder. Above it, leaks by patient count as not checked."""

_ID_KINDS = {"id": "leak-id", "patient_id": "leak-patient", "study_id": "leak-study"}
_SIDE = re.compile(r"\b(left|right)\b")
_HISTOGRAMS = {"targets": "target", "labels": "label", "modality": "modality", "sex": "sex"}


class Finding(NamedTuple):
    """One thing noticed."""

    code: str
    level: str  # error | warning | allowed
    where: str  # source/split, or several
    num: int  # cases: images, masks, names, ...
    examples: list[str]

    @property
    def message(self) -> str:
        return CODES[self.code][1]


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
    check_codes(allowed := tuple(allowed))
    findings, records = _open(paths)
    begin(sum(len(r) for r in records))
    scans = scan_folders(records, settings, advance)
    names = [name_of(r) for r in records]
    for r, scan, name in zip(records, scans, names, strict=True):
        issues = Issues(settings.num_examples)
        issues.merge(scan.issues)
        for code, example, count in (*_column_issues(r), *_side_issues(scan)):
            issues.add(code, example, count)
        findings += _findings(issues, name)
    findings += _vocabulary_findings(records, settings)
    findings += _patient_findings(records)
    near: list[Any] = []
    if records:
        found, near = _cross_findings(records, scans, settings)
        findings += found
    findings = [f._replace(level="allowed") if f.code in allowed else f for f in findings]
    order = list(CODES)
    findings.sort(key=lambda f: (_LEVELS.index(f.level), order.index(f.code), f.where))
    summaries = [_summary(r, scan) for r, scan in zip(records, scans, strict=True)]
    return Report(findings=findings, folders=summaries, near=near, records=records)


def name_of(records: Records) -> str:
    """source/split of a folder."""
    return f"{records.manifest['source']}/{records.manifest['split']}"


_LEVELS = ("error", "warning", "allowed")


def check_codes(codes: Iterable[str]) -> None:
    """Raises ValueError for a code that no finding has, naming the nearest."""
    import difflib

    for code in codes:
        if code not in CODES:
            near = difflib.get_close_matches(code, CODES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"--allow: got {code!r}{hint} Known codes: {', '.join(CODES)}")


def _open(paths: Sequence[str | Path]) -> tuple[list[Finding], list[Records]]:
    findings, records = [], []
    for path in dict.fromkeys(Path(p).absolute() for p in paths):
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


def _summary(records: Records, scan: FolderScan) -> FolderSummary:
    return FolderSummary(
        where=name_of(records),
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
    targets = np.asarray(pc.list_value_length(table["targets"]).to_numpy())
    if not np.array_equal(np.flatnonzero(targets), records.segmentation_units):
        yield "units", "segmentation", 1
    pairs = np.asarray(pc.list_value_length(table["conversations"]).to_numpy()) // 2
    rows = np.repeat(np.arange(len(pairs)), pairs)
    if not np.array_equal(rows, records.language_units[:, 0]):
        yield "units", "language", 1
    if not len(records.segmentation_units) and not len(records.language_units):
        yield "no-units", f"{len(records):,} images, 0 masks, 0 questions", len(records)
    profile = profile_folders([records])
    for name, axis in _HISTOGRAMS.items():
        stated = records.manifest.get(name, {})
        found = dict(profile[axis].raw)
        if axis == "label":
            found.pop("missing", None)
        for category in sorted({*stated, *found}):
            if stated.get(category, 0) != found.get(category, 0):
                counts = f"{stated.get(category, 0)} stated, {found.get(category, 0):.0f} found"
                yield "manifest-counts", f"{name}: {category}: {counts}", 1


def _side_issues(scan: FolderScan) -> Iterator[tuple[str, str, int]]:
    if scan.sides[False] > scan.sides[True]:
        total = scan.sides.total()
        example = f"right lies at image right in {scan.sides[False]} of {total} pairs"
        yield "sides-disagree", example, scan.sides[False]


# ---------------------------------------------------------------- names


def _vocabulary_findings(records: Sequence[Records], settings: LintSettings) -> list[Finding]:
    """Names of all folders together: a variant in the test folder is as bad as one in the same."""
    issues = Issues(settings.num_examples)
    targets: Counter[str] = Counter()
    for r in records:
        targets.update(r.target_counts)
    modalities = {name for r in records for name in r.manifest.get("modality", {})}
    for code, example, count in (
        *_modality_issues(modalities, settings.vocabulary),
        *_target_issues(targets, settings.vocabulary),
        *_unseen_issues(records),
    ):
        issues.add(code, example, count)
    return _findings(issues, "all folders")


def _modality_issues(
    names: Iterable[str], vocabulary: Vocabulary
) -> Iterator[tuple[str, str, int]]:
    for name in sorted(names):
        try:
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
        yield "target-variants", f"{first!r} and {second!r}", 1
    for name in sorted(set(canonical.values())):
        other = _other_side(name)
        if other != name and other not in canonical.values():
            yield "target-one-side", f"{name!r} without {other!r}", 1


def target_variants(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names that may be one: the same letters, words or word stems in another form."""
    by_form: dict[tuple[str, ...], str] = {}
    pairs = []
    for name in sorted(set(names)):
        words = re.findall(r"[a-z0-9]+", name.lower())
        stems = [_stem(word) for word in words if word not in ("the", "of", "and")]
        form = tuple(sorted(stems))
        joined = ("".join(stems),)
        for key in dict.fromkeys((form, joined)):
            if key in by_form and (by_form[key], name) not in pairs:
                pairs.append((by_form[key], name))
            by_form.setdefault(key, name)
    return pairs


def _stem(word: str) -> str:
    """British to American, plural to singular: enough to compare by."""
    word = word.replace("oe", "e").replace("ae", "e").replace("our", "or")
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _other_side(name: str) -> str:
    return _SIDE.sub(lambda match: {"left": "right", "right": "left"}[match[1]], name)


def _unseen_issues(records: Sequence[Records]) -> Iterator[tuple[str, str, int]]:
    trained = [r for r in records if r.manifest["split"] == TRAIN]
    seen = {name for r in trained for name in r.target_counts}
    for r in records if trained else ():
        if r.manifest["split"] != TRAIN:
            for name, count in sorted(r.target_counts.items()):
                if name not in seen:
                    yield "target-unseen", f"{name!r} in {name_of(r)} ({count})", 1


# ---------------------------------------------------------------- all folders


def _patient_findings(records: Sequence[Records]) -> list[Finding]:
    """Sources with several splits here, of which a folder hardly names patients."""
    splits: dict[str, set[str]] = {}
    for r in records:
        splits.setdefault(r.manifest["source"], set()).add(r.manifest["split"])
    findings, code = [], "no-patient"
    for r in records:
        missing = column_table(r, ("patient_id",))["patient_id"].null_count
        several = len(splits[r.manifest["source"]]) > 1
        if several and missing > MAX_WITHOUT_PATIENT * len(r):
            example = f"{missing:,} of {len(r):,} records"
            findings.append(Finding(code, CODES[code][0], name_of(r), missing, [example]))
    return findings


class _Rows(NamedTuple):
    """The rows of all folders as one list."""

    folder: NDArray[np.int64]  # [n] index of the folder
    row: NDArray[np.int64]  # [n] row in it
    split: NDArray[np.int64]  # [n]
    source: NDArray[np.int64]  # [n]

    def select(self, items: NDArray[Any]) -> _Rows:
        return _Rows(*(column[items] for column in self))


def _cross_findings(
    records: Sequence[Records], scans: Sequence[FolderScan], settings: LintSettings
) -> tuple[list[Finding], list[tuple[tuple[int, int], tuple[int, int]]]]:
    """Leaks and duplicates, and the near pairs to look at."""
    rows = _all_rows(records)
    report = _Shared(records, rows, settings.num_examples)
    for column, code in _ID_KINDS.items():
        keys = np.concatenate([_id_keys(r, column) for r in records])
        report.leak(code, keys, keys != 0, rows.split)
    loose = np.concatenate([_loose_patient_keys(r) for r in records])
    report.leak("shared-patient-id", loose, loose != 0, rows.split, between=rows.source)
    exact = np.concatenate([scan.exact for scan in scans])
    decoded = exact.any(axis=1)
    report.leak("leak-image", exact, decoded, rows.split)
    _contradictions(report, exact)
    report.leak("image-twice", exact, decoded, np.arange(len(exact)), inside=rows.split)
    hashes = np.concatenate([scan.perceptual for scan in scans])
    comparable = np.flatnonzero(np.concatenate([scan.comparable for scan in scans]))
    near = _near(hashes[comparable], exact[comparable], rows.select(comparable))
    near = comparable[near]
    crossing = rows.split[near[:, 0]] != rows.split[near[:, 1]]
    report.pairs("leak-near", near[crossing])
    report.pairs("near-between-sources", near[~crossing])
    shown = np.concatenate([near[crossing], near[~crossing]])[:_MOST_SHOWN]
    places = [
        (
            (int(rows.folder[a]), int(rows.row[a])),
            (int(rows.folder[b]), int(rows.row[b])),
        )
        for a, b in shown
    ]
    return report.findings, places


_MOST_SHOWN = 24  # near pairs on the sheet
_ROWS_READ = 1024  # conversations held as text at a time


def _all_rows(records: Sequence[Records]) -> _Rows:
    splits = sorted({r.manifest["split"] for r in records})
    sources = sorted({r.manifest["source"] for r in records})
    lengths = [len(r) for r in records]

    def spread(values: Iterable[int]) -> NDArray[np.int64]:
        return np.repeat(np.array(list(values), np.int64), lengths)

    return _Rows(
        folder=spread(range(len(records))),
        row=np.concatenate([np.arange(n) for n in lengths]),
        split=spread(splits.index(r.manifest["split"]) for r in records),
        source=spread(sources.index(r.manifest["source"]) for r in records),
    )


def _near(hashes: NDArray[np.uint64], exact: NDArray[np.uint64], rows: _Rows) -> NDArray[np.int64]:
    """[p, 2] near pairs, not equal, of different splits or different sources."""

    def keep(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.bool_]:
        apart = (rows.split[first] != rows.split[second]) | (
            rows.source[first] != rows.source[second]
        )
        return apart & (exact[first] != exact[second]).any(axis=1)

    return near_pairs(hashes, keep)


class _Shared:
    """Turns shared keys and pairs into findings."""

    def __init__(self, records: Sequence[Records], rows: _Rows, num_examples: int) -> None:
        self.records, self.rows, self.num_examples = records, rows, num_examples
        self.findings: list[Finding] = []

    def leak(
        self,
        code: str,
        keys: NDArray[np.uint64],
        valid: Any,  # [n] bool
        parts: NDArray[np.int64],
        *,
        between: NDArray[np.int64] | None = None,
        inside: NDArray[np.int64] | None = None,
    ) -> None:
        """Rows whose key stands in several parts; with `between` only keys that several of those
        share too, with `inside` only rows that share the key within one of those."""
        items = np.flatnonzero(valid)
        columns = keys[items, None] if keys.ndim == 1 else keys[items]
        if inside is not None:
            columns = np.column_stack([columns, inside[items].astype(np.uint64)])
        if between is not None:
            several = shared_keys(columns, between[items]).items
            items, columns = items[several], columns[several]
        found = shared_keys(columns, parts[items], limit=self.num_examples)
        self._add(code, items[found.items], [(items[a], items[b]) for a, b in found.examples])

    def pairs(self, code: str, pairs: NDArray[np.int64]) -> None:
        examples = [(a, b) for a, b in pairs[: self.num_examples]]
        self._add(code, np.unique(pairs), examples)

    def answers(
        self, keys: NDArray[np.uint64], answers: NDArray[np.int64], places: NDArray[np.int64]
    ) -> None:
        """Questions whose key [q, 3] has several answers [q]; `places` [q, 2] are row and turn."""
        found = shared_keys(keys, answers, limit=self.num_examples)
        examples = [(places[a], places[b]) for a, b in found.examples]
        notes = [self._note(a, b) for a, b in examples]
        rows = [(a[0], b[0]) for a, b in examples]
        self._add("answers-differ", places[found.items, 0], rows, notes)

    def _note(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> str:
        """Question and both answers of two places."""
        (question, one), (_, other) = (
            [str(turn["text"])[:60] for turn in self._value(row, "conversations")[turn : turn + 2]]
            for row, turn in (first.tolist(), second.tolist())
        )
        return f": {question!r}: {one!r}, {other!r}"

    def _add(
        self,
        code: str,
        items: NDArray[np.int64],
        examples: list[tuple[Any, Any]],
        notes: Iterable[str] = repeat(""),
    ) -> None:
        if not len(items):
            return
        folders = [name_of(self.records[f]) for f in np.unique(self.rows.folder[items])]
        where = ", ".join(folders[:4]) + (f" and {len(folders) - 4} more" * (len(folders) > 4))
        shown = [
            f"{self._id(a)} = {self._id(b)}{note}"
            for (a, b), note in zip(examples, notes, strict=False)
        ]
        self.findings.append(Finding(code, CODES[code][0], where, len(items), shown))

    def _id(self, item: int) -> str:
        return f"{name_of(self.records[int(self.rows.folder[item])])}:{self._value(item, 'id')}"

    def _value(self, item: int, column: str) -> Any:
        table = column_table(self.records[int(self.rows.folder[item])], (column,))
        return table[column][int(self.rows.row[item])].as_py()


def _contradictions(report: _Shared, exact: NDArray[np.uint64]) -> None:
    """The same pixels and the same question, but another answer, in one folder or in several."""
    asked = [np.zeros((0, 4), np.uint64)]
    start = 0
    for records in report.records:
        for texts in column_table(records, ("conversations",)).to_batches(_ROWS_READ):
            asked.append(_asked(texts["conversations"].to_pylist(), start))
            start += len(texts)
    row, turn, question, answer = np.concatenate(asked).T
    decoded = exact[row].any(axis=1)
    keys = np.column_stack([exact[row], question])[decoded]
    places = np.column_stack([row, turn]).astype(np.int64)[decoded]
    report.answers(keys, answer[decoded].view(np.int64), places)


def _asked(conversations: Sequence[list[dict[str, Any]]], start: int) -> NDArray[np.uint64]:
    """[q, 4] row, turn and keys of question and answer. Reports may differ, so they stay out."""
    asked = [
        (start + row, turn, _text_key(turns[turn]["text"]), _text_key(turns[turn + 1]["text"]))
        for row, turns in enumerate(conversations)
        for turn in range(0, len(turns) - 1, 2)
        if turns[turn]["kind"] != "report"
    ]
    return np.array(asked, np.uint64).reshape(-1, 4)


def _text_key(text: str | None) -> int:
    """The same for another case, spacing or final mark."""
    return key_of(" ".join((text or "").lower().split()).rstrip(" .?!"))


def _family(source: str) -> str:
    """What ids of a source are compared within."""
    for family, beginnings in ID_FAMILIES.items():
        if source.lower().startswith(beginnings):
            return family
    return f"source {source}"


def _id_keys(records: Records, column: str) -> NDArray[np.uint64]:
    """[rows] key of an id within its family; 0 where it is unknown."""
    family = _family(records.manifest["source"])
    shared = family in ID_FAMILIES

    def key(value: str) -> int:
        return key_of(family, column, plain_id(value, column) if shared else value)

    return _keys(records, column, key)


def _loose_patient_keys(records: Records) -> NDArray[np.uint64]:
    """[rows] key of a patient id whatever the source; 0 where it is unknown or short."""

    def key(value: str) -> int:
        return key_of("any", value) if len(value) >= MIN_SHARED_ID else 0

    return _keys(records, "patient_id", key)


def _keys(records: Records, column: str, key: Callable[[str], int]) -> NDArray[np.uint64]:
    encoded = column_table(records, (column,))[column].dictionary_encode().unify_dictionaries()
    keys = [key(value) for value in encoded.chunk(0).dictionary.to_pylist()]
    table = np.array([*keys, 0], np.uint64)
    codes = [c.indices.fill_null(len(keys)).to_numpy(zero_copy_only=False) for c in encoded.chunks]
    return table[np.concatenate(codes)]


def plain_id(value: str, column: str) -> str:
    """An id as every source of a family writes it: `p10000032` and `10000032` are one patient; of
    an image id the last part counts."""
    if column == "id":
        return value.rsplit("/", 1)[-1].lower()
    return re.sub(r"^[a-z](?=\d+$)", "", value.rsplit("/", 1)[-1].lower())


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

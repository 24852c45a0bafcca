"""What folders share: patients, studies and images across splits, duplicates, contradictions.

    findings, near = cross_findings(records, names, scans, settings)

About 500 bytes per image and 30 per question are kept. Ids are compared within a source, and
between sources only where they are known to share them (`ID_FAMILIES`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from biascare.checks.duplicates import key_of, near_pairs, shared_keys
from biascare.checks.findings import CODES, Finding, LintSettings
from biascare.checks.rows import FolderScan
from biascare.checks.statistics import column_table
from biascare.records import Records

ID_FAMILIES = {
    "mimic": ("mimic", "cxr_lt", "cxr-lt", "cxrlt"),  # CXR-LT labels images of MIMIC-CXR-JPG
    "pmc": ("pmc_vqa", "pmc-vqa", "pubmedvision"),  # figures of PubMed Central
    "isic": ("isic", "ham10000"),  # HAM10000 is the training set of ISIC 2018 task 3
}
"""Sources that name the same images and patients: family -> beginnings of source names."""

MIN_SHARED_ID = 6
"""Characters. Equal ids of unrelated sources are worth a look from this length; "12" is chance."""

MAX_WITHOUT_PATIENT = 0.1
"""Share of the records of a folder. Above it, leaks by patient count as not checked."""

_ID_KINDS = {"id": "leak-id", "patient_id": "leak-patient", "study_id": "leak-study"}


def patient_findings(records: Sequence[Records], names: Sequence[str]) -> list[Finding]:
    """Sources with several splits here, of which a folder hardly names patients."""
    splits: dict[str, set[str]] = {}
    for r in records:
        splits.setdefault(r.manifest["source"], set()).add(r.manifest["split"])
    findings, code = [], "no-patient"
    for r, name in zip(records, names, strict=True):
        missing = column_table(r, ("patient_id",))["patient_id"].null_count
        # A source of a single split cannot leak to itself.
        several = len(splits[r.manifest["source"]]) > 1
        if several and missing > MAX_WITHOUT_PATIENT * len(r):
            example = f"{missing:,} of {len(r):,} records"
            findings.append(Finding(code, CODES[code][0], name, missing, [example]))
    return findings


def shared_with_training(
    held_out: Sequence[Records], training: Sequence[Records]
) -> dict[str, int]:
    """How many held-out records have an id, a patient or a study that a training folder has too;
    by columns alone, so copies of an image under another name are not seen."""
    counts = {}
    for column in _ID_KINDS:
        trained = np.unique(np.concatenate([id_keys(r, column) for r in training]))
        keys = [id_keys(r, column) for r in held_out]
        counts[column] = sum(int((np.isin(k, trained) & (k != 0)).sum()) for k in keys)
    return counts


class _Rows(NamedTuple):
    """The rows of all folders as one list."""

    folder: NDArray[np.int64]  # [n] index of the folder
    row: NDArray[np.int64]  # [n] row in it
    split: NDArray[np.int64]  # [n]
    source: NDArray[np.int64]  # [n]

    def select(self, items: NDArray[Any]) -> _Rows:
        return _Rows(*(column[items] for column in self))


def cross_findings(
    records: Sequence[Records],
    names: Sequence[str],
    scans: Sequence[FolderScan],
    settings: LintSettings,
) -> tuple[list[Finding], list[tuple[tuple[int, int], tuple[int, int]]]]:
    """Leaks and duplicates, and the near pairs to look at. `names` of the folders are told."""
    rows = _all_rows(records)
    report = _Shared(records, names, rows, settings.num_examples)
    # Ids before pixels: where a release names its patients, that is the leak to mend first.
    for column, code in _ID_KINDS.items():
        keys = np.concatenate([id_keys(r, column) for r in records])
        report.leak(code, keys, keys != 0, rows.split)
    # Again whatever the source, 0 for short ones: unrelated releases may share patients unknown to
    # ID_FAMILIES, and a person decides whether equal ids mean that.
    any_source = (
        _keys(r, "patient_id", lambda v: key_of("any", v) if len(v) >= MIN_SHARED_ID else 0)
        for r in records
    )
    loose = np.concatenate(list(any_source))
    report.leak("shared-patient-id", loose, loose != 0, rows.split, between=rows.source)
    exact = np.concatenate([scan.exact for scan in scans])
    # Undecodable images have zeros for a hash: they would all be one image.
    decoded = exact.any(axis=1)
    report.leak("leak-image", exact, decoded, rows.split)
    _contradictions(report, exact)
    # Every row is a part of its own here; across splits the same pixels are a leak already.
    report.leak("image-twice", exact, decoded, np.arange(len(exact)), inside=rows.split)
    hashes = np.concatenate([scan.perceptual for scan in scans])
    comparable = np.flatnonzero(np.concatenate([scan.comparable for scan in scans]))
    near = _near(hashes[comparable], exact[comparable], rows.select(comparable))
    near = comparable[near]
    # Two sources of one split are told too: a later split by hash could part such a pair.
    crossing = rows.split[near[:, 0]] != rows.split[near[:, 1]]
    report.pairs("leak-near", near[crossing])
    report.pairs("near-between-sources", near[~crossing])
    # Leaks first, as the sheet has room for a few only.
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
    # Numbers instead of names, as every row of every folder has them.
    of_folder = {
        "folder": list(range(len(records))),
        "split": [splits.index(r.manifest["split"]) for r in records],
        "source": [sources.index(r.manifest["source"]) for r in records],
    }
    columns = {name: np.repeat(numbers, lengths) for name, numbers in of_folder.items()}
    return _Rows(row=np.concatenate([np.arange(n) for n in lengths]), **columns)


def _near(hashes: NDArray[np.uint64], exact: NDArray[np.uint64], rows: _Rows) -> NDArray[np.int64]:
    """[p, 2] near pairs, not equal, of different splits or different sources."""
    return near_pairs(hashes, exact, rows.split * (rows.source.max(initial=0) + 1) + rows.source)


class _Shared:
    """Turns shared keys and pairs into findings."""

    def __init__(
        self, records: Sequence[Records], names: Sequence[str], rows: _Rows, num_examples: int
    ) -> None:
        self.records, self.names, self.rows = records, names, rows
        self.num_examples = num_examples
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
        notes = []
        for pair in examples:
            (question, one), (_, other) = (
                [str(t["text"])[:60] for t in self._value(row, "conversations")[turn : turn + 2]]
                for row, turn in (place.tolist() for place in pair)
            )
            notes.append(f": {question!r}: {one!r}, {other!r}")
        rows = [(a[0], b[0]) for a, b in examples]
        self._add("answers-differ", places[found.items, 0], rows, notes)

    def _add(
        self,
        code: str,
        items: NDArray[np.int64],
        examples: list[tuple[Any, Any]],
        notes: Iterable[str] = repeat(""),
    ) -> None:
        if not len(items):
            return
        folders = [self.names[f] for f in np.unique(self.rows.folder[items])]
        where = ", ".join(folders[:4]) + (f" and {len(folders) - 4} more" * (len(folders) > 4))
        shown = [
            f"{self._id(a)} = {self._id(b)}{note}"
            for (a, b), note in zip(examples, notes, strict=False)
        ]
        self.findings.append(Finding(code, CODES[code][0], where, len(items), shown))

    def _id(self, item: int) -> str:
        return f"{self.names[int(self.rows.folder[item])]}:{self._value(item, 'id')}"

    def _value(self, item: int, column: str) -> Any:
        table = column_table(self.records[int(self.rows.folder[item])], (column,))
        return table[column][int(self.rows.row[item])].as_py()


def _contradictions(report: _Shared, exact: NDArray[np.uint64]) -> None:
    """The same pixels and the same question, but another answer, in one folder or in several."""
    asked = [np.zeros((0, 4), np.uint64)]
    start = 0
    for records in report.records:
        # In batches, and keys are kept alone: texts as Python objects take many times their size.
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
    asked = []
    for row, turns in enumerate(conversations):
        for turn in range(0, len(turns) - 1, 2):
            if turns[turn]["kind"] != "report":
                # Another choice is another question; the order of its options is not.
                options = sorted(_plain(option) for option in turns[turn]["options"] or ())
                question = key_of(_plain(turns[turn]["text"]), *options)
                asked.append((start + row, turn, question, key_of(_plain(turns[turn + 1]["text"]))))
    return np.array(asked, np.uint64).reshape(-1, 4)


def _plain(text: str | None) -> str:
    """The same for another case, spacing or final mark."""
    return " ".join((text or "").lower().split()).rstrip(" .?!")


def id_key(source: str, column: str, value: str) -> int:
    """Key of an id within the family of its source."""
    # The source itself for most: "patient 12" of two unrelated releases are two people.
    family = next(
        (f for f, starts in ID_FAMILIES.items() if source.lower().startswith(starts)),
        f"source {source}",
    )
    # Only in a family are ids stripped: elsewhere p12 and q12 may well be two patients.
    return key_of(family, column, plain_id(value, column) if family in ID_FAMILIES else value)


def id_keys(records: Records, column: str) -> NDArray[np.uint64]:
    """[rows] `id_key` of a column; 0 where it is unknown."""
    source = records.manifest["source"]
    return _keys(records, column, lambda value: id_key(source, column, value))


def _keys(records: Records, column: str, key: Callable[[str], int]) -> NDArray[np.uint64]:
    encoded = column_table(records, (column,))[column].dictionary_encode().unify_dictionaries()
    # Each distinct value is hashed once: all slices of a volume share their patient.
    keys = [key(value) for value in encoded.chunk(0).dictionary.to_pylist()]
    table = np.array([*keys, 0], np.uint64)
    codes = [c.indices.fill_null(len(keys)).to_numpy(zero_copy_only=False) for c in encoded.chunks]
    return table[np.concatenate(codes)]


def plain_id(value: str, column: str) -> str:
    """An id as every source of a family writes it; of an id with folders the last part counts."""
    # A letter may be all that tells two images apart; with patients it is a prefix, see below.
    if column == "id":
        return value.rsplit("/", 1)[-1].lower()
    # MIMIC writes p10000032 in paths and 10000032 in tables.
    return re.sub(r"^[a-z](?=\d+$)", "", value.rsplit("/", 1)[-1].lower())

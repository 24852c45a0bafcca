"""Reading record folders, memory-mapped: a row is read by touching its own pages only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from biascare.records.record import FEATURES, check_row, row_digest, unpacked
from biascare.records.writer import (
    FORMAT,
    FORMAT_VERSION,
    LANGUAGE_UNITS,
    MANIFEST,
    SEGMENTATION_UNITS,
    stream_units,
)


class Records:
    """Read-only, memory-mapped view of one prepared folder; picklable (it is reopened by path)."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self.manifest = read_manifest(self.folder)
        _check_version(self.folder, self.manifest["format_version"])
        self._batches = _open(self.folder, self.manifest)
        self._sound: set[int] = set()  # numbers of batches that `_checked` has seen
        # Where each batch begins: a row is then found by bisection, without joining the batches.
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        # [U] int32: numbers of the rows that have at least one target, ascending; and [U, 2] int32:
        # (row number, index of the user turn in its conversations), ascending.
        self.segmentation_units, self.language_units = self._load_units()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index` as python values: image bytes, targets [{name, rle}], conversations
        [{role, text, kind, options, facts}], labels [str], extra dict, unknown attributes None.

        Raises ValueError, naming folder and record, when a byte of image or masks was altered.
        """
        # At each reading: the checksum costs less than decoding what it guards, and a disk may fail
        # in the middle of a run.
        row = self.unchecked(index)
        check_row(row, str(self.folder))
        return row

    def unchecked(self, index: int) -> dict[str, Any]:
        """Row `index` as it lies on disk, sound or not: for programs that look for damage.

        Raises ValueError when its texts are no texts any more.
        """
        with self._naming(index):
            row = unpacked(self._stored_row(index))
            # A flipped bit of Arrow's makes nothing of a value, and what reads it fails elsewhere.
            lacking = [name for name, value in row.items() if value is None and name not in UNKNOWN]
            if lacking:
                raise ValueError(f"it has no {', '.join(lacking)}")
            return row

    def id_of(self, index: int) -> str:
        """Id of row `index`, whatever has become of the rest of it."""
        try:
            batch, place = self._locate(index)
            stored = batch.column("id")[place].as_buffer()
        except (ValueError, AttributeError):  # no id to be found
            return f"row {index}"
        # Arrow would refuse damaged UTF-8, and then the damaged row could not even be named.
        return str(stored.to_pybytes().decode("utf-8", errors="replace"))

    @contextmanager
    def _naming(self, what: int | str) -> Iterator[None]:
        """Errors of Arrow and JSON, which know neither folder nor record (`what`: its index)."""
        try:
            yield
        except (ValueError, TypeError, AttributeError, pa.ArrowException) as error:
            if str(self.folder) in str(error):
                raise
            named = what if isinstance(what, str) else f"record {self.id_of(what)!r}"
            raise ValueError(
                f"{self.folder}, {named} is damaged ({error}); copy the folder again from where it "
                "is whole, or prepare it again"
            ) from error

    def _stored_row(self, index: int) -> dict[str, Any]:
        """Row `index` as it was digested."""
        batch, place = self._locate(index)
        row: dict[str, Any] = batch.slice(place, 1).to_pylist()[0]
        return row

    def _locate(self, index: int) -> tuple[pa.RecordBatch, int]:
        """The batch that holds row `index`, and its place there."""
        # `range` knows negative numbers and raises IndexError, which ends a `for` over the records.
        number = range(len(self))[index]
        batch = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._checked(batch), number - int(self._starts[batch])

    def _checked(self, number: int) -> pa.RecordBatch:
        """A batch whose lengths lead nowhere outside it. Raises ValueError otherwise."""
        batch = self._batches[number]
        # At the first touch: at opening, pages of all files would have to be read.
        if number not in self._sound:
            try:
                for name, column in zip(batch.schema.names, batch.columns, strict=True):
                    check_lengths(column, name)
            except ValueError as error:
                rows = f"rows {self._starts[number]} to {self._starts[number + 1] - 1}"
                raise ValueError(
                    f"{self.folder}, {rows}: {error}; copy the folder again from where it is "
                    "whole, or prepare it again"
                ) from error
            self._sound.add(number)
        return batch

    @property
    def table(self) -> pa.Table:
        """All rows as columns, memory-mapped: only pages of the columns that are used are read."""
        batches = [self._checked(number) for number in range(len(self._batches))]
        return pa.Table.from_batches(batches, schema=_SCHEMA)

    def __reduce__(self) -> tuple[type[Records], tuple[str]]:
        # A worker maps the files again; pickling the batches would copy all images to it.
        return (Records, (str(self.folder),))

    def __repr__(self) -> str:
        return f"Records({str(self.folder)!r}, num_rows={len(self)})"

    def ids(self) -> list[str]:
        """[N] id of each row; image pages stay untouched, as by what follows."""
        with self._naming("an id"):
            return [str(name) for name in self.table["id"].to_pylist()]

    @cached_property
    def labelled_units(self) -> np.ndarray:
        """[U] numbers of the rows that have at least one label, ascending."""
        with self._naming("a label"):
            return np.flatnonzero(np.asarray(pc.list_value_length(self.table["labels"])) > 0)

    def target_names(self, index: int) -> list[str]:
        """Names of the masks of row `index`."""
        batch, place = self._locate(index)
        with self._naming(index):
            return [target["name"] for target in batch.column("targets")[place].as_py()]

    def question_kinds(self) -> list[str]:
        """[U] kind of each language unit, in their order."""
        with self._naming("the kind of a question"):
            return [
                str(kind)
                for chunk in self.table["conversations"].chunks  # joined, texts would be copied
                for kind in chunk.flatten().field("kind")[::2].to_pylist()
            ]

    @property
    def target_counts(self) -> dict[str, int]:
        """Number of masks per target name, from the manifest."""
        return dict(self.manifest["targets"])

    def verify(self) -> None:
        """Read every row and compare the content hash. Raises ValueError when a byte changed."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            # Of the stored row: the unpacked one is parsed JSON, which has more than one spelling.
            with self._naming(index):
                digest.update(row_digest(self._stored_row(index)))
        if digest.hexdigest() != self.manifest["content_hash"]:
            raise ValueError(
                f"{self.folder}: content hash is {digest.hexdigest()}, the manifest says "
                f"{self.manifest['content_hash']}; the folder was changed, prepare it again"
            )

    def _load_units(self) -> tuple[np.ndarray, np.ndarray]:
        paths = [self.folder / SEGMENTATION_UNITS, self.folder / LANGUAGE_UNITS]
        if not all(path.is_file() for path in paths):  # `datasets` copies shards without them
            return stream_units(self.table)
        segmentation, language = (
            np.load(path, mmap_mode="r", allow_pickle=False) for path in paths
        )
        # Units of another preparation would point at other rows, and no error would follow.
        expected = (self.manifest["num_segmentation_units"], self.manifest["num_language_units"])
        if (len(segmentation), len(language)) != expected:
            raise ValueError(
                f"{self.folder}: unit files disagree with {MANIFEST}; prepare it again"
            )
        return segmentation, language


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a record folder of any version. Raises ValueError when there is none."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(
            f"record folder {folder} does not exist; prepare it with a data_prep program"
        )
    if not path.is_file():
        # Often the folder above is named: prepared/btcv instead of prepared/btcv/train.
        inside = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}"))
        hint = f"; did you mean one of its folders {inside}?" if inside else ""
        raise ValueError(f"{folder} has no {MANIFEST}: not a finished record folder{hint}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); prepare the folder again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} does not describe {FORMAT}: written by another program?")
    return manifest


def _check_version(folder: Path, version: int) -> None:
    if version == 1:
        raise ValueError(
            f"{folder} has format version 1, this program reads {FORMAT_VERSION}; convert it, the "
            f"older folder is kept: python data_prep/upgrade.py {folder}"
        )
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {version}, this program reads {FORMAT_VERSION}; prepare "
            "it again or install the matching version"
        )


_SCHEMA = FEATURES.arrow_schema

UNKNOWN = ("patient_id", "study_id", "sex", "age", "race")
"""Columns that may hold nothing."""


def check_lengths(array: pa.Array, name: str) -> None:
    """Raise ValueError where the offsets of a column, or of one inside it, do not rise or lead out
    of it. Arrow believes them, and with a flipped bit it reads, or ends, somewhere else.

    Its own full validation reads all texts too, and cannot tell a bad letter from a bad offset.
    """
    kind = array.type
    if pa.types.is_struct(kind):
        for number in range(kind.num_fields):
            check_lengths(array.field(number), f"{name}.{kind.field(number).name}")
        return
    is_list = pa.types.is_list(kind)
    if not (is_list or pa.types.is_string(kind) or pa.types.is_binary(kind)) or not len(array):
        return
    offsets, data = array.buffers()[1:3]
    held = np.frombuffer(offsets, np.int32)[array.offset :][: len(array) + 1]
    limit = len(array.values) if is_list else 0 if data is None else data.size
    if len(held) <= len(array) or held[0] < 0 or held[-1] > limit or (np.diff(held) < 0).any():
        raise ValueError(f"the lengths of {name} are damaged")
    if is_list:
        check_lengths(array.values, name)


def _open(folder: Path, manifest: Mapping[str, Any]) -> list[pa.RecordBatch]:
    """Map the files. Raises ValueError when they are not what the manifest describes."""
    batches: list[pa.RecordBatch] = []
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        # The name alone: a path in a stranger's file must not lead out of the folder.
        names = [Path(entry["filename"]).name for entry in state["_data_files"]]
        for name in names:
            # Nor may a link: its bytes, of whatever file, would become part of this data set.
            if (folder / name).resolve().parent != folder.resolve():
                raise ValueError(f"{name} is a link that leads out of the folder")
            # By Arrow itself: `datasets` spends a millisecond and 40 kB on every file, which is too
            # much for the thousands of files of millions of images.
            messages = pa.ipc.MessageReader.open_stream(pa.memory_map(str(folder / name)))
            if not pa.ipc.read_schema(messages.read_next_message()).equals(_SCHEMA):
                raise ValueError(f"{name} does not have the columns of {FORMAT}")
            # One schema for all: a file's own copy would cost as much memory as its arrays.
            batches += [pa.ipc.read_record_batch(message, _SCHEMA) for message in messages]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"{folder} is damaged ({error}); prepare it again") from error
    # A copy that was cut between two files still opens; only the count tells.
    num_rows = sum(batch.num_rows for batch in batches)
    if num_rows != manifest["num_rows"]:
        raise ValueError(
            f"{folder} has {num_rows} rows, its {MANIFEST} says {manifest['num_rows']}; "
            "a shard is missing or foreign, prepare it again"
        )
    return batches

"""Reading record folders, memory-mapped: a row is read by touching its own pages only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

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
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._segmentation_units, self._language_units = self._load_units()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index` as python values: image bytes, targets [{name, rle}], conversations
        [{role, text, kind, options, facts}], labels [str], extra dict, unknown attributes None.

        Raises ValueError, naming folder and record, when a byte of image or masks was altered: the
        checksum costs less than decoding what it guards.
        """
        row = self.unchecked(index)
        check_row(row, str(self.folder))
        return row

    def unchecked(self, index: int) -> dict[str, Any]:
        """Row `index` as it lies on disk, sound or not: for programs that look for damage.

        Raises ValueError when its texts are no texts any more.
        """
        try:
            return unpacked(self._stored_row(index))
        except ValueError as error:
            raise ValueError(
                f"{self.folder}, record {self.id_of(index)!r} is damaged ({error}); copy the "
                "folder again from where it is whole, or prepare it again"
            ) from error

    def id_of(self, index: int) -> str:
        """Id of row `index`, whatever has become of the rest of it."""
        batch, place = self._locate(index)
        stored = batch.column("id")[place].as_buffer()
        return str(stored.to_pybytes().decode("utf-8", errors="replace"))

    def _stored_row(self, index: int) -> dict[str, Any]:
        """Row `index` as it was digested."""
        batch, place = self._locate(index)
        row: dict[str, Any] = batch.slice(place, 1).to_pylist()[0]
        return row

    def _locate(self, index: int) -> tuple[pa.RecordBatch, int]:
        """The batch that holds row `index`, and its place there."""
        number = range(len(self))[index]
        batch = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._batches[batch], number - int(self._starts[batch])

    @property
    def table(self) -> pa.Table:
        """All rows as columns, memory-mapped: only pages of the columns that are used are read."""
        return pa.Table.from_batches(self._batches, schema=_SCHEMA)

    def __reduce__(self) -> tuple[type[Records], tuple[str]]:
        return (Records, (str(self.folder),))

    def __repr__(self) -> str:
        return f"Records({str(self.folder)!r}, num_rows={len(self)})"

    @property
    def segmentation_units(self) -> np.ndarray:
        """[U] int32: numbers of the rows that have at least one target, ascending."""
        return self._segmentation_units

    @property
    def language_units(self) -> np.ndarray:
        """[U, 2] int32: (row number, index of the user turn in its conversations), ascending."""
        return self._language_units

    def question_kinds(self) -> list[str]:
        """[U] kind of each language unit, in their order; image pages stay untouched."""
        chunks = self.table["conversations"].chunks
        return [
            str(kind)
            for chunk in chunks  # one at a time: joining them would copy the texts
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


def _open(folder: Path, manifest: Mapping[str, Any]) -> list[pa.RecordBatch]:
    """Map the files. Raises ValueError when they are not what the manifest describes.

    Read by Arrow itself: `datasets` spends a millisecond and 40 kB on every file, which is too much
    for the thousands of files of millions of images.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [Path(entry["filename"]).name for entry in state["_data_files"]]
        batches = [batch for name in names for batch in _read_file(folder / name)]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"{folder} is damaged ({error}); prepare it again") from error
    num_rows = sum(batch.num_rows for batch in batches)
    if num_rows != manifest["num_rows"]:
        raise ValueError(
            f"{folder} has {num_rows} rows, its {MANIFEST} says {manifest['num_rows']}; "
            "a shard is missing or foreign, prepare it again"
        )
    return batches


def _read_file(path: Path) -> Iterator[pa.RecordBatch]:
    """Memory-mapped batches of an Arrow stream. All share one schema: a file's own copy of it would
    cost as much memory as its arrays."""
    messages = pa.ipc.MessageReader.open_stream(pa.memory_map(str(path)))
    if not pa.ipc.read_schema(messages.read_next_message()).equals(_SCHEMA):
        raise ValueError(f"{path.name} does not have the columns of {FORMAT}")
    for message in messages:
        yield pa.ipc.read_record_batch(message, _SCHEMA)

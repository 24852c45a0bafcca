"""Writing a record folder: by one process, or by many whose parts are joined.

A converter of a release describes it to `data_prep/pipeline/shards.py`, which writes parts in many
processes and joins them; `RecordWriter` is for what is made in one go, as the embedded data are.

    with RecordWriter(folder, source="btcv", split="train", version="1", licence="...") as writer:
        writer.write(Record(id="btcv/1", image=png_bytes, height=512, width=512, ...))

    part = PartWriter(scratch, source="btcv", split="train")   # in each of many processes
    part.write(record)
    part.close()
    assemble([read_part(scratch), ...], folder, source="btcv", split="train", ...)

A folder appears at once, by a rename, when all of it is on disk. `RecordWriter` is the case of a
single part, so that both ways write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter

from biascare.durable import claim_name, flush, flush_tree, put_in_place, write_json
from biascare.records.record import FEATURES, HISTOGRAMS, Record, check_record, row_digest, row_of
from biascare.version import __version__

FORMAT = "biascare-records"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
SEGMENTATION_UNITS = "segmentation_units.npy"
LANGUAGE_UNITS = "language_units.npy"

PART = "part.json"
ROW_DIGESTS = "row_digests.npy"
ID_HASHES = "id_hashes.npy"

ROWS_PER_FILE = 2000
SHARD_BYTES = 256 * 2**20
"""An Arrow file is closed early at this size: it is one Arrow batch, buffered while written. Few,
large batches keep the opening of millions of rows cheap; Arrow's 2 GB limit per column is never
near."""


class Part(NamedTuple):
    """Some consecutive rows of a folder to be, complete on disk."""

    folder: Path
    num_rows: int
    files: list[str]  # Arrow files, in order of rows
    counts: dict[str, dict[str, int]]  # histogram -> value -> number
    notes: dict[str, Any]  # what the writer noted beside the rows


class PartWriter:
    """Writes consecutive rows of a folder to be: Arrow files, one digest per row, histograms.

    A part is complete once it holds part.json, which `close` writes last; nothing else removes or
    renames the folder. Memory: one file of encoded rows (at most `rows_per_file` rows or
    SHARD_BYTES), and id and digest of every row.
    """

    def __init__(
        self, folder: str | Path, *, source: str, split: str, rows_per_file: int = ROWS_PER_FILE
    ) -> None:
        if rows_per_file < 1:
            raise ValueError(f"rows per Arrow file must be at least 1, got {rows_per_file}")
        self.folder = Path(folder)
        self._source, self._split = source, split
        self._rows_per_file = rows_per_file
        self._file: ArrowWriter | None = None
        self._file_rows = self._file_bytes = 0
        self._names: list[str] = []
        self._ids: set[str] = set()
        self._id_hashes: list[int] = []
        self._digests = bytearray()
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in HISTOGRAMS}
        # No `exist_ok`: two writers of one folder would mix their rows.
        self.folder.mkdir(parents=True)

    def __len__(self) -> int:
        return len(self._ids)

    def write(self, record: Record) -> None:
        """Check one record and append it. Raises ValueError naming all its problems."""
        check_record(record, self._source, self._split)
        # Within a part at once, where the item can still be named; across parts see `_check_ids`.
        if record.id in self._ids:
            raise ValueError(f"record {record.id!r}: id written before; ids must be unique")
        # After the check: `encode_mask` alone takes a mask of another size than the image's.
        row = row_of(record)
        self._ids.add(record.id)
        # 64 bits stand for an id: those of millions of records are compared when parts are joined.
        id_hash = hashlib.sha256(record.id.encode("utf-8")).digest()[:8]
        self._id_hashes.append(int.from_bytes(id_hash, "big"))
        self._digests += row_digest(row)
        for name, values in HISTOGRAMS.items():
            self._counts[name].update(values(row))
        self._append(row)

    def close(self, **notes: Any) -> None:
        """Bring everything to disk; the notes (JSON) come back from `read_part`."""
        self._close_file()
        np.save(self.folder / ID_HASHES, np.array(self._id_hashes, dtype=np.uint64))
        digests = np.frombuffer(bytes(self._digests), dtype=np.uint8).reshape(-1, 32)
        np.save(self.folder / ROW_DIGESTS, digests)
        flush_tree(self.folder)
        # Last, and after a flush: a part without it counts as not written, whatever else is there.
        part = {
            "num_rows": len(self),
            "files": self._names,
            "counts": self._counts,
            "notes": notes,
        }
        write_json(self.folder / PART, part)
        flush(self.folder)

    def abandon(self) -> None:
        """Close the open file; the part stays incomplete."""
        if self._file is not None:
            self._file.close()

    def _append(self, row: dict[str, Any]) -> None:
        if self._file is None:
            self._names.append(f"data-{len(self._names):05d}.arrow")
            self._file = ArrowWriter(
                features=FEATURES,
                path=str(self.folder / self._names[-1]),
                # Never reached, so that a file is one batch: `datasets` would cut one of its own
                # otherwise.
                writer_batch_size=self._rows_per_file + 1,
            )
        self._file.write(row)
        self._file_rows += 1
        # Texts are left out: beside an image they are nothing.
        self._file_bytes += len(row["image"]) + sum(len(t["rle"]) for t in row["targets"])
        if self._file_rows >= self._rows_per_file or self._file_bytes >= SHARD_BYTES:
            self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.finalize()
            self._file = None
            self._file_rows = self._file_bytes = 0


def read_part(folder: Path) -> Part:
    """A complete part. Raises FileNotFoundError when there is none, ValueError when damaged."""
    try:
        part = json.loads((folder / PART).read_text(encoding="utf-8"))
        return Part(folder, part["num_rows"], part["files"], part["counts"], part["notes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is damaged ({error}); remove it and start again") from error


def assemble(
    parts: Sequence[Part],
    folder: str | Path,
    *,
    source: str,
    split: str,
    version: str,
    licence: str,
    preparation: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Join parts, in their order, to the record folder that one writer would have written.

    Arrow files are hard-linked where the file system can, so that parts stay whole and cost no
    space twice. The folder appears at once, by a rename. `preparation` is noted in the manifest.

    The content hash is sha256 over the row digests in order; see `row_digest`.

    Raises ValueError when there is no row or an id occurs twice, FileExistsError when the folder
    is there (and `overwrite` is not set), also when another process was faster.
    """
    folder = Path(folder).absolute()
    # An empty folder would open, and training would say much later that it has nothing to draw.
    if not any(part.num_rows for part in parts):
        raise ValueError(f"no record was written to {folder}: nothing to prepare")
    _check_ids(parts)
    new = scratch_folder(folder)
    new.mkdir(parents=True)
    try:
        # Over the digests of rows: how the rows are cut into parts and files leaves no trace in it.
        rows = b"".join(np.load(part.folder / ROW_DIGESTS).tobytes() for part in parts)
        digest = hashlib.sha256(rows).hexdigest()
        files = _link_files(parts, new)
        write_json(new / "state.json", _dataset_state(digest, split, files))
        write_json(new / "dataset_info.json", _DATASET_INFO)
        segmentation, language = stream_units(datasets.load_from_disk(str(new)).data.table)
        np.save(new / SEGMENTATION_UNITS, segmentation)
        np.save(new / LANGUAGE_UNITS, language)
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "tool_version": __version__,
            "source": source,
            "split": split,
            "version": version,
            "licence": licence,
            "content_hash": digest,
            "num_rows": sum(part.num_rows for part in parts),
            "num_segmentation_units": len(segmentation),
            "num_language_units": len(language),
            **_histograms(parts),
        }
        write_json(new / MANIFEST, manifest | ({"preparation": preparation} if preparation else {}))
        flush_tree(new)
        # `claim_name` fails when the name is taken: of two processes that join, one is told.
        if overwrite:
            put_in_place(new, folder, aside=scratch_folder(folder))
        else:
            claim_name(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def scratch_folder(folder: Path) -> Path:
    """A hidden name beside `folder` that no other process uses."""
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.partial")


class RecordWriter:
    """Streams records to a new folder; the folder appears only when everything is written.

    Everything is written to a hidden sibling folder (`.NAME.*.partial`), flushed to disk and then
    renamed. An exception inside the `with` block removes the sibling and leaves an older folder
    untouched; a killed process leaves the sibling, which is safe to delete.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        source: str,
        split: str,
        version: str,
        licence: str,
        rows_per_shard: int = ROWS_PER_FILE,
        overwrite: bool = False,
    ) -> None:
        self.folder = Path(folder).absolute()
        # Before hours of converting, not after; `assemble` looks again, as others may write too.
        if self.folder.exists() and not overwrite:
            raise ValueError(f"{self.folder} exists already; choose another output or overwrite it")
        self._source, self._split = source, split
        self._version, self._licence = version, licence
        self._rows_per_shard, self._overwrite = rows_per_shard, overwrite

    def __enter__(self) -> RecordWriter:
        self._part = PartWriter(
            scratch_folder(self.folder),
            source=self._source,
            split=self._split,
            rows_per_file=self._rows_per_shard,
        )
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc_type is None:
                self._part.close()
                assemble(
                    [read_part(self._part.folder)],
                    self.folder,
                    source=self._source,
                    split=self._split,
                    version=self._version,
                    licence=self._licence,
                    overwrite=self._overwrite,
                )
            else:
                self._part.abandon()
        finally:
            # The folder has its own links to the Arrow files by now: removing the part costs no
            # row.
            shutil.rmtree(self._part.folder, ignore_errors=True)

    def write(self, record: Record) -> None:
        """Check one record and append it. Raises ValueError naming all its problems."""
        self._part.write(record)


def stream_units(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Stream units from list lengths alone: ([U], [U, 2]) int32; image pages stay untouched."""
    assert table.num_rows < 2**31, "units are 32-bit so that millions cost each process little"
    segmentation = np.flatnonzero(_list_lengths(table["targets"]))
    pairs = _list_lengths(table["conversations"]) // 2  # turns alternate, so every second one asks
    rows = np.repeat(np.arange(len(pairs)), pairs)
    first = np.repeat(np.cumsum(pairs) - pairs, pairs)
    turns = 2 * (np.arange(len(rows)) - first)
    return segmentation.astype(np.int32), np.stack([rows, turns], axis=1).astype(np.int32)


def _list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Lengths of a list column -> int64 [rows]."""
    lengths = [np.diff(np.asarray(chunk.offsets)) for chunk in column.chunks]
    return np.concatenate([np.zeros(0, dtype=np.int64), *lengths]).astype(np.int64)


def _dataset_state(digest: str, split: str, files: list[str]) -> dict[str, Any]:
    """state.json of `Dataset.save_to_disk`."""
    return {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": digest[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }


_DATASET_INFO = {
    "citation": "",
    "description": "",
    "features": FEATURES.to_dict(),
    "homepage": "",
    "license": "",
}
"""dataset_info.json of `Dataset.save_to_disk`."""


def _check_ids(parts: Sequence[Part]) -> None:
    """Raises ValueError for ids that occur in two parts; within one, its writer has looked."""
    # Within one part its writer has compared all ids already.
    if len(parts) < 2:
        return
    hashes = np.sort(np.concatenate([np.load(part.folder / ID_HASHES) for part in parts]))
    suspects = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(suspects):
        return
    # Equal hashes are a suspicion only: 64 bits can collide, ids decide.
    seen = Counter(name for part in parts for name in _ids_with(part, suspects))
    repeated = [name for name, count in seen.items() if count > 1]
    if repeated:
        raise ValueError(
            f"{len(repeated)} ids occur more than once, for example {repeated[:3]}; ids must be "
            "unique in a dataset and split: an image is listed twice, or names differ in folders "
            "only"
        )


def _ids_with(part: Part, hashes: np.ndarray) -> list[str]:
    """Ids of the rows of a part whose hash is one of `hashes` [N] uint64."""
    # Only parts with a suspect are opened; the hashes are there to spare the others.
    rows = np.flatnonzero(np.isin(np.load(part.folder / ID_HASHES), hashes))
    if not len(rows):
        return []
    tables = []
    for name in part.files:
        with pa.memory_map(str(part.folder / name)) as file:
            tables.append(pa.ipc.open_stream(file).read_all().select(["id"]))
    return [str(name) for name in pa.concat_tables(tables)["id"].take(pa.array(rows)).to_pylist()]


def _histograms(parts: Sequence[Part]) -> dict[str, Any]:
    """num_targets and every histogram of the manifest, summed over parts, sorted by value."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in HISTOGRAMS}
    for part in parts:
        for name in counts:
            counts[name].update(part.counts[name])
    # Sorted, so that the manifest does not depend on which row or shard came first.
    histograms = {name: dict(sorted(count.items())) for name, count in counts.items()}
    return {"num_targets": counts["targets"].total(), **histograms}


def _link_files(parts: Sequence[Part], folder: Path) -> list[str]:
    """Arrow files of all parts -> names in `folder`."""
    sources = [part.folder / name for part in parts for name in part.files]
    names = [f"data-{k:05d}-of-{len(sources):05d}.arrow" for k in range(len(sources))]
    for source, name in zip(sources, names, strict=True):
        try:
            os.link(source, folder / name)
        # A part that is gone is no reason to copy; another process has joined and removed it.
        except FileNotFoundError:
            raise
        except OSError:  # no hard links here (exFAT, some network mounts)
            shutil.copyfile(source, folder / name)
    return names

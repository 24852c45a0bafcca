"""The on-disk record: schema, writer, memory-mapped reader. The only file that knows the format.

    with RecordWriter(folder, source="btcv", split="train", version="1", licence="...") as writer:
        writer.write(Record(id="btcv/1", image=png_bytes, height=512, width=512, ...))
    records = Records(folder)
    row = records[0]
    mask = decode_mask(row["targets"][0]["rle"], row["height"], row["width"])

One folder holds one dataset and one split: Arrow shards in the layout of
`datasets.Dataset.save_to_disk` (`datasets.load_from_disk(folder)` opens it), `manifest.json`, and
two .npy files that list the units of the training stream. One row is one image; images stay encoded
and masks are COCO RLE at native size, so a row is read by touching its own pages only. The
trade-off: a row cannot be changed in place, a folder is written again as a whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco

from biascare import __version__

FORMAT = "biascare-records"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SEGMENTATION_UNITS = "segmentation_units.npy"
LANGUAGE_UNITS = "language_units.npy"

ROLES = ("user", "assistant")
KINDS = ("closed", "open", "choice", "report")
SEXES = ("F", "M")
MAX_AGE = 130
"""Years. Above it, an age is taken for a mistake (a birth year, a code for unknown)."""

MAX_IMAGE_PIXELS = 89_000_000
"""Just below Pillow's own warning level: what is written can be decoded without a warning."""

SHARD_BYTES = 256 * 2**20
"""A shard is closed early at this size: it is one Arrow batch, buffered while written. Few, large
batches keep the opening of millions of rows cheap; Arrow's 2 GB limit per column is never near."""

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "image": datasets.Value("binary"),
        "height": datasets.Value("int32"),
        "width": datasets.Value("int32"),
        "targets": [{"name": datasets.Value("string"), "rle": datasets.Value("binary")}],
        "conversations": [
            {
                "role": datasets.Value("string"),
                "text": datasets.Value("string"),
                "kind": datasets.Value("string"),
            }
        ],
        "task": datasets.Value("string"),
        "modality": datasets.Value("string"),
        "anatomy": datasets.Value("string"),
        "labels": [datasets.Value("string")],
        "source": datasets.Value("string"),
        "split": datasets.Value("string"),
        "patient_id": datasets.Value("string"),
        "study_id": datasets.Value("string"),
        "sex": datasets.Value("string"),
        "age": datasets.Value("float64"),
        "race": datasets.Value("string"),
        "extra": datasets.Value("string"),
    }
)


class Turn(NamedTuple):
    """One utterance. Both turns of a question/answer pair carry the kind of the pair."""

    role: str  # user | assistant
    text: str
    kind: str  # closed | open | choice | report


@dataclass(frozen=True, kw_only=True)
class Record:
    """One image with everything known about it.

    Fields without a default must be stated: a converter says `sex=None` when the source does not
    know the sex, it cannot forget the question.
    """

    id: str  # unique in its folder, stable between runs
    image: bytes  # encoded PNG or JPEG; pixels are taken as stored, EXIF orientation is not applied
    height: int  # pixels, of the decoded image
    width: int
    targets: list[tuple[str, np.ndarray]] = field(default_factory=list)  # name, bool [H, W]
    conversations: list[Turn] = field(default_factory=list)  # user, assistant, user, assistant, ...
    task: str
    modality: str
    anatomy: str = ""
    labels: list[str] = field(default_factory=list)
    source: str
    split: str
    patient_id: str | None
    study_id: str | None
    sex: str | None  # F | M
    age: float | None  # years
    race: str | None
    extra: dict[str, Any] = field(default_factory=dict)  # anything JSON can hold


def encode_mask(mask: np.ndarray) -> bytes:
    """COCO run-length code of a mask: bool [H, W] -> bytes. Exact; the size is not part of it."""
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ValueError(
            f"a mask must be a bool array [H, W], got {mask.dtype} {list(mask.shape)}; "
            "threshold or compare it first"
        )
    return bytes(coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"])


def decode_mask(rle: bytes, height: int, width: int) -> np.ndarray:
    """Inverse of `encode_mask`: bytes -> uint8 [height, width] in {0, 1}.

    Raises ValueError when the code does not describe a mask of this size.
    """
    wrong = f"mask code of {len(rle)} bytes does not describe {height} x {width} pixels"
    try:
        mask = np.asarray(coco.decode({"size": [height, width], "counts": rle}), dtype=np.uint8)
    except ValueError as error:
        raise ValueError(wrong) from error
    # A code that is too short leaves pycocotools' buffer uninitialised instead of failing.
    if mask.max(initial=0) > 1:
        raise ValueError(wrong)
    return np.ascontiguousarray(mask)


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels from the header of a PNG or JPEG; pixels are not decoded.

    Raises ValueError for anything else and for images above MAX_IMAGE_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged below
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
                width, height = image.size
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(
            f"not a readable PNG or JPEG ({len(data)} bytes, starting with {data[:8]!r})"
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"image refused: {error}") from error
    if height * width > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"image of {height} x {width} pixels refused: more than {MAX_IMAGE_PIXELS} pixels; "
            "cut it into tiles"
        )
    return height, width


class RecordWriter:
    """Streams records to a new folder; the folder appears only when everything is written.

    Shards are written to a hidden sibling folder (`.NAME.PID.partial`), flushed to disk and then
    renamed. An exception inside the `with` block removes the sibling and leaves an older folder
    untouched; a killed process leaves the sibling, which is safe to delete. Memory: one shard of
    encoded rows (at most `rows_per_shard` rows or SHARD_BYTES) and the set of ids.

    The content hash is sha256 over the row digests in writing order; a row digest is sha256 of the
    row as compact JSON with sorted keys, where image and mask bytes are replaced by their own
    sha256. It depends neither on shard size nor on library versions' file encoding.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        source: str,
        split: str,
        version: str,
        licence: str,
        rows_per_shard: int = 2000,
        overwrite: bool = False,
    ) -> None:
        self.folder = Path(folder).absolute()
        if self.folder.exists() and not overwrite:
            raise ValueError(f"{self.folder} exists already; choose another output or overwrite it")
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard must be at least 1, got {rows_per_shard}")
        self._source, self._split = source, split
        self._version, self._licence = version, licence
        self._rows_per_shard = rows_per_shard
        self._partial = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.partial")
        self._shard: ArrowWriter | None = None
        self._shard_rows = self._shard_bytes = self._num_shards = 0
        self._ids: set[str] = set()
        self._hash = hashlib.sha256()
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in _HISTOGRAMS}

    def __enter__(self) -> RecordWriter:
        self._partial.mkdir(parents=True)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc_type is None:
                self._finalise()
            elif self._shard is not None:
                self._shard.close()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def write(self, record: Record) -> None:
        """Validate one record and append it. Raises ValueError naming all its problems."""
        _validate(record, self._source, self._split)
        if record.id in self._ids:
            raise ValueError(f"record {record.id!r}: id written before; ids must be unique")
        row = _row(record)
        self._ids.add(record.id)
        self._hash.update(_digest(row))
        self._count(row)
        self._append(row)

    def _append(self, row: dict[str, Any]) -> None:
        if self._shard is None:
            path = self._partial / f"data-{self._num_shards:05d}.arrow"
            self._shard = ArrowWriter(
                features=FEATURES, path=str(path), writer_batch_size=self._rows_per_shard + 1
            )
            self._num_shards += 1
        self._shard.write(row)
        self._shard_rows += 1
        self._shard_bytes += len(row["image"]) + sum(len(t["rle"]) for t in row["targets"])
        if self._shard_rows >= self._rows_per_shard or self._shard_bytes >= SHARD_BYTES:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.finalize()
            self._shard = None
            self._shard_rows = self._shard_bytes = 0

    def _count(self, row: Mapping[str, Any]) -> None:
        for name, values in _HISTOGRAMS.items():
            self._counts[name].update(values(row))

    def _finalise(self) -> None:
        if not self._ids:
            raise ValueError(f"no record was written to {self.folder}: nothing to prepare")
        self._close_shard()
        digest = self._hash.hexdigest()
        files = self._rename_shards()
        self._write_json("state.json", _dataset_state(digest, self._split, files))
        self._write_json("dataset_info.json", _dataset_info())
        segmentation, language = _units(datasets.load_from_disk(str(self._partial)).data.table)
        np.save(self._partial / SEGMENTATION_UNITS, segmentation)
        np.save(self._partial / LANGUAGE_UNITS, language)
        self._write_json(MANIFEST, self._manifest(digest, len(segmentation), len(language)))
        for path in self._partial.iterdir():
            _fsync(path)
        _fsync(self._partial)
        _replace_folder(self._partial, self.folder)

    def _rename_shards(self) -> list[str]:
        names = []
        for index in range(self._num_shards):
            names.append(f"data-{index:05d}-of-{self._num_shards:05d}.arrow")
            (self._partial / f"data-{index:05d}.arrow").rename(self._partial / names[-1])
        return names

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        (self._partial / name).write_text(text + "\n", encoding="utf-8")

    def _manifest(self, digest: str, num_segmentation: int, num_language: int) -> dict[str, Any]:
        histograms = {name: dict(sorted(c.items())) for name, c in self._counts.items()}
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "tool_version": __version__,
            "source": self._source,
            "split": self._split,
            "version": self._version,
            "licence": self._licence,
            "content_hash": digest,
            "num_rows": len(self._ids),
            "num_segmentation_units": num_segmentation,
            "num_language_units": num_language,
            "num_targets": self._counts["targets"].total(),
            **histograms,
        }


class Records:
    """Read-only, memory-mapped view of one prepared folder; picklable (it is reopened by path)."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self.manifest = _read_manifest(self.folder)
        self._dataset = _open(self.folder, self.manifest)
        self._segmentation_units, self._language_units = self._load_units()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index` as python values: image bytes, targets [{name, rle}], conversations
        [{role, text, kind}], labels [str], extra dict, unknown attributes None."""
        row = dict(self._dataset[int(index)])
        row["extra"] = json.loads(row["extra"])
        return row

    def __reduce__(self) -> tuple[type[Records], tuple[str]]:
        return (Records, (str(self.folder),))

    def __repr__(self) -> str:
        return f"Records({str(self.folder)!r}, num_rows={len(self)})"

    @property
    def segmentation_units(self) -> np.ndarray:
        """[U] int64: numbers of the rows that have at least one target, ascending."""
        return self._segmentation_units

    @property
    def language_units(self) -> np.ndarray:
        """[U, 2] int64: (row number, index of the user turn in its conversations), ascending."""
        return self._language_units

    def question_kinds(self) -> list[str]:
        """[U] kind of each language unit, in their order; image pages stay untouched."""
        kinds = self._dataset.data.table["conversations"].combine_chunks().flatten().field("kind")
        return [str(kind) for kind in kinds[::2].to_pylist()]

    @property
    def target_counts(self) -> dict[str, int]:
        """Number of masks per target name, from the manifest."""
        return dict(self.manifest["targets"])

    def verify(self) -> None:
        """Read every row and compare the content hash. Raises ValueError when a byte changed."""
        digest = hashlib.sha256()
        for row in self._dataset:
            digest.update(_digest(row))
        if digest.hexdigest() != self.manifest["content_hash"]:
            raise ValueError(
                f"{self.folder}: content hash is {digest.hexdigest()}, the manifest says "
                f"{self.manifest['content_hash']}; the folder was changed, prepare it again"
            )

    def _load_units(self) -> tuple[np.ndarray, np.ndarray]:
        paths = [self.folder / SEGMENTATION_UNITS, self.folder / LANGUAGE_UNITS]
        if not all(path.is_file() for path in paths):  # `datasets` copies shards without them
            return _units(self._dataset.data.table)
        segmentation, language = (
            np.load(path, mmap_mode="r", allow_pickle=False) for path in paths
        )
        expected = (self.manifest["num_segmentation_units"], self.manifest["num_language_units"])
        if (len(segmentation), len(language)) != expected:
            raise ValueError(
                f"{self.folder}: unit files disagree with {MANIFEST}; prepare it again"
            )
        return segmentation, language


def _age_decade(age: float | None) -> str:
    return "missing" if age is None else f"{int(age // 10) * 10}s"


_HISTOGRAMS: dict[str, Any] = {
    "targets": lambda row: [target["name"] for target in row["targets"]],
    "labels": lambda row: row["labels"],
    "kinds": lambda row: [t["kind"] for t in row["conversations"] if t["role"] == "user"],
    "task": lambda row: [row["task"]],
    "modality": lambda row: [row["modality"]],
    "sex": lambda row: ["missing" if row["sex"] is None else row["sex"]],
    "race": lambda row: ["missing" if row["race"] is None else row["race"]],
    "age_decade": lambda row: [_age_decade(row["age"])],
}
"""Manifest key -> what a stored row adds to that histogram; unknown attributes count as missing."""


def _row(record: Record) -> dict[str, Any]:
    """A validated record in the shape of FEATURES."""
    row = {name: getattr(record, name) for name in FEATURES}
    row["age"] = None if record.age is None else float(record.age)
    row["targets"] = [{"name": name, "rle": encode_mask(mask)} for name, mask in record.targets]
    row["conversations"] = [turn._asdict() for turn in record.conversations]
    row["extra"] = json.dumps(record.extra, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return row


def _digest(row: Mapping[str, Any]) -> bytes:
    """sha256 of one stored row; see RecordWriter."""
    plain = json.dumps(
        row, sort_keys=True, separators=(",", ":"), default=lambda b: hashlib.sha256(b).hexdigest()
    )
    return hashlib.sha256(plain.encode("utf-8")).digest()


def _validate(record: Record, source: str, split: str) -> None:
    problems = [*_identity_problems(record, source, split), *_attribute_problems(record)]
    problems += _conversation_problems(record.conversations)
    problems += _image_problems(record)
    if problems:
        raise ValueError(f"record {record.id!r}: " + "; ".join(problems))


def _identity_problems(record: Record, source: str, split: str) -> Iterable[str]:
    for name in ("id", "task", "modality"):
        value = getattr(record, name)
        if not isinstance(value, str) or not value.strip():
            yield f"{name} must be a non-empty string, got {value!r}"
    if (record.source, record.split) != (source, split):
        yield (
            f"belongs to {record.source!r}/{record.split!r}, "
            f"but this folder is {source!r}/{split!r}: one folder holds one dataset and one split"
        )


def _attribute_problems(record: Record) -> Iterable[str]:
    if record.sex is not None and record.sex not in SEXES:
        yield f"sex must be one of {SEXES} or None, got {record.sex!r}"
    if record.age is not None and not (math.isfinite(record.age) and 0 <= record.age <= MAX_AGE):
        yield f"age must be between 0 and {MAX_AGE} years or None, got {record.age!r}"
    for name in ("race", "patient_id", "study_id"):
        if getattr(record, name) == "":
            yield f"{name} is an empty string; write None when it is unknown"
    if not all(isinstance(label, str) and label for label in record.labels):
        yield f"labels must be non-empty strings, got {record.labels!r}"


def _conversation_problems(turns: list[Turn]) -> Iterable[str]:
    if len(turns) % 2:
        yield f"{len(turns)} turns: every question of the user needs an answer of the assistant"
    for index, turn in enumerate(turns):
        if turn.role != ROLES[index % 2]:
            yield f"turn {index} has role {turn.role!r}, expected {ROLES[index % 2]!r}"
        if turn.kind not in KINDS:
            yield f"turn {index} has kind {turn.kind!r}, expected one of {KINDS}"
        if not isinstance(turn.text, str) or not turn.text.strip():
            yield f"turn {index} has no text, got {turn.text!r}"
        if index % 2 and turn.kind != turns[index - 1].kind:
            yield f"turn {index} answers a {turns[index - 1].kind!r} question as {turn.kind!r}"


def _image_problems(record: Record) -> Iterable[str]:
    try:
        size = image_size(record.image)
    except ValueError as error:
        yield str(error)
        return
    if size != (record.height, record.width):
        stated = f"{record.height} x {record.width}"
        yield f"height x width is {stated}, the image has {size[0]} x {size[1]}"
    names = Counter(name for name, _ in record.targets)
    yield from (f"target {name!r} occurs {n} times" for name, n in names.items() if n > 1)
    for name, mask in record.targets:
        if not isinstance(name, str) or not name.strip():
            yield f"a target needs a name, got {name!r}"
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != size:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask)
            yield f"mask of {name!r} must be bool {list(size)} like the image, got {got}"
        elif not mask.any():
            yield f"mask of {name!r} is empty; leave the target out and note it in the ledger"


def _units(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Stream units from list lengths alone: ([U], [U, 2]) int64; image pages stay untouched."""
    segmentation = np.flatnonzero(_list_lengths(table["targets"])).astype(np.int64)
    pairs = _list_lengths(table["conversations"]) // 2  # turns alternate, so every second one asks
    rows = np.repeat(np.arange(len(pairs), dtype=np.int64), pairs)
    first = np.repeat(np.cumsum(pairs) - pairs, pairs)
    turns = 2 * (np.arange(len(rows), dtype=np.int64) - first)
    return segmentation, np.stack([rows, turns], axis=1)


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


def _dataset_info() -> dict[str, Any]:
    """dataset_info.json of `Dataset.save_to_disk`."""
    return {
        "citation": "",
        "description": "",
        "features": FEATURES.to_dict(),
        "homepage": "",
        "license": "",
    }


def _read_manifest(folder: Path) -> dict[str, Any]:
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
    if manifest["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {manifest['format_version']}, this program reads "
            f"{FORMAT_VERSION}; prepare it again or install the matching version"
        )
    return manifest


def _open(folder: Path, manifest: Mapping[str, Any]) -> datasets.Dataset:
    """Map the shards. Raises ValueError when they are not what the manifest describes."""
    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"{folder} is damaged ({error}); prepare it again") from error
    if not isinstance(dataset, datasets.Dataset) or dataset.features != FEATURES:
        raise ValueError(f"{folder} does not have the columns of {FORMAT}; prepare it again")
    if len(dataset) != manifest["num_rows"]:
        raise ValueError(
            f"{folder} has {len(dataset)} rows, its {MANIFEST} says {manifest['num_rows']}; "
            "a shard is missing or foreign, prepare it again"
        )
    return dataset


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`. An older folder is moved aside first and removed last."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    _fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)

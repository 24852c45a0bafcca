"""Questions in Hugging Face parquet files: columns image {bytes, path}, question, answer.

Each row carries its own copy of the image, so images are told apart by the sha256 of their bytes.
The key of an image says where its first copy lies: reading it back touches one row group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.pipeline.shards import UnusableItemError
from data_prep.wording.conversations import Asked, asked

COLUMNS = ("image", "question", "answer")


class ImagePlace(NamedTuple):
    """First copy of an image in the files of a release."""

    file: str
    row_group: int
    row: int  # in its group
    sha256: str  # of the encoded bytes


def split_files(source: Path, split: str) -> list[Path]:
    """The files of a split, in `source` or in its folder data: train-00000-of-00003-xxxx.parquet.

    Raises ValueError when there are none.
    """
    for folder in (source, source / "data"):
        files = sorted(folder.glob(f"{split}-*.parquet")) or sorted(folder.glob(f"{split}.parquet"))
        if files:
            return files
    raise ValueError(
        f"no {split}-*.parquet in {source} nor in its folder data; --source is the folder of the "
        "downloaded dataset, see --help for its layout"
    )


def read_questions(files: list[Path], places: dict[str, ImagePlace]) -> Iterator[Asked]:
    """Rows of one split. `places` learns where each image lies, by the sha256 of its bytes."""
    for file in files:
        table = _open(file)
        for group in range(table.num_row_groups):
            rows = table.read_row_group(group, columns=list(COLUMNS)).to_pylist()
            for index, row in enumerate(rows):
                name = f"{file.name}:{group}:{index}"
                data = (row["image"] or {}).get("bytes")
                if not data:
                    yield Asked("", name, None, "no image", {})
                    continue
                # The path beside the bytes is no name: in these copies images have lost theirs.
                digest = hashlib.sha256(data).hexdigest()
                # The place of the first copy, not the bytes: a release of images would not fit into
                # memory.
                places.setdefault(digest, ImagePlace(str(file), group, index, digest))
                yield asked(digest, name, str(row["question"] or ""), str(row["answer"] or ""))


def image_bytes(place: ImagePlace) -> bytes:
    """Encoded bytes of an image. Raises UnusableItemError when the file has changed since."""
    data = bytes(_images(place.file, place.row_group)[place.row].as_py())
    # A row number means nothing in another version of the file.
    if hashlib.sha256(data).hexdigest() != place.sha256:
        raise UnusableItemError("the parquet file changed while it was read")
    return data


@lru_cache(maxsize=2)  # neighbouring items lie in one group
def _images(file: str, row_group: int) -> pa.Array:
    column = pq.ParquetFile(file).read_row_group(row_group, columns=["image"]).column("image")
    return pa.concat_arrays(column.chunks).field("bytes")


def _open(file: Path) -> pq.ParquetFile:
    try:
        table = pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file} is not a readable parquet file: {error}") from error
    missing = [name for name in COLUMNS if name not in table.schema_arrow.names]
    if missing:
        raise ValueError(f"{file} lacks the columns {missing}; it has {table.schema_arrow.names}")
    return table

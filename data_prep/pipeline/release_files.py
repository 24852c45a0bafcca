"""Files of a raw release, read with suspicion: tables, images, counts.

    for row in read_table(find_table(source, "mimic-cxr-2.0.0-split.csv"), ("dicom_id", "split")):
        ...
    image = read_image(file_inside(source, row["path"]))

What is wrong with a whole file is a ValueError for the user; what is wrong with one image is an
UnusableItemError, which ends in the ledger.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError
from rich.console import Console

from biascare.choices import did_you_mean
from biascare.records import MAX_IMAGE_PIXELS
from data_prep.pipeline.shards import UnusableItemError

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")
"""What is looked for in an image file. PNG and JPEG keep their bytes, the rest becomes PNG."""

REENCODED_MODES = {"P": "RGB", "PA": "RGBA", "1": "L", "CMYK": "RGB", "YCbCr": "RGB", "LAB": "RGB"}
"""Pillow mode -> mode of the PNG, for pixels whose values are not brightness. Palette colours and
single bits are kept exactly."""

PNG_MODES = ("L", "LA", "RGB", "RGBA", "I;16")

KEPT_FORMATS = ("PNG", "JPEG", "MPO")
"""MPO is what Pillow calls a JPEG with a preview behind the image itself."""

MAX_FIELD = 2**24
"""Characters of one CSV field; captions and questions are far below it."""


class EncodedImage(NamedTuple):
    """An image as records hold it."""

    data: bytes  # PNG or JPEG
    height: int
    width: int


def note(text: str) -> None:
    """Tell the user something that is worth knowing and no error."""
    Console().print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)


def note_count(what: str, found: int, expected: int) -> None:
    """Say so when a source is not the whole release. A part of a release is legal."""
    if found != expected:
        note(f"expected {expected:,} {what}, found {found:,}")


def note_repeated(what: str, num_repeated: int, *, kept: bool = False) -> None:
    """Say how many repeated questions were left out, or kept as official rows."""
    if num_repeated:
        done = "kept, they are rows of the release" if kept else "left out"
        note(f"{what}: {num_repeated:,} repeated questions {done}")


def find_file(folder: Path, *names: str) -> Path:
    """The first of `names` that exists in `folder`. Raises ValueError with what is there."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; --source is the folder of the raw release")
    present = sorted(path.name for path in folder.iterdir())
    # Releases are often renamed when they are unpacked; what is there tells how.
    hint = did_you_mean(names[0], present) or f"; it holds {present[:8]}"
    raise ValueError(f"{folder} has no {' or '.join(names)}{hint} See --help for the layout")


def find_table(folder: Path, name: str) -> Path:
    """A CSV file of this name, plain or as NAME.gz."""
    return find_file(folder, name, f"{name}.gz")


def read_table(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of a file of comma or tab separated values (or its .gz), in UTF-8 with or without a mark
    at its start. Raises ValueError as `read_numbered`."""
    for _, row in read_numbered(path, columns):
        yield row


def read_numbered(
    path: Path, columns: Sequence[str], mend: Callable[[list[str], list[str]], str] | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a table as `read_table` takes it; the line, from 1, is where the row begins.
    `mend`: (missing columns, header) -> what to tell the user, if not the nearest name.

    Raises ValueError when one of `columns` is missing, when a row is longer than the header, and
    for anything that is not UTF-8 text.
    """
    # Python stops at 131,072 characters of its own accord.
    csv.field_size_limit(MAX_FIELD)
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            # By the header and not by the name: Dataverse writes .tab, others no ending at all.
            header_line = file.readline()
            file.seek(0)
            tabs = header_line.count("\t") > header_line.count(",")
            reader = csv.DictReader(file, delimiter="\t" if tabs else ",")
            header = list(reader.fieldnames or [])
            missing = [name for name in columns if name not in header]
            if missing:
                hint = mend(missing, header) if mend else did_you_mean(missing[0], header)
                raise ValueError(f"{path} lacks the columns {missing}; it has {header}{hint}")
            for row in reader:
                # An unquoted comma does this, and it shifts every later column of the row.
                if None in row:
                    raise ValueError(
                        f"{path}:{reader.line_num}: more fields than the header has columns; "
                        "is a text with commas not quoted?"
                    )
                values = {name: value or "" for name, value in row.items()}
                # The reader stands at the row's last line; who looks for it in an editor needs its
                # first.
                inner_lines = sum(value.count("\n") for value in values.values())
                yield reader.line_num - inner_lines, values
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as CSV in UTF-8") from error
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; name the table") from error
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise ValueError(f"{path} is not a readable CSV table: {error}") from error


def number_of(text: str, where: str) -> float:
    """A number of a table. Raises ValueError that names the place."""
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{where}: expected a number, got {text!r}") from error


def read_json(path: Path, kind: type) -> Any:
    """A JSON file whose top level is a `kind` (list or dict). Raises ValueError otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} must hold a JSON {kind.__name__}, got {type(value).__name__}")
    return value


def file_inside(folder: Path, relative: str) -> Path:
    """An existing file below `folder`. Raises UnusableItemError for others."""
    # As it is written: ".." of a stranger's table must not lead to files of the user's own. A link
    # is no such thing, the user's own source contains it; data often lie on another disk.
    path = Path(os.path.normpath(relative))
    if not relative or path.is_absolute() or ".." in path.parts:
        raise UnusableItemError("path leaves the source" if relative else "entry without a path")
    file = folder / path
    # Of regular files only: reading a device or a pipe may never end.
    if file.is_file() and os.access(file, os.R_OK):
        return file
    link = next((folder / part for part in [*reversed(path.parents), path]
                 if part.name and (folder / part).is_symlink()), None)  # fmt: skip
    if link is not None:
        raise UnusableItemError(f"the link {link} leads to no file that can be read")
    raise UnusableItemError("file may not be read" if file.is_file() else "file missing")


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, in order of name, also behind links; names that begin with a dot
    are passed over (macOS puts ._a.png beside a.png). Raises ValueError for a folder that is none,
    and for a link that leads nowhere: what it held would be missing without a word."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    return sorted(_files_below(folder, ()))


def _files_below(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    here = folder.resolve()
    # A link to a folder above itself: what it shows is listed already, and again without end; or,
    # above the source, it is what lies beside the source and is not part of it.
    if above and any(top == here or here in top.parents for top in above):
        return
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() and not entry.exists():
            raise ValueError(
                f"the link {entry} leads nowhere ({os.readlink(entry)}); mount its disk, mend the "
                "link or remove it"
            )
        if entry.is_dir():
            yield from _files_below(entry, (*above, here))
        elif entry.is_file():
            yield entry


def read_image(source: Path | bytes) -> EncodedImage:
    """An image file or its bytes, as records hold it.

    A PNG or JPEG keeps its bytes; palette PNG and the other FORMATS are re-encoded as PNG without
    loss (a file of several frames has no single image and is refused).

    Raises UnusableItemError with the reason.
    """
    data = source if isinstance(source, bytes) else source.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # size is judged below; damaged EXIF is not our concern
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                # By the header, before a pixel is decoded: a bomb is small on disk only.
                if width * height > MAX_IMAGE_PIXELS:
                    raise UnusableItemError("image has too many pixels")
                # Palette PNGs are rewritten: their indices are no brightness.
                kept = image.format in KEPT_FORMATS and image.mode != "P"
                if not kept and getattr(image, "n_frames", 1) > 1:
                    raise UnusableItemError("image has several frames")
                # Also where the bytes are kept: a truncated file is found here and not in a run.
                image.load()
                return EncodedImage(data if kept else png_bytes(image), height, width)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UnusableItemError("image unreadable") from error
    except Image.DecompressionBombError as error:
        raise UnusableItemError("image has too many pixels") from error


def png_bytes(image: Image.Image) -> bytes:
    """The PNG of an image, without loss. Raises UnusableItemError where PNG cannot hold it."""
    mode = REENCODED_MODES.get(image.mode, image.mode)
    if mode not in PNG_MODES:
        raise UnusableItemError(f"image of mode {image.mode} has no lossless PNG")
    if image.mode == "P" and "transparency" in image.info:
        # Or the transparent pixels would show the colour that happens to lie below them.
        mode = "RGBA"
    buffer = io.BytesIO()
    (image if mode == image.mode else image.convert(mode)).save(buffer, format="PNG")
    return buffer.getvalue()

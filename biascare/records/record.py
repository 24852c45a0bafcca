"""One record: its fields, what makes it valid, its masks, and the row it becomes on disk.

    record = Record(id="btcv/1", image=png_bytes, height=512, width=512, targets=[...], ...)
    check_record(record, source="btcv", split="train")  # ValueError with all problems at once
    row = row_of(record)
    mask = decode_mask(row["targets"][0]["rle"], row["height"], row["width"])

Images stay encoded and masks are COCO run-length codes at native size. Everything here looks at one
record; `records.py` joins rows to folders.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import datasets
import numpy as np
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco

ROLES = ("user", "assistant")
KINDS = ("closed", "open", "choice", "report")
SEXES = ("F", "M")
MAX_AGE = 130
"""Years. Above it, an age is taken for a mistake (a birth year, a code for unknown)."""

MAX_IMAGE_PIXELS = 89_000_000
"""Just below Pillow's own warning level: what is written can be decoded without a warning."""

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


def decode_mask(rle: bytes, height: int, width: int, *, by_rows: bool = True) -> np.ndarray:
    """Inverse of `encode_mask`: bytes -> uint8 [height, width] in {0, 1}.

    The code runs along columns, and so does the memory of the result without `by_rows`, which
    saves the turn where only a part of the mask is looked at.

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
    if not by_rows:
        return mask
    # Pillow transposes in blocks, twice as fast as numpy on large masks.
    return np.array(Image.fromarray(mask.T).transpose(Image.Transpose.TRANSPOSE))


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


def _age_decade(age: float | None) -> str:
    return "missing" if age is None else f"{int(age // 10) * 10}s"


HISTOGRAMS: dict[str, Any] = {
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


def row_of(record: Record) -> dict[str, Any]:
    """A validated record in the shape of FEATURES."""
    row = {name: getattr(record, name) for name in FEATURES}
    row["age"] = None if record.age is None else float(record.age)
    row["targets"] = [{"name": name, "rle": encode_mask(mask)} for name, mask in record.targets]
    row["conversations"] = [turn._asdict() for turn in record.conversations]
    row["extra"] = json.dumps(record.extra, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return row


def row_digest(row: Mapping[str, Any]) -> bytes:
    """sha256 of one stored row: of its compact JSON with sorted keys, where image and mask bytes
    are replaced by their own sha256. Depends neither on the shard size nor on Arrow's encoding."""
    plain = json.dumps(
        row, sort_keys=True, separators=(",", ":"), default=lambda b: hashlib.sha256(b).hexdigest()
    )
    return hashlib.sha256(plain.encode("utf-8")).digest()


def check_record(record: Record, source: str, split: str) -> None:
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

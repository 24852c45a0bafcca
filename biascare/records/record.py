"""One record: its fields, what makes it valid, its masks, and the row it becomes on disk.

    record = Record(id="btcv/1", image=png_bytes, height=512, width=512, targets=[...], ...)
    check_record(record, source="btcv", split="train")  # ValueError with all problems at once
    row = row_of(record)
    read = unpacked(row)        # with options and facts of the turns, and extra, as python values
    check_row(read, where="prepared/btcv/train")  # ValueError when a byte of it was altered

Images stay encoded and masks are COCO run-length codes at native size (`masks.py`). Everything here
looks at one record; `writer.py` and `reader.py` join rows to folders.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import datasets
import numpy as np
from PIL import Image, UnidentifiedImageError

from biascare.choices import unknown
from biascare.records.masks import encode_mask
from biascare.records.vocabulary import FACTS

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
                "options": [datasets.Value("string")],
                # JSON text, not a struct: a struct's keys are columns, and a new fact would be a
                # new format.
                "facts": datasets.Value("string"),
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
        # Not int32: releases state months and days of children as fractions of a year.
        "age": datasets.Value("float64"),
        "race": datasets.Value("string"),
        "extra": datasets.Value("string"),
        "checksum": datasets.Value("string"),
    }
)
"""`facts` and `extra` are JSON."""

MAX_OPTIONS = 26
"""One letter each."""


class Turn(NamedTuple):
    """One utterance. Both turns of a question/answer pair carry the kind of the pair; what else a
    question is made of stands on the user's turn alone.

    The text is the bare question, and the answer to a choice is one of its options, word for word:
    how options are lettered is decided where a prompt is written (`data/chat.py`), not here.
    """

    role: str  # user | assistant
    text: str
    kind: str  # closed | open | choice | report
    options: tuple[str, ...] = ()  # of a choice, in the order they are asked
    facts: Mapping[str, str] = {}  # what the source says of the question; keys of `FACTS`


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


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels from the header of a PNG or JPEG; pixels are not decoded.

    Raises ValueError for anything else and for images above MAX_IMAGE_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged below
            # Two formats only: Pillow's other decoders are many, and a record's bytes may be a
            # stranger's.
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


HISTOGRAMS: dict[str, Any] = {
    "targets": lambda row: [target["name"] for target in row["targets"]],
    "labels": lambda row: row["labels"],
    "kinds": lambda row: [t["kind"] for t in row["conversations"] if t["role"] == "user"],
    "task": lambda row: [row["task"]],
    "modality": lambda row: [row["modality"]],
    "sex": lambda row: ["missing" if row["sex"] is None else row["sex"]],
    "race": lambda row: ["missing" if row["race"] is None else row["race"]],
    "age_decade": lambda row: [
        "missing" if row["age"] is None else f"{int(row['age'] // 10) * 10}s"
    ],
}
"""Manifest key -> what a stored row adds to that histogram; unknown attributes count as missing."""


def row_of(record: Record) -> dict[str, Any]:
    """A validated record in the shape of FEATURES."""
    row = {name: getattr(record, name) for name in FEATURES if name != "checksum"}
    # A converter may hold an int. Its digest would differ from that of the row read back, 61 not
    # 61.0.
    row["age"] = None if record.age is None else float(record.age)
    row["targets"] = [{"name": name, "rle": encode_mask(mask)} for name, mask in record.targets]
    row["conversations"] = [
        turn._asdict() | {"options": list(turn.options), "facts": _json(turn.facts)}
        for turn in record.conversations
    ]
    row["extra"] = _json(record.extra)
    row["checksum"] = checksum_of(row)
    return row


def unpacked(row: Mapping[str, Any]) -> dict[str, Any]:
    """A stored row as python values: what was JSON is parsed, and `Turn(**turn)` is a turn."""
    turns = [
        turn | {"options": tuple(turn["options"]), "facts": json.loads(turn["facts"])}
        for turn in row["conversations"]
    ]
    return dict(row) | {"conversations": turns, "extra": json.loads(row["extra"])}


def _json(value: Mapping[str, Any]) -> str:
    # Sorted, so that equal facts are equal bytes; NaN is no JSON, and other readers refuse it.
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def checksum_of(row: Mapping[str, Any]) -> str:
    """sha256, in hex, of the bytes no other check looks into: the image, and name and code of every
    target."""
    digest = hashlib.sha256()
    codes = [data for t in row["targets"] for data in (t["name"].encode("utf-8"), t["rle"])]
    for data in (row["image"], *codes):
        # Without its length, a byte could move from a code to the name after it and change nothing.
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()


def check_row(row: Mapping[str, Any], where: str) -> None:
    """Raises ValueError when image or masks of a row are not those its writer saw."""
    found = checksum_of(row)
    if found != row["checksum"]:
        raise ValueError(
            f"{where}, record {row['id']!r}: its image or masks were altered after they were "
            f"written (checksum {found[:12]}, stored {str(row['checksum'])[:12]}); copy the folder "
            "again from where it is whole, or prepare it again"
        )


def row_digest(row: Mapping[str, Any]) -> bytes:
    """sha256 of one stored row: of its compact JSON with sorted keys, where image and mask bytes
    are replaced by their own sha256. Depends neither on the shard size nor on Arrow's encoding."""
    plain = json.dumps(
        row, sort_keys=True, separators=(",", ":"), default=lambda b: hashlib.sha256(b).hexdigest()
    )
    return hashlib.sha256(plain.encode("utf-8")).digest()


def check_record(record: Record, source: str, split: str) -> None:
    """Raises ValueError naming all problems of a record; `source` and `split` are its folder's."""
    problems = [*_identity_problems(record, source, split), *_attribute_problems(record)]
    problems += _conversation_problems(record.conversations)
    # Last, because it alone opens the image; all are collected, or a converter is mended one by
    # one.
    problems += _image_problems(record)
    if problems:
        raise ValueError(f"record {record.id!r}: " + "; ".join(problems))


def _identity_problems(record: Record, source: str, split: str) -> Iterable[str]:
    for name in ("id", "task", "modality"):
        value = getattr(record, name)
        if not isinstance(value, str) or not value.strip():
            yield f"{name} must be a non-empty string, got {value!r}"
    # A test record in a training folder is a leak that no later check of folders would see.
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
    # An empty patient id would make one patient of all people whose id is not known.
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
            yield unknown(f"kind of turn {index}", turn.kind, KINDS)
        if not isinstance(turn.text, str) or not turn.text.strip():
            yield f"turn {index} has no text, got {turn.text!r}"
        # The kind decides how an answer is scored, and readers look for it on either turn.
        if index % 2 and turn.kind != turns[index - 1].kind:
            yield f"turn {index} answers a {turns[index - 1].kind!r} question as {turn.kind!r}"
    yield from question_problems(turns)


def question_problems(turns: Sequence[Turn]) -> Iterable[str]:
    """What is wrong with options and facts of alternating turns."""
    for index, turn in enumerate(turns):
        for key, value in turn.facts.items():
            if key not in FACTS:
                yield unknown(f"fact of turn {index}", key, FACTS)
            if not isinstance(value, str) or not value.strip():
                yield f"fact {key!r} of turn {index} must be a text, got {value!r}; or leave it out"
        # On both turns they could contradict each other, and readers look at the question's alone.
        if index % 2 and (turn.facts or turn.options):
            yield f"turn {index} is an answer; facts and options belong to the question before it"
    for index in range(0, len(turns) - 1, 2):
        yield from _option_problems(index, turns[index], turns[index + 1].text)


def _option_problems(index: int, question: Turn, answer: str) -> Iterable[str]:
    options = question.options
    if question.kind != "choice":
        if options:
            yield f"turn {index} has options, but its kind is {question.kind!r}, not 'choice'"
        return
    if not 2 <= len(options) <= MAX_OPTIONS:
        yield f"turn {index} is a choice of {len(options)}; it needs 2 to {MAX_OPTIONS} options"
    for option in options:
        # Options become lines of a prompt: a line break inside one would read as two of them.
        if not isinstance(option, str) or option != " ".join(option.split()) or not option:
            yield f"option {option!r} of turn {index} must be one line without outer spaces"
    # Two equal options would leave open which letter is right.
    if options.count(answer) != 1:
        yield (
            f"answer {answer!r} of turn {index + 1} is not exactly one of the options "
            f"{list(options)}; the answer to a choice repeats the option, without a letter"
        )


def _image_problems(record: Record) -> Iterable[str]:
    try:
        # Of the bytes themselves: a size from a table may be that of another version of the image.
        size = image_size(record.image)
    except ValueError as error:
        yield str(error)
        return
    if size != (record.height, record.width):
        stated = f"{record.height} x {record.width}"
        yield f"height x width is {stated}, the image has {size[0]} x {size[1]}"
    # A reader asks for a target by its name, and a second mask of that name would never be found.
    names = Counter(name for name, _ in record.targets)
    yield from (f"target {name!r} occurs {n} times" for name, n in names.items() if n > 1)
    for name, mask in record.targets:
        if not isinstance(name, str) or not name.strip():
            yield f"a target needs a name, got {name!r}"
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != size:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask)
            yield f"mask of {name!r} must be bool {list(size)} like the image, got {got}"
        # It would be scored as a miss whatever the model does, and no point can be drawn in it.
        elif not mask.any():
            yield f"mask of {name!r} is empty; leave the target out and note it in the ledger"

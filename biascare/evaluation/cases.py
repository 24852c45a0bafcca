"""Finished cases: what a model made of one target or one question, written once and read by all.

    with CaseWriter("outputs/evaluation/cases.jsonl", header) as writer:
        writer.append([MaskCase(...), AnswerCase(...)])
    cases = read_cases("outputs/evaluation/cases.jsonl")
    cases.header, cases.masks, cases.answers, cases.labels

The first line is the header, every other line one case. Metrics, calibration, audit and pictures
read cases and never a model; so a case keeps masks at native size and log-probabilities instead of
scores. Format 2; format 1, which had fewer fields, is read too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from biascare.durable import flush
from biascare.interfaces import Facts

CASES = "cases.jsonl"
"""Name of the file in the output folder of an evaluation."""

FORMAT = "biascare-cases"
FORMAT_VERSION = 2
READABLE = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is true of all cases of a file."""

    model: str  # folder or file of the weights
    weights: str  # what identifies them: a hash, or commit and step of a run that still trains
    commit: str  # of the code
    data: list[dict[str, Any]]  # source, split, content hash and task of each record folder
    settings: dict[str, Any]  # of the evaluation: prompt, corrections, limit, ...
    beta_vl: float  # of Eq. 6
    prevalence: dict[str, str]  # target -> head, medium or tail in training
    disc_share: float | None  # size of the disc baseline, as a share of the image
    disc_share_by_target: dict[str, float]
    benchmark: str | None = None  # of `evaluation/benchmarks.py`; None for record folders as such
    format: str = FORMAT
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, kw_only=True)
class MaskPrediction:
    """One mask and what it was asked by, in native pixels."""

    points: list[tuple[float, float, int]]  # x, y, label 1 or 0, in the order they were given
    box: tuple[float, float, float, float] | None  # XYXY
    mask: str  # COCO run-length code at native size
    predicted_dice: float
    uncertainty: dict[str, float]  # label-free, by name


@dataclass(frozen=True, kw_only=True)
class SlicePlace:
    """Where a slice lies in its volume."""

    volume: str  # all slices of one volume share it
    number: int  # from 0
    num_slices: int
    spacing: tuple[float, float, float]  # mm: between slices, rows, columns
    # (slice, row, column, 1) of the stored pixels -> mm in RAS+, 4 x 4; None where not recorded
    affine: list[list[float]] | None = None


@dataclass(frozen=True, kw_only=True)
class MaskCase:
    """A target and the masks that a model gave it."""

    id: str  # record and target
    facts: Facts
    height: int  # pixels, native
    width: int
    instruction: str | None  # None where nothing reads text
    truth: str  # COCO run-length code
    by_text: MaskPrediction | None  # without any click or box
    predictions: list[MaskPrediction]  # by the first prompt, then after each correction
    place: SlicePlace | None = None  # None where the image is no slice
    seconds: float  # of the batch, per case


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The same question asked otherwise: without its image, or with other words."""

    prompt: str  # as the model read it
    text: str  # generated
    option_log_probs: list[float] | None  # None without options


@dataclass(frozen=True, kw_only=True)
class AnswerCase:
    """A question and what a model answered."""

    id: str  # record and number of the turn
    facts: Facts
    question: str
    question_facts: dict[str, str]  # answer type, question type, organ, ... as the source states
    prompt: str  # the question as the model read it, options lettered
    options: list[str]
    option_log_probs: list[float] | None  # of the full vocabulary; None without options
    text: str  # generated
    token_log_probs: list[float]  # of the generated tokens, untempered
    reference: str
    labels: list[str] = field(default_factory=list)  # findings of the record
    variants: dict[str, Variant] = field(default_factory=dict)  # by what was changed
    seconds: float


@dataclass(frozen=True, kw_only=True)
class LabelCase:
    """An image and the probability of each label."""

    id: str  # record
    facts: Facts
    labels: list[str]
    probabilities: list[float]  # in [0, 1], one per label
    present: list[bool | None]  # likewise; None where nobody judged
    exclusive: bool  # exactly one is present, and the probabilities add up to 1
    seconds: float


FinishedCase = MaskCase | AnswerCase | LabelCase
KINDS: dict[str, type[FinishedCase]] = {"mask": MaskCase, "answer": AnswerCase, "label": LabelCase}
"""Value of "case" in a line -> what the line holds."""

_READERS: dict[str, TypeAdapter[Any]] = {name: TypeAdapter(kind) for name, kind in KINDS.items()}
_HEADER: TypeAdapter[Header] = TypeAdapter(Header)


class Cases(NamedTuple):
    """A file of cases."""

    header: Header
    masks: list[MaskCase]
    answers: list[AnswerCase]
    labels: list[LabelCase]


def case_line(case: FinishedCase) -> str:
    """One line of JSON."""
    name = next(name for name, kind in KINDS.items() if isinstance(case, kind))
    values = dataclasses.asdict(case) | {"facts": case.facts._asdict()}
    return json.dumps({"case": name} | values, ensure_ascii=False)


def read_cases(path: str | Path) -> Cases:
    """A finished file.

    Raises ValueError where it is of another format or version, or a line is damaged.
    """
    header, cases = read_lines(Path(path), finished=True)
    return Cases(
        header=header,
        masks=[case for case in cases if isinstance(case, MaskCase)],
        answers=[case for case in cases if isinstance(case, AnswerCase)],
        labels=[case for case in cases if isinstance(case, LabelCase)],
    )


def read_lines(path: Path, *, finished: bool) -> tuple[Header, list[FinishedCase]]:
    """Header and cases. Of an unfinished file a last line that was cut short is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    # Without its end a line may be anything: a kill can cut it inside a number that still parses.
    last = lines.pop()
    if last and finished:
        raise ValueError(f"{path} ends inside a line; evaluate again to finish it")
    if not lines:
        raise ValueError(f"{path} holds no header; evaluate again with --overwrite")
    header = _read_header(path, lines[0])
    cases: list[FinishedCase] = []
    for number, line in enumerate(lines[1:], 2):
        try:
            found = json.loads(line)
            cases.append(_READERS[found.pop("case")].validate_python(found))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            # With its number: one line of thousands was edited or damaged, and a person can look.
            raise ValueError(f"{path}, line {number}: not a case ({error})") from error
    return header, cases


def _read_header(path: Path, line: str) -> Header:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}: its first line is no header ({error})") from error
    kind = found.get("format") if isinstance(found, dict) else None
    if kind != FORMAT or found["format_version"] not in READABLE:
        version = found.get("format_version") if kind == FORMAT else None
        raise ValueError(
            f"{path}: got format {kind!r} version {version!r}, expected {FORMAT!r} version "
            f"{FORMAT_VERSION}; evaluate again with this program"
        )
    try:
        # Types are checked here and nowhere later: a metric trusts what it reads.
        return _HEADER.validate_python(found)
    except ValidationError as error:
        raise ValueError(f"{path}: its header is damaged ({error})") from error


class CaseWriter:
    """Appends cases to a file; what `append` returned from survives a crash of the machine."""

    def __init__(self, path: Path, header: Header):
        """Goes on where a file is, under the header it has; a line that was cut short goes."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            with path.open("rb+") as file:
                # What follows the last line end was cut short; appended to, it would spoil a whole
                # line.
                file.truncate(file.read().rfind(b"\n") + 1)
        fresh = not path.exists() or not path.stat().st_size
        self._file = path.open("a", encoding="utf-8")
        if fresh:
            self._write([json.dumps(dataclasses.asdict(header), ensure_ascii=False)])

    def append(self, cases: Sequence[FinishedCase]) -> None:
        self._write([case_line(case) for case in cases])

    def _write(self, lines: Iterable[str]) -> None:
        self._file.write("".join(f"{line}\n" for line in lines))
        self._file.flush()
        # Minutes of a large model's work stand behind a few kilobytes: they must survive the
        # machine, not only the process.
        flush(self.path)

    def __enter__(self) -> CaseWriter:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

"""The log of a reader study: one line of JSON for every answer, appended and never changed.

    append_answer("reader_a.jsonl", ReaderAnswer(reader="A", round="without", case="img_7", ...))
    log = read_logs(["reader_a.jsonl", "reader_b.jsonl"], categories, case_ids)
    log.answers, log.num_replaced

A reader who changes an answer appends another one: the last counts, and how many were replaced is
counted. Every word is checked when it is read: a mistyped category would count as a wrong answer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from biascare.choices import unknown
from biascare.durable import flush

Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1)]

WITHOUT, WITH = "without", "with"
ROUNDS = (WITHOUT, WITH)
"""Without and with what the model suggests, in the order in which they are read."""


@dataclass(frozen=True, kw_only=True)
class ReaderAnswer:
    """What one reader said of one case in one round."""

    # A mistyped key would drop a confidence in silence.
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    reader: Name
    round: Literal["without", "with"]  # the model's suggestion
    case: Name  # id of the case
    choices: list[str]  # ticked categories; none is an answer too, where several may be ticked
    confidence: Share | None = None  # that the choices are right; None where not asked
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # until the answer
    suggestion: list[str] | None = None  # what was shown; None where nothing was
    suggestion_confidence: Share | None = None


class ReaderLog(NamedTuple):
    """The answers of some files, one for each reader, round and case."""

    answers: list[ReaderAnswer]  # in order of reader, round and case as they first appear
    num_replaced: int  # answers that a later one of the same reader, round and case replaced
    num_cut: int  # last lines without their end: a crash cut them short


_READER: TypeAdapter[ReaderAnswer] = TypeAdapter(ReaderAnswer)


def append_answer(path: str | Path, answer: ReaderAnswer) -> None:
    """Add one line; when this returns, the disk has it."""
    path = Path(path)
    line = json.dumps(dataclasses.asdict(answer), ensure_ascii=False, allow_nan=False) + "\n"
    if path.exists():
        with path.open("rb+") as file:
            # What follows the last line end was cut short by a crash, before its reader was told
            # that it is kept; appended to, it would spoil a whole line.
            file.truncate(file.read().rfind(b"\n") + 1)
    with path.open("a", encoding="utf-8") as file:
        file.write(line)
    flush(path)


def read_logs(
    paths: Sequence[str | Path],
    categories: Sequence[str],
    cases: Collection[str],
    *,
    one_choice: bool = False,
) -> ReaderLog:
    """All answers of the files.

    `cases` are the ids that may be answered; `one_choice`: exactly one category is ticked. Raises
    ValueError with file and line for a damaged line, an unknown category or case, and for a
    suggestion in the round without the model.
    """
    found: dict[tuple[str, str, str], ReaderAnswer] = {}
    num_lines = num_cut = 0
    for path in map(Path, paths):
        # Bytes: a last line that was cut short may end inside a character.
        lines = path.read_bytes().split(b"\n")
        last = lines.pop()
        num_cut += bool(last)
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            answer = _parse(line, where)
            _check(answer, where, categories, cases, one_choice)
            found[answer.reader, answer.round, answer.case] = answer
            num_lines += 1
    if not found:
        names = ", ".join(map(str, paths))
        raise ValueError(f"{names}: no answer in these logs; name the files that the study wrote")
    return ReaderLog(list(found.values()), num_lines - len(found), num_cut)


def _parse(line: bytes, where: str) -> ReaderAnswer:
    try:
        # From the text: strictly, "3" is then no number of seconds, and a list is a list.
        return _READER.validate_json(line)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, one['loc'])) or 'line'}: {one['msg']}, got {one['input']!r}"
            for one in error.errors()
        )
        raise ValueError(
            f"{where}: not an answer ({problems}); see docs/reader_study.md for the keys"
        ) from error


def _check(
    answer: ReaderAnswer,
    where: str,
    categories: Sequence[str],
    cases: Collection[str],
    one_choice: bool,
) -> None:
    if answer.case not in cases:
        # Not all ids of the study: there may be thousands.
        hint = unknown("case", answer.case, cases).partition("; ")[2]
        raise ValueError(
            f"{where}: case {answer.case!r} is not among the {len(cases):,} of --cases"
            + (f"; {hint}" if hint else "; name the file of cases that the readers were shown")
        )
    named: dict[str, list[str]] = {
        "choices": answer.choices,
        "suggestion": answer.suggestion or [],
    }
    for key, words in named.items():
        for word in words:
            if word not in categories:
                raise ValueError(f"{where}: {unknown(key, word, categories)}")
        if len(set(words)) < len(words):
            raise ValueError(f"{where}: {key}: got {words}, expected each category once")
    problem: Any = None
    if one_choice and len(answer.choices) != 1:
        problem = f"choices: got {answer.choices}, expected exactly one category of these cases"
    if answer.round == WITHOUT and answer.suggestion is not None:
        # What a reader saw cannot be unseen: the round would not be without the model.
        problem = (
            f"suggestion: got {answer.suggestion} in round {WITHOUT!r}, expected null; an answer "
            f"given with it belongs to round {WITH!r}"
        )
    if problem:
        raise ValueError(f"{where}: {problem}")

"""Tables about images: who is in them, and what is asked about them.

rows = read_rows(Path("qa.csv"), {"question": "q"})
told = Metadata.from_arguments(args).of_images({"p1/a": "p1/a.png"}, splits)
told["p1/a"].get("sex")                               # "female", as the table spells it
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from biascare.choices import did_you_mean, unknown
from biascare.records import KINDS
from biascare.records.vocabulary import FACTS
from data_prep.pipeline.attributes import UNKNOWN
from data_prep.pipeline.options import Splits, stem_of
from data_prep.pipeline.release_files import note, read_numbered
from data_prep.wording.conversations import (
    Question,
    choice_of,
    facts_of,
    one_line,
    question_of,
)

REQUIRED = ("image", "question", "answer")
USUAL_NAMES = {
    "image": (
        "img", "file", "path", "filename", "file_name", "filepath", "file_path", "image_path",
        "image_name", "img_name", "img_path", "image_file", "figure_path", "image_id",
    ),
    "question": ("q", "query", "prompt", "question_text"),
    "answer": ("a", "ans", "response", "label", "answer_text"),
}  # fmt: skip
"""What tables call our columns, in lower case; suggested, never taken without being asked."""

ATTRIBUTES = ("patient_id", "study_id", "sex", "age", "race", "modality", "anatomy")
METADATA = ("patient_id", "study_id", "sex", "age", "race", "anatomy")
"""Of ATTRIBUTES, what a table says of images whose modality the user states."""

OPTIONS = "ABCDEFGHIJ"
FACT_COLUMNS = tuple(key for key in FACTS if key not in ATTRIBUTES)
COLUMNS = (*REQUIRED, "kind", "split", *ATTRIBUTES, *OPTIONS, *FACT_COLUMNS)


class Row(NamedTuple):
    """One row of the table."""

    line: int  # where it begins, from 1
    cells: dict[str, str]  # of every one of COLUMNS, as text
    others: dict[str, str]  # columns that are none of ours, where they are asked for


class Told(NamedTuple):
    """What a table says of one image."""

    questions: tuple[Question, ...] = ()
    facts: tuple[dict[str, str], ...] = ()  # parallel to questions
    attributes: tuple[tuple[str, str], ...] = ()  # of METADATA, those that are known
    kept: tuple[tuple[str, str], ...] = ()  # theirs, of --keep-column
    noted: tuple[str, ...] = ()  # what cannot be used of its rows

    def get(self, name: str) -> str | None:
        return dict(self.attributes).get(name)

    @property
    def extra(self) -> dict[str, Any]:
        """For a record's extra."""
        return {"metadata": dict(self.kept)} if self.kept else {}


class Metadata(NamedTuple):
    """A table about images that are listed by another means; without a path it says nothing."""

    path: Path | None
    rows: tuple[Row, ...]
    kept: tuple[str, ...]

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Metadata:
        """Raises ValueError for options without a table, and as `read_rows`."""
        if args.metadata is None:
            if args.column or args.keep_column:
                raise ValueError("--column and --keep-column name columns of --metadata FILE")
            return cls(None, (), ())
        columns = columns_of(args.column)
        kept = tuple(dict.fromkeys(args.keep_column))
        rows = tuple(read_rows(args.metadata, columns, ("image",), kept=kept))
        # A column "gender" or "patient" would go unread, and its groups from every audit.
        unread = {name for row in rows for name in row.others} - set(kept)
        unread |= {name for name in ("split", "modality") if any(r.cells[name] for r in rows)}
        if unread:
            note(
                f"{args.metadata}: columns not read: {', '.join(sorted(unread))}; --column "
                "sex=gender says what a column is, --keep-column NAME keeps it in the records"
            )
        return cls(args.metadata, rows, kept)

    def of_images(self, files: Mapping[str, str], splits: Splits) -> dict[str, Told]:
        """What is known of each image, its patient at least where --patient-regex finds one.
        `files`: name in records -> path. An image may be called by either in the table, with or
        without folders and suffix.

        Raises ValueError when no row matches, for a bare name that several images have, and where
        the patient is stated in two ways.
        """
        groups = self._match(files)
        told = {}
        for name, file in files.items():
            rows = groups.get(name, [])
            asked = [row for row in rows if row.cells["question"] or row.cells["answer"]]
            questions, problems = questions_in(asked)
            noted = [f"line {line}: {problem}" for line, problem in problems]
            known: dict[str, str] = {}
            for attribute in METADATA:
                try:
                    known.update(attributes_in(rows, [attribute]))
                except ValueError as error:
                    # A patient decides the split; of two ages neither is known.
                    if attribute == "patient_id":
                        raise ValueError(f"{self.path}: {name}: {error}") from error
                    noted.append(f"rows of this image disagree on {attribute}")
            known |= _patient(known.get("patient_id"), file, splits)
            kept = {
                column: text
                for column in self.kept
                if (text := "; ".join(dict.fromkeys(row.others[column] for row in rows)))
            }
            told[name] = Told(
                tuple(questions),
                tuple(questions.values()),
                tuple(known.items()),
                tuple(kept.items()),
                tuple(noted),
            )
        return told

    def _match(self, files: Mapping[str, str]) -> dict[str, list[Row]]:
        """Name in records -> its rows. Tells of rows and images that have no partner."""
        exact = {stem_of(file): name for name, file in files.items()} | {
            name: name for name in files
        }
        bare: dict[str, set[str]] = {}
        for key, name in exact.items():
            bare.setdefault(Path(key).name, set()).add(name)
        groups: dict[str, list[Row]] = {}
        unmatched = []
        for row in self.rows:
            key = stem_of(row.cells["image"])
            names = {exact[key]} if key in exact else bare.get(key, set())
            if len(names) > 1:
                raise ValueError(
                    f"{self.path}: line {row.line}: {row.cells['image']!r} may be any of "
                    f"{sorted(names)[:3]}; give paths with folders there"
                )
            if names:
                groups.setdefault(next(iter(names)), []).append(row)
            else:
                unmatched.append(row.cells["image"])
        if self.path and files and not groups:
            raise ValueError(
                f"none of the {len(self.rows)} rows of {self.path} names an image: it has "
                f"{unmatched[:3]}, the images are {list(files)[:3]}; --column image=NAME says "
                "which column names them"
            )
        if unmatched:
            note(
                f"{self.path}: {len(unmatched)} of {len(self.rows)} rows name no image: "
                f"{', '.join(map(repr, unmatched[:3]))}{', ...' * (len(unmatched) > 3)}"
            )
        if self.path and len(groups) < len(files):
            without = [name for name in files if name not in groups]
            note(
                f"{self.path}: {len(without)} of {len(files)} images have no row: "
                f"{', '.join(map(repr, without[:3]))}{', ...' * (len(without) > 3)}"
            )
        return groups


def add_metadata_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """--metadata and how its columns are called. `what` it tells."""
    group = parser.add_argument_group("a table about the images")
    group.add_argument(
        "--metadata",
        type=Path,
        metavar="FILE",
        help=f".csv, .tsv (or .gz) or .jsonl with a column image, and {what}",
    )
    group.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=YOURS",
        help="what a column is called in your table; may be repeated",
    )
    # By name only: a table of a hospital holds more than a record should.
    group.add_argument(
        "--keep-column",
        action="append",
        default=[],
        metavar="YOURS",
        help="kept in the records' extra; may be repeated; default: no other column",
    )


def read_rows(
    path: Path,
    columns: Mapping[str, str],
    needed: Sequence[str] = REQUIRED,
    *,
    kept: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Rows of the table under our column names. `columns`: ours -> theirs; `needed` are ours and
    must be there, `kept` theirs, and with them every other column is given.

    Raises ValueError with the line for what is not such a table.
    """
    required = [columns.get(name, name) for name in dict.fromkeys((*needed, *columns))]
    required += kept or ()
    is_jsonl = path.suffix.lower() in (".jsonl", ".ndjson")
    mend = partial(_column_hint, (*columns.values(), *(kept or ())))
    rows = (_read_jsonl if is_jsonl else read_numbered)(path, required, mend)
    for line, row in rows:
        cells = {name: row.get(columns.get(name, name), "").strip() for name in COLUMNS}
        ours = {columns.get(name, name) for name in COLUMNS}
        others = set() if kept is None else row.keys() - ours | set(kept)
        yield Row(line, cells, {name: row[name].strip() for name in row if name in others})


def question_in(row: dict[str, str]) -> Question:
    """The question of a row. Raises ValueError when it is incomplete or contradicts itself."""
    options = [row[letter] for letter in OPTIONS if row[letter]]
    kind = row["kind"].lower() or ("choice" if options else None)
    if kind is not None and kind not in KINDS:
        raise ValueError(unknown("kind", row["kind"], KINDS))
    if kind == "choice":
        return _choice(row, options)
    if kind == "report":
        if not (row["question"] and row["answer"]):
            raise ValueError("question or answer is empty")
        return Question(text=one_line(row["question"]), answer=row["answer"], kind=kind)
    return question_of(row["question"], row["answer"], kind)


def questions_in(rows: list[Row]) -> tuple[dict[Question, dict[str, str]], list[tuple[int, str]]]:
    """Distinct questions of one image with their facts, and (line, what is wrong) of the others."""
    questions: dict[Question, dict[str, str]] = {}
    problems = []
    for row in rows:
        try:
            question = question_in(row.cells)
        except ValueError as error:
            problems.append((row.line, str(error)))
        else:
            facts = facts_of(**{key: row.cells[key] for key in FACT_COLUMNS})
            questions.setdefault(question, facts)
    return questions, problems


def attributes_in(rows: list[Row], names: Iterable[str] = ATTRIBUTES) -> Iterator[tuple[str, str]]:
    """(name, text) of what is known. Raises ValueError where rows of one image disagree."""
    for name in names:
        texts = (row.cells[name] for row in rows)
        values = {text for text in texts if text.lower() not in UNKNOWN}
        # Of two ages one is wrong, and a record can hold one.
        if len(values) > 1:
            raise ValueError(f"rows of this image disagree on {name}: {sorted(values)[:3]}")
        if values:
            yield name, values.pop()


def columns_of(items: list[str]) -> dict[str, str]:
    """["question=q", ...] -> {"question": "q"}. Raises ValueError for other names."""
    columns = {}
    for item in items:
        ours, separator, theirs = item.partition("=")
        # A misspelt name of ours would leave its column unread, patients first of all.
        if not (separator and theirs) or ours not in COLUMNS:
            raise ValueError(
                f"--column takes NAME=YOURS with NAME one of {', '.join(COLUMNS)}; got {item!r}"
            )
        columns[ours] = theirs
    return columns


def _patient(stated: str | None, file: str, splits: Splits) -> dict[str, str]:
    """The patient of the table, or of --patient-regex. Raises ValueError when they differ."""
    if stated is None:
        found = splits.patient_in(file)
        return {} if found is None else {"patient_id": found}
    match = splits.pattern.search(file) if splits.pattern else None
    # Whichever is wrong, the splits drawn by it would divide a patient.
    if match and match[1] and match[1] != stated:
        raise ValueError(
            f"{file}: the table says patient {stated!r}, --patient-regex finds {match[1]!r}; leave "
            "out the one that is wrong"
        )
    return {"patient_id": stated}


def _choice(row: dict[str, str], options: list[str]) -> Question:
    """The answer is the letter of an option or its text, and must mean exactly one."""
    if not row["question"] or len(options) < 2:
        raise ValueError("a choice needs a question and at least two options")
    texts = [one_line(option) for option in options]
    answer = one_line(row["answer"])
    given = [letter for letter in OPTIONS if row[letter]]
    # With a gap, the letter of an answer would mean another option than the reader's.
    if "".join(given) != OPTIONS[: len(given)]:
        raise ValueError(f"options {given} leave out a letter")
    # The text first: "A" may itself be an option, as in blood groups.
    matches = {k for k, text in enumerate(texts) if text == answer}
    if not matches and answer.rstrip(".:)").upper() in given:
        matches = {given.index(answer.rstrip(".:)").upper())}
    if len(matches) != 1:
        raise ValueError(f"answer {answer!r} is not exactly one of the options")
    return choice_of(one_line(row["question"]), texts, matches.pop())


def _read_jsonl(
    path: Path, required: Iterable[str], mend: Callable[[list[str], list[str]], str]
) -> Iterator[tuple[int, dict[str, str]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not JSON: {error}") from error
            missing = [name for name in required if name not in row]
            if missing:
                told = f"{path}:{number} lacks {missing}; it has {list(row)}"
                raise ValueError(told + mend(missing, list(row)))
            # JSON knows true and false, and a closed question is answered by yes or no.
            words = {None: "", True: "yes", False: "no"}
            yield (
                number,
                {
                    key: words[value] if value is None or isinstance(value, bool) else str(value)
                    for key, value in row.items()
                },
            )


def _column_hint(theirs: Sequence[str], missing: list[str], header: list[str]) -> str:
    """The options that would name the missing columns, as far as their usual names tell."""
    stated = [name for name in missing if name in theirs]
    if stated:  # the user has said so, and mistyped it
        return did_you_mean(stated[0], header)
    options = []
    for ours in missing:
        usual = (ours, *USUAL_NAMES.get(ours, ()))
        found = next((name for name in header if name.strip().lower() in usual), "NAME")
        options.append(f"--column {ours}={found}")
    some = " with one of these" if any(option.endswith("=NAME") for option in options) else ""
    return f". Say which they are: {' '.join(options)}{some}"

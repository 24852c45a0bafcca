"""A table of image, question, answer -> record folders.

    python data_prep/table.py --table qa.csv --images img --name my_vqa --modality xray \\
        --column question=q --column answer=a --output prepared

The table is CSV, TSV (both may be .gz) or JSONL, one question per row, with the columns

    image, question, answer                        always; image is a path below --images
    kind                                           closed, open, choice or report
    A, B, C, D, ...                                options; the answer is a letter or a text
    split, patient_id, study_id, sex, age, race, modality, anatomy
    qid, answer_type, question_type, phrase_type, ...     facts of the question, kept with it; see
                                                          FACTS in biascare/records/vocabulary.py

`--column NAME=YOURS` says what a column is called in your table. Without `kind`, rows with options
are choices, a plain yes or no is closed, everything else is open. Rows of one image become one
record; they must agree on patient, sex and the other attributes. Empty attributes stay unknown.
`--images` may also be a zip or tar file, which is read without extracting it.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from biascare.records import Record
from biascare.records.vocabulary import canonical_modality
from data_prep.formats.archives import open_member
from data_prep.formats.deep_grey import add_window_argument, in_window, window_of
from data_prep.formats.slices import Range
from data_prep.pipeline import shards
from data_prep.pipeline.attributes import person_of, race_of
from data_prep.pipeline.metadata import (
    Row,
    attributes_in,
    columns_of,
    questions_in,
    read_rows,
)
from data_prep.pipeline.options import (
    PATIENT_REGEX,
    Splits,
    add_source_arguments,
    add_split_arguments,
    note_shares,
    note_unknown_patients,
    releases_of,
    split_name,
    stem_of,
)
from data_prep.pipeline.program import run_program
from data_prep.pipeline.release_files import (
    EncodedImage,
    file_inside,
    note_repeated,
    read_image,
)
from data_prep.pipeline.shards import Incomplete, Release, UnusableItemError
from data_prep.wording.conversations import Question, turns_of

MAX_LINES = 5
"""Lines that the ledger names of one image."""


class Item(NamedTuple):
    """One image with all its questions, or a row that is none."""

    image: str
    questions: tuple[Question, ...]
    facts: tuple[dict[str, str], ...]  # parallel to questions
    attributes: tuple[tuple[str, str], ...]  # of ATTRIBUTES, those that are known
    problem: str  # why it cannot be used; empty
    lines: tuple[int, ...]  # of the table, from 1


class Source(NamedTuple):
    """What all items share. Picklable."""

    name: str
    images: Path
    modality: str
    anatomy: str
    window: Range | None  # of grey images with more than 8 bits


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", required=True, type=Path, help=".csv, .tsv (or .gz), .jsonl")
    parser.add_argument("--images", required=True, type=Path, help="folder, or a zip or tar file")
    parser.add_argument(
        "--column", action="append", default=[], metavar="NAME=YOURS", help="may be repeated"
    )
    add_source_arguments(parser)
    add_window_argument(parser)
    add_split_arguments(parser)
    shards.add_arguments(parser)
    args = parser.parse_args(arguments)
    rows = read_rows(args.table, columns_of(args.column))
    items = gather_rows(args.name, rows, Splits.from_arguments(args))
    named = [item for _, group in sorted(items.items()) for item in group if not item.problem]
    shown = window_of(args.window, [partial(_read, args.images, item.image) for item in named])
    source = Source(args.name, args.images, args.modality, args.anatomy, shown)
    shards.run(args, releases(source, items, args.version, args.licence))


def releases(
    source: Source, items: dict[str, list[Item]], version: str, licence: str
) -> list[Release]:
    """One release per split, in order of name."""
    return releases_of(
        sorted(items.items()),
        source=source.name,
        version=version,
        licence=licence,
        convert=partial(convert, source),
        name_of=name_of,
    )


def gather_rows(source: str, rows: Iterable[Row], splits: Splits) -> dict[str, list[Item]]:
    """Rows -> {split: one item per image, in order of first appearance}. A row that is no question
    is an item of its own, so that the ledger counts it."""
    images: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cells = row.cells
        # The table's own word first: a path may carry the number of a study.
        cells["patient_id"] = cells["patient_id"] or splits.patient_in(cells["image"]) or ""
        images.setdefault((_split_of(row, splits), cells["image"]), []).append(row)
    splits.check_lists(stem_of(image) for _, image in images)
    # Of the images whose split is drawn: those with a split of their own are the user's word.
    drawn = {key: rows[0].cells for key, rows in images.items() if not rows[0].cells["split"]}
    num_unknown = sum(not cells["patient_id"] for cells in drawn.values())
    mend = f"{PATIENT_REGEX}, and so does a column patient_id (--column patient_id=YOURS)"
    note_unknown_patients(source, splits, num_unknown, len(drawn), "images", mend)
    note_shares(source, splits.shares, Counter(split for split, _ in drawn), "images")
    found: dict[str, list[Item]] = {}
    num_repeated = 0
    for (split, image), group in images.items():
        questions, problems = questions_in(group)
        num_repeated += len(group) - len(questions) - len(problems)
        items = found.setdefault(split, [])
        # One bad row costs itself and not its image: the other questions are sound.
        items += [Item(image, (), (), (), problem, (line,)) for line, problem in problems]
        if questions:
            items.append(_item(image, questions, group))
    note_repeated("table", num_repeated)
    return found


def convert(source: Source, split: str, item: Item) -> Incomplete:
    """One image with its questions. Raises UnusableItemError with the reason."""
    if item.problem:
        raise UnusableItemError(item.problem)
    known = dict(item.attributes)
    image = in_window(_read(source.images, item.image), source.window)
    # An attribute that cannot be read costs itself, and not its image.
    person = person_of(known.get("sex", ""), known.get("age", ""))
    try:
        modality = canonical_modality(known.get("modality", source.modality))
    except ValueError as error:
        raise UnusableItemError(str(error)) from error
    record = Record(
        id=f"{source.name}/{item.image}",
        image=image.data,
        height=image.height,
        width=image.width,
        conversations=turns_of(item.questions, item.facts),
        task="report" if {q.kind for q in item.questions} == {"report"} else "vqa",
        modality=modality,
        anatomy=known.get("anatomy", source.anatomy),
        source=source.name,
        split=split,
        patient_id=known.get("patient_id"),
        study_id=known.get("study_id"),
        sex=person.sex,
        age=person.age,
        race=race_of(known.get("race", "")),
    )
    return Incomplete(record, noted=person.noted)


def _read(images: Path, name: str) -> EncodedImage:
    packed = images.is_file()
    return read_image(open_member(images, name) if packed else file_inside(images, name))


def name_of(item: Item) -> str:
    """The image and where it stands in the table: "a.png (line 3)"."""
    several = "s" if len(item.lines) > 1 else ""
    lines = ", ".join(map(str, item.lines[:MAX_LINES])) + ", ..." * (len(item.lines) > MAX_LINES)
    return f"{item.image or '(row without an image)'} (line{several} {lines})"


def _item(image: str, questions: dict[Question, dict[str, str]], rows: list[Row]) -> Item:
    lines = tuple(row.line for row in rows)
    if not image:
        return Item(image, (), (), (), "row without an image", lines)
    try:
        known = tuple(attributes_in(rows))
        return Item(image, tuple(questions), tuple(questions.values()), known, "", lines)
    except ValueError as error:
        return Item(image, (), (), (), str(error), lines)


def _split_of(row: Row, splits: Splits) -> str:
    if row.cells["split"]:
        return split_name(row.cells["split"])
    image = row.cells["image"]
    split = splits.of(stem_of(image), row.cells["patient_id"] or None)
    # No split is guessed: drawn instead, a test image could land in train.
    if split is None:
        raise ValueError(f"line {row.line}: image {image!r} is in no --split-list")
    return split


if __name__ == "__main__":
    run_program(main)

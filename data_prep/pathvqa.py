"""PathVQA -> record folders of pathology images with their questions.

    python data_prep/pathvqa.py --source path-vqa --output prepared

Layout of --source (the Hugging Face form; the folder `data` may be left out):

    data/train-00000-of-00007-*.parquet        image {bytes, path}, question, answer
    data/validation-00000-of-00003-*.parquet
    data/test-00000-of-00003-*.parquet

The official splits are kept row for row, validation under the name val: the release took repeated
questions out before it lowered their case, so that some of its rows read the same, and a score on
fewer rows would be the score of another benchmark. What repeats is told, and so is what train
shares with val or test. A question is closed when its answer is yes or no. Licence: MIT for the
release; the images come from textbooks and the PEIR library.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

from biascare.records import Record
from data_prep.formats.parquet import ImagePlace, image_bytes, read_questions, split_files
from data_prep.pipeline import shards
from data_prep.pipeline.program import run_program
from data_prep.pipeline.release_files import note, note_count, note_repeated, read_image
from data_prep.pipeline.shards import Release, UnusableItemError
from data_prep.wording.conversations import (
    Gathered,
    ImageQuestions,
    Question,
    Refused,
    gather,
    questions_of,
    turns_of,
)

SPLITS = {"test": "test", "val": "validation", "train": "train"}
"""Split of the records -> prefix of its files. Held-out ones first: what train repeats of them is
told."""

NUM_QUESTIONS = {"train": 19_654, "val": 6_259, "test": 6_719}
"""Rows of the whole release."""

LICENCE = "PathVQA: MIT; check the terms of the textbooks and of PEIR for the images"


class Item(NamedTuple):
    """An image of the parquet files with its questions."""

    place: ImagePlace
    questions: tuple[Question, ...]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, type=Path, help="the downloaded dataset")
    shards.add_arguments(parser)
    args = parser.parse_args(arguments)
    shards.run(args, plan(args.source))


def plan(source: Path) -> list[Release]:
    """One release per official split; reads all rows once, because images have no names."""
    places: dict[str, ImagePlace] = {}
    held_out: set[tuple[str, Question]] = set()
    releases = []
    for split, prefix in SPLITS.items():
        rows = read_questions(split_files(source, prefix), places)
        gathered = gather(rows, keep_repeated=True)
        note_repeated(f"PathVQA {split}", gathered.num_repeated, kept=True)
        note_count(f"PathVQA {split} questions", gathered.num_questions, NUM_QUESTIONS[split])
        asked = questions_of(gathered)
        if shared := len(asked & held_out):
            note(f"PathVQA {split}: {shared:,} questions stand in a held-out split before it too")
        held_out |= asked
        releases.append(
            Release(
                source="pathvqa",
                split=split,
                version="PathVQA, Hugging Face form",
                licence=LICENCE,
                items=items_of(gathered, places),
                convert=partial(convert, split),
                name_of=item_name,
            )
        )
    # Train first again, as the other converters have it.
    return releases[::-1]


def items_of(gathered: Gathered, places: dict[str, ImagePlace]) -> list[Item | Refused]:
    """Gathered questions with the place of their image instead of its hash."""
    # In each item, so that no worker needs the table of all images.
    return [
        Item(places[item.image], item.questions) if isinstance(item, ImageQuestions) else item
        for item in gathered.items
    ]


def item_name(item: Item | Refused) -> str:
    return item.name if isinstance(item, Refused) else item.place.sha256[:16]


def convert(split: str, item: Item | Refused) -> Record:
    """One image with its questions. Raises UnusableItemError with the reason."""
    if isinstance(item, Refused):
        raise UnusableItemError(item.reason)
    image = read_image(image_bytes(item.place))
    return Record(
        id=f"pathvqa/{item_name(item)}",
        image=image.data,
        height=image.height,
        width=image.width,
        conversations=turns_of(item.questions),
        task="vqa",
        modality="pathology",
        source="pathvqa",
        split=split,
        # Figures of books: nothing says which are of one patient.
        patient_id=None,
        study_id=None,
        sex=None,
        age=None,
        race=None,
    )


if __name__ == "__main__":
    run_program(main)

"""ISIC 2018 task 3 -> record folders of dermoscopic images with their diagnosis.

    python data_prep/isic2018.py --source ISIC2018 --output prepared

Layout of --source:

    ISIC2018_Task3_{Training,Validation,Test}_GroundTruth/ISIC2018_Task3_*_GroundTruth.csv
                                     image, MEL, NV, BCC, AKIEC, BKL, DF, VASC (one of them 1)
    ISIC2018_Task3_{Training,Validation,Test}_Input/ISIC_*.jpg
    ISIC2018_Task3_Training_LesionGroupings.csv   (optional) image, lesion_id

The challenge's split is kept. A row with no diagnosis, or with several, goes to the ledger. The
training images are those of HAM10000: with the lesion groupings both carry the same lesion ids as
study ids, so that a leak between them is seen. Licence: CC BY-NC 4.0.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from biascare.records import Record
from data_prep.pipeline import shards
from data_prep.pipeline.program import run_program
from data_prep.pipeline.release_files import (
    file_inside,
    find_table,
    note,
    note_count,
    read_image,
    read_table,
)
from data_prep.pipeline.shards import Release, UnusableItemError
from data_prep.wording.conversations import DIAGNOSES, DIAGNOSIS_QUESTIONS, choice_turns, draw_for

SPLITS = {"train": "Training", "val": "Validation", "test": "Test"}
NUM_IMAGES = {"train": 10_015, "val": 193, "test": 1_512}
CODES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
GROUPINGS = "ISIC2018_Task3_Training_LesionGroupings.csv"
VALUES = {"1": True, "1.0": True, "0": False, "0.0": False}
LICENCE = "ISIC 2018 task 3: CC BY-NC 4.0 (HAM10000 dataset)"


class Item(NamedTuple):
    """One row of a ground truth table."""

    image: str
    codes: tuple[str, ...]  # lower case; exactly one in a sound row
    lesion: str | None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, type=Path, help="folder of the six folders")
    shards.add_arguments(parser)
    args = parser.parse_args(arguments)
    shards.run(args, plan(args.source))


def plan(source: Path) -> list[Release]:
    """One release per split of the challenge."""
    lesions = read_lesions(source)
    if not lesions:
        note(f"no {GROUPINGS}: lesions of the training images are unknown")
    releases = []
    for split, word in SPLITS.items():
        name = f"ISIC2018_Task3_{word}"
        table = find_table(source / f"{name}_GroundTruth", f"{name}_GroundTruth.csv")
        items = list(read_items(table, lesions))
        note_count(f"ISIC 2018 {split} images", len(items), NUM_IMAGES[split])
        releases.append(
            Release(
                source="isic2018",
                split=split,
                version="ISIC 2018 task 3",
                licence=LICENCE,
                items=items,
                convert=partial(convert, source / f"{name}_Input", split),
                name_of=attrgetter("image"),
            )
        )
    return releases


def read_lesions(source: Path) -> dict[str, str]:
    """image -> lesion of the training set; empty when the table is not there."""
    for folder in (source, source / "ISIC2018_Task3_Training_GroundTruth"):
        if (folder / GROUPINGS).is_file():
            rows = read_table(folder / GROUPINGS, ("image", "lesion_id"))
            return {row["image"]: row["lesion_id"] for row in rows}
    return {}


def read_items(table: Path, lesions: dict[str, str]) -> Iterator[Item]:
    """Rows of one table. Raises ValueError for a value that is neither 0 nor 1."""
    for row in read_table(table, ("image", *CODES)):
        strange = {code: row[code] for code in CODES if row[code] not in VALUES}
        # Not one image's fault: values between, such as probabilities, mean that this is another
        # table.
        if strange:
            raise ValueError(f"{table}: {row['image']}: expected 0 or 1, got {strange}")
        hot = tuple(code.lower() for code in CODES if VALUES[row[code]])
        yield Item(row["image"], hot, lesions.get(row["image"]) or None)


def convert(folder: Path, split: str, item: Item) -> Record:
    """One image with its diagnosis. Raises UnusableItemError with the reason."""
    if len(item.codes) != 1:
        raise UnusableItemError("several diagnoses" if item.codes else "no diagnosis")
    image = read_image(file_inside(folder, f"{item.image}.jpg"))
    name = f"isic2018/{item.image}"
    draw = draw_for(name)
    diagnosis = DIAGNOSES[item.codes[0]]
    wording = draw.choice(DIAGNOSIS_QUESTIONS)
    return Record(
        id=name,
        image=image.data,
        height=image.height,
        width=image.width,
        conversations=choice_turns(wording, DIAGNOSES.values(), diagnosis, draw),
        task="classification",
        modality="dermoscopy",
        anatomy="skin",
        labels=[diagnosis],
        source="isic2018",
        split=split,
        patient_id=None,
        # HAM10000's own spelling: the training images are the same, and a leak is seen by equal
        # ids.
        study_id=f"ham10000/{item.lesion}" if item.lesion else None,
        sex=None,
        age=None,
        race=None,
    )


if __name__ == "__main__":
    run_program(main)

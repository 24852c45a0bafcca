"""HAM10000 -> record folders of dermoscopic images with diagnosis, site, age and sex.

    python data_prep/ham10000.py --source HAM10000 --output prepared

Layout of --source:

    HAM10000_metadata.csv            lesion_id, image_id, dx, dx_type, age, sex, localization
                                     (Dataverse: HAM10000_metadata.tab, or without ending)
    HAM10000_images_part_{1,2}/*.jpg, or HAM10000_images_part_{1,2}.zip left as they are

There is no official split: all images of a lesion go to the split that the hash of lesion_id
draws, at --test-share and --val-share. The lesion is the record's study id. Questions: diagnosis
(lettered options), malignant or not, body site where known. Licence: CC BY-NC 4.0. The images are
the training images of ISIC 2018 task 3: do not train on one and test on the other.
"""

from __future__ import annotations

import argparse
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from biascare.records import Record, Turn
from data_prep.formats.zip_images import ImageFinder, Place, read_place
from data_prep.pipeline import shards
from data_prep.pipeline.attributes import person_of
from data_prep.pipeline.options import add_share_arguments, note_shares
from data_prep.pipeline.program import run_program
from data_prep.pipeline.release_files import (
    find_file,
    note_count,
    read_image,
    read_table,
)
from data_prep.pipeline.shards import Incomplete, Release, UnusableItemError
from data_prep.wording.conversations import (
    DIAGNOSES,
    DIAGNOSIS_QUESTIONS,
    LOCALIZATION_QUESTIONS,
    MALIGNANCY_QUESTIONS,
    MALIGNANT,
    choice_turns,
    draw_for,
    drawn_split,
    pair,
)

METADATA = ("HAM10000_metadata.csv", "HAM10000_metadata.tab", "HAM10000_metadata")
COLUMNS = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization")
NUM_IMAGES = 10_015
FOLDERS = ("HAM10000_images_part_1", "HAM10000_images_part_2", "images", "")
ARCHIVES = "HAM10000_images*.zip"
TEST_SHARE, VAL_SHARE = 0.15, 0.05
LICENCE = "HAM10000: CC BY-NC 4.0"


class Item(NamedTuple):
    """One row of the metadata."""

    image: str
    place: Place | None
    lesion: str
    dx: str
    dx_type: str
    age: str  # as written, like sex
    sex: str
    site: str  # empty when unknown


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, type=Path, help="the downloaded release")
    add_share_arguments(parser, test=TEST_SHARE, val=VAL_SHARE, of="lesions")
    shards.add_arguments(parser)
    args = parser.parse_args(arguments)
    shards.run(args, plan(args.source, {"test": args.test_share, "val": args.val_share}))


def plan(source: Path, shares: dict[str, float]) -> list[Release]:
    """Train, val and test, by lesion."""
    finder = ImageFinder(source, FOLDERS, ARCHIVES)
    items: dict[str, list[Item]] = {"train": [], "val": [], "test": []}
    for row in read_table(find_file(source, *METADATA), COLUMNS):
        # By lesion: its images have one diagnosis and look alike.
        split = drawn_split(row["lesion_id"], shares)
        site = row["localization"].strip().lower()
        items[split].append(
            Item(
                image=row["image_id"],
                place=finder.place(f"{row['image_id']}.jpg"),
                lesion=row["lesion_id"],
                dx=row["dx"].strip().lower(),
                dx_type=row["dx_type"],
                age=row["age"],
                sex=row["sex"],
                site="" if site == "unknown" else site,
            )
        )
    note_count("HAM10000 images", sum(map(len, items.values())), NUM_IMAGES)
    note_shares("ham10000", shares, {split: len(found) for split, found in items.items()}, "images")
    return [
        Release(
            source="ham10000",
            split=split,
            version="HAM10000",
            licence=LICENCE,
            items=found,
            convert=partial(convert, source, split),
            name_of=attrgetter("image"),
        )
        for split, found in items.items()
        if found
    ]


def convert(source: Path, split: str, item: Item) -> Incomplete:
    """One image with its questions. Raises UnusableItemError with the reason."""
    if item.dx not in DIAGNOSES:
        raise UnusableItemError(f"unknown diagnosis {item.dx!r}")
    image = read_image(read_place(source, item.place))
    name = f"ham10000/{item.image}"
    person = person_of(item.sex, item.age)
    if person.age == 0:
        # Ages are rounded to five years, and nobody photographs so many moles of newborns: 0 is
        # how the table writes that the age is not known.
        person = person._replace(age=None, noted=(*person.noted, "age 0 is taken for unknown"))
    record = Record(
        id=name,
        image=image.data,
        height=image.height,
        width=image.width,
        conversations=turns_for(name, item),
        task="classification",
        modality="dermoscopy",
        anatomy="skin",
        labels=[DIAGNOSES[item.dx]],
        source="ham10000",
        split=split,
        # The release names lesions and not people; a lesion's id in this field would claim more.
        patient_id=None,
        study_id=f"ham10000/{item.lesion}",
        sex=person.sex,
        age=person.age,
        race=None,
        # How the diagnosis was made: a consensus is weaker ground than histology.
        extra={"dx_type": item.dx_type, "localization": item.site},
    )
    return Incomplete(record, noted=person.noted)


def turns_for(name: str, item: Item) -> list[Turn]:
    """Diagnosis, malignancy, and body site where it is known; wordings drawn by the name."""
    # One generator for all wordings: their order below is part of the data.
    draw = draw_for(name)
    wording = draw.choice(DIAGNOSIS_QUESTIONS)
    turns = choice_turns(wording, DIAGNOSES.values(), DIAGNOSES[item.dx], draw)
    malignant = "yes" if item.dx in MALIGNANT else "no"
    turns += pair(draw.choice(MALIGNANCY_QUESTIONS), malignant, "closed")
    if item.site:
        turns += pair(draw.choice(LOCALIZATION_QUESTIONS), item.site, "open")
    return turns


if __name__ == "__main__":
    run_program(main)

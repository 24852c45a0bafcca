"""VQA-RAD -> record folders of radiology images with their questions.

    python data_prep/vqa_rad.py --source VQA-RAD --output prepared

Layout of --source, either the original release

    VQA_RAD Dataset Public.json      image_name, question, answer, answer_type, question_type, ...
    VQA_RAD Image Folder/synpic*.jpg

(or VQA_RAD_Dataset_Public.json, or its entries divided into trainset.json and testset.json, with
the images in the folder images), or the Hugging Face form (the folder `data` may be left out),
which lost all but the text:

    data/train-00000-of-00001-*.parquet        image {bytes, path}, question, answer
    data/test-00000-of-00001-*.parquet

The official split is one of questions, not of images: nearly all test images are training images
too, and a leak check rightly says so. Questions that occur twice are taken once and questions of
the test set are removed from train, which gives the 1,793 and 451 that papers report. Licence: CC0;
the images come from MedPix.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from biascare.records import Record
from data_prep.formats.parquet import ImagePlace, image_bytes, read_questions, split_files
from data_prep.pipeline import shards
from data_prep.pipeline.program import run_program
from data_prep.pipeline.release_files import (
    file_inside,
    find_file,
    note_count,
    note_repeated,
    read_image,
    read_json,
)
from data_prep.pipeline.shards import Release, UnusableItemError
from data_prep.wording.conversations import (
    Asked,
    Gathered,
    ImageQuestions,
    Question,
    Refused,
    asked,
    gather,
    questions_of,
    turns_of,
)

JSON_NAME = "VQA_RAD Dataset Public.json"
JSON_NAMES = (JSON_NAME, "VQA_RAD_Dataset_Public.json")
SPLIT_NAMES = {"train": "trainset.json", "test": "testset.json"}
"""Copies that divided the entries by the split; the words of each entry are the same."""

IMAGE_FOLDER = "VQA_RAD Image Folder"
IMAGE_FOLDERS = (IMAGE_FOLDER, "VQA_RAD_Image_Folder", "images")
NUM_QUESTIONS = {"train": 1_793, "test": 451}
"""Of the whole release, without repeated ones."""

TEST_PREFIX = "test_"
"""The original file marks test questions in phrase_type: "test_freeform", "test_para"."""

ANATOMY = {"head": "head", "chest": "chest", "abd": "abdomen"}
LICENCE = "VQA-RAD: CC0 1.0; images from MedPix (US National Library of Medicine)"
MEDPIX_CASE = re.compile(r"[?&]id=([\w-]+)")


class Item(NamedTuple):
    """An image with its questions."""

    name: str
    place: ImagePlace | Path  # in a parquet file | a file of its own
    questions: tuple[Question, ...]
    facts: tuple[dict[str, str], ...]  # parallel to questions; may be empty dicts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, type=Path, help="the release, either form")
    shards.add_arguments(parser)
    args = parser.parse_args(arguments)
    shards.run(args, plan(args.source))


def plan(source: Path) -> list[Release]:
    """The two official splits of either form of the release."""
    places: dict[str, ImagePlace] = {}
    rows: Mapping[str, Iterable[Asked]]
    # The original wins where both are there: the other form has lost the facts of the questions.
    files = {name: source / name for name in (*JSON_NAMES, *SPLIT_NAMES.values())}
    if any(path.is_file() for path in files.values()):
        rows = _original(source)
    else:
        rows = {s: read_questions(split_files(source, s), places) for s in ("train", "test")}
    # Test first and whole; what it asks is removed from train.
    test = gather(rows["test"])
    gathered = {"train": gather(rows["train"], questions_of(test)), "test": test}
    for split, found in gathered.items():
        note_repeated(f"VQA-RAD {split}", found.num_repeated)
        note_count(f"VQA-RAD {split} questions", found.num_questions, NUM_QUESTIONS[split])
    return [
        Release(
            source="vqa_rad",
            split=split,
            version="VQA-RAD, Hugging Face form" if places else "VQA-RAD, original form",
            licence=LICENCE,
            items=_items(found, source, places),
            convert=partial(convert, source, split),
            name_of=attrgetter("name"),
        )
        for split, found in gathered.items()
    ]


def _original(source: Path) -> dict[str, list[Asked]]:
    rows: dict[str, list[Asked]] = {"train": [], "test": []}
    whole = next((source / name for name in JSON_NAMES if (source / name).is_file()), None)
    if whole is None:
        for split, name in SPLIT_NAMES.items():
            path = find_file(source, name)
            entries = enumerate(read_json(path, list))
            rows[split] = [_row(f"{name}:{number}", entry, split) for number, entry in entries]
        return rows
    for number, entry in enumerate(read_json(whole, list)):
        phrase = str(entry.get("phrase_type", "")).strip().lower()
        split = "test" if phrase.startswith(TEST_PREFIX) else "train"
        rows[split].append(_row(f"{whole.name}:{entry.get('qid', number)}", entry, split))
    return rows


def _row(name: str, entry: dict[str, Any], split: str) -> Asked:
    """One entry of the original file; numbers and booleans occur as answers."""
    case = MEDPIX_CASE.search(str(entry.get("image_case_url", "")))
    return asked(
        str(entry.get("image_name", "")),
        name,
        str(entry.get("question", "")),
        str(entry.get("answer", "")),
        str(entry.get("answer_type") or "") or None,
        qid=entry.get("qid"),
        linked_qid=entry.get("qid_linked_id"),
        question_relation=entry.get("question_relation"),
        official_split=split,
        answer_type=entry.get("answer_type"),
        question_type=entry.get("question_type"),
        phrase_type=entry.get("phrase_type"),
        evaluation=entry.get("evaluation"),
        organ=entry.get("image_organ"),
        case=case[1] if case else None,
    )


def _items(gathered: Gathered, source: Path, places: dict[str, ImagePlace]) -> list[Item | Refused]:
    items: list[Item | Refused] = []
    folder = next((name for name in IMAGE_FOLDERS if (source / name).is_dir()), IMAGE_FOLDER)
    for item in gathered.items:
        if isinstance(item, ImageQuestions):
            place = places.get(item.image, Path(folder) / item.image)
            # In parquet form images have no names; 64 bits of their content are as good.
            name = item.image[:16] if item.image in places else Path(item.image).stem
            items.append(Item(name, place, item.questions, item.facts))
        else:
            items.append(item)
    return items


def convert(source: Path, split: str, item: Item | Refused) -> Record:
    """One image with its questions. Raises UnusableItemError with the reason."""
    if isinstance(item, Refused):
        raise UnusableItemError(item.reason)
    if isinstance(item.place, Path):
        image = read_image(file_inside(source, str(item.place)))
    else:
        image = read_image(image_bytes(item.place))
    facts = item.facts[0]  # what is said of the image is said with each question
    case = facts.get("case")
    return Record(
        id=f"vqa_rad/{item.name}",
        image=image.data,
        height=image.height,
        width=image.width,
        conversations=turns_of(item.questions, item.facts),
        task="vqa",
        # The release mixes CT, MRI and X-ray and does not say which image is which.
        modality="radiology",
        anatomy=ANATOMY.get(facts.get("organ", "").lower(), ""),
        source="vqa_rad",
        split=split,
        patient_id=None,
        # A case is one patient's, so its images should not part. The split of the release is by
        # question and does part them, which the linter then tells.
        study_id=f"medpix/{case}" if case else None,
        sex=None,
        age=None,
        race=None,
    )


if __name__ == "__main__":
    run_program(main)

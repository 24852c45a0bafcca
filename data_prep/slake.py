"""SLAKE -> record folders of radiology images with their questions and organ masks.

    python data_prep/slake.py --source Slake1.0 --output prepared --language en

Layout of --source:

    train.json, validation.json, test.json    img_name, question, answer, q_lang, answer_type, ...
    imgs/xmlab1/{source.jpg, mask.png, detection.json}
    mask.txt                                  value of each structure in mask.png

The files are the official split (by image), validation under the name val. --language takes the
English questions, the Chinese ones (zh), or all. Masks become targets when mask.txt, or another
table given by --mask-names, names their values: one structure and its value per line, "Liver: 7".
A mask that cannot be used costs the image its targets, not its questions; `left_out` in the
record's extra says why. Licence: CC BY 4.0; images come from MSD, ChestX-ray8 and CHAOS.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from biascare.records import Record
from biascare.records.vocabulary import canonical_modality, canonical_target
from data_prep.pipeline import shards
from data_prep.pipeline.program import run_program
from data_prep.pipeline.release_files import (
    EncodedImage,
    file_inside,
    find_file,
    note,
    note_count,
    note_repeated,
    read_image,
    read_json,
)
from data_prep.pipeline.shards import Release, UnusableItemError
from data_prep.wording.conversations import (
    Asked,
    ImageQuestions,
    Refused,
    asked,
    gather,
    name_of,
    turns_of,
)

SPLITS = {"train": "train.json", "val": "validation.json", "test": "test.json"}
LANGUAGES = ("en", "zh", "all")
NUM_QUESTIONS = {
    "en": {"train": 4_919, "val": 1_053, "test": 1_061},
    "all": {"train": 9_835, "val": 2_099, "test": 2_094},
}
"""Of the whole release, as its paper counts them."""

MASK_LINE = re.compile(r"^\s*(?:(\d+)\s*[:=,\s]\s*(\D+?)|(\D+?)\s*[:=,\s]\s*(\d+))\s*$")
LICENCE = "SLAKE: CC BY 4.0; images from MSD, ChestX-ray8 and CHAOS"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, type=Path, help="the extracted release")
    parser.add_argument(
        "--language", choices=LANGUAGES, default="en", help="of the questions; default: %(default)s"
    )
    parser.add_argument("--mask-names", type=Path, help="table of mask values, if not mask.txt")
    shards.add_arguments(parser)
    args = parser.parse_args(arguments)
    shards.run(args, plan(args.source, args.language, args.mask_names))


def plan(source: Path, language: str, mask_names: Path | None) -> list[Release]:
    """One release per official split."""
    table = mask_names or source / "mask.txt"
    names: dict[int, str] = {}
    # A table that the user names must be there; the release's own may be missing, and questions
    # are worth preparing without masks.
    if mask_names or table.is_file():
        names = read_mask_names(table)
    else:
        note("no mask.txt: organ masks are left out, see --mask-names")
    releases = []
    for split, file in SPLITS.items():
        gathered = gather(read_rows(find_file(source, file), language))
        note_repeated(f"SLAKE {split}", gathered.num_repeated)
        if language in NUM_QUESTIONS:
            expected = NUM_QUESTIONS[language][split]
            what = f"SLAKE {split} questions ({language})"
            note_count(what, gathered.num_questions, expected)
        releases.append(
            Release(
                source="slake",
                split=split,
                version=f"SLAKE 1.0, language {language}",
                licence=LICENCE,
                items=gathered.items,
                convert=partial(convert, source, split, names),
                name_of=name_of,
            )
        )
    return releases


def read_rows(path: Path, language: str) -> Iterator[Asked]:
    """Questions of one file in the chosen language."""
    for number, entry in enumerate(read_json(path, list)):
        # SLAKE asks in both languages, and papers count the questions of one.
        if language in ("all", entry.get("q_lang")):
            yield asked(
                str(entry.get("img_name", "")),
                f"{path.name}:{entry.get('qid', number)}",
                str(entry.get("question", "")),
                str(entry.get("answer", "")),
                str(entry.get("answer_type") or "") or None,
                qid=entry.get("qid"),
                language=entry.get("q_lang"),
                modality=entry.get("modality"),
                location=entry.get("location"),
                answer_type=entry.get("answer_type"),
                base_type=entry.get("base_type"),
                content_type=entry.get("content_type"),
                triple=entry.get("triple"),
            )


def read_mask_names(path: Path) -> dict[int, str]:
    """Value in mask.png -> canonical target. Raises ValueError for a line that is no pair, and for
    a value or name that occurs twice."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable table of mask values: {error}") from error
    names: dict[int, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = MASK_LINE.match(line)
        if match is None:
            raise ValueError(
                f"{path}:{number}: expected a structure and its value, as in 'Liver: 7', got "
                f"{line!r}; write such a table and give it with --mask-names"
            )
        value, name = int(match[1] or match[4]), canonical_target(match[2] or match[3])
        # Two values of one name would be two masks of one target.
        if value in names or name in names.values():
            raise ValueError(f"{path}:{number}: {line!r} repeats a value or a name")
        names[value] = name
    return names


def convert(
    source: Path, split: str, names: dict[int, str], item: ImageQuestions | Refused
) -> Record:
    """One image with its questions and masks. Raises UnusableItemError with the reason."""
    if isinstance(item, Refused):
        raise UnusableItemError(item.reason)
    path = file_inside(source, f"imgs/{item.image}")
    image = read_image(path)
    facts = item.facts[0]  # what is said of the image is said with each question
    extra: dict[str, Any] = {}
    targets: list[tuple[str, np.ndarray]] = []
    try:
        extra["boxes"] = read_boxes(path.parent / "detection.json")
        targets = read_targets(path.parent / "mask.png", names, image) if names else []
    except UnusableItemError as reason:
        # A broken mask costs the targets and not the questions, and the record says so.
        extra["left_out"] = str(reason)
    return Record(
        id=f"slake/{Path(item.image).parent.as_posix()}",
        image=image.data,
        height=image.height,
        width=image.width,
        targets=targets,
        conversations=turns_of(item.questions, item.facts),
        task="vqa",
        modality=canonical_modality(facts.get("modality", "")),
        anatomy=facts.get("location", "").replace("_", " ").lower(),
        source="slake",
        split=split,
        patient_id=None,
        study_id=None,
        sex=None,
        age=None,
        race=None,
        extra=extra,
    )


def read_targets(
    path: Path, names: dict[int, str], image: EncodedImage
) -> list[tuple[str, np.ndarray]]:
    """Named values of a label map -> (target, bool [H, W]). Raises UnusableItemError."""
    if not path.is_file():
        raise UnusableItemError("mask missing")
    mask = read_image(path)  # refuses what is no image
    with Image.open(io.BytesIO(path.read_bytes()), formats=("PNG",)) as opened:
        values = np.asarray(opened)
    # Colours of a drawing are no values, and anti-aliasing would make new ones.
    if values.ndim != 2:
        raise UnusableItemError("mask has colours instead of values")
    if (mask.height, mask.width) != (image.height, image.width):
        raise UnusableItemError("mask and image differ in size")
    present = {int(value) for value in np.unique(values)} - {0}
    # All or none: a structure without a name would count as background in training.
    if unnamed := sorted(present - set(names)):
        raise UnusableItemError(f"mask values without a name: {unnamed}")
    return [(names[value], values == value) for value in sorted(present)]


def read_boxes(path: Path) -> list[dict[str, Any]]:
    """detection.json as [{name, box: x, y, width, height in pixels}]; [] when there is none.
    Raises UnusableItemError for another content."""
    if not path.is_file():
        return []
    try:
        entries = read_json(path, list)
        return [{"name": name, "box": box} for entry in entries for name, box in entry.items()]
    except (ValueError, AttributeError) as error:
        raise UnusableItemError("detection.json unreadable") from error


if __name__ == "__main__":
    run_program(main)

"""SLAKE -> record folders of radiology images with their questions and organ masks.

    python data_prep/slake.py --source Slake1.0 --output prepared --language en

Layout of --source:

    train.json, validate.json, test.json      img_name, question, answer, q_lang, answer_type, ...
                                              (validation.json in the Hugging Face form)
    imgs/xmlab1/{source.jpg, mask.png, detection.json}
    mask.txt                                  value of each structure in mask.png

The files are the official split, validation under the name val, row for row. --language takes the
English questions, the Chinese ones (zh), or all; each language has a split by image of its own, so
that together train shares images with val and test. Masks become targets by mask.txt, or another
table given by --mask-names: one structure and its value per line, "Liver: 7"; --no-masks does
without. A mask that cannot be used costs the image its targets, not its questions: it stands in the
ledger and counts against --max-skipped. The masks of X-rays are colour overlays in the release
itself, which no table turns into values: they are in the ledger and do not count. Licence: CC BY
4.0; images come from MSD, ChestX-ray8 and CHAOS.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from biascare.records import Record
from biascare.records.vocabulary import canonical_modality, canonical_target
from data_prep.formats.label_maps import read_label_map
from data_prep.pipeline import shards
from data_prep.pipeline.options import cut_masks
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
from data_prep.pipeline.shards import Incomplete, Release, UnusableItemError
from data_prep.wording.conversations import (
    Asked,
    ImageQuestions,
    Refused,
    asked,
    gather,
    name_of,
    turns_of,
)

SPLITS = {
    "train": ("train.json",),
    "val": ("validate.json", "validation.json"),
    "test": ("test.json",),
}
"""Split of the records -> names of its file: of the original, of the Hugging Face form."""

LANGUAGES = ("en", "zh", "all")
NUM_QUESTIONS = {
    "en": {"train": 4_919, "val": 1_053, "test": 1_061},
    "all": {"train": 9_835, "val": 2_099, "test": 2_094},
}
"""Of the whole release, as its paper counts them."""

MASK_LINE = re.compile(r"^\s*(?:(\d+)\s*[:=,\s]\s*(\D+?)|(\D+?)\s*[:=,\s]\s*(\d+))\s*$")
OVERLAID_MODALITY = "xray"
"""All 179 X-rays of the release, and no other image, have masks that are drawings."""

LICENCE = "SLAKE: CC BY 4.0; images from MSD, ChestX-ray8 and CHAOS"


class OverlayError(UnusableItemError):
    """The mask is a drawing: an image with structures painted over it."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, type=Path, help="the extracted release")
    parser.add_argument(
        "--language", choices=LANGUAGES, default="en", help="of the questions; default: %(default)s"
    )
    masks = parser.add_mutually_exclusive_group()
    masks.add_argument("--mask-names", type=Path, help="table of mask values, if not mask.txt")
    masks.add_argument("--no-masks", action="store_true", help="questions only")
    shards.add_arguments(parser)
    args = parser.parse_args(arguments)
    find_file(args.source, *SPLITS["train"])  # a wrong --source is told as that, not as mask.txt
    table = args.mask_names or args.source / "mask.txt"
    names = {} if args.no_masks else read_mask_names(table)
    shards.run(args, plan(args.source, args.language, names))


def plan(source: Path, language: str, names: dict[int, str]) -> list[Release]:
    """One release per official split. `names`: of mask values, empty for questions only."""
    releases = []
    images: dict[str, set[str]] = {}
    for split, files in SPLITS.items():
        rows = read_rows(find_file(source, *files), language)
        gathered = gather(rows, keep_repeated=True)
        note_repeated(f"SLAKE {split}", gathered.num_repeated, kept=True)
        if language in NUM_QUESTIONS:
            expected = NUM_QUESTIONS[language][split]
            what = f"SLAKE {split} questions ({language})"
            note_count(what, gathered.num_questions, expected)
        images[split] = {item.image for item in gathered.items if isinstance(item, ImageQuestions)}
        releases.append(
            Release(
                source="slake",
                split=split,
                version=f"SLAKE 1.0, language {language}",
                licence=LICENCE,
                items=gathered.items,
                convert=partial(convert, source, split, names),
                name_of=name_of,
                promises_masks=bool(names),
            )
        )
    shared = images["train"] & (images["val"] | images["test"])
    if shared:
        note(
            f"SLAKE: {len(shared)} images of train are in val or test too: the two languages are "
            "split differently. Scores on them are too good; --language en keeps images apart"
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
        # Not a release without masks: whoever wants that says so.
        raise ValueError(
            f"{path} is not a readable table of mask values: {error}; give one with --mask-names, "
            "or --no-masks to prepare the questions alone"
        ) from error
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
) -> Incomplete:
    """One image with its questions and masks. Raises UnusableItemError with the reason."""
    if isinstance(item, Refused):
        raise UnusableItemError(item.reason)
    path = file_inside(source, f"imgs/{item.image}")
    image = read_image(path)
    facts = item.facts[0]  # what is said of the image is said with each question
    modality = canonical_modality(facts.get("modality", ""))
    extra: dict[str, Any] = {}
    targets: list[tuple[str, np.ndarray]] = []
    lost, noted = "", []
    try:
        if names:
            targets = read_targets(path.parent / "mask.png", names, image)
            # Sound, so nothing is lost; but of many of them a person should know.
            noted += [] if targets else ["mask shows no structure"]
    except OverlayError as reason:
        # A property of the release where all such images have it, damage anywhere else.
        if modality == OVERLAID_MODALITY:
            noted.append(f"{reason} (as the release has it for X-rays)")
        else:
            lost = str(reason)
    except UnusableItemError as reason:
        # A broken mask costs the targets and not the questions.
        lost = f"mask: {reason}"
    try:
        extra["boxes"] = read_boxes(path.parent / "detection.json")
    except UnusableItemError as reason:
        noted.append(str(reason))
    record = Record(
        id=f"slake/{Path(item.image).parent.as_posix()}",
        image=image.data,
        height=image.height,
        width=image.width,
        targets=targets,
        conversations=turns_of(item.questions, item.facts),
        task="vqa",
        modality=modality,
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
    return Incomplete(record, lost, tuple(noted))


def read_targets(
    path: Path, names: dict[int, str], image: EncodedImage
) -> list[tuple[str, np.ndarray]]:
    """Named values of a label map -> (target, bool [H, W]). Raises OverlayError for colours, and
    UnusableItemError for what else is wrong."""
    if not path.is_file():
        raise UnusableItemError("file missing")
    values = read_label_map(path.read_bytes())
    if values.ndim == 3:
        raise OverlayError("mask is a colour overlay, its values are lost")
    if values.shape != (image.height, image.width):
        raise UnusableItemError("mask and image differ in size")
    # All or none: a structure without a name would count as background in training.
    return cut_masks(values, names, named_by="--mask-names")


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

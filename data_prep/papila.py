"""PAPILA -> record folders of fundus photographs with optic disc, optic cup and glaucoma grade.

    python data_prep/papila.py --source PapilaDB --output prepared

Layout of --source:

    ClinicalData/patient_data_od.xlsx, patient_data_os.xlsx   right and left eyes
                    header of several rows; column A: #002; Age, Gender (0 M, 1 F),
                    Diagnosis (0 healthy, 1 glaucoma, 2 suspect)
    FundusImages/RET002OD.jpg
    ExpertsSegmentations/Contours/RET002OD_{disc,cup}_exp{1,2}.txt    x y per line, in pixels

There is no official split: both eyes of a patient go to the split that the hash of the patient's
number draws, at --test-share and --val-share. Masks are the filled contours of one expert
(--expert). Suspects are neither healthy nor ill: they have a grade of their own and are never asked
the yes/no question about glaucoma; --suspects exclude leaves them out. Licence: CC BY 4.0.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from biascare.records import Record, Turn
from data_prep.formats.spreadsheets import read_sheet
from data_prep.pipeline import shards
from data_prep.pipeline.attributes import UNKNOWN, person_of
from data_prep.pipeline.options import add_share_arguments, note_shares
from data_prep.pipeline.program import run_program
from data_prep.pipeline.release_files import (
    file_inside,
    find_file,
    note_count,
    number_of,
    read_image,
)
from data_prep.pipeline.shards import Incomplete, Release, UnusableItemError
from data_prep.wording.conversations import (
    GLAUCOMA_CHOICES,
    GLAUCOMA_QUESTIONS,
    choice_turns,
    draw_for,
    drawn_split,
    pair,
)

EYES = {"OD": "right", "OS": "left"}
NUM_EYES = 488
SEXES = {0: "M", 1: "F"}
HEALTHY, GLAUCOMA, SUSPECT = "healthy", "glaucoma", "glaucoma suspect"
DIAGNOSES = {0: HEALTHY, 1: GLAUCOMA, 2: SUSPECT}
STRUCTURES = {"optic disc": "disc", "optic cup": "cup"}
CONTOURS = "ExpertsSegmentations/Contours"
PATIENT = re.compile(r"#?\s*0*(\d+)")
HEADERS = ("Age", "Gender", "Diagnosis")
TEST_SHARE, VAL_SHARE = 0.2, 0.1
LICENCE = "PAPILA: CC BY 4.0"


class Item(NamedTuple):
    """One eye."""

    patient: str  # number without leading zeros
    eye: str  # OD | OS
    age: str  # as written
    sex: str | None
    diagnosis: str  # of DIAGNOSES, or empty


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, type=Path, help="the extracted release")
    parser.add_argument(
        "--expert",
        type=int,
        choices=(1, 2),
        default=1,
        help="whose contours; default: %(default)s",
    )
    parser.add_argument(
        "--suspects",
        choices=("separate", "exclude"),
        default="separate",
        help="a grade of their own, or left out; default: %(default)s",
    )
    add_share_arguments(parser, test=TEST_SHARE, val=VAL_SHARE, of="patients")
    shards.add_arguments(parser)
    args = parser.parse_args(arguments)
    shares = {"test": args.test_share, "val": args.val_share}
    shards.run(args, plan(args.source, shares, args.expert, args.suspects))


def plan(source: Path, shares: dict[str, float], expert: int, suspects: str) -> list[Release]:
    """Train, val and test, by patient."""
    items: dict[str, list[Item]] = {"train": [], "val": [], "test": []}
    for eye in EYES:
        name = f"patient_data_{eye.lower()}.xlsx"
        for item in read_eyes(find_file(source / "ClinicalData", name), eye):
            # By patient: the two eyes of one are alike, and so is their grade.
            items[drawn_split(f"papila/{item.patient}", shares)].append(item)
    note_count("PAPILA eyes", sum(map(len, items.values())), NUM_EYES)
    note_shares("papila", shares, {split: len(found) for split, found in items.items()}, "eyes")
    return [
        Release(
            source="papila",
            split=split,
            version="PAPILA",
            licence=LICENCE,
            # Both eyes side by side: the tables list right eyes first, then all left ones.
            items=sorted(found, key=lambda item: (int(item.patient), item.eye)),
            convert=partial(convert, source, split, expert, suspects),
            name_of=image_name,
            promises_masks=True,
        )
        for split, found in items.items()
        if found
    ]


def read_eyes(path: Path, eye: str) -> Iterator[Item]:
    """Eyes of one table. Raises ValueError when a column is missing or a value has no meaning."""
    rows = read_sheet(path)
    numbered = [bool(PATIENT.fullmatch(row.get("A", ""))) for row in rows]
    # Found by its first patient: the header has two or three rows.
    start = numbered.index(True) if any(numbered) else len(rows)
    columns = _columns(path, rows[:start])
    for row, is_patient in zip(rows[start:], numbered[start:], strict=True):
        if is_patient:
            match = PATIENT.fullmatch(row["A"])
            assert match is not None
            texts = {name: row.get(column, "nan") for name, column in columns.items()}
            # Empty cells and the spellings of "not measured" are unknown, no error.
            codes = {
                name: None if texts[name].lower() in UNKNOWN else number_of(texts[name], str(path))
                for name in ("Gender", "Diagnosis")
            }
            yield Item(
                patient=match[1],
                eye=eye,
                age=texts["Age"],
                sex=_meaning(path, "Gender", codes["Gender"], SEXES),
                diagnosis=_meaning(path, "Diagnosis", codes["Diagnosis"], DIAGNOSES) or "",
            )


def _columns(path: Path, header: list[dict[str, str]]) -> dict[str, str]:
    """Name -> column letters. The header has two or three rows, and names stand in any of them."""
    found = {text.strip().casefold(): column for row in header for column, text in row.items()}
    missing = [name for name in HEADERS if name.casefold() not in found]
    if missing:
        raise ValueError(
            f"{path} has no column {missing} above its first patient (#002); its header holds "
            f"{sorted(found)[:12]}"
        )
    return {name: found[name.casefold()] for name in HEADERS}


def _meaning(path: Path, name: str, value: float | None, table: dict[int, str]) -> str | None:
    # Not unknown: a code that the release does not define means that the column is another one.
    if value is not None and value not in table:
        raise ValueError(f"{path}: {name} is one of {table}, got {value:g}")
    return None if value is None else table[int(value)]


def image_name(item: Item) -> str:
    """RET002OD: the release pads numbers to three digits."""
    return f"RET{int(item.patient):03d}{item.eye}"


def convert(source: Path, split: str, expert: int, suspects: str, item: Item) -> Incomplete | None:
    """One eye with masks and grade; None for a suspect that is excluded. Raises
    UnusableItemError with the reason."""
    # None and not an error: what the user leaves out does not count against --max-skipped.
    if item.diagnosis == SUSPECT and suspects == "exclude":
        return None
    if not item.diagnosis:
        raise UnusableItemError("no diagnosis")
    name = image_name(item)
    person = person_of("", item.age)  # the table's codes of sex are told from the start
    image = read_image(file_inside(source, f"FundusImages/{name}.jpg"))
    targets, lost = [], []
    for target, word in STRUCTURES.items():
        file = f"{name}_{word}_exp{expert}.txt"
        try:
            targets.append((target, _mask(source, file, image.height, image.width)))
        except UnusableItemError as reason:
            # The eye keeps its grade and the other contour, and the ledger counts the loss.
            lost.append(f"{target}: {reason}")
    record = Record(
        id=f"papila/{name}",
        image=image.data,
        height=image.height,
        width=image.width,
        targets=targets,
        conversations=turns_for(f"papila/{name}", item.diagnosis),
        task="classification and segmentation",
        modality="fundus",
        anatomy="eye",
        labels=[item.diagnosis],
        source="papila",
        split=split,
        patient_id=f"papila/{item.patient}",
        study_id=None,
        sex=item.sex,
        age=person.age,
        race=None,
        extra={"eye": EYES[item.eye], "expert": expert},
    )
    return Incomplete(record, "; ".join(lost), person.noted)


def turns_for(name: str, diagnosis: str) -> list[Turn]:
    """The grade among three, and whether there is glaucoma, which a suspect leaves open."""
    draw = draw_for(name)
    turns = choice_turns(draw.choice(GLAUCOMA_CHOICES), DIAGNOSES.values(), diagnosis, draw)
    # Neither answer would be true of a suspect.
    if diagnosis != SUSPECT:
        answer = "yes" if diagnosis == GLAUCOMA else "no"
        turns += pair(draw.choice(GLAUCOMA_QUESTIONS), answer, "closed")
    return turns


def _mask(source: Path, file: str, height: int, width: int) -> np.ndarray:
    try:
        path = file_inside(source, f"{CONTOURS}/{file}")
    except UnusableItemError as error:
        raise UnusableItemError(f"contour: {error}") from error
    mask = fill_contour(read_contour(path), height, width)
    # A contour beside the image: of another eye, or in other units.
    if not mask.any():
        raise UnusableItemError("contour holds no pixel")
    return mask


def read_contour(path: Path) -> np.ndarray:
    """[N, 2] float64, x then y in pixels. Raises UnusableItemError for anything else."""
    try:
        rows = [
            [float(value) for value in line.replace(",", " ").split()]
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    except ValueError as error:
        raise UnusableItemError("contour unreadable") from error
    if len(rows) < 3 or any(len(row) != 2 for row in rows):
        raise UnusableItemError("contour is not a list of at least three points")
    points = np.array(rows)
    if not np.isfinite(points).all():
        raise UnusableItemError("contour unreadable")
    return points


def fill_contour(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Closed polygon [N, 2] (x, y in pixels, a pixel's centre at whole numbers) -> bool [H, W].

    A pixel belongs to the polygon when its centre does (even-odd rule; left and upper borders
    inside, right and lower ones outside). What lies beyond the image is cut off.
    """
    mask = np.zeros((height, width), dtype=np.bool_)
    x, y = points.T
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    first, last = max(int(np.ceil(y.min())), 0), min(int(np.floor(y.max())), height - 1)
    for row in range(first, last + 1):
        # "At or above" on one side only, so that a corner on the row is counted once.
        crossing = (y <= row) != (next_y <= row)
        x0, x1, y0, y1 = x[crossing], next_x[crossing], y[crossing], next_y[crossing]
        cuts = np.sort(x0 + (row - y0) * (x1 - x0) / (y1 - y0))
        for enter, leave in cuts.reshape(-1, 2):
            # Not Pillow's polygon, which paints its border too.
            mask[row, max(int(np.ceil(enter)), 0) : max(int(np.ceil(leave)), 0)] = True
    return mask


if __name__ == "__main__":
    run_program(main)

"""IMed-361M -> record folders, one per sub-dataset and split.

    python data_prep/imed361m.py --source IMed-361M --output prepared/imed361m --num-workers 8

`--source` is one sub-dataset (a folder with `dataset.json`) or the folder that holds many. Every
non-empty row of the sparse label is one target at native size; rows are read one at a time, because
a dense label of 104 classes at 512 x 512 is over a hundred megabytes when it is a float. The
interactive pseudo-regions (`imask`) have no names and are ignored. Items that cannot be used go to
`OUTPUT/<dataset>/<split>.skipped.jsonl`; too many of them are an error. See `shards.py` for
workers, jobs of a cluster and resuming.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from biascare.records import Record, Records, decode_mask, image_size
from biascare.records.vocabulary import SIDES, canonical_modality, canonical_target
from data_prep.formats.orientation import (
    orientation_of,
    parse_overrides,
    sides_agree,
    turn_image,
    turn_mask,
)
from data_prep.pipeline import shards
from data_prep.pipeline.program import run_program
from data_prep.pipeline.release_files import file_inside
from data_prep.pipeline.shards import Release, UnusableItemError

SPLITS = {"train": "training", "test": "test"}
"""Split of the records -> key of the list in dataset.json."""

LICENCE = "IMed-361M: terms of the underlying dataset apply; check them before redistribution"

PATIENT_AND_SLICE = re.compile(r"(?P<patient>.*?\d)(?:_frame\d+)?_\d+")
"""A slice of a volume is named <patient>_<slice>, and the patient ends in a number: ABD_001_100 is
slice 100 of ABD_001. ACDC puts the moment of the heart beat between the two, patient001_frame01_1,
of which a patient has two. Names of any other form say nothing about the patient."""

VOLUMES = ("ct", "mri", "pet")
"""Modalities that are cut into slices; elsewhere a trailing number is not a slice."""

SIDE_SAMPLES = 200
"""Records of a split that are looked at for mirrored images."""

DISPUTED_LABEL_ORDER = ("Totalsegmentator_dataset",)
"""Public readers disagree whether the rows follow dataset.json or the alphabet."""


class SubDataset(NamedTuple):
    """What all items of one sub-dataset share; picklable, so that workers get it once per item."""

    folder: Path  # resolved
    name: str
    modality: str
    names: tuple[str, ...]  # canonical, row i of every label is names[i]
    turn: str


class Item(NamedTuple):
    """One entry of a list of dataset.json."""

    image: str | None
    label: str | None
    repeated: bool


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    console = Console()
    folders = find_sub_datasets(Path(args.source))
    overrides = parse_overrides(args.orientation)
    # A misspelt name would leave its sub-dataset turned the wrong way, unnoticed.
    named = set(overrides) | set(args.sorted_labels)
    unknown = sorted(named - {folder.name for folder in folders})
    if unknown:
        raise ValueError(f"options name sub-datasets that are not in the source: {unknown}")
    sub_datasets = [
        open_sub_dataset(folder, overrides, folder.name in args.sorted_labels) for folder in folders
    ]
    for sub_dataset in sub_datasets:
        _announce(console, sub_dataset, overrides, args.sorted_labels)
    try:
        # Lists of items are made one sub-dataset after another: all at once they would fill the
        # memory.
        shards.run(args, (one for each in sub_datasets for one in releases(each)))
    finally:
        for sub_dataset in sub_datasets:
            # Also after an error: what is converted until then may be mirrored all the same.
            _report_sides(console, args.output / sub_dataset.name)


def releases(sub_dataset: SubDataset) -> list[Release]:
    """Both splits of a sub-dataset."""
    return [
        Release(
            source=sub_dataset.name,
            split=split,
            version="IMed-361M",
            licence=LICENCE,
            items=list_items(sub_dataset, split),
            convert=partial(convert_item, sub_dataset, split),
            name_of=name_of,
            promises_masks=True,
        )
        for split in SPLITS
    ]


def list_items(sub_dataset: SubDataset, split: str) -> list[Item]:
    """Entries of one list of dataset.json. An image that stands earlier in it, or in the list of
    training images, is marked as repeated."""
    # A test image that is also trained on would make every score too good; it goes to the ledger.
    training = _entries(sub_dataset, "train") if split != "train" else []
    seen = {entry.get("image") for entry in training}
    items = []
    for entry in _entries(sub_dataset, split):
        image, label = entry.get("image"), entry.get("label")
        items.append(Item(image, label, image in seen))
        seen.add(image)
    return items


def name_of(item: Item) -> str:
    return str(item.image)


def find_sub_datasets(source: Path) -> list[Path]:
    """Folders with a dataset.json: `source` itself, or its children in order of name."""
    if (source / "dataset.json").is_file():
        return [source]
    folders = sorted(path.parent for path in source.glob("*/dataset.json"))
    if not folders:
        raise ValueError(
            f"no dataset.json in {source} nor in its folders; give one sub-dataset of IMed-361M or "
            "the folder that holds them"
        )
    return folders


def open_sub_dataset(
    folder: Path, overrides: dict[str, str] | None = None, sorted_labels: bool = False
) -> SubDataset:
    """Read the header of dataset.json. Raises ValueError for missing keys, unknown modalities."""
    header = _header(folder)
    modalities = {canonical_modality(name) for name in header["modality"].values()}
    if len(modalities) != 1:
        raise ValueError(
            f"{folder}: one modality per sub-dataset, got {sorted(modalities)}; "
            "split the sub-dataset by modality"
        )
    names = row_names(header["labels"], sorted_labels)
    turn = orientation_of(folder.name, overrides).turn
    return SubDataset(folder.resolve(), folder.name, modalities.pop(), names, turn)


def row_names(labels: dict[str, str], sorted_labels: bool = False) -> tuple[str, ...]:
    """{"0": "background", "1": ...} -> canonical names, row i of a label being labels[i + 1].

    Raises ValueError for gaps in the numbers and for two numbers with one name.
    """
    by_number = {int(number): name for number, name in labels.items()}
    complete = sorted(by_number) == list(range(len(by_number))) and len(by_number) > 1
    # Row i is labels[i + 1] only then; with a gap every later mask would have its neighbour's name.
    if not complete or by_number[0].lower() != "background":
        raise ValueError(f"labels must be numbered 0 (background), 1, 2, ..., got {labels}")
    raw = [by_number[number] for number in range(1, len(by_number))]
    names = tuple(canonical_target(name) for name in (sorted(raw) if sorted_labels else raw))
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"several labels are called {repeated}: {labels}; rename one of them")
    return names


def read_rows(path: Path, num_rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """Non-empty rows of a sparse label: (row, bool [H, W]), one dense mask at a time.

    The file is `scipy.sparse.save_npz` of a CSR matrix [C, H * W]; (C, H, W, 1) stands in its name.
    Raises UnusableItemError when the two disagree or C is not `num_rows`.
    """
    shape = _shape_in_name(path)
    try:
        # Its arrays and not the matrix, whose dense form is over a hundred megabytes; no pickle,
        # which may run code.
        with np.load(path, allow_pickle=False) as archive:
            kind = archive["format"].item()
            indices, indptr = archive["indices"], archive["indptr"]
            data, matrix = archive["data"], tuple(int(n) for n in archive["shape"])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UnusableItemError("label unreadable") from error
    if kind not in (b"csr", "csr"):
        raise UnusableItemError("label is not a CSR matrix")
    # The true height and width stand in the file name alone; the matrix has lost them.
    if shape[0] != num_rows or matrix != (shape[0], shape[1] * shape[2]):
        raise UnusableItemError("label shape, file name and label list disagree")
    lengths_agree = indptr[-1] == len(indices) == len(data)
    # Arrays of a wrong length would give masks of other rows, or fail in the middle of the item.
    if len(indptr) != num_rows + 1 or indptr[0] != 0 or not lengths_agree:
        raise UnusableItemError("label is not a valid CSR matrix")
    for row in range(num_rows):
        start, stop = indptr[row], indptr[row + 1]
        # Zeros may be stored: they are background.
        columns = indices[start:stop][data[start:stop] != 0]
        if len(columns):
            if columns.min() < 0 or columns.max() >= matrix[1]:
                raise UnusableItemError("label is not a valid CSR matrix")
            mask = np.zeros(matrix[1], dtype=np.bool_)
            mask[columns] = True
            yield row, mask.reshape(shape[1:3])


def patient_of(stem: str, modality: str) -> str | None:
    """Patient in the name of an image file; None when the name does not tell. See
    PATIENT_AND_SLICE."""
    match = PATIENT_AND_SLICE.fullmatch(stem)
    # None rather than a guess: a wrong patient would put strangers together, and hide a real leak.
    return match["patient"] if match and modality in VOLUMES else None


def build_record(sub_dataset: SubDataset, split: str, item: Item) -> Record:
    """One entry of a list -> turned record. Raises UnusableItemError with the reason."""
    image_path = _inside(sub_dataset.folder, item.image)
    label_path = _inside(sub_dataset.folder, item.label)
    image = image_path.read_bytes()
    try:
        size = image_size(image)
        image = turn_image(image, sub_dataset.turn)
    except (ValueError, OSError, SyntaxError) as error:
        raise UnusableItemError("image unreadable") from error
    if _shape_in_name(label_path)[1:3] != size:
        raise UnusableItemError("image and label differ in size")
    targets = [
        (sub_dataset.names[row], turn_mask(mask, sub_dataset.turn))
        for row, mask in read_rows(label_path, len(sub_dataset.names))
    ]
    # Left to the ledger: an image without any mask says nothing here about what it does not show.
    if not targets:
        raise UnusableItemError("no mask has a pixel")
    # Again, because a turn by 90 degrees swaps them.
    height, width = image_size(image)
    inside = image_path.relative_to(sub_dataset.folder).with_suffix("").as_posix()
    return Record(
        id=f"{sub_dataset.name}/{inside.removeprefix('image/')}",
        image=image,
        height=height,
        width=width,
        targets=targets,
        task="segmentation",
        modality=sub_dataset.modality,
        source=sub_dataset.name,
        split=split,
        patient_id=patient_of(image_path.stem, sub_dataset.modality),
        study_id=None,
        sex=None,
        age=None,
        race=None,
    )


def convert_item(sub_dataset: SubDataset, split: str, item: Item) -> Record:
    """`build_record` for an entry that does not repeat another."""
    if item.repeated:
        raise UnusableItemError("image listed before")
    return build_record(sub_dataset, split, item)


def _entries(sub_dataset: SubDataset, split: str) -> list[dict[str, str]]:
    entries = _header(sub_dataset.folder).get(SPLITS[split], [])
    if not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{sub_dataset.folder}: {SPLITS[split]!r} must list objects with paths")
    return list(entries)


def _header(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    missing = [key for key in ("modality", "labels", "training") if key not in header]
    if missing:
        raise ValueError(f"{path} lacks {missing}; expected the header of an IMed-361M sub-dataset")
    return header


def _inside(folder: Path, relative: str | None) -> Path:
    """Existing file of a list entry, written relative to the sub-dataset or to its parent."""
    if not relative:
        raise UnusableItemError("entry without a path")
    prefixed = Path(relative).parts[0] == folder.name and not (folder / relative).exists()
    return file_inside(folder, relative.partition("/")[2] if prefixed else relative)


def _shape_in_name(path: Path) -> tuple[int, ...]:
    """x___A.(13, 512, 512, 1).npz -> (13, 512, 512, 1)."""
    match = re.search(r"\.(\([\d, ]+\))\.npz$", path.name)
    shape: tuple[int, ...] = ast.literal_eval(match[1]) if match else ()
    if len(shape) != 4 or shape[3] != 1:
        raise UnusableItemError("label file name carries no shape (C, H, W, 1)")
    return shape


def _announce(
    console: Console, sub_dataset: SubDataset, overrides: dict[str, str], sorted_labels: list[str]
) -> None:
    orientation = orientation_of(sub_dataset.name, overrides)
    reviewed = "reviewed" if orientation.reviewed else "NOT reviewed"
    console.print(f"{sub_dataset.name}: {sub_dataset.modality}, {len(sub_dataset.names)} targets")
    console.print(f"  orientation {orientation.turn} ({reviewed}: {orientation.note})")
    if sub_dataset.name in DISPUTED_LABEL_ORDER and sub_dataset.name not in sorted_labels:
        console.print(
            "  public readers disagree on the order of its labels: check some masks by eye, "
            f"--sorted-labels {sub_dataset.name} takes the names in alphabetical order"
        )


def _report_sides(console: Console, folder: Path) -> None:
    """Warn when right-sided targets lie at image right, from some records of each split."""
    for split in SPLITS:
        if not (folder / split).is_dir():
            continue
        # A vote: an organ may lie on the wrong side in one patient, not in most.
        sides = Counter(sides_in(Records(folder / split)))
        if sides[False] > sides[True]:
            console.print(
                f"{folder.name}/{split}: in {sides[False]} of {sides.total()} pairs the "
                "right-sided target lies at image right: the images look mirrored, give another "
                "--orientation"
            )


def sides_in(records: Records) -> list[bool]:
    """Evidence about left and right (see `sides_agree`) in evenly spaced records."""
    evidence = []
    # Evenly spaced: the first records may all be slices of one patient.
    for index in range(0, len(records), 1 + len(records) // SIDE_SAMPLES):
        row = records[index]
        names = {target["name"] for target in row["targets"]}
        # Only pairs are decoded: a slice of many organs has few of them.
        rests = Counter(name.partition(" ")[2] for name in names if name.startswith(SIDES))
        paired = {f"{side} {rest}" for rest, n in rests.items() if n == 2 for side in SIDES}
        masks = [
            (target["name"], decode_mask(target["rle"], row["height"], row["width"]) > 0)
            for target in row["targets"]
            if target["name"] in paired
        ]
        evidence += sides_agree(masks)
    return evidence


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="a sub-dataset, or the folder of many")
    parser.add_argument(
        "--orientation", action="append", default=[], metavar="NAME=TURN", help="may be repeated"
    )
    parser.add_argument(
        "--sorted-labels",
        action="append",
        default=[],
        metavar="NAME",
        help="rows of this sub-dataset follow the alphabet, not dataset.json",
    )
    shards.add_arguments(parser)
    return parser


if __name__ == "__main__":
    run_program(main)

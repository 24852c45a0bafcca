"""CXR-LT 2024, tasks 1 and 2 -> record folders of chest X-rays with long-tailed labels.

    python data_prep/cxr_lt.py --source cxr-lt-2024 --images mimic-cxr-jpg \\
        --mimic-iv mimic-iv --output prepared --num-workers 8

Layout of --source (every table may be .csv or .csv.gz):

    train_labeled.csv                     dicom_id, subject_id, study_id, ViewPosition, fpath, ..,
    development_labeled_task{1,2}.csv     one column per label (1 or 0)
    test_labeled_task{1,2}.csv

--images is MIMIC-CXR-JPG (files/p10/p10000032/s50414267/<dicom_id>.jpg); its metadata table dates
the study, and with --mimic-iv (optional) sex, age and race are known.

The tables are the official split, development under the name val: cxr_lt_task1/{train,val,test}
has 40 labels, cxr_lt_task2/{val,test} has 26; the test set of task 2 is 406 images read by hand.
Records carry the patient and study ids of MIMIC-CXR, so that scripts/lint_data.py sees an image
that is in a held-out set here and in training there. The answer lists the labels that are present,
or says "No finding". Access: PhysioNet, credentialed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from biascare.records import Record
from data_prep.mimic.patients import NOBODY, Patient, read_patients
from data_prep.mimic_cxr import (
    KEYS,
    METADATA,
    Acquisition,
    image_path,
    patient_key,
    read_metadata,
    study_key,
)
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
from data_prep.wording.conversations import FINDING_QUESTIONS, draw_for, pair

TABLES = {
    ("cxr_lt_task1", "train"): "train_labeled.csv",
    ("cxr_lt_task1", "val"): "development_labeled_task1.csv",
    ("cxr_lt_task1", "test"): "test_labeled_task1.csv",
    ("cxr_lt_task2", "val"): "development_labeled_task2.csv",
    ("cxr_lt_task2", "test"): "test_labeled_task2.csv",
}
"""(source, split) of the records -> table of the release."""

NUM_LABELS = {"cxr_lt_task1": 40, "cxr_lt_task2": 26}
NUM_IMAGES = {("cxr_lt_task1", "train"): 258_871, ("cxr_lt_task2", "test"): 406}
"""Where the release states them."""

NOT_LABELS = (
    *KEYS, "ViewPosition", "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning", "fpath", "path", "split", "",
)  # fmt: skip
"""Columns that describe the image; every other one is a label."""

VALUES = {"1": True, "1.0": True, "0": False, "0.0": False}
NO_FINDING = "No finding"
LICENCE = "CXR-LT 2024: PhysioNet Credentialed Health Data License 1.5.0; not to be shared"


class Item(NamedTuple):
    """One image."""

    dicom_id: str
    subject_id: str
    study_id: str
    path: str  # as the table states it; may be empty
    view: str
    labels: tuple[str, ...]
    problem: str  # why the row cannot be used; empty when it can
    sex: str | None
    age: float | None
    race: str | None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, type=Path, help="folder of the label tables")
    parser.add_argument("--images", type=Path, help="MIMIC-CXR-JPG; default: --source")
    parser.add_argument("--mimic-iv", type=Path, help="MIMIC-IV, for sex, age and race")
    parser.add_argument(
        "--task",
        choices=("1", "2", "all"),
        default="all",
        help="of the challenge; default: %(default)s",
    )
    shards.add_arguments(parser)
    args = parser.parse_args(arguments)
    shards.run(args, plan(args.source, args.images or args.source, args.mimic_iv, args.task))


def plan(source: Path, images: Path, mimic_iv: Path | None, task: str) -> list[Release]:
    """One release per table of the chosen tasks."""
    patients = read_patients(mimic_iv) if mimic_iv else {}
    metadata: dict[str, Acquisition] = {}
    if mimic_iv:  # without patients the dates of studies say nothing
        if any((images / f"{METADATA}{end}").is_file() for end in ("", ".gz")):
            metadata = read_metadata(images)
        else:
            note(f"no {METADATA} in {images}: studies have no date, ages stay unknown")
    releases = []
    for (name, split), table in TABLES.items():
        if task not in ("all", name[-1]):
            continue
        path = find_table(source, table)
        judged = label_columns(path)
        note_count(f"labels in {path.name}", len(judged), NUM_LABELS[name])
        items = list(read_items(path, judged, patients, metadata))
        if (name, split) in NUM_IMAGES:
            note_count(f"images in {path.name}", len(items), NUM_IMAGES[name, split])
        releases.append(
            Release(
                source=name,
                split=split,
                version="CXR-LT 2024",
                licence=LICENCE,
                items=items,
                convert=partial(convert, images, name, split, judged),
                name_of=_name,
            )
        )
    return releases


def label_columns(path: Path) -> list[str]:
    """Columns of a table that are labels. Raises ValueError when there are none."""
    first = next(read_table(path, KEYS), None)
    # By exclusion: the tables of the tasks have other labels, 40 and 26.
    labels = [name for name in first or {} if name not in NOT_LABELS]
    if not labels:
        raise ValueError(f"{path} has no row or no label column")
    return labels


def read_items(
    path: Path,
    judged: list[str],
    patients: dict[str, Patient],
    metadata: dict[str, Acquisition],
) -> Iterator[Item]:
    """Rows of one table."""
    for row in read_table(path, (*KEYS, *judged)):
        # An empty cell is not 0: the label was not judged, and "absent" would be made up.
        wrong = [name for name in judged if row[name] not in VALUES]
        patient = patients.get(row["subject_id"], NOBODY)
        year = metadata[row["dicom_id"]].year if row["dicom_id"] in metadata else None
        yield Item(
            dicom_id=row["dicom_id"],
            # Ids as MIMIC-CXR's records have them, or the linter could not see the same image in
            # both.
            subject_id=row["subject_id"].removeprefix("p"),
            study_id=row["study_id"].removeprefix("s"),
            path=row.get("fpath", ""),
            view=row.get("ViewPosition", ""),
            labels=tuple(name for name in judged if VALUES.get(row[name])),
            problem=f"label {wrong[0]} is {row[wrong[0]]!r}, not 0 or 1" if wrong else "",
            sex=patient.sex,
            age=patient.age_in(year),
            race=patient.race,
        )


def _name(item: Item) -> str:
    return f"s{item.study_id}/{item.dicom_id}"


def convert(images: Path, source: str, split: str, judged: list[str], item: Item) -> Record:
    """One image with its labels. Raises UnusableItemError with the reason."""
    if item.problem:
        # Here and not when the table is read, so that the ledger counts it like any other item.
        raise UnusableItemError(item.problem)
    # By its ids, unless the path of the table, with or without "files/", leads to a file of the
    # same name: another image under a stated path would carry this one's labels.
    relative = image_path(item.subject_id, item.study_id, item.dicom_id)
    for stated in (item.path, f"files/{item.path}"):
        same_name = item.path and Path(stated).name == Path(relative).name
        if same_name and (images / stated).is_file():
            relative = stated
            break
    image = read_image(file_inside(images, relative))
    name = f"{source}/{item.dicom_id}"
    answer = ", ".join(item.labels) or NO_FINDING
    return Record(
        id=name,
        image=image.data,
        height=image.height,
        width=image.width,
        conversations=pair(draw_for(name).choice(FINDING_QUESTIONS), answer, "open"),
        task="classification",
        modality="xray",
        anatomy="chest",
        # No present label means no finding; an empty list would read as "not labelled".
        labels=list(item.labels) or [NO_FINDING],
        source=source,
        split=split,
        patient_id=patient_key(item.subject_id),
        study_id=study_key(item.study_id),
        sex=item.sex,
        age=item.age,
        race=item.race,
        # A label that is missing here and was never judged says nothing.
        extra={"view": item.view, "judged_labels": judged},
    )


if __name__ == "__main__":
    run_program(main)

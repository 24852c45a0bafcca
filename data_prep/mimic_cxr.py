"""MIMIC-CXR -> record folders of chest X-rays with their reports.

    python data_prep/mimic_cxr.py --source mimic-cxr-jpg --reports mimic-cxr \\
        --mimic-iv mimic-iv --output prepared --num-workers 8

Layout of --source (MIMIC-CXR-JPG 2.0.0 or 2.1.0; every table may be .csv or .csv.gz):

    mimic-cxr-2.0.0-metadata.csv    dicom_id, subject_id, study_id, ViewPosition, StudyDate, ...
    mimic-cxr-2.0.0-split.csv       dicom_id, study_id, subject_id, split
    mimic-cxr-2.0.0-chexpert.csv    subject_id, study_id, one column per finding (1, 0, -1, empty)
    files/p10/p10000032/s50414267/<dicom_id>.jpg

of --reports (mimic-cxr-reports.zip extracted; default: --source):

    files/p10/p10000032/s50414267.txt

and of --mimic-iv (optional; without it sex, age and race stay unknown):

    hosp/patients.csv, hosp/admissions.csv

One record is one image; all images of a study have its report, findings and impression. The
official split is kept, validate under the name val; train on train only. Age is anchor_age plus the
years between; a race on which admissions disagree stays unknown. Labels are the findings CheXpert
calls present; uncertain ones are in the record's extra. Access: PhysioNet, credentialed; the
records fall under the same agreement and must not leave it.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

from biascare.records import Record
from data_prep.mimic.patients import NOBODY, Patient, read_patients, unknown_subjects, year_of
from data_prep.mimic.reports import report_sections
from data_prep.pipeline import shards
from data_prep.pipeline.program import run_program
from data_prep.pipeline.release_files import (
    file_inside,
    find_table,
    note,
    note_count,
    number_of,
    read_image,
    read_table,
)
from data_prep.pipeline.shards import Release, UnusableItemError
from data_prep.wording.conversations import REPORT_QUESTIONS, draw_for, pair

SPLITS = {"train": "train", "validate": "val", "test": "test"}
"""Word of the release -> split of the records."""

NUM_IMAGES = {"train": 368_960, "val": 2_991, "test": 5_159}
METADATA = "mimic-cxr-2.0.0-metadata.csv"
SPLIT = "mimic-cxr-2.0.0-split.csv"
CHEXPERT = "mimic-cxr-2.0.0-chexpert.csv"
KEYS = ("dicom_id", "subject_id", "study_id")
PRESENT, UNCERTAIN = 1.0, -1.0
LICENCE = "MIMIC-CXR: PhysioNet Credentialed Health Data License 1.5.0; not to be shared"


class Item(NamedTuple):
    """One image."""

    dicom_id: str
    subject_id: str
    study_id: str
    view: str
    sex: str | None
    age: float | None
    race: str | None
    labels: tuple[str, ...]
    uncertain: tuple[str, ...]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, type=Path, help="MIMIC-CXR-JPG")
    parser.add_argument("--reports", type=Path, help="folder above the reports' folder files")
    parser.add_argument("--mimic-iv", type=Path, help="MIMIC-IV, for sex, age and race")
    shards.add_arguments(parser)
    args = parser.parse_args(arguments)
    shards.run(args, plan(args.source, args.reports or args.source, args.mimic_iv))


def plan(source: Path, reports: Path, mimic_iv: Path | None) -> list[Release]:
    """One release per official split."""
    patients = read_patients(mimic_iv) if mimic_iv else {}
    if not mimic_iv:
        note("no --mimic-iv given: sex, age and race of all patients stay unknown")
    items: dict[str, list[Item]] = {split: [] for split in SPLITS.values()}
    findings = read_findings(find_table(source, CHEXPERT))
    metadata = read_metadata(source)
    for row in read_table(find_table(source, SPLIT), (*KEYS, "split")):
        # Not put aside: an unknown word means that this is another table.
        if row["split"] not in SPLITS:
            raise ValueError(f"{SPLIT}: split is one of {list(SPLITS)}, got {row['split']!r}")
        items[SPLITS[row["split"]]].append(_item(row, metadata, patients, findings))
    for split, found in items.items():
        note_count(f"MIMIC-CXR {split} images", len(found), NUM_IMAGES[split])
        # Told: for an audit by sex or race these patients are not there.
        missing = unknown_subjects((item.subject_id for item in found), patients)
        if mimic_iv and missing:
            note(f"{missing:,} {split} patients are not in MIMIC-IV")
    return [
        Release(
            source="mimic_cxr",
            split=split,
            version="MIMIC-CXR-JPG 2.0.0 tables",
            licence=LICENCE,
            items=found,
            convert=partial(convert, source, reports, split),
            name_of=_name,
        )
        for split, found in items.items()
        if found
    ]


class Acquisition(NamedTuple):
    """What the metadata table says about an image."""

    view: str
    year: int | None


def read_metadata(source: Path) -> dict[str, Acquisition]:
    """dicom_id -> view and (shifted) year of the study."""
    columns = ("dicom_id", "ViewPosition", "StudyDate")
    rows = read_table(find_table(source, METADATA), columns)
    return {
        row["dicom_id"]: Acquisition(row["ViewPosition"], year_of(row["StudyDate"])) for row in rows
    }


def read_findings(path: Path) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """study_id -> (present, uncertain) findings of CheXpert, in the order of the columns."""
    findings = {}
    for row in read_table(path, ("subject_id", "study_id")):
        # As numbers: copies of the table write 1 and 1.0. Empty: the report does not mention it.
        values = {
            name: number_of(value, f"{CHEXPERT}, {name}")
            for name, value in row.items()
            if value and name not in KEYS
        }
        present = tuple(name for name, value in values.items() if value == PRESENT)
        uncertain = tuple(name for name, value in values.items() if value == UNCERTAIN)
        findings[row["study_id"]] = present, uncertain
    return findings


def _item(
    row: dict[str, str],
    metadata: dict[str, Acquisition],
    patients: dict[str, Patient],
    findings: dict[str, tuple[tuple[str, ...], tuple[str, ...]]],
) -> Item:
    # The split table is the list of images; what another table lacks stays unknown.
    acquired = metadata.get(row["dicom_id"], Acquisition("", None))
    patient = patients.get(row["subject_id"], NOBODY)
    present, uncertain = findings.get(row["study_id"], ((), ()))
    return Item(
        dicom_id=row["dicom_id"],
        subject_id=row["subject_id"],
        study_id=row["study_id"],
        view=acquired.view,
        sex=patient.sex,
        age=patient.age_in(acquired.year),
        race=patient.race,
        labels=present,
        uncertain=uncertain,
    )


def image_path(subject_id: str, study_id: str, dicom_id: str) -> str:
    """Where MIMIC-CXR-JPG keeps an image, relative to its root."""
    return f"files/p{subject_id[:2]}/p{subject_id}/s{study_id}/{dicom_id}.jpg"


def patient_key(subject_id: str) -> str:
    """patient_id of records: the same in every dataset made of MIMIC images."""
    return f"mimic/p{subject_id}"


def study_key(study_id: str) -> str:
    """study_id of records: the same in every dataset made of MIMIC images."""
    return f"mimic/s{study_id}"


def _name(item: Item) -> str:
    return f"s{item.study_id}/{item.dicom_id}"


def convert(source: Path, reports: Path, split: str, item: Item) -> Record:
    """One image with the report of its study. Raises UnusableItemError with the reason."""
    # Before the image, which is the larger file.
    answer = read_report(reports, item.subject_id, item.study_id)
    image = read_image(
        file_inside(source, image_path(item.subject_id, item.study_id, item.dicom_id))
    )
    name = f"mimic_cxr/{item.dicom_id}"
    return Record(
        id=name,
        image=image.data,
        height=image.height,
        width=image.width,
        conversations=pair(draw_for(name).choice(REPORT_QUESTIONS), answer, "report"),
        task="report",
        modality="xray",
        anatomy="chest",
        # Present ones alone: an uncertain finding is neither there nor absent.
        labels=list(item.labels),
        source="mimic_cxr",
        split=split,
        patient_id=patient_key(item.subject_id),
        study_id=study_key(item.study_id),
        sex=item.sex,
        age=item.age,
        race=item.race,
        extra={"view": item.view, "uncertain_labels": list(item.uncertain)},
    )


def read_report(reports: Path, subject_id: str, study_id: str) -> str:
    """Findings and impression of a study. Raises UnusableItemError with the reason."""
    relative = f"files/p{subject_id[:2]}/p{subject_id}/s{study_id}.txt"
    try:
        # One stray byte should not cost a report.
        text = file_inside(reports, relative).read_text(encoding="utf-8", errors="replace")
    except UnusableItemError as error:
        raise UnusableItemError(f"report: {error}") from error
    sections = report_sections(text)
    if sections is None:
        raise UnusableItemError("report without findings and impression")
    return sections.text()


if __name__ == "__main__":
    run_program(main)

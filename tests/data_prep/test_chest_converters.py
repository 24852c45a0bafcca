"""MIMIC-CXR and CXR-LT: reports read as they are written, patients joined, ids that meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from biascare.checks.lint import lint
from data_prep import cxr_lt, mimic_cxr
from data_prep.mimic.patients import Patient, race_of, read_patients, year_of
from data_prep.mimic.reports import Sections, report_sections
from data_prep.wording.conversations import REPORT_QUESTIONS
from tests.data_prep.raw_releases import (
    SETTINGS,
    picture,
    put,
    put_table,
    rows_of,
    run,
    said,
    skipped,
)

PLAIN = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with cough  // eval for pneumonia

 COMPARISON:  None.

 FINDINGS: 

 The lungs are clear.  There is no
 pleural effusion.

 Heart size is normal.

 IMPRESSION: 

 No acute process.
"""


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (
            PLAIN,
            ("The lungs are clear. There is no pleural effusion. Heart size is normal.",
             "No acute process."),
        ),
        (  # a preliminary reading above the final one, and what follows the impression
            " WET READ: ___ ___ 9:05 AM\n  Findings: right pneumothorax.\n"
            "______________________________________________________________________________\n"
            "                                 FINAL REPORT\n"
            " CHEST RADIOGRAPH\n\n FINDINGS:  No pneumothorax.\n\n"
            " IMPRESSION:  Normal.\n\n NOTIFICATION:  Dr. ___ was told at 10:02 am.\n",
            ("No pneumothorax.", "Normal."),
        ),
        (  # odd case, a misspelt header, a list
            "FINAL REPORT\n Findings : Clear lungs.\n Impresson:\n 1. Normal.\n 2. Stable.\n",
            ("Clear lungs.", "1. Normal. 2. Stable."),
        ),
        (" FINAL REPORT\n IMPRESSION: AP chest compared to ___:\n\n Stable edema.\n",
         ("", "AP chest compared to ___: Stable edema.")),
        (" FINAL REPORT\n HISTORY: Cough.\n\n FINDINGS: Clear.\n", ("Clear.", "")),
        (" FINAL REPORT\n FINDINGS AND IMPRESSION: Clear.\n", ("Clear.", "")),
        (" FINAL REPORT\n CONCLUSION: Clear.\n", ("", "Clear.")),
        (  # no header for the description, which stands below the history
            " FINAL REPORT\n AP CHEST, 8:46 A.M.\n\n HISTORY:  Fever\n and cough.\n\n"
            " Moderate edema has improved.\n",
            ("AP CHEST, 8:46 A.M. Moderate edema has improved.", ""),
        ),
        (  # two sections on one line
            " FINAL REPORT\n COMPARISON: None. FINDINGS: Clear. IMPRESSION: Normal.\n",
            ("Clear.", "Normal."),
        ),
        (" FINAL REPORT\n CHEST, TWO VIEWS:  Normal heart.\n", ("Normal heart.", "")),
        (  # a colon inside a sentence is no header
            " FINAL REPORT\n FINDINGS: Tubes:\n Lines and tubes: unchanged. Lungs clear.\n",
            ("Tubes: Lines and tubes: unchanged. Lungs clear.", ""),
        ),
    ],
)  # fmt: skip
def test_findings_and_impression_are_found(report: str, expected: tuple[str, str]) -> None:
    assert report_sections(report) == Sections(*expected)


@pytest.mark.parametrize(
    "report", ["", " FINAL REPORT\n\n", "INDICATION: Fever\n\nCOMPARISON: ___"]
)
def test_a_report_that_describes_nothing_has_no_sections(report: str) -> None:
    assert report_sections(report) is None


def test_the_answer_names_the_sections_that_are_there() -> None:
    assert Sections("Clear.", "Normal.").text() == "Findings: Clear.\nImpression: Normal."
    assert Sections("", "Normal.").text() == "Impression: Normal."


def test_age_is_the_anchor_age_moved_by_the_years_between() -> None:
    patient = Patient(sex="F", anchor_age=52, anchor_year=2180, race=None)
    assert [patient.age_in(year) for year in (2180, 2183, 2178, None)] == [52.0, 55.0, 50.0, None]
    assert patient.age_in(2100) is None  # before birth
    assert [year_of(date) for date in ("21800506", "21800506.0", "2180-05-06", "", "2180")] == [
        2180, 2180, 2180, None, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stated", "race"),
    [
        ("WHITE - RUSSIAN", "white"), ("BLACK/CAPE VERDEAN", "black"), ("ASIAN - KOREAN", "asian"),
        ("HISPANIC OR LATINO", "hispanic"), ("UNKNOWN", None), ("UNABLE TO OBTAIN", None),
        ("AMERICAN INDIAN/ALASKA NATIVE", "native american"), ("", None),
        ("NATIVE HAWAIIAN OR OTHER PACIFIC ISLANDER", "pacific islander"),
        ("MULTIPLE RACE/ETHNICITY", "multiple"), ("PATIENT DECLINED TO ANSWER", None),
    ],
)  # fmt: skip
def test_race_has_few_words_and_unknown_is_none(stated: str, race: str | None) -> None:
    assert race_of(stated) == race


def put_mimic_iv(folder: Path, column: str = "race") -> Path:
    patients = [
        {"subject_id": 10000032, "gender": "F", "anchor_age": 52, "anchor_year": 2180, "dod": ""},
        {"subject_id": 10000764, "gender": "M", "anchor_age": 86, "anchor_year": 2132, "dod": ""},
        {"subject_id": 10000898, "gender": "", "anchor_age": 0, "anchor_year": 2188, "dod": ""},
        {"subject_id": 9, "gender": "X", "anchor_age": "old", "anchor_year": 2188, "dod": ""},
    ]
    stays = [(10000032, "WHITE"), (10000032, "UNKNOWN"), (10000032, "WHITE - RUSSIAN"),
             (10000764, "BLACK/AFRICAN"), (10000764, "OTHER"), (10000898, "MARTIAN")]  # fmt: skip
    put_table(folder / "hosp" / "patients.csv.gz", patients)
    admissions = [{"subject_id": s, "hadm_id": n, column: r} for n, (s, r) in enumerate(stays)]
    put_table(folder / "hosp" / "admissions.csv.gz", admissions)
    return folder


def test_a_race_on_which_admissions_disagree_stays_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patients = read_patients(put_mimic_iv(tmp_path / "iv", "ethnicity"))
    assert {subject: patient.race for subject, patient in patients.items()} == {
        "10000032": "white", "10000764": None, "10000898": None, "9": None,
    }  # fmt: skip
    assert patients["10000898"].sex is None
    assert patients["10000898"].anchor_age is None
    assert (patients["9"].sex, patients["9"].anchor_age) == (None, None)
    notes = capsys.readouterr().out
    assert "MARTIAN" in notes
    assert "patients.csv.gz: of 1 patients, sex unreadable" in notes


IMAGES = (  # dicom, subject, study, split, view, date
    ("02aa804e", "10000032", "50414267", "train", "PA", "21800506"),
    ("174413ec", "10000032", "50414267", "train", "LATERAL", "21800506"),
    ("1a2b3c4d", "10000764", "57375967", "train", "AP", "21331015"),
    ("5e6f7a8b", "10000898", "50771383", "train", "", "21880803"),
    ("9c0d1e2f", "10000935", "50578979", "validate", "PA", "21870823"),
    ("aabbccdd", "10000980", "50985099", "test", "AP", "21850815"),
    ("00112233", "10000980", "51967283", "train", "AP", "21850815"),
)


@pytest.fixture
def mimic(tmp_path: Path) -> Path:
    """MIMIC-CXR-JPG with the reports beside the images; the last image has no report."""
    source = tmp_path / "mimic"
    split, metadata, chexpert = [], [], {}
    for number, (dicom, subject, study, name, view, date) in enumerate(IMAGES):
        keys: dict[str, Any] = {"dicom_id": dicom, "study_id": study, "subject_id": subject}
        split.append(keys | {"split": name})
        metadata.append(keys | {"ViewPosition": view, "Rows": 4, "StudyDate": date})
        findings = {"Edema": "1.0", "Pneumonia": "-1.0", "No Finding": "", "Fracture": "0.0"}
        chexpert[study] = {"subject_id": subject, "study_id": study} | findings
        put(source / mimic_cxr.image_path(subject, study, dicom), picture(number))
        report = source / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}.txt"
        put(report, PLAIN)
    report.unlink()
    put(report.parent.parent / "p10000898" / "s50771383.txt", "INDICATION: Fever")
    put_table(source / f"{mimic_cxr.SPLIT}.gz", split)
    put_table(source / mimic_cxr.METADATA, metadata)
    put_table(source / f"{mimic_cxr.CHEXPERT}.gz", list(chexpert.values()))
    return source


def test_every_image_of_a_study_has_its_report_and_its_patient(
    mimic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_mimic_iv(tmp_path / "iv")
    more = ("--mimic-iv", str(tmp_path / "iv"), "--max-skipped", "0.5")
    run(mimic_cxr, mimic, tmp_path / "out", *more)
    out = tmp_path / "out" / "mimic_cxr"
    train = rows_of(out / "train")
    assert list(train) == [f"mimic_cxr/{image[0]}" for image in IMAGES[:3]]
    first, second, third = train.values()
    answer = (
        "Findings: The lungs are clear. There is no pleural effusion. Heart size is normal.\n"
        "Impression: No acute process."
    )
    for row in (first, second):
        ((question, text, kind),) = said(row)
        assert (text, kind) == (answer, "report")
        assert question in REPORT_QUESTIONS
        assert (row["patient_id"], row["study_id"]) == ("mimic/p10000032", "mimic/s50414267")
        assert (row["sex"], row["age"], row["race"]) == ("F", 52.0, "white")
        assert (row["labels"], row["modality"], row["task"]) == (["Edema"], "xray", "report")
    assert second["extra"] == {"view": "LATERAL", "uncertain_labels": ["Pneumonia"]}
    assert (third["sex"], third["age"], third["race"]) == ("M", 87.0, None)
    assert first["image"] == picture(0)
    assert skipped(out / "train") == [
        ("s50771383/5e6f7a8b", "report without findings and impression"),
        ("s51967283/00112233", "report: file missing"),
    ]
    assert len(rows_of(out / "val")) == len(rows_of(out / "test")) == 1
    notes = capsys.readouterr().out
    assert "expected 368,960 MIMIC-CXR train images, found 5" in notes
    assert "1 train patients are not in MIMIC-IV" in notes


def test_without_mimic_iv_patients_stay_unknown_and_it_says_so(
    mimic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (train, *_) = mimic_cxr.plan(mimic, mimic, None)
    assert {(item.sex, item.age, item.race) for item in train.items} == {(None, None, None)}
    assert "sex, age and race of all patients stay unknown" in capsys.readouterr().out


def test_a_table_without_its_columns_names_the_nearest(mimic: Path) -> None:
    put_table(mimic / mimic_cxr.METADATA, [{"dicom": "x", "ViewPosition": "", "StudyDate": ""}])
    with pytest.raises(ValueError, match=r"lacks the columns \['dicom_id'\].*mean 'dicom'"):
        mimic_cxr.plan(mimic, mimic, None)


def lt_row(image: tuple[str, ...], prefix: str = "", **labels: str) -> dict[str, str]:
    dicom, subject, study, _, view, _ = image
    path = prefix + mimic_cxr.image_path(subject, study, dicom).removeprefix("files/")
    keys = {"dicom_id": dicom, "subject_id": subject, "study_id": study, "ViewPosition": view}
    return keys | {"fpath": path, "Edema": "0", "Hernia": "0.0"} | labels


@pytest.fixture
def lt_source(tmp_path: Path) -> Path:
    source = tmp_path / "cxr-lt"
    train = [
        lt_row(IMAGES[0], Edema="1", Hernia="1.0"),
        lt_row(IMAGES[2], prefix="files/"),
        lt_row(IMAGES[3], Edema=""),
        lt_row(IMAGES[3]) | {"dicom_id": "gone", "fpath": ""},
    ]
    put_table(source / "train_labeled.csv", train)
    for task, image in ((1, IMAGES[4]), (2, IMAGES[5])):
        put_table(source / f"development_labeled_task{task}.csv.gz", [lt_row(image)])
        put_table(source / f"test_labeled_task{task}.csv", [lt_row(IMAGES[5], Hernia="1")])
    return source


def test_cxr_lt_lists_present_labels_with_the_ids_of_mimic(
    lt_source: Path, mimic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_mimic_iv(tmp_path / "iv")
    more = ("--images", str(mimic), "--mimic-iv", str(tmp_path / "iv"), "--max-skipped", "0.5")
    run(cxr_lt, lt_source, tmp_path / "out", *more)
    train = rows_of(tmp_path / "out" / "cxr_lt_task1" / "train")
    both, none = train["cxr_lt_task1/02aa804e"], train["cxr_lt_task1/1a2b3c4d"]
    assert [text for _, text, _ in said(both)] == ["Edema, Hernia"]
    assert [text for _, text, _ in said(none)] == ["No finding"]
    assert (both["labels"], none["labels"]) == (["Edema", "Hernia"], ["No finding"])
    assert both["extra"]["judged_labels"] == ["Edema", "Hernia"]
    assert (both["patient_id"], both["study_id"]) == ("mimic/p10000032", "mimic/s50414267")
    assert (both["sex"], both["age"], both["race"]) == ("F", 52.0, "white")
    assert skipped(tmp_path / "out" / "cxr_lt_task1" / "train") == [
        ("s50771383/5e6f7a8b", "label Edema is '', not 0 or 1"),
        ("s50771383/gone", "file missing"),
    ]
    (test,) = rows_of(tmp_path / "out" / "cxr_lt_task2" / "test").values()
    assert (test["id"], test["labels"]) == ("cxr_lt_task2/aabbccdd", ["Hernia"])
    assert "expected 406 images in test_labeled_task2.csv, found 1" in capsys.readouterr().out


def test_the_ids_of_cxr_lt_and_mimic_cxr_meet(lt_source: Path, mimic: Path) -> None:
    def studies(releases: list[Any], split: str) -> set[str]:
        return {i.study_id for r in releases if r.split == split for i in r.items}

    ours = studies(cxr_lt.plan(lt_source, mimic, None, "1"), "train")
    theirs = studies(mimic_cxr.plan(mimic, mimic, None), "train")
    assert ours <= theirs


def test_the_linter_sees_a_training_study_in_a_held_out_set(
    lt_source: Path, mimic: Path, tmp_path: Path
) -> None:
    put_table(lt_source / "test_labeled_task2.csv", [lt_row(IMAGES[1], Edema="1")])
    run(mimic_cxr, mimic, tmp_path / "out", "--max-skipped", "0.5")
    run(cxr_lt, lt_source, tmp_path / "out", "--images", str(mimic), "--task", "2")
    folders = [tmp_path / "out" / "mimic_cxr" / "train", tmp_path / "out" / "cxr_lt_task2" / "test"]
    codes = {finding.code for finding in lint(folders, SETTINGS).findings}
    assert {"leak-study", "leak-patient", "leak-image"} <= codes


def test_one_task_of_cxr_lt_needs_only_its_tables(lt_source: Path, mimic: Path) -> None:
    (lt_source / "train_labeled.csv").unlink()
    releases = cxr_lt.plan(lt_source, mimic, None, "2")
    assert [(r.source, r.split) for r in releases] == [
        ("cxr_lt_task2", "val"),
        ("cxr_lt_task2", "test"),
    ]

"""A user's own table of questions: one spelling of answers, nothing guessed, nothing dropped."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from biascare.data.transforms import decode_image
from biascare.records import Records
from data_prep import table
from data_prep.pipeline.attributes import UNREADABLE_AGE
from data_prep.pipeline.metadata import COLUMNS as ALL_COLUMNS
from data_prep.pipeline.metadata import question_in
from tests.data_prep.raw_releases import assert_lint_passes

COLUMNS = ("image", "question", "answer")


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (10, 20, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def make_images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png())
    return folder


def write_csv(path: Path, rows: list[tuple[str, ...]], delimiter: str = ",") -> Path:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def run(path: Path, images: Path, output: Path, *more: str) -> Path:
    base = ["--table", str(path), "--images", str(images), "--name", "mine", "--modality", "xray"]
    table.main([*base, "--output", str(output), *more])
    assert_lint_passes(output)
    return output / "mine"


def turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn["text"], turn["kind"]) for turn in row["conversations"]]


def reasons(folder: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in folder.read_text().splitlines()]
    return [(line["item"], line["reason"]) for line in lines]


def row(**values: str) -> dict[str, str]:
    return dict.fromkeys(ALL_COLUMNS, "") | {"image": "a.png", "question": "q?"} | values


@pytest.mark.parametrize(
    ("name", "delimiter"), [("t.csv", ","), ("t.tsv", "\t"), ("t.csv.gz", ","), ("t.tsv.gz", "\t")]
)
def test_rows_of_one_image_become_one_record(tmp_path: Path, name: str, delimiter: str) -> None:
    images = make_images(tmp_path / "img", "p1/a.png", "b.png")
    rows = [
        COLUMNS,
        ("p1/a.png", "Is the heart, as\nseen here, large?", "YES."),
        ("b.png", "Où?", "côté gauche"),
        ("p1/a.png", 'What is "this"?', "A rib"),
        ("p1/a.png", 'What is "this"?', "A rib"),
    ]
    folder = run(write_csv(tmp_path / name, rows, delimiter), images, tmp_path / "out")
    records = Records(folder / "train")
    assert [records[k]["id"] for k in range(2)] == ["mine/p1/a.png", "mine/b.png"]
    assert turns(records[0]) == [
        ("Is the heart, as seen here, large?", "closed"), ("yes", "closed"),
        ('What is "this"?', "open"), ("A rib", "open"),
    ]  # fmt: skip
    assert turns(records[1])[1] == ("côté gauche", "open")
    assert records[0]["image"] == png()
    assert (records[0]["task"], records[0]["modality"]) == ("vqa", "xray")
    assert [records[0][n] for n in ("sex", "age", "race", "patient_id", "study_id")] == [None] * 5


def test_columns_may_have_other_names_and_attributes_are_canonical(tmp_path: Path) -> None:
    images = make_images(tmp_path / "img", "a.png")
    path = tmp_path / "t.jsonl"
    entry = {
        "file": "a.png", "q": "Is it?", "answer": True, "sex": "Female", "years": 63.5,
        "race": "Black or African American", "modality": "CT", "split": "validation",
        "patient_id": 17, "study_id": None,
    }  # fmt: skip
    path.write_text(json.dumps(entry) + "\n\n")
    more = [f"--column={item}" for item in ("image=file", "question=q", "age=years")]
    found = Records(run(path, images, tmp_path / "out", *more) / "val")[0]
    assert (found["sex"], found["age"], found["race"]) == ("F", 63.5, "black or african american")
    assert (found["modality"], found["patient_id"], found["study_id"]) == ("ct", "17", None)
    assert turns(found)[1] == ("yes", "closed")


@pytest.mark.parametrize("answer", ["B", "b.", "the spleen", "B:"])
def test_the_answer_of_a_choice_is_a_letter_or_a_text(answer: str) -> None:
    found = question_in(row(answer=answer, A="the liver", B="the spleen", C="the aorta"))
    assert found.kind == "choice"
    assert (found.text, found.options) == ("q?", ("the liver", "the spleen", "the aorta"))
    assert found.answer == "the spleen"


def test_a_letter_that_is_the_text_of_an_option_means_the_text() -> None:
    assert question_in(row(answer="A", A="B", B="A")).answer == "A"
    assert question_in(row(answer="B", A="x", B="y")).answer == "y"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"answer": "D", "A": "x", "B": "y"}, "'D' is not exactly one of the options"),
        ({"answer": "x", "A": "x", "B": "x"}, "'x' is not exactly one"),
        ({"answer": "x", "A": "x"}, "at least two options"),
        ({"answer": "x", "A": "x", "C": "y"}, "leave out a letter"),
        ({"answer": ""}, "question or answer is empty"),
        ({"answer": " ", "kind": "report"}, "question or answer is empty"),
        ({"answer": "x", "kind": "essay"}, "got 'essay', expected one of closed, open, choice"),
    ],
)
def test_a_row_that_is_no_question_says_why(values: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        question_in(row(**{key: value.strip() for key, value in values.items()}))


def test_a_report_keeps_its_lines_and_a_stated_kind_wins() -> None:
    found = question_in(row(answer="FINDINGS: x\n\nIMPRESSION: y", kind="report"))
    assert (found.answer, found.kind) == ("FINDINGS: x\n\nIMPRESSION: y", "report")
    assert question_in(row(answer="Yes", kind="open")) == ("q?", "Yes", "open", ())


def test_bad_rows_are_in_the_ledger_and_good_ones_of_the_same_image_are_used(
    tmp_path: Path,
) -> None:
    images = make_images(tmp_path / "img", "a.png", "b.png", "c.png")
    (images / "cut.png").write_bytes(png()[:40])
    rows = [
        (*COLUMNS, "sex", "age"),
        ("a.png", "q?", "x", "F", ""),
        ("a.png", "r?", "", "", ""),
        ("b.png", "q?", "x", "F", ""),
        ("b.png", "r?", "x", "M", ""),
        ("c.png", "q?", "x", "", "1954"),
        ("cut.png", "q?", "x", "", ""),
        ("gone.png", "q?", "x", "", ""),
        ("../t.csv", "q?", "x", "", ""),
        ("", "q?", "x", "", ""),
    ]
    path = write_csv(tmp_path / "t.csv", rows)
    folder = run(path, images, tmp_path / "out", "--max-skipped", "0.9")
    assert turns(Records(folder / "train")[0]) == [("q?", "open"), ("x", "open")]
    # An age that is none costs itself; what is written there is not repeated.
    assert [row["age"] for row in Records(folder / "train")] == [None, None]
    assert reasons(folder / "train.skipped.jsonl") == [
        ("a.png (line 3)", "question or answer is empty"),
        ("b.png (lines 4, 5)", "rows of this image disagree on sex: ['F', 'M']"),
        ("c.png (line 6)", UNREADABLE_AGE),
        ("cut.png (line 7)", "image unreadable"),
        ("gone.png (line 8)", "file missing"),
        ("../t.csv (line 9)", "path leaves the source"),
        ("(row without an image) (line 10)", "row without an image"),
    ]


def test_splits_follow_the_patient(tmp_path: Path) -> None:
    names = [f"p{k % 20}_{k}.png" for k in range(60)]
    images = make_images(tmp_path / "img", *names)
    path = write_csv(tmp_path / "t.csv", [COLUMNS, *((name, "q?", "x") for name in names)])
    shares = ("--test-share", "0.3", "--val-share", "0.2", "--patient-regex", r"(p\d+)_")
    folder = run(path, images, tmp_path / "out", *shares)
    opened = [Records(folder / split) for split in ("train", "val", "test")]
    patients = [{r[k]["patient_id"] for k in range(len(r))} for r in opened]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 20
    assert sum(len(records) for records in opened) == 60


def test_a_split_of_unknown_patients_is_told_with_both_ways_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"p{k}.png" for k in range(20)]
    images = make_images(tmp_path / "img", *names)
    rows = [(*COLUMNS, "patient_id", "split"), ("p0.png", "q?", "x", "17", "")]
    rows += [(name, "q?", "x", "", "") for name in names[1:19]]
    rows += [("p19.png", "q?", "x", "", "train")]  # not drawn
    path = write_csv(tmp_path / "t.csv", rows)
    run(path, images, tmp_path / "out", "--test-share", "0.5")
    said = " ".join(capsys.readouterr().out.split())
    assert "the patient of 18 of 19 images is not known" in said
    assert "--patient-regex finds" in said and "--column patient_id=YOURS" in said
    run(path, images, tmp_path / "all")
    assert "is not known" not in capsys.readouterr().out


def test_a_listed_name_that_no_row_has_is_an_error(tmp_path: Path) -> None:
    images = make_images(tmp_path / "img", "a.png", "b.png")
    path = write_csv(tmp_path / "t.csv", [COLUMNS, ("a.png", "q?", "x")])
    (tmp_path / "train.txt").write_text("a.png\nb.png\n")
    with pytest.raises(ValueError, match=r"1 names of --split-list are nowhere .*: 'b';"):
        run(path, images, tmp_path / "out", f"--split-list=train={tmp_path / 'train.txt'}")
    (tmp_path / "train.txt").write_text("b.png\n")
    with pytest.raises(ValueError, match=r"line 2: image 'a\.png' is in no --split-list"):
        run(path, images, tmp_path / "out", f"--split-list=train={tmp_path / 'train.txt'}")


def test_lines_are_counted_where_a_row_begins_and_many_are_cut(tmp_path: Path) -> None:
    images = make_images(tmp_path / "img", "a.png", "b.png", "c.png")
    rows = [
        (*COLUMNS, "age"),
        ("a.png", "q\n\nr?", "x\ny", "61Y"),
        ("b.png", "q?", "", ""),
        *(("c.png", f"q{k}?", "x", "61 years") for k in range(7)),
        ("b.png", "q?", "x", "61.5"),
    ]
    path = write_csv(tmp_path / "t.csv", rows)
    folder = run(path, images, tmp_path / "out", "--max-skipped", "0.9")
    assert [row["age"] for row in Records(folder / "train")] == [61.0, 61.5, None]
    assert reasons(folder / "train.skipped.jsonl") == [
        ("b.png (line 6)", "question or answer is empty"),
        ("c.png (lines 7, 8, 9, 10, 11, ...)", UNREADABLE_AGE),
    ]


@pytest.mark.parametrize(
    ("header", "hint"),
    [
        (("img_name", "question", "answer"), "--column image=img_name"),
        (("Question", "file", "a"), "--column image=file --column question=Question"),
        (("x1", "question", "answer"), "--column image=NAME with one of these"),
    ],
)
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_column_of_another_name_is_suggested_as_the_option_that_names_it(
    tmp_path: Path, name: str, header: tuple[str, ...], hint: str
) -> None:
    if name.endswith(".csv"):
        path = write_csv(tmp_path / name, [header, ("a.png", "q?", "x")])
    else:
        path = tmp_path / name
        path.write_text(json.dumps(dict.fromkeys(header, "x")))
    with pytest.raises(ValueError, match=re.escape(hint)):
        run(path, make_images(tmp_path / "img", "a.png"), tmp_path / "out")


def test_lines_of_jsonl_count_empty_ones(tmp_path: Path) -> None:
    images = make_images(tmp_path / "img", "a.png")
    path = tmp_path / "t.jsonl"
    rows = [{"image": "a.png", "question": "q?", "answer": text} for text in ("x", "")]
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    folder = run(path, images, tmp_path / "out", "--max-skipped", "0.5")
    assert reasons(folder / "train.skipped.jsonl")[0][0] == "a.png (line 3)"


def test_an_archive_of_images_that_is_cut_off_says_so(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "img.zip", "w") as archive:
        archive.writestr("a.png", png() * 20)
    data = (tmp_path / "img.zip").read_bytes()
    path = write_csv(tmp_path / "t.csv", [COLUMNS, ("a.png", "q?", "x")])
    (tmp_path / "img.zip").write_bytes(data[:-60])
    with pytest.raises(
        ValueError, match=r"img\.zip is damaged or cut off: a zip file ends"
    ) as told:
        run(path, tmp_path / "img.zip", tmp_path / "out")
    assert "bz2" not in str(told.value)
    (tmp_path / "img.zip").write_bytes(data[10:100])
    with pytest.raises(ValueError, match="not a readable zip or tar file") as told:
        run(path, tmp_path / "img.zip", tmp_path / "out")
    assert "bz2" not in str(told.value)


def test_images_may_lie_in_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "img.zip", "w") as archive:
        archive.writestr("a/b.png", png())
    rows = [COLUMNS, ("a/b.png", "q?", "x"), ("c.png", "q?", "x")]
    path = write_csv(tmp_path / "t.csv", rows)
    folder = run(path, tmp_path / "img.zip", tmp_path / "out", "--max-skipped", "0.5")
    assert Records(folder / "train")[0]["image"] == png()
    assert reasons(folder / "train.skipped.jsonl") == [("c.png (line 3)", "archive member missing")]


def test_tables_that_are_none_say_what_is_missing(tmp_path: Path) -> None:
    images = make_images(tmp_path / "img", "a.png")
    path = write_csv(tmp_path / "t.csv", [("image", "quest", "answer"), ("a.png", "q", "a")])
    with pytest.raises(ValueError, match=r"lacks the columns \['question'\]"):
        run(path, images, tmp_path / "out")
    with pytest.raises(ValueError, match="--column takes NAME=YOURS with NAME one of image"):
        run(path, images, tmp_path / "out", "--column", "quest=question")
    path = tmp_path / "t.jsonl"
    path.write_text('{"image": "a.png"}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl:1 lacks \['question', 'answer'\]"):
        run(path, images, tmp_path / "out")
    path.write_text("[1, 2\n")
    with pytest.raises(ValueError, match=r"t\.jsonl:1 is not JSON"):
        run(path, images, tmp_path / "out")


def test_columns_that_are_facts_of_the_question_are_kept_with_it(tmp_path: Path) -> None:
    images = make_images(tmp_path / "img", "a.png")
    rows = [
        (*COLUMNS, "A", "B", "question_type", "kind of phrase"),
        ("a.png", "Which?", "B", "heart", "lung", "organ", "freeform"),
        ("a.png", "Is it?", "no", "", "", "", ""),
    ]
    path = write_csv(tmp_path / "t.csv", rows)
    more = ("--column", "phrase_type=kind of phrase")
    found = Records(run(path, images, tmp_path / "out", *more) / "train")[0]["conversations"]
    assert found[0]["options"] == ("heart", "lung") and found[1]["text"] == "lung"
    assert found[0]["facts"] == {"question_type": "organ", "phrase_type": "freeform"}
    assert found[2]["facts"] == {}


def test_grey_of_more_than_eight_bits_is_shown_by_one_window_of_the_data_set(
    tmp_path: Path,
) -> None:
    images = tmp_path / "img"
    images.mkdir()
    for name, values in (("a.png", [0, 1000, 2000]), ("b.tif", [1000, 1000, 3000])):
        Image.fromarray(np.array([values] * 3, np.uint16)).save(images / name)
    path = write_csv(tmp_path / "t.csv", [COLUMNS, ("a.png", "q", "yes"), ("b.tif", "q", "no")])
    split = run(path, images, tmp_path / "out", "--window", "0", "2000") / "train"
    found = Records(split)
    pixels = [decode_image(found[i]["image"])[0, :, 0].tolist() for i in range(2)]
    assert pixels == [[0, 128, 255], [128, 128, 255]]

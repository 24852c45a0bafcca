"""Question datasets: official splits, canonical answers, one record per image, nothing lost."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from biascare.checks.lint import lint
from biascare.records import Records
from data_prep import pathvqa, pmc_vqa, pubmedvision, slake, vqa_rad
from tests.data_prep.raw_releases import (
    SETTINGS,
    facts_of,
    masks_of,
    options_of,
    picture,
    put,
    put_json,
    put_table,
    put_zip,
    rows_of,
    run,
    said,
    skipped,
)


def png(values: list[list[int]], size: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(np.array(values, dtype=np.uint8))
    (image if size is None else image.resize(size)).save(buffer, "PNG")
    return buffer.getvalue()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def put_parquet(path: Path, rows: list[tuple[bytes | None, str, str]]) -> None:
    """As the `datasets` library uploads it; two rows per row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "image": pa.array(
                [data and {"bytes": data, "path": None} for data, _, _ in rows], image
            ),
            "question": [question for _, question, _ in rows],
            "answer": [answer for _, _, answer in rows],
        }
    )
    pq.write_table(table, path, row_group_size=2)


# --- VQA-RAD


def rad_entry(qid: int, **changes: Any) -> dict[str, Any]:
    base = {
        "qid": qid, "phrase_type": "freeform", "image_name": "synpic1.jpg", "image_organ": "CHEST",
        "image_case_url": "https://medpix.nlm.nih.gov/case?id=48e1dd0e-8552", "question": "Is it?",
        "answer": "Yes", "answer_type": "CLOSED", "question_type": "PRES",
    }  # fmt: skip
    return base | changes


@pytest.fixture
def rad(tmp_path: Path) -> Path:
    source = tmp_path / "VQA-RAD"
    for number in (1, 2):
        image = source / vqa_rad.IMAGE_FOLDER / f"synpic{number}.jpg"
        put(image, picture(number))
    entries = [
        rad_entry(1),
        rad_entry(2, question="Which  view\nis this?", answer="PA", answer_type="CLOSED "),
        rad_entry(3, phrase_type="para"),  # the same as qid 1
        rad_entry(4, question="How many?", answer=2, answer_type="OPEN", image_organ="ABD",
                  image_name="synpic2.jpg"),
        rad_entry(5, question="Is it so?", phrase_type="test_freeform", answer="No."),
        rad_entry(6, question="Is it so?", answer="no"),  # stands in the test set too
        rad_entry(7, question="Why?", answer=" ", answer_type="OPEN"),
        rad_entry(8, image_name="synpic3.jpg"),
    ]  # fmt: skip
    put_json(source / vqa_rad.JSON_NAME, entries)
    return source


def test_vqa_rad_original_keeps_the_official_questions_once(
    rad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(vqa_rad, rad, tmp_path / "out", "--max-skipped", "0.5")
    train = rows_of(tmp_path / "out" / "vqa_rad" / "train")
    assert list(train) == ["vqa_rad/synpic1", "vqa_rad/synpic2"]
    first, second = train.values()
    assert said(first) == [("Is it?", "yes", "closed"), ("Which view is this?", "PA", "closed")]
    assert said(second) == [("How many?", "2", "open")]
    assert (first["anatomy"], second["anatomy"]) == ("chest", "abdomen")
    assert (first["modality"], first["task"]) == ("radiology", "vqa")
    assert first["study_id"] == "medpix/48e1dd0e-8552"
    assert first["image"] == picture(1)
    assert facts_of(first)[0] == {
        "qid": "1", "official_split": "train", "answer_type": "CLOSED", "question_type": "PRES",
        "phrase_type": "freeform", "organ": "CHEST", "case": "48e1dd0e-8552",
    }  # fmt: skip
    assert [facts["qid"] for facts in facts_of(first)] == ["1", "2"]
    assert first["extra"] == {}
    assert [first[name] for name in ("sex", "age", "race", "patient_id")] == [None] * 4
    test = rows_of(tmp_path / "out" / "vqa_rad" / "test")
    assert said(test["vqa_rad/synpic1"]) == [("Is it so?", "no", "closed")]
    (facts,) = facts_of(test["vqa_rad/synpic1"])
    assert (facts["official_split"], facts["phrase_type"]) == ("test", "test_freeform")
    assert skipped(tmp_path / "out" / "vqa_rad" / "train") == [
        ("synpic3", "file missing"),
        (f"{vqa_rad.JSON_NAME}:7", "question or answer is empty"),
    ]
    notes = capsys.readouterr().out
    assert "VQA-RAD train: 2 repeated questions left out" in notes
    assert "expected 1,793 VQA-RAD train questions, found 4" in notes


@pytest.mark.parametrize("divided", [False, True])
def test_copies_of_vqa_rad_with_other_names_give_the_same_records(
    rad: Path, tmp_path: Path, divided: bool
) -> None:
    run(vqa_rad, rad, tmp_path / "one", "--max-skipped", "0.5")
    entries = json.loads((rad / vqa_rad.JSON_NAME).read_text())
    (rad / vqa_rad.JSON_NAME).unlink()
    (rad / vqa_rad.IMAGE_FOLDER).rename(rad / "images")
    if divided:
        tests = [entry for entry in entries if entry["phrase_type"].startswith("test")]
        put_json(rad / "trainset.json", [entry for entry in entries if entry not in tests])
        put_json(rad / "testset.json", tests)
    else:
        put_json(rad / "VQA_RAD_Dataset_Public.json", entries)
    run(vqa_rad, rad, tmp_path / "two", "--max-skipped", "0.5")
    for split in ("train", "test"):
        one, two = (Records(tmp_path / name / "vqa_rad" / split) for name in ("one", "two"))
        assert one.manifest["content_hash"] == two.manifest["content_hash"]


def test_vqa_rad_parquet_gathers_copies_of_an_image(tmp_path: Path) -> None:
    source = tmp_path / "vqa-rad"
    one, two = picture(1), picture(2)
    rows = [
        (one, "is there a mass?", "yes"),
        (two, "what is it?", "a cyst, \u201cbenign\u201d"),
        (one, "where?", "left"),
        (one, "is it so?", "no"),
        (None, "lost?", "yes"),
    ]
    put_parquet(source / "data" / "train-00000-of-00001-eb8844602202be60.parquet", rows)
    put_parquet(
        source / "data" / "test-00000-of-00001-e5bc3d208bb4deeb.parquet", [(one, "is it so?", "No")]
    )
    run(vqa_rad, source, tmp_path / "out", "--max-skipped", "0.5")
    train = rows_of(tmp_path / "out" / "vqa_rad" / "train")
    assert list(train) == [f"vqa_rad/{digest(one)}", f"vqa_rad/{digest(two)}"]
    assert said(train[f"vqa_rad/{digest(one)}"]) == [
        ("is there a mass?", "yes", "closed"),
        ("where?", "left", "open"),
    ]
    assert said(train[f"vqa_rad/{digest(two)}"])[0][1] == "a cyst, \u201cbenign\u201d"
    assert skipped(tmp_path / "out" / "vqa_rad" / "train") == [
        ("train-00000-of-00001-eb8844602202be60.parquet:2:0", "no image")
    ]


def test_a_second_run_finds_everything_done(
    rad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(vqa_rad, rad, tmp_path / "out", "--max-skipped", "0.5")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    run(vqa_rad, rad, tmp_path / "out", "--max-skipped", "0.5")
    assert "vqa_rad/train: prepared before" in " ".join(capsys.readouterr().out.split())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.slow
def test_worker_processes_give_the_same_records(rad: Path, tmp_path: Path) -> None:
    run(vqa_rad, rad, tmp_path / "one", "--max-skipped", "0.5")
    run(vqa_rad, rad, tmp_path / "two", "--max-skipped", "0.5", "--num-workers", "1")
    one, two = (Records(tmp_path / name / "vqa_rad" / "train") for name in ("one", "two"))
    assert one.manifest["content_hash"] == two.manifest["content_hash"]


def test_a_folder_that_is_no_vqa_rad_is_told_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no train-\*\.parquet .* see --help"):
        vqa_rad.plan(tmp_path)


# --- PathVQA


def test_pathvqa_keeps_the_official_rows_and_tells_what_repeats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "path-vqa"
    one, two = picture(1), picture(2)
    put_parquet(source / "data" / "train-00000-of-00002-a.parquet", [(one, "where is it?", "skin")])
    put_parquet(
        source / "data" / "train-00001-of-00002-a.parquet",
        [(one, "is it?", "yes"), (two, "is it?", "Yes"), (two, "is it?", "yes")],
    )
    put_parquet(source / "data" / "validation-00000-of-00001-a.parquet", [(two, "what?", "a cell")])
    put_parquet(source / "data" / "test-00000-of-00001-a.parquet", [(one, "is it?", "yes")])
    run(pathvqa, source, tmp_path / "out")
    out = tmp_path / "out" / "pathvqa"
    train, val, test = (rows_of(out / split) for split in ("train", "val", "test"))
    assert said(train[f"pathvqa/{digest(one)}"]) == [
        ("where is it?", "skin", "open"), ("is it?", "yes", "closed"),
    ]  # fmt: skip
    # "Yes" and "yes" are one question here and two rows of the release.
    assert said(train[f"pathvqa/{digest(two)}"]) == [("is it?", "yes", "closed")] * 2
    assert said(val[f"pathvqa/{digest(two)}"]) == [("what?", "a cell", "open")]
    assert said(test[f"pathvqa/{digest(one)}"]) == [("is it?", "yes", "closed")]
    assert {row["modality"] for row in train.values()} == {"pathology"}
    notes = capsys.readouterr().out
    assert "PathVQA train: 1 repeated questions kept, they are rows of the release" in notes
    assert "PathVQA train: 1 questions stand in a held-out split before it too" in notes
    assert "expected 19,654 PathVQA train questions, found 4" in notes


# --- PMC-VQA


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        *[("Lung", 1), (" B:Lung ", 1), ("lung.", 1), ("Vitamin C", 2), ("A", 0), ("D:", 3)],
        ("B", 3),  # the text of D, so not the letter
    ],
)
def test_the_answer_of_pmc_vqa_is_found_by_its_text(answer: str, right: int) -> None:
    options = [
        pmc_vqa.option_text(text) for text in (" A:Liver", "B: Lung", "Vitamin C", " D:  B ")
    ]
    assert options == ["Liver", "Lung", "Vitamin C", "B"]
    assert pmc_vqa.right_option(options, answer) == right


def test_an_answer_outside_the_choices_or_twice_in_them_is_refused() -> None:
    with pytest.raises(ValueError, match="none of the choices"):
        pmc_vqa.right_option(["a", "b", "c", "d"], "heart")
    assert pmc_vqa.option_text("C. difficile") == "C. difficile"
    with pytest.raises(ValueError, match="several choices"):
        pmc_vqa.right_option(["Heart", "heart.", "c", "d"], "heart")
    with pytest.raises(ValueError, match="no answer"):
        pmc_vqa.right_option(["a", "b", "c", "d"], " ")


def pmc_row(index: int, **changes: str) -> dict[str, Any]:
    base = {
        "index": index, "Figure_path": "PMC1064097_Fig1_1.jpg", "Caption": "A, \u03b2-cells\n(x40)",
        "Question": " Which \u03b2-cell, \"here\"? ", "Choice A": " A:mono, stained ",
        "Choice B": " B:bi ", "Choice C": " C:tri ", "Choice D": " D:none ",
        "Answer": "bi", "split": "train",
    }  # fmt: skip
    return base | changes


def test_pmc_vqa_takes_the_letters_off_its_options(tmp_path: Path) -> None:
    source = tmp_path / "PMC-VQA"
    rows = [
        pmc_row(0),
        pmc_row(1, Question="Why?", Answer=" A:mono, stained "),
        pmc_row(2, Answer="none of them"),
        pmc_row(3, Figure_path="PMC2_Fig1.jpg"),
        pmc_row(4, Question="Lost?", Figure_path="PMC3_Fig1.jpg"),
    ]
    put_table(source / "train_2.csv", rows)
    put_table(source / "test_2.csv", [pmc_row(0, Figure_path="PMC2_Fig1.jpg", Answer="D")])
    put(source / "figures" / "PMC1064097_Fig1_1.jpg", picture(1))
    put_zip(source / "images_2.zip", {"figures/PMC2_Fig1.jpg": picture(2)})
    run(pmc_vqa, source, tmp_path / "out", "--max-skipped", "0.5")
    train = rows_of(tmp_path / "out" / "pmc_vqa" / "train")
    assert list(train) == ["pmc_vqa/PMC1064097_Fig1_1", "pmc_vqa/PMC2_Fig1"]
    first = train["pmc_vqa/PMC1064097_Fig1_1"]
    assert said(first) == [
        ('Which \u03b2-cell, "here"?', "bi", "choice"),
        ("Why?", "mono, stained", "choice"),
    ]
    assert options_of(first) == [("mono, stained", "bi", "tri", "none")] * 2
    assert facts_of(first) == [{"qid": "0"}, {"qid": "1"}]
    assert first["extra"] == {"article": "PMC1064097"}
    assert train["pmc_vqa/PMC2_Fig1"]["image"] == picture(2)
    (test,) = rows_of(tmp_path / "out" / "pmc_vqa" / "test").values()
    assert said(test)[0][1] == "none"
    assert skipped(tmp_path / "out" / "pmc_vqa" / "train") == [
        ("PMC3_Fig1.jpg", "file missing"),
        ("train_2.csv:3", "the answer is none of the choices"),
    ]


# --- SLAKE


def slake_entry(qid: int, **changes: Any) -> dict[str, Any]:
    base = {
        "img_id": 1, "img_name": "xmlab1/source.jpg", "question": "Is the lung healthy?",
        "answer": "No", "q_lang": "en", "location": "Lung", "modality": "X-Ray",
        "answer_type": "CLOSED", "base_type": "vqa", "content_type": "Abnormality",
        "triple": ["vhead", "_", "_"], "qid": qid,
    }  # fmt: skip
    return base | changes


def label_map(values: list[list[int]], mode: str) -> bytes:
    """A mask.png as SLAKE's annotators saved it: grey in RGB, or in opaque RGBA."""
    buffer = io.BytesIO()
    Image.fromarray(np.array(values, dtype=np.uint8)).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def slake_source(tmp_path: Path) -> Path:
    """The layout of the release: a CT whose mask is RGB, an MRI whose mask is opaque RGBA, and an
    X-ray whose mask is the image with coloured structures painted over it."""
    source = tmp_path / "Slake1.0"
    chinese = slake_entry(
        2, question="\u80ba\u5065\u5eb7\u5417\uff1f", answer="\u4e0d", q_lang="zh"
    )
    ct = {"img_name": "xmlab1/source.jpg", "modality": "CT"}
    brain = {"img_name": "xmlab2/source.jpg", "location": "Brain_Tissue", "modality": "MRI"}
    xray = {"img_name": "xmlab3/source.jpg"}
    put_json(source / "train.json", [slake_entry(1, **ct), chinese | ct, slake_entry(3, **xray)])
    put_json(source / "validate.json", [slake_entry(4, **brain)])
    put_json(source / "test.json", [slake_entry(5, **xray, answer_type="OPEN", answer="Yes")])
    for number in (1, 2, 3):
        put(source / "imgs" / f"xmlab{number}" / "source.jpg", picture(number))
    put(source / "imgs" / "xmlab1" / "mask.png", label_map([[0, 3, 3, 0, 5, 5]] * 4, "RGB"))
    put(source / "imgs" / "xmlab2" / "mask.png", label_map([[0, 9, 9, 0, 9, 9]] * 4, "RGBA"))
    put(source / "imgs" / "xmlab3" / "mask.png", picture(3, kind="PNG"))
    put_json(source / "imgs" / "xmlab1" / "detection.json", [{"Lung": [1.0, 0.0, 2.0, 4.0]}])
    put(source / "mask.txt", "Right Lung: 3\n\nLeft Lung: 5\nBrain Tissue: 9\n")
    return source


OVERLAY = "mask is a colour overlay, its values are lost"


def test_slake_masks_in_rgb_and_rgba_become_targets_and_overlays_of_xrays_are_told(
    slake_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The default limit of one percent: overlays are the release itself, so it converts as it is.
    run(slake, slake_source, tmp_path / "out")
    out = tmp_path / "out" / "slake"
    train = rows_of(out / "train")
    assert list(train) == ["slake/xmlab1", "slake/xmlab3"]
    first = train["slake/xmlab1"]
    assert said(first) == [("Is the lung healthy?", "no", "closed")]
    assert (first["modality"], first["anatomy"]) == ("ct", "lung")
    masks = masks_of(first)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        "right lung": 8, "left lung": 8,
    }  # fmt: skip
    np.testing.assert_array_equal(masks["right lung"], [[0, 1, 1, 0, 0, 0]] * 4)
    assert facts_of(first) == [
        {
            "qid": "1", "language": "en", "modality": "CT", "location": "Lung",
            "answer_type": "CLOSED", "base_type": "vqa", "content_type": "Abnormality",
            "triple": "vhead, _, _",
        }
    ]  # fmt: skip
    assert first["extra"] == {"boxes": [{"name": "Lung", "box": [1.0, 0.0, 2.0, 4.0]}]}
    (val,) = rows_of(out / "val").values()
    assert (val["anatomy"], list(masks_of(val))) == ("brain tissue", ["brain tissue"])
    (test,) = rows_of(out / "test").values()
    assert said(test) == [("Is the lung healthy?", "Yes", "open")]  # the release says open
    told = f"{OVERLAY} (as the release has it for X-rays)"
    assert skipped(out / "train") == [("xmlab3/source.jpg", told)]
    preparation = Records(out / "train").manifest["preparation"]
    assert (preparation["num_incomplete"], preparation["num_noted"]) == (0, 1)
    assert preparation["promises_masks"] is True
    output = capsys.readouterr().out
    assert f"slake/train: 2 records, 1 noted (1 x {told})" in output


def overlay(source: Path) -> None:
    put(source / "imgs" / "xmlab1" / "mask.png", picture(9, kind="PNG"))


def unnamed(source: Path) -> None:
    put(source / "mask.txt", "Right Lung: 3\n")


def missing(source: Path) -> None:
    (source / "imgs" / "xmlab1" / "mask.png").unlink()


def half_transparent(source: Path) -> None:
    faded = Image.new("RGBA", (6, 4), (3, 3, 3, 128))
    faded.save(source / "imgs" / "xmlab1" / "mask.png")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (overlay, OVERLAY),
        (unnamed, "mask: mask holds values that --mask-names does not name: ['5']"),
        (missing, "mask: file missing"),
        (half_transparent, "mask: mask is partly transparent"),
    ],
)
def test_a_slake_mask_that_should_be_usable_counts_as_lost_and_keeps_its_questions(
    slake_source: Path, tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(slake_source)
    with pytest.raises(ValueError, match="1 of 2 items skipped, 1 of them with a record that lack"):
        run(slake, slake_source, tmp_path / "out")
    run(slake, slake_source, tmp_path / "out", "--max-skipped", "1")
    records = Records(tmp_path / "out" / "slake" / "train")
    row = records[0]
    assert (row["targets"], said(row)) == ([], [("Is the lung healthy?", "no", "closed")])
    assert skipped(records.folder)[0] == ("xmlab1/source.jpg", reason)
    # And whoever accepts the loss hears of it again before training.
    found = {finding.code for finding in lint([records.folder], SETTINGS).findings}
    assert "masks-missing" in found


def test_a_broken_detection_file_costs_the_boxes_alone(slake_source: Path, tmp_path: Path) -> None:
    put(slake_source / "imgs" / "xmlab1" / "detection.json", "[{")
    run(slake, slake_source, tmp_path / "out")
    row = rows_of(tmp_path / "out" / "slake" / "train")["slake/xmlab1"]
    assert (len(row["targets"]), row["extra"]) == (2, {})
    ledger = skipped(tmp_path / "out" / "slake" / "train")
    assert ("xmlab1/source.jpg", "detection.json unreadable") in ledger


def test_slake_without_a_table_of_mask_values_is_refused_unless_masks_are_not_wanted(
    slake_source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is not a folder; --source is the folder of the raw"):
        run(slake, tmp_path / "elsewhere", tmp_path / "out")
    (slake_source / "mask.txt").unlink()
    with pytest.raises(
        ValueError, match=r"mask\.txt is not a readable.*--mask-names, or --no-masks"
    ):
        run(slake, slake_source, tmp_path / "out")
    run(slake, slake_source, tmp_path / "out", "--no-masks")
    assert Records(tmp_path / "out" / "slake" / "train").manifest["num_segmentation_units"] == 0
    assert not (tmp_path / "out" / "slake" / "train.skipped.jsonl").exists()


def test_slake_languages_can_be_chosen_and_together_they_share_images(
    slake_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The Hugging Face form renamed one of the files.
    (slake_source / "validate.json").rename(slake_source / "validation.json")
    chinese = {"q_lang": "zh", "img_name": "xmlab2/source.jpg", "modality": "MRI"}
    put_json(slake_source / "test.json", [slake_entry(5, **chinese), slake_entry(7)])
    put_json(slake_source / "validation.json", [slake_entry(4, **chinese)])
    run(slake, slake_source, tmp_path / "zh", "--language", "zh")
    (row,) = rows_of(tmp_path / "zh" / "slake" / "train").values()
    assert said(row) == [("\u80ba\u5065\u5eb7\u5417\uff1f", "\u4e0d", "closed")]
    assert "of train are in val or test" not in capsys.readouterr().out
    run(slake, slake_source, tmp_path / "all", "--language", "all")
    notes = capsys.readouterr().out
    assert "SLAKE: 1 images of train are in val or test too" in notes
    assert "--language en keeps images apart" in notes


def test_slake_keeps_official_rows_that_repeat(
    slake_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [slake_entry(qid, modality="CT") for qid in (1, 2)]
    put_json(slake_source / "train.json", entries)
    run(slake, slake_source, tmp_path / "out")
    (row,) = rows_of(tmp_path / "out" / "slake" / "train").values()
    assert said(row) == [("Is the lung healthy?", "no", "closed")] * 2
    notes = capsys.readouterr().out
    assert "SLAKE train: 1 repeated questions kept, they are rows of the release" in notes
    assert "expected 4,919 SLAKE train questions (en), found 2" in notes


def test_a_table_of_mask_values_is_read_either_way_round_or_refused(tmp_path: Path) -> None:
    table = put(tmp_path / "mask.txt", "7: Liver\nkidney_right 12\nSpinal Cord,3\n")
    assert slake.read_mask_names(table) == {7: "liver", 12: "right kidney", 3: "spinal cord"}
    with pytest.raises(ValueError, match=r"mask\.txt:1: expected a structure and its value"):
        slake.read_mask_names(put(tmp_path / "mask.txt", "liver red\n"))
    with pytest.raises(ValueError, match="repeats a value or a name"):
        slake.read_mask_names(put(tmp_path / "mask.txt", "liver 1\nspleen 1\n"))


# --- PubMedVision


def vision_entry(name: str, *images: str, **changes: Any) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": f"<image>\nWhat does {name} show \u2013 in short?"},
        {"from": "gpt", "value": f"It shows\n{name}, \u03b1-stained."},
    ]
    base = {
        "id": name, "image": [f"images/{image}" for image in images], "conversations": turns,
        "modality": "Computed Tomography", "body_part": "Lung",
    }  # fmt: skip
    return base | changes


@pytest.fixture
def vision(tmp_path: Path) -> Path:
    source = tmp_path / "PubMedVision"
    wrong = [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Hello."}]
    entries = [
        vision_entry("pmc_1", "pmc_1_0.jpg"),
        vision_entry("pmc_2", "pmc_2_0.jpg", "pmc_2_1.jpg", "pmc_2_2.jpg", modality="Others"),
        vision_entry("pmc_1b", "pmc_1_0.jpg", modality="Microscopy Images"),
        vision_entry("pmc_3", "pmc_3_0.jpg"),
        vision_entry("pmc_4", "pmc_1_0.jpg", "pmc_4_0.jpg", conversations=wrong),
        vision_entry("pmc_5"),
    ]
    put_json(source / pubmedvision.JSON_NAME, entries)
    first = {"images/pmc_1_0.jpg": picture(1), "images/pmc_2_0.jpg": picture(2, (5, 3))}
    put_zip(source / "images_0.zip", first)
    put_zip(source / "images_1.zip", {"pmc_2_1.jpg": picture(3), "x/pmc_4_0.jpg": picture(4)})
    put(source / "images" / "pmc_2_2.jpg", picture(5))
    return source


def test_pubmedvision_gathers_images_and_joins_panels(vision: Path, tmp_path: Path) -> None:
    run(pubmedvision, vision, tmp_path / "out", "--max-skipped", "0.9", "--test-share", "0")
    train = rows_of(tmp_path / "out" / "pubmedvision" / "train")
    one = train["pubmedvision/pmc_1_0"]
    assert said(one) == [
        ("What does pmc_1 show \u2013 in short?", "It shows pmc_1, \u03b1-stained.", "open"),
        ("What does pmc_1b show \u2013 in short?", "It shows pmc_1b, \u03b1-stained.", "open"),
    ]
    assert (one["modality"], one["anatomy"], one["image"]) == ("ct", "lung", picture(1))
    assert one["extra"]["ids"] == ["pmc_1", "pmc_1b"]
    assert facts_of(one) == [
        {"qid": "pmc_1", "modality": "Computed Tomography", "location": "Lung"},
        {"qid": "pmc_1b", "modality": "Microscopy Images", "location": "Lung"},
    ]
    (name,) = set(train) - {"pubmedvision/pmc_1_0"}
    several = train[name]
    assert name.startswith("pubmedvision/pmc_2_0+")
    assert (several["modality"], several["extra"]["num_panels"]) == ("unspecified", 3)
    # Two columns: widths 5 + 8 + 6, heights 4 + 8 + 4.
    assert (several["height"], several["width"]) == (16, 19)
    pixels = np.asarray(Image.open(io.BytesIO(several["image"])))
    for number, size, x, y in ((2, (5, 3), 0, 0), (3, (6, 4), 13, 0), (5, (6, 4), 0, 12)):
        panel = np.asarray(Image.open(io.BytesIO(picture(number, size))))
        np.testing.assert_array_equal(pixels[y : y + size[1], x : x + size[0]], panel)
    reasons = [reason for _, reason in skipped(tmp_path / "out" / "pubmedvision" / "train")]
    assert sorted(reasons) == [
        "conversation is not question and answer in turn",
        "entry without an image",
        "file missing",
    ]


def test_records_of_several_images_can_be_left_out(vision: Path) -> None:
    (train,) = pubmedvision.plan(vision, 0.0, "skip")
    assert sorted(item.name for item in train.items)[1:] == ["pmc_1_0", "pmc_3_0"]


def test_records_that_share_an_image_share_the_side(vision: Path) -> None:
    tied = pubmedvision.tie([("b", "c"), ("a",), ("c", "d"), ("e", "a")])
    assert tied == {"a": "a", "b": "b", "c": "b", "d": "b", "e": "a"}
    for share in (0.2, 0.5, 0.8):
        releases = pubmedvision.plan(vision, share, "montage")
        sides = {
            item.name.partition("+")[0]: release.split
            for release in releases
            for item in release.items
            if any("pmc_1_0" in str(place) for place in item.places)
        }
        assert len(set(sides.values())) == 1


def test_positions_in_the_json_file_lead_back_to_its_entries(
    vision: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = vision / pubmedvision.JSON_NAME
    data = path.read_bytes()
    whole = list(pubmedvision.index_entries(path))
    for entry, expected in zip(whole, json.loads(data), strict=True):
        assert json.loads(data[entry.offset : entry.offset + entry.length]) == expected
    monkeypatch.setattr(pubmedvision, "CHUNK", 7)  # cuts entries and UTF-8 characters
    assert list(pubmedvision.index_entries(path)) == whole


@pytest.mark.parametrize("text", ['[{"id": 1}, {"id": 2', '[{"id": 1}, 7]', "no json"])
def test_a_broken_json_list_is_an_error_with_its_place(tmp_path: Path, text: str) -> None:
    path = put(tmp_path / "x.json", text)
    with pytest.raises(ValueError, match="byte"):
        list(pubmedvision.index_entries(path))

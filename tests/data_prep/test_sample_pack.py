"""The converter of the real sample pack; tests on the pack itself skip where it is absent."""

from __future__ import annotations

import argparse
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from biascare.records import Records, decode_mask
from biascare.records.vocabulary import canonical_target
from data_prep import sample_pack
from data_prep.formats.orientation import sides_agree
from data_prep.pipeline import shards
from data_prep.sample_pack import build_conversations, question_turns
from tests.data_prep.raw_releases import assert_lint_passes

PACK = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_pack = pytest.mark.skipif(
    not (PACK / "manifest.jsonl").is_file(),
    reason="the real sample pack is not beside the checkout",
)


def line(**changes: Any) -> dict[str, Any]:
    base = {
        "id": "x1", "source": "other", "split": "train", "patient_id": None, "image": "i/x1.png",
        "orig_size": [6, 4], "modality": "ct", "body_part": "abdomen", "masks": {}, "boxes": [],
        "labels": {}, "sex": None, "age": None, "text": None, "qa": [], "license": "none",
        "meta": {},
    }  # fmt: skip
    return base | changes


def question(answer: str, answer_type: str = "closed") -> dict[str, Any]:
    return {
        "q": "Is it so?", "a": answer, "answer_type": answer_type, "question_type": ["X"],
        "phrase_type": "freeform", "qid": 7, "official_split": "test",
    }  # fmt: skip


def make_pack(folder: Path, lines: list[dict[str, Any]]) -> Path:
    (folder / "i").mkdir(parents=True)
    Image.new("RGB", (6, 4)).save(folder / "i" / "x1.png")
    label_map = np.array([[0, 1, 1, 2, 0, 0]] * 4, dtype=np.uint8)
    Image.fromarray(label_map).save(folder / "i" / "m.png")
    (folder / "manifest.jsonl").write_text("\n".join(json.dumps(item) for item in lines))
    return folder


def run(source: Path, output: Path, *more: str) -> None:
    sample_pack.main(["--source", str(source), "--output", str(output), *more])
    assert_lint_passes(output)


@pytest.mark.parametrize(
    ("raw", "written"),
    [("Yes", "yes"), ("NO", "no"), ("no.", "no"), ("PA", "PA"), ("Not sure", "Not sure")],
)
def test_yes_and_no_have_one_spelling_and_other_answers_keep_theirs(raw: str, written: str) -> None:
    user, assistant = question_turns(question(raw))
    assert (user.role, user.kind, assistant.kind) == ("user", "closed", "closed")
    assert assistant.text == written
    assert question_turns(question("Yes", "open"))[1].text == "Yes"


def test_choice_answers_are_one_of_the_options_and_orders_vary() -> None:
    places = Counter()
    for index in range(70):
        item = line(id=f"ham{index}", source="ham10000", labels={"dx": "mel"})
        asked, answered = build_conversations(item)
        assert asked.kind == "choice"
        assert sorted(asked.options) == sorted(sample_pack.DIAGNOSES.values())
        assert answered.text == "melanoma"
        places[asked.options.index(answered.text)] += 1
    assert len(places) == 7  # position says nothing about the answer
    assert build_conversations(item) == build_conversations(item)


def test_a_choice_among_findings_has_exactly_one_right_option() -> None:
    findings = ["Pleural_Thickening", "Mass"]
    for index in range(30):
        item = line(id=f"n{index}", source="nih", labels={"findings": findings})
        turns = build_conversations(item)
        assert turns[1].text == "Pleural Thickening, Mass"
        assert len(set(turns[2].options)) == 4
        assert {"Pleural Thickening", "Mass"} & set(turns[2].options) == {turns[3].text}


def test_masks_are_cut_from_the_label_map_and_unknown_stays_unknown(tmp_path: Path) -> None:
    masks = {
        "kidney_right": {"file": "i/m.png", "value": 1, "pixels": 8},
        "kidney_left": {"file": "i/m.png", "value": 2, "pixels": 4},
    }
    pack = make_pack(tmp_path / "pack", [line(masks=masks, qa=[question("Yes")])])
    run(pack, tmp_path / "out")
    row = Records(tmp_path / "out" / "other" / "train")[0]
    sizes = {t["name"]: int(decode_mask(t["rle"], 4, 6).sum()) for t in row["targets"]}
    assert sizes == {"right kidney": 8, "left kidney": 4}
    assert [row[name] for name in ("sex", "age", "race", "patient_id")] == [None] * 4
    assert row["conversations"][0]["facts"] == {
        "qid": "7", "official_split": "test", "answer_type": "closed", "question_type": "X",
        "phrase_type": "freeform",
    }  # fmt: skip


def test_trouble_goes_to_the_ledger_and_too_much_is_an_error(tmp_path: Path) -> None:
    wrong = {"liver": {"file": "i/m.png", "value": 1, "pixels": 9}}
    right = {"spleen": {"file": "i/m.png", "value": 1, "pixels": 8}}
    lines = [
        line(masks=wrong | right),
        line(id="x2", image="i/gone.png"),
        line(id="x3", image="../x.png"),
        line(id="x4", masks=wrong),
    ]
    pack = make_pack(tmp_path / "pack", lines)
    with pytest.raises(ValueError, match="4 of 4 items skipped, 1 of them with a record that"):
        run(pack, tmp_path / "out")
    run(pack, tmp_path / "out", "--max-skipped", "1")
    (row,) = Records(tmp_path / "out" / "other" / "train")
    assert [target["name"] for target in row["targets"]] == ["spleen"]
    ledger = (tmp_path / "out" / "other" / "train.skipped.jsonl").read_text().splitlines()
    assert [json.loads(entry)["reason"] for entry in ledger] == [
        "mask of liver does not have the stated number of pixels",
        "file missing",
        "path leaves the source",
        "mask of liver does not have the stated number of pixels",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": None}, r"manifest\.jsonl:2: masks: expected an object, \{\} .*, got null"),
        (
            {"body_part": ...},
            "jsonl:2: body_part: expected a text or null, got no such key",
        ),
        ({"age": "sixty"}, "manifest.jsonl:2: age: age unreadable"),
        ({"age": True}, "manifest.jsonl:2: age: expected years or null, got true"),
        ({"sex": "x"}, "manifest.jsonl:2: sex: sex unreadable"),
        ({"split": "valid"}, "manifest.jsonl:2: split: got 'valid', .*; did you mean 'val'"),
        ({"modality": "MRT"}, "manifest.jsonl:2: modality: unknown modality 'MRT'"),
        ({"masks": {"liver": "m.png"}}, "jsonl:2: masks, 'liver': expected .* file, value, pixels"),
        ({"qa": [{"q": "a?"}]}, "jsonl:2: qa: expected an object with q, a, answer_type"),
        ({"qa": [question("yes") | {"a": None}]}, "jsonl:2: qa: expected an object with q, a"),
        ({"labels": {"findings": ["Mass", 3]}}, "jsonl:2: labels, findings: expected a list of te"),
        ({"source": "busi", "labels": {"class": ["cyst"]}}, "jsonl:2: labels, class: got"),
        (
            {"source": "busi", "labels": {"class": "cyst"}},
            "labels, class: got 'cyst', expected",
        ),
        ({"id": 7, "qa": None}, r"(?s)jsonl:2: id: .*jsonl:2: qa: "),
    ],
)
def test_a_bad_line_of_the_manifest_is_one_message_with_line_and_key(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    bad = {key: value for key, value in (line() | changes).items() if value is not ...}
    pack = make_pack(tmp_path / "pack", [line(qa=[question("Yes")]), bad])
    with pytest.raises(ValueError, match=message):
        run(pack, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_without_a_rule_are_named_counted_and_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [
        line(id=f"w{number}", source="wbc2", labels={"cell_type": kind, "sequence": ["T1", "T2"]})
        for number, kind in enumerate(["neutrophil", "basophil", "neutrophil"])
    ]
    unstated = line(id="w3", source="wbc2", labels={"cell_type": None}, text="A note.")
    pack = make_pack(tmp_path / "pack", [*cells, unstated])
    run(pack, tmp_path / "out")
    records = Records(tmp_path / "out" / "wbc2" / "train")
    assert [row["labels"] for row in records] == [
        ["cell type: neutrophil", "sequence: T1, T2"],
        ["cell type: basophil", "sequence: T1, T2"],
        ["cell type: neutrophil", "sequence: T1, T2"],
        [],
    ]
    turns = records[1]["conversations"]
    assert [(t["text"], t["kind"]) for t in turns[1::2]] == [
        ("basophil", "choice"), ("T1, T2", "open"),
    ]  # fmt: skip
    assert sorted(turns[0]["options"]) == ["basophil", "neutrophil"]
    assert "cell type" in turns[0]["text"]
    notes = capsys.readouterr().out
    told = "asked in general words, among 2 values (basophil, neutrophil)"
    assert f"wbc2: the label 'cell_type' of 3 images has no rule of its own and is {told}" in notes
    assert "the label 'sequence' of 3 images" in notes


def test_a_known_source_without_its_label_has_no_question_and_benign_is_not_guessed(
    tmp_path: Path,
) -> None:
    lines = [
        line(source="busi", labels={"benign_malignant": "indeterminate"}, text="A note."),
        line(id="x2", source="nih", labels={"findings": []}, text="A note.", age="90+"),
    ]
    run(make_pack(tmp_path / "pack", lines), tmp_path / "out")
    for source in ("busi", "nih"):
        (row,) = Records(tmp_path / "out" / source / "train")
        assert [turn["kind"] for turn in row["conversations"]] == ["report", "report"]
    assert row["age"] == 90.0


def test_a_folder_without_manifest_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        run(tmp_path, tmp_path / "out")


def convert(lines: list[dict[str, Any]], output: Path) -> None:
    """The chosen lines of the pack, none of them unusable."""
    parser = argparse.ArgumentParser()
    shards.add_arguments(parser)
    args = parser.parse_args(["--output", str(output), "--max-skipped", "0"])
    shards.run(args, sample_pack.releases(PACK, lines))


@pytest.fixture(scope="module")
def manifest() -> list[dict[str, Any]]:
    """Held-out images of every source, and all of VQA-RAD."""
    lines = sample_pack.read_manifest(PACK / "manifest.jsonl")
    return [item for item in lines if item["split"] == "test" or item["source"] == "vqa_rad"]


@pytest.fixture(scope="module")
def prepared(manifest: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pack")
    convert(manifest, output)
    return output


@needs_pack
def test_every_image_mask_and_sex_of_the_pack_is_in_the_records(
    prepared: Path, manifest: list[dict[str, Any]]
) -> None:
    folders = {(item["source"], item["split"]) for item in manifest}
    opened = [Records(prepared / source / split) for source, split in folders]
    assert sum(len(records) for records in opened) == len(manifest)
    targets, sexes = Counter(), Counter()
    for records in opened:
        targets.update(records.target_counts)
        sexes.update(records.manifest["sex"])
    assert targets == Counter(canonical_target(name) for item in manifest for name in item["masks"])
    assert sexes == Counter(item["sex"] or "missing" for item in manifest)


@needs_pack
def test_every_mask_pixel_of_the_pack_is_kept(
    prepared: Path, manifest: list[dict[str, Any]]
) -> None:
    stated = {
        (item["id"], canonical_target(name)): entry["pixels"]
        for item in manifest
        if item["source"] in ("btcv", "wbc1") and item["split"] == "test"
        for name, entry in item["masks"].items()
    }
    written = {}
    for source in ("btcv", "wbc1"):
        records = Records(prepared / source / "test")
        for row in map(records.__getitem__, range(len(records))):
            for target in row["targets"]:
                mask = decode_mask(target["rle"], row["height"], row["width"])
                written[row["id"], target["name"]] = int(mask.sum())
    assert written == stated


@needs_pack
def test_right_sided_organs_of_btcv_lie_at_image_left(prepared: Path) -> None:
    records = Records(prepared / "btcv" / "test")
    agreed = []
    for index in range(len(records)):
        row = records[index]
        size = row["height"], row["width"]
        masks = [(t["name"], decode_mask(t["rle"], *size) > 0) for t in row["targets"]]
        agreed += sides_agree(masks)
    assert agreed
    assert all(agreed)


@needs_pack
def test_questions_of_vqa_rad_keep_kind_answer_and_official_split(
    prepared: Path, manifest: list[dict[str, Any]]
) -> None:
    asked = [q for item in manifest if item["source"] == "vqa_rad" for q in item["qa"]]
    folders = [prepared / "vqa_rad" / split for split in ("train", "val", "test")]
    opened = [Records(folder) for folder in folders]
    assert sum(len(records.language_units) for records in opened) == len(asked) == 2451
    answers, splits = Counter(), Counter()
    for records in opened:
        for row in map(records.__getitem__, range(len(records))):
            splits.update(t["facts"]["official_split"] for t in row["conversations"][::2])
            answers.update(t["text"] for t in row["conversations"] if t["role"] == "assistant")
    assert splits == {"train": 2137, "test": 314}
    assert not {"YES", "NO"} & set(answers)
    assert answers["yes"] + answers["no"] > 1400


@needs_pack
def test_a_second_conversion_gives_the_same_content(
    prepared: Path, manifest: list[dict[str, Any]], tmp_path: Path
) -> None:
    chosen = [item for item in manifest if item["source"] == "ham10000"]
    convert(chosen, tmp_path)
    again, first = (Records(root / "ham10000" / "test") for root in (tmp_path, prepared))
    assert again.manifest["content_hash"] == first.manifest["content_hash"]


@needs_pack
def test_images_of_the_pack_decode(prepared: Path) -> None:
    row = Records(prepared / "drive" / "test")[0]
    with Image.open(io.BytesIO(row["image"])) as image:
        assert image.size == (row["width"], row["height"])

"""The linter: every kind of damage is found, sound folders pass, leaks are seen across folders."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from biascare.checks.duplicates import NEAR_BITS, fingerprint, hamming, near_pairs, shared_keys
from biascare.checks.findings import CODES
from biascare.checks.lint import LintSettings, Report, Vocabulary, lint, plain_id, target_variants
from biascare.checks.rows import training_area
from biascare.data.transforms import Geometry, apply_mask
from biascare.records import FEATURES, Record, Turn, encode_mask
from biascare.records.vocabulary import canonical_modality, canonical_target
from biascare.reports.lint import write_sheets
from data_prep import vqa_rad
from data_prep.formats.orientation import sides_agree
from scripts import lint_data
from tests.data_prep.raw_releases import put, put_json
from tests.data_prep.raw_releases import run as run_release
from tests.tiny import HEIGHT, WIDTH, encoded_png, tiny_record, write_records

ROOT = Path(__file__).parents[2]
SETTINGS = LintSettings(
    vocabulary=Vocabulary(canonical_target, canonical_modality, sides_agree), image_size=64
)


def scene(seed: int) -> np.ndarray:
    """[H, W, 3] uint8: noise with the spectrum of natural images, unlike any other seed's."""
    rng = np.random.default_rng(seed)
    rows, columns = np.meshgrid(np.fft.fftfreq(HEIGHT), np.fft.fftfreq(WIDTH), indexing="ij")
    falloff = np.maximum(np.hypot(rows, columns), 1 / WIDTH) ** -1.0
    noise = np.fft.fft2(rng.standard_normal((HEIGHT, WIDTH)))
    field = np.real(np.fft.ifft2(noise * falloff))
    grey = np.interp(field, (field.min(), field.max()), (0, 255)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def sound_record(index: int, split: str, **changes: Any) -> Record:
    """Nothing to complain about: both kidneys, canonical names, different pictures."""
    left, right = (np.zeros((HEIGHT, WIDTH), np.bool_) for _ in range(2))
    right[10:20, 8:20], left[10:20, 50:62] = True, True
    question = [Turn("user", "Are there kidneys?", "closed"), Turn("assistant", "yes", "closed")]
    record = replace(
        tiny_record(index, split),
        image=encoded_png(scene(1000 * len(split) + index)),
        targets=[("right kidney", right), ("left kidney", left)],
        conversations=question,
        modality="ct",
        patient_id=f"{split}{index}",
        study_id=f"{split}{index}",
    )
    return replace(record, **changes)


def folder_of(path: Path, split: str, records: Sequence[Record] | None = None) -> Path:
    return write_records(path / split, list(records or (sound_record(i, split) for i in range(3))))


def damage(folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> Path:
    """Rewrite the rows of a folder behind the writer's back."""
    files = sorted(folder.glob("*.arrow"))
    rows: list[dict[str, Any]] = []
    for file in files:
        with pa.OSFile(str(file)) as source:
            rows += pa.ipc.open_stream(source).read_all().to_pylist()
    change(rows)
    table = pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema)
    with (
        pa.OSFile(str(files[0]), "wb") as sink,
        pa.ipc.new_stream(sink, FEATURES.arrow_schema) as out,
    ):
        out.write_table(table)
    return folder


def check(*folders: Path, **options: Any) -> Report:
    return lint(folders, SETTINGS._replace(**options.pop("settings", {})), **options)


def codes(report: Report) -> dict[str, int]:
    found: Counter[str] = Counter()
    for finding in report.findings:
        found[finding.code] += finding.num
    return dict(found)


# ---------------------------------------------------------------- sound data


def test_sound_folders_have_no_finding_at_all(tmp_path: Path) -> None:
    report = check(folder_of(tmp_path, "train"), folder_of(tmp_path, "test"))
    assert codes(report) == {}
    train = report.folders[0]
    assert (train.where, train.num_rows, train.num_masks) == ("tiny/train", 3, 6)
    assert train.native_areas == {64: 6}  # 120 pixels each
    # 120 * 64 * 64 / (48 * 72) = 142.2 pixels at the training size.
    assert train.training_areas == {128: 6}
    assert (train.sides_right, train.sides_wrong) == (3, 0)


def label_map(record: Record, greys: Sequence[int]) -> np.ndarray:
    """The masks of a record as the image that converters have taken for it: [H, W, 3]."""
    image = np.full((HEIGHT, WIDTH), greys[0], np.uint8)
    for (_, mask), grey in zip(record.targets, greys[1:], strict=True):
        image[mask] = grey
    return np.repeat(image[..., None], 3, axis=2)


@pytest.mark.parametrize("greys", [(0, 1, 2), (0, 127, 255)])
def test_a_label_map_in_place_of_the_image_is_an_error(
    tmp_path: Path, greys: tuple[int, ...]
) -> None:
    records = [sound_record(index, "train") for index in range(3)]
    swapped = [replace(r, image=encoded_png(label_map(r, greys))) for r in records]
    found = codes(check(folder_of(tmp_path, "train", swapped)))
    assert found["image-is-mask"] == 3
    # Stretched to the range of a screen, its values are small no more.
    assert found.get("image-like-labels", 0) == (3 if max(greys) < 32 else 0)


def test_an_image_with_the_values_of_a_label_map_is_doubtful_without_masks_too(
    tmp_path: Path,
) -> None:
    image = label_map(sound_record(0, "train"), (0, 4, 20))
    records = [sound_record(0, "train", image=encoded_png(image), targets=[])]
    found = codes(check(folder_of(tmp_path, "train", records)))
    assert found["image-like-labels"] == 1
    assert "image-is-mask" not in found


def test_an_image_one_pixel_wide_is_an_error(tmp_path: Path) -> None:
    column = sound_record(0, "train", image=encoded_png(scene(1)[:, :1]), width=1, targets=[])
    report = check(folder_of(tmp_path, "train", [column]))
    (finding,) = [one for one in report.findings if one.code == "image-line"]
    assert (finding.level, finding.examples[0].endswith(f": {HEIGHT} x 1")) == ("error", True)


def test_promised_masks_that_no_record_has_are_an_error_unless_each_lack_is_noted(
    tmp_path: Path,
) -> None:
    folder = folder_of(tmp_path, "train", [sound_record(i, "train", targets=[]) for i in range(3)])
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    assert "masks-missing" not in codes(check(folder))
    for stated, code in (
        ({"num_incomplete": 0, "num_noted": 0}, "masks-missing"),
        ({"num_incomplete": 3, "num_noted": 0}, "masks-missing"),
        ({"num_incomplete": 0, "num_noted": 3}, None),
        ({"num_incomplete": 3, "num_noted": 6}, "masks-missing"),
    ):
        preparation = {"promises_masks": True, "num_items": 3} | stated
        path.write_text(json.dumps(manifest | {"preparation": preparation}))
        assert {"masks-missing"} & codes(check(folder)).keys() == ({code} if code else set())
    some = folder_of(tmp_path, "test")
    path = some / "manifest.json"
    preparation = {"promises_masks": True, "num_items": 4, "num_incomplete": 1, "num_noted": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"preparation": preparation}))
    (finding,) = check(some).findings
    assert (finding.code, finding.examples) == ("masks-lost", ["1 of 4 items"])


def test_records_with_nothing_to_learn_and_labels_of_two_spellings_are_told(tmp_path: Path) -> None:
    records = [
        sound_record(0, "train", labels=["Pneumonia"]),
        sound_record(1, "train", labels=["pneumonia"], targets=[], conversations=[]),
    ]
    report = check(folder_of(tmp_path, "train", records))
    told = {finding.code: finding.examples for finding in report.findings}
    assert told["no-lesson"] == [f"{records[1].id}, 1 of 2 records"]
    assert told["label-variants"] == ["'Pneumonia' and 'pneumonia'"]


def test_two_roots_with_the_same_folder_names_are_told_apart(tmp_path: Path) -> None:
    for root in ("old", "new"):
        folder_of(tmp_path / root / "tiny", "train")
    folders = [tmp_path / root / "tiny" / "train" for root in ("old", "new")]
    report = check(*folders, folder_of(tmp_path / "new" / "tiny", "test"))
    assert [folder.where for folder in report.folders] == [
        "tiny/train (old/tiny/train)", "tiny/train (new/tiny/train)", "tiny/test",
    ]  # fmt: skip
    twice = next(one for one in report.findings if one.code == "image-twice")
    assert "tiny/train (old/tiny/train):" in twice.examples[0]
    assert "tiny/train (new/tiny/train):" in twice.examples[0]


def test_a_ledger_beside_a_folder_is_no_folder_that_cannot_be_opened(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "train")
    ledger = folder.with_name("train.skipped.jsonl")
    ledger.write_text("{}\n")
    assert codes(check(folder, ledger)) == {}


def test_a_suggestion_is_one_of_the_words_that_are_listed() -> None:
    for mistyped in ("x-rya", "colonoscop", "mammogramm", "flaire", "MRT"):
        with pytest.raises(ValueError, match="unknown modality") as caught:
            canonical_modality(mistyped)
        hint = re.search(r"did you mean '([^']+)'\?; expected one of (.*?)\.", str(caught.value))
        assert hint is None or hint[1] in hint[2].split(", "), str(caught.value)


def test_several_processes_find_the_same_as_one(tmp_path: Path) -> None:
    train = folder_of(tmp_path, "train", [sound_record(i, "train") for i in range(70)])
    damage(train, lambda rows: [row.update(age=-1.0) for row in rows[::9]] and None)
    copies = [sound_record(i, "test", image=sound_record(i, "train").image) for i in range(2)]
    test = folder_of(tmp_path, "test", copies)
    alone, together = (check(train, test, settings={"num_workers": n}) for n in (0, 2))
    assert codes(alone)["age-impossible"] == 8
    assert alone._replace(records=[]) == together._replace(records=[])


# ---------------------------------------------------------------- damage


def set_first(**changes: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[0].update(changes)


def turns(*texts: str, kind: str = "closed", **asked: Any) -> list[dict[str, Any]]:
    """Stored turns; `asked` are options and facts (JSON) of the first."""
    plain = {"kind": kind, "options": [], "facts": "{}"}
    roles = ("user", "assistant")
    stored = [{"role": roles[i % 2], "text": text} | plain for i, text in enumerate(texts)]
    return [stored[0] | asked, *stored[1:]]


def target(name: str, mask: np.ndarray) -> dict[str, Any]:
    return {"name": name, "rle": encode_mask(mask)}


def rotated_jpeg() -> bytes:
    image = Image.fromarray(scene(5))
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def constant_under_the_mask() -> bytes:
    image = scene(6)
    image[8:22, 6:22] = 77  # two pixels around the right kidney
    return encoded_png(image)


BLANK = {"image-blank", "mask-on-constant"}
ANYWHERE = np.zeros((HEIGHT, WIDTH), np.bool_)
ANYWHERE[3:9, 3:9] = True
EMPTY = np.zeros((HEIGHT, WIDTH), np.bool_)
OTHER_SIZE = np.ones((HEIGHT + 1, WIDTH), np.bool_)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (set_first(image=encoded_png(scene(9))), {"content-hash"}),
        (set_first(image=b"no picture"), {"image-undecodable"}),
        (set_first(image=sound_record(0, "train").image[:500]), {"image-undecodable"}),
        (set_first(image=encoded_png(scene(9)[:-1])), {"image-size"}),
        (set_first(image=encoded_png(np.full((HEIGHT, WIDTH, 3), 8, "u1"))), BLANK),
        (set_first(image=rotated_jpeg()), {"image-rotated-by-tag"}),
        (set_first(image=constant_under_the_mask()), {"mask-on-constant"}),
        (set_first(targets=[target("right kidney", OTHER_SIZE)]), {"mask-code"}),
        (set_first(targets=[{"name": "left kidney", "rle": b"0" * 23 + b"P"}]), {"mask-code"}),
        (set_first(targets=[target("left kidney", EMPTY)]), {"mask-empty"}),
        (set_first(targets=[target("left kidney", ANYWHERE)] * 2), {"target-twice"}),
        (set_first(conversations=turns("Is it?", "Yes.")), {"closed-answer-spelling"}),
        (set_first(conversations=turns("Which side?", "left")), {"closed-answer-other"}),
        (set_first(conversations=turns("Is it?", " ")), {"empty-text", "closed-answer-other"}),
        (set_first(conversations=turns("Where?", "here ", kind="open")), {"text-edges"}),
        (set_first(conversations=turns("Where?", "here", kind="opne")), {"turns"}),
        (set_first(conversations=turns("Is it?")), {"turns", "units"}),
        (set_first(conversations=turns("?", "no", facts="{")), {"row-unreadable"}),
        (set_first(conversations=turns("?", "a", kind="choice", options=["A"])), {"options-facts"}),
        (set_first(conversations=turns("?", "a", kind="open", options=["a"])), {"options-facts"}),
        (set_first(conversations=turns("?", "no", facts='{"id": "7"}')), {"options-facts"}),
        (set_first(age=-1.0), {"age-impossible"}),
        (set_first(age=1953.0), {"age-impossible"}),
        (set_first(age=float("nan")), {"age-impossible"}),
        (set_first(sex="female"), {"sex-unknown-code", "manifest-counts"}),
        (set_first(split="test"), {"row-of-another-folder"}),
        (lambda rows: rows[0].update(id=rows[1]["id"]), {"duplicate-id"}),
        (lambda rows: rows[0].update(image=rows[1]["image"]), {"image-twice"}),
        (
            lambda rows: rows[0].update(targets=[], conversations=[]),
            {"units", "manifest-counts", "no-lesson"},
        ),
        (lambda rows: rows.pop(), {"folder-unreadable"}),
    ],
)
def test_each_kind_of_damage_is_found(
    tmp_path: Path, change: Callable[[list[dict[str, Any]]], None], expected: set[str]
) -> None:
    report = check(damage(folder_of(tmp_path, "train"), change))
    found = codes(report)
    assert expected <= found.keys(), found
    assert found.keys() <= expected | {"content-hash", "manifest-counts", "checksum"}
    for finding in report.findings:
        assert finding.examples and finding.level == CODES[finding.code][0]


def test_an_altered_image_or_mask_is_named_by_its_checksum(tmp_path: Path) -> None:
    altered = set_first(image=encoded_png(scene(9)), targets=[target("left kidney", ANYWHERE)])
    found = {f.code: f for f in check(damage(folder_of(tmp_path, "train"), altered)).findings}
    assert (found["checksum"].num, found["checksum"].level) == (1, "error")
    assert "record 'tiny/train/0': its image or masks were altered" in found["checksum"].examples[0]
    reworded = set_first(conversations=turns("Is it so?", "no"))
    assert "checksum" not in codes(check(damage(folder_of(tmp_path, "test"), reworded)))


def test_a_saturated_structure_is_not_taken_for_a_misplaced_mask(tmp_path: Path) -> None:
    image = scene(6)
    image[10:20, 8:20] = 255
    record = sound_record(0, "train", image=encoded_png(image))
    assert codes(check(folder_of(tmp_path, "train", [record]))) == {}


def test_a_mirrored_folder_is_noticed_by_its_sides(tmp_path: Path) -> None:
    mirrored = [
        replace(record, targets=[(name, mask[:, ::-1]) for name, mask in record.targets])
        for record in (sound_record(i, "train") for i in range(3))
    ]
    report = check(folder_of(tmp_path, "train", mirrored))
    assert codes(report) == {"sides-disagree": 3}
    assert "3 of 3 pairs" in report.findings[0].examples[0]


def test_a_manifest_with_other_numbers_is_noticed(tmp_path: Path) -> None:
    path = folder_of(tmp_path, "train") / "manifest.json"
    path.write_text(path.read_text().replace('"left kidney": 3', '"left kidney": 4'))
    found = check(path.parent).findings[0]
    assert found.code == "manifest-counts" and "4 stated, 3 found" in found.examples[0]


# ---------------------------------------------------------------- masks


def test_small_masks_are_counted_at_both_sizes(tmp_path: Path) -> None:
    point, line = EMPTY.copy(), EMPTY.copy()
    point[1, 1] = True
    line[30, 10:30] = True
    record = sound_record(0, "train", targets=[("lesion", point), ("vessel", line)])
    path = folder_of(tmp_path, "train", [record])
    report = check(path, settings={"image_size": 16})
    summary = report.folders[0]
    assert summary.native_areas == {1: 1, 16: 1}
    # 20 * 16 * 16 / (48 * 72) = 1.48: one component, so one pixel, as the single pixel gets.
    assert summary.training_areas == {1: 2}
    assert codes(report)["mask-one-pixel"] == 2
    # Nearest neighbour looks at row 31 and column 2 of every third: both masks fall between.
    assert summary.num_thin == 2


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.0005, 0.2), st.sampled_from([8, 16, 40]))
def test_the_area_at_training_size_tells_single_pixels_exactly(
    seed: int, density: float, size: int
) -> None:
    mask = (np.random.default_rng(seed).random((48, 72)) < density).astype(np.uint8)
    mask[0, 0] = 1
    real = int(apply_mask(mask, Geometry.full(48, 72, size)).sum())
    said = training_area(mask, int(mask.sum()), size)
    assert (said == 1) == (real == 1)
    assert said >= 1 and real >= 1


# ---------------------------------------------------------------- names


def test_spelling_variants_of_targets_are_paired() -> None:
    assert target_variants(["lung", "lungs", "left lung", "liver"]) == [("lung", "lungs")]
    assert target_variants(["brain tumor", "brain tumour"]) == [("brain tumor", "brain tumour")]
    assert target_variants(["oesophagus", "esophagus"]) == [("esophagus", "oesophagus")]
    assert target_variants(["optic disc", "opticdisc"]) == [("optic disc", "opticdisc")]
    assert target_variants(["kidney left", "left kidney"]) == [("kidney left", "left kidney")]
    assert target_variants(["liver", "spleen", "left kidney", "right kidney"]) == []


def test_names_are_compared_over_all_folders(tmp_path: Path) -> None:
    mask = sound_record(0, "train").targets[0][1]
    changed = {"modality": "CT", "targets": [("kidney_right", mask), ("Lesion", mask)]}
    test = folder_of(tmp_path, "test", [sound_record(0, "test", **changed)])
    report = check(folder_of(tmp_path, "train"), test)
    found = {finding.code: finding for finding in report.findings}
    assert set(found) == {"modality-name", "target-name", "target-unseen"}
    assert "'ct' in the vocabulary" in found["modality-name"].examples[0]
    assert len(found["target-name"].examples) == 2
    assert found["target-unseen"].examples[0] == "'Lesion' in tiny/test (1)"


def test_a_side_without_its_counterpart_is_pointed_out(tmp_path: Path) -> None:
    mask = sound_record(0, "train").targets[0][1]
    record = sound_record(0, "train", targets=[("left kidney", mask)])
    report = check(folder_of(tmp_path, "train", [record]))
    assert codes(report) == {"target-one-side": 1}


# ---------------------------------------------------------------- leaks


@pytest.mark.parametrize(
    ("shared", "expected"),
    [
        ({"patient_id": "train1"}, {"leak-patient": 2}),
        ({"study_id": "train1"}, {"leak-study": 2}),
        ({"id": "tiny/train/1"}, {"leak-id": 2}),
        ({"image": encoded_png(scene(5001))}, {"leak-image": 2}),  # as the train record 1 below
    ],
)
def test_a_leak_inside_a_dataset_is_an_error(
    tmp_path: Path, shared: dict[str, Any], expected: dict[str, int]
) -> None:
    test = [sound_record(0, "test"), sound_record(1, "test", **shared)]
    train = folder_of(tmp_path, "train")
    report = check(train, folder_of(tmp_path, "test", test))
    assert codes(report) == expected
    assert report.findings[0].level == "error"
    assert "tiny/train:tiny/train/1" in report.findings[0].examples[0]


@pytest.mark.parametrize("known", [0, 17, 18])
def test_splits_without_patient_ids_are_said_to_be_unchecked(tmp_path: Path, known: int) -> None:
    train = [
        sound_record(i, "train", **({} if i < known else {"patient_id": None})) for i in range(20)
    ]
    folders = folder_of(tmp_path, "train", train), folder_of(tmp_path, "test")
    alone, together = check(folders[0]), check(*folders)
    assert codes(alone) == {}
    enough = known == 18  # a tenth may be missing
    assert [(f.code, f.level, f.where, f.num) for f in together.findings] == (
        [] if enough else [("no-patient", "warning", "tiny/train", 20 - known)]
    )


def test_two_sources_without_patient_ids_are_not_splits_of_each_other(tmp_path: Path) -> None:
    first = other_source(tmp_path, "one", "train", patient_id=None)
    second = other_source(tmp_path, "two", "test", patient_id=None, image=encoded_png(scene(78)))
    assert codes(check(first, second)) == {}


def test_a_folder_that_nothing_can_be_trained_on_is_pointed_out(tmp_path: Path) -> None:
    bare = [sound_record(i, "train", targets=[], conversations=[]) for i in range(3)]
    report = check(folder_of(tmp_path, "train", bare))
    assert [(f.code, f.level, f.num) for f in report.findings] == [("no-units", "warning", 3)]


# ---------------------------------------------------------------- contradictions


def asks(*pairs: tuple[str, str], kind: str = "open") -> list[Turn]:
    return [
        Turn(role, text, kind)
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def test_another_answer_to_the_same_question_is_found_within_a_folder_and_between_two(
    tmp_path: Path,
) -> None:
    talks = {
        "train": asks(("Which organ?", "liver"), ("which  ORGAN ?", "spleen"), ("Side?", "left")),
        "test": asks(("Side?", "right"), ("Which view?", "axial")),
    }
    folders = [
        folder_of(
            tmp_path,
            split,
            [
                sound_record(0, split, conversations=talk, image=encoded_png(scene(3))),
                sound_record(1, split, conversations=asks(("Side?", f"of {split}"))),
            ],
        )
        for split, talk in talks.items()
    ]
    inside = check(folders[0])
    assert [(f.code, f.level, f.num) for f in inside.findings] == [("answers-differ", "warning", 2)]
    (example,) = inside.findings[0].examples
    assert all(part in example for part in ("tiny/train/0", "'liver'", "'spleen'"))
    both = {f.code: f for f in check(*folders).findings}
    assert set(both) == {"leak-image", "answers-differ"}
    assert both["answers-differ"].num == 4
    assert both["answers-differ"].where == "tiny/train, tiny/test"
    assert any("tiny/test/0: 'Side?'" in example for example in both["answers-differ"].examples)


def test_the_same_answer_in_other_spelling_and_other_reports_are_no_contradiction(
    tmp_path: Path,
) -> None:
    talk = asks(("Which organ?", "Liver."), ("which organ", "liver"))
    talk += asks(("Describe it.", "All is well."), ("Describe it.", "No finding."), kind="report")
    record = sound_record(0, "train", conversations=talk)
    assert codes(check(folder_of(tmp_path, "train", [record]))) == {}


def test_a_choice_among_other_options_is_another_question_and_their_order_does_not_matter(
    tmp_path: Path,
) -> None:
    def choice(answer: str, *options: str) -> list[Turn]:
        asked = Turn("user", "Which is shown?", "choice", options)
        return [asked, Turn("assistant", answer, "choice")]

    other = [*choice("liver", "liver", "lung"), *choice("spleen", "spleen", "lung")]
    record = sound_record(0, "train", conversations=other)
    assert codes(check(folder_of(tmp_path / "a", "train", [record]))) == {}
    same = [*choice("liver", "liver", "lung"), *choice("lung", "Lung", "lung", "liver")]
    record = sound_record(0, "train", conversations=same)
    assert codes(check(folder_of(tmp_path / "b", "train", [record]))) == {}
    turned = [*choice("liver", "liver", "lung"), *choice("lung", "lung", "liver")]
    record = sound_record(0, "train", conversations=turned)
    assert codes(check(folder_of(tmp_path / "c", "train", [record]))) == {"answers-differ": 2}


# ---------------------------------------------------------------- sources that share images


def other_source(path: Path, source: str, split: str, **changes: Any) -> Path:
    """One record of another dataset."""
    record = sound_record(50, split, source=source, id=f"{source}/x", **changes)
    return write_records(path / source / split, [record])


def test_cxr_lt_and_mimic_share_patients_studies_and_images_however_they_write_them(
    tmp_path: Path,
) -> None:
    ids = {"patient_id": "p10000032", "study_id": "s50414267"}
    mimic = other_source(tmp_path, "mimic_cxr", "train", **ids)
    changed = {"patient_id": "10000032", "study_id": "50414267", "image": encoded_png(scene(77))}
    cxr_lt = other_source(tmp_path, "cxr_lt_task1", "test", **changed)
    found = codes(check(mimic, cxr_lt))
    assert {"leak-patient": 2, "leak-study": 2, "leak-id": 2}.items() <= found.items()
    assert plain_id("files/p10/P10000032", "patient_id") == "10000032"
    assert plain_id("pack", "patient_id") == "pack"


def test_equal_ids_of_unrelated_sources_are_chance_unless_they_are_long(tmp_path: Path) -> None:
    for name, level in (("12", None), ("ABD_00123", "warning")):
        first = other_source(tmp_path / name, "one", "train", patient_id=name)
        changed = {"patient_id": name, "image": encoded_png(scene(78))}
        second = other_source(tmp_path / name, "two", "test", **changed)
        found = check(first, second).findings
        assert [(f.code, f.level) for f in found] == (
            [("shared-patient-id", level)] if level else []
        )


def test_the_codes_the_docs_accept_for_vqa_rad_are_those_of_its_original_release(
    tmp_path: Path,
) -> None:
    url = "https://medpix.nlm.nih.gov/case?id=48e1dd0e-8552"
    entry = {"image_name": "synpic1.jpg", "image_case_url": url, "answer_type": "CLOSED"}
    entries = [
        {**entry, "qid": 1, "question": "Is it?", "answer": "yes", "phrase_type": "freeform"},
        {**entry, "qid": 2, "question": "Why?", "answer": "no", "phrase_type": "test_freeform"},
    ]
    put_json(tmp_path / "raw" / vqa_rad.JSON_NAME, entries)
    put(tmp_path / "raw" / vqa_rad.IMAGE_FOLDER / "synpic1.jpg", jpeg(scene(1)))
    run_release(vqa_rad, tmp_path / "raw", tmp_path / "out")
    splits = [tmp_path / "out" / "vqa_rad" / split for split in ("train", "test")]
    page = (ROOT / "docs" / "data.md").read_text()
    advice = re.split(r"official split of\s+VQA-RAD", page)[1].split("\n\n")[0]
    accepted = re.findall(r"--allow\s+([a-z-]+)", advice)
    errors = [f.code for f in check(*splits).findings if f.level == "error"]
    assert sorted(errors) == sorted(accepted)


def jpeg(image: np.ndarray, quality: int = 80) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def test_a_recompressed_figure_in_another_split_is_a_warning_with_a_picture(tmp_path: Path) -> None:
    train = folder_of(tmp_path, "train")
    copied = sound_record(0, "test", image=jpeg(scene(5001)))
    report = check(train, folder_of(tmp_path, "test", [copied]))
    assert [(f.code, f.level, f.num) for f in report.findings] == [("leak-near", "warning", 2)]
    assert report.near == [((0, 1), (1, 0))]
    written = write_sheets(report, tmp_path)
    assert [path.name for path in written] == ["orientation_1.png", "near_1.png"]
    for path in written:
        with Image.open(path) as sheet:
            assert min(sheet.size) > 300


# ---------------------------------------------------------------- hashes


def test_the_hash_forgives_compression_and_size_and_tells_images_apart() -> None:
    hashes = np.stack([fingerprint(scene(seed)).perceptual[0] for seed in range(60)])
    for seed in range(20):
        again = np.array(Image.open(io.BytesIO(jpeg(scene(seed)))))
        assert hamming(hashes[seed][None], fingerprint(again).perceptual[:1])[0] <= NEAR_BITS
        assert (fingerprint(again).exact != fingerprint(scene(seed)).exact).any()
    i, j = np.triu_indices(60, 1)
    assert hamming(hashes[i], hashes[j]).min() > NEAR_BITS
    assert fingerprint(np.full((9, 9, 3), 40, np.uint8)).is_blank


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_banded_search_finds_the_near_pairs_of_different_groups(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (30, 256), dtype=np.uint8)
    for copy in range(15, 30):  # copies with up to 2 * NEAR_BITS changed bits
        bits[copy] = bits[copy - 15]
        bits[copy, rng.choice(256, int(rng.integers(0, 2 * NEAR_BITS)), replace=False)] ^= 1
    hashes = np.packbits(bits, axis=1).view(np.uint64)
    exact, groups = rng.integers(0, 2**60, (30, 2), np.uint64), rng.integers(0, 3, 30)
    exact[20] = exact[5]  # the very same pixels are another finding
    found = {tuple(pair) for pair in near_pairs(hashes[:, None], exact, groups).tolist()}
    i, j = np.triu_indices(30, 1)
    wanted = (groups[i] != groups[j]) & (exact[i] != exact[j]).any(axis=1)
    distance = hamming(hashes[i], hashes[j])
    near, sure = wanted & (distance <= NEAR_BITS), wanted & (distance < 16)
    pairs = list(zip(i.tolist(), j.tolist(), strict=True))
    assert found <= {pair for pair, ok in zip(pairs, near, strict=True) if ok}
    # With fewer changed bits than bands, one band at least is whole.
    assert found >= {pair for pair, ok in zip(pairs, sure, strict=True) if ok}
    assert hamming(hashes[:1], hashes[1:2])[0] == int((bits[0] != bits[1]).sum())


def test_a_copy_is_found_among_many_hashes_that_agree_in_every_band_but_one() -> None:
    rng = np.random.default_rng(0)
    bands = np.tile(rng.integers(0, 2**16, 16, np.uint16), (2000, 1))
    bands[:, 15] = rng.permutation(2**16)[:2000]
    bands[:, 8:15] = rng.integers(0, 2**16, (2000, 7), np.uint16)
    bands[1999] = bands[700]
    bands[1999, 15] ^= 1
    exact = np.arange(4000, dtype=np.uint64).reshape(-1, 2)
    groups = np.repeat([0, 1], [1999, 1])
    found = near_pairs(bands.view(np.uint64)[:, None], exact, groups)
    assert found.tolist() == [[700, 1999]]


def cropped(image: np.ndarray, left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """With these shares of the sides cut off."""
    height, width = image.shape[:2]
    return image[
        round(top * height) : height - round(bottom * height),
        round(left * width) : width - round(right * width),
    ]


def turned(image: np.ndarray, degrees: float) -> np.ndarray:
    return np.array(Image.fromarray(image).rotate(degrees, Image.Resampling.BILINEAR))


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mirrored": lambda image: image[:, ::-1],
    "upside down": lambda image: image[::-1],
    "inverted": lambda image: 255 - image,
    "mirrored and inverted": lambda image: 255 - image[:, ::-1],
    "contrast": lambda image: (0.6 * image + 50).astype(np.uint8),
    "gamma": lambda image: (255 * (image / 255.0) ** 1.7).astype(np.uint8),
    "cropped": lambda image: cropped(image, 0.025, 0.025, 0.025, 0.025),
    "cropped at a corner": lambda image: cropped(image, 0.05, 0.0, 0.0, 0.05),
    "cropped at a side": lambda image: cropped(image, 0.0, 0.04, 0.0, 0.0),
    "turned": lambda image: turned(image, 3),
    "turned back": lambda image: turned(image, -2),
    "mirrored and cropped": lambda image: cropped(image[:, ::-1], 0.025, 0.025, 0.025, 0.025),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("whole_in_train", [True, False])
def test_a_changed_copy_in_another_split_is_found_whichever_is_the_original(
    tmp_path: Path, change: str, whole_in_train: bool
) -> None:
    # Larger than the other scenes: of 48 x 72 pixels, a twentieth is two.
    image = np.array(Image.fromarray(scene(5)).resize((288, 192), Image.Resampling.BICUBIC))
    pair = [image, np.ascontiguousarray(CHANGES[change](image))]
    original, copy = pair if whole_in_train else pair[::-1]
    records = [
        sound_record(7, split, image=encoded_png(pixels), targets=[], height=h, width=w)
        for split, pixels in (("train", original), ("test", copy))
        for h, w in [pixels.shape[:2]]
    ]
    others = [sound_record(index, "train") for index in range(3)]
    report = check(
        folder_of(tmp_path, "train", [*others, records[0]]),
        folder_of(tmp_path, "test", records[1:]),
    )
    assert {f.code: f.num for f in report.findings} == {"leak-near": 2}
    assert report.near == [((0, 3), (1, 0))]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=12))
def test_shared_keys_agree_with_counting(items: list[tuple[int, int]]) -> None:
    keys = np.array([key for key, _ in items], np.uint64)
    parts = np.array([part for _, part in items], np.int64)
    found = shared_keys(keys, parts)
    mixed = {k for k in keys.tolist() if len({p for key, p in items if key == k}) > 1}
    assert found.items.tolist() == [i for i, (key, _) in enumerate(items) if key in mixed]
    assert {keys[a] for a, _ in found.examples} == mixed
    assert all(keys[a] == keys[b] and parts[a] != parts[b] for a, b in found.examples)


# ---------------------------------------------------------------- the program


def run(*arguments: str) -> Any:
    return subprocess.run(
        [sys.executable, "scripts/lint_data.py", "--num-workers", "0", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def finish(*arguments: str) -> int:
    """Exit code of the program, run in this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["lint_data.py", "--num-workers", "0", *arguments])
        lint_data.main()
    code = ended.value.code
    assert isinstance(code, int)
    return code


def test_the_exit_code_and_the_report_say_the_same(tmp_path: Path, capsys: Any) -> None:
    train, output = folder_of(tmp_path, "train"), str(tmp_path / "out")
    leaking = [sound_record(0, "test", patient_id="train1")]
    test = folder_of(tmp_path, "test", leaking)
    assert finish(str(train), "--output", output, "--strict", "--no-sheets") == 0
    assert finish(str(train), str(test), "--output", output) == 1
    assert "leak-patient" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "lint.json").read_text())
    assert (report["errors"], report["warnings"]) == (1, 0)
    assert report["findings"][0]["code"] == "leak-patient"
    page = (tmp_path / "out" / "lint.html").read_text()
    assert "leak-patient" in page and "data:image/png;base64," in page
    # The folder table of the terminal: 3 images, 6 masks; and the bin of the 120 native pixels.
    rows = page.replace("</td>", "")
    assert "<tr><td>tiny/train<td>3<td>6<td>0<td>0<td>0<td>0<" in rows
    assert "<tr><td>tiny/train<td>native<td>64 to 127: 6<" in rows
    allowed = ("--allow", "leak-patient", "--no-sheets", "--strict")
    assert finish(str(train), str(test), "--output", output, *allowed) == 0
    report = json.loads((tmp_path / "out" / "lint.json").read_text())
    assert (report["errors"], report["allowed"]) == (0, 1)


def test_warnings_fail_only_when_asked_to(tmp_path: Path) -> None:
    change = set_first(conversations=turns("Which side?", "left"))
    train = str(damage(folder_of(tmp_path, "train"), change))
    common = ("--output", str(tmp_path / "out"), "--no-sheets", "--allow", "content-hash")
    assert finish(train, *common) == 0
    assert finish(train, *common, "--strict") == 1


def test_text_of_the_data_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    change = set_first(id="<script>alert(1)</script>", age=-1.0)
    train = damage(folder_of(tmp_path, "train"), change)
    finish(str(train), "--output", str(tmp_path / "out"), "--no-sheets")
    page = (tmp_path / "out" / "lint.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_a_wrong_code_is_named_with_the_nearest(tmp_path: Path) -> None:
    done = run(str(folder_of(tmp_path, "train")), "--allow", "leak-pateint")
    assert done.returncode == 2 and done.stderr.startswith("--allow: ")  # no progress bar
    assert "did you mean 'leak-patient'" in done.stderr and "Traceback" not in done.stderr


def test_where_no_folder_opens_there_is_no_table_and_one_kind_is_singular(
    tmp_path: Path, capsys: Any
) -> None:
    assert finish(str(tmp_path / "absent"), "--output", str(tmp_path / "out")) == 1
    printed = capsys.readouterr().out
    assert "1 kind of error, 0 kinds of warning;" in printed
    assert "images" not in printed
    page = (tmp_path / "out" / "lint.html").read_text()
    assert "folder-unreadable" in page and "Mask areas" not in page

"""The IMed-361M converter: every pixel kept, sides kept, nothing lost in silence."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import sparse

from biascare.records import Records, decode_mask, vocabulary
from biascare.records.vocabulary import canonical_modality, canonical_target
from data_prep import imed361m
from data_prep.formats.orientation import (
    ORIENTATIONS,
    TURNS,
    orientation_of,
    parse_overrides,
    sides_agree,
    turn_image,
    turn_mask,
)
from data_prep.imed361m import UnusableItemError, patient_of, read_rows, row_names
from data_prep.pipeline.ledger import Ledger, check_skipped, merge_ledgers
from tests.data_prep.raw_releases import assert_lint_passes

LABELS = {"0": "background", "1": "liver", "2": "kidney_right", "3": "kidney_left", "4": "postcava"}
HEIGHT, WIDTH = 8, 12


def raw_masks() -> np.ndarray:
    """[4, H, W]: liver, a one-pixel right kidney inside it, left kidney, and an empty row."""
    masks = np.zeros((4, HEIGHT, WIDTH), dtype=np.uint8)
    masks[0, 1:5, 1:6] = 1
    masks[1, 2, 3] = 1
    masks[2, 5:7, 9:12] = 1
    return masks


class Release:
    """Writes a sub-dataset as IMed-361M lays it out."""

    def __init__(self, folder: Path, labels: dict[str, str] = LABELS) -> None:
        self.folder, self.labels = folder, labels
        self.lists: dict[str, list[dict[str, str]]] = {"training": [], "test": []}
        for name in ("image", "label", "imask"):
            (folder / name).mkdir(parents=True)

    def add(self, stem: str, masks: np.ndarray, split: str = "training", prefix: str = "") -> None:
        num, height, width = masks.shape
        label = f"label/x___{stem}.({num}, {height}, {width}, 1).npz"
        sparse.save_npz(self.folder / label, sparse.csr_matrix(masks.reshape(num, -1)))
        pixels = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
        Image.fromarray(pixels).save(self.folder / "image" / f"{stem}.png")
        entry = {"image": f"{prefix}image/{stem}.png", "label": prefix + label}
        self.lists[split].append(entry | {"imask": f"imask/x___{stem}.npy"})

    def finish(self, **changes: Any) -> Path:
        header = {
            "name": self.folder.name,
            "modality": {"0": "ct"},
            "labels": self.labels,
            "numTraining": len(self.lists["training"]),
            "numTest": len(self.lists["test"]),
            **self.lists,
        }
        (self.folder / "dataset.json").write_text(json.dumps(header | changes))
        return self.folder


def run(source: Path, output: Path, *more: str) -> None:
    imed361m.main(["--source", str(source), "--output", str(output), *more])
    assert_lint_passes(output)


def skipped(path: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["item"], line["reason"]) for line in lines]


def masks_of(row: dict[str, Any]) -> dict[str, np.ndarray]:
    return {
        target["name"]: decode_mask(target["rle"], row["height"], row["width"])
        for target in row["targets"]
    }


def test_every_pixel_of_every_row_is_kept_under_its_name(tmp_path: Path) -> None:
    release = Release(tmp_path / "raw" / "Unknown")
    release.add("ABD_001_100", raw_masks())
    release.add("ABD_002_7", raw_masks()[:, ::-1], split="test")
    run(release.finish().parent, tmp_path / "out")
    row = Records(tmp_path / "out" / "Unknown" / "train")[0]
    masks = masks_of(row)
    assert list(masks) == ["liver", "right kidney", "left kidney"]  # the empty row is no target
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        "liver": 20, "right kidney": 1, "left kidney": 6,
    }  # fmt: skip
    for index, mask in enumerate(masks.values()):
        np.testing.assert_array_equal(mask, raw_masks()[index])
    assert (row["id"], row["patient_id"]) == ("Unknown/ABD_001_100", "ABD_001")
    assert (row["task"], row["modality"], row["conversations"]) == ("segmentation", "ct", [])
    assert [row[name] for name in ("sex", "age", "race", "study_id")] == [None] * 4
    test = Records(tmp_path / "out" / "Unknown" / "test")
    assert (len(test), test[0]["id"]) == (1, "Unknown/ABD_002_7")
    assert not list((tmp_path / "out").rglob("*.jsonl"))


def test_an_unturned_image_keeps_its_bytes(tmp_path: Path) -> None:
    release = Release(tmp_path / "raw" / "Unknown")
    release.add("a", raw_masks())
    run(release.finish(), tmp_path / "out")
    original = (release.folder / "image" / "a.png").read_bytes()
    assert Records(tmp_path / "out" / "Unknown" / "train")[0]["image"] == original


def test_btcv_is_flipped_image_and_masks_alike(tmp_path: Path) -> None:
    release = Release(tmp_path / "raw" / "BTCV")
    release.add("ABD_001_100", raw_masks())
    run(release.finish(), tmp_path / "out")
    row = Records(tmp_path / "out" / "BTCV" / "train")[0]
    np.testing.assert_array_equal(masks_of(row)["liver"], raw_masks()[0, ::-1])
    original = np.asarray(Image.open(release.folder / "image" / "ABD_001_100.png"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["image"]))), original[::-1])


def test_a_quarter_turn_swaps_height_and_width(tmp_path: Path) -> None:
    release = Release(tmp_path / "raw" / "KiTS")
    release.add("case_00001_12", raw_masks())
    run(release.finish(), tmp_path / "out", "--orientation", "KiTS=rotate_90")
    row = Records(tmp_path / "out" / "KiTS" / "train")[0]
    assert (row["height"], row["width"]) == (WIDTH, HEIGHT)
    np.testing.assert_array_equal(masks_of(row)["liver"], np.rot90(raw_masks()[0]))


@pytest.mark.parametrize("turn", TURNS)
def test_a_turn_does_to_a_mask_what_it_does_to_an_image(turn: str) -> None:
    mask = np.random.default_rng(0).random((5, 7)) < 0.5
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(buffer, "PNG")
    turned = np.asarray(Image.open(io.BytesIO(turn_image(buffer.getvalue(), turn))))
    np.testing.assert_array_equal(turned.astype(np.bool_), turn_mask(mask, turn))


def test_the_orientation_table_is_honest_about_what_was_reviewed() -> None:
    assert orientation_of("btcv").reviewed
    assert [name for name, entry in ORIENTATIONS.items() if entry.reviewed] == ["BTCV"]
    assert all(entry.turn in TURNS for entry in ORIENTATIONS.values())
    assert orientation_of("never seen").turn == "none"
    assert "not in the reviewed table" in orientation_of("never seen").note
    assert orientation_of("finding-lungs").turn == "none"  # direction of its rotation unknown
    assert orientation_of("BTCV", {"BTCV": "none"}).turn == "none"


def test_a_wrong_orientation_option_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'flip_vertical'"):
        parse_overrides(["BTCV=flip_vertica"])
    with pytest.raises(ValueError, match="NAME=TURN"):
        parse_overrides(["BTCV"])


def test_mirrored_images_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = Release(tmp_path / "raw" / "Unknown")
    release.add("a", raw_masks()[:, :, ::-1])
    run(release.finish(), tmp_path / "out")
    assert "look mirrored" in " ".join(capsys.readouterr().out.split())
    right, left = raw_masks()[1].astype(np.bool_), raw_masks()[2].astype(np.bool_)
    assert sides_agree([("right kidney", right), ("left kidney", left)]) == [True]
    assert sides_agree([("left kidney", right), ("right kidney", left)]) == [False]
    assert sides_agree([("right kidney", right), ("liver", left)]) == []


def damaged_release(folder: Path) -> Path:
    """One good image and one of each kind of trouble."""
    release = Release(folder)
    release.add("good", raw_masks())
    release.add("empty", raw_masks() * 0)
    release.add("gone", raw_masks())
    release.add("resized", raw_masks())
    release.add("cut", raw_masks())
    release.add("rows", raw_masks()[:2])
    (folder / "image" / "gone.png").unlink()
    Image.new("RGB", (WIDTH, HEIGHT - 1)).save(folder / "image" / "resized.png")
    cut = folder / "image" / "cut.png"
    cut.write_bytes(cut.read_bytes()[:-40])
    training = release.lists["training"]
    training.append(training[0] | {"image": "../secret.png"})
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder.parent / "secret.png")
    training.append(dict(training[0]))
    release.lists["test"].append(dict(training[0]))
    return release.finish()


def test_what_cannot_be_used_is_in_the_ledger_with_its_reason(tmp_path: Path) -> None:
    source = damaged_release(tmp_path / "raw" / "Unknown")
    with pytest.raises(ValueError, match="no record was written"):  # the test list is one leak
        run(source, tmp_path / "out", "--max-skipped", "1")
    assert len(Records(tmp_path / "out" / "Unknown" / "train")) == 1
    assert skipped(tmp_path / "out" / "Unknown" / "train.skipped.jsonl") == [
        ("image/empty.png", "no mask has a pixel"),
        ("image/gone.png", "file missing"),
        ("image/resized.png", "image and label differ in size"),
        ("image/cut.png", "image unreadable"),
        ("image/rows.png", "label shape, file name and label list disagree"),
        ("../secret.png", "path leaves the source"),
        ("image/good.png", "image listed before"),
    ]
    assert skipped(tmp_path / "out" / "Unknown" / "test.skipped.jsonl") == [
        ("image/good.png", "image listed before")
    ]


def test_too_many_skipped_items_are_an_error_and_leave_no_folder(tmp_path: Path) -> None:
    source = damaged_release(tmp_path / "raw" / "Unknown")
    with pytest.raises(ValueError, match=r"7 of 8 items skipped, more than the limit of 1\.00%"):
        run(source, tmp_path / "out")
    left = sorted(path.name for path in (tmp_path / "out" / "Unknown").iterdir())
    assert left == [".test.shards", ".train.shards", "test.skipped.jsonl", "train.skipped.jsonl"]


def test_paths_may_start_with_the_name_of_the_dataset(tmp_path: Path) -> None:
    release = Release(tmp_path / "raw" / "Unknown")
    release.add("a", raw_masks(), prefix="Unknown/")
    release.add("b", raw_masks())
    run(release.finish().parent, tmp_path / "out")
    records = Records(tmp_path / "out" / "Unknown" / "train")
    assert [records[n]["id"] for n in range(2)] == ["Unknown/a", "Unknown/b"]


def test_worker_processes_give_the_same_records(tmp_path: Path) -> None:
    release = Release(tmp_path / "raw" / "Unknown")
    for n in range(3):
        release.add(f"a_{n}", raw_masks())
    source = release.finish()
    run(source, tmp_path / "one")
    run(source, tmp_path / "two", "--num-workers", "1")
    one, two = (Records(tmp_path / name / "Unknown" / "train") for name in ("one", "two"))
    assert one.manifest == two.manifest


def test_a_second_run_changes_nothing_and_a_changed_list_is_noticed(tmp_path: Path) -> None:
    release = Release(tmp_path / "raw" / "Unknown")
    release.add("a", raw_masks())
    folder = tmp_path / "out" / "Unknown" / "train"
    run(release.finish(), tmp_path / "out")
    before = folder.stat().st_mtime_ns
    run(release.folder, tmp_path / "out")
    assert folder.stat().st_mtime_ns == before
    release.add("b", raw_masks())
    with pytest.raises(ValueError, match="not prepared from these items"):
        run(release.finish(), tmp_path / "out")
    run(release.folder, tmp_path / "out", "--overwrite")
    assert len(Records(folder)) == 2


def test_a_pickle_in_a_label_is_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "x___a.(1, 2, 2, 1).npz"
    array = np.array([{"code": "evil"}], dtype=object)
    np.savez(path, indices=array, indptr=array, data=array, shape=array, format=array)
    with pytest.raises(UnusableItemError, match="unreadable"):
        list(read_rows(path, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": np.array([9])}, "not a valid CSR"),
        ({"indptr": np.array([0, 5])}, "not a valid CSR"),
        ({"shape": np.array([1, 5])}, "disagree"),
        ({"format": np.array(b"coo")}, "not a CSR"),
    ],
)
def test_a_malformed_label_is_unusable(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "x___a.(1, 2, 2, 1).npz"
    good = {
        "indices": np.array([3]),
        "indptr": np.array([0, 1]),
        "data": np.array([1]),
        "shape": np.array([1, 4]),
        "format": np.array("csr"),
    }
    np.savez(path, **good)
    ((row, mask),) = read_rows(path, 1)
    assert (row, mask.tolist()) == (0, [[False, False], [False, True]])
    np.savez(path, **(good | changes))
    with pytest.raises(UnusableItemError, match=message):
        list(read_rows(path, 1))


def test_labels_are_counted_from_one_in_numeric_order() -> None:
    labels = {str(n): f"organ {n}" for n in (10, 2, 1, 3, 4, 5, 6, 7, 8, 9)} | {"0": "background"}
    assert row_names(labels) == tuple(f"organ {n}" for n in range(1, 11))
    assert row_names({"0": "background", "1": "b", "2": "a"}, sorted_labels=True) == ("a", "b")
    for wrong in ({"0": "background", "2": "b"}, {"0": "liver", "1": "b"}, {"0": "background"}):
        with pytest.raises(ValueError, match="numbered 0"):
            row_names(wrong)
    with pytest.raises(ValueError, match="several labels are called"):
        row_names({"0": "background", "1": "postcava", "2": "inferior_vena_cava"})


def test_headers_that_are_not_imed361m_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no dataset\.json"):
        run(tmp_path, tmp_path / "out")
    release = Release(tmp_path / "raw" / "Unknown")
    release.add("a", raw_masks())
    release.finish(modality={"0": "ultrasond"})
    with pytest.raises(ValueError, match="did you mean 'ultrasound'"):
        run(release.folder, tmp_path / "out")
    release.finish(modality={"0": "ct", "1": "mr"})
    with pytest.raises(ValueError, match="one modality per sub-dataset"):
        run(release.folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"not in the source: \['BTCV'\]"):
        run(release.finish(), tmp_path / "out", "--orientation", "BTCV=none")


@pytest.mark.parametrize(
    ("stem", "modality", "patient"),
    [
        ("ABD_001_100", "ct", "ABD_001"),
        ("amos_0004_23", "mri", "amos_0004"),
        ("patient001_frame01_1", "mri", "patient001"),
        ("patient001_frame12_1", "mri", "patient001"),
        ("A1_2_3", "ct", "A1_2"),
        ("ISIC_0000001", "dermoscopy", None),
        ("scan_7", "ct", None),  # one number: a slice or a patient, the name does not tell
        ("CHNCXR_0001_0", "xray", None),  # the last number is the diagnosis, not a slice
    ],
)
def test_a_patient_is_taken_from_slice_names_only(
    stem: str, modality: str, patient: str | None
) -> None:
    assert patient_of(stem, modality) == patient


def test_target_names_keep_their_side() -> None:
    assert canonical_target("kidney_right") == "right kidney"
    assert canonical_target("Left_Kidney") == "left kidney"
    assert canonical_target("adrenal_gland_left") == "left adrenal gland"
    assert canonical_target("rib_left_7") == "left rib 7"
    assert canonical_target("iliac_vena_right") == "right iliac vein"
    assert canonical_target("postcava") == "inferior vena cava"
    assert canonical_target("covid-19_infection") == "COVID-19 infection"
    assert canonical_target("lung_upper_lobe_left") == "left lung upper lobe"
    # A letter is a side where the structure is paired, and may be a level elsewhere.
    assert canonical_target("Cochlea_L") == "left cochlea"
    assert canonical_target("stage_l") == "stage l"
    assert canonical_target("left lung of right patient left") == "left lung of right patient left"


SEGRAP = (
    "Cochlea", "Eustachian tube bone", "Eye", "Hippocampus", "Internal auditory canal", "Lens",
    "Mandible", "Mastoid", "Middle ear", "Optic nerve", "Parotid", "Submandibular", "Temporal lobe",
    "Temporomandibular joint", "Tympanic cavity", "Vestibular semicircular canal",
)  # fmt: skip
"""Its paired structures; the challenge writes "Cochlea left" and names the files Cochlea_L."""


@pytest.mark.parametrize("name", SEGRAP)
def test_a_side_in_front_at_the_end_or_as_a_letter_is_one_target(name: str) -> None:
    spellings = (f"{name} left", f"left_{name}", f"{name}_L", f"{name.replace(' ', '_')}_left")
    (canonical,) = {canonical_target(spelling) for spelling in spellings}
    assert canonical.startswith("left ")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("left_lens", "lens_left"), ("mandible_right", "right mandible"),
        ("left optical nerve", "optic_nerve_left"), ("left parotid", "parotid_gland_left"),
        ("left temporal lobes", "temporal_lobe_left"), ("TMjoint_R", "right jaw joint"),
        ("left submandibular gland", "Submandibular_L"), ("optical chiasma", "Chiasm"),
        ("larynx_glottis", "Glottis"), ("right clavicula", "clavicle_right"),
        ("left TMJ", "temporomandibular_joint_left"), ("OpticNrv_L", "left optic nerve"),
    ],
)  # fmt: skip
def test_structures_that_releases_name_twice_are_one_target(one: str, other: str) -> None:
    assert canonical_target(one) == canonical_target(other)
    with pytest.raises(ValueError, match="needs a name"):
        canonical_target("_")


def test_no_table_entry_changes_a_side_or_needs_a_second_pass() -> None:
    names = [*vocabulary.TARGET_SYNONYMS, *vocabulary._RIBS]
    for name in [*names, *(f"{name} {side}" for name in names for side in vocabulary.SIDES)]:
        canonical = canonical_target(name)
        assert canonical_target(canonical) == canonical, name
        for side in vocabulary.SIDES:
            assert (side in name.split()) <= (side in canonical.split()), name


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(categories=("Ll", "Lu", "Nd"), include_characters="_- "), min_size=1))
def test_canonical_target_is_idempotent(name: str) -> None:
    if name.replace("_", " ").strip():
        canonical = canonical_target(name)
        assert canonical_target(canonical) == canonical


def test_modalities_have_one_spelling() -> None:
    spellings = {"CT": "ct", "mr": "mri", "X_ray": "xray", "US": "ultrasound", "oct": "oct"}
    assert {name: canonical_modality(name) for name in spellings} == spellings
    assert all(canonical_modality(name) == name for name in vocabulary.MODALITIES)
    aliases = [alias for group in vocabulary.MODALITIES.values() for alias in group]
    assert len(aliases) == len(set(aliases))


def test_ledgers_are_merged_in_order_and_held_against_the_limit(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("second", "first")]
    for path in paths:
        ledger = Ledger(path)
        ledger.count(2)
        ledger.skip(path.name, "file missing")
        assert (ledger.num_items, ledger.num_skipped) == (2, 1)
    merged = tmp_path / "out" / "train.skipped.jsonl"
    merge_ledgers(paths, merged)
    assert skipped(merged) == [("second", "file missing"), ("first", "file missing")]
    check_skipped(merged, num_items=4, limit=0.5)
    with pytest.raises(ValueError, match=r"2 of 4 items .* 49\.00% \(2 x file missing\)"):
        check_skipped(merged, num_items=4, limit=0.49)
    with pytest.raises(ValueError, match="between 0 and 1"):
        check_skipped(merged, num_items=4, limit=2)
    merge_ledgers([], merged)
    assert not merged.exists()  # an older ledger does not speak for a clean run
    Ledger(paths[0])
    assert not paths[0].exists()


ZOO = {
    "Plain": "none",
    "Mirrored": "flip_horizontal",
    "BTCV": "flip_vertical",  # by the reviewed table
    "Rotated": "rotate_90",
    "Turned": "transverse",
}


def zoo_masks(index: int) -> np.ndarray:
    """[4, 8, 12] random, overlapping: a half, a single pixel in a corner, a line, or an empty."""
    masks = np.zeros((4, HEIGHT, WIDTH), dtype=np.uint8)
    masks[0] = np.random.default_rng(index).random((HEIGHT, WIDTH)) < 0.5
    masks[1, [0, 0, -1, -1][index % 4], [0, -1, 0, -1][index % 4]] = 1
    masks[2, index % HEIGHT] = 1
    masks[3] = masks[0] if index % 2 else 0
    return masks


def test_every_pixel_of_a_folder_of_many_sub_datasets_is_accounted_for(tmp_path: Path) -> None:
    for name in ZOO:
        release = Release(tmp_path / "raw" / name)
        for index in range(8):
            release.add(f"v_{index}", zoo_masks(index), "training" if index < 6 else "test")
        release.finish()
    options = [f"--orientation={n}={t}" for n, t in ZOO.items() if n not in ("Plain", "BTCV")]
    run(tmp_path / "raw", tmp_path / "out", "--items-per-shard", "4", *options)
    names = row_names(LABELS)
    for name, turn in ZOO.items():
        rows = [
            row
            for split in ("train", "test")
            for records in [Records(tmp_path / "out" / name / split)]
            for row in map(records.__getitem__, range(len(records)))
        ]
        assert [row["id"] for row in rows] == [f"{name}/v_{index}" for index in range(8)]
        for index, row in enumerate(rows):
            raw = zoo_masks(index)
            written = masks_of(row)
            assert list(written) == [n for n, mask in zip(names, raw, strict=True) if mask.any()]
            for target, mask in zip(names, raw, strict=True):
                if target in written:  # turned back, every pixel is where it was
                    back = turn_mask(written[target], INVERSE.get(turn, turn))
                    np.testing.assert_array_equal(back, mask)
            raw_image = Image.open(tmp_path / "raw" / name / "image" / f"v_{index}.png")
            turned = np.asarray(Image.open(io.BytesIO(row["image"])))
            back = np.stack([turn_mask(turned[..., c], INVERSE.get(turn, turn)) for c in range(3)])
            np.testing.assert_array_equal(back.transpose(1, 2, 0), np.asarray(raw_image))


INVERSE = {"rotate_90": "rotate_270", "rotate_270": "rotate_90"}
"""The other turns undo themselves."""

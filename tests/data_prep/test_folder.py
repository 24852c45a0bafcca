"""A user's own images and masks: pairs by name, values by name, nothing dropped."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from biascare.data.transforms import decode_image
from biascare.records import Records, decode_mask
from data_prep import folder
from data_prep.formats.label_maps import read_label_map
from data_prep.pipeline.attributes import UNREADABLE_AGE
from data_prep.pipeline.options import cut_masks, note_shares, parse_labels, stem_of
from data_prep.pipeline.release_files import file_inside, files_below
from data_prep.pipeline.shards import UnusableItemError
from tests.data_prep.raw_releases import assert_lint_passes

HEIGHT, WIDTH = 4, 6
LABELS = np.array([[0, 1, 1, 2, 0, 0]] * HEIGHT, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def save_image(path: Path, **options: Any) -> None:
    save(path, np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3), **options)


def run(root: Path, *more: str) -> Path:
    base = ["--images", str(root / "img"), "--masks", str(root / "seg")]
    names = ["--name", "mine", "--modality", "ct", "--output", str(root / "out")]
    folder.main([*base, *names, *more])
    assert_lint_passes(root / "out")
    return root / "out" / "mine"


def masks_of(row: dict[str, Any]) -> dict[str, list[list[int]]]:
    return {
        target["name"]: decode_mask(target["rle"], row["height"], row["width"]).tolist()
        for target in row["targets"]
    }


def ledger(path: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["item"]: line["reason"] for line in lines}


def test_label_maps_are_cut_by_value(tmp_path: Path) -> None:
    save_image(tmp_path / "img" / "p1" / "a.jpg")
    save(tmp_path / "seg" / "p1" / "a.png", LABELS)
    found = run(tmp_path, "--labels", "1=liver,2=kidney_right,3=spleen", "--anatomy", "abdomen")
    row = Records(found / "train")[0]
    assert masks_of(row) == {
        "liver": (LABELS == 1).astype(int).tolist(),
        "right kidney": (LABELS == 2).astype(int).tolist(),
    }
    assert (row["id"], row["anatomy"], row["patient_id"]) == ("mine/p1/a", "abdomen", None)
    assert row["image"] == (tmp_path / "img" / "p1" / "a.jpg").read_bytes()


def test_one_folder_per_target_allows_overlap_and_missing_files(tmp_path: Path) -> None:
    for stem in "ab":
        save_image(tmp_path / "img" / f"{stem}.png")
    save(tmp_path / "seg" / "liver" / "a_mask.png", (LABELS > 0).astype(np.uint8) * 255)
    save(tmp_path / "seg" / "liver" / "b_mask.png", (LABELS > 0).astype(np.uint8) * 255)
    save(tmp_path / "seg" / "tumour" / "a_mask.tif", LABELS == 1)
    records = Records(run(tmp_path, "--mask-suffix", "_mask") / "train")
    assert masks_of(records[0]) == {
        "liver": (LABELS > 0).astype(int).tolist(),
        "tumor": (LABELS == 1).astype(int).tolist(),
    }
    assert list(masks_of(records[1])) == ["liver"]


def test_colours_are_named_or_refused(tmp_path: Path) -> None:
    colours = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    colours[0, 0], colours[1, 1:3] = (255, 0, 0), (0, 128, 255)
    save_image(tmp_path / "img" / "a.png")
    save(tmp_path / "seg" / "a.png", colours)
    with pytest.raises(ValueError, match="mask is coloured: name its colours"):
        run(tmp_path, "--labels", "1=liver")
    row = Records(run(tmp_path, "--labels", "#ff0000=liver,#0080FF=spleen") / "train")[0]
    sizes = {name: int(np.sum(mask)) for name, mask in masks_of(row).items()}
    assert sizes == {"liver": 1, "spleen": 2}


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_palette_gives_its_indices_and_grey_in_three_channels_is_grey() -> None:
    palette = Image.new("P", (WIDTH, HEIGHT))
    palette.putdata(LABELS.ravel().tolist())
    palette.putpalette([0, 0, 0, 9, 9, 9, 200, 1, 1])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    np.testing.assert_array_equal(read_label_map(buffer.getvalue()), LABELS)
    wide = LABELS.astype(np.uint16) * 300
    for mode in ("RGB", "RGBA", "LA"):
        np.testing.assert_array_equal(read_label_map(png(LABELS, mode)), LABELS)
    np.testing.assert_array_equal(read_label_map(png(wide)), wide)
    np.testing.assert_array_equal(read_label_map(png(LABELS == 1)), LABELS == 1)


def test_a_mask_that_is_not_exact_is_unusable(tmp_path: Path) -> None:
    clear = np.dstack([LABELS] * 3 + [LABELS * 100])
    with pytest.raises(UnusableItemError, match="partly transparent"):
        read_label_map(png(clear))
    with pytest.raises(UnusableItemError, match="unreadable"):
        read_label_map(png(LABELS)[:50])
    buffer = io.BytesIO()
    Image.fromarray(LABELS).save(buffer, "JPEG")
    with pytest.raises(UnusableItemError, match="JPEG mask: its values are not exact"):
        read_label_map(buffer.getvalue())
    with pytest.raises(UnusableItemError, match="not PNG, TIFF, BMP or GIF"):
        read_label_map(b"RIFF")
    buffer = io.BytesIO()
    Image.fromarray(LABELS.astype(np.float32)).save(buffer, "TIFF")
    with pytest.raises(UnusableItemError, match="float32 numbers, labels are integers"):
        read_label_map(buffer.getvalue())


def test_values_without_a_name_are_not_dropped_in_silence() -> None:
    labels = parse_labels("1=liver")
    with pytest.raises(UnusableItemError, match=r"does not name: \['2'\]"):
        cut_masks(LABELS, labels)
    ((name, mask),) = cut_masks(LABELS, labels, ignored=[2])
    assert (name, int(mask.sum())) == ("liver", 8)
    ((name, mask),) = cut_masks(LABELS, parse_labels("nonzero=lesion"), ignored=[2])
    assert (name, int(mask.sum())) == ("lesion", 8)
    ((name, mask),) = cut_masks(LABELS, parse_labels("nonzero=lesion"))
    assert int(mask.sum()) == 12


@pytest.mark.parametrize(
    "text",
    ["", "1", "1=", "0=liver", "1=liver,1=spleen", "1=liver,2=Liver", "x=liver", "1=a,#ff0000=b"],
)
def test_labels_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="label"):
        parse_labels(text)


def test_what_cannot_be_paired_is_in_the_ledger(tmp_path: Path) -> None:
    for stem in ("alone", "empty", "good", "small", "strange", "turned"):
        save_image(tmp_path / "img" / f"{stem}.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    save_image(tmp_path / "img" / "turned.png", exif=exif)
    for stem in ("good", "orphan", "turned"):
        save(tmp_path / "seg" / f"{stem}.png", LABELS)
    save(tmp_path / "seg" / "empty.png", LABELS * 0)
    save(tmp_path / "seg" / "small.png", LABELS[:3])
    save(tmp_path / "seg" / "strange.png", LABELS * 3)
    found = run(tmp_path, "--labels", "1=liver,2=spleen", "--max-skipped", "0.9")
    assert len(Records(found / "train")) == 1
    assert ledger(found / "train.skipped.jsonl") == {
        "alone.png": "no mask",
        "empty.png": "no mask has a pixel",
        "orphan.png": "no image for this mask",
        "small.png": "image and mask differ in size",
        "strange.png": "mask holds values that --labels does not name: ['3', '6']",
        "turned.png": "EXIF orientation 6: turn image and mask first",
    }


def test_a_jpeg_mask_is_refused_for_what_it_is(tmp_path: Path) -> None:
    for stem in ("a", "b", "c"):
        save_image(tmp_path / "img" / f"{stem}.png")
    save(tmp_path / "seg" / "a.png", LABELS)
    save(tmp_path / "seg" / "a.jpg", LABELS)  # beside an exact mask: of no interest
    save(tmp_path / "seg" / "b.jpg", LABELS)
    save(tmp_path / "seg" / "c.png", LABELS, format="JPEG")
    save(tmp_path / "seg" / "preview.jpg", LABELS)
    found = run(tmp_path, "--labels", "1=liver,2=spleen", "--max-skipped", "0.9")
    reason = "JPEG mask: its values are not exact, store masks as PNG"
    assert ledger(found / "train.skipped.jsonl") == {"b.png": reason, "c.png": reason}


def test_a_jpeg_mask_of_one_target_is_not_dropped_in_silence(tmp_path: Path) -> None:
    for stem in ("a", "b"):
        save_image(tmp_path / "img" / f"{stem}.png")
        save(tmp_path / "seg" / "liver" / f"{stem}.png", LABELS)
    save(tmp_path / "seg" / "spleen" / "b.jpg", LABELS)
    found = run(tmp_path, "--max-skipped", "0.5")
    assert list(ledger(found / "train.skipped.jsonl")) == ["b.png"]


def test_image_and_masks_are_turned_alike(tmp_path: Path) -> None:
    save_image(tmp_path / "img" / "a.png")
    save(tmp_path / "seg" / "a.png", LABELS)
    found = run(tmp_path, "--labels", "1=liver,2=spleen", "--turn", "rotate_90")
    row = Records(found / "train")[0]
    assert (row["height"], row["width"]) == (WIDTH, HEIGHT)
    assert masks_of(row)["spleen"] == np.rot90(LABELS == 2).astype(int).tolist()
    pixels = np.asarray(Image.open(io.BytesIO(row["image"])))
    np.testing.assert_array_equal(pixels, np.rot90(np.asarray(Image.open(tmp_path / "img/a.png"))))


def test_official_lists_decide_the_split_and_unlisted_images_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stem in ("p1/a", "p1/b", "p2/a", "p2/c"):
        save_image(tmp_path / "img" / f"{stem}.png")
        save(tmp_path / "seg" / f"{stem}.png", LABELS)
    (tmp_path / "train.txt").write_text("p1/a.png\nb\n")
    (tmp_path / "test.txt").write_text("p2/a\n")
    lists = [f"--split-list={name}={tmp_path / name}.txt" for name in ("train", "test")]
    found = run(tmp_path, "--labels", "1=liver,2=spleen", *lists)
    train = Records(found / "train")
    assert [train[k]["id"] for k in range(len(train))] == ["mine/p1/a", "mine/p1/b"]
    assert Records(found / "test")[0]["id"] == "mine/p2/a"
    assert "1 images are in no --split-list" in capsys.readouterr().out
    (tmp_path / "test.txt").write_text("p2/a\nb\n")
    with pytest.raises(ValueError, match="'b' is in the lists of 'train' and 'test'"):
        run(tmp_path, "--labels", "1=liver,2=spleen", *lists)


def test_patients_stay_together_and_a_name_without_one_is_an_error(tmp_path: Path) -> None:
    for number in range(40):
        stem = f"p{number % 10}_{number}"
        save_image(tmp_path / "img" / f"{stem}.png")
        save(tmp_path / "seg" / f"{stem}.png", LABELS)
    options = ("--labels", "1=liver,2=spleen", "--test-share", "0.4")
    found = run(tmp_path, *options, "--patient-regex", r"(p\d+)_")
    parts = [Records(found / split) for split in ("train", "test")]
    patients = [{r[k]["patient_id"] for k in range(len(r))} for r in parts]
    assert patients[0] and patients[1] and not patients[0] & patients[1]
    for pattern, message in (("(x)", "finds no patient"), ("x", "needs a group"), ("(", "regular")):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, *options, "--patient-regex", pattern)


def spread(root: Path, num_patients: int, num_images: int) -> tuple[str, ...]:
    for number in range(num_images):
        stem = f"p{number % num_patients}_{number}"
        save_image(root / "img" / f"{stem}.png")
        save(root / "seg" / f"{stem}.png", LABELS)
    return ("--labels", "1=liver,2=spleen")


def test_a_split_of_unknown_patients_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = spread(tmp_path, 10, 40)
    run(tmp_path, *labels, "--test-share", "0.4")
    said = " ".join(capsys.readouterr().out.split())
    assert "the patient of 40 of 40 images is not known" in said
    assert "may land on both sides of the split; --patient-regex finds" in said
    for more in (("--test-share", "0.4", "--patient-regex", r"(p\d+)_"), ()):
        run(tmp_path, *labels, *more, "--overwrite")
        assert "is not known" not in capsys.readouterr().out


def test_shares_that_few_patients_do_not_give_are_told_with_the_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = spread(tmp_path, 1, 10)
    regex = ("--patient-regex", r"(p\d+)_")
    run(tmp_path, *labels, *regex, "--test-share", "0.5")
    said = " ".join(capsys.readouterr().out.split())
    counts = {split: len(Records(path)) for split in ("train", "test")
              if (path := tmp_path / "out" / "mine" / split).is_dir()}  # fmt: skip
    assert sum(counts.values()) == 10 and len(counts) == 1
    for split in ("train", "test"):
        count = counts.get(split, 0)
        assert f"{split} {count} ({count / 10:.0%}, asked 50%)" in said
    assert "with few of them that is chance" in said and "val" not in said


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ({"train": 80, "test": 20}, False),
        ({"train": 71, "test": 29}, False),
        ({"train": 69, "test": 31}, True),
        ({"train": 5}, True),
        ({}, False),
    ],
)
def test_shares_are_told_beyond_ten_points_or_when_a_split_is_empty(
    counts: dict[str, int], told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    note_shares("mine", {"test": 0.2, "val": 0.0}, counts, "images")
    note_shares("mine", {"test": 0.0, "val": 0.0}, counts, "images")
    assert capsys.readouterr().out.count("shares asked for") == told


def test_a_listed_name_that_is_nowhere_is_an_error(tmp_path: Path) -> None:
    labels = spread(tmp_path, 2, 2)
    (tmp_path / "train.txt").write_text("p0_0.png\nP1_1.png\na\nb/c.png\nd\n")
    with pytest.raises(
        ValueError, match=r"4 names of --split-list .*: 'P1_1', 'a', 'b/c', \.\.\.;"
    ):
        run(tmp_path, *labels, f"--split-list=train={tmp_path / 'train.txt'}")
    (tmp_path / "train.txt").write_text("p0_0.png\nimg/p1_1.png\n")
    with pytest.raises(ValueError, match=r"1 names of --split-list .*: 'img/p1_1';"):
        run(tmp_path, *labels, f"--split-list=train={tmp_path / 'train.txt'}")


def test_other_labels_do_not_keep_the_older_folder(tmp_path: Path) -> None:
    spread(tmp_path, 1, 1)
    run(tmp_path, "--labels", "1=liver,2=spleen")
    with pytest.raises(ValueError, match=r"labels was .*spleen.*, is .*pancreas"):
        run(tmp_path, "--labels", "1=liver,2=pancreas")
    with pytest.raises(ValueError, match='other options: modality was "ct", is "mri"'):
        run(tmp_path, "--labels", "1=liver,2=spleen", "--modality", "mri")
    found = run(tmp_path, "--labels", "1=liver,2=pancreas", "--overwrite")
    assert list(masks_of(Records(found / "train")[0])) == ["liver", "pancreas"]


def test_folders_that_say_nothing_are_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "img" / "a.png")
    with pytest.raises(ValueError, match="has no folder per target"):
        run(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        run(tmp_path, "--labels", "1=liver")
    save(tmp_path / "seg" / "x" / "other.jpg", LABELS)
    with pytest.raises(ValueError, match=r"holds no mask.*JPEG masks are refused"):
        run(tmp_path)
    save(tmp_path / "seg" / "kidney_left" / "a.png", LABELS)
    save(tmp_path / "seg" / "left kidney" / "a.png", LABELS)
    with pytest.raises(ValueError, match=r"several folders .* mean \['left kidney'\]"):
        run(tmp_path)
    save_image(tmp_path / "img" / "a.jpg")
    with pytest.raises(ValueError, match="which one is meant"):
        run(tmp_path, "--labels", "1=liver")


def test_a_stem_loses_its_suffix_only() -> None:
    assert [stem_of(name) for name in ("p/a.b.nii.gz", "a.PNG", "1.2.840")] == [
        "p/a.b", "a", "1.2.840",
    ]  # fmt: skip


def test_links_of_the_users_own_source_are_followed(tmp_path: Path) -> None:
    disk = tmp_path / "another disk"
    for stem in ("p1/a", "p2/b"):
        save_image(disk / "img" / f"{stem}.png")
        save(disk / "seg" / f"{stem}.png", LABELS)
    save_image(tmp_path / "img" / "p3" / "c.png")
    save(tmp_path / "seg" / "p3" / "c.png", LABELS)
    (tmp_path / "img" / "p1").symlink_to(disk / "img" / "p1")
    (tmp_path / "img" / "p2").mkdir()
    (tmp_path / "img" / "p2" / "b.png").symlink_to(disk / "img" / "p2" / "b.png")
    for name in ("p1", "p2"):
        (tmp_path / "seg" / name).symlink_to(disk / "seg" / name)
    (tmp_path / "img" / "again").symlink_to(tmp_path / "img")  # a circle ends
    found = run(tmp_path, "--labels", "1=liver,2=spleen")
    records = Records(found / "train")
    ids = [records[k]["id"] for k in range(len(records))]
    assert ids == ["mine/p1/a", "mine/p2/b", "mine/p3/c"]
    assert list(masks_of(records[0])) == ["liver", "spleen"]


def test_a_link_that_leads_nowhere_is_named_before_any_work(tmp_path: Path) -> None:
    save_image(tmp_path / "img" / "a.png")
    save(tmp_path / "seg" / "a.png", LABELS)
    (tmp_path / "img" / "p1").symlink_to(tmp_path / "unmounted")
    with pytest.raises(ValueError, match=r"the link .*img/p1 leads nowhere \(.*unmounted\); mount"):
        run(tmp_path, "--labels", "1=liver,2=spleen")


def test_a_path_of_a_table_may_pass_a_link_of_the_source_and_never_leave_it(tmp_path: Path) -> None:
    save_image(tmp_path / "disk" / "a.png")
    (tmp_path / "secret.png").write_bytes(b"of the user")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "imgs").symlink_to(tmp_path / "disk")
    (tmp_path / "source" / "gone").symlink_to(tmp_path / "unmounted")
    source = tmp_path / "source"
    assert file_inside(source, "imgs/a.png").read_bytes() == (tmp_path / "disk/a.png").read_bytes()
    # As it is written: behind the link, ".." would be a folder of the user's own.
    for path, reason in (
        ("../secret.png", "path leaves the source"),
        (str(tmp_path / "secret.png"), "path leaves the source"),
        ("imgs/../secret.png", "file missing"),
        ("gone/a.png", "the link .*source/gone leads to no file"),
        ("b.png", "file missing"),
        ("", "entry without a path"),
    ):
        with pytest.raises(UnusableItemError, match=reason):
            file_inside(source, path)


@pytest.mark.parametrize(
    ("image", "mask", "options"),
    [
        ("a.png", "a_mask.png", ("--mask-suffix", "_mask")),
        ("a.jpg", "a.png", ("--image-extension", "jpg", "--mask-extension", ".png")),
        ("a_img.png", "a.png", ("--image-suffix", "_img")),
        ("a_training.tif", "a_manual1.gif",  # DRIVE's names
         ("--image-suffix", "_training", "--mask-suffix", "_manual1")),
    ],
)  # fmt: skip
def test_images_and_masks_in_one_folder_are_told_apart_by_name(
    tmp_path: Path, image: str, mask: str, options: tuple[str, ...]
) -> None:
    save_image(tmp_path / "both" / image)
    save(tmp_path / "both" / mask, LABELS)
    (tmp_path / "img").symlink_to(tmp_path / "both")
    (tmp_path / "seg").symlink_to(tmp_path / "both")
    (row,) = Records(run(tmp_path, "--labels", "1=liver,2=spleen", *options) / "train")
    assert row["id"] == "mine/a"
    assert masks_of(row)["spleen"] == (LABELS == 2).astype(int).tolist()
    assert not (tmp_path / "out" / "mine" / "train.skipped.jsonl").exists()


def test_one_folder_without_a_word_on_names_is_a_question_that_options_answer(
    tmp_path: Path,
) -> None:
    save_image(tmp_path / "img" / "a.jpg")
    save(tmp_path / "img" / "a.png", LABELS)
    (tmp_path / "seg").symlink_to(tmp_path / "img")
    with pytest.raises(ValueError, match=r"share .*--mask-suffix _mask.*--image-extension jpg"):
        run(tmp_path, "--labels", "1=liver,2=spleen")


def test_a_gif_of_one_frame_is_an_image(tmp_path: Path) -> None:
    pixels = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) * 10
    save(tmp_path / "img" / "a.gif", pixels)
    save(tmp_path / "seg" / "a.png", LABELS)
    row = Records(run(tmp_path, "--labels", "1=liver,2=spleen") / "train")[0]
    stored = np.asarray(Image.open(io.BytesIO(row["image"])).convert("L"))
    np.testing.assert_array_equal(stored, pixels)


# ---------------------------------------------------------------- grey of more than 8 bits


def deep_folder(tmp_path: Path, sixteen: list[np.ndarray]) -> tuple[Path, Path]:
    """16-bit PNGs as Pillow writes them, each with a mask of one pixel."""
    images, masks = tmp_path / "img", tmp_path / "seg"
    images.mkdir()
    masks.mkdir()
    for number, values in enumerate(sixteen):
        Image.fromarray(values.astype(np.uint16)).save(images / f"{number}.png")
        mask = np.zeros(values.shape, np.uint8)
        mask[0, 0] = 1
        Image.fromarray(mask).save(masks / f"{number}.png")
    return images, masks


def deep_records(tmp_path: Path, images: Path, masks: Path, *options: str) -> list[np.ndarray]:
    out = tmp_path / "out"
    command = ["--images", str(images), "--masks", str(masks), "--labels", "1=lesion"]
    command += ["--name", "deep", "--modality", "xray", "--output", str(out), *options]
    folder.main([*command, "--num-workers", "0", "--overwrite"])
    records = Records(out / "deep" / "train")
    return [decode_image(records[i]["image"])[..., 0] for i in range(len(records))]


def test_one_tissue_has_one_grey_in_an_image_and_in_its_crop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stretched one by one, the mean of the same tissue was 173 against 136."""
    whole = np.linspace(0, 4000, 64 * 64).reshape(64, 64)
    images, masks = deep_folder(tmp_path, [whole, whole[16:48, 16:48]])
    image, crop = deep_records(tmp_path, images, masks)
    assert np.array_equal(image[16:48, 16:48], crop) and image.min() == 0 and image.max() == 255
    said = capsys.readouterr().out
    assert "grey images of more than 8 bits are shown from" in said and "--window LOW HIGH" in said


def test_a_stated_window_is_used_and_stands_in_the_manifest(tmp_path: Path) -> None:
    images, masks = deep_folder(tmp_path, [np.array([[0, 1000], [2000, 4000]])])
    (image,) = deep_records(tmp_path, images, masks, "--window", "1000", "3000")
    assert image.tolist() == [[0, 0], [128, 255]]
    manifest = (tmp_path / "out" / "deep" / "train" / "manifest.json").read_text()
    assert "1000.0" in manifest and "3000.0" in manifest
    with pytest.raises(ValueError, match="got 5 5, expected LOW below HIGH"):
        deep_records(tmp_path, images, masks, "--window", "5", "5")


def test_eight_bits_are_kept_as_they_are_and_need_no_window(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, masks = deep_folder(tmp_path, [np.zeros((2, 2))])
    Image.fromarray(np.array([[7, 9], [11, 200]], np.uint8)).save(images / "0.png")
    (image,) = deep_records(tmp_path, images, masks)
    assert image.tolist() == [[7, 9], [11, 200]] and "8 bits" not in capsys.readouterr().out


def test_a_link_to_what_lies_around_the_source_is_not_followed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_image(source / "a.png")
    save_image(tmp_path / "beside.png")
    (source / "loop").symlink_to(tmp_path)
    assert [path.name for path in files_below(source)] == ["a.png"]


def test_a_folder_without_images_says_so_before_any_work(tmp_path: Path) -> None:
    save(tmp_path / "seg" / "a.png", LABELS)
    (tmp_path / "img").mkdir()
    with pytest.raises(ValueError, match=r"img holds no image \*\{\.png,"):
        run(tmp_path, "--labels", "1=liver")


def four_images(root: Path, rows: str) -> tuple[str, ...]:
    """Images and masks of two patients, with a table about them; the options to read both."""
    for number, stem in enumerate(("x/a", "x/b", "y/c", "y/d")):
        pixels = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        save(root / "img" / f"{stem}.png", pixels)
        save(root / "seg" / f"{stem}.png", LABELS)
    (root / "t.csv").write_text(rows)
    return ("--labels", "1=liver,2=spleen", "--metadata", str(root / "t.csv"))


def test_a_table_gives_masks_their_attributes_and_questions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = """image,patient,gender,age,race,question,answer,A,B,scanner,ward
x/a.png,7,female,045Y,White,Is it large?,yes,,,S1,w
a,7,female,045Y,White,Which?,B,heart,lung,S1,w
b.png,7,M,forty,,,,,,S2,w
c,8,,90+,,Empty?,,,,S1,w
gone.png,9,F,3,,,,,,S1,w
"""
    options = four_images(tmp_path, rows)
    more = ("--column", "patient_id=patient", "--column", "sex=gender", "--keep-column", "scanner")
    found = run(tmp_path, *options, *more)
    a, b, c, d = Records(found / "train")
    assert [len(masks_of(row)) for row in (a, b, c, d)] == [2] * 4
    assert [row["patient_id"] for row in (a, b, c, d)] == ["7", "7", "8", None]
    assert [(row["sex"], row["age"]) for row in (a, b, c, d)] == [
        ("F", 45.0), ("M", None), (None, 90.0), (None, None),
    ]  # fmt: skip
    assert (a["race"], b["race"]) == ("white", None)
    assert [turn["text"] for turn in a["conversations"]] == [
        "Is it large?", "yes", "Which?", "lung",
    ]  # fmt: skip
    assert [len(row["conversations"]) for row in (b, c, d)] == [0, 0, 0]
    assert a["extra"] == {"metadata": {"scanner": "S1"}}
    assert ledger(found / "train.skipped.jsonl") == {
        "x/b.png": UNREADABLE_AGE,
        "y/c.png": "line 5: question or answer is empty",
    }
    said = " ".join(capsys.readouterr().out.split())
    assert "columns not read: ward;" in said
    assert "1 of 5 rows name no image: 'gone.png'" in said
    assert "1 of 4 images have no row: 'y/d'" in said


def test_questions_of_an_image_outlive_its_mask(tmp_path: Path) -> None:
    options = four_images(tmp_path, "image,question,answer\na,Is it?,no\n")
    (tmp_path / "seg" / "x" / "a.png").unlink()
    found = run(tmp_path, *options, "--max-skipped", "0.3")
    row = Records(found / "train")[0]
    assert (masks_of(row), len(row["conversations"])) == ({}, 2)
    assert ledger(found / "train.skipped.jsonl") == {"x/a.png": "no mask"}


def test_the_patient_of_the_table_decides_the_split(tmp_path: Path) -> None:
    names = [f"{k}.png" for k in range(60)]
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        save(tmp_path / "img" / name, pixels)
        save(tmp_path / "seg" / name, LABELS)
    rows = [f"{name},p{k % 20}" for k, name in enumerate(names)]
    (tmp_path / "t.csv").write_text("\n".join(["image,patient_id", *rows]))
    table = ("--metadata", str(tmp_path / "t.csv"), "--labels", "1=liver,2=spleen")
    found = run(tmp_path, *table, "--test-share", "0.3")
    patients = [{row["patient_id"] for row in Records(found / s)} for s in ("train", "test")]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 20


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ("image,gender\na,F\n", ("--column", "sex=gendr"), "did you mean 'gender'"),
        ("image,gender\na,F\n", ("--keep-column", "gende"), "did you mean 'gender'"),
        ("file,sex\na,F\n", (), "--column image=file"),
        ("image,sex\nz,F\n", (), r"none of the 1 rows .* it has \['z'\], the images are \['x/a'"),
        ("image,patient_id\na,1\na,2\n", (), "x/a: rows of this image disagree on patient_id"),
        (
            "image,patient_id\na,1\n",
            ("--patient-regex", "^(.)/"),
            "x/a.png: the table says patient '1', --patient-regex finds 'x'",
        ),
    ],
)
def test_a_table_that_does_not_fit_says_what_would(
    tmp_path: Path, rows: str, more: tuple[str, ...], message: str
) -> None:
    options = four_images(tmp_path, rows)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *options, *more)
    with pytest.raises(ValueError, match="name columns of --metadata FILE"):
        run(tmp_path, "--labels", "1=liver", "--column", "sex=gender")


def test_a_bare_name_that_two_folders_hold_is_an_error(tmp_path: Path) -> None:
    options = four_images(tmp_path, "image,sex\na,F\n")
    save_image(tmp_path / "img" / "y" / "a.png")
    with pytest.raises(ValueError, match=r"line 2: 'a' may be any of \['x/a', 'y/a'\]"):
        run(tmp_path, *options)

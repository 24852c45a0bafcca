"""Volumes: the right side at image left whatever the file's axes, and no patient in the records."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from biascare.records import Records, decode_mask
from tests.data_prep.raw_releases import assert_lint_passes

nibabel = pytest.importorskip("nibabel", reason="the extra [medical] is not installed")
pydicom = pytest.importorskip("pydicom", reason="the extra [medical] is not installed")

from data_prep import volumes  # noqa: E402
from data_prep.formats.dicom import list_series, pseudonym, read_key, read_series  # noqa: E402
from data_prep.formats.nifti import read_label_volume, read_nifti  # noqa: E402
from data_prep.formats.slices import (  # noqa: E402
    PLANES,
    Volume,
    affine_of_codes,
    oriented,
    range_shown,
    spacing_of,
    to_grey,
)
from data_prep.pipeline.shards import SetAsideError, UnusableItemError  # noqa: E402

SHAPE = (4, 5, 3)  # right to left, back to front, feet to head, in RAS order
ZOOMS = (0.7, 0.8, 5.0)


def body() -> np.ndarray:
    """[R, A, S] order int16: a "liver" at the patient's right, a "spine" at the back, a "head"."""
    values = np.zeros(SHAPE, dtype=np.int16)
    values[3, 2, 1] = 1000  # x grows to the right in RAS: the highest index is the patient's right
    values[1, 0, 1] = 500
    values[1, 2, 2] = 250
    return values


def labels_of_body() -> np.ndarray:
    return np.select([body() == 1000, body() == 500], [1, 2]).astype(np.int16)


def all_orientations() -> list[str]:
    """48 ways of storing the same body."""
    return [
        "".join(codes)
        for axes in itertools.permutations(["RL", "AP", "SI"])
        for codes in itertools.product(*axes)
    ]


def stored(array: np.ndarray, codes: str) -> Any:
    """NIfTI image of the RAS array, stored with axes that grow to `codes`."""
    image = nibabel.Nifti1Image(array, np.diag([*ZOOMS, 1.0]))
    transform = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(tuple(codes))
    )
    return image.as_reoriented(transform)


def save(path: Path, array: np.ndarray, codes: str = "RAS") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(stored(array, codes), path)
    return path


def run(output: Path, *more: str) -> Path:
    volumes.main(["--name", "mine", "--output", str(output), *more])
    assert_lint_passes(output)
    return output / "mine"


def pixels(row: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["image"])))


def ledger(folder: Path) -> dict[str, str]:
    text = (folder / "train.skipped.jsonl").read_text()
    return {entry["item"]: entry["reason"] for entry in map(json.loads, text.splitlines())}


@pytest.mark.parametrize("codes", all_orientations())
def test_every_storage_order_gives_the_same_radiological_view(codes: str) -> None:
    image = stored(body(), codes)
    voxels = np.asanyarray(image.dataobj)
    axial = oriented(voxels, image.affine, "axial")
    assert axial.shape == (3, 5, 4)  # slices feet to head, rows front to back, columns
    assert axial[1, 2, 0] == 1000  # the liver at image left
    assert axial[1, 4, 2] == 500  # the spine at the bottom
    assert axial[2, 2, 2] == 250
    coronal = oriented(voxels, image.affine, "coronal")
    assert (coronal.shape, coronal[2, 1, 0], coronal[2, 0, 2]) == ((5, 3, 4), 1000, 250)  # head up
    sagittal = oriented(voxels, image.affine, "sagittal")
    assert (sagittal.shape, sagittal[0, 1, 2], sagittal[2, 1, 4]) == ((4, 3, 5), 1000, 500)
    np.testing.assert_allclose(spacing_of(image.affine, "axial"), (5.0, 0.8, 0.7), rtol=1e-6)
    np.testing.assert_allclose(spacing_of(image.affine, "sagittal"), (0.7, 5.0, 0.8), rtol=1e-6)


def test_an_affine_of_letters_is_what_nibabel_reads_from_it() -> None:
    for codes in all_orientations():
        affine = affine_of_codes(codes, ZOOMS)
        assert "".join(nibabel.aff2axcodes(affine)) == codes
        np.testing.assert_allclose(nibabel.affines.voxel_sizes(affine), ZOOMS)


def test_slices_of_a_volume_become_records_with_their_masks(tmp_path: Path) -> None:
    save(tmp_path / "img" / "p1_0000.nii.gz", body(), "LPS")
    save(tmp_path / "seg" / "p1.nii.gz", labels_of_body(), "LPS")
    folder = run(
        tmp_path / "out", "--nifti", str(tmp_path / "img"), "--masks", str(tmp_path / "seg"),
        "--labels", "1=liver,2=vertebra", "--image-suffix", "_0000", "--modality", "ct",
        "--window", "500,1000",
    )  # fmt: skip
    records = Records(folder / "train")
    assert [records[k]["id"] for k in range(3)] == [f"mine/p1/axial-{k:04d}" for k in range(3)]
    row = records[1]
    # Nothing says whose volume it is, and a file name is no patient.
    assert (row["height"], row["width"], row["patient_id"]) == (5, 4, None)
    masks = {t["name"]: np.argwhere(decode_mask(t["rle"], 5, 4)) for t in row["targets"]}
    assert {name: where.tolist() for name, where in masks.items()} == {
        "liver": [[2, 0]], "vertebra": [[4, 2]],
    }  # fmt: skip
    assert (pixels(row)[2, 0], pixels(row)[4, 2], pixels(row)[0, 0]) == (255, 128, 0)
    assert row["extra"]["mm_between_slices"] == pytest.approx(5.0)
    assert row["extra"]["mm_per_pixel"] == pytest.approx([0.8, 0.7])
    assert (records[0]["targets"], row["extra"]["num_slices"]) == ([], 3)


def test_empty_slices_are_left_out_only_when_asked(tmp_path: Path) -> None:
    save(tmp_path / "img" / "a.nii", body())
    save(tmp_path / "seg" / "a.nii", labels_of_body())
    base = ("--nifti", str(tmp_path / "img"), "--modality", "ct")
    masks = ("--masks", str(tmp_path / "seg"), "--labels", "nonzero=organ")
    assert len(Records(run(tmp_path / "all", *base, *masks) / "train")) == 3
    kept = Records(run(tmp_path / "some", *base, *masks, "--skip-empty") / "train")
    assert [kept[k]["id"] for k in range(len(kept))] == ["mine/a/axial-0001"]
    with pytest.raises(ValueError, match="would leave out everything"):
        run(tmp_path / "none", *base, "--skip-empty")


def test_the_window_maps_level_and_width_to_black_and_white() -> None:
    volume = Volume(np.zeros((1, 1, 1)), 1.0, 0.0, None, None, False)
    assert range_shown(volume, "ct", None) == (-160.0, 240.0)
    assert range_shown(volume, "ct", (50.0, 300.0)) == (-100.0, 200.0)
    values = np.array([[-500.0, -100.0, 50.0, 200.0, 900.0, np.nan]])
    assert to_grey(values, (-100.0, 200.0)).tolist() == [[0, 0, 128, 255, 255, 0]]
    assert to_grey(values, (-100.0, 200.0), inverted=True)[0, :4].tolist() == [255, 255, 127, 0]


def test_percentiles_ignore_what_is_not_finite_and_refuse_a_constant_volume() -> None:
    values = np.arange(1001, dtype=np.float32).reshape(7, 11, 13)
    volume = Volume(values, 2.0, 10.0, None, None, False)
    assert range_shown(volume, "mri", None) == pytest.approx((20.0, 2000.0))
    values = np.where(values == 1000, np.inf, values)
    low, high = range_shown(volume._replace(voxels=values), "mri", None)
    assert (low, high) == pytest.approx((10 + 2 * 4.995, 10 + 2 * 994.005))
    with pytest.raises(UnusableItemError, match="constant"):
        range_shown(volume._replace(voxels=np.ones_like(values)), "mri", "percentile")
    with pytest.raises(UnusableItemError, match="states no window"):
        range_shown(volume, "ct", "file")


def test_scaled_voxels_are_read_in_their_units(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(body(), np.diag([*ZOOMS, 1.0]))
    image.header.set_slope_inter(2.0, -1024.0)
    nibabel.save(image, tmp_path / "a.nii.gz")
    volume = read_nifti(tmp_path / "a.nii.gz")
    expected = np.asarray(nibabel.load(tmp_path / "a.nii.gz").dataobj)
    np.testing.assert_allclose(volume.voxels * volume.slope + volume.intercept, expected)
    assert volume.voxels.dtype == np.int16  # scaling waits until a slice is shown


def patched(path: Path, source: Path, offset: int, value: bytes) -> Path:
    """A NIfTI file with some bytes of its header changed."""
    data = bytearray(source.read_bytes())
    data[offset : offset + len(value)] = value
    path.write_bytes(data)
    return path


def test_a_header_that_promises_too_much_is_refused_before_allocation(tmp_path: Path) -> None:
    good = save(tmp_path / "good.nii", body())
    bomb = patched(tmp_path / "bomb.nii", good, 40, struct.pack("<4h", 3, 30000, 30000, 30000))
    with pytest.raises(UnusableItemError, match=r"volume of 54,000,000,000,000 bytes is above"):
        read_nifti(bomb)
    long = patched(tmp_path / "long.nii", good, 40, struct.pack("<4h", 3, 400, 500, 300))
    with pytest.raises(UnusableItemError, match="more voxels than the file can hold"):
        read_nifti(long)
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(bomb.read_bytes()))
    with pytest.raises(UnusableItemError, match="is above"):
        read_nifti(tmp_path / "bomb.nii.gz")
    (tmp_path / "long.nii.gz").write_bytes(gzip.compress(long.read_bytes()))
    with pytest.raises(UnusableItemError, match="more voxels than the file can hold"):
        read_nifti(tmp_path / "long.nii.gz")
    negative = patched(tmp_path / "neg.nii", good, 40, struct.pack("<4h", 3, -4, 5, 3))
    with pytest.raises(UnusableItemError):
        read_nifti(negative)


def test_damaged_and_unsuitable_files_say_what_is_wrong(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 99, (9, 9, 9), dtype=np.int16)
    good = save(tmp_path / "good.nii.gz", noise)
    (tmp_path / "cut.nii.gz").write_bytes(good.read_bytes()[:600])
    (tmp_path / "text.nii").write_text("not a volume")
    for name in ("cut.nii.gz", "text.nii"):
        with pytest.raises(UnusableItemError, match="unreadable or cut off"):
            read_nifti(tmp_path / name)
    save(tmp_path / "time.nii", np.zeros((2, 2, 2, 4), dtype=np.int16))
    with pytest.raises(UnusableItemError, match="4-D file of shape"):
        read_nifti(tmp_path / "time.nii")
    save(tmp_path / "one.nii", np.ones((2, 2, 2, 1), dtype=np.int16))
    assert read_nifti(tmp_path / "one.nii").voxels.shape == (2, 2, 2)
    nibabel.save(
        nibabel.Nifti1Image(np.zeros((2, 2, 2), dtype=np.complex64), np.eye(4)), tmp_path / "c.nii"
    )
    with pytest.raises(UnusableItemError, match="complex64 are not plain numbers"):
        read_nifti(tmp_path / "c.nii")


def test_an_unknown_orientation_is_not_guessed(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(body(), None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    nibabel.save(image, tmp_path / "a.nii")
    with pytest.raises(UnusableItemError, match="--assume-orientation"):
        read_nifti(tmp_path / "a.nii")
    volume = read_nifti(tmp_path / "a.nii", assumed="RAS")
    assert volume.affine is not None
    assert oriented(volume.voxels, volume.affine, "axial")[1, 2, 0] == 1000


def test_labels_must_lie_where_the_image_lies(tmp_path: Path) -> None:
    image = read_nifti(save(tmp_path / "img.nii", body()))
    same, resampled = read_label_volume(save(tmp_path / "same.nii", labels_of_body()), image)
    assert (same.voxels.dtype, resampled) == (np.int32, False)
    as_float = save(tmp_path / "float.nii", labels_of_body().astype(np.float32))
    np.testing.assert_array_equal(read_label_volume(as_float, image)[0].voxels, same.voxels)
    for name, array, codes, message in (
        (
            "turned.nii",
            labels_of_body(),
            "LAS",
            "differ in orientation or place, by up to 3 voxels",
        ),
        ("small.nii", labels_of_body()[:3], "RAS", r"differ in shape: \[4, 5, 3\] and \[3, 5, 3\]"),
        ("nan.nii", labels_of_body() * np.float32(np.nan), "RAS", "no numbers"),
        ("soft.nii", labels_of_body() * np.float32(0.5), "RAS", "holds fractions"),
    ):
        with pytest.raises(UnusableItemError, match=message):
            read_label_volume(save(tmp_path / name, array, codes), image)


def test_options_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "img" / "a.nii", body())
    base = ("--nifti", str(tmp_path / "img"), "--modality", "ct")
    for more, message in (
        (base[:2], "--nifti needs --modality"),
        ((*base, "--masks", str(tmp_path)), "go together"),
        ((*base, "--window", "40"), "LEVEL,WIDTH"),
        ((*base, "--assume-orientation", "RAL"), "like RAS or LPS"),
        (("--dicom", str(tmp_path)), "--pseudonym-key"),
        (("--nifti", str(tmp_path / "out"), "--modality", "ct"), "is not a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "out", *more)


# DICOM

KEY = b"a secret of thirty-two bytes...."


def make_slice(folder: Path, index: int, **changes: Any) -> Path:
    """One axial CT slice of the body, stored as scanners do: rows to the back, columns to the left.

    `changes` set attributes; None deletes one.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"1.2.3.{index + 1}"
    data.PatientName, data.PatientID = "Doe^Jane", "MRN-4711"
    data.PatientBirthDate, data.InstitutionName = "19600101", "Saint Elsewhere"
    data.PatientSex, data.PatientAge, data.BodyPartExamined = "F", "063Y", "ABDOMEN"
    data.StudyInstanceUID, data.SeriesInstanceUID, data.Modality = "1.2.3", "1.2.3.4", "CT"
    data.Rows, data.Columns, data.SamplesPerPixel = 5, 4, 1
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 0
    data.PhotometricInterpretation = "MONOCHROME2"
    data.RescaleSlope, data.RescaleIntercept = 2, -1000
    data.PixelSpacing, data.InstanceNumber = [0.8, 0.7], 9 - index
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    data.ImagePositionPatient = [-10, -20, 5.0 * index]
    plane = body()[::-1, ::-1, index].T  # [rows: front to back, columns: right to left]
    data.PixelData = ((plane.astype(np.int32) + 1000) // 2).astype("<u2").tobytes()
    for name, value in changes.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a file may hold what pydicom would not write
            delattr(data, name) if value is None else setattr(data, name, value)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"image{index}.dcm"
    data.save_as(path, enforce_file_format=True)
    return path


def make_series(folder: Path, order: tuple[int, ...] = (0, 1, 2), **changes: Any) -> Path:
    for index in order:
        make_slice(folder, index, **changes)
    return folder


def run_dicom(root: Path, *more: str) -> Path:
    (root / "key").write_bytes(KEY)
    base = ("--dicom", str(root / "in"), "--pseudonym-key", str(root / "key"))
    return run(root / "out", *base, *more)


def test_a_dicom_series_is_sorted_rescaled_and_shown_like_its_nifti_twin(tmp_path: Path) -> None:
    make_series(tmp_path / "in" / "JANE DOE", order=(2, 0, 1))
    folder = run_dicom(tmp_path, "--window", "500,1000")
    records = Records(folder / "train")
    save(tmp_path / "img" / "a.nii", body())
    twin = Records(
        run(tmp_path / "twin", "--nifti", str(tmp_path / "img"), "--modality", "ct",
            "--window", "500,1000") / "train"
    )  # fmt: skip
    assert len(records) == len(twin) == 3
    for index in range(3):
        np.testing.assert_array_equal(pixels(records[index]), pixels(twin[index]))
        for key in ("mm_between_slices", "mm_per_pixel"):
            assert records[index]["extra"][key] == pytest.approx(twin[index]["extra"][key])
    row = records[0]
    assert (row["modality"], row["anatomy"], row["sex"], row["age"]) == ("ct", "abdomen", "F", 63.0)


def test_nothing_of_the_patient_enters_the_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_series(tmp_path / "in" / "JANE DOE")
    make_series(tmp_path / "in" / "DOE 2", BurnedInAnnotation="YES", SeriesInstanceUID="1.2.3.5")
    folder = run_dicom(tmp_path)
    told = capsys.readouterr()
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    written += (told.out + told.err).encode()
    for secret in ("Doe", "DOE", "JANE", "4711", "1960", "Elsewhere", "1.2.3", "image0"):
        assert secret.encode() not in written, secret
    row = Records(folder / "train")[0]
    assert row["patient_id"] == pseudonym(KEY, "patient", "MRN-4711")
    assert row["study_id"] == pseudonym(KEY, "study", "1.2.3")
    assert row["id"].split("/")[1] == pseudonym(KEY, "series", "1.2.3.4")
    assert (
        len({row["patient_id"], row["study_id"], pseudonym(b"x" * 32, "patient", "MRN-4711")}) == 3
    )


def test_quarantined_series_pass_only_when_a_person_has_cleared_them(tmp_path: Path) -> None:
    make_series(tmp_path / "in" / "good")
    make_series(tmp_path / "in" / "text", SeriesInstanceUID="1.1", BurnedInAnnotation="YES")
    make_series(
        tmp_path / "in" / "screen", SeriesInstanceUID="1.2",
        SOPClassUID="1.2.840.10008.5.1.4.1.1.7",
    )  # fmt: skip
    make_series(tmp_path / "in" / "sono", SeriesInstanceUID="1.3", Modality="US")
    private = tmp_path / "map.jsonl"
    folder = run_dicom(tmp_path, "--path-map", str(private))
    text, screen, sono = (pseudonym(KEY, "series", uid) for uid in ("1.1", "1.2", "1.3"))
    review = "; look at it, then list it in --cleared"
    assert ledger(folder) == {
        text: f"quarantined: burned-in annotation{review}",
        screen: f"quarantined: secondary capture{review}",
        sono: f"quarantined: ultrasound, which often shows the name{review}",
    }
    lines = map(json.loads, private.read_text().splitlines())
    assert {line["series"]: line["files"][0] for line in lines}[text] == "text/image0.dcm"
    (tmp_path / "cleared").write_text(f"{sono}\n{text}\n")
    more = ("--overwrite", "--cleared", str(tmp_path / "cleared"))
    records = Records(run_dicom(tmp_path, *more) / "train")
    assert records.manifest["modality"] == {"ct": 6, "ultrasound": 3}
    (tmp_path / "cleared").write_text("nobody\n")
    with pytest.raises(ValueError, match=r"not in the source: \['nobody'\]"):
        run_dicom(tmp_path, *more)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"PhotometricInterpretation": "RGB"}, "RGB is not monochrome"),
        ({"NumberOfFrames": 2}, "several frames"),
        ({"PixelData": None}, "without pixels"),
        ({"PixelData": b"\0" * 10}, "cut off"),
        ({"Rows": 60000, "Columns": 60000}, "60000 x 60000 pixels refused"),
        ({"ImagePositionPatient": [0, 0, 0]}, "several images at one place"),
        ({"Rows": None}, "unreadable"),
    ],
)
def test_a_series_that_is_no_stack_of_slices_is_unusable(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    make_series(tmp_path, **changes)
    with pytest.raises(UnusableItemError, match=message):
        read_series(tmp_path, [f"image{k}.dcm" for k in range(3)])


def test_slices_that_differ_or_are_cut_off_are_unusable(tmp_path: Path) -> None:
    make_series(tmp_path)
    make_slice(tmp_path, 1, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    with pytest.raises(UnusableItemError, match="different directions"):
        read_series(tmp_path, [f"image{k}.dcm" for k in range(3)])
    make_slice(tmp_path, 1, PhotometricInterpretation="MONOCHROME1")
    with pytest.raises(UnusableItemError, match="differ in PhotometricInterpretation"):
        read_series(tmp_path, [f"image{k}.dcm" for k in range(3)])
    path = make_slice(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UnusableItemError, match="a slice without pixels among others"):
        read_series(tmp_path, [f"image{k}.dcm" for k in range(3)])


def test_missing_slices_forbid_other_planes_only(tmp_path: Path) -> None:
    make_slice(tmp_path / "in", 0)
    make_slice(tmp_path / "in", 1, ImagePositionPatient=[-10, -20, 5])
    make_slice(tmp_path / "in", 2, ImagePositionPatient=[-10, -20, 20])
    assert len(Records(run_dicom(tmp_path) / "train")) == 3
    with pytest.raises(ValueError, match="no coronal images can be cut"):
        run_dicom(tmp_path, "--plane", "coronal", "--overwrite")


def test_monochrome1_is_inverted_and_a_radiograph_keeps_its_orientation(tmp_path: Path) -> None:
    geometry = {"ImageOrientationPatient": None, "ImagePositionPatient": None, "Modality": "DX"}
    make_slice(tmp_path / "in", 1, PhotometricInterpretation="MONOCHROME1", **geometry)
    row = Records(run_dicom(tmp_path, "--window", "500,1000") / "train")[0]
    expected = 255 - to_grey(body()[::-1, ::-1, 1].T.astype(float), (0.0, 1000.0))
    np.testing.assert_array_equal(pixels(row), expected)
    assert (row["modality"], row["extra"]["plane"]) == ("xray", "stored")


def test_the_window_of_the_file_is_that_of_the_standard(tmp_path: Path) -> None:
    from pydicom.pixels import apply_windowing

    for function, width in (("LINEAR", 401), ("LINEAR_EXACT", 400)):
        path = make_slice(tmp_path, 1, WindowCenter=[300, 40], WindowWidth=[width, 9],
                          VOILUTFunction=function)  # fmt: skip
        volume, _ = read_series(tmp_path, [path.name])
        assert volume.shown is not None
        data = pydicom.dcmread(path)
        values = np.asarray(volume.voxels[0], dtype=np.float64)
        reference = apply_windowing(values, data)
        low, high = reference.min(), reference.max()
        grey = to_grey(values, volume.shown).astype(int)
        assert np.abs(grey - 255 * (reference - low) / (high - low)).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("header", "age", "sex"),
    [
        ({"PatientAge": "018M"}, 1.5, "F"),
        ({"PatientAge": "097Y"}, 90.0, "F"),  # the oldest are not told apart
        ({"PatientAge": "", "PatientSex": "O"}, None, None),
        ({"PatientAge": "old", "PatientSex": "W"}, None, None),
    ],
)
def test_an_attribute_that_cannot_be_read_is_noted_and_costs_no_slice(
    tmp_path: Path, header: dict[str, str], age: float | None, sex: str | None
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom sees that "old" is no age
        make_series(tmp_path / "in", order=(0, 1, 2), **header)
        folder = run_dicom(tmp_path)
    assert {(row["age"], row["sex"]) for row in Records(folder / "train")} == {(age, sex)}
    ledger = folder / "train.skipped.jsonl"
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    assert len(lines) == (2 if header["PatientAge"] == "old" else 0)
    assert all("unreadable" in line and '"counts": false' in line for line in lines)


def test_a_short_key_is_refused(tmp_path: Path) -> None:
    for content in (None, b"short", b"\n" * 40):
        if content is not None:
            (tmp_path / "key").write_bytes(content)
        with pytest.raises(ValueError, match="head -c 32 /dev/urandom"):
            read_key(tmp_path / "key")


def test_real_dicom_files_are_read(tmp_path: Path) -> None:
    from pydicom.data import get_testdata_file

    for name, modality, shape in (
        ("CT_small.dcm", "ct", (128, 128)),
        ("MR_small.dcm", "mri", (64, 64)),
        ("MR_small_RLE.dcm", "mri", (64, 64)),
    ):
        path = Path(str(get_testdata_file(name)))
        volume, facts = read_series(path.parent, [path.name])
        assert (facts.modality, volume.voxels.shape) == (modality, (1, *shape))
        assert oriented(volume.voxels, volume.affine, "axial").shape == (1, *shape)
        low, high = range_shown(volume, modality, "percentile")
        grey = to_grey(volume.voxels[0], (low, high))
        assert grey.std() > 10
    plain, packed = (
        Path(str(get_testdata_file(name))) for name in ("MR_small.dcm", "MR_small_RLE.dcm")
    )
    pair = [read_series(path.parent, [path.name])[0].voxels for path in (plain, packed)]
    np.testing.assert_array_equal(*pair)
    ct = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    volume, _ = read_series(Path(str(get_testdata_file("CT_small.dcm"))).parent, ["CT_small.dcm"])
    hounsfield = ct.pixel_array * float(ct.RescaleSlope) + float(ct.RescaleIntercept)
    np.testing.assert_allclose(volume.voxels[0], hounsfield)


def test_series_are_listed_by_their_uid_not_by_their_folder(tmp_path: Path) -> None:
    make_series(tmp_path / "a")
    (tmp_path / "a" / "readme.txt").write_text("not DICOM")
    for path in sorted((tmp_path / "a").glob("*.dcm"))[1:]:
        (tmp_path / "b").mkdir(exist_ok=True)
        path.rename(tmp_path / "b" / path.name)
    listed = list_series(tmp_path, KEY)
    (series,) = listed.series
    assert series.files == ("a/image0.dcm", "b/image1.dcm", "b/image2.dcm")
    assert listed.passed_over == {"no DICOM file": 1}


def test_every_plane_has_one_letter_of_each_pair() -> None:
    for codes in PLANES.values():
        assert volumes._is_orientation(codes)


def test_volumes_without_masks_say_that_training_cannot_use_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "img" / "p1.nii.gz", body())
    nifti = ("--nifti", str(tmp_path / "img"), "--modality", "ct")
    run(tmp_path / "out", *nifti)
    said = " ".join(capsys.readouterr().out.split())
    assert "3 records that hold neither masks nor questions: training cannot use them" in said
    assert "--masks with --labels adds masks" in said
    save(tmp_path / "seg" / "p1.nii.gz", labels_of_body())
    masks = ("--masks", str(tmp_path / "seg"), "--labels", "1=liver,2=vertebra")
    with pytest.raises(ValueError, match=r"other options: .*masks was none, is a path") as refused:
        run(tmp_path / "out", *nifti, *masks)
    assert str(tmp_path / "seg") not in str(refused.value)
    run(tmp_path / "out", *nifti, *masks, "--overwrite")
    assert "neither" not in capsys.readouterr().out


def test_volumes_of_one_patient_may_be_divided_and_the_user_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("p1_a", "p1_b"):
        save(tmp_path / "img" / f"{name}.nii.gz", body())
    nifti = ("--nifti", str(tmp_path / "img"), "--modality", "ct", "--test-share", "0.5")
    run(tmp_path / "out", *nifti)
    said = " ".join(capsys.readouterr().out.split())
    assert "the patient of 2 of 2 volumes is not known" in said and "--patient-regex" in said
    run(tmp_path / "known", *nifti, "--patient-regex", r"(p\d)")
    assert "is not known" not in capsys.readouterr().out


def test_a_listed_volume_that_is_nowhere_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "img" / "p1_0000.nii.gz", body())
    (tmp_path / "train.txt").write_text("p1_0000.nii.gz\n")
    with pytest.raises(ValueError, match=r"1 names of --split-list are nowhere .*: 'p1_0000';"):
        run(
            tmp_path / "out", "--nifti", str(tmp_path / "img"), "--modality", "ct",
            "--image-suffix", "_0000", f"--split-list=train={tmp_path / 'train.txt'}",
        )  # fmt: skip


def real_files(name: str) -> Path:
    """Files that scanners wrote, as pydicom ships them for its own tests."""
    return Path(pydicom.__file__).parent / "data" / "test_files" / name


def said_by(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_an_ordinary_dicom_folder_is_converted_and_the_rest_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").symlink_to(real_files("dicomdirtests"))
    records = Records(run_dicom(tmp_path) / "train")
    said = said_by(capsys)
    assert "files passed over: 8 x DICOMDIR, 2 x no DICOM file" in said
    assert (
        "16 records that hold neither masks nor questions: training cannot use them (convert the "
        "series to NIfTI, then --nifti with --masks and --labels adds masks), 5 set aside (3 x "
        "slices of one series lie in different directions; 1 x scout image; 1 x DICOM file without "
        "pixels), see"
    ) in said
    planes = [records[k]["extra"]["plane"] for k in range(len(records))]
    assert {plane: planes.count(plane) for plane in sorted(set(planes))} == {
        "axial": 9, "sagittal": 4, "stored": 3,
    }  # fmt: skip
    assert records.manifest["modality"] == {"ct": 9, "mri": 4, "xray": 3}
    anatomies = {records[k]["anatomy"] for k in range(len(records))}
    assert anatomies == {"", "head", "cervical spine"}
    assert all((records[k]["height"], records[k]["width"]) == (16, 16) for k in range(16))


@pytest.mark.parametrize("plane", [(), ("--plane", "axial"), ("--plane", "native")])
def test_one_sagittal_image_is_one_record_in_every_plane(
    tmp_path: Path, plane: tuple[str, ...]
) -> None:
    source = real_files("dicomdirtests/98892003/MR1/4919")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "4919").symlink_to(source)
    (row,) = Records(run_dicom(tmp_path, *plane) / "train")
    assert (row["height"], row["width"], row["extra"]["plane"]) == (16, 16, "sagittal")
    assert row["extra"]["mm_per_pixel"] == pytest.approx([1.367188, 1.367188])
    # As the scanner shows it: its rows grow to the back and its columns to the feet.
    data = pydicom.dcmread(source)
    expected = to_grey(data.pixel_array.astype(float), tuple(row["extra"]["range_shown"]))
    np.testing.assert_array_equal(pixels(row), expected)


def test_a_scout_in_a_series_is_left_out_of_its_volume_and_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_series(tmp_path / "in")
    make_slice(
        tmp_path / "in" / "scout", 0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
        ImageOrientationPatient=[0, 1, 0, 0, 0, -1],
    )  # fmt: skip
    assert len(Records(run_dicom(tmp_path) / "train")) == 3
    assert "1 noted (1 x files of the series set aside: scout image)" in said_by(capsys)


def test_a_reformation_of_few_slices_says_that_it_is_squashed_or_adds_pixels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Five slices, 2.5 mm thick, of pixels of half a millimetre.
    (tmp_path / "in").symlink_to(real_files("dicomdirtests/98892001/CT5N"))
    records = Records(run_dicom(tmp_path, "--plane", "coronal") / "train")
    assert (len(records), records[0]["height"], records[0]["width"]) == (16, 5, 16)
    squashed = "1 x pixels of coronal slices are far from square, so they look squashed: --plane"
    said = said_by(capsys)
    assert f"{squashed} axial cuts along the slices as acquired, --square-pixels adds" in said
    between, column = records[0]["extra"]["mm_per_pixel"]
    more = ("--plane", "coronal", "--square-pixels", "--overwrite")
    (row, *_) = Records(run_dicom(tmp_path, *more) / "train")
    assert "squashed" not in said_by(capsys)
    assert row["height"] == round(5 * between / column) > 5
    assert row["extra"]["stored_shape"] == [5, 16]
    assert row["extra"]["mm_per_pixel"] == pytest.approx([column, column], rel=0.05)


def test_added_pixels_keep_every_label_where_it_was(tmp_path: Path) -> None:
    save(tmp_path / "img" / "a.nii.gz", body())
    save(tmp_path / "seg" / "a.nii.gz", labels_of_body())
    folder = run(
        tmp_path / "out", "--nifti", str(tmp_path / "img"), "--masks", str(tmp_path / "seg"),
        "--labels", "1=liver,2=vertebra", "--modality", "ct", "--plane", "coronal",
        "--square-pixels", "--window", "500,1000", "--skip-empty",
    )  # fmt: skip
    liver, vertebra = Records(folder / "train")
    # 3 slices of 5 mm above one another, of pixels of 0.7 mm: 21 rows, of which the middle third
    # is the slice that holds the organ.
    assert [(row["height"], row["width"]) for row in (liver, vertebra)] == [(21, 4)] * 2
    for row, column in ((liver, 0), (vertebra, 2)):
        (target,) = row["targets"]
        rows = np.argwhere(decode_mask(target["rle"], 21, 4))
        assert rows.tolist() == [[r, column] for r in range(7, 14)]
        assert pixels(row)[10, column] == pixels(row).max()


def test_a_name_in_the_wrong_field_stays_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "DOE^JANE"
    fields = ("PatientSex", "PatientAge", "BodyPartExamined")
    make_series(tmp_path / "in" / "a", **dict.fromkeys(fields, name), SeriesInstanceUID="1.1")
    make_series(tmp_path / "in" / "b", Modality=name, SeriesInstanceUID="1.2")
    make_series(
        tmp_path / "in" / "c", PhotometricInterpretation=name, SeriesInstanceUID="1.3"
    )  # fmt: skip
    make_series(tmp_path / "in" / "d", ImageType=name, SeriesInstanceUID="1.4", PatientAge="066Y")
    number = make_slice(tmp_path / "in" / "e", 0, WindowCenter=12345678, WindowWidth=1,
                        SeriesInstanceUID="1.5")  # fmt: skip
    number.write_bytes(number.read_bytes().replace(b"12345678", name.encode()))
    folder = run_dicom(tmp_path, "--max-skipped", "0.7")
    told = capsys.readouterr()
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"JANE" not in written + (told.out + told.err).encode()
    series = {letter: pseudonym(KEY, "series", uid) for letter, uid in (
        ("a", "1.1"), ("b", "1.2"), ("c", "1.3"), ("d", "1.4"), ("e", "1.5"))}  # fmt: skip
    reasons = ledger(folder)
    assert reasons[series["a"]] == "BodyPartExamined holds no known value and is left out"
    assert reasons[series["b"]] == "Modality is no modality that is known here"
    assert reasons[series["c"]] == "photometric interpretation is not monochrome"
    assert reasons[series["e"]] == "DICOM header unreadable"
    records = Records(folder / "train")
    rows = {row["id"].split("/")[1]: row for row in records}
    first = rows[series["a"]]
    assert (first["sex"], first["age"], first["anatomy"]) == (None, None, "")
    assert (rows[series["d"]]["age"], rows[series["d"]]["anatomy"]) == (66.0, "abdomen")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"RecognizableVisualFeatures": "YES"}, "recognizable visual features, a face for example"),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "screen capture"),
        ({"ImageType": ["DERIVED", "SECONDARY", "CSA REPORT"]}, "screen capture"),
    ],
)
def test_faces_and_screens_wait_for_a_person(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    make_series(tmp_path, **changes)
    files = [f"image{k}.dcm" for k in range(3)]
    with pytest.raises(SetAsideError, match=f"quarantined: {reason}; look at it, then list it"):
        read_series(tmp_path, files)
    assert read_series(tmp_path, files, cleared=True)[1].modality == "ct"


def test_nuclear_medicine_is_a_modality(tmp_path: Path) -> None:
    make_series(tmp_path, Modality="NM")
    _, facts = read_series(tmp_path, [f"image{k}.dcm" for k in range(3)])
    assert facts.modality == "nuclear"


# Layouts of releases, under their own names


def save_case(root: Path, files: dict[str, np.ndarray]) -> None:
    for name, array in files.items():
        save(root / name, array)


MASKS = ("--labels", "1=kidney,2=tumor", "--modality", "ct", "--skip-empty", "--window", "500,1000")


@pytest.mark.parametrize(
    ("files", "options", "keys"),
    [
        (
            {
                f"case_0000{n}/{name}.nii.gz": kind
                for n in (0, 1)
                for name, kind in (("imaging", "image"), ("segmentation", "labels"))
            },
            ("--nifti", ".", "--image-name", "imaging", "--mask-name", "segmentation.nii.gz"),
            ["case_00000", "case_00001"],
        ),
        (
            {
                f"BraTS2021_0000{n}/BraTS2021_0000{n}_{name}.nii.gz": kind
                for n in (0, 2)
                for name, kind in (
                    ("flair", "image"), ("t1", "image"), ("t1ce", "image"), ("t2", "image"),
                    ("seg", "labels"),
                )
            },
            ("--nifti", ".", "--image-suffix", "_flair", "--mask-suffix", "_seg"),
            ["BraTS2021_00000/BraTS2021_00000", "BraTS2021_00002/BraTS2021_00002"],
        ),
        (
            {f"{folder}/la_00{n}.nii.gz": kind for n in (3, 4) for folder, kind in (
                ("imagesTr", "image"), ("labelsTr", "labels"), ("imagesTs", "image"))},
            ("--nifti", "imagesTr", "--masks", "labelsTr"),
            ["la_003", "la_004"],
        ),
        (
            {"imagesTr/la_003_0000.nii.gz": "image", "imagesTr/la_003_0001.nii.gz": "image",
             "labelsTr/la_003.nii.gz": "labels"},
            ("--nifti", "imagesTr", "--masks", "labelsTr", "--image-suffix", "_0000"),
            ["la_003"],
        ),
        (
            {"p1.nii.gz": "image", "p1_seg.nii.gz": "labels"},
            ("--nifti", ".", "--mask-suffix", "_seg"),
            ["p1"],
        ),
    ],
    ids=["KiTS", "BraTS", "MSD", "nnU-Net", "one folder"],
)  # fmt: skip
def test_known_layouts_convert_without_renaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str],
    options: tuple[str, ...], keys: list[str],
) -> None:  # fmt: skip
    arrays = {"image": body(), "labels": labels_of_body()}
    save_case(tmp_path / "raw", {name: arrays[kind] for name, kind in files.items()})
    # macOS packed the tar files of MSD, and left such a twin beside every volume.
    (tmp_path / "raw" / next(iter(files))).with_name("._twin.nii.gz").write_bytes(b"\0\5\x16\7")
    monkeypatch.chdir(tmp_path / "raw")
    records = Records(run(tmp_path / "out", *options, *MASKS) / "train")
    assert [row["id"] for row in records] == [f"mine/{key}/axial-0001" for key in keys]
    for row in records:
        assert [target["name"] for target in row["targets"]] == ["kidney", "tumor"]
        assert pixels(row)[2, 0] == 255  # the image, and not its label map


def test_a_volume_is_never_its_own_label_map(tmp_path: Path) -> None:
    save_case(
        tmp_path / "kits",
        {"case_00000/imaging.nii.gz": body(), "case_00000/segmentation.nii.gz": labels_of_body()},
    )
    kits = ("--nifti", str(tmp_path / "kits"), *MASKS)
    with pytest.raises(
        ValueError, match=r"share a folder.*imaging\.nii\.gz.*segmentation\.nii\.gz.*--image-name"
    ):
        run(tmp_path / "out", *kits, "--masks", str(tmp_path / "kits"))
    save(tmp_path / "img" / "a.nii.gz", body())
    (tmp_path / "seg").mkdir()
    (tmp_path / "seg" / "a.nii.gz").symlink_to(tmp_path / "img" / "a.nii.gz")
    with pytest.raises(ValueError, match=r"a\.nii\.gz is its own label volume"):
        run(
            tmp_path / "out",
            "--nifti",
            str(tmp_path / "img"),
            "--masks",
            str(tmp_path / "seg"),
            *MASKS,
        )


def test_folders_in_which_nothing_pairs_are_an_error_before_any_work(tmp_path: Path) -> None:
    save(tmp_path / "imagesTr" / "la_003_0000.nii.gz", body())
    save(tmp_path / "labelsTr" / "la_003.nii.gz", labels_of_body())
    images, masks = str(tmp_path / "imagesTr"), str(tmp_path / "labelsTr")
    folders = ("--nifti", images, "--masks", masks, *MASKS)
    told = r"la_003_0000.nii.gz would be la_003_0000.nii.gz in .*which holds la_003.nii.gz; see --"
    with pytest.raises(ValueError, match=told):
        run(tmp_path / "out", *folders)
    with pytest.raises(ValueError, match="--image-name and --image-suffix: choose one"):
        run(tmp_path / "out", *folders, "--image-suffix", "_0000", "--image-name", "x")


def test_one_channel_of_several_is_chosen_by_number(tmp_path: Path) -> None:
    # MSD's brain tumours and prostates: several sequences in one 4-D file.
    save(tmp_path / "img" / "a.nii.gz", np.stack([body() * 0, body()], axis=-1))
    save(tmp_path / "seg" / "a.nii.gz", labels_of_body())
    base = ("--nifti", str(tmp_path / "img"), "--masks", str(tmp_path / "seg"), *MASKS)
    with pytest.raises(ValueError, match=r"4-D file of shape .*: --channel 0 to 1 takes one"):
        run(tmp_path / "out", *base)
    (row,) = Records(run(tmp_path / "out", *base, "--channel", "1", "--overwrite") / "train")
    assert pixels(row)[2, 0] == 255
    with pytest.raises(ValueError, match="--channel 2: the file holds 2 volumes"):
        run(tmp_path / "out", *base, "--channel", "2", "--overwrite")


def test_labels_on_another_grid_are_told_with_the_distance_and_resampled_on_demand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "img" / "a.nii.gz", body())
    shifted = np.diag([*ZOOMS, 1.0])
    shifted[0, 3] = 0.4 * ZOOMS[0]
    (tmp_path / "seg").mkdir()
    nibabel.save(nibabel.Nifti1Image(labels_of_body(), shifted), tmp_path / "seg" / "a.nii.gz")
    base = ("--nifti", str(tmp_path / "img"), "--masks", str(tmp_path / "seg"), *MASKS)
    with pytest.raises(ValueError, match=r"by up to 0\.4 voxels; look at both, then --resample-la"):
        run(tmp_path / "out", *base)
    more = ("--resample-labels", "nearest", "--overwrite")
    (row,) = Records(run(tmp_path / "out", *base, *more) / "train")
    assert "1 x labels lay on another grid and were resampled" in said_by(capsys)
    masks = {t["name"]: np.argwhere(decode_mask(t["rle"], 5, 4)) for t in row["targets"]}
    assert {k: v.tolist() for k, v in masks.items()} == {"kidney": [[2, 0]], "tumor": [[4, 2]]}


def test_a_finer_label_grid_is_resampled_and_may_lose_no_label(tmp_path: Path) -> None:
    image = read_nifti(save(tmp_path / "img.nii", body()))
    fine = np.kron(labels_of_body(), np.ones((2, 2, 2), dtype=np.int16))
    affine = np.diag([*(np.array(ZOOMS) / 2), 1.0])
    affine[:3, 3] = -np.array(ZOOMS) / 4
    nibabel.save(nibabel.Nifti1Image(fine, affine), tmp_path / "fine.nii")
    labels, resampled = read_label_volume(tmp_path / "fine.nii", image, resample=True)
    assert resampled
    np.testing.assert_array_equal(labels.voxels, labels_of_body())
    fine[0, 0, 0] = 9  # half a voxel of the image
    affine[:3, 3] = -np.array(ZOOMS) / 3
    nibabel.save(nibabel.Nifti1Image(fine, affine), tmp_path / "fine.nii")
    with pytest.raises(UnusableItemError, match=r"labels \[9\] are lost"):
        read_label_volume(tmp_path / "fine.nii", image, resample=True)


def test_voxels_that_are_no_numbers_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = body().astype(np.float32)
    values[:2] = np.nan  # as statistical maps are outside the brain
    save(tmp_path / "img" / "a.nii.gz", values)
    records = Records(
        run(tmp_path / "out", "--nifti", str(tmp_path / "img"), "--modality", "mri") / "train"
    )
    assert "1 noted (1 x voxels that are no numbers (NaN) are shown as black" in said_by(capsys)
    assert (pixels(records[1])[:, 2:] == 0).all() and pixels(records[1])[2, 0] == 255


def test_volumes_behind_a_link_are_found(tmp_path: Path) -> None:
    save(tmp_path / "disk" / "a.nii.gz", body())
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "p1").symlink_to(tmp_path / "disk")
    (row, *_) = Records(
        run(tmp_path / "out", "--nifti", str(tmp_path / "img"), "--modality", "ct") / "train"
    )
    assert row["id"] == "mine/p1/a/axial-0000"


def test_the_patient_is_what_the_pattern_finds_and_else_unknown(tmp_path: Path) -> None:
    for name in ("p1_t0", "p1_t1"):
        save(tmp_path / "img" / f"{name}.nii.gz", body())
    nifti = ("--nifti", str(tmp_path / "img"), "--modality", "ct")
    assert {row["patient_id"] for row in Records(run(tmp_path / "a", *nifti) / "train")} == {None}
    known = run(tmp_path / "b", *nifti, "--patient-regex", r"(p\d)_t")
    assert {row["patient_id"] for row in Records(known / "train")} == {"p1"}


def test_one_flipped_bit_in_a_header_costs_its_series_and_not_the_run(tmp_path: Path) -> None:
    path = make_slice(tmp_path, 0, WindowCenter=40, WindowWidth=400)
    before, after = (b"\x28\x00\x50\x10" + kind for kind in (b"DS", b"LS"))
    assert before in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(before, after))
    with pytest.raises(UnusableItemError, match="DICOM header unreadable"):
        read_series(tmp_path, [path.name])


def test_a_table_gives_volumes_their_attributes(tmp_path: Path) -> None:
    for case in ("la_1", "la_2"):
        save(tmp_path / "img" / f"{case}_0000.nii.gz", body())
        save(tmp_path / "seg" / f"{case}.nii.gz", labels_of_body())
    path = tmp_path / "t.csv"
    path.write_text("case,patient_id,sex,age,race\nla_1,7,F,045Y,Asian\nla_2_0000.nii.gz,8,x,61,\n")
    more = [
        f"--nifti={tmp_path / 'img'}",
        f"--masks={tmp_path / 'seg'}",
        "--labels=1=liver,2=spine",
    ]
    more += ["--image-suffix=_0000", "--modality=ct", f"--metadata={path}", "--column=image=case"]
    found = run(tmp_path / "out", *more)
    rows = list(Records(found / "train"))
    assert {(row["patient_id"], row["sex"], row["age"], row["race"]) for row in rows} == {
        ("7", "F", 45.0, "asian"),
        ("8", None, 61.0, None),
    }
    assert any(row["targets"] for row in rows)
    assert "sex unreadable" in ledger(found)["la_2"]
    path.write_text("case,question,answer\nla_1,Is it?,no\n")
    with pytest.raises(ValueError, match="holds questions, and a volume becomes many slices"):
        run(tmp_path / "again", *more)
    with pytest.raises(ValueError, match="--metadata goes with --nifti"):
        run(tmp_path / "again", f"--dicom={tmp_path}", f"--metadata={path}")

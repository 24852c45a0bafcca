"""DICOM series -> volumes, without the patient: what may leave a file is listed, all else stays.

    series = list_series(folder, key)                   # reads three identifiers per file
    volume, facts = read_series(folder, series[0].files)

De-identification is by allow-list: ALLOWED names the attributes that may enter records, and the
three identifiers enter as keyed pseudonyms (HMAC-SHA256), which only the owner of the key can link.
Pixels may name a patient too: images that say so, ultrasound and secondary captures are quarantined
until a person has looked at them.
"""

from __future__ import annotations

import hashlib
import hmac
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from biascare.records import MAX_IMAGE_PIXELS
from biascare.records.vocabulary import canonical_modality
from data_prep.formats.slices import MAX_VOLUME_BYTES, Range, Volume, check_affine, import_medical
from data_prep.pipeline.attributes import person_of
from data_prep.pipeline.shards import UnusableItemError

ALLOWED = ("Modality", "BodyPartExamined", "PatientSex", "PatientAge")
"""Attributes whose words enter records. All are coded strings, none is free text."""

IDENTIFIERS = ("SeriesInstanceUID", "StudyInstanceUID", "PatientID")

OLDEST = 90.0
"""Years. Older patients are so few that their age names them; all are given this age."""

MIN_KEY_BYTES = 16

QUARANTINED_MODALITIES = ("US", "IVUS", "SC", "OT", "DOC", "XC")
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
ULTRASOUND = ("1.2.840.10008.5.1.4.1.1.6", "1.2.840.10008.5.1.4.1.1.3.1")

SAME_IN_A_SERIES = ("Rows", "Columns", "PhotometricInterpretation", "Modality")


class Series(NamedTuple):
    """Files of one series, and its pseudonyms."""

    files: tuple[str, ...]  # relative to the folder
    series: str
    study: str
    patient: str | None


class Facts(NamedTuple):
    """What records say about a series."""

    modality: str  # canonical
    anatomy: str
    sex: str | None
    age: float | None  # years
    noted: tuple[str, ...] = ()  # attributes that are written and cannot be read


def read_key(path: Path) -> bytes:
    """The secret of the pseudonyms. Raises ValueError when there is none or it is short."""
    key = path.read_bytes() if path.is_file() else b""
    # Patient ids are short numbers: who guesses a weak key can try all of them.
    if len(key.strip()) < MIN_KEY_BYTES:
        raise ValueError(
            f"{path} must hold a secret of at least {MIN_KEY_BYTES} bytes; make one with: "
            f"head -c 32 /dev/urandom > {path}. Keep it: the same key gives the same pseudonyms"
        )
    return key


def pseudonym(key: bytes, kind: str, value: str) -> str:
    """80 bits of HMAC-SHA256 as hex. `kind` keeps equal values of two attributes apart."""
    # Keyed, as a plain hash of a short id is undone by hashing all short ids.
    return hmac.new(key, f"{kind}:{value}".encode(), hashlib.sha256).hexdigest()[:20]


def list_series(folder: Path, key: bytes) -> list[Series]:
    """All series below a folder, in order of their first file. Files that are not DICOM are passed
    over; files without a series are one series each."""
    pydicom = import_medical("pydicom")
    found: dict[str, tuple[list[str], Any]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if not pydicom.misc.is_dicom(path) or path.name == "DICOMDIR":
            continue
        relative = path.relative_to(folder).as_posix()
        # Three identifiers and no more: what is not read cannot be written by mistake.
        header = _read_header(path, IDENTIFIERS)
        uid = str(header.get("SeriesInstanceUID", "") or relative)
        found.setdefault(uid, ([], header))[0].append(relative)
    series = []
    for uid, (files, header) in found.items():
        study, patient = (str(header.get(name, "") or "") for name in IDENTIFIERS[1:])
        series.append(
            Series(
                files=tuple(files),
                series=pseudonym(key, "series", uid),
                study=pseudonym(key, "study", study or uid),
                # None, not the pseudonym of "": that would make one patient of all unknown ones.
                patient=pseudonym(key, "patient", patient) if patient else None,
            )
        )
    return series


def read_series(folder: Path, files: Sequence[str], cleared: bool = False) -> tuple[Volume, Facts]:
    """Slices in anatomical order, rescaled. `cleared`: a person has looked at a quarantined series.

    Raises UnusableItemError for what is quarantined, of several frames or colours, cut off, or not
    one stack of slices.
    """
    slices = [_read_slice(folder / name, cleared) for name in files]
    for name in SAME_IN_A_SERIES:
        # An export may put a scout image or a colour overlay into the series of the slices.
        if len({str(one.get(name, "")) for one in slices}) > 1:
            raise UnusableItemError(f"slices of one series differ in {name}")
    # By the headers, before pixels are decoded; compressed files are small on disk only.
    num_bytes = 4 * sum(int(s.Rows) * int(s.Columns) for s in slices)
    if num_bytes > MAX_VOLUME_BYTES:
        raise UnusableItemError(f"volume of {num_bytes:,} bytes is above {MAX_VOLUME_BYTES:,}")
    slices, affine, even = _stack(slices)
    volume = Volume(
        # Rescaled slice by slice: in PET each has a slope of its own.
        voxels=np.stack([_values(one) for one in slices]),
        slope=1.0,
        intercept=0.0,
        affine=affine,
        shown=_stated_range(slices[0]),
        inverted=str(slices[0].PhotometricInterpretation) == "MONOCHROME1",
        even=even,
    )
    return volume, _facts(slices[0])


def _read_header(path: Path, names: Iterable[str]) -> Any:
    pydicom = import_medical("pydicom")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(names))
    except Exception:  # a damaged file is met again, and reported, when it is converted
        return pydicom.Dataset()


def _read_slice(path: Path, cleared: bool) -> Any:
    """One file, its header checked."""
    pydicom = import_medical("pydicom")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that are not used here
            dataset = pydicom.dcmread(path)
            _check_header(dataset, cleared)
    except UnusableItemError:
        raise
    except Exception as error:  # pydicom's parser raises whatever a damaged file makes it meet
        raise UnusableItemError("DICOM file unreadable") from error
    return dataset


def _check_header(dataset: Any, cleared: bool) -> None:
    reason = None if cleared else _quarantine(dataset)
    if reason:
        raise UnusableItemError(f"quarantined: {reason}; look at it, then list it in --cleared")
    # Reports and plans are DICOM files as well.
    if "PixelData" not in dataset:
        raise UnusableItemError("DICOM file without pixels")
    # Frames may be slices, times or echoes, and the file says which in many ways.
    if int(dataset.get("NumberOfFrames", 1) or 1) > 1:
        raise UnusableItemError("several frames in one DICOM file; split it into single frames")
    photometric = str(dataset.PhotometricInterpretation)
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or int(dataset.SamplesPerPixel) != 1:
        raise UnusableItemError(f"photometric interpretation {photometric} is not monochrome")
    num_pixels = int(dataset.Rows) * int(dataset.Columns)
    if not 0 < num_pixels <= MAX_IMAGE_PIXELS:
        raise UnusableItemError(f"image of {dataset.Rows} x {dataset.Columns} pixels refused")
    compressed = dataset.file_meta.TransferSyntaxUID.is_compressed
    # Told here, with a reason, and not by a decoder in the middle of the volume.
    if not compressed and len(dataset.PixelData) < num_pixels * int(dataset.BitsAllocated) // 8:
        raise UnusableItemError("DICOM pixels are cut off")


def _quarantine(dataset: Any) -> str | None:
    """Why a person must look at the pixels first."""
    sop_class = str(dataset.get("SOPClassUID", ""))
    # Each rule is about pixels: the list of allowed attributes cannot help against a name in them.
    if str(dataset.get("BurnedInAnnotation", "")).strip().upper() == "YES":
        return "burned-in annotation"
    if sop_class.startswith(ULTRASOUND) or str(dataset.get("Modality", "")) in ("US", "IVUS"):
        return "ultrasound, which often shows the name"
    is_capture = sop_class.startswith(SECONDARY_CAPTURE) or "ConversionType" in dataset
    if is_capture or str(dataset.get("Modality", "")) in QUARANTINED_MODALITIES:
        return "secondary capture"
    return None


def _stack(slices: list[Any]) -> tuple[list[Any], np.ndarray | None, bool]:
    """Slices in order along their normal, the affine of [slices, rows, columns], and whether the
    distances are equal.

    Images without geometry (radiographs) keep the order of their instance numbers; affine None.
    """
    if any(
        one.get("ImageOrientationPatient") is None or one.get("ImagePositionPatient") is None
        for one in slices
    ):
        # The file's name is no order: sorted by name, 10 comes before 2.
        return sorted(slices, key=lambda one: int(one.get("InstanceNumber", 0) or 0)), None, True
    directions = np.array([one.ImageOrientationPatient for one in slices], dtype=np.float64)
    positions = np.array([one.ImagePositionPatient for one in slices], dtype=np.float64)
    # A scout in another direction would be a slice in the middle of the volume.
    if np.abs(directions - directions[0]).max() > 1e-3:
        raise UnusableItemError("slices of one series lie in different directions")
    along_columns, along_rows = directions[0, :3], directions[0, 3:]
    normal = np.cross(along_columns, along_rows)
    depths = positions @ normal
    # By place in the patient: instance numbers may run against it, or be missing.
    order = np.argsort(depths, kind="stable")
    if len(depths) == 1:
        step, even = float(slices[0].get("SliceThickness", 1.0) or 1.0), True
    else:
        steps = np.diff(depths[order])
        if steps.min() < 1e-3:
            raise UnusableItemError(
                "several images at one place: time points or echoes in one series"
            )
        # The median, as one missing slice doubles a step; a tenth is the rounding of positions.
        step, even = float(np.median(steps)), bool(steps.max() <= 1.1 * steps.min())
    row_mm, column_mm = (float(mm) for mm in slices[0].get("PixelSpacing", (1.0, 1.0)))
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1], lps[:3, 2] = (
        normal * step,
        along_rows * row_mm,
        along_columns * column_mm,
    )
    lps[:3, 3] = positions[order[0]]
    # DICOM counts to the left and to the back, the affine here to the right and to the front.
    affine = check_affine(np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps)
    return [slices[k] for k in order], affine, even


def _values(dataset: Any) -> np.ndarray:
    """Pixels in the units of the modality, float32 [H, W]."""
    pixels = import_medical("pydicom.pixels")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = pixels.apply_modality_lut(dataset.pixel_array, dataset)
    except Exception as error:  # each decoder has its own errors
        syntax = dataset.file_meta.TransferSyntaxUID.name
        raise UnusableItemError(
            f"pixels cannot be decoded ({syntax}); compressed ones may need: pip install pylibjpeg "
            "pylibjpeg-libjpeg pylibjpeg-openjpeg"
        ) from error
    if values.shape != (int(dataset.Rows), int(dataset.Columns)):
        raise UnusableItemError("DICOM pixels and header differ in size")
    return np.asarray(values, dtype=np.float32)


def _stated_range(dataset: Any) -> Range | None:
    """First window of the file as (black, white), by the linear functions of DICOM PS3.3 C.11.2."""
    center, width = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    if center is None or width is None:
        return None
    # A file may list several windows.
    center, width = (float(np.atleast_1d(value)[0]) for value in (center, width))
    function = str(dataset.get("VOILUTFunction", "LINEAR"))
    if function == "LINEAR" and width > 1:
        return (center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2)
    if function == "LINEAR_EXACT" and width > 0:
        return (center - width / 2, center + width / 2)
    return None


def _facts(dataset: Any) -> Facts:
    # By the list alone: the dataset at hand holds the patient's name too.
    words = {name: str(dataset.get(name, "") or "").strip() for name in ALLOWED}
    person = person_of(words["PatientSex"], words["PatientAge"])
    try:
        modality = canonical_modality(words["Modality"])
    except ValueError as error:
        raise UnusableItemError(str(error)) from error
    return Facts(
        modality=modality,
        anatomy=words["BodyPartExamined"].lower(),
        sex=person.sex,
        # See OLDEST: an age above it is an identifier.
        age=None if person.age is None else min(person.age, OLDEST),
        noted=person.noted,
    )

"""DICOM series -> volumes, without the patient: what may leave a file is listed, all else stays.

    series = list_series(folder, key).series            # reads three identifiers per file
    volume, facts = read_series(folder, series[0].files)

De-identification is by allow-list: ALLOWED names the attributes that may enter records, as words of
our vocabulary and never as the file spells them, and the three identifiers enter as keyed
pseudonyms (HMAC-SHA256), which only the owner of the key can link. Reasons and notes quote no
attribute either: a field of a code may hold a name. Pixels may name a patient too: images that say
so, ultrasound, secondary and screen captures are quarantined until a person has looked at them.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from biascare.records import MAX_IMAGE_PIXELS
from biascare.records.vocabulary import canonical_modality
from data_prep.formats.slices import MAX_VOLUME_BYTES, Range, Volume, check_affine, import_medical
from data_prep.pipeline.attributes import person_of
from data_prep.pipeline.release_files import files_below
from data_prep.pipeline.shards import SetAsideError, UnusableItemError

ALLOWED = ("Modality", "BodyPartExamined", "PatientSex", "PatientAge")
"""Attributes whose words enter records. All are coded strings, none is free text."""

IDENTIFIERS = ("SeriesInstanceUID", "StudyInstanceUID", "PatientID")

BODY_PARTS = {
    "abdomen": ("ABDOMEN", "ABDO", "ABD", "UABDOMEN", "LABDOMEN"),
    "abdomen and pelvis": ("ABDOMENPELVIS", "ABDPELV", "ABDPELVIS"),
    "ankle": ("ANKLE",), "aorta": ("AORTA",), "arm": ("ARM", "UPPERARM", "HUMERUS"),
    "bladder": ("BLADDER",), "brain": ("BRAIN",), "breast": ("BREAST",),
    "cervical spine": ("CSPINE", "CERVICALSPINE"), "chest": ("CHEST", "THORAX", "PORTCHEST"),
    "chest and abdomen": ("CHESTABDOMEN",),
    "chest, abdomen and pelvis": ("CHESTABDPELVIS", "CHESTABDOMENPELVIS"),
    "clavicle": ("CLAVICLE",), "coccyx": ("COCCYX",), "colon": ("COLON",), "elbow": ("ELBOW",),
    "extremity": ("EXTREMITY",), "eye": ("EYE", "EYES", "ORBIT", "RETINA"),
    "femur": ("FEMUR", "THIGH"), "finger": ("FINGER",), "foot": ("FOOT", "FEET"),
    "forearm": ("FOREARM",), "hand": ("HAND",), "head": ("HEAD",), "head and neck": ("HEADNECK",),
    "heart": ("HEART", "CARDIAC"), "hip": ("HIP",), "jaw": ("JAW", "MANDIBLE", "MAXILLA"),
    "kidney": ("KIDNEY", "KIDNEYS", "RENAL"), "knee": ("KNEE",),
    "leg": ("LEG", "LOWERLEG", "TIBIA", "TIBIAFIBULA"), "liver": ("LIVER",),
    "lower limb": ("LOWERLIMB", "LOWEREXTREMITY"), "lumbar spine": ("LSPINE", "LUMBARSPINE"),
    "lung": ("LUNG", "LUNGS"), "neck": ("NECK",), "neck, chest and abdomen": ("NECKCHESTABDOMEN",),
    "neck, chest, abdomen and pelvis": ("NECKCHESTABDPELV",), "pancreas": ("PANCREAS",),
    "pelvis": ("PELVIS",), "prostate": ("PROSTATE",), "ribs": ("RIB", "RIBS"),
    "sacral spine": ("SSPINE", "SACRUM"), "scapula": ("SCAPULA",), "shoulder": ("SHOULDER",),
    "skin": ("SKIN",), "skull": ("SKULL",), "spine": ("SPINE", "WHOLESPINE"),
    "spleen": ("SPLEEN",), "sternum": ("STERNUM",), "stomach": ("STOMACH",),
    "thoracic spine": ("TSPINE", "THORACICSPINE"), "thyroid": ("THYROID",), "toe": ("TOE",),
    "upper limb": ("UPPERLIMB", "UPPEREXTREMITY"), "uterus": ("UTERUS",),
    "whole body": ("WHOLEBODY",), "wrist": ("WRIST",),
}  # fmt: skip
"""Anatomy in records -> values of BodyPartExamined, without spaces. The rest may be anything that
was typed at the scanner, and stays in the file."""

COLOURS = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
"""Photometric interpretations that a reason may name."""

OLDEST = 90.0
"""Years. Older patients are so few that their age names them; all are given this age."""

MIN_KEY_BYTES = 16

MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
"""Class of a DICOMDIR, the list of a disc. Its name on disk is often another one."""

NOT_IMAGES = ("SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "SR", "PR", "KO", "REG", "ECG", "AU")
"""Modalities of objects that are about images and no images, though some of them hold pixels."""

QUARANTINED_MODALITIES = ("US", "IVUS", "SC", "OT", "DOC", "XC")
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
ULTRASOUND = ("1.2.840.10008.5.1.4.1.1.6", "1.2.840.10008.5.1.4.1.1.3.1")
SCREENS = ("SCREEN SAVE", "SCREENSAVE", "SCREEN CAPTURE", "SCREENSHOT", "DOSE_INFO", "REPORT")
"""Values of ImageType, or parts of them, by which scanners mark a picture of their own screen."""

SCOUT = "LOCALIZER"
"""Value of ImageType of an image that slices are planned on."""

NO_PIXELS = "DICOM file without pixels"

SAME_IN_A_SERIES = ("Rows", "Columns", "PhotometricInterpretation", "Modality")


class Series(NamedTuple):
    """Files of one series, and its pseudonyms."""

    files: tuple[str, ...]  # relative to the folder
    series: str
    study: str
    patient: str | None


class Listed(NamedTuple):
    """What a folder holds."""

    series: list[Series]
    passed_over: Counter[str]  # what is no object of a series, and how many files


class Facts(NamedTuple):
    """What records say about a series."""

    modality: str  # canonical
    anatomy: str
    sex: str | None
    age: float | None  # years
    noted: tuple[str, ...] = ()  # what was left out of the series or of these facts, for the ledger


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


def list_series(folder: Path, key: bytes) -> Listed:
    """All series below a folder, in order of their first file; files without a series are one
    series each. Raises ValueError as `files_below`."""
    pydicom = import_medical("pydicom")
    found: dict[str, tuple[list[str], dict[str, str]]] = {}
    passed_over: Counter[str] = Counter()
    for path in files_below(folder):
        if not pydicom.misc.is_dicom(path):
            passed_over["no DICOM file"] += 1
            continue
        header = _identifiers(path)
        # By its class, and by its name where the header is damaged.
        if path.name == "DICOMDIR" or header.get("class") == MEDIA_DIRECTORY:
            passed_over["DICOMDIR"] += 1
            continue
        relative = path.relative_to(folder).as_posix()
        uid = header.get("SeriesInstanceUID") or relative
        found.setdefault(uid, ([], header))[0].append(relative)
    series = []
    for uid, (files, header) in found.items():
        study, patient = (header.get(name, "") for name in IDENTIFIERS[1:])
        series.append(
            Series(
                files=tuple(files),
                series=pseudonym(key, "series", uid),
                study=pseudonym(key, "study", study or uid),
                # None, not the pseudonym of "": that would make one patient of all unknown ones.
                patient=pseudonym(key, "patient", patient) if patient else None,
            )
        )
    return Listed(series, passed_over)


def read_series(folder: Path, files: Sequence[str], cleared: bool = False) -> tuple[Volume, Facts]:
    """Slices in anatomical order, rescaled. `cleared`: a person has looked at a quarantined series.

    Scouts and objects without pixels among the slices are left out and noted. Raises SetAsideError
    for series of nothing else, for what is quarantined and for slices that are no stack, and
    UnusableItemError for several frames, colours, times or echoes in one, and damage.
    """
    slices, aside = [], Counter[str]()
    with _in_silence():
        for name in files:
            dataset = _read_slice(folder / name, cleared)
            reason = _no_slice(dataset)
            if reason:
                aside[reason] += 1
            else:
                slices.append(dataset)
        if not slices:
            raise SetAsideError("; ".join(sorted(aside)))
        # Ordinary as a series of its own; among slices it is one that was cut off, and the volume
        # would have a hole.
        if NO_PIXELS in aside:
            raise UnusableItemError("a slice without pixels among others: is its file cut off?")
        try:
            volume, facts = _volume(slices), _facts(slices[0])
        except UnusableItemError:
            raise
        # Values that a header should not hold: pydicom raises when they are used, and whatever it
        # likes (NotImplementedError for a type with one flipped bit).
        except Exception as error:
            raise UnusableItemError("DICOM header unreadable") from error
    left_out = tuple(f"files of the series set aside: {reason}" for reason in sorted(aside))
    return volume, facts._replace(noted=(*left_out, *facts.noted))


def _volume(slices: list[Any]) -> Volume:
    for name in SAME_IN_A_SERIES:
        # An export may put a scout image or a colour overlay into the series of the slices.
        if len({str(one.get(name, "")) for one in slices}) > 1:
            raise SetAsideError(f"slices of one series differ in {name}")
    # By the headers, before pixels are decoded; compressed files are small on disk only.
    num_bytes = 4 * sum(int(s.Rows) * int(s.Columns) for s in slices)
    if num_bytes > MAX_VOLUME_BYTES:
        raise UnusableItemError(f"volume of {num_bytes:,} bytes is above {MAX_VOLUME_BYTES:,}")
    slices, affine, even = _stack(slices)
    return Volume(
        # Rescaled slice by slice: in PET each has a slope of its own.
        voxels=np.stack([_values(one) for one in slices]),
        slope=1.0,
        intercept=0.0,
        affine=affine,
        shown=_stated_range(slices[0]),
        inverted=str(slices[0].PhotometricInterpretation) == "MONOCHROME1",
        even=even,
    )


@contextlib.contextmanager
def _in_silence() -> Iterator[None]:
    """Without pydicom's warnings: they are of values that are not used here, and quote them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _identifiers(path: Path) -> dict[str, str]:
    """IDENTIFIERS of a file, and the class of the object; empty for a damaged one."""
    pydicom = import_medical("pydicom")
    # Three identifiers and no more: what is not read cannot be written by mistake.
    try:
        with _in_silence():
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[*IDENTIFIERS])
            found = {name: str(header.get(name, "") or "") for name in IDENTIFIERS}
            return found | {"class": str(header.file_meta.get("MediaStorageSOPClassUID", ""))}
    except Exception:  # a damaged file is met again, and reported, when it is converted
        return {}


def _read_slice(path: Path, cleared: bool) -> Any:
    """One file, its header checked."""
    pydicom = import_medical("pydicom")
    try:
        dataset = pydicom.dcmread(path)
        # What is no slice shows its pixels to nobody, and need not be looked at.
        if _no_slice(dataset):
            return dataset
        reason = None if cleared else _quarantine(dataset)
        # The whole series: where one image carries the name, its neighbours may carry it too.
        if reason:
            raise SetAsideError(f"quarantined: {reason}; look at it, then list it in --cleared")
        _check_header(dataset)
    except UnusableItemError:
        raise
    except Exception as error:  # pydicom's parser raises whatever a damaged file makes it meet
        raise UnusableItemError("DICOM file unreadable") from error
    return dataset


def _no_slice(dataset: Any) -> str | None:
    """Why an object is no slice, by what it is and not by what is wrong with it."""
    # Quoted from our own list: a field of a code may hold a name.
    kind = next((kind for kind in NOT_IMAGES if kind == dataset.get("Modality")), None)
    if kind:
        return f"{kind} object, no image"
    # Reports and plans are DICOM files as well.
    if "PixelData" not in dataset:
        return NO_PIXELS
    return "scout image" if SCOUT in _image_type(dataset) else None


def _image_type(dataset: Any) -> list[str]:
    value = dataset.get("ImageType") or []
    return [str(word).strip().upper() for word in ([value] if isinstance(value, str) else value)]


def _check_header(dataset: Any) -> None:
    # Frames may be slices, times or echoes, and the file says which in many ways.
    if int(dataset.get("NumberOfFrames", 1) or 1) > 1:
        raise UnusableItemError("several frames in one DICOM file; split it into single frames")
    photometric = str(dataset.PhotometricInterpretation)
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or int(dataset.SamplesPerPixel) != 1:
        named = f" {photometric}" if photometric in COLOURS else ""
        raise UnusableItemError(f"photometric interpretation{named} is not monochrome")
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if not 0 < rows * columns <= MAX_IMAGE_PIXELS:
        raise UnusableItemError(f"image of {rows} x {columns} pixels refused")
    compressed = dataset.file_meta.TransferSyntaxUID.is_compressed
    # Told here, with a reason, and not by a decoder in the middle of the volume.
    if not compressed and len(dataset.PixelData) < rows * columns * int(dataset.BitsAllocated) // 8:
        raise UnusableItemError("DICOM pixels are cut off")


def _quarantine(dataset: Any) -> str | None:
    """Why a person must look at the pixels first."""
    sop_class = str(dataset.get("SOPClassUID", ""))
    # Each rule is about pixels: the list of allowed attributes cannot help against a name in them.
    if str(dataset.get("BurnedInAnnotation", "")).strip().upper() == "YES":
        return "burned-in annotation"
    if str(dataset.get("RecognizableVisualFeatures", "")).strip().upper() == "YES":
        return "recognizable visual features, a face for example"
    if sop_class.startswith(ULTRASOUND) or str(dataset.get("Modality", "")) in ("US", "IVUS"):
        return "ultrasound, which often shows the name"
    if any(mark in word for word in _image_type(dataset) for mark in SCREENS):
        return "screen capture"
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
        raise SetAsideError("slices of one series lie in different directions")
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
        values = pixels.apply_modality_lut(dataset.pixel_array, dataset)
    except Exception as error:  # each decoder has its own errors
        uid = dataset.file_meta.TransferSyntaxUID
        # The name of a known one; any other text in its place is the file's own.
        syntax = uid.name if uid.name != uid else "of an unknown kind"
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
    try:
        modality = canonical_modality(words["Modality"])
    except ValueError as error:
        # Not quoted, here and below: whoever typed a name into the wrong field, it stays there.
        raise UnusableItemError("Modality is no modality that is known here") from error
    person = person_of(words["PatientSex"], words["PatientAge"])
    part = "".join(words["BodyPartExamined"].upper().split())
    anatomy = next((name for name, spellings in BODY_PARTS.items() if part in spellings), "")
    noted = person.noted
    if part and not anatomy:
        noted += ("BodyPartExamined holds no known value and is left out",)
    # See OLDEST: an age above it is an identifier.
    age = None if person.age is None else min(person.age, OLDEST)
    return Facts(modality, anatomy, person.sex, age, noted)

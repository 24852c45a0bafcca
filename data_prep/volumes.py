"""Volumes (NIfTI or DICOM) -> record folders, one record per slice.

    python data_prep/volumes.py --nifti img --masks seg --labels '1=liver,2=spleen' \\
        --name my_ct --modality ct --window 40,400 --plane axial --output prepared
    python data_prep/volumes.py --dicom export --pseudonym-key secret.key --name my_mr \\
        --output prepared

NIfTI: every .nii and .nii.gz below the folder; a label volume has the same path below --masks (or
below --nifti, without --masks), but for the endings that these options name:

    imagesTr/la_007.nii.gz,        --nifti imagesTr --masks labelsTr                     (MSD)
    labelsTr/la_007.nii.gz
    imagesTr/la_007_0000.nii.gz,   --nifti imagesTr --masks labelsTr --image-suffix _0000 (nnU-Net)
    labelsTr/la_007.nii.gz
    BraTS_001/BraTS_001_flair.nii, --nifti . --image-suffix _flair --mask-suffix _seg    (BraTS)
    BraTS_001/BraTS_001_seg.nii
    case_00001/imaging.nii.gz,     --nifti . --image-name imaging --mask-name segmentation  (KiTS)
    case_00001/segmentation.nii.gz

Slices are turned to the radiological view by the file's own geometry: patient's right at image
left. --plane native cuts along the slices as they were acquired, which is the default for DICOM;
across them pixels are often several times as high as wide, which is noted, and --square-pixels adds
pixels until they are square. Millimetres per pixel stand in the record's extra, and so does
`affine`: the 4 x 4 matrix that takes (slice, row, column, 1) of the stored pixels to millimetres to
the patient's right, front and head. Slices at uneven distances have none.

`--metadata table.csv` is a table with a column image (a case's name or path) and any of patient_id,
study_id, sex, age, race, anatomy.

DICOM: every series below the folder; patients, studies and series get pseudonyms of your key, and
only a listed few attributes enter records. What a DICOM folder holds beside series of slices
(DICOMDIR, scouts, reports) is set aside with a count per reason. Ultrasound, screens, secondary
captures and images with burned-in text or recognizable features are quarantined: they stand in the
ledger by their pseudonym, `--path-map FILE` tells you where they lie, and `--cleared FILE`, one
pseudonym per line, lets those pass that a person has looked at.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from biascare.records import Record
from data_prep.formats.dicom import Facts, list_series, read_key, read_series
from data_prep.formats.nifti import SUFFIXES, read_label_volume, read_nifti
from data_prep.formats.slices import (
    NATIVE,
    PLANES,
    SQUASHED,
    Range,
    Volume,
    check_even,
    import_medical,
    oriented,
    plane_of,
    png_of,
    range_shown,
    resized_grey,
    resized_labels,
    slice_affine,
    slice_values,
    spacing_of,
    square_shape,
    to_grey,
)
from data_prep.pipeline import shards
from data_prep.pipeline.attributes import person_of, race_of
from data_prep.pipeline.metadata import Metadata, Told, add_metadata_arguments
from data_prep.pipeline.options import (
    PATIENT_REGEX,
    Splits,
    Value,
    add_source_arguments,
    add_split_arguments,
    cut_masks,
    group_by_split,
    parse_labels,
    releases_of,
    stem_of,
)
from data_prep.pipeline.program import run_program
from data_prep.pipeline.release_files import file_inside, files_below, note
from data_prep.pipeline.shards import Incomplete, Release, SetAsideError, UnusableItemError

NIFTI_MASKS = "--masks with --labels adds masks"
DICOM_MASKS = "convert the series to NIfTI, then --nifti with --masks and --labels adds masks"
DICOM_PATIENTS = "without a PatientID the study is drawn; --split-list puts it where you say"

VOLUMES_PER_SHARD = 8
"""A CT holds some hundred slices: a shard of volumes is then about as long as one of images."""


class Item(NamedTuple):
    """One volume: a NIfTI file with its labels, or the files of a DICOM series."""

    key: str  # in record ids and in the ledger; a pseudonym for DICOM
    files: tuple[str, ...]  # relative to the folder of images
    labels: str  # NIfTI file relative to the folder of masks; empty
    patient: str | None  # None: not known, a NIfTI file without --patient-regex
    study: str | None
    cleared: bool  # quarantine lifted by a person
    told: Told = Told()  # by --metadata


class Source(NamedTuple):
    """What all items share. Picklable."""

    name: str
    images: Path
    masks: Path | None
    is_dicom: bool
    modality: str | None  # None: as DICOM says
    anatomy: str
    labels: tuple[tuple[Value, str], ...]
    ignored: tuple[int, ...]
    plane: str
    square: bool  # pixels are added until they are square
    window: str | Range | None
    assumed: str | None  # orientation of NIfTI files that state none
    channel: int | None  # of NIfTI images that hold several volumes
    resample: bool  # labels of another grid
    skip_empty: bool


class Endings(NamedTuple):
    """How the names of images and of their label volumes end, before the suffix. A name of its own
    in each case's folder is an ending too: "/imaging"."""

    image: str
    mask: str

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Endings:
        """Raises ValueError for a name and a suffix of one kind of file."""
        endings = []
        for kind in ("image", "mask"):
            name, suffix = getattr(args, f"{kind}_name"), getattr(args, f"{kind}_suffix")
            if name and suffix:
                raise ValueError(f"--{kind}-name and --{kind}-suffix: choose one")
            endings.append(f"/{stem_of(name)}" if name else stem_of(suffix))
        return cls(*endings)


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    source = _source(args)
    # At once, and not in the first worker after all files were listed.
    import_medical("nibabel")
    splits = Splits.from_arguments(args)
    endings = Endings.from_arguments(args)
    metadata = _metadata(args)
    items = list_dicom(args) if source.is_dicom else list_nifti(source, endings, splits, metadata)
    if not items:
        raise ValueError(f"{source.images} holds no {'DICOM' if source.is_dicom else 'NIfTI'} file")
    shards.run(args, releases(source, items, splits, args.version, args.licence))


def releases(
    source: Source, items: Sequence[Item], splits: Splits, version: str, licence: str
) -> list[Release]:
    """One release per split, in order of name. A volume is never divided."""
    groups = group_by_split(
        source.name,
        items,
        splits,
        name_of=lambda item: item.key,
        patient_of=lambda item: item.patient,
        what="volumes",
        study_of=lambda item: item.study,
        mend=DICOM_PATIENTS if source.is_dicom else PATIENT_REGEX,
    )
    return releases_of(
        groups,
        source=source.name,
        version=version,
        licence=licence,
        convert=partial(convert, source),
        name_of=name_of,
        promises_masks=source.masks is not None,
        how_to_learn=DICOM_MASKS if source.is_dicom else NIFTI_MASKS,
    )


def list_nifti(source: Source, endings: Endings, splits: Splits, metadata: Metadata) -> list[Item]:
    """NIfTI images below the folder, with the label file of the same path but for the endings.

    Raises ValueError where an image would be its own label map, or none has one.
    """
    images = _with_ending(source.images, endings.image)
    masks = _with_ending(source.masks, endings.mask) if source.masks else {}
    here, there = source.images.resolve(), (source.masks or source.images).resolve()
    if masks and here == there:
        if endings.image == endings.mask:
            raise ValueError(_how_to_tell(source.images, sorted(images.values())))
        # The longer ending says more: a_seg.nii ends with "" as well, and is no image.
        of_image = len(endings.image) > len(endings.mask)
        fewer, others = (masks, images) if of_image else (images, masks)
        taken = set(others.values())
        for key in [key for key, name in fewer.items() if name in taken]:
            del fewer[key]
    elif masks and there.is_relative_to(here):
        inside = there.relative_to(here).as_posix() + "/"
        images = {key: name for key, name in images.items() if not name.startswith(inside)}
    if masks and images and not images.keys() & masks.keys():
        wanted = f"{next(iter(images))}{endings.mask}{SUFFIXES[-1]}"
        raise ValueError(
            f"none of the {len(images)} images in {source.images} has a label volume: "
            f"{next(iter(images.values()))} would be {wanted} in {source.masks}, which holds "
            f"{next(iter(masks.values()))}; see --image-suffix, --mask-suffix, --image-name and "
            "--mask-name in --help"
        )
    items = []
    for key, told in metadata.of_images(images, splits).items():
        patient, study = told.get("patient_id"), told.get("study_id")
        items.append(Item(key, (images[key],), masks.get(key, ""), patient, study, False, told))
    for item in items:
        # Also behind links: a network that learns to give back its input scores well in training.
        if item.labels and (here / item.files[0]).resolve() == (there / item.labels).resolve():
            raise ValueError(f"{item.files[0]} is its own label volume; see --mask-suffix")
    return items


def _with_ending(folder: Path, ending: str) -> dict[str, str]:
    """Path without ending and suffix -> path of all NIfTI files below a folder, in order."""
    found: dict[str, str] = {}
    for path in files_below(folder):
        name = path.relative_to(folder).as_posix()
        stem = f"/{stem_of(name)}"  # as in "/imaging", which then is the name and no part of it
        if not (name.endswith(SUFFIXES) and stem.endswith(ending)):
            continue
        key = (stem.removesuffix(ending) or stem).strip("/")
        if key in found:
            raise ValueError(f"{folder} holds {found[key]} and {name}: which one is meant?")
        found[key] = name
    return found


def _how_to_tell(folder: Path, names: Sequence[str]) -> str:
    """Which files of a folder are label maps, asked with what is there."""
    # The file names of one case say it, where a case is a folder.
    first = [name for name in names if Path(name).parent == Path(names[0]).parent][:6]
    return (
        f"images and label volumes of {folder} share a folder, so their names must tell them "
        f"apart: {first}. Say how they end (--image-suffix _flair --mask-suffix _seg), or what "
        "they are called where each case has its folder (--image-name imaging --mask-name "
        "segmentation)"
    )


def list_dicom(args: argparse.Namespace) -> list[Item]:
    """Series below the folder, under their pseudonyms."""
    if args.pseudonym_key is None:
        raise ValueError("--dicom needs --pseudonym-key FILE; see --help")
    cleared = set(args.cleared.read_text().split()) if args.cleared else set()
    series, passed_over = list_series(args.dicom, read_key(args.pseudonym_key))
    if passed_over:
        counts = ", ".join(f"{count} x {what}" for what, count in sorted(passed_over.items()))
        note(f"{args.name}: files passed over: {counts}")
    # A typing error would leave its series in quarantine, and the user would think it passed.
    unknown = sorted(cleared - {one.series for one in series})
    if unknown:
        raise ValueError(f"--cleared lists series that are not in the source: {unknown[:3]}")
    if args.path_map:
        lines = [json.dumps({"series": one.series, "files": one.files}) for one in series]
        # Only where the user asks: it undoes the pseudonyms.
        args.path_map.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [
        Item(one.series, one.files, "", one.patient, one.study, one.series in cleared)
        for one in series
    ]


def convert(source: Source, split: str, item: Item) -> Iterator[Record | Incomplete]:
    """Slices of one volume as records. Raises UnusableItemError, always before the first one."""
    volume, facts = _read(source, item)
    plane = plane_of(volume, source.plane)
    check_even(volume, plane)
    # An export of many kinds; windows and sides of the stated modality would be wrong for this one.
    if source.modality and facts.modality != source.modality:
        raise SetAsideError(f"modality is {facts.modality}, --modality says {source.modality}")
    shown = range_shown(volume, facts.modality, source.window)
    masks, resampled = _label_slices(source, item, volume, plane)
    count, *shape = oriented(volume.voxels, volume.affine, plane).shape
    noted = [*facts.noted, *item.told.noted, *resampled, *_no_numbers(volume)]
    spacing: dict[str, Any] = {}
    new_shape = (shape[0], shape[1])
    if volume.affine is not None:  # radiographs have no geometry, and 1 mm would be made up
        between, row, column = spacing_of(volume.affine, plane)
        if source.square:
            new_shape = square_shape(new_shape, (row, column))
            row, column = row * shape[0] / new_shape[0], column * shape[1] / new_shape[1]
        elif max(row, column) > SQUASHED * min(row, column):
            noted.append(
                f"pixels of {plane} slices are far from square, so they look squashed: --plane "
                f"{plane_of(volume, NATIVE)} cuts along the slices as acquired, --square-pixels "
                "adds pixels"
            )
        spacing = {"mm_per_pixel": [row, column], "mm_between_slices": between}
        # Where slices are missing, one matrix would put those behind the gap in a wrong place.
        if volume.even:
            spacing["affine"] = slice_affine(volume, plane, new_shape).tolist()
        if new_shape != (shape[0], shape[1]):
            spacing["stored_shape"] = shape
    for index, values in enumerate(slice_values(volume, plane)):
        targets = []
        if len(masks):
            labels = resized_labels(masks[index], new_shape)
            targets = cut_masks(labels, dict(source.labels), source.ignored)
        if source.skip_empty and not targets:
            continue
        record = Record(
            id=f"{source.name}/{item.key}/{plane}-{index:04d}",
            image=png_of(resized_grey(to_grey(values, shown, volume.inverted), new_shape)),
            height=new_shape[0],
            width=new_shape[1],
            targets=targets,
            task="segmentation",
            modality=facts.modality,
            anatomy=facts.anatomy,
            source=source.name,
            split=split,
            patient_id=item.patient,
            study_id=item.study,
            sex=facts.sex,
            age=facts.age,
            race=race_of(item.told.get("race") or ""),
            extra={
                "plane": plane,
                "slice": index,
                "num_slices": count,
                "range_shown": list(shown),
                **spacing,
                **item.told.extra,
            },
        )
        # With the first record that there is: what is noted is said once of a volume.
        yield Incomplete(record, noted=tuple(noted)) if noted else record
        noted = []


def name_of(item: Item) -> str:
    return item.key


def _read(source: Source, item: Item) -> tuple[Volume, Facts]:
    if source.is_dicom:
        for name in item.files:
            # Again in the worker: a file may have been removed since. Without its reason, which
            # would carry a path of the source, and with it perhaps a patient, to the ledger.
            try:
                file_inside(source.images, name)
            except UnusableItemError:
                raise UnusableItemError("DICOM file missing or not readable") from None
        volume, facts = read_series(source.images, item.files, item.cleared)
        return volume, facts._replace(anatomy=source.anatomy or facts.anatomy)
    assert source.modality is not None
    path = file_inside(source.images, item.files[0])
    volume = read_nifti(path, source.assumed, source.channel)
    person = person_of(item.told.get("sex") or "", item.told.get("age") or "")
    return volume, Facts(source.modality, item.told.get("anatomy") or source.anatomy, *person)


def _label_slices(
    source: Source, item: Item, volume: Volume, plane: str
) -> tuple[np.ndarray, list[str]]:
    """Labels in display order, int32 [slices, H, W], empty when the user gave none; and what is to
    be noted of them."""
    if source.masks is None:
        return np.zeros((0, 0, 0), dtype=np.int32), []
    if not item.labels:
        raise UnusableItemError("no label volume")
    path = file_inside(source.masks, item.labels)
    labels, resampled = read_label_volume(path, volume, source.assumed, resample=source.resample)
    # All values are judged here, so that no slice is written before the volume is known to be good.
    values = np.unique(labels.voxels).reshape(1, -1)
    if not cut_masks(values, dict(source.labels), source.ignored) and source.skip_empty:
        raise UnusableItemError("no mask has a pixel")
    noted = ["labels lay on another grid and were resampled to that of the image"] * resampled
    return oriented(labels.voxels, labels.affine, plane), noted


def _no_numbers(volume: Volume) -> Iterator[str]:
    if volume.voxels.dtype.kind == "f" and not np.isfinite(volume.voxels).all():
        yield "voxels that are no numbers (NaN) are shown as black, infinite ones as the range ends"


def _source(args: argparse.Namespace) -> Source:
    """Raises ValueError for options that do not fit together."""
    # Window, flips and the check of sides depend on it: a default would be wrong in silence.
    if args.nifti and not args.modality:
        raise ValueError("--nifti needs --modality: the file does not say")
    has_masks = bool(args.masks or args.mask_suffix or args.mask_name)
    # A value without a name cannot be a target, and a name without masks finds none.
    if has_masks != bool(args.labels):
        raise ValueError(
            "--masks (or --mask-suffix, --mask-name) and --labels go together: which value is "
            "which target?"
        )
    if args.dicom and has_masks:
        raise ValueError("--masks are NIfTI files and go with --nifti; convert the series first")
    if args.skip_empty and not has_masks:
        raise ValueError("--skip-empty without --masks would leave out everything")
    if args.channel is not None and (args.dicom or args.channel < 0):
        raise ValueError("--channel is a number from 0, of NIfTI files that hold several volumes")
    if args.assume_orientation and not _is_orientation(args.assume_orientation):
        raise ValueError(f"--assume-orientation is like RAS or LPS, got {args.assume_orientation}")
    return Source(
        name=args.name,
        images=args.dicom or args.nifti,
        masks=(args.masks or args.nifti) if has_masks else None,
        is_dicom=bool(args.dicom),
        modality=args.modality,
        anatomy=args.anatomy,
        labels=tuple(parse_labels(args.labels).items()) if args.labels else (),
        ignored=tuple(args.ignore_values),
        # NIfTI headers seldom say how slices were acquired; the axial view is what is looked at.
        plane=args.plane or (NATIVE if args.dicom else "axial"),
        square=args.square_pixels,
        window=_window(args.window),
        assumed=args.assume_orientation,
        channel=args.channel,
        resample=args.resample_labels is not None,
        skip_empty=args.skip_empty,
    )


def _metadata(args: argparse.Namespace) -> Metadata:
    """Raises ValueError for a table that cannot be one of volumes."""
    if args.dicom and args.metadata:
        raise ValueError("--metadata goes with --nifti: DICOM headers say who the patient is")
    metadata = Metadata.from_arguments(args)
    if any(row.cells["question"] for row in metadata.rows):
        raise ValueError(
            f"{args.metadata} holds questions, and a volume becomes many slices: which of them is "
            "asked about? Remove the column, or ask about images with data_prep/table.py or "
            "data_prep/folder.py"
        )
    return metadata


def _is_orientation(codes: str) -> bool:
    """Three letters, one of each pair."""
    return len(codes) == 3 and all(len(set(codes) & set(pair)) == 1 for pair in ("RL", "AP", "SI"))


def _window(text: str | None) -> str | Range | None:
    if text in (None, "file", "percentile"):
        return text
    match = re.fullmatch(r"(-?[\d.]+),([\d.]+)", str(text))
    if not match or float(match[2]) <= 0:
        raise ValueError(
            f"--window is LEVEL,WIDTH with WIDTH above 0, file or percentile: {text!r}"
        )
    return (float(match[1]), float(match[2]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--nifti", type=Path, metavar="DIR", help="folder of .nii and .nii.gz")
    images.add_argument("--dicom", type=Path, metavar="DIR", help="folder of DICOM files")
    add_source_arguments(parser, modality_required=False)
    parser.add_argument("--masks", type=Path, metavar="DIR", help="label volumes, with --nifti")
    parser.add_argument("--labels", help="VALUE=NAME,...")
    parser.add_argument(
        "--ignore-values", type=int, nargs="*", default=[], help="for example 255; default: none"
    )
    names = parser.add_argument_group("which NIfTI file is what")
    for kind, suffix, name in (("image", "_0000", "imaging"), ("mask", "_seg", "segmentation")):
        names.add_argument(
            f"--{kind}-suffix",
            default="",
            help=f"ending of {kind} names, like {suffix}; default: none",
        )
        names.add_argument(
            f"--{kind}-name",
            default="",
            help=f"of the {kind} in each case's folder, like {name}; default: any",
        )
    names.add_argument(
        "--channel", type=int, help="of images that hold several volumes (4-D), from 0"
    )
    parser.add_argument(
        "--resample-labels",
        choices=("nearest",),
        help="for label volumes on another grid than their image; default: they are unusable",
    )
    parser.add_argument(
        "--plane",
        choices=(NATIVE, *PLANES),
        help="of the slices; default: native for DICOM, axial for NIfTI; a single slice is native",
    )
    parser.add_argument(
        "--square-pixels",
        action="store_true",
        help="add pixels between far-apart slices until pixels are square",
    )
    parser.add_argument(
        "--window",
        help="LEVEL,WIDTH, file or percentile; default: file, else 40,400 for CT, else percentile",
    )
    # Off by default: a slice without the organ teaches where it ends.
    parser.add_argument("--skip-empty", action="store_true", help="leave out slices without target")
    parser.add_argument(
        "--assume-orientation", metavar="CODES", help="of NIfTI files without one, like RAS"
    )
    privacy = parser.add_argument_group("DICOM privacy")
    privacy.add_argument("--pseudonym-key", type=Path, metavar="FILE", help="your secret")
    privacy.add_argument(
        "--cleared", type=Path, metavar="FILE", help="quarantined series that pass"
    )
    privacy.add_argument(
        "--path-map", type=Path, metavar="FILE", help="gets pseudonym and files; keep it private"
    )
    add_metadata_arguments(parser, "the patient's attributes; with --nifti")
    add_split_arguments(parser)
    shards.add_arguments(parser, items_per_shard=VOLUMES_PER_SHARD)
    return parser


if __name__ == "__main__":
    run_program(main)

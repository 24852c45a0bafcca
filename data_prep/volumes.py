"""Volumes (NIfTI or DICOM) -> record folders, one record per slice.

    python data_prep/volumes.py --nifti img --masks seg --labels '1=liver,2=spleen' \\
        --name my_ct --modality ct --window 40,400 --plane axial --output prepared
    python data_prep/volumes.py --dicom export --pseudonym-key secret.key --name my_mr \\
        --output prepared

NIfTI: every .nii and .nii.gz below the folder; a label volume has the same path below --masks, with
`--image-suffix _0000` where image names carry a channel number. DICOM: every series below the
folder; patients, studies and series get pseudonyms of your key, and only a listed few attributes
enter records. Slices are turned to the radiological view by the file's own geometry: patient's
right at image left. Nothing is resampled; millimetres per pixel stand in the record's extra.

Ultrasound, secondary captures and images with burned-in text are quarantined: they stand in the
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
    PLANES,
    Range,
    Volume,
    check_even,
    import_medical,
    oriented,
    png_of,
    range_shown,
    slice_values,
    spacing_of,
    to_grey,
)
from data_prep.pipeline import shards
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
from data_prep.pipeline.release_files import file_inside
from data_prep.pipeline.shards import Incomplete, Release, UnusableItemError

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
    window: str | Range | None
    assumed: str | None  # orientation of NIfTI files that state none
    skip_empty: bool


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    source = _source(args)
    # At once, and not in the first worker after all files were listed.
    import_medical("nibabel")
    splits = Splits.from_arguments(args)
    items = list_dicom(args) if source.is_dicom else list_nifti(source, args.image_suffix, splits)
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


def list_nifti(source: Source, image_suffix: str, splits: Splits) -> list[Item]:
    """NIfTI files below the folder, with the label file of the same path."""
    if not source.images.is_dir():
        raise ValueError(f"{source.images} is not a folder")
    items = []
    for path in sorted(path for path in source.images.rglob("*") if path.name.endswith(SUFFIXES)):
        relative = path.relative_to(source.images).as_posix()
        stem = stem_of(relative)
        if not stem.endswith(image_suffix):
            continue
        key = stem.removesuffix(image_suffix)
        labels = [key + suffix for suffix in SUFFIXES]
        # By the same path: labels matched by number would end on another patient.
        found = [name for name in labels if source.masks and (source.masks / name).is_file()]
        if len(found) > 1:
            raise ValueError(f"{source.masks} holds {found}: which one is meant?")
        patient = splits.patient_in(relative)
        items.append(Item(key, (relative,), found[0] if found else "", patient, None, False))
    return items


def list_dicom(args: argparse.Namespace) -> list[Item]:
    """Series below the folder, under their pseudonyms."""
    if args.pseudonym_key is None:
        raise ValueError("--dicom needs --pseudonym-key FILE; see --help")
    if not args.dicom.is_dir():
        raise ValueError(f"{args.dicom} is not a folder")
    cleared = set(args.cleared.read_text().split()) if args.cleared else set()
    series = list_series(args.dicom, read_key(args.pseudonym_key))
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


def convert(source: Source, split: str, item: Item) -> Iterator[Incomplete]:
    """Slices of one volume as records. Raises UnusableItemError, always before the first one."""
    volume, facts = _read(source, item)
    check_even(volume, source.plane)
    # An export of many kinds; windows and sides of the stated modality would be wrong for this one.
    if source.modality and facts.modality != source.modality:
        raise UnusableItemError(f"modality is {facts.modality}, --modality says {source.modality}")
    shown = range_shown(volume, facts.modality, source.window)
    masks = _label_slices(source, item, volume)
    count = len(oriented(volume.voxels, volume.affine, source.plane))
    spacing: dict[str, Any] = {}
    if volume.affine is not None:  # radiographs have no geometry, and 1 mm would be made up
        between, row, column = spacing_of(volume.affine, source.plane)
        spacing = {"mm_per_pixel": [row, column], "mm_between_slices": between}
    for index, values in enumerate(slice_values(volume, source.plane)):
        targets = cut_masks(masks[index], dict(source.labels), source.ignored) if len(masks) else []
        if source.skip_empty and not targets:
            continue
        plane = source.plane if volume.affine is not None else "stored"
        record = Record(
            id=f"{source.name}/{item.key}/{plane}-{index:04d}",
            image=png_of(to_grey(values, shown, volume.inverted)),
            height=values.shape[0],
            width=values.shape[1],
            targets=targets,
            task="segmentation",
            modality=facts.modality,
            anatomy=facts.anatomy,
            source=source.name,
            split=split,
            # Slices of a volume are of one patient, whoever that is.
            patient_id=item.patient if source.is_dicom else item.patient or item.key,
            study_id=item.study,
            sex=facts.sex,
            age=facts.age,
            race=None,
            extra={
                "plane": plane,
                "slice": index,
                "num_slices": count,
                "range_shown": list(shown),
                **spacing,
            },
        )
        yield Incomplete(record, noted=facts.noted)


def name_of(item: Item) -> str:
    return item.key


def _read(source: Source, item: Item) -> tuple[Volume, Facts]:
    if source.is_dicom:
        for name in item.files:
            # Again in the worker: a file may have been removed or replaced by a link since.
            file_inside(source.images, name)
        volume, facts = read_series(source.images, item.files, item.cleared)
        return volume, facts._replace(anatomy=source.anatomy or facts.anatomy)
    assert source.modality is not None
    volume = read_nifti(file_inside(source.images, item.files[0]), source.assumed)
    return volume, Facts(source.modality, source.anatomy, None, None)


def _label_slices(source: Source, item: Item, volume: Volume) -> np.ndarray:
    """Labels in display order, int32 [slices, H, W]; empty when the user gave none."""
    if source.masks is None:
        return np.zeros((0, 0, 0), dtype=np.int32)
    if not item.labels:
        raise UnusableItemError("no label volume")
    labels = read_label_volume(file_inside(source.masks, item.labels), volume, source.assumed)
    # All values are judged here, so that no slice is written before the volume is known to be good.
    values = np.unique(labels.voxels).reshape(1, -1)
    if not cut_masks(values, dict(source.labels), source.ignored) and source.skip_empty:
        raise UnusableItemError("no mask has a pixel")
    return oriented(labels.voxels, labels.affine, source.plane)


def _source(args: argparse.Namespace) -> Source:
    """Raises ValueError for options that do not fit together."""
    # Window, flips and the check of sides depend on it: a default would be wrong in silence.
    if args.nifti and not args.modality:
        raise ValueError("--nifti needs --modality: the file does not say")
    # A value without a name cannot be a target, and a name without masks finds none.
    if bool(args.masks) != bool(args.labels):
        raise ValueError("--masks and --labels go together: which value is which target?")
    if args.dicom and args.masks:
        raise ValueError("--masks are NIfTI files and go with --nifti; convert the series first")
    if args.skip_empty and not args.masks:
        raise ValueError("--skip-empty without --masks would leave out everything")
    if args.assume_orientation and not _is_orientation(args.assume_orientation):
        raise ValueError(f"--assume-orientation is like RAS or LPS, got {args.assume_orientation}")
    return Source(
        name=args.name,
        images=args.dicom or args.nifti,
        masks=args.masks,
        is_dicom=bool(args.dicom),
        modality=args.modality,
        anatomy=args.anatomy,
        labels=tuple(parse_labels(args.labels).items()) if args.labels else (),
        ignored=tuple(args.ignore_values),
        plane=args.plane,
        window=_window(args.window),
        assumed=args.assume_orientation,
        skip_empty=args.skip_empty,
    )


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
    parser.add_argument(
        "--image-suffix", default="", help="ending of image names, like _0000; default: none"
    )
    parser.add_argument(
        "--plane", choices=PLANES, default="axial", help="of the slices; default: %(default)s"
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
    add_split_arguments(parser)
    shards.add_arguments(parser, items_per_shard=VOLUMES_PER_SHARD)
    return parser


if __name__ == "__main__":
    run_program(main)

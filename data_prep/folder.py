"""A folder of images and a folder of masks -> record folders.

    python data_prep/folder.py --images img --masks seg --labels '1=liver,2=spleen' \\
        --name my_ct --modality ct --test-share 0.2 --patient-regex '(p[0-9]+)_' --output prepared

Image and mask are paired by their path without suffix: img/p1/a.jpg and seg/p1/a.png; where masks
have an ending of their own, `--mask-suffix _mask` pairs a.jpg with a_mask.png. Masks are either

  label maps: one file per image, whose values `--labels` names (numbers, '#ff0000' colours, or
      'nonzero=lesion'); a value without a name is an error of that image, `--ignore-values` allows
      some;
  one folder per target (without --labels): seg/liver/a.png, seg/spleen/a.png; every pixel that is
      not 0 belongs to the target, targets may overlap, and a file may be missing.

JPEG masks are refused, their values are not exact. Pixels are taken as stored: a photograph whose
EXIF says that it must be turned is refused, because nothing tells which way its mask lies.
"""

from __future__ import annotations

import argparse
import io
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from biascare.records import Record, image_size
from biascare.records.vocabulary import canonical_target
from data_prep.formats.label_maps import read_label_map
from data_prep.formats.orientation import TURNS, turn_image, turn_mask
from data_prep.pipeline import shards
from data_prep.pipeline.options import (
    Splits,
    Value,
    add_source_arguments,
    add_split_arguments,
    cut_masks,
    group_by_split,
    parse_labels,
    releases_of,
)
from data_prep.pipeline.program import run_program
from data_prep.pipeline.release_files import file_inside, files_below, read_image
from data_prep.pipeline.shards import Release, UnusableItemError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
JPEG_SUFFIXES = (".jpg", ".jpeg")
EXIF_ORIENTATION = 0x0112


class Item(NamedTuple):
    """An image with its mask files, relative to their folders."""

    image: str  # empty: there are masks only
    masks: tuple[tuple[str, str], ...]  # target (empty for a label map), file
    stem: str
    patient: str | None


class Source(NamedTuple):
    """What all items share. Picklable."""

    name: str
    images: Path
    masks: Path
    modality: str
    anatomy: str
    labels: tuple[tuple[Value, str], ...]  # empty: one folder per target
    ignored: tuple[int, ...]
    turn: str
    keep_empty: bool


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    source = Source(
        name=args.name,
        images=args.images,
        masks=args.masks,
        modality=args.modality,
        anatomy=args.anatomy,
        labels=tuple(parse_labels(args.labels).items()) if args.labels else (),
        ignored=tuple(args.ignore_values),
        turn=args.turn,
        keep_empty=args.keep_empty,
    )
    splits = Splits.from_arguments(args)
    items = list_items(source, args.mask_suffix, splits)
    shards.run(args, releases(source, items, splits, args.version, args.licence))


def releases(
    source: Source, items: Sequence[Item], splits: Splits, version: str, licence: str
) -> list[Release]:
    """One release per split, in order of name."""
    groups = group_by_split(
        source.name,
        items,
        splits,
        name_of=lambda item: item.stem,
        patient_of=lambda item: item.patient,
        what="images",
    )
    return releases_of(
        groups,
        source=source.name,
        version=version,
        licence=licence,
        convert=partial(convert, source),
        name_of=name_of,
        promises_masks=True,
    )


def list_items(source: Source, mask_suffix: str, splits: Splits) -> list[Item]:
    """Pairs of images and masks, by path. Raises ValueError for folders that hold none, and for two
    images of one name. A JPEG mask is listed where an image has no other one: `convert` says why it
    is refused."""
    images = _by_stem(source.images, IMAGE_SUFFIXES)
    masks: dict[str, list[tuple[str, str]]] = {}
    num_exact = 0
    for target, folder in _mask_folders(source):
        exact = _by_stem(folder, MASK_SUFFIXES, mask_suffix)
        inexact = _by_stem(folder, JPEG_SUFFIXES, mask_suffix)
        num_exact += len(exact)
        # Listed where there is an image, so that the ledger says why its mask was refused.
        refused = {stem: inexact[stem] for stem in inexact if stem in images}
        for stem, file in (refused | exact).items():
            relative = (folder / file).relative_to(source.masks).as_posix()
            masks.setdefault(stem, []).append((target, relative))
    if not num_exact:
        raise ValueError(
            f"{source.masks} holds no mask *{mask_suffix}{{{','.join(MASK_SUFFIXES)}}}; "
            "see --mask-suffix, and --labels for label maps. JPEG masks are refused, their values "
            "are not exact"
        )
    return [
        Item(
            image=images.get(stem, ""),
            masks=tuple(masks.get(stem, ())),
            stem=stem,
            patient=splits.patient_in(images.get(stem, stem)),
        )
        # Of both: a mask without an image is in the ledger too, since a misspelt name makes two of
        # them.
        for stem in sorted(images.keys() | masks.keys())
    ]


def convert(source: Source, split: str, item: Item) -> Record:
    """One image with its masks. Raises UnusableItemError with the reason."""
    if not (item.image and item.masks):
        raise UnusableItemError("no image for this mask" if item.masks else "no mask")
    image = read_image(file_inside(source.images, item.image))
    with Image.open(io.BytesIO(image.data)) as header:
        orientation = header.getexif().get(EXIF_ORIENTATION, 1)
    if orientation not in (0, 1):
        raise UnusableItemError(f"EXIF orientation {orientation}: turn image and mask first")
    size = (image.height, image.width)
    targets: list[tuple[str, np.ndarray]] = []
    for target, file in item.masks:
        values = read_label_map(file_inside(source.masks, file).read_bytes())
        # Never resized to fit: nothing tells how the two lie on each other.
        if values.shape[:2] != size:
            raise UnusableItemError("image and mask differ in size")
        labels: dict[Value, str] = dict(source.labels) if source.labels else {None: target}
        targets += cut_masks(values, labels, source.ignored)
    # Healthy, or annotated by nobody? Only the user knows, and says so by --keep-empty.
    if not (targets or source.keep_empty):
        raise UnusableItemError("no mask has a pixel")
    # By one table for image and masks, after their sizes were compared as stored.
    data = turn_image(image.data, source.turn)
    height, width = image_size(data)
    return Record(
        id=f"{source.name}/{item.stem}",
        image=data,
        height=height,
        width=width,
        targets=[(name, turn_mask(mask, source.turn)) for name, mask in targets],
        task="segmentation",
        modality=source.modality,
        anatomy=source.anatomy,
        source=source.name,
        split=split,
        patient_id=item.patient,
        study_id=None,
        sex=None,
        age=None,
        race=None,
    )


def name_of(item: Item) -> str:
    return item.image or item.masks[0][1]


def _mask_folders(source: Source) -> list[tuple[str, Path]]:
    """(target, folder): one nameless folder of label maps, or one folder per target."""
    if source.labels:
        return [("", source.masks)]
    folders = sorted(path for path in source.masks.glob("*") if path.is_dir())
    if not folders:
        raise ValueError(
            f"{source.masks} has no folder per target; name the values of label maps with "
            "--labels '1=liver,2=spleen', or 'nonzero=lesion' for binary masks"
        )
    # "Liver" and "liver" may both be there on Linux, and would be one target with two masks.
    names = Counter(canonical_target(folder.name) for folder in folders)
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        raise ValueError(f"several folders of {source.masks} mean {repeated}; join them")
    return [(canonical_target(folder.name), folder) for folder in folders]


def _by_stem(folder: Path, suffixes: Sequence[str], ending: str = "") -> dict[str, str]:
    """Path without suffix and ending -> path, both relative, of all files below a folder."""
    found: dict[str, str] = {}
    for path in files_below(folder):
        if path.suffix.lower() not in suffixes or not path.stem.endswith(ending):
            continue
        relative = path.relative_to(folder)
        stem = relative.with_suffix("").as_posix().removesuffix(ending)
        # a.png and a.jpg pair with one mask, and only one of them can be the image it was drawn on.
        if stem in found:
            raise ValueError(f"{folder} holds {found[stem]} and {relative}: which one is meant?")
        found[stem] = relative.as_posix()
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, type=Path, help="folder, searched deeply")
    parser.add_argument("--masks", required=True, type=Path, help="folder of the same structure")
    add_source_arguments(parser)
    parser.add_argument("--labels", help="VALUE=NAME,... ; without it: one folder per target")
    parser.add_argument(
        "--mask-suffix", default="", help="ending of mask names before .png; default: none"
    )
    parser.add_argument(
        "--ignore-values", type=int, nargs="*", default=[], help="for example 255; default: none"
    )
    parser.add_argument(
        "--turn",
        choices=TURNS,
        default="none",
        help="of images and masks alike; default: %(default)s",
    )
    parser.add_argument("--keep-empty", action="store_true", help="also images without a target")
    add_split_arguments(parser)
    shards.add_arguments(parser)
    return parser


if __name__ == "__main__":
    run_program(main)

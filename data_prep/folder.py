"""A folder of images and a folder of masks -> record folders.

    python data_prep/folder.py --images img --masks seg --labels '1=liver,2=spleen' \\
        --name my_ct --modality ct --test-share 0.2 --patient-regex '(p[0-9]+)_' --output prepared

Image and mask are paired by their path without suffix: img/p1/a.jpg and seg/p1/a.png; where masks
have an ending of their own, `--mask-suffix _mask` pairs a.jpg with a_mask.png. Both may lie in one
folder (--images and --masks the same) where endings or `--image-extension jpg --mask-extension png`
tell them apart. Masks are either

  label maps: one file per image, whose values `--labels` names (numbers, '#ff0000' colours, or
      'nonzero=lesion'); a value without a name is an error of that image, `--ignore-values` allows
      some;
  one folder per target (without --labels): seg/liver/a.png, seg/spleen/a.png; every pixel that is
      not 0 belongs to the target, targets may overlap, and a file may be missing.

`--metadata table.csv` is a table with a column image and any of patient_id, study_id, sex, age,
race, anatomy, and question and answer (several rows of an image are several questions) as
data_prep/table.py takes them: masks and questions of an image are one record.

JPEG masks are refused, their values are not exact. Pixels are taken as stored: a photograph whose
EXIF says that it must be turned is refused, because nothing tells which way its mask lies.
"""

from __future__ import annotations

import argparse
import io
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from biascare.records import Record, image_size
from biascare.records.vocabulary import canonical_target
from data_prep.formats.deep_grey import add_window_argument, in_window, window_of
from data_prep.formats.label_maps import read_label_map
from data_prep.formats.orientation import TURNS, turn_image, turn_mask
from data_prep.formats.slices import Range
from data_prep.pipeline import shards
from data_prep.pipeline.attributes import person_of, race_of
from data_prep.pipeline.metadata import Metadata, Told, add_metadata_arguments
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
from data_prep.pipeline.release_files import EncodedImage, file_inside, files_below, read_image
from data_prep.pipeline.shards import Incomplete, Release, UnusableItemError
from data_prep.wording.conversations import turns_of

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif")
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
JPEG_SUFFIXES = (".jpg", ".jpeg")
EXIF_ORIENTATION = 0x0112


class Item(NamedTuple):
    """An image with its mask files, relative to their folders."""

    image: str  # empty: there are masks only
    masks: tuple[tuple[str, str], ...]  # target (empty for a label map), file
    stem: str
    told: Told


class Names(NamedTuple):
    """How the names of images and masks end, as the user says it; empty: anything."""

    image_suffix: str
    image_extension: str
    mask_suffix: str
    mask_extension: str


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
    window: Range | None  # of grey images with more than 8 bits


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
        window=None,
    )
    splits = Splits.from_arguments(args)
    names = Names(args.image_suffix, args.image_extension, args.mask_suffix, args.mask_extension)
    items = list_items(source, names, splits, Metadata.from_arguments(args))
    readers = [partial(_read, source, item) for item in items if item.image]
    source = source._replace(window=window_of(args.window, readers))
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
        patient_of=lambda item: item.told.get("patient_id"),
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


def list_items(source: Source, names: Names, splits: Splits, metadata: Metadata) -> list[Item]:
    """Pairs of images and masks, by path. Raises ValueError for folders that hold none, for two
    images of one name, and where nothing tells an image from a mask. A JPEG mask is listed where an
    image has no other one: `convert` says why it is refused."""
    mask_suffix = names.mask_suffix
    share = source.images.resolve() == source.masks.resolve()
    if share and not any(names):
        raise ValueError(
            f"images and masks share {source.images}, so their names must tell them apart: say how "
            "they end (--mask-suffix _mask, --image-suffix _img) or of which kind they are "
            "(--image-extension jpg, --mask-extension png)"
        )
    # The longer ending says more: a_mask.png ends with "" as well, and is no image.
    no_image = mask_suffix if share and len(mask_suffix) > len(names.image_suffix) else ""
    images = _by_stem(
        source.images, _chosen(IMAGE_SUFFIXES, names.image_extension), names.image_suffix, no_image
    )
    if not images:
        endings = ",".join(_chosen(IMAGE_SUFFIXES, names.image_extension))
        raise ValueError(f"{source.images} holds no image *{names.image_suffix}{{{endings}}}")
    taken = set(images.values()) if share else set()
    mask_suffixes = _chosen(MASK_SUFFIXES, names.mask_extension)
    masks: dict[str, list[tuple[str, str]]] = {}
    num_exact = 0
    for target, folder in _mask_folders(source):
        exact = _by_stem(folder, mask_suffixes, mask_suffix, taken=taken)
        inexact = _by_stem(folder, JPEG_SUFFIXES, mask_suffix, taken=taken)
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
    # A mask without an image is an item too, and is no image without a row.
    told = {stem: Told() for stem in masks} | metadata.of_images(images, splits)
    return [
        Item(
            image=images.get(stem, ""),
            masks=tuple(masks.get(stem, ())),
            stem=stem,
            told=told[stem],
        )
        # Of both: a mask without an image is in the ledger too, since a misspelt name makes two of
        # them.
        for stem in sorted(images.keys() | masks.keys())
    ]


def convert(source: Source, split: str, item: Item) -> Incomplete:
    """One image with its masks and questions. Raises UnusableItemError with the reason."""
    told = item.told
    if not item.image or not (item.masks or told.questions):
        raise UnusableItemError("no mask" if item.image else "no image for this mask")
    image = _read(source, item)
    with Image.open(io.BytesIO(image.data)) as header:
        orientation = header.getexif().get(EXIF_ORIENTATION, 1)
    if orientation not in (0, 1):
        raise UnusableItemError(f"EXIF orientation {orientation}: turn image and mask first")
    image = in_window(image, source.window)
    targets: list[tuple[str, np.ndarray]] = []
    lost = ""
    try:
        targets = _targets(source, item, (image.height, image.width))
    except UnusableItemError as error:
        # Its questions are sound without the mask.
        if not told.questions:
            raise
        lost = str(error)
    # By one table for image and masks, after their sizes were compared as stored.
    data = turn_image(image.data, source.turn)
    height, width = image_size(data)
    person = person_of(told.get("sex") or "", told.get("age") or "")
    record = Record(
        id=f"{source.name}/{item.stem}",
        image=data,
        height=height,
        width=width,
        targets=[(name, turn_mask(mask, source.turn)) for name, mask in targets],
        conversations=turns_of(told.questions, told.facts),
        task="vqa" if told.questions else "segmentation",
        modality=source.modality,
        anatomy=told.get("anatomy") or source.anatomy,
        source=source.name,
        split=split,
        patient_id=told.get("patient_id"),
        study_id=told.get("study_id"),
        sex=person.sex,
        age=person.age,
        race=race_of(told.get("race") or ""),
        extra=told.extra,
    )
    return Incomplete(record, lost, (*told.noted, *person.noted))


def _targets(source: Source, item: Item, size: tuple[int, int]) -> list[tuple[str, np.ndarray]]:
    """The masks of an image of this (height, width), as stored."""
    if not item.masks:
        raise UnusableItemError("no mask")
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
    return targets


def _read(source: Source, item: Item) -> EncodedImage:
    return read_image(file_inside(source.images, item.image))


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


def _chosen(suffixes: Sequence[str], extension: str) -> Sequence[str]:
    """The suffixes that are looked for, or the one the user names."""
    suffix = f".{extension.lower().lstrip('.')}"
    if extension and suffix not in suffixes:
        raise ValueError(f"extension {extension!r} is none of {', '.join(suffixes)}")
    return (suffix,) if extension else suffixes


def _by_stem(
    folder: Path,
    suffixes: Sequence[str],
    ending: str = "",
    not_ending: str = "",
    taken: Collection[str] = (),
) -> dict[str, str]:
    """Path without suffix and ending -> path, both relative, of all files below a folder. Left out
    are files with `not_ending`, and those that are `taken` for something else."""
    found: dict[str, str] = {}
    for path in files_below(folder):
        relative = path.relative_to(folder)
        if path.suffix.lower() not in suffixes or not path.stem.endswith(ending):
            continue
        if (not_ending and path.stem.endswith(not_ending)) or relative.as_posix() in taken:
            continue
        stem = relative.with_suffix("").as_posix().removesuffix(ending)
        # a.png and a.jpg pair with one mask, and only one of them can be the image it was drawn on.
        if stem in found:
            raise ValueError(
                f"{folder} holds {found[stem]} and {relative}: which one is meant? "
                "--image-extension and --mask-extension say it"
            )
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
    for kind, suffix, extension in (("image", "_img", "jpg"), ("mask", "_mask", "png")):
        parser.add_argument(
            f"--{kind}-suffix",
            default="",
            help=f"ending of {kind} names before the extension, like {suffix}; default: none",
        )
        parser.add_argument(
            f"--{kind}-extension",
            default="",
            help=f"of the files that are {kind}s, like {extension}; default: any",
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
    add_window_argument(parser)
    parser.add_argument("--keep-empty", action="store_true", help="also images without a target")
    add_metadata_arguments(parser, "who is in them, and questions")
    add_split_arguments(parser)
    shards.add_arguments(parser)
    return parser


if __name__ == "__main__":
    run_program(main)

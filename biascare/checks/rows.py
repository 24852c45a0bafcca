"""Checks of prepared folders, row by row: every image and mask is decoded, every text is read.

    scans = scan_folders([Records("prepared/btcv/train")], settings, advance=progress)
    scans[0].issues["mask-empty"]      # (3, ["btcv/17: liver", ...]): count, examples

What is kept of an image are its hashes, 400 bytes, so that millions of rows fit; `lint.py` looks
at columns and across folders. A finding has a code of `CODES`, and the level belongs to the code.
"""

from __future__ import annotations

import io
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from biascare.checks.duplicates import NUM_HASHES, fingerprint
from biascare.checks.findings import Issues, LintSettings
from biascare.data.transforms import Geometry, apply_mask, decode_image
from biascare.records import (
    KINDS,
    MAX_AGE,
    ROLES,
    SEXES,
    Records,
    Turn,
    check_row,
    decode_mask,
    question_problems,
)

RADIOLOGICAL = ("ct", "mri", "mr", "pet", "xray", "x-ray")
MAX_LABEL_GREY = 32
"""An image without any brighter grey is hardly one: 8-bit images use their range."""

MIN_JUDGED_PIXELS = 1024
"""Smaller images, of tests most of all, may be constant wherever a mask is."""

MIN_CONSTANT_AREA = 16  # pixels; smaller masks may well lie on equal pixels
_CHUNK = 32  # rows of one task
_MARGIN = 2  # pixels around a mask


class FolderScan(NamedTuple):
    """What reading all rows of a folder gave."""

    issues: dict[str, tuple[int, list[str]]]  # code -> count, examples
    exact: NDArray[np.uint64]  # [n, 2]; zeros where undecodable
    perceptual: NDArray[np.uint64]  # [n, NUM_HASHES, 4]
    comparable: NDArray[np.bool_]  # [n] decoded and not blank
    native_areas: Counter[int]  # area histogram: pixels rounded down to a power of two -> masks
    training_areas: Counter[int]  # the same at the training size
    num_thin: int  # masks that nearest-neighbour resizing would have erased
    sides: Counter[bool]  # right structure at image left?


class _Chunk(NamedTuple):
    """A scan of some rows, as it comes back from a worker."""

    folder: int
    start: int
    issues: dict[str, tuple[int, list[str]]]
    exact: NDArray[np.uint64]
    perceptual: NDArray[np.uint64]
    comparable: NDArray[np.bool_]
    native_areas: Counter[int]
    training_areas: Counter[int]
    num_thin: int
    sides: Counter[bool]


def name_of(records: Records) -> str:
    """source/split of a folder."""
    return _place(records.manifest)


def names_of(records: Sequence[Records]) -> list[str]:
    """source/split of each folder; where two roots hold the same one, with what tells their paths
    apart."""
    names = [name_of(r) for r in records]
    folders: dict[str, list[Path]] = {}
    for r, name in zip(records, names, strict=True):
        folders.setdefault(name, []).append(r.folder)
    roots = {name: os.path.commonpath(twins) for name, twins in folders.items() if len(twins) > 1}
    return [
        f"{name} ({r.folder.relative_to(roots[name])})" if name in roots else name
        for r, name in zip(records, names, strict=True)
    ]


def _place(stated: dict[str, Any]) -> str:
    """source/split as a manifest or a row states it."""
    return f"{stated['source']}/{stated['split']}"


# ---------------------------------------------------------------- one row


_NOTHING = np.zeros(2, np.uint64), np.zeros((NUM_HASHES, 4), np.uint64), False


class RowScan:
    """Collects what the rows of a chunk show."""

    def __init__(self, manifest: dict[str, Any], settings: LintSettings) -> None:
        self.manifest, self.settings = manifest, settings
        self.issues = Issues(settings.num_examples)
        self.native_areas: Counter[int] = Counter()
        self.training_areas: Counter[int] = Counter()
        self.num_thin = 0
        self.sides: Counter[bool] = Counter()

    def row_at(
        self, records: Records, index: int
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint64], bool]:
        """Check one row; its exact and perceptual hash, and whether they can be compared."""
        try:
            # Not `records[index]`, which refuses a damaged row: here its other faults are told too.
            row = records.unchecked(index)
        except ValueError as error:
            self.issues.add("row-unreadable", str(error))
            return _NOTHING
        for code, detail in (*attribute_issues(row, self.manifest), *text_issues(row)):
            self.issues.add(code, f"{row['id']}: {detail}")
        try:
            check_row(row, _place(self.manifest))
        except ValueError as error:
            self.issues.add("checksum", str(error))
        image = self._image(row)
        # Also without an image: whether codes are whole does not depend on it.
        self._masks(row, image)
        if image is None:
            return _NOTHING
        found = fingerprint(image)
        if min(image.shape[:2]) == 1:
            self.issues.add("image-line", f"{row['id']}: {image.shape[0]} x {image.shape[1]}")
        # Darker than any image, but not empty.
        if image.min() < image.max() < MAX_LABEL_GREY and _is_grey(image):
            self.issues.add("image-like-labels", f"{row['id']}: 0 to {image.max()}")
        if found.is_blank:
            self.issues.add("image-blank", row["id"])
        return found.exact, found.perceptual, not found.is_blank

    def _image(self, row: dict[str, Any]) -> NDArray[np.uint8] | None:
        try:
            image = decode_image(row["image"])
        except ValueError as error:
            self.issues.add("image-undecodable", f"{row['id']}: {error}")
            return None
        if image.shape[:2] != (row["height"], row["width"]):
            # The masks have the stated size, so that comparing them with this image would mean
            # nothing.
            stated = f"{row['height']} x {row['width']}"
            got = f"{image.shape[0]} x {image.shape[1]}"
            self.issues.add("image-size", f"{row['id']}: stated {stated}, decoded {got}")
            return None
        with Image.open(io.BytesIO(row["image"])) as header:
            # Pixels are taken as stored; who drew masks in a viewer that obeys the tag drew them
            # turned.
            if header.getexif().get(_EXIF_ORIENTATION, 1) != 1:
                self.issues.add("image-rotated-by-tag", row["id"])
        return image

    def _masks(self, row: dict[str, Any], image: NDArray[np.uint8] | None) -> None:
        names = [target["name"] for target in row["targets"]]
        # Readers that make a dict of the targets would lose all but the last.
        for name, number in Counter(names).items():
            if number > 1:
                self.issues.add("target-twice", f"{row['id']}: {name}")
        masks = []
        for target in row["targets"]:
            about = f"{row['id']}: {target['name']}"
            try:
                mask = decode_mask(target["rle"], row["height"], row["width"])
            except ValueError as error:
                self.issues.add("mask-code", f"{about}: {error}")
                continue
            self._mask(mask, image, about)
            if mask.any():
                masks.append((target["name"], mask.astype(bool)))
        if image is not None and masks and _is_label_map(image, [mask for _, mask in masks]):
            self.issues.add("image-is-mask", row["id"])
        # Elsewhere "right" is no side of the image: a right eye fills it whole.
        if row["modality"].lower() in RADIOLOGICAL:
            self.sides.update(self.settings.vocabulary.sides_agree(masks))

    def _mask(self, mask: NDArray[np.uint8], image: NDArray[np.uint8] | None, about: str) -> None:
        area = int(mask.sum())
        self.native_areas[_power(area)] += 1
        if not area:
            self.issues.add("mask-empty", about)
            return
        size = self.settings.image_size
        scaled = training_area(mask, area, size)
        self.training_areas[_power(scaled)] += 1
        # One-pixel lesions are trained on but no shape can be learned of them; none at all is an
        # error.
        if scaled <= 1:
            self.issues.add("mask-one-pixel" if scaled else "mask-vanishes", about)
        # What nearest-neighbour resizing, which many pipelines use, would have lost.
        rows, columns = (
            np.minimum(((np.arange(size) + 0.5) * n / size).astype(int), n - 1) for n in mask.shape
        )
        self.num_thin += not mask[np.ix_(rows, columns)].any()
        if image is not None and area >= MIN_CONSTANT_AREA and _lies_on_nothing(mask, image):
            self.issues.add("mask-on-constant", about)


def _lies_on_nothing(mask: NDArray[np.uint8], image: NDArray[np.uint8]) -> bool:
    """Whether the image is constant in a non-empty mask and all around it."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    # A margin around the mask: a saturated stone is constant inside, and its surroundings are not.
    near = image[
        max(rows[0] - _MARGIN, 0) : rows[-1] + _MARGIN + 1,
        max(columns[0] - _MARGIN, 0) : columns[-1] + _MARGIN + 1,
    ]
    return bool((near == near[0, 0]).all())


def _is_grey(image: NDArray[np.uint8]) -> bool:
    return bool((image == image[..., :1]).all())


def _is_label_map(image: NDArray[np.uint8], masks: Sequence[NDArray[np.bool_]]) -> bool:
    """Whether an image that is not constant is constant in each of its masks, and outside them."""
    if image.size < 3 * MIN_JUDGED_PIXELS:
        return False
    values: set[tuple[int, ...]] = set()
    # One after another: the first mask decides about nearly every image.
    for mask in (*masks, None):
        pixels = image[~np.any(masks, axis=0) if mask is None else mask]
        if len(pixels) and (pixels != pixels[0]).any():
            return False
        values.update(tuple(pixel) for pixel in pixels[:1].tolist())
    return len(values) > 1


def training_area(mask: NDArray[np.uint8], area: int, size: int) -> int:
    """Pixels of a non-empty mask [H, W] at the training size."""
    # Resized for real only where it could be a single pixel or none: `apply_mask` gives each
    # component its own area, at least 1, so a total of 1.5 or more has at least two pixels.
    scaled = area * size * size / mask.size
    if scaled >= 1.5:
        return max(2, round(scaled))
    height, width = mask.shape
    return int(apply_mask(mask, Geometry.full(height, width, size)).sum())


def attribute_issues(row: dict[str, Any], manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(code, detail) of the fields that are not image, mask or text."""
    if _place(row) != _place(manifest):
        yield "row-of-another-folder", _place(row)
    age = row["age"]
    if age is not None and not (math.isfinite(age) and 0 <= age <= MAX_AGE):
        yield "age-impossible", f"{age:g}"
    if row["sex"] is not None and row["sex"] not in SEXES:
        yield "sex-unknown-code", repr(row["sex"])


def text_issues(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(code, detail) of the conversations of a row."""
    turns = row["conversations"]
    for i, turn in enumerate(turns):
        text = turn["text"] or ""
        if turn["role"] != ROLES[i % 2] or turn["kind"] not in KINDS or len(turns) % 2:
            yield "turns", f"turn {i} of {len(turns)} is {turn['role']}, {turn['kind']}"
        if not text.strip():
            yield "empty-text", f"turn {i}"
        elif text != text.strip():
            yield "text-edges", f"turn {i}: {text[:40]!r}"
        if turn["kind"] == "closed" and turn["role"] == "assistant" and text not in ("yes", "no"):
            plain = "".join(c for c in text.lower() if c.isalnum() or c == " ").split()
            # "Yes, in the left lung" means yes but would never match a prediction word for word.
            means = plain[:1] == ["yes"] or plain[:1] == ["no"]
            yield f"closed-answer-{'spelling' if means else 'other'}", repr(text[:40])
    for problem in question_problems([Turn(**turn) for turn in turns]):
        yield "options-facts", problem


def _power(area: int) -> int:
    """The largest power of two that is not above; 0 stays 0."""
    return 1 << (area.bit_length() - 1) if area else 0


_EXIF_ORIENTATION = 0x0112


# ---------------------------------------------------------------- all rows


@lru_cache(maxsize=4)
def _opened(folder: str, content_hash: str) -> Records:
    """`content_hash` tells a folder from what was prepared again under its name."""
    return Records(folder)


def _scan_chunk(
    source: tuple[str, str], number: int, start: int, stop: int, settings: LintSettings
) -> _Chunk:
    """`source`: folder and content hash of the manifest."""
    # Folders are opened once per process: a chunk is only _CHUNK rows.
    records = _opened(*source)
    scan = RowScan(records.manifest, settings)
    hashes = [scan.row_at(records, index) for index in range(start, stop)]
    return _Chunk(
        folder=number,
        start=start,
        issues=scan.issues.found,
        exact=np.stack([h[0] for h in hashes]),
        perceptual=np.stack([h[1] for h in hashes]),
        comparable=np.array([h[2] for h in hashes]),
        native_areas=scan.native_areas,
        training_areas=scan.training_areas,
        num_thin=scan.num_thin,
        sides=scan.sides,
    )


def _verify(folder: str) -> str:
    """Empty when the content hash is right, else what is wrong."""
    try:
        Records(folder).verify()
    except ValueError as error:
        return str(error)
    return ""


def scan_folders(
    folders: Sequence[Records], settings: LintSettings, advance: Callable[[int], None]
) -> list[FolderScan]:
    """Read every row of every folder; `advance` hears of rows done."""
    scans = [
        FolderScan(
            issues={},
            exact=np.zeros((len(records), 2), np.uint64),
            perceptual=np.zeros((len(records), NUM_HASHES, 4), np.uint64),
            comparable=np.zeros(len(records), np.bool_),
            native_areas=Counter(),
            training_areas=Counter(),
            num_thin=0,
            sides=Counter(),
        )
        for records in folders
    ]
    issues = [Issues(settings.num_examples) for _ in folders]
    jobs: Iterable[tuple[Any, ...]] = (
        # Small chunks in the order of the rows: their examples are then those of a single process.
        (_scan_chunk, source, number, start, min(start + _CHUNK, len(records)))
        for number, records in enumerate(folders)
        for source in [(str(records.folder), records.manifest["content_hash"])]
        for start in range(0, len(records), _CHUNK)
    )
    chunks: Iterable[_Chunk] = _run(((*job, settings) for job in jobs), settings.num_workers)
    for chunk in chunks:
        scan, rows = scans[chunk.folder], slice(chunk.start, chunk.start + len(chunk.exact))
        scan.exact[rows], scan.perceptual[rows] = chunk.exact, chunk.perceptual
        scan.comparable[rows] = chunk.comparable
        scan.native_areas.update(chunk.native_areas)
        scan.training_areas.update(chunk.training_areas)
        scan.sides.update(chunk.sides)
        scans[chunk.folder] = scan._replace(num_thin=scan.num_thin + chunk.num_thin)
        issues[chunk.folder].merge(chunk.issues)
        advance(len(chunk.exact))
    # A second reading, because a sum over all rows cannot be cut into chunks.
    hashes = _run(((_verify, str(records.folder)) for records in folders), settings.num_workers)
    for number, wrong in enumerate(hashes):
        if wrong:
            issues[number].add("content-hash", wrong)
    return [scan._replace(issues=i.found) for scan, i in zip(scans, issues, strict=True)]


def _run(jobs: Iterable[tuple[Any, ...]], num_workers: int) -> Iterator[Any]:
    """Results of (function, *arguments) in order; at most a few per worker are under way."""
    if num_workers == 0:
        yield from (function(*arguments) for function, *arguments in jobs)
        return
    # Forking this process, whose Arrow has threads, can deadlock; spawning imports all for each.
    context = get_context("forkserver")
    context.set_forkserver_preload(["biascare.checks.rows"])
    jobs = iter(jobs)
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        # A few ahead and no more: results of millions of rows must not wait in memory.
        waiting: list[Future[Any]] = [pool.submit(*job) for job in islice(jobs, 4 * num_workers)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(*job) for job in islice(jobs, 1)]

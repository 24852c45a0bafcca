"""PubMedVision (alignment part) -> record folders of figures with their conversations.

    python data_prep/pubmedvision.py --source PubMedVision --output prepared --num-workers 8

Layout of --source:

    PubMedVision_Alignment_VQA.json   [{id, image: [paths], conversations: [{from, value}, ..],
                                        modality, body_part}, ..]
    images_0.zip .. images_19.zip     left as they are, or extracted to the folder images

There is no official split. A record goes to test when the hash of its image's name falls below
--test-share: the choice depends on nothing else, so a part of the release keeps every image on its
side. Records tied together by common images share the side. At the default share about 1,617
records of the whole release are test records; the exact number is that of the hash.

A conversation about several images speaks of all of them ("the left panel", "both images"), while a
record has one image. The images are therefore put side by side on one canvas at native size, black
between them (--several-images montage). Taking the first would teach answers about images that
are not shown; --several-images skip leaves such records out instead. Licence: Apache-2.0; the
figures come from PubMed Central's open-access subset, as do those of PMC-VQA.
"""

from __future__ import annotations

import argparse
import codecs
import hashlib
import io
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from biascare.records import MAX_IMAGE_PIXELS, Record, Turn
from biascare.records.vocabulary import UNSPECIFIED_MODALITY, canonical_modality
from data_prep.formats.zip_images import ImageFinder, Place, read_place
from data_prep.pipeline import shards
from data_prep.pipeline.options import add_share_arguments, note_shares
from data_prep.pipeline.program import run_program
from data_prep.pipeline.release_files import (
    EncodedImage,
    find_file,
    note,
    note_count,
    png_bytes,
    read_image,
)
from data_prep.pipeline.shards import Release, UnusableItemError
from data_prep.wording.conversations import (
    Question,
    drawn_split,
    facts_of,
    one_line,
    turns_of,
)

JSON_NAME = "PubMedVision_Alignment_VQA.json"
NUM_RECORDS = 647_031
TEST_SHARE = 0.0025
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
LICENCE = "PubMedVision: Apache-2.0; figures under the licences of their articles"

MODALITIES = {
    "digital photography": "photography",
    "infrared reflectance imaging": "infrared",
    "microscopy images": "microscopy",
    "others": UNSPECIFIED_MODALITY,
    "other": UNSPECIFIED_MODALITY,
}
"""Words of this release that are not in the records' vocabulary."""

CHUNK = 2**24
"""Bytes of the JSON file that are in memory while it is indexed."""

LONGEST_ENTRY = 2**24
"""Characters; a longer entry is broken, and the rest of the file is not searched for its end."""

GAP = 8
"""Black pixels between the panels of a montage."""


class Entry(NamedTuple):
    """One object of the JSON list: where it stands and what decides about it."""

    offset: int  # bytes
    length: int
    images: tuple[str, ...]


class Item(NamedTuple):
    """One image, or one set of images, with all conversations about it."""

    name: str
    places: tuple[Place | None, ...]
    entries: tuple[tuple[int, int], ...]  # offset, length in bytes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, type=Path, help="the downloaded dataset")
    add_share_arguments(parser, test=TEST_SHARE, of="records")
    parser.add_argument(
        "--several-images",
        choices=("montage", "skip"),
        default="montage",
        help="what becomes of a conversation about several images; default: %(default)s",
    )
    shards.add_arguments(parser)
    args = parser.parse_args(arguments)
    shards.run(args, plan(args.source, args.test_share, args.several_images))


def plan(source: Path, test_share: float, several_images: str) -> list[Release]:
    """Train and test. Reads the JSON file once; items hold positions in it, not texts."""
    path = find_file(source, JSON_NAME)
    entries = list(index_entries(path))
    note_count("PubMedVision alignment records", len(entries), NUM_RECORDS)
    if several_images == "skip":
        single = [entry for entry in entries if len(entry.images) <= 1]
        note(f"{len(entries) - len(single):,} records of several images left out")
        entries = single
    # After the choice: records that are left out tie no images together.
    tied = tie([entry.images for entry in entries])
    finder = ImageFinder(source, ("images", ""), "images_*.zip")
    splits: dict[str, list[Item]] = {"train": [], "test": []}
    # Entries about the same images make one record; one without any is a group of its own, so that
    # the ledger names it.
    groups: dict[tuple[str, ...] | int, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.images or entry.offset, []).append(entry)
    for group in groups.values():
        images = group[0].images
        places = tuple(finder.place(image) for image in images)
        spans = tuple((entry.offset, entry.length) for entry in group)
        # By what ties the images: drawn one by one, a panel could stand on both sides of the split.
        side = drawn_split(tied[images[0]], {"test": test_share}) if images else "train"
        name = Path(images[0]).stem if images else f"{JSON_NAME}: entry at byte {group[0].offset}"
        if len(images) > 1:
            # The first image may also have a record alone, and ids must be unique.
            name += f"+{hashlib.sha256(chr(0).join(images).encode()).hexdigest()[:8]}"
        splits[side].append(Item(name, places, spans))
    counts = {split: len(items) for split, items in splits.items()}
    note_shares("pubmedvision", {"test": test_share}, counts, "records")
    for items in splits.values():  # neighbours read the same archive
        items.sort(key=lambda item: (item.places[:1] == (None,), item.places[:1], item.name))
    return [
        Release(
            source="pubmedvision",
            split=split,
            version="PubMedVision alignment VQA",
            licence=LICENCE,
            items=items,
            convert=partial(convert, source, split),
            name_of=attrgetter("name"),
        )
        for split, items in splits.items()
        if items
    ]


def index_entries(path: Path) -> Iterator[Entry]:
    """Objects of a JSON list of any size: one pass, a few megabytes of memory.

    Raises ValueError, with the position in bytes, for what is not a JSON list of objects.
    """
    reader = json.JSONDecoder()
    text, at, offset, end_of_file = "", 0, 0, False
    decode = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        while True:
            start = at  # of the next object: what stands between two of a list is passed over
            while start < len(text) and text[start] in "[], \n\r\t\ufeff":
                start += 1
            # In bytes, because `convert` seeks to it; text and file differ at every umlaut.
            offset, at = offset + len(text[at:start].encode("utf-8")), start
            try:
                value, end = reader.raw_decode(text, at)
            except ValueError as error:
                if end_of_file and at == len(text):
                    return
                # The decoder cannot tell a broken object from one that goes on in the next chunk.
                if end_of_file or len(text) - at > LONGEST_ENTRY:
                    raise ValueError(f"{path}: no JSON object at byte {offset}: {error}") from error
                data = file.read(CHUNK)
                text, at, end_of_file = text[at:] + decode.decode(data, not data), 0, not data
                continue
            if not isinstance(value, dict):
                raise ValueError(f"{path}: expected a list of objects, byte {offset} starts none")
            length = len(text[at:end].encode("utf-8"))
            images = value.get("image") or []
            images = [images] if isinstance(images, str) else images
            yield Entry(offset, length, tuple(str(image) for image in images))
            offset, at = offset + length, end


def tie(image_sets: Sequence[tuple[str, ...]]) -> dict[str, str]:
    """Image -> the name that stands for all images tied to it by common sets, the smallest."""
    parent: dict[str, str] = {}

    def root(image: str) -> str:
        while (above := parent.setdefault(image, image)) != image:
            # Paths are halved on the way, or a long chain of shared figures would be walked again
            # and again.
            parent[image] = image = parent[above]
        return image

    for images in image_sets:
        for image in images:
            # The smallest name stands for all, so that the order of the file does not decide the
            # split.
            one, other = sorted((root(images[0]), root(image)))
            parent[other] = one
    return {image: root(image) for image in list(parent)}


def convert(source: Path, split: str, item: Item) -> Record:
    """One image, or a montage, with its conversations. Raises UnusableItemError."""
    if not item.places:
        raise UnusableItemError("entry without an image")
    entries: list[dict[str, Any]] = []
    with (source / JSON_NAME).open("rb") as file:
        for offset, length in item.entries:
            file.seek(offset)
            entries.append(json.loads(file.read(length)))
    conversations: list[Turn] = []
    for entry in entries:
        turns = turns_of_entry(entry)
        # By their texts: the facts of two entries differ in their ids at least.
        texts = [turn.text for turn in conversations]
        begins = [turn.text for turn in turns[:2]]
        if begins not in [texts[i : i + 2] for i in range(0, len(texts), 2)]:
            conversations += turns
    panels = [read_image(read_place(source, place)) for place in item.places]
    image = panels[0] if len(panels) == 1 else montage(panels)
    stated = str(entries[0].get("modality") or "")
    modality = modality_of(stated)
    body_part = one_line(str(entries[0].get("body_part") or "")).lower()
    return Record(
        id=f"pubmedvision/{item.name}",
        image=image.data,
        height=image.height,
        width=image.width,
        conversations=conversations,
        task="vqa",
        modality=modality,
        anatomy="" if body_part in ("other", "others") else body_part,
        source="pubmedvision",
        split=split,
        patient_id=None,
        study_id=None,
        sex=None,
        age=None,
        race=None,
        extra={
            "num_panels": len(panels),
            "stated_modality": stated,
            "ids": [str(entry["id"]) for entry in entries if entry.get("id") is not None],
        },
    )


def turns_of_entry(entry: dict[str, Any]) -> list[Turn]:
    """The conversation of one entry. Raises UnusableItemError when it is not question and answer
    in turn, or a text is empty."""
    said = entry.get("conversations") or []
    roles = [ROLES.get(str(part.get("from")).lower()) for part in said]
    texts = [one_line(str(part.get("value") or "")) for part in said]
    # Mended by a guess, an answer would belong to another question.
    if not said or roles != ["user", "assistant"] * (len(said) // 2):
        raise UnusableItemError("conversation is not question and answer in turn")
    if not all(texts):
        raise UnusableItemError("question or answer is empty")
    pairs = zip(texts[::2], texts[1::2], strict=True)
    questions = [Question(question, answer, "open") for question, answer in pairs]
    stated = {"modality": entry.get("modality"), "location": entry.get("body_part")}
    return turns_of(questions, [facts_of(qid=entry.get("id"), **stated)] * len(questions))


def modality_of(stated: str) -> str:
    """Modality of records; what the vocabulary does not know is unspecified (the stated word is in
    the record's extra)."""
    plain = one_line(stated).lower()
    if plain in MODALITIES:
        return MODALITIES[plain]
    try:
        return canonical_modality(plain)
    except ValueError:
        return UNSPECIFIED_MODALITY


def montage(panels: Sequence[EncodedImage]) -> EncodedImage:
    """Panels on one black canvas in reading order, near square, each at native size."""
    columns = math.ceil(math.sqrt(len(panels)))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    width = max(sum(panel.width for panel in row) + GAP * (len(row) - 1) for row in rows)
    height = sum(max(panel.height for panel in row) for row in rows) + GAP * (len(rows) - 1)
    # Before the canvas is made: its pixels are in memory, those of the panels are still packed.
    if width * height > MAX_IMAGE_PIXELS:
        raise UnusableItemError("montage has too many pixels")
    canvas = Image.new("RGB", (width, height))
    y = 0
    for row in rows:
        x = 0
        for panel in row:
            with Image.open(io.BytesIO(panel.data), formats=("PNG", "JPEG")) as image:
                # At native size: scaling panels to one height would blur what is asked for.
                canvas.paste(image.convert("RGB"), (x, y))
            x += panel.width + GAP
        y += max(panel.height for panel in row) + GAP
    return EncodedImage(png_bytes(canvas), height, width)


if __name__ == "__main__":
    run_program(main)

"""Held-out records to batches: every image once with all its targets, every question once.

    images = HeldOutImages(records, chat, groups, image_size=256)
    for held in heldout_loader(images, range(len(images)), batch_size=8, rank=0, world_size=2):
        held.batch, held.items

No augmentation, no drawing: the canonical instruction, the deterministic first click. All ranks get
the same number of batches (ZeRO-3 needs the same calls everywhere); the items that are repeated for
that are marked.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from biascare.data.chat import ChatBuilder, label_question, segmentation_instruction
from biascare.data.labels import LabelSpace, presence
from biascare.data.loader import READ_TIMEOUT, collate, facts_of, first, mask_facts
from biascare.data.prompts import box_from_mask, first_point
from biascare.data.transforms import Geometry, apply_mask, apply_points, read_image
from biascare.data.variants import MAX_BLIND, MAX_COUNTERFACTUAL, variants_of
from biascare.interfaces import (
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    POINT_POSITIVE,
    Batch,
    Facts,
    Sample,
)
from biascare.records import Records, Turn, decode_mask

ANSWERED_KINDS = ("closed", "choice", "open")
"""Questions scored by whether their answer is right."""

SCORED_KINDS = (*ANSWERED_KINDS, "report")
"""All that is scored; reports by their words and findings."""


def check_held_out(training: Sequence[Records], held_out: Sequence[Records]) -> None:
    """Raises ValueError when records to evaluate on are trained on, as equal content.

    Single images or patients on both sides are what the linter finds.
    """
    refuse_trained({s.manifest["content_hash"]: str(s.folder) for s in training}, held_out)


def refuse_trained(trained: dict[str, str], held_out: Sequence[Records]) -> None:
    """`trained`: content hash -> what a person calls these training records."""
    # By content, not by name: a copy of a folder under another path is still trained on.
    for source in held_out:
        twin = trained.get(source.manifest["content_hash"])
        if twin is not None:
            raise ValueError(
                f"{source.folder} is held out, but is trained on too (as {twin}); evaluate on "
                "other records, or its numbers would say what the model remembers"
            )


class MaskItem(NamedTuple):
    """A target to find, in native pixels."""

    id: str  # record and target
    facts: Facts
    height: int
    width: int
    truth: bytes  # COCO run-length code
    instruction: str | None  # None where nothing reads text
    points: list[tuple[float, float, int]]  # x, y, label
    box: tuple[float, float, float, float] | None  # XYXY
    extra: dict[str, Any]  # of the record


class QuestionItem(NamedTuple):
    """A question to answer."""

    id: str  # record and number of the turn
    facts: Facts
    question: Turn
    answer: Turn
    labels: list[str]  # findings of the record
    otherwise: dict[str, Turn]  # the same asked otherwise, by name; a row each, after its own


class HeldOutBatch(NamedTuple):
    """A batch with what its rows are about."""

    batch: Batch
    items: list[Any]  # MaskItem or QuestionItem, one per row
    repeated: list[bool]  # here for the sake of other ranks only


class HeldOut(Dataset, ABC):
    """Items of several record folders, in order; a limit takes evenly spaced ones."""

    becomes: str  # what a person calls the cases
    padding_side = "right"
    rows_per_unit = 1

    def __init__(
        self,
        records: Sequence[Records],
        chat: ChatBuilder | None,
        groups: dict[str, str],
        *,
        image_size: int,
        limit: int = 0,
    ):
        self.records = list(records)
        self.chat = chat
        self.groups = groups
        self.image_size = image_size
        units = [(r, unit) for r, source in enumerate(self.records) for unit in self._units(source)]
        if limit and limit < len(units):
            # Evenly spaced: the first ones are often of one patient or one sub-dataset.
            units = [units[i] for i in np.linspace(0, len(units) - 1, limit).astype(int)]
        self.units = units

    @abstractmethod
    def _units(self, source: Records) -> Sequence[Any]:
        """Units of one folder, in order."""

    @abstractmethod
    def case_keys(self) -> list[list[str]]:
        """For every unit, the `case_key` of the cases it becomes; no image is read."""

    @abstractmethod
    def _sample(self, source: Records, unit: Any) -> tuple[Sample, list[Any]]:
        """The sample of one unit and its items."""

    def apart(self) -> list[tuple[list[int], int]]:
        """Numbers of the units, in order, by what may share a batch; with the prompts that each
        becomes at most."""
        return [(list(range(len(self.units))), self.rows_per_unit)]

    def __len__(self) -> int:
        return len(self.units)

    def __getitems__(self, indices: list[int]) -> list[HeldOutBatch]:
        """One batch; an index of -1 - i is a repeat of unit i."""
        samples, items, repeated = [], [], []
        for index in indices:
            number, unit = self.units[index if index >= 0 else -1 - index]
            source = self.records[number]
            try:
                sample, mine = self._sample(source, unit)
            except (ValueError, OSError) as error:
                if str(source.folder) in str(error):
                    raise
                row = unit[0] if isinstance(unit, tuple) else unit
                # Never replaced, as in training: the score would be of other records than it says.
                raise ValueError(
                    f"{source.folder}, record {source.id_of(row)!r} cannot be evaluated ({error})"
                ) from error
            samples.append(sample)
            items += mine
            repeated += [index < 0] * len(mine)
        # Through the collator of training, so that evaluation sees what training saw.
        pad = self.chat.tokenizer.pad_token_id if self.chat else 0
        batch = collate(samples, seed=0, pad_token_id=pad, padding_side=self.padding_side)
        return [HeldOutBatch(batch=batch, items=items, repeated=repeated)]

    def _image(self, row: dict[str, Any]) -> tuple[np.ndarray, Geometry]:
        geometry = Geometry.full(row["height"], row["width"], self.image_size)
        return read_image(row["image"], geometry), geometry

    def _key_starts(self) -> list[list[str]]:
        """Per folder, the key of every record."""
        return [
            [
                case_key(source.manifest["source"], source.manifest["split"], name)
                for name in source.ids()
            ]
            for source in self.records
        ]


class HeldOutImages(HeldOut):
    """Images with all their targets, prompted by the first click, or by the tight box of the true
    mask, as benchmarks of promptable models have it."""

    becomes = "masks"

    def __init__(self, *arguments: Any, prompt: str = "point", **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.prompt = prompt

    def _units(self, source: Records) -> Sequence[int]:
        return [int(row) for row in source.segmentation_units]

    def case_keys(self) -> list[list[str]]:
        ids = self._key_starts()
        return [
            [f"{ids[r][row]}/{name}" for name in self.records[r].target_names(row)]
            for r, row in self.units
        ]

    def _sample(self, source: Records, unit: int) -> tuple[Sample, list[MaskItem]]:
        row = source[unit]
        height, width = row["height"], row["width"]
        image, geometry = self._image(row)
        native = [decode_mask(t["rle"], height, width) for t in row["targets"]]
        instructions = [
            segmentation_instruction(t["name"], row["modality"]) for t in row["targets"]
        ]
        sequences = []
        if self.chat is not None:
            pixels = self.chat.image_inputs(image)
            for text in instructions:
                turn = Turn("user", text, "segmentation")
                sequences.append(self.chat.sequence([turn]) | {"image": pixels})
        # Prompts are placed on the native mask: at the model's size a thin target may have moved.
        by_box = self.prompt == "box"
        boxes = [box_from_mask(mask).tolist() if by_box else None for mask in native]
        clicks = [[] if by_box else [first_point(mask)] for mask in native]
        items = [
            MaskItem(
                id=f"{row['id']}/{target['name']}",
                facts=mask_facts(row, target["name"], self.groups),
                height=height,
                width=width,
                truth=target["rle"],
                instruction=text if self.chat else None,
                points=[(float(x), float(y), POINT_POSITIVE) for x, y in points],
                box=None if box is None else (box[0], box[1], box[2], box[3]),
                extra=row["extra"],
            )
            for target, box, points, text in zip(
                row["targets"], boxes, clicks, instructions, strict=True
            )
        ]
        # Geometry moves points, and a box is two of them, as SAM's prompt encoder has it.
        if by_box:
            corners = np.array([item.box for item in items], np.float32).reshape(-1, 2, 2)
            labels = torch.tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]).expand(len(items), -1).clone()
        else:
            corners = np.array([[point[:2] for point in item.points] for item in items], np.float32)
            labels = torch.full((len(items), 1), POINT_POSITIVE)
        sample = Sample(
            sequences=sequences,
            image=torch.from_numpy(image).permute(2, 0, 1),
            masks=torch.from_numpy(np.stack([apply_mask(mask, geometry) for mask in native])),
            point_coords=torch.from_numpy(apply_points(corners, geometry).astype(np.float32)),
            point_labels=labels,
            facts=[item.facts for item in items],
        )
        return sample, items


class LabelItem(NamedTuple):
    """An image whose labels are to be found."""

    id: str  # record
    facts: Facts
    present: list[bool | None]  # of the labels that are asked for; None: not judged


class HeldOutLabels(HeldOut):
    """Images with their labels: shown to a label head, or asked for label by label."""

    becomes = "labels"
    padding_side = "left"

    def __init__(self, *arguments: Any, space: LabelSpace, asked: bool, **keywords: Any):
        """`space`: the labels; `asked`: one yes-or-no question for each, about the same image."""
        self.space, self.asked = space, asked
        self.rows_per_unit = len(space.names) if asked else 1
        super().__init__(*arguments, **keywords)

    def _units(self, source: Records) -> Sequence[int]:
        return [int(row) for row in source.labelled_units]

    def case_keys(self) -> list[list[str]]:
        ids = self._key_starts()
        return [[f"{ids[r][row]}/labels"] for r, row in self.units]

    def _sample(self, source: Records, unit: int) -> tuple[Sample, list[LabelItem]]:
        row = source[unit]
        image, _ = self._image(row)
        facts = facts_of(row, task="labels", kind="labels")
        sequences = []
        if self.asked:
            assert self.chat is not None, "questions need an MLLM"
            # One object for all questions: the collator knows by it that the image is the same.
            pixels = self.chat.image_inputs(image)
            for name in self.space.names:
                turn = Turn("user", label_question(name), "closed")
                sequences.append(self.chat.sequence([turn]) | {"image": pixels})
        sample = Sample(
            sequences=sequences,
            image=None if self.asked else torch.from_numpy(image).permute(2, 0, 1),
            masks=None,
            point_coords=None,
            point_labels=None,
            facts=[facts],
        )
        return sample, [LabelItem(f"{row['id']}/labels", facts, presence(row, self.space))]


class HeldOutQuestions(HeldOut):
    """Questions without their answers, padded for generation."""

    becomes = "answers"
    # Generation goes on at the end of every row, so padding cannot stand there.
    padding_side = "left"

    def __init__(
        self,
        *arguments: Any,
        kinds: Sequence[str] = ANSWERED_KINDS,
        blind: bool = False,
        counterfactual: bool = False,
        **keywords: Any,
    ):
        """`blind`, `counterfactual`: which `variants_of` each question to ask too."""
        self.kinds = kinds
        self.blind, self.counterfactual = blind, counterfactual
        self.rows_per_unit = 1 + MAX_BLIND * blind + MAX_COUNTERFACTUAL * counterfactual
        self._rings: dict[Path, tuple[list[int], dict[int, int]]] = {}
        self._patients: dict[Path, list[str | None]] = {}
        self._shown: tuple[str, int, dict[str, Any]] | None = None  # of the last image
        super().__init__(*arguments, **keywords)

    def _units(self, source: Records) -> Sequence[tuple[int, int]]:
        kinds = source.question_kinds()
        return [
            (int(row), int(turn))
            for (row, turn), kind in zip(source.language_units, kinds, strict=True)
            if kind in self.kinds
        ]

    def case_keys(self) -> list[list[str]]:
        ids = self._key_starts()
        return [[f"{ids[r][row]}/{turn}"] for r, (row, turn) in self.units]

    def apart(self) -> list[tuple[list[int], int]]:
        if "report" not in self.kinds:
            return super().apart()
        # A batch is generated until its longest answer ends: questions would wait for reports.
        answers: list[int] = []
        reports: list[int] = []
        kinds = [
            dict(zip(map(tuple, s.language_units.tolist()), s.question_kinds(), strict=True))
            for s in self.records
        ]
        for number, (r, unit) in enumerate(self.units):
            (reports if kinds[r][unit] == "report" else answers).append(number)
        parts = ((answers, self.rows_per_unit), (reports, 1))
        return [part for part in parts if part[0]]

    def _sample(self, source: Records, unit: tuple[int, int]) -> tuple[Sample, list[QuestionItem]]:
        assert self.chat is not None, "questions need an MLLM"
        number, place = unit
        row = source[number]
        # Questions of an image stand one after another. One object for all of them: the collator
        # knows by it that the image is the same, and the tower encodes it once.
        if self._shown is None or self._shown[:2] != (str(source.folder), number):
            self._shown = (str(source.folder), number, self._pixels(source, number, row))
        pixels = self._shown[2]
        question, answer = (Turn(**t) for t in row["conversations"][place : place + 2])
        # The question alone: the answer is what the model is asked for.
        asked = variants_of(question, blind=self.blind, counterfactual=self.counterfactual)
        # A folder of one image has no other to show.
        asked = {n: way for n, way in asked.items() if way.image in ("none", *pixels)}
        sequences: list[dict[str, Any]] = []
        for turn, image in [(question, "own"), *asked.values()]:
            shows_image = image != "none"
            sequence = self.chat.sequence([turn], shows_image=shows_image)
            sequences.append(sequence | ({"image": pixels[image]} if shows_image else {}))
        item = QuestionItem(
            id=f"{row['id']}/{place}",
            facts=facts_of(row, task="language", kind=question.kind),
            question=question,
            answer=answer,
            labels=row["labels"],
            otherwise={name: way.turn for name, way in asked.items()},
        )
        sample = Sample(
            sequences=sequences,
            image=None,  # a question costs the segmentation pathway nothing
            masks=None,
            point_coords=None,
            point_labels=None,
            facts=[item.facts],
        )
        return sample, [item]

    def _pixels(
        self, source: Records, number: int, row: dict[str, Any]
    ) -> dict[str, dict[str, torch.Tensor]]:
        """What questions about a record show: the keys of `Asked.image`, without "none"."""
        assert self.chat is not None
        images = {"own": self._image(row)[0]}
        if self.blind:
            images["black"] = np.zeros_like(images["own"])
            another = self._another_image(source, number)
            if another is not None:
                images["another"] = self._image(source[another])[0]
        return {name: self.chat.image_inputs(image) for name, image in images.items()}

    def _another_image(self, source: Records, number: int) -> int | None:
        """A row of the folder with another image, of another patient where there is one; always
        the same for the same record. None where all images are one."""
        ring, place = self._ring(source)
        start, mine = place[number], source[number]
        fallback = None
        for step in range(1, len(ring)):
            candidate = ring[(start + step) % len(ring)]
            patient = self._patients[source.folder][candidate]
            same = patient is not None and patient == mine["patient_id"]
            if (same and fallback is not None) or source[candidate]["image"] == mine["image"]:
                continue
            if not same:
                return candidate
            fallback = candidate
        return fallback

    def _ring(self, source: Records) -> tuple[list[int], dict[int, int]]:
        """Rows with questions in the order of a hash of their ids, and the place of each there."""
        if source.folder not in self._rings:
            rows = sorted(
                {int(row) for row, _ in source.language_units},
                key=lambda row: hashlib.sha256(source.id_of(row).encode()).digest(),
            )
            self._rings[source.folder] = rows, {row: place for place, row in enumerate(rows)}
            self._patients[source.folder] = source.table["patient_id"].to_pylist()
        return self._rings[source.folder]


def case_key(source: str, split: str, case_id: str) -> str:
    """A case among all: record ids are unique in their folder only."""
    return f"{source}/{split}: {case_id}"


def heldout_loader(
    items: HeldOut,
    indices: Sequence[int],
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> DataLoader:
    """Batches of this rank's share of the chosen units; the same number on every rank."""
    shares = []
    for start in range(0, len(indices), batch_size * world_size):
        begin = start + rank * batch_size
        # Without a share of its own a rank repeats what another computes: under ZeRO-3 a rank that
        # makes fewer calls leaves the others waiting.
        shares.append(list(indices[begin : begin + batch_size]) or [-1 - indices[start]])
    return DataLoader(
        items,
        batch_sampler=shares,
        collate_fn=first,
        num_workers=num_workers,
        timeout=READ_TIMEOUT if num_workers else 0,
    )

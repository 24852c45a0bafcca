"""Held-out records to batches: every image once with all its targets, every question once.

    images = HeldOutImages(records, chat, groups, image_size=256)
    for batch in heldout_loader(images, batch_size=8, rank=0, world_size=2): ...

No augmentation, no drawing: the canonical instruction, the deterministic first click. All ranks get
the same number of batches (ZeRO-3 needs the same calls everywhere); the few items repeated for that
are marked and dropped by `is_repeat`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from biascare.data.chat import ChatBuilder, segmentation_instruction
from biascare.data.loader import collate, first, row_meta
from biascare.data.prompts import first_point
from biascare.data.transforms import Geometry, apply_mask, apply_points, read_image
from biascare.interfaces import POINT_POSITIVE, Batch, Sample
from biascare.records import Records, Turn, decode_mask

ANSWERED_KINDS = ("closed", "choice", "open")
"""Questions scored by their answer; reports are scored by text metrics elsewhere."""


def check_held_out(training: Sequence[Records], held_out: Sequence[Records]) -> None:
    """Raises ValueError when records to evaluate on are trained on, as equal content.

    Single images or patients on both sides are what the linter finds.
    """
    trained = {source.manifest["content_hash"]: source.folder for source in training}
    for source in held_out:
        twin = trained.get(source.manifest["content_hash"])
        if twin is not None:
            raise ValueError(
                f"{source.folder} is held out, but is trained on too (as {twin}); evaluate on "
                "other records, or its numbers would say what the model remembers"
            )


class HeldOut(Dataset, ABC):
    """Items of several record folders, in order; a limit takes evenly spaced ones."""

    padding_side = "right"

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
        items = [(r, unit) for r, source in enumerate(self.records) for unit in self._units(source)]
        if limit and limit < len(items):
            items = [items[i] for i in np.linspace(0, len(items) - 1, limit).astype(int)]
        self.items = items

    @abstractmethod
    def _units(self, source: Records) -> Sequence[Any]:
        """Units of one folder, in order."""

    @abstractmethod
    def _sample(self, source: Records, unit: Any) -> Sample:
        """The sample of one unit."""

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        """One batch; an index of -1 - i is a repeat of item i."""
        samples = []
        for index in indices:
            source, unit = self.items[index if index >= 0 else -1 - index]
            sample = self._sample(self.records[source], unit)
            for meta in sample.meta:
                meta["is_repeat"] = index < 0
                meta["split"] = self.records[source].manifest["split"]
            samples.append(sample)
        return [self._collate(samples)]

    def _collate(self, samples: list[Sample]) -> Batch:
        pad = self.chat.tokenizer.pad_token_id if self.chat else 0
        return collate(samples, seed=0, pad_token_id=pad, padding_side=self.padding_side)

    def _image(self, row: dict[str, Any]) -> tuple[np.ndarray, Geometry]:
        geometry = Geometry.full(row["height"], row["width"], self.image_size)
        return read_image(row["image"], geometry), geometry


class HeldOutImages(HeldOut):
    """Images with all their targets, prompted by the first click."""

    def _units(self, source: Records) -> Sequence[int]:
        return [int(row) for row in source.segmentation_units]

    def image_id(self, index: int) -> str:
        """The id of item `index`."""
        source, row = self.items[index]
        return self.records[source][row]["id"]

    def one_target(self, index: int, target: str) -> Batch:
        """Item `index` with the mask of one target alone: nothing else is computed for it."""
        source, row = self.items[index]
        return self._collate([self._sample(self.records[source], row, only=target)])

    def _sample(self, source: Records, unit: int, only: str | None = None) -> Sample:
        row = source[unit]
        targets = [t for t in row["targets"] if only in (None, t["name"])]
        image, geometry = self._image(row)
        native = [decode_mask(t["rle"], row["height"], row["width"]) for t in targets]
        points = np.array([[first_point(mask)] for mask in native], np.float32)
        coords = apply_points(points, geometry).astype(np.float32)
        sequences = []
        if self.chat is not None:
            pixels = self.chat.image_inputs(image)
            for target in targets:
                text = segmentation_instruction(target["name"], row["modality"])
                turns = [Turn("user", text, "segmentation")]
                sequences.append(self.chat.sequence(turns) | {"image": pixels})
        size = {"height": row["height"], "width": row["width"]}
        return Sample(
            sequences=sequences,
            image=torch.from_numpy(image).permute(2, 0, 1),
            masks=torch.from_numpy(np.stack([apply_mask(mask, geometry) for mask in native])),
            point_coords=torch.from_numpy(coords),
            point_labels=torch.full((len(native), 1), POINT_POSITIVE),
            meta=[
                row_meta(row, "segmentation", target["name"], self.groups)
                | {"rle": target["rle"], "point": point[0].tolist()}
                | size
                for target, point in zip(targets, points, strict=True)
            ],
        )


class HeldOutQuestions(HeldOut):
    """Questions without their answers, padded for generation."""

    padding_side = "left"

    def _units(self, source: Records) -> Sequence[tuple[int, int]]:
        kinds = source.question_kinds()
        return [
            (int(row), int(turn))
            for (row, turn), kind in zip(source.language_units, kinds, strict=True)
            if kind in ANSWERED_KINDS
        ]

    def _sample(self, source: Records, unit: tuple[int, int]) -> Sample:
        assert self.chat is not None, "questions need an MLLM"
        number, turn = unit
        row = source[number]
        image, _ = self._image(row)
        question, answer = (Turn(**t) for t in row["conversations"][turn : turn + 2])
        sequence = self.chat.sequence([question]) | {"image": self.chat.image_inputs(image)}
        meta = row_meta(row, "language", question.kind, self.groups)
        return Sample(
            sequences=[sequence],
            image=None,
            masks=None,
            point_coords=None,
            point_labels=None,
            meta=[meta | {"question": question.text, "reference": answer.text, "turn": turn}],
        )


def heldout_loader(
    items: HeldOut, batch_size: int, *, rank: int = 0, world_size: int = 1, num_workers: int = 0
) -> DataLoader:
    """Batches of this rank's share; the same number on every rank."""
    num_batches = -(-len(items) // (batch_size * world_size))
    batches = []
    for b in range(num_batches):
        start = (b * world_size + rank) * batch_size
        indices = list(range(start, min(start + batch_size, len(items))))
        batches.append(indices or [-1 - (start % len(items))])
    return DataLoader(
        items,
        batch_sampler=batches,
        collate_fn=first,
        num_workers=num_workers,
    )

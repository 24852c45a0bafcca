"""Records to Samples to Batches.

    stream = TrainingStream(sources, mixture, chat, settings)
    loader = DataLoader(stream, batch_sampler=GlobalBatchSampler(...), collate_fn=first)

A micro-batch is built whole inside one worker, from its stream positions alone: the same positions
give the same tensors in any process. A sample that cannot be read is replaced by the next unit of
its own source, and the batch says so: the trainer keeps a ledger and stops when there are too many.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset

from biascare.data.chat import ChatBuilder, segmentation_instruction, written
from biascare.data.labels import LabelSpace, presence
from biascare.data.mixture import GlobalBatchSampler, Mixture, StreamItem, sample_key
from biascare.data.prevalence import total_counts
from biascare.data.prompts import draw_prompts
from biascare.data.transforms import Geometry, apply_mask, draw_geometry, may_mirror, read_image
from biascare.interfaces import IGNORE_INDEX, Batch, Facts, Prompts, Sample
from biascare.records import Records, Turn, decode_mask

MAX_REPLACEMENTS = 16
"""Unreadable units in a row of one source before the run stops."""

READ_TIMEOUT = 600
"""Seconds without a batch after which a reading process is not waited for any longer."""

T = TypeVar("T")

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""Of an object inside an error message: it would differ between processes."""


class StreamSettings(NamedTuple):
    """How a training sample is made from its record."""

    image_size: int  # pixels
    targets_per_image: int
    target_sampling_power: float
    prompt_mix: dict[str, float]  # point, box, point_and_box, text
    augment: bool
    flip: str  # see `may_mirror`
    seed: int


class TrainingStream(Dataset):
    """Stream positions -> one `Batch` per list of positions."""

    def __init__(
        self,
        segmentation: Sequence[Records],
        language: Sequence[Records],
        mixture: Mixture,
        chat: ChatBuilder | None,
        groups: dict[str, str],
        settings: StreamSettings,
        labels: LabelSpace | None = None,
    ):
        """`chat` is None without a language model; `groups`: target -> head, medium or tail.
        With `labels`, the images of `segmentation` show what they are told to, not masks."""
        self.sources = {"segmentation": list(segmentation), "language": list(language)}
        self.labels = labels
        self.mixture = mixture
        self.chat = chat
        self.groups = groups
        self.settings = settings
        self.counts = total_counts(source.target_counts for source in segmentation)

    def __getitem__(self, position: int) -> Sample:
        """The sample at one stream position, or its replacement."""
        item = self.mixture.locate(position)
        source = self.sources[item.task][item.source]
        reasons: list[str] = []
        for attempt in range(MAX_REPLACEMENTS):
            number, turn = self._unit(source, item, attempt)
            try:
                row = source[number]
                if item.task == "segmentation" and self.labels is not None:
                    sample = self._labelled_sample(row, self.labels, item.key)
                elif item.task == "segmentation":
                    sample = self._segmentation_sample(row, item.key)
                else:
                    sample = self._language_sample(row, turn, item.key)
            except (ValueError, OSError) as error:
                # One bad sample must neither end weeks of training nor pass unseen: the next unit
                # takes its place in any process alike, and the reason goes to the ledger.
                reasons.append(f"{source.id_of(number)}: {_ADDRESS.sub('', str(error))}")
                continue
            return sample._replace(position=position, replaced=tuple(reasons))
        raise ValueError(
            f"{MAX_REPLACEMENTS} samples in a row of {source.folder} cannot be used; the last: "
            f"{reasons[-1]}. Check the folder, then prepare it again"
        )

    def __getitems__(self, positions: list[int]) -> list[Batch]:
        """One micro-batch; torch's fetcher calls this with a list from the batch sampler."""
        samples = [self[position] for position in positions]
        pad_token_id = self.chat.tokenizer.pad_token_id if self.chat else 0
        # From the stream and not from the rank: what a step draws is the same in any world.
        seed = sample_key(self.settings.seed, "step", positions[0])
        return [collate(samples, seed, pad_token_id)]

    def _unit(self, source: Records, item: StreamItem, attempt: int) -> tuple[int, int]:
        """Row number of an item, or of the unit `attempt` places after it, and its user turn."""
        if item.task == "segmentation":
            rows = source.segmentation_units if self.labels is None else source.labelled_units
            return int(rows[(item.unit + attempt) % len(rows)]), 0
        units = source.language_units
        number, turn = units[(item.unit + attempt) % len(units)]
        return int(number), int(turn)

    def _draw_targets(self, names: list[str], key: int) -> list[int]:
        """K targets of an image, rare ones favoured; an image with fewer repeats its own."""
        wanted = self.settings.targets_per_image
        if len(names) == 1:
            return [0] * wanted
        # Counts of the whole training data: within the image every target occurs once.
        rng = np.random.default_rng(sample_key(key, "targets"))
        counts = np.array([max(self.counts.get(name, 1), 1) for name in names], float)
        weight = counts**-self.settings.target_sampling_power
        order = rng.choice(
            len(names), min(len(names), wanted), replace=False, p=weight / weight.sum()
        )
        # Always K rows, so that every rank's micro-batch has the same shape under ZeRO-3.
        return [int(order[i % len(order)]) for i in range(wanted)]

    def _segmentation_sample(self, row: dict[str, Any], key: int) -> Sample:
        settings = self.settings
        chosen = self._draw_targets([t["name"] for t in row["targets"]], key)
        targets = [row["targets"][i] for i in chosen]
        size = row["height"], row["width"]
        # Each mask once, however often it is drawn; by columns, as its code runs: only the crop is
        # ever read by rows.
        native = {
            i: decode_mask(row["targets"][i]["rle"], *size, by_rows=False).view(np.bool_)
            for i in set(chosen)
        }
        geometry = draw_geometry(
            *size,
            list(native.values()),
            settings.image_size,
            sample_key(key, "geometry"),
            augment=settings.augment,
            allow_flip=self._may_mirror(row, [t["name"] for t in targets]),
        )
        image = self._image(row, geometry, key)
        resized = {i: apply_mask(mask, geometry) for i, mask in native.items()}
        masks = np.stack([resized[i] for i in chosen])
        # After resizing: a click is given on what the model sees, and may not miss a thin target.
        coords, labels = draw_prompts(masks, sample_key(key, "prompts"), settings.prompt_mix)
        return Sample(
            sequences=self._instructions(row, targets, image, key),
            image=torch.from_numpy(image).permute(2, 0, 1),
            masks=torch.from_numpy(masks),
            point_coords=torch.as_tensor(coords),
            point_labels=torch.as_tensor(labels),
            facts=[mask_facts(row, t["name"], self.groups) for t in targets],
        )

    def _instructions(
        self, row: dict[str, Any], targets: list[dict[str, Any]], image: np.ndarray, key: int
    ) -> list[dict[str, Any]]:
        if self.chat is None:
            return []
        # One object for all K instructions: the collator knows by it that the image is the same.
        pixels = self.chat.image_inputs(image)
        return [
            self.chat.sequence([Turn("user", text, "segmentation")]) | {"image": pixels}
            for k, target in enumerate(targets)
            for text in [
                segmentation_instruction(
                    target["name"], row["modality"], sample_key(key, "phrasing", k)
                )
            ]
        ]

    def _labelled_sample(self, row: dict[str, Any], labels: LabelSpace, key: int) -> Sample:
        present = [float("nan") if p is None else float(p) for p in presence(row, labels)]
        image = self._whole_image(row, row["labels"], key)
        return Sample(
            sequences=[],
            image=torch.from_numpy(image).permute(2, 0, 1),
            masks=None,
            point_coords=None,
            point_labels=None,
            facts=[facts_of(row, task="labels", kind="labels")],
            labels=torch.tensor(present),
        )

    def _whole_image(self, row: dict[str, Any], texts: Iterable[str], key: int) -> np.ndarray:
        # Never cropped: what the answer is about might be outside.
        flip = self.settings.augment and self._may_mirror(row, texts)
        geometry = Geometry.full(
            row["height"],
            row["width"],
            self.settings.image_size,
            flip=flip and sample_key(key, "flip") % 2 == 1,
        )
        return self._image(row, geometry, key)

    def _language_sample(self, row: dict[str, Any], turn: int, key: int) -> Sample:
        assert self.chat is not None, "a language sample needs an MLLM"
        pair = [Turn(**t) for t in row["conversations"][turn : turn + 2]]
        image = self._whole_image(row, written(pair), key)
        return Sample(
            sequences=[self.chat.sequence(pair) | {"image": self.chat.image_inputs(image)}],
            image=None,
            masks=None,
            point_coords=None,
            point_labels=None,
            facts=[facts_of(row, task="language", kind=pair[0].kind)],
        )

    def _may_mirror(self, row: dict[str, Any], texts: Iterable[str]) -> bool:
        return may_mirror(self.settings.flip, row["modality"], row["anatomy"], texts)

    def _image(self, row: dict[str, Any], geometry: Geometry, key: int) -> np.ndarray:
        intensity = sample_key(key, "intensity") if self.settings.augment else None
        return read_image(row["image"], geometry, intensity_key=intensity)


def facts_of(
    row: dict[str, Any],
    *,
    task: str,
    kind: str,
    target: str | None = None,
    prevalence: str | None = None,
) -> Facts:
    """What a stored row says about one of its sequences."""
    same = ("source", "split", "modality", "anatomy", "patient_id", "sex", "age", "race")
    return Facts(
        image_id=row["id"],
        task=task,
        kind=kind,
        target=target,
        prevalence=prevalence,
        **{name: row[name] for name in same},
    )


def mask_facts(row: dict[str, Any], target: str, groups: dict[str, str]) -> Facts:
    """Facts of a target; one that has no training mask is "unseen"."""
    prevalence = groups.get(target, "unseen")
    return facts_of(
        row, task="segmentation", kind="segmentation", target=target, prevalence=prevalence
    )


def collate(
    samples: list[Sample], seed: int, pad_token_id: int, *, padding_side: str = "right"
) -> Batch:
    """One micro-batch: segmentation rows first, then language rows."""
    shown = [s for s in samples if s.image is not None]
    # Masks first: then row r is sequence r, and the language rows need no index.
    ordered = shown + [s for s in samples if s.image is None]
    sequences = [sequence for sample in ordered for sequence in sample.sequences]
    rows = [len(s.point_coords) for s in shown if s.point_coords is not None]
    tokens = _collate_tokens(sequences, pad_token_id, padding_side) if sequences else {}
    masks = [s.masks for s in shown if s.masks is not None]  # none where a person asks
    labels = [s.labels for s in shown if s.labels is not None]
    # By name: two images of one structure are no negatives of each other in the alignment term.
    names = [f.target for s in shown for f in s.facts]
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return Batch(
        images=torch.stack([s.image for s in shown if s.image is not None]) if shown else None,
        row_image=torch.repeat_interleave(torch.tensor(rows)) if rows else None,
        row_sequence=torch.arange(sum(rows)) if rows and sequences else None,
        row_target=torch.tensor([numbers[name] for name in names]) if names else None,
        masks=torch.cat(masks) if masks else None,
        prompts=Prompts(
            point_coords=torch.cat([s.point_coords for s in shown if s.point_coords is not None]),
            point_labels=torch.cat([s.point_labels for s in shown if s.point_labels is not None]),
        )
        if rows
        else None,
        mllm_inputs=tokens.get("inputs", {}),
        image_slots=tokens.get("image_slots", []),
        prompt_mask=tokens.get("prompt_mask"),
        answer_positions=tokens.get("answer_positions"),
        answer_tokens=tokens.get("answer_tokens"),
        seed=seed,
        facts=[facts for sample in ordered for facts in sample.facts],
        replaced={s.position: s.replaced for s in samples if s.position is not None and s.replaced},
        num_samples=len(samples),
        labels=torch.stack(labels) if labels else None,
    )


def _pad(tensors: list[Tensor], value: int | bool, side: str) -> Tensor:
    """[L_i] each -> [B, L]."""
    length = max(len(t) for t in tensors)
    left = side == "left"
    return torch.stack(
        [
            pad(t, (length - len(t), 0) if left else (0, length - len(t)), value=value)
            for t in tensors
        ]
    )


def _collate_tokens(
    sequences: list[dict[str, Any]], pad_token_id: int, side: str
) -> dict[str, Any]:
    """Padded tokens, distinct images once, and where the answers are."""
    extra = [k for k in sequences[0] if k not in ("input_ids", "labels", "prompt_mask", "image")]
    inputs = {name: _pad([s[name] for s in sequences], 0, side) for name in extra}
    inputs["input_ids"] = _pad([s["input_ids"] for s in sequences], pad_token_id, side)
    inputs["attention_mask"] = _pad(
        [torch.ones(len(s["input_ids"]), dtype=torch.int64) for s in sequences], 0, side
    )
    distinct: dict[int, int] = {}
    images: list[dict[str, Tensor]] = []
    slots: list[int] = []
    for sequence in sequences:
        if "image" not in sequence:  # a question without its image
            continue
        # By identity, not by content: comparing pixels would cost more than encoding them once
        # more.
        identity = id(sequence["image"])
        if identity not in distinct:
            distinct[identity] = len(images)
            images.append(sequence["image"])
        slots.append(distinct[identity])
    for name in images[0] if images else ():
        inputs[name] = torch.cat([image[name] for image in images])
    labels = _pad([s["labels"] for s in sequences], IGNORE_INDEX, side)
    # Positions instead of a mask: the language head then runs on answer tokens alone.
    answers = (labels != IGNORE_INDEX).flatten().nonzero()[:, 0]
    return {
        "inputs": inputs,
        "image_slots": slots,
        "prompt_mask": _pad([s["prompt_mask"] for s in sequences], False, side),
        "answer_positions": answers - 1,  # the token before predicts
        "answer_tokens": labels.flatten()[answers],
    }


def first(batches: list[T]) -> T:
    """The loader's collate function: the stream has built the batch already."""
    return batches[0]


def training_loader(
    stream: TrainingStream, sampler: GlobalBatchSampler, num_workers: int
) -> DataLoader:
    """The DataLoader of one rank."""
    return DataLoader(
        stream,
        batch_sampler=sampler,
        collate_fn=first,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
        prefetch_factor=4 if num_workers else None,
        timeout=READ_TIMEOUT if num_workers else 0,
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the batch's tensors, however nested."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, Prompts):
            return Prompts(*map(move, value))
        if isinstance(value, dict):
            return {k: move(v) for k, v in value.items()}
        return value

    return Batch(*map(move, batch))

"""Small models, records and batches for all tests, made the way the real ones are.

    folder = tiny_mllm_folder(tmp_path, "llava")
    chat = tiny_chat(folder)
    batch = collate([segmentation_sample(chat), language_sample(chat)], 0, pad_token_id(chat))

Nothing here is a stand-in: the language model opens through `Auto*`, the records through `Records`.
Only the sizes are small.
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from biascare.data.chat import SEGMENTATION_INSTRUCTIONS, ChatBuilder, written
from biascare.data.loader import StreamSettings, TrainingStream
from biascare.data.mixture import Mixture
from biascare.interfaces import POINT_POSITIVE, Batch, Facts, Sample
from biascare.models.export_folder import build_network
from biascare.models.language.pathway import LoraSettings, load_processor
from biascare.models.language.tiny import build_tiny_mllm
from biascare.models.network import DualPathNetwork
from biascare.records import Record, Records, RecordWriter, Turn
from biascare.settings.keys import HITLConfig, ModelConfig, ObjectiveConfig
from biascare.training.terms import HITLSettings, ObjectiveSettings

FAMILIES = ("qwen2_5_vl", "llava")
IMAGE_SIZE = 64
"""Pixels of the model input."""

HEIGHT, WIDTH = 48, 72
"""Native pixels of a record: not square, and no multiple of the input."""

TARGETS = ("liver", "spleen", "left kidney", "lesion")


def asked(kind: str, question: str, answer: str, *options: str) -> list[Turn]:
    """A question and its answer."""
    return [Turn("user", question, kind, options), Turn("assistant", answer, kind)]


QUESTIONS = (
    asked("closed", "Is the liver visible?", "yes"),
    asked("closed", "Is there a lesion on the left side?", "no"),
    asked("choice", "Which modality is this?", "CT", "CT", "MR"),
    asked("open", "Which organ is bright?", "the liver"),
    asked("report", "Describe the image.", "The liver is bright. No effusion."),
)
SETTINGS = StreamSettings(
    image_size=IMAGE_SIZE,
    targets_per_image=1,
    target_sampling_power=0.5,
    prompt_mix={"point": 0.4, "box": 0.2, "point_and_box": 0.2, "text": 0.2},
    augment=True,
    flip="names",
    seed=0,
)
OBJECTIVE = ObjectiveSettings(**vars(ObjectiveConfig()))
HITL = HITLSettings(**vars(HITLConfig()))
"""As a run has them that says nothing of them."""

PAPER_OBJECTIVE = OBJECTIVE._replace(alignment="none", alignment_weight=0.0, quality_weight=0.0)
"""Without the terms that are not in the paper."""

LORA = LoraSettings(*(getattr(ModelConfig(), f"lora_{name}") for name in LoraSettings._fields))


def corpus() -> list[str]:
    """Texts to train the tokenizer on."""
    texts = [text for pair in QUESTIONS for text in written(pair)]
    for target in TARGETS:
        texts += [s.format(target=target, modality="CT") for s in SEGMENTATION_INSTRUCTIONS]
    return texts


def tiny_mllm_folder(folder: Path, family: str = "qwen2_5_vl") -> Path:
    """A checkpoint folder of a family, about 0.2 M parameters."""
    build_tiny_mllm(
        folder,
        corpus(),
        family=family,
        hidden_size=64,
        num_layers=2,
        vision_size=32,
        image_size=IMAGE_SIZE,
        vocab_size=400,
    )
    return folder


@cache
def tiny_chat(folder: Path, max_tokens: int = 256) -> ChatBuilder:
    return ChatBuilder(load_processor(str(folder)), image_size=IMAGE_SIZE, max_tokens=max_tokens)


def pad_token_id(chat: ChatBuilder) -> int:
    return int(chat.tokenizer.pad_token_id)


BORN_SILENT = ("lora_B", "rel_pos", "pos_embed", "mask_downscaling.6.weight")
"""Parameters that start at zero: what they do would stay unseen in a test."""


def wake(module: torch.nn.Module) -> None:
    """Give small random values to `BORN_SILENT`."""
    for name, parameter in module.named_parameters():
        if any(part in name for part in BORN_SILENT):
            torch.nn.init.normal_(parameter, std=0.05)


def tiny_model(folder: Path | None, seed: int = 0, **keywords: Any) -> DualPathNetwork:
    """A woken model around the checkpoint in `folder`, or the vision pathway alone; eval mode."""
    torch.manual_seed(seed)
    model = build_network(
        vision="tiny",
        image_size=IMAGE_SIZE,
        mllm=None if folder is None else str(folder),
        lora=LoraSettings(rank=2, alpha=4, dropout=0.01),
        **keywords,
    )
    wake(model)
    return model.eval()


def answers(model: DualPathNetwork, batch: Batch, **keywords: Any) -> torch.Tensor:
    """Token ids [B, T] that a model generates to a batch of questions."""
    assert model.mllm is not None
    stated = {"max_new_tokens": 12} | keywords
    return model.mllm.generate(batch.mllm_inputs, batch.image_slots, **stated).tokens


# ---------------------------------------------------------------- samples without records


def random_image(seed: int) -> np.ndarray:
    """[S, S, 3] uint8: soft noise, different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    resized = Image.fromarray(coarse).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    return np.array(resized)


def tiny_facts(image_id: str, **known: Any) -> Facts:
    """Facts of which a test states what matters to it."""
    unknown: dict[str, Any] = dict.fromkeys(Facts._fields)
    stated = {"task": "segmentation", "kind": "segmentation", "modality": "CT", "source": "tiny"}
    return Facts(**unknown | stated | {"image_id": image_id, "split": "test"} | known)


def segmentation_sample(
    chat: ChatBuilder | None, seed: int = 0, targets: tuple[str, ...] = ("liver",)
) -> Sample:
    """An image with one square mask, click and instruction per target."""
    image = random_image(seed)
    masks = torch.zeros(len(targets), IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    for k in range(len(targets)):
        masks[k, 10 + 8 * k : 26 + 8 * k, 20:40] = 1
    centers = [[30.0, 18.0 + 8 * k] for k in range(len(targets))]
    sequences = []
    if chat is not None:
        pixels = chat.image_inputs(image)
        for target in targets:
            turn = Turn("user", f"Outline the {target}.", "segmentation")
            sequences.append(chat.sequence([turn]) | {"image": pixels})
    return Sample(
        sequences=sequences,
        image=torch.from_numpy(image).permute(2, 0, 1),
        masks=masks,
        point_coords=torch.tensor(centers)[:, None],
        point_labels=torch.full((len(targets), 1), POINT_POSITIVE),
        facts=[tiny_facts(f"image-{seed}", target=target) for target in targets],
    )


def language_sample(
    chat: ChatBuilder,
    seed: int = 100,
    question: str = "Which organ is bright?",
    answer: str | None = "the liver",
) -> Sample:
    """An image with a question, answered or (None) ready for generation."""
    turns = [Turn("user", question, "open")]
    turns += [] if answer is None else [Turn("assistant", answer, "open")]
    pixels = chat.image_inputs(random_image(seed))
    return Sample(
        sequences=[chat.sequence(turns) | {"image": pixels}],
        image=None,
        masks=None,
        point_coords=None,
        point_labels=None,
        facts=[tiny_facts(f"image-{seed}", task="language", kind="open")],
    )


# ---------------------------------------------------------------- records


def encoded_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def tiny_masks(index: int) -> list[tuple[str, np.ndarray]]:
    """Liver on every image, spleen on every second, left kidney on every third, and on one image
    in four a lesion of a single pixel."""
    masks = {name: np.zeros((HEIGHT, WIDTH), np.bool_) for name in TARGETS}
    masks["liver"][8:30, 6 + index : 30 + index] = True
    masks["spleen"][20:32, 50:60] = index % 2 == 0
    masks["left kidney"][34:42, 40:48] = index % 3 == 0
    masks["lesion"][5, 60] = index % 4 == 0
    return [(name, mask) for name, mask in masks.items() if mask.any()]


def tiny_record(index: int, split: str) -> Record:
    """An image whose structures are bright, with its questions; attributes differ or lack."""
    rng = np.random.default_rng(index)
    image = rng.integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    targets = tiny_masks(index)
    for k, (_, mask) in enumerate(targets):
        image[mask] += np.uint8(60 + 40 * k)
    turns = [turn for pair in QUESTIONS for turn in pair]
    return Record(
        id=f"tiny/{split}/{index}",
        image=encoded_png(image),
        height=HEIGHT,
        width=WIDTH,
        targets=targets,
        conversations=turns if index % 2 == 0 else turns[:4],
        task="mixed",
        modality="CT" if index % 2 else "MR",
        anatomy="abdomen",
        source="tiny",
        split=split,
        patient_id=f"p{index}",
        study_id=None,
        sex=("F", "M", None)[index % 3],
        age=None if index % 4 == 3 else 40.0 + index,
        race=None,
    )


def write_records(folder: Path, records: list[Record]) -> Path:
    """A record folder of the given rows, which name its source and split."""
    source, split = records[0].source, records[0].split
    with RecordWriter(folder, source=source, split=split, version="1", licence="test") as writer:
        for record in records:
            writer.write(record)
    return folder


def rows_of(records: Records) -> list[dict[str, Any]]:
    return [records[index] for index in range(len(records))]


def tiny_record_folder(folder: Path, num_images: int = 8, split: str = "train") -> Path:
    return write_records(folder, [tiny_record(index, split) for index in range(num_images)])


def tiny_stream(
    folder: Path, chat: ChatBuilder | None, settings: StreamSettings = SETTINGS
) -> TrainingStream:
    """The training stream over one folder: both tasks 1 : 1, or masks alone without `chat`."""
    records = Records(folder)
    language = [records] if chat else []
    if chat is None:
        settings = settings._replace(prompt_mix=settings.prompt_mix | {"text": 0.0})
    mixture = Mixture(
        segmentation=[(len(records.segmentation_units), None)],
        language=[(len(records.language_units), None)] if chat else [],
        ratio=(1, 1) if chat else (1, 0),
        seed=settings.seed,
    )
    return TrainingStream([records], language, mixture, chat, {}, settings)


def tiny_batch(folder: Path, chat: ChatBuilder | None, micro_batch: int = 4) -> Batch:
    """The first micro-batch of the stream over a record folder."""
    return tiny_stream(folder, chat).__getitems__(list(range(micro_batch)))[0]

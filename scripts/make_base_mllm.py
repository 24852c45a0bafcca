"""Make a tiny image-text model in Hugging Face format and train it briefly.

    python scripts/make_base_mllm.py --records outputs/demo/data/train --output outputs/demo/base

A stand-in for a 7B checkpoint where none can be had: it opens through the same classes, and after a
short full training it can read the records' images a little, so that LoRA has something to adapt.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch.optim import Optimizer

    from biascare.data.chat import ChatBuilder
    from biascare.data.records import Records, Turn
    from biascare.interfaces import Batch
    from biascare.models.mllm import MLLMPathway


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", nargs="+", required=True, help="folders with conversations")
    parser.add_argument("--output", required=True, help="folder to write the model to")
    parser.add_argument("--family", default="qwen2_5_vl", help="qwen2_5_vl or llava")
    parser.add_argument("--image-size", type=int, default=128, help="pixels")
    parser.add_argument("--vocab-size", type=int, default=600, help="tokens of the tokenizer")
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=["closed", "choice", "open", "report"],
        help="kinds of question to learn",
    )
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps; 0: random")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def corpus(sources: list[Records]) -> Iterator[str]:
    """Every text the tokenizer should know."""
    from biascare.data.chat import SEGMENTATION_INSTRUCTIONS

    for records in sources:
        for row in (records[i] for i in range(len(records))):
            yield from (turn["text"] for turn in row["conversations"])
            for target in row["targets"]:
                for text in SEGMENTATION_INSTRUCTIONS:
                    yield text.format(target=target["name"], modality=row["modality"])


def conversations(sources: list[Records], kinds: list[str]) -> list[tuple[Records, int]]:
    """Rows that hold a question of these kinds."""
    return [
        (records, int(row))
        for records in sources
        for row in sorted(
            {
                int(row)
                for (row, _), kind in zip(
                    records.language_units, records.question_kinds(), strict=True
                )
                if kind in kinds
            }
        )
    ]


def shuffled_turns(row: dict[str, Any], kinds: list[str], rng: np.random.Generator) -> list[Turn]:
    """The row's question-answer pairs in random order, as one conversation: an image read once
    teaches several answers."""
    from biascare.data.records import Turn

    turns = [Turn(**turn) for turn in row["conversations"]]
    pairs = [turns[i : i + 2] for i in range(0, len(turns), 2) if turns[i].kind in kinds]
    return [turn for i in rng.permutation(len(pairs)) for turn in pairs[i]]


def build_batch(
    items: list[tuple[Records, int]],
    kinds: list[str],
    chat: ChatBuilder,
    image_size: int,
    rng: np.random.Generator,
) -> Batch:
    from biascare.data.loader import collate
    from biascare.data.transforms import Geometry, apply_image, decode_image
    from biascare.interfaces import Sample

    samples = []
    for records, number in items:
        row = records[number]
        geometry = Geometry.full(row["height"], row["width"], image_size)
        pixels = chat.image_inputs(apply_image(decode_image(row["image"]), geometry))
        sequence = chat.sequence(shuffled_turns(row, kinds, rng)) | {"image": pixels}
        samples.append(Sample([sequence], None, None, None, None, meta=[{"id": row["id"]}]))
    return collate(samples, seed=0, pad_token_id=chat.tokenizer.pad_token_id)


def train_step(mllm: MLLMPathway, batch: Batch, optimizer: Optimizer) -> float:
    import torch

    from biascare.losses import token_nll_sum

    assert batch.answer_positions is not None and batch.answer_tokens is not None
    hidden = mllm.hidden_states(batch.mllm_inputs, batch.image_slots)
    logits = mllm.answer_logits(hidden, batch.answer_positions)
    loss = token_nll_sum(logits, batch.answer_tokens) / len(batch.answer_tokens)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(mllm.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def train(options: argparse.Namespace, sources: list[Records]) -> MLLMPathway:
    """Full training with AdamW and a one-cycle learning rate."""
    import numpy as np
    import torch

    from biascare.data.chat import ChatBuilder
    from biascare.models.mllm import MLLMPathway, load_processor

    torch.manual_seed(options.seed)
    processor = load_processor(options.output)
    chat = ChatBuilder(processor, image_size=options.image_size, max_tokens=4096)
    mllm = MLLMPathway.load(options.output).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(mllm.parameters(), lr=options.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=options.steps, pct_start=0.1
    )
    items = conversations(sources, options.kinds)
    rng = np.random.default_rng(options.seed)
    began, losses = time.time(), []
    for step in range(1, options.steps + 1):
        chosen = rng.choice(len(items), options.batch_size, replace=len(items) < options.batch_size)
        batch = build_batch(
            [items[i] for i in chosen], options.kinds, chat, options.image_size, rng
        )
        losses.append(train_step(mllm, batch, optimizer))
        schedule.step()
        if step % 50 == 0 or step == options.steps:
            recent = sum(losses[-50:]) / len(losses[-50:])
            print(f"step {step}/{options.steps} loss {recent:.3f} {time.time() - began:.0f} s")
    return mllm


def main() -> None:
    options = parse(sys.argv[1:])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from biascare.data.records import Records
    from biascare.models.tiny import build_tiny_mllm

    sources = [Records(path) for path in options.records]
    if Path(options.output).exists():
        sys.exit(f"{options.output} exists; remove it or name another --output")
    build_tiny_mllm(
        options.output,
        corpus(sources),
        family=options.family,
        image_size=options.image_size,
        vocab_size=options.vocab_size,
        seed=options.seed,
    )
    if options.steps:
        train(options, sources).base.save_pretrained(options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()

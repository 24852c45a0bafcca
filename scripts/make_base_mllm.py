"""Make an image-text model in Hugging Face format and train it briefly.

    python scripts/make_base_mllm.py --records outputs/demo/data/train --output outputs/demo/base
    python scripts/make_base_mllm.py --records DATA/train --output outputs/smol \\
        --language-model SmolLM2-135M-Instruct.Q4_1.gguf --derive-questions

A stand-in for a 7B checkpoint where none can be had: it opens through the same classes. Without
--language-model everything is tiny, random at first and trained in full. With one, a LLaVA is built
around it: the language model stays as it is, a vision tower and projector learn to show it images.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from torch.optim import Optimizer

    from biascare.data.chat import ChatBuilder
    from biascare.interfaces import Batch
    from biascare.models.language.pathway import MLLMPathway
    from biascare.records import Records, Turn


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", nargs="+", required=True, help="folders with conversations")
    parser.add_argument("--output", required=True, help="folder to write the model to")
    parser.add_argument("--family", default="qwen2_5_vl", help="qwen2_5_vl or llava")
    parser.add_argument(
        "--language-model", help="folder or .gguf file to build a LLaVA around; it is not trained"
    )
    parser.add_argument(
        "--vision-tower", help="CLIP folder for --language-model; without it a small random one"
    )
    parser.add_argument("--image-size", type=int, default=128, help="pixels")
    parser.add_argument("--vocab-size", type=int, default=600, help="tokens of the tokenizer")
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=["closed", "choice", "open", "report"],
        help="kinds of question to learn",
    )
    parser.add_argument(
        "--derive-questions",
        action="store_true",
        help="ask about the masks of images that have no question of these kinds",
    )
    parser.add_argument(
        "--max-questions", type=int, default=0, help="of an image in one conversation; 0: all"
    )
    parser.add_argument("--steps", type=int, default=750, help="optimizer steps; 0: random")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def corpus(sources: list[Records]) -> Iterator[str]:
    """Every text the tokenizer should know."""
    from biascare.data.chat import SEGMENTATION_INSTRUCTIONS, segmentation_instruction, written
    from biascare.records import Turn

    for records in sources:
        for row in (records[i] for i in range(len(records))):
            yield from written([Turn(**turn) for turn in row["conversations"]])
            for target in row["targets"]:
                # Instructions of segmentation too: a word the tokenizer never saw becomes many
                # tokens.
                for phrasing in range(len(SEGMENTATION_INSTRUCTIONS)):
                    yield segmentation_instruction(target["name"], row["modality"], phrasing)


class Settings(NamedTuple):
    """What of a row is learned."""

    image_size: int  # pixels
    kinds: list[str]
    max_questions: int  # 0: all


class Lesson(NamedTuple):
    """A row to learn from."""

    records: Records
    row: int
    derived: bool  # its questions are computed from its masks


def lessons(sources: list[Records], kinds: list[str], derive: bool) -> list[Lesson]:
    """Rows that hold a question of these kinds; with `derive`, then those that only hold masks."""
    found = []
    for records in sources:
        units = zip(records.language_units, records.question_kinds(), strict=True)
        asked = sorted({int(row) for (row, _), kind in units if kind in kinds})
        found += [Lesson(records, row, False) for row in asked]
    # Behind the asked ones, so that their order does not depend on the option.
    if derive:
        for records in sources:
            asked_rows = {lesson.row for lesson in found if lesson.records is records}
            # Only where nobody has asked: real questions say more than derived ones.
            masked = sorted({int(row) for row in records.segmentation_units} - asked_rows)
            found += [Lesson(records, row, True) for row in masked]
    return found


def derived_turns(row: dict[str, Any], names: list[str], rng: np.random.Generator) -> list[Turn]:
    """Questions a row's masks answer: is a structure there, which are, what kind of image is it.

    `names` are the structures the row's source annotates; one that this image lacks is asked for
    too. Of structures nobody annotated there, a missing mask would say nothing.
    """
    from biascare.records import Turn

    present = [target["name"] for target in row["targets"]]
    absent = [name for name in names if name not in present]
    asked = [(str(rng.choice(present)), "yes")]
    # One yes and one no: a model could else learn to say yes always.
    asked += [(str(rng.choice(absent)), "no")] if absent else []
    turns = []
    for name, answer in asked:
        question = f"Is the {name} visible in this image?"
        turns += [Turn("user", question, "closed"), Turn("assistant", answer, "closed")]
    for question, answer in (
        ("Which structures are visible?", ", ".join(present)),
        ("What kind of image is this?", row["modality"]),
    ):
        turns += [Turn("user", question, "open"), Turn("assistant", answer, "open")]
    return turns


def shuffled_turns(
    lesson: Lesson, row: dict[str, Any], settings: Settings, rng: np.random.Generator
) -> list[Turn]:
    """The row's question-answer pairs in random order, as one conversation: an image read once
    teaches several answers."""
    from biascare.records import Turn

    if lesson.derived:
        turns = derived_turns(row, sorted(lesson.records.target_counts), rng)
    else:
        turns = [Turn(**turn) for turn in row["conversations"]]
    pairs = [turns[i : i + 2] for i in range(0, len(turns), 2) if turns[i].kind in settings.kinds]
    # Drawn anew at each visit, so that a limit leaves out no question for good. Whole conversations
    # in random order taught closed questions better than single ones (docs/EXPERIMENTS.md).
    order = rng.permutation(len(pairs))[: settings.max_questions or None]
    return [turn for i in order for turn in pairs[i]]


def build_batch(
    items: list[Lesson], settings: Settings, chat: ChatBuilder, rng: np.random.Generator
) -> Batch:
    from biascare.data.loader import collate
    from biascare.data.transforms import Geometry, read_image
    from biascare.interfaces import Sample

    samples = []
    for lesson in items:
        row = lesson.records[lesson.row]
        geometry = Geometry.full(row["height"], row["width"], settings.image_size)
        pixels = chat.image_inputs(read_image(row["image"], geometry))
        sequence = chat.sequence(shuffled_turns(lesson, row, settings, rng)) | {"image": pixels}
        # Nothing for the vision pathway: a base knows images through its own tower alone.
        samples.append(Sample([sequence], None, None, None, None, facts=[]))
    return collate(samples, seed=0, pad_token_id=chat.tokenizer.pad_token_id)


def train_step(mllm: MLLMPathway, batch: Batch, optimizer: Optimizer) -> float:
    import torch

    from biascare.losses import token_nll_sum

    assert batch.answer_positions is not None and batch.answer_tokens is not None
    hidden = mllm.hidden_states(batch.mllm_inputs, batch.image_slots)
    logits = mllm.answer_logits(hidden, batch.answer_positions)
    # Per token: weighting each answer equally was worse (docs/EXPERIMENTS.md).
    loss = token_nll_sum(logits, batch.answer_tokens) / len(batch.answer_tokens)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    # A single odd batch must not throw a small model back.
    torch.nn.utils.clip_grad_norm_(mllm.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def train(options: argparse.Namespace, sources: list[Records]) -> MLLMPathway:
    """Training with AdamW and a one-cycle learning rate: of all weights, or around a given language
    model of the vision tower and projector alone."""
    import numpy as np
    import torch

    from biascare.data.chat import ChatBuilder
    from biascare.models.language.pathway import MLLMPathway, load_processor

    torch.manual_seed(options.seed)
    processor = load_processor(options.output)
    chat = ChatBuilder(processor, image_size=options.image_size, max_tokens=4096)
    mllm = MLLMPathway.load(options.output).train()
    around_given = options.language_model is not None
    trained = list(mllm.parameters())
    # The given language model stays as it is: it knows words, and only has to be shown images.
    if around_given:
        trained = mllm.vision_tower_parameters()
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        options.lr,
        total_steps=options.steps,
        pct_start=0.1,
    )
    settings = Settings(options.image_size, options.kinds, options.max_questions)
    items = lessons(sources, options.kinds, options.derive_questions)
    if not items:
        sys.exit(
            f"no image of {' '.join(options.records)} has a question of the kinds "
            f"{', '.join(options.kinds)}; add --derive-questions to ask about their masks"
        )
    rng = np.random.default_rng(options.seed)
    began, losses = time.time(), []
    for step in range(1, options.steps + 1):
        # With repetition only where the folder is smaller than a batch.
        chosen = rng.choice(len(items), options.batch_size, replace=len(items) < options.batch_size)
        batch = build_batch([items[i] for i in chosen], settings, chat, rng)
        losses.append(train_step(mllm, batch, optimizer))
        schedule.step()
        if step % 50 == 0 or step == options.steps:
            recent = sum(losses[-50:]) / len(losses[-50:])
            print(f"step {step}/{options.steps} loss {recent:.3f} {time.time() - began:.0f} s")
    return mllm


def build(options: argparse.Namespace, sources: list[Records]) -> None:
    """The untrained model, in the output folder."""
    if options.language_model is not None:
        from biascare.models.language.assembly import build_llava

        # Said before, since unpacking a .gguf file takes half a minute.
        print(f"building a LLaVA around {options.language_model}")
        build_llava(
            options.output,
            options.language_model,
            vision_tower=options.vision_tower,
            image_size=options.image_size,
            seed=options.seed,
        )
        return
    from biascare.models.language.tiny import build_tiny_mllm

    build_tiny_mllm(
        options.output,
        corpus(sources),
        family=options.family,
        image_size=options.image_size,
        vocab_size=options.vocab_size,
        seed=options.seed,
    )


def main() -> None:
    options = parse(sys.argv[1:])
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the gguf reader, which has no switch
    from biascare.runs.process import prepare_process

    prepare_process()
    from biascare.records import Records

    # Refused, as the tiny model would be made with another tower without a word.
    if options.vision_tower is not None and options.language_model is None:
        sys.exit("--vision-tower goes with --language-model; the tiny model has its own")
    # A base belongs to the runs that started from it: it is never overwritten.
    if Path(options.output).exists():
        sys.exit(f"{options.output} exists; remove it or name another --output")
    try:
        sources = [Records(path) for path in options.records]
        build(options, sources)
        if options.steps:
            train(options, sources).base.save_pretrained(options.output)
    except ValueError as error:
        sys.exit(str(error))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()

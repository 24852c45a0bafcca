"""Training samples as a person looks at them: pictures with masks and prompts, and conversations.

    show_samples(stream, chat, range(8), "preview.png", title="...")

Images are shown after augmentation. In conversations, what the language model is trained to say is
green and between guillemets, what it only reads is grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from biascare.data.chat import ChatBuilder
from biascare.data.loader import TrainingStream
from biascare.interfaces import (
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    IGNORE_INDEX,
    POINT_NEGATIVE,
    POINT_POSITIVE,
    Sample,
)
from biascare.reports.sheets import Overlay, overlay_sheet


def show_samples(
    stream: TrainingStream,
    chat: ChatBuilder | None,
    positions: Sequence[int],
    picture: str | Path,
    *,
    title: str,
) -> None:
    """Print the conversations at these stream positions and draw their images to `picture`."""
    seen = watch_images(chat) if chat else []
    console = Console(highlight=False)
    overlays: list[Overlay] = []
    for position in positions:
        sample = stream[position]
        found = overlays_of(stream, position, sample)
        if not found:
            about = sample.facts[0]
            head = f"position {position}  {about.source}  {about.modality}\n{about.kind} question"
            # The image that the sample has just handed to the processor.
            found = [Overlay(title=head, image=seen[-1])]
        overlays += found
        print_sample(console, position, sample, chat)
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    overlay_sheet(overlays, picture, title=title)
    console.print(f"{len(overlays)} pictures are in {picture}")


# ---------------------------------------------------------------- pictures


def overlays_of(stream: TrainingStream, position: int, sample: Sample) -> list[Overlay]:
    """One picture per (image, target); a language sample has none in the vision pathway."""
    if sample.image is None or sample.masks is None:
        return []
    assert sample.point_coords is not None and sample.point_labels is not None
    image = sample.image.permute(1, 2, 0).numpy()
    overlays = []
    for row, facts in enumerate(sample.facts):
        clicks, boxes = prompts_of(sample.point_coords[row], sample.point_labels[row])
        kind = " and ".join(["point"] * bool(clicks) + ["box"] * bool(boxes)) or "text only"
        title = (
            f"position {position}  {facts.source}  {facts.modality}\n"
            f"{facts.target} ({facts.prevalence}), {kind}"
        )
        masks = [(facts.target or "", sample.masks[row].numpy())]
        overlays.append(Overlay(title=title, image=image, masks=masks, clicks=clicks, boxes=boxes))
    return overlays


def prompts_of(
    coords: torch.Tensor, labels: torch.Tensor
) -> tuple[list[tuple[float, float, int]], list[tuple[float, float, float, float]]]:
    """Clicks (x, y, label) and boxes XYXY of one row: coords [N, 2], labels [N]."""
    points = [(x, y, label) for (x, y), label in zip(coords.tolist(), labels.tolist(), strict=True)]
    clicks = [point for point in points if point[2] in (POINT_NEGATIVE, POINT_POSITIVE)]
    corners = zip(
        (p for p in points if p[2] == BOX_TOP_LEFT),
        (p for p in points if p[2] == BOX_BOTTOM_RIGHT),
        strict=True,
    )
    return clicks, [(a[0], a[1], b[0], b[1]) for a, b in corners]


def watch_images(chat: ChatBuilder) -> list[np.ndarray]:
    """A list that receives every image [S, S, 3] uint8 handed to the MLLM's processor from now on:
    afterwards it is patches or normalised pixels, and no picture any more."""
    seen: list[np.ndarray] = []
    process = chat.image_inputs

    def image_inputs(image: np.ndarray) -> dict[str, torch.Tensor]:
        seen.append(image)
        return process(image)

    # On this object alone: the stream's own code runs unchanged, so the picture is what it made.
    vars(chat)["image_inputs"] = image_inputs
    return seen


# ---------------------------------------------------------------- conversations


def conversation(sequence: dict[str, Any], chat: ChatBuilder) -> Text:
    """Tokens of one sequence as text: trained ones green, read ones grey, image tokens as one."""
    ids = sequence["input_ids"].tolist()
    trained = (sequence["labels"] != IGNORE_INDEX).tolist()
    text = Text()
    pieces = zip(ids, trained, strict=True)
    for (is_image, is_answer), run in groupby(
        pieces, key=lambda piece: (piece[0] == chat.image_token_id, piece[1])
    ):
        tokens = [token for token, _ in run]
        if is_image:
            text.append(f"[{len(tokens)} image tokens]", style="cyan")
        else:
            words = chat.tokenizer.decode(tokens, skip_special_tokens=False)
            # Guillemets too: colours are lost in a pipe.
            text.append(f"«{words}»" if is_answer else words, _STYLES[is_answer])
    return text


_STYLES = {True: "bold green", False: "bright_black"}


def print_sample(console: Any, position: int, sample: Sample, chat: ChatBuilder | None) -> None:
    for number, facts in enumerate(sample.facts):
        about = [f"position {position}", facts.task, facts.target or facts.kind, facts.source]
        about += [facts.modality, *([facts.prevalence] if facts.prevalence else [])]
        attributes = {"sex": facts.sex, "age": facts.age, "race": facts.race}
        known = [f"{name} {value}" for name, value in attributes.items() if value is not None]
        console.rule(", ".join([*about, *known]), align="left", style="dim")
        # Once per sample, not once per target.
        for reason in sample.replaced if number == 0 else ():
            console.print(f"replaces an unreadable sample: {reason}", style="red", markup=False)
        if chat is not None:
            sequence = sample.sequences[number]
            console.print(conversation(sequence, chat), soft_wrap=True)
            console.print(token_counts(sequence, chat), style="dim")


def token_counts(sequence: dict[str, Any], chat: ChatBuilder) -> str:
    ids = sequence["input_ids"]
    num_image = int((ids == chat.image_token_id).sum())
    num_trained = int((sequence["labels"] != IGNORE_INDEX).sum())
    return f"{len(ids)} tokens: {num_image} of the image, {num_trained} trained"

"""Conversations to token ids: one template for training and inference.

    chat = ChatBuilder(processor, image_size=256, max_tokens=2048)
    question = Turn("user", "Which modality is this?", "choice", options=("CT", "MR"))
    question_text(question)     # "Which modality is this?\nA: CT\nB: MR"
    sequence = chat.sequence([question, Turn("assistant", "MR", "choice")])  # trains "B: MR"
    pixels = chat.image_inputs(image)

Records keep the parts of a question; how its options are lettered is written here and nowhere else.
A conversation is tokenised in pieces, cut where an answer begins and ends. The ids of a prompt are
therefore the same whether an answer follows (training) or not (inference), and labels can only ever
fall on answers. The processor's own expansion of the image placeholder is checked once at start.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from biascare.interfaces import IGNORE_INDEX
from biascare.records import Turn

SEGMENTATION_INSTRUCTIONS = (
    "Segment the {target} in this {modality} image.",
    "Outline the {target}.",
    "Mark every pixel of the {target} in the image.",
    "Where is the {target}? Give its mask.",
    "Delineate the {target} on this {modality} image.",
)
"""Phrasings of one task; the first is the one evaluation uses."""

MODALITY_WORDS = {"ct": "CT", "mri": "MRI", "oct": "OCT", "pet": "PET", "xray": "X-ray"}
"""How a language model has read the modalities that records spell otherwise."""


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def question_text(question: Turn) -> str:
    """A question as the model reads it: options follow on lines of their own, "A: CT"."""
    return "\n".join([question.text, *_lettered(question)])


def answer_text(question: Turn, answer: Turn) -> str:
    """An answer as the model is to say it: of a choice the option with its letter, "B: MR"."""
    if not question.options:
        return answer.text
    # Letter and words: the letter alone would teach nothing about what it stands for.
    return _lettered(question)[question.options.index(answer.text)]


def written(turns: Sequence[Turn]) -> list[str]:
    """Texts of alternating turns, the first of the user, as the model reads and says them."""
    return [
        answer_text(turns[i - 1], turn) if i % 2 else question_text(turn)
        for i, turn in enumerate(turns)
    ]


def _lettered(question: Turn) -> list[str]:
    if len(question.options) > len(LETTERS):
        raise ValueError(f"{len(question.options)} options, there are only {len(LETTERS)} letters")
    return [f"{letter}: {text}" for letter, text in zip(LETTERS, question.options, strict=False)]


def segmentation_instruction(target: str, modality: str | None, key: int | None = None) -> str:
    """The instruction for a target; `key` draws the phrasing, None takes the canonical one, or
    without a modality the first that names none."""
    phrasing = 0 if key is None else key % len(SEGMENTATION_INSTRUCTIONS)
    if modality is None:
        # "this None image" would be read as words.
        silent = (text for text in SEGMENTATION_INSTRUCTIONS if "{modality}" not in text)
        return next(silent).format(target=target)
    written = MODALITY_WORDS.get(modality, modality)
    return SEGMENTATION_INSTRUCTIONS[phrasing].format(target=target, modality=written)


def label_question(label: str) -> str:
    """What is asked about a label, yes or no, of a model without a head for it."""
    return f"Does this image show {label}?"


class ChatBuilder:
    """Token ids, labels and pixel inputs for one processor."""

    def __init__(self, processor: Any, *, image_size: int, max_tokens: int):
        """`processor`: see `load_processor`; `image_size`: pixels of the square model input."""
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_tokens = max_tokens
        self.image_token: str = processor.image_token
        self.image_token_id: int = self.tokenizer.convert_tokens_to_ids(self.image_token)
        # Once, from the processor itself: how many tokens an image becomes depends on its size and
        # on the family, and every image has the same size here.
        turns = [Turn("user", "Is it blank?", "closed")]
        text = self._render(turns, add_generation_prompt=True)
        probe = self.processor(
            text=[text],
            images=[np.zeros((image_size, image_size, 3), np.uint8)],
            return_tensors="pt",
            add_special_tokens=self._adds_special_tokens(text),
        )
        self.tokens_per_image = int((probe["input_ids"] == self.image_token_id).sum())
        self.extra_keys = [k for k in ("mm_token_type_ids", "token_type_ids") if k in probe]
        # Images are expanded here, sequence by sequence; were it done otherwise than the model is
        # used to, every answer would be a little worse and nothing would say so.
        ours = self.sequence(turns)
        for name in ("input_ids", *self.extra_keys):
            if not torch.equal(ours[name], probe[name][0]):
                raise ValueError(
                    f"the processor {type(self.processor).__name__} expands images in a way this "
                    f"project does not know ({name} differs from its own output)"
                )

    def _adds_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer must add its own; some templates write the first token already."""
        bos = self.tokenizer.bos_token
        return bos is None or not text.startswith(bos)

    def _render(
        self, turns: Sequence[Turn], *, add_generation_prompt: bool, shows_image: bool = True
    ) -> str:
        """Chat-template text; the first user turn shows the image, if any does."""
        messages = []
        for i, (turn, text) in enumerate(zip(turns, written(turns), strict=True)):
            # A control token inside a text would end a turn, or ask for an image that is not there.
            found = [token for token in self.tokenizer.all_special_tokens if token in text]
            if found:
                raise ValueError(
                    f"the text {text[:60]!r} holds {found[0]!r}, a control token of this model; "
                    "remove it when preparing the records"
                )
            content: list[dict[str, str]] = [{"type": "text", "text": text}]
            if i == 0 and shows_image:
                content.insert(0, {"type": "image"})
            messages.append({"role": turn.role, "content": content})
        return self.processor.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    def _pieces(self, turns: Sequence[Turn], shows_image: bool = True) -> list[tuple[str, bool]]:
        """(text, is answer) in order; prompts end where the model starts to speak."""
        pieces, written = [], ""
        for i, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            prompt = self._render(turns[:i], add_generation_prompt=True, shows_image=shows_image)
            answered = self._render(
                turns[: i + 1], add_generation_prompt=False, shows_image=shows_image
            )
            if not (prompt.startswith(written) and answered.startswith(prompt)):
                raise ValueError(
                    "this chat template rewrites earlier turns, so answers cannot be located; "
                    "use a template that appends turns"
                )
            # Some templates end an answer with a line break, which belongs to the next turn.
            answer = answered[len(prompt) :].rstrip()
            pieces += [(prompt[len(written) :], False), (answer, True)]
            written = prompt + answer
        if turns[-1].role == "user":
            prompt = self._render(turns, add_generation_prompt=True, shows_image=shows_image)
            pieces.append((prompt[len(written) :], False))
        return pieces

    def sequence(self, turns: Sequence[Turn], *, shows_image: bool = True) -> dict[str, Tensor]:
        """Tokens of one conversation about one image, or (`shows_image`) about none.

        Returns `input_ids` [L], `labels` [L] (answers, `IGNORE_INDEX` elsewhere), `prompt_mask` [L]
        bool (tokens before the first answer) and the processor's extra per-token keys. A
        conversation that ends with a user turn ends ready for generation.

        Raises ValueError for a text with control tokens, and for too long a conversation.
        """
        ids: list[int] = []
        labels: list[int] = []
        # Piece by piece: tokenised as one, the last token of a prompt could merge with the answer,
        # and a prompt would differ between training and inference.
        for text, is_answer in self._pieces(turns, shows_image):
            special = not ids and self._adds_special_tokens(text)
            text = text.replace(self.image_token, self.image_token * self.tokens_per_image)
            tokens = self.tokenizer(text, add_special_tokens=special)["input_ids"]
            ids += tokens
            labels += tokens if is_answer else [IGNORE_INDEX] * len(tokens)
        # Never cut: what would be lost is the end, and the end is the answer.
        if len(ids) > self.max_tokens:
            raise ValueError(
                f"the conversation that starts with {turns[0].text[:60]!r} has {len(ids)} tokens, "
                f"more than data.max_tokens = {self.max_tokens}; raise it"
            )
        input_ids, label_ids = torch.tensor(ids), torch.tensor(labels)
        sequence = {
            "input_ids": input_ids,
            "labels": label_ids,
            # Up to the first answer. What follows it knows the answer, and the query attention must
            # not (Eq. 1).
            "prompt_mask": (label_ids != IGNORE_INDEX).cumsum(0) == 0,
        }
        for name in self.extra_keys:
            # Without it, M-RoPE would silently fall back to positions in one dimension.
            is_image = input_ids == self.image_token_id
            sequence[name] = is_image.to(torch.int64 if name.startswith("mm") else input_ids.dtype)
        return sequence

    @cached_property
    def end_of_answer(self) -> str:
        """What the chat template writes after an answer."""
        turns = [Turn("user", "Is it blank?", "closed"), Turn("assistant", "yes", "closed")]
        return self._pieces(turns)[-1][0].removeprefix("yes")

    def image_inputs(self, image: np.ndarray) -> dict[str, Tensor]:
        """`image` [S, S, 3] uint8 -> the LLM's own pixel tensors (`pixel_values`, ...)."""
        return dict(self.processor.image_processor(images=[image], return_tensors="pt"))

    def decode(self, tokens: Tensor) -> list[str]:
        """Generated ids [B, T] -> texts without special tokens."""
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

"""Answers of the language side: generated, or chosen among options by their likelihood.

    answerer = Answerer(network, chat)
    answerer.generate(case, n=1, temperature=0.0)       # texts with untempered token log-probs
    answerer.score(case, ("yes", "no"))                 # log-probs [K]

`generate_batch` and `score_batch` are the same for collated prompts. What improves or tests answers
(calibration, elicitation, interrogation) wraps an Answerer and is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from biascare.data.chat import ChatBuilder, answer_text
from biascare.data.loader import collate, to_device
from biascare.data.transforms import apply_whole
from biascare.interfaces import Batch, Sample
from biascare.models.language.scoring import (
    Prefix,
    continuation_log_probs,
    going_on,
    read_prefix,
)
from biascare.models.network import DualPathNetwork
from biascare.records import Turn

DEFAULT_MAX_NEW_TOKENS = 64


class Case(NamedTuple):
    """What a model is asked, before anything is resized or tokenised."""

    image: NDArray[np.uint8]  # [H, W, 3], native
    question: Turn  # its text, kind and options


class Answered(NamedTuple):
    """One generated answer."""

    text: str
    token_log_probs: list[float]  # of every spoken token, the end token too, at temperature 1


class Answerer:
    """A network that answers, with what it needs to read images and words."""

    def __init__(self, network: DualPathNetwork, chat: ChatBuilder, *, image_size: int):
        """`image_size`: pixels of the square that training showed. Raises ValueError for a network
        without a language side."""
        if network.mllm is None:
            raise ValueError(
                "this model answers no questions: it was trained in the vision stage and has no "
                "MLLM pathway"
            )
        self.network = network
        self.mllm = network.mllm
        self.chat = chat
        self.image_size = image_size
        self._spelled: dict[tuple[str, ...], list[list[list[int]]]] = {}

    def generate(
        self,
        case: Case,
        n: int = 1,
        temperature: float = 0.0,
        *,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    ) -> list[Answered]:
        """`n` answers: the greedy one at temperature 0, else samples of torch's global generator.

        Raises ValueError for several answers at temperature 0: they would be one.
        """
        if n < 1 or temperature < 0 or (n > 1 and temperature == 0):
            raise ValueError(
                f"generate: got n={n} at temperature={temperature}, expected one answer at "
                "temperature 0, or several at a temperature above it"
            )
        batch = self._prompt(case)
        # Per-token inputs once per answer. Those of the image stay: every placeholder shows the
        # same one, which the tower then encodes once.
        per_token = ("input_ids", "attention_mask", *self.chat.extra_keys)
        inputs = {
            name: value.repeat(n, 1) if name in per_token else value
            for name, value in batch.mllm_inputs.items()
        }
        batch = batch._replace(mllm_inputs=inputs, image_slots=batch.image_slots * n)
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature} if temperature else {}
        )
        return self.generate_batch(batch, max_new_tokens=max_new_tokens, **sampling)

    def score(self, case: Case, options: Sequence[str]) -> Tensor:
        """Log-probability of each of K options, [K] fp32 on the CPU; see `score_batch`."""
        question = case.question
        # A choice was trained with its options in sight, a closed question without.
        if question.kind == "choice":
            question = question._replace(options=tuple(options))
        batch = self._prompt(case._replace(question=question))
        return self.score_batch(batch, [spoken(question, options)])[0]

    @torch.inference_mode()
    def read(self, batch: Batch) -> Prefix:
        """Read the prompts of a left-padded batch, once for `generate_batch` and `score_batch`."""
        batch = to_device(batch, self.network.device)
        self.network.eval()
        return read_prefix(self.mllm, batch.mllm_inputs, batch.image_slots)

    @torch.inference_mode()
    def generate_batch(
        self, batch: Batch, *, max_new_tokens: int, prefix: Prefix | None = None, **keywords: Any
    ) -> list[Answered]:
        """One answer to each prompt of a left-padded batch; greedy unless `keywords` of
        transformers' `generate` say otherwise. `prefix`: what `read` made of the batch."""
        batch = to_device(batch, self.network.device)
        self.network.eval()
        if prefix is not None:
            keywords |= going_on(prefix)
        generated = self.mllm.generate(
            batch.mllm_inputs, batch.image_slots, max_new_tokens=max_new_tokens, **keywords
        )
        texts = self.chat.decode(generated.tokens)
        rows = zip(texts, generated.log_probs.tolist(), generated.spoken.tolist(), strict=True)
        return [
            Answered(text, [p for p, said in zip(log_probs, spoken, strict=True) if said])
            for text, log_probs, spoken in rows
        ]

    @torch.inference_mode()
    def score_batch(
        self, batch: Batch, options: Sequence[Sequence[str]], prefix: Prefix | None = None
    ) -> list[Tensor]:
        """Log-probabilities of the options of every prompt, as they would be said; [K] fp32 each.

        Of the full vocabulary: what they lack to 1 the model would rather say otherwise. An option
        counts in all its spellings (case, a leading space), whose probabilities are added; one of
        several tokens by the product over its tokens. Prompt and image are read once, or were:
        `prefix` is what `read` made of the batch.
        """
        # Yes and no are asked for again and again.
        for said in {tuple(said) for said in options} - self._spelled.keys():
            self._spelled[said] = self.spellings(said)
        spellings = [self._spelled[tuple(said)] for said in options]
        flat = [
            (row, option, tokens)
            for row, said in enumerate(spellings)
            for option, variants in enumerate(said)
            for tokens in variants
        ]
        # All options of all questions go through together: prompts are read once, however many.
        prefix = prefix or self.read(batch)
        scores = continuation_log_probs(
            self.mllm, prefix, [row for row, _, _ in flat], [tokens for _, _, tokens in flat]
        ).cpu()
        found = [torch.full((len(said),), -torch.inf) for said in spellings]
        for (row, option, _), score in zip(flat, scores, strict=True):
            # Spellings exclude each other, so probabilities add; in logs, lest they underflow.
            found[row][option] = torch.logaddexp(found[row][option], score)
        return found

    def spellings(self, texts: Sequence[str]) -> list[list[list[int]]]:
        """Per option, the token sequences that say it, as answers begin in training.

        Case is varied only where that keeps options apart. Where one option's tokens begin
        another's ("no", "no finding"), all of them end with the token that ends an answer.
        """
        variants = [
            {
                s + t
                for s in ("", " ")
                for t in (text, text.lower(), text.capitalize(), text.upper())
            }
            for text in texts
        ]
        # Stages "IV" and veins "iv": where case tells options apart, folding it would credit both.
        if len(set().union(*variants)) < sum(map(len, variants)):
            variants = [{text, f" {text}"} for text in texts]
        tokens = [self._tokens(variant, "") for variant in variants]
        # "no" would otherwise be credited with every "no finding". All or none get the end token:
        # it has a probability of its own, which must not favour the options that lack it.
        flat = [(k, sequence) for k, said in enumerate(tokens) for sequence in said]
        begins = any(
            k != other and longer[: len(shorter)] == shorter
            for k, shorter in flat
            for other, longer in flat
        )
        if begins:
            tokens = [self._tokens(variant, self.chat.end_of_answer) for variant in variants]
        return tokens

    def _tokens(self, texts: set[str], end: str) -> list[list[int]]:
        # A set: two spellings of the same tokens must not be counted twice.
        found = {
            tuple(self.chat.tokenizer(text + end, add_special_tokens=False)["input_ids"])
            for text in texts
        }
        return [list(tokens) for tokens in sorted(found)]

    def _prompt(self, case: Case) -> Batch:
        pixels = apply_whole(case.image, self.image_size)
        sequence = self.chat.sequence([case.question]) | {"image": self.chat.image_inputs(pixels)}
        sample = Sample([sequence], None, None, None, None, facts=[])
        pad = self.chat.tokenizer.pad_token_id
        return collate([sample], seed=0, pad_token_id=pad, padding_side="left")


def spoken(question: Turn, options: Sequence[str]) -> list[str]:
    """Options as an answer says them: lettered where the question shows them."""
    if not question.options:
        return list(options)
    return [answer_text(question, Turn("assistant", option, question.kind)) for option in options]

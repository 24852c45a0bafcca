"""How likely a language model finds given continuations of a prompt, the prompt being read once.

    prefix = read_prefix(mllm, inputs, image_slots)          # B prompts and their images
    prefix = prefix_of(mllm, inputs, image_slots, generated)   # or what generation has read
    scores = continuation_log_probs(mllm, prefix, rows, continuations)
    scores = option_log_probs(mllm, prefix, spellings)       # options of several spellings

Log-probabilities are of the full vocabulary and in fp32: a share among a few options is a quotient
of them, and bf16 would round it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biascare.interfaces import Generated
from biascare.models.language.packing import rotary_positions
from biascare.models.language.pathway import MLLMPathway

MAX_CONTINUATIONS = 64
"""Read at a time: each holds a copy of its prompt's keys and values."""

NEGLIGIBLE = 15.0
"""A spelling this much (in logs) below what its option has already adds less than 1e-6 to it."""


class Prefix(NamedTuple):
    """B prompts, read."""

    log_probs: Tensor  # [B, V] fp32, of the token that comes next
    cache: Any  # keys and values of transformers, of L tokens or more
    attention_mask: Tensor  # [B, L]
    next_position: Tensor  # [B] or, with M-RoPE, [4, B]


@torch.inference_mode()
def read_prefix(mllm: MLLMPathway, inputs: dict[str, Tensor], image_slots: list[int]) -> Prefix:
    """Run left-padded prompts through the model; see `MLLMPathway.hidden_states` for arguments."""
    positions, following = _positions(mllm, inputs, image_slots)
    output = mllm.base.model(
        **mllm.with_image_features(inputs, image_slots), position_ids=positions, use_cache=True
    )
    # The last position of a left-padded row is always real.
    logits = mllm.base.lm_head(output.last_hidden_state[:, -1])
    return Prefix(
        log_probs=logits.float().log_softmax(-1),
        cache=output.past_key_values,
        attention_mask=inputs["attention_mask"],
        next_position=following,
    )


def prefix_of(
    mllm: MLLMPathway, inputs: dict[str, Tensor], image_slots: list[int], generated: Generated
) -> Prefix | None:
    """The same prompts as generation has read them; None where its cache has let go of some."""
    mask = inputs["attention_mask"]
    length = mask.shape[1] + generated.tokens.shape[1] - 1
    # A sliding window forgets the prompt's beginning while it generates.
    if any(layer.keys.shape[2] != length for layer in generated.cache.layers):
        return None
    return Prefix(
        log_probs=generated.first_log_probs,
        cache=generated.cache,
        attention_mask=mask,
        next_position=_positions(mllm, inputs, image_slots)[1],
    )


def _positions(
    mllm: MLLMPathway, inputs: dict[str, Tensor], image_slots: list[int]
) -> tuple[Tensor, Tensor]:
    """Positions of the prompts' tokens, and of the token that comes next."""
    mask = inputs["attention_mask"]
    plain = (mask.cumsum(1) - 1).clamp(min=0)  # padding on the left would be at -1
    if "image_grid_thw" in inputs:
        # One per placeholder, as M-RoPE counts them; the batch has one per distinct image.
        inputs = inputs | {"image_grid_thw": inputs["image_grid_thw"][image_slots]}
    rotary = rotary_positions(mllm.base.model, inputs)
    if rotary is None:
        return plain, mask.sum(1)
    # Positions of an image advance by its grid and not by its tokens, so text after it does not
    # continue at the number of tokens.
    largest = rotary.amax(0).masked_fill(mask == 0, -1).amax(1)
    return torch.cat([plain[None], rotary]), torch.stack([mask.sum(1), *[largest + 1] * 3])


@torch.inference_mode()
def option_log_probs(
    mllm: MLLMPathway, prefix: Prefix, spellings: Sequence[Sequence[Sequence[Sequence[int]]]]
) -> list[Tensor]:
    """Log-probabilities of the options of every row, [K] fp32 each on the CPU.

    `spellings`: per row and option, the token sequences that say it, whose probabilities are
    added. What cannot change the sum is not read: a sequence is at most as likely as its first
    token.
    """
    flat = [
        (row, option, tokens)
        for row, options in enumerate(spellings)
        for option, variants in enumerate(options)
        for tokens in variants
    ]
    found = [torch.full((len(options),), -torch.inf) for options in spellings]
    if not flat:
        return found
    index = torch.tensor([row for row, _, _ in flat], device=prefix.log_probs.device)
    first = torch.tensor([tokens[0] for _, _, tokens in flat], device=index.device)
    bounds = prefix.log_probs[index, first].tolist()
    likeliest: dict[tuple[int, int], int] = {}
    for n, (row, option, _) in enumerate(flat):
        best = likeliest.setdefault((row, option), n)
        likeliest[row, option] = n if bounds[n] > bounds[best] else best
    # One token is known already, and of the others the likeliest start shows what is negligible.
    early = {n for n, (_, _, tokens) in enumerate(flat) if len(tokens) == 1}
    early |= set(likeliest.values())
    _add_up(mllm, prefix, [flat[n] for n in sorted(early)], found)
    late = [
        spelling
        for n, spelling in enumerate(flat)
        if n not in early and bounds[n] > float(found[spelling[0]][spelling[1]]) - NEGLIGIBLE
    ]
    _add_up(mllm, prefix, late, found)
    return found


def _add_up(
    mllm: MLLMPathway,
    prefix: Prefix,
    spellings: Sequence[tuple[int, int, Sequence[int]]],
    found: list[Tensor],
) -> None:
    rows, texts = [row for row, _, _ in spellings], [tokens for _, _, tokens in spellings]
    scores = continuation_log_probs(mllm, prefix, rows, texts).cpu()
    for (row, option, _), score in zip(spellings, scores, strict=True):
        # Spellings exclude each other, so probabilities add; in logs, lest they underflow.
        found[row][option] = torch.logaddexp(found[row][option], score)


@torch.inference_mode()
def continuation_log_probs(
    mllm: MLLMPathway, prefix: Prefix, rows: Sequence[int], continuations: Sequence[Sequence[int]]
) -> Tensor:
    """Log-probability of N token sequences, each after the prompt of its row: [N] fp32.

    A continuation of one token costs nothing more; longer ones are read after the cached prompt,
    their last token left out, which nothing follows. Raises ValueError for an empty one.
    """
    if not all(continuations):
        raise ValueError("a continuation needs at least one token, got an empty one")
    device = prefix.log_probs.device
    first = torch.tensor([t[0] for t in continuations], dtype=torch.int64, device=device)
    index = torch.tensor(rows, dtype=torch.int64, device=device)
    scores = prefix.log_probs[index, first]
    # The first token is there already, for all continuations of a prompt in one reading.
    longer = [n for n, tokens in enumerate(continuations) if len(tokens) > 1]
    # By length: a long one beside short ones would pad them all.
    longer.sort(key=lambda n: len(continuations[n]))
    for start in range(0, len(longer), MAX_CONTINUATIONS):
        chosen = longer[start : start + MAX_CONTINUATIONS]
        scores[chosen] += _rest_log_probs(
            mllm, prefix, [rows[n] for n in chosen], [continuations[n] for n in chosen]
        )
    return scores


def _rest_log_probs(
    mllm: MLLMPathway, prefix: Prefix, rows: list[int], continuations: list[Sequence[int]]
) -> Tensor:
    """[N] fp32: of all tokens but the first."""
    device = prefix.log_probs.device
    index = torch.tensor(rows, device=device)
    length = max(map(len, continuations)) - 1
    read = torch.zeros(len(rows), length, dtype=torch.int64, device=device)
    wanted = torch.full_like(read, -1)
    for n, tokens in enumerate(continuations):
        read[n, : len(tokens) - 1] = torch.tensor(tokens[:-1], device=device)
        wanted[n, : len(tokens) - 1] = torch.tensor(tokens[1:], device=device)
    # Shorter continuations end in padding that their own tokens, being causal, never see.
    real = (wanted >= 0).to(prefix.attention_mask)
    steps = torch.arange(length, device=device)
    # Another cache of these rows: reading goes on in place, and others continue the same prompt.
    cache, end = type(prefix.cache)(), prefix.attention_mask.shape[1]
    for number, layer in enumerate(prefix.cache.layers):
        # Of the prompt alone: what generation said after it is no part of it.
        cache.update(layer.keys[:, :, :end][index], layer.values[:, :, :end][index], number)
    output = mllm.base.model(
        input_ids=read,
        attention_mask=torch.cat([prefix.attention_mask[index], real], 1),
        position_ids=prefix.next_position[..., index, None] + steps,
        past_key_values=cache,
        use_cache=True,
    )
    logits = mllm.base.lm_head(output.last_hidden_state).float()
    picked = logits.log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
    # Not a mean: the likelihood of an option is that of all its tokens together.
    return torch.where(wanted >= 0, picked, 0.0).sum(1)

"""How likely a language model finds given continuations of a prompt, the prompt being read once.

    prefix = read_prefix(mllm, inputs, image_slots)          # B prompts and their images
    scores = continuation_log_probs(mllm, prefix, rows, continuations)

Log-probabilities are of the full vocabulary and in fp32: a share among a few options is a quotient
of them, and bf16 would round it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biascare.models.language.packing import rotary_positions
from biascare.models.language.pathway import MLLMPathway

MAX_CONTINUATIONS = 64
"""Read at a time: each holds a copy of its prompt's keys and values."""


class Prefix(NamedTuple):
    """B prompts, read."""

    log_probs: Tensor  # [B, V] fp32, of the token that comes next
    cache: Any  # keys and values of transformers
    attention_mask: Tensor  # [B, L]
    next_position: Tensor  # [B] or, with M-RoPE, [4, B]


@torch.inference_mode()
def read_prefix(mllm: MLLMPathway, inputs: dict[str, Tensor], image_slots: list[int]) -> Prefix:
    """Run left-padded prompts through the model; see `MLLMPathway.hidden_states` for arguments."""
    mask = inputs["attention_mask"]
    plain = (mask.cumsum(1) - 1).clamp(min=0)  # padding on the left would be at -1
    # With a grid per placeholder: several questions may be about one image.
    placed = mllm.with_image_features(inputs, image_slots)
    rotary = rotary_positions(mllm.base.model, placed)
    positions, following = plain, mask.sum(1)
    if rotary is not None:
        positions = torch.cat([plain[None], rotary])
        # Positions of an image advance by its grid and not by its tokens, so text after it does
        # not continue at the number of tokens.
        largest = rotary.amax(0).masked_fill(mask == 0, -1).amax(1)
        following = torch.stack([following, *[largest + 1] * 3])
    output = mllm.base.model(**placed, position_ids=positions, use_cache=True)
    # The last position of a left-padded row is always real.
    logits = mllm.base.lm_head(output.last_hidden_state[:, -1])
    return Prefix(
        log_probs=logits.float().log_softmax(-1),
        cache=output.past_key_values,
        attention_mask=mask,
        next_position=following,
    )


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
    cache = type(prefix.cache)()
    for number, layer in enumerate(prefix.cache.layers):
        cache.update(layer.keys[index], layer.values[index], number)
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

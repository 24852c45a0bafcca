"""How likely a language model finds given continuations of a prompt, the prompt being read once.

    prefix = read_prefix(mllm, inputs, image_slots)          # B prompts and their images
    scores = continuation_log_probs(mllm, prefix, rows, continuations)
    generated = mllm.generate(..., **going_on(prefix))       # the same prompts, not read again

Log-probabilities are of the full vocabulary and in fp32: a share among a few options is a quotient
of them, and bf16 would round it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache

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
    their last token left out, which nothing follows, and those that begin alike together. Raises
    ValueError for an empty one.
    """
    if not all(continuations):
        raise ValueError("a continuation needs at least one token, got an empty one")
    device = prefix.log_probs.device
    first = torch.tensor([t[0] for t in continuations], dtype=torch.int64, device=device)
    index = torch.tensor(rows, dtype=torch.int64, device=device)
    scores = prefix.log_probs[index, first]
    # The first token is there already, for all continuations of a prompt in one reading.
    longer = [n for n, tokens in enumerate(continuations) if len(tokens) > 1]
    # Longest first: one that begins another is then read with it, and a part has little padding.
    longer.sort(key=lambda n: -len(continuations[n]))
    readings: list[tuple[int, ...]] = []  # a row and the tokens read after its prompt
    place: dict[tuple[int, ...], int] = {}  # of everything that a reading begins with
    for n in longer:
        read = (rows[n], *continuations[n][:-1])
        if read not in place:
            place |= {read[:end]: len(readings) for end in range(2, len(read) + 1)}
            readings.append(read)
    reading = [place[(rows[n], *continuations[n][:-1])] for n in longer]
    for start in range(0, len(readings), MAX_CONTINUATIONS):
        part = readings[start : start + MAX_CONTINUATIONS]
        mine = [
            (n, r - start)
            for n, r in zip(longer, reading, strict=True)
            if start <= r < start + len(part)
        ]
        chosen = [n for n, _ in mine]
        scores[chosen] += _rest_log_probs(
            mllm, prefix, part, [r for _, r in mine], [continuations[n] for n in chosen]
        )
    return scores


def going_on(prefix: Prefix) -> dict[str, Any]:
    """What `MLLMPathway.generate` needs to go on after prompts that were read."""
    # Of all but the last token, which generation reads itself, to have what follows it. Only its
    # position counts then.
    before = (prefix.next_position - 1)[..., None]
    return {
        "past_key_values": _cache(prefix, lambda states: states[:, :, :-1]),
        "position_ids": before.expand(*before.shape[:-1], prefix.attention_mask.shape[1]),
    }


def _cache(prefix: Prefix, of: Callable[[Tensor], Tensor]) -> Cache:
    """Another cache with a part of every layer's states [B, heads, L, d]: reading goes on in
    place, and others continue the same prompt."""
    cache: Cache = type(prefix.cache)()
    for number, layer in enumerate(prefix.cache.layers):
        cache.update(of(layer.keys), of(layer.values), number)
    return cache


def _rest_log_probs(
    mllm: MLLMPathway,
    prefix: Prefix,
    readings: list[tuple[int, ...]],
    reading: list[int],
    continuations: list[Sequence[int]],
) -> Tensor:
    """[N] fp32: of all tokens but the first. `reading` [N]: which of the R readings, each a row and
    its tokens, holds a continuation."""
    device = prefix.log_probs.device
    index = torch.tensor([row for row, *_ in readings], device=device)
    tokens = [torch.tensor(read[1:]) for read in readings]
    read = pad_sequence(tokens, batch_first=True).to(device)
    # Shorter readings end in padding that their own tokens, being causal, never see.
    real = pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True).to(device)
    following = [torch.tensor(said[1:]) for said in continuations]
    wanted = pad_sequence(following, batch_first=True, padding_value=-1).to(device)
    steps = torch.arange(read.shape[1], device=device)
    cache = _cache(prefix, lambda states: states[index])
    output = mllm.base.model(
        input_ids=read,
        attention_mask=torch.cat([prefix.attention_mask[index], real.to(prefix.attention_mask)], 1),
        position_ids=prefix.next_position[..., index, None] + steps,
        past_key_values=cache,
        use_cache=True,
    )
    logits = mllm.base.lm_head(output.last_hidden_state).float()
    said = torch.tensor(reading, device=device)[:, None], steps[: wanted.shape[1]]
    # Less the normaliser, and not a softmax of all: few of the vocabulary's numbers are wanted.
    picked = logits[(*said, wanted.clamp(min=0))] - logits.logsumexp(-1)[said]
    # Not a mean: the likelihood of an option is that of all its tokens together.
    return torch.where(wanted >= 0, picked, 0.0).sum(1)

"""The sequences of a micro-batch end to end in one row: the LLM computes no padding.

    packed = pack(model, inputs)                       # [B, L] -> [1, N], N the real tokens
    hidden = model(**packed).last_hidden_state         # [1, N, d]
    hidden = unpack(hidden, inputs["attention_mask"])  # [B, L, d], zeros on padding

Positions start again at every sequence, so each one sees what it would see alone. Attention runs
sequence by sequence without a mask: masked attention over the whole row would cost N^2 and be
slower than padding where micro-batches are even.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "packed_sdpa"
"""Attention kernel of transformers' "sdpa" that knows where the sequences of a row end."""


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: list[int] | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, or the same for each sequence of a packed row.

    `query` [B, heads, L, head dim], `key`, `value` [B, KV heads, L, head dim]. With
    `sequence_lengths`, which add up to L, B is 1 and every part is causal in itself.
    Returns [B, L, heads, head dim].
    """
    if sequence_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)
    # A loop over sequences, because one kernel with a block mask was slower than padding on even
    # micro-batches (docs/EXPERIMENTS.md, packed against padded).
    parts = zip(*(x.split(sequence_lengths, dim=2) for x in (query, key, value)), strict=True)
    attended = [sdpa_attention_forward(module, q, k, v, None, **keywords)[0] for q, k, v in parts]
    return torch.cat(attended, dim=1), None


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)


def enable_packing(language_model: Any) -> None:
    """Let a language model with SDPA attention read packed rows; unpacked ones stay as they are.

    Other kernels need nothing: transformers derives their masks from the positions.
    """
    # Of the language model alone: the vision tower has windows of its own to attend in.
    if language_model.config._attn_implementation == "sdpa":
        language_model.set_attn_implementation(PACKED_SDPA)


def pack(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of `model`, the base model without its head, with [B, L] entries made [1, N].

    `inputs` as in `MLLMPathway.hidden_states`, image features included: they follow the order of
    the placeholders, which packing keeps.
    """
    mask = inputs["attention_mask"].bool()
    packed = {
        name: value[mask][None] if torch.is_tensor(value) and value.shape == mask.shape else value
        for name, value in inputs.items()
    }
    # Given and not left to the model, which would count on through the whole row. With M-RoPE
    # transformers wants four of them, the plain ones first.
    plain = (mask.cumsum(1) - 1)[mask][None]
    rotary = rotary_positions(model, inputs)
    packed["position_ids"] = (
        plain if rotary is None else torch.cat([plain[None], rotary[:, mask][:, None]])
    )
    config, lengths = model.config.get_text_config(), mask.sum(1).tolist()
    window = getattr(config, "sliding_window", None)
    if config._attn_implementation != PACKED_SDPA or (window and max(lengths) > window):
        # transformers builds the mask from the positions, and a sliding window with it.
        return packed | {"attention_mask": None}
    # Nothing masked: transformers then builds no [N, N] mask.
    return packed | {"attention_mask": mask[mask][None].long(), "sequence_lengths": lengths}


def unpack(hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
    """`hidden_states` [1, N, d] back to the places where `attention_mask` [B, L] is 1."""
    places = hidden_states.new_zeros(*attention_mask.shape, hidden_states.shape[-1])
    return places.masked_scatter(attention_mask.bool()[..., None], hidden_states)


def rotary_positions(model: Any, inputs: dict[str, Any]) -> Tensor | None:
    """M-RoPE's own positions [3, B, L] of time, row and column; None where a model has none."""
    if not hasattr(model, "get_rope_index"):
        return None
    positions: Tensor = model.get_rope_index(
        inputs["input_ids"],
        # By subscript: without the types, positions silently become those of plain text.
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs.get("image_grid_thw"),
        attention_mask=inputs["attention_mask"],
    )[0]
    return positions

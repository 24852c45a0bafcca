"""Eqs. 1-2: learnable queries read the hidden states of the language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention


class MaskedMultiheadAttention(nn.MultiheadAttention):
    """torch's multi-head attention, with its parameter names, for one set of keys and a mask.

    torch reads the weights of the output map without calling it. ZeRO-3 gathers what a module is
    called with, so an evaluation before the first training step would meet an empty weight.
    """

    def forward(  # type: ignore[override]
        self, queries: Tensor, states: Tensor, mask: Tensor
    ) -> Tensor:
        """`queries` [R, Q, d], `states` [R, L, d] keys and values, `mask` [R, L] -> [R, Q, d]."""
        assert self.in_proj_weight is not None and self.in_proj_bias is not None
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((queries, states, states), weights, biases, strict=True)
        )
        pooled = scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.out_proj(pooled.transpose(1, 2).flatten(2))


class CrossModalQueryAttention(nn.Module):
    """Eqs. 1-2: learnable queries read the LLM's hidden states, projected to SAM's prompt space."""

    def __init__(self, hidden_size: int, prompt_dim: int, num_queries: int = 1, num_heads: int = 8):
        """`hidden_size` d of the LLM, `prompt_dim` C of the segmentation backbone."""
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"model.query_heads: got {num_heads}, expected a divisor of the LLM's hidden size "
                f"{hidden_size}"
            )
        self.num_queries = num_queries
        self.num_heads = num_heads
        # Of length about 1 whatever d is, so that every prompt token is read at first.
        self.queries = nn.Parameter(torch.randn(1, num_queries, hidden_size) * hidden_size**-0.5)
        self.attention = MaskedMultiheadAttention(hidden_size, num_heads, batch_first=True)
        self.projection = nn.Linear(hidden_size, prompt_dim)

    def forward(self, hidden_states: Tensor, prompt_mask: Tensor) -> Tensor:
        """`hidden_states` [R, L, d]; `prompt_mask` [R, L] bool, True on prompts -> [R, Q, C]."""
        # Prompts only: the answer is teacher-forced in training, and a query that sees it would
        # learn from what is missing at inference.
        queries = self.queries.expand(hidden_states.shape[0], -1, -1)
        return self.projection(self.attention(queries, hidden_states, prompt_mask))

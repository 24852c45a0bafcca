"""Attention with SAM's decomposed relative positions, in windows that may be partly padding.

    table = distance_table(rel_pos_h, rel_pos_w, scale)
    attended = relative_attention(qkv, padding, table, Window(span=14, rows=14, cols=2))

Only real tokens are given. In segment_anything a padded token is zero before the `qkv` map, so
every padded key is the key bias and every padded value the value bias: together they are one more
key, its content the bias, its position a log-sum-exp (`padding_logit`). Queries meet one short
table of distances, and the logits of rows and columns are views of that product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

MAX_QUERIES = 256
"""Attention to more queries runs in chunks of whole grid rows of about so many: the weights of a
chunk stay near the processor, and a 64 x 64 grid never holds its [4096, 4096] weights per head."""


class Window(NamedTuple):
    """A square of `span` x `span` tokens of which the first `rows` x `cols` are real."""

    span: int
    rows: int
    cols: int

    @property
    def padded(self) -> bool:
        return self.rows * self.cols < self.span**2


def distance_table(height: Tensor, width: Tensor, scale: float) -> Tensor:
    """[2 * (2 * span - 1), d]: one vector per distance of rows, then of columns, key - query.

    `height` and `width` [2 * span - 1, d] run over query - key, as segment_anything keeps them.
    Divided by `scale`, because they meet queries that are multiplied with it.
    """
    # Turned round so that a distance grows with the key: the logits of one query are then
    # neighbours in memory, and views can read them (`position_views`).
    return torch.cat([height.flip(0), width.flip(0)]) / scale


def position_views(products: Tensor, window: Window, row: int) -> tuple[Tensor, Tensor]:
    """Products of queries and `distance_table` as logits of all key rows and all key columns.

    `products` [..., queries, 2 * (2 * span - 1)], contiguous and no view, of whole rows of queries
    from `row` on. Returns two views [..., rows, cols, span]: a query's distances to the key rows
    are neighbours in memory, one step further left for each row that the query lies lower.
    """
    outer, step, span = products.stride()[:-2], products.shape[-1], window.span
    sizes = (*products.shape[:-2], products.shape[-2] // window.cols, window.cols, span)
    start, row_step = span - 1, window.cols * step
    by_row = products.as_strided(sizes, (*outer, row_step - 1, step, 1), start - row)
    by_col = products.as_strided(sizes, (*outer, row_step, step - 1, 1), start + 2 * span - 1)
    return by_row, by_col


def padding_rectangles(window: Window) -> list[tuple[slice, slice]]:
    """(rows, cols) that are padding: below the real tokens, and beside them; no empty ones."""
    # The corner belongs to `below` alone, because two that overlap would count it twice.
    below = (slice(window.rows, window.span), slice(0, window.span))
    beside = (slice(0, window.rows), slice(window.cols, window.span))
    sides = ((below, window.rows), (beside, window.cols))
    return [rectangle for rectangle, size in sides if size < window.span]


def padding_logit(by_row: Tensor, by_col: Tensor, window: Window) -> Tensor:
    """[..., 1]: position logit that makes one padded key weigh as much as all of the window's.

    `by_row` and `by_col` [..., span]. In a rectangle of padding, the sum over (row, col) of
    exp(by_row + by_col) is a product of two sums. The content of padded keys is one and the same
    and stays in the ordinary product.
    """
    masses = [
        by_row[..., rows].logsumexp(-1, keepdim=True)
        + by_col[..., cols].logsumexp(-1, keepdim=True)
        for rows, cols in padding_rectangles(window)
    ]
    return masses[0] if len(masses) == 1 else torch.logaddexp(*masses)


def add_padding_gradients(
    grad: tuple[Tensor, Tensor], views: tuple[Tensor, Tensor], scale: Tensor, window: Window
) -> None:
    """Add to `grad` what `padding_logit(*views, window)` with gradient `scale` [..., 1] gives."""
    # exp(logit - total) is a share of the padded mass; logsumexp keeps it finite where the single
    # exponentials would overflow.
    total = padding_logit(*views, window)
    for rectangle in padding_rectangles(window):
        by_row, by_col = (x[..., part] for x, part in zip(views, rectangle, strict=True))
        beside_row = by_col.logsumexp(-1, keepdim=True) - total
        beside_col = by_row.logsumexp(-1, keepdim=True) - total
        grad[0][..., rectangle[0]] += (by_row + beside_row).exp_().mul_(scale)
        grad[1][..., rectangle[1]] += (by_col + beside_col).exp_().mul_(scale)


def position_logits(q: Tensor, table: Tensor, window: Window, row: int) -> Tensor:
    """[..., queries, keys] of scaled queries [..., queries, d] from grid row `row` on.

    Keys are the real tokens, then, in a padded window, one that stands for all padding.
    """
    by_row, by_col = position_views(q @ table.t(), window, row)
    real_row, real_col = by_row[..., : window.rows, None], by_col[..., None, : window.cols]
    # Not a plain sum: torch would lay it out like its operands, and flatten would copy it.
    logits = real_row.expand(*real_row.shape[:-1], window.cols).contiguous().add_(real_col)
    logits = logits.flatten(-2)
    if window.padded:
        # In fp32: it is a sum over up to span^2 keys, of which bf16 would drop the small ones.
        padding = padding_logit(by_row.float(), by_col.float(), window)
        logits = torch.cat([logits, padding.to(logits.dtype)], -1)
    return logits.flatten(-3, -2)


def position_gradients(
    q: Tensor, table: Tensor, grad_logits: Tensor, window: Window, row: int
) -> Tensor:
    """Gradient of the products `q @ table.t()`, given that of the `position_logits`."""
    grad = q.new_zeros(*q.shape[:-1], len(table))
    grad_row, grad_col = position_views(grad, window, row)
    grad_logits = grad_logits.unflatten(-2, grad_row.shape[-3:-1])
    real = grad_logits[..., : window.rows * window.cols].unflatten(-1, (window.rows, window.cols))
    # Each product is read as the logit of one key row or one key column, so nothing written here
    # is written twice; distances beyond the window's edge keep the zero.
    torch.sum(real, -1, out=grad_row[..., : window.rows])
    torch.sum(real, -2, out=grad_col[..., : window.cols])
    if window.padded:
        by_row, by_col = position_views(q @ table.t(), window, row)
        views, scale = (by_row.float(), by_col.float()), grad_logits[..., -1:].float()
        add_padding_gradients((grad_row, grad_col), views, scale, window)
    return grad


def query_chunks(window: Window) -> list[tuple[int, slice]]:
    """(first grid row, queries) of each chunk: whole rows, about `MAX_QUERIES` tokens."""
    # Up to twice the size stays whole, because the weights of one chunk can be kept for the
    # backward pass: the 16 x 16 grid of 256 px, and every window.
    if window.rows * window.cols <= 2 * MAX_QUERIES:
        return [(0, slice(None))]
    rows = max(1, MAX_QUERIES // window.cols)
    return [
        (row, slice(row * window.cols, (row + rows) * window.cols))
        for row in range(0, window.rows, rows)
    ]


def split_heads(qkv: Tensor, padding: Tensor, window: Window) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries [G, heads, tokens, d]; keys and values [G, heads, keys, d].

    `qkv` [G, tokens, 3, heads, d]; `padding` [2, heads, d] is the key and the value of a padded
    token and follows the real ones where there is padding.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if window.padded:
        k, v = (
            torch.cat([x, extra[:, None].expand(len(x), -1, -1, -1)], 2)
            for x, extra in ((k, padding[0]), (v, padding[1]))
        )
    # Queries are scaled, and not the logits, of which there are many more.
    return q * q.shape[-1] ** -0.5, k, v


def join(parts: list[Tensor]) -> Tensor:
    """Parts of the tokens [..., tokens, d] in one tensor, without a copy where there is one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def relative_attention(qkv: Tensor, padding: Tensor, table: Tensor, window: Window) -> Tensor:
    """`attend` by the fastest exact way: fused, or with a gradient written out."""
    # Without gradients the fused CPU kernel takes the bias as its mask; with them it cannot.
    by_hand = qkv.device.type == "cpu" and torch.is_grad_enabled()
    if by_hand and not torch.compiler.is_compiling():  # a compiler fuses the steps itself
        attended: Tensor = CpuAttention.apply(qkv, padding, table, window)
        return attended
    return attend(qkv, padding, table, window)


def attend(qkv: Tensor, padding: Tensor, table: Tensor, window: Window) -> Tensor:
    """Softmax attention with relative positions in G windows.

    `qkv` [G, rows * cols, 3, heads, d] of the real tokens; `padding` [2, heads, d] the key and the
    value of padded ones; `table`: see `distance_table`. Returns [G, rows * cols, heads * d].
    """
    q, k, v = split_heads(qkv, padding, window)
    parts = []
    for row, some in query_chunks(window):
        query = q[:, :, some]
        bias = position_logits(query, table, window, row)
        parts.append(scaled_dot_product_attention(query, k, v, attn_mask=bias, scale=1.0))
    return join(parts).transpose(1, 2).flatten(2)


def attention_weights(q: Tensor, k: Tensor, table: Tensor, window: Window, row: int) -> Tensor:
    """[batch, queries, keys] after the softmax, of scaled queries from grid row `row` on."""
    logits = position_logits(q, table, window, row).baddbmm_(q, k.transpose(1, 2))
    return logits.softmax(-1).to(q.dtype)  # autocast would leave fp32


class CpuAttention(torch.autograd.Function):
    """`attend` with its gradient written out, for training on a CPU.

    The fused CPU kernel has no gradient for its mask, and autograd over the single steps writes
    and keeps many buffers of the size of the weights. Here one is kept, or none: where queries come
    in chunks, weights are computed again.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, padding: Tensor, table: Tensor, window: Window) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in split_heads(qkv, padding, window))
        chunks = query_chunks(window)
        parts, kept = [], None
        for row, some in chunks:
            weights = attention_weights(q[:, some], k, table, window, row)
            parts.append(weights @ v)
            # Of several chunks none: together they are what chunks exist to avoid.
            kept = weights if len(chunks) == 1 else None
        attended = join(parts)
        ctx.save_for_backward(q, k, v, table, attended, kept)
        ctx.window, ctx.num_heads = window, qkv.shape[3]
        return attended.unflatten(0, (-1, ctx.num_heads)).transpose(1, 2).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, table, attended, kept = ctx.saved_tensors
        window, num_tokens = ctx.window, q.shape[1]
        grad = grad.unflatten(2, (ctx.num_heads, -1)).transpose(1, 2).flatten(0, 1)
        # The softmax wants the sum of grad_weights * weights over the keys. It equals the sum of
        # grad * output over the channels, which are fewer and lie in memory already.
        inner = (grad * attended).sum(-1, keepdim=True).neg_()
        parts, grad_k, grad_v, grad_table = [], None, None, None
        for row, some in query_chunks(window):
            query, weights = q[:, some], kept
            if weights is None:
                weights = attention_weights(query, k, table, window, row)
            grad_v = add_product(grad_v, weights.transpose(1, 2), grad[:, some])
            grad_logits = torch.baddbmm(inner[:, some], grad[:, some], v.transpose(1, 2))
            grad_logits.mul_(weights)
            products = position_gradients(query, table, grad_logits, window, row)
            parts.append((products @ table).baddbmm_(grad_logits, k))
            grad_k = add_product(grad_k, grad_logits.transpose(1, 2), query)
            grad_table = add_product(
                grad_table, products.flatten(0, 1).t()[None], query.flatten(0, 1)[None]
            )
        assert grad_k is not None and grad_v is not None and grad_table is not None
        # The table met scaled queries too and was divided by the scale, so one factor serves both.
        by_head = [
            x.unflatten(0, (-1, ctx.num_heads))
            for x in (join(parts).mul_(q.shape[-1] ** -0.5), grad_k, grad_v)
        ]
        grad_qkv = torch.stack([x[:, :, :num_tokens].transpose(1, 2) for x in by_head], 2)
        grad_padding = None
        if window.padded:
            # One padded key and value serve every window, so the windows' gradients add up.
            grad_padding = torch.stack([x[:, :, num_tokens].sum(0) for x in by_head[1:]])
        return grad_qkv, grad_padding, grad_table[0], None


def add_product(total: Tensor | None, first: Tensor, second: Tensor) -> Tensor:
    """`total` plus the batched product, in place; without a pass over zeros at the beginning."""
    return torch.bmm(first, second) if total is None else total.baddbmm_(first, second)

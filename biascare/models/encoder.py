"""SAM's image encoder with the same parameters and the same numbers, in less time and memory.

    encoder = ImageEncoder(img_size=256, embed_dim=768, depth=12, num_heads=12, ...)
    encoder.load_state_dict(sam_encoder_weights)   # segment_anything's own names
    embedding = encoder(images)                    # [S, C, h, w]

segment_anything fills incomplete windows with zero tokens and computes on them: a 16 x 16 grid in
windows of 14 becomes 28 x 28 tokens. Here tokens lie in window order from the first block to the
last and only real ones exist. What the padding does to the softmax is exact and cheap: every padded
key is the key bias, every padded value the value bias, so all of a window's padding is one more key
with a log-sum-exp for its position (`padding_logit`). The trade-off: an encoder takes images of the
one size it was built for, and its blocks take tokens in window order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, linear, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

MAX_QUERIES = 512
"""Attention to more queries runs in chunks of whole grid rows of about so many: the weights of a
chunk stay near the processor, and a 64 x 64 grid never holds its [4096, 4096] weights per head."""


class WindowGroup(NamedTuple):
    """The windows of one real shape: the inner ones, or those cut off at an edge or the corner."""

    top: int  # token row of the first window
    left: int
    down: int  # windows per column
    across: int
    rows: int  # real token rows of each window
    cols: int

    @property
    def num_tokens(self) -> int:
        """Real tokens of the group in one image."""
        return self.down * self.across * self.rows * self.cols


def window_groups(grid: tuple[int, int], window: int) -> list[WindowGroup]:
    """Cut a grid of (rows, cols) tokens into windows from the top left; at most four shapes."""

    def spans(size: int) -> list[tuple[int, int, int]]:
        full, rest = divmod(size, window)
        return [s for s in ((0, full, window), (full * window, 1, rest)) if s[1] * s[2]]

    return [
        WindowGroup(top, left, down, across, rows, cols)
        for top, down, rows in spans(grid[0])
        for left, across, cols in spans(grid[1])
    ]


class TokenLayout(NamedTuple):
    """Where the T = S * h * w tokens of a batch lie: by group, then image, then window.

    Each group is one contiguous slice, so windows are views and never copied.
    """

    grid: tuple[int, int]  # h, w
    order: Tensor  # [T] int64: raster index (image, row, col) of each token
    inverse: Tensor  # [T] int64: position of each raster index


def token_layout(
    num_images: int, grid: tuple[int, int], window: int, device: torch.device
) -> TokenLayout:
    """The layout of `num_images` grids; `window` 0 is one window as large as the grid."""
    raster = torch.arange(num_images * grid[0] * grid[1], device=device).view(num_images, *grid)
    parts = []
    for group in window_groups(grid, window or max(grid)):
        block = raster[:, group.top :, group.left :]
        block = block[:, : group.down * group.rows, : group.across * group.cols]
        windows = block.unflatten(2, (group.across, -1)).unflatten(1, (group.down, -1))
        parts.append(windows.transpose(2, 3).flatten())
    order = torch.cat(parts)
    inverse = torch.empty_like(order).scatter_(0, order, raster.flatten())
    return TokenLayout(grid=grid, order=order, inverse=inverse)


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
    torch.sum(real, -1, out=grad_row[..., : window.rows])
    torch.sum(real, -2, out=grad_col[..., : window.cols])
    if window.padded:
        by_row, by_col = position_views(q @ table.t(), window, row)
        views, scale = (by_row.float(), by_col.float()), grad_logits[..., -1:].float()
        add_padding_gradients((grad_row, grad_col), views, scale, window)
    return grad


def query_chunks(window: Window) -> list[tuple[int, slice]]:
    """(first grid row, queries) of each chunk: whole rows, about `MAX_QUERIES` tokens."""
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
    return q * q.shape[-1] ** -0.5, k, v


def join(parts: list[Tensor]) -> Tensor:
    """Chunks of queries in one tensor, without a copy where there is one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


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
        by_head = [
            x.unflatten(0, (-1, ctx.num_heads))
            for x in (join(parts).mul_(q.shape[-1] ** -0.5), grad_k, grad_v)
        ]
        grad_qkv = torch.stack([x[:, :, :num_tokens].transpose(1, 2) for x in by_head], 2)
        grad_padding = None
        if window.padded:
            grad_padding = torch.stack([x[:, :, num_tokens].sum(0) for x in by_head[1:]])
        return grad_qkv, grad_padding, grad_table[0], None


def add_product(total: Tensor | None, first: Tensor, second: Tensor) -> Tensor:
    """`total` plus the batched product, in place; without a pass over zeros at the beginning."""
    return torch.bmm(first, second) if total is None else total.baddbmm_(first, second)


class LinearWithBias(nn.Linear):
    """A linear map that also gives its bias, what it makes of a zero token.

    ZeRO-3 gathers a parameter while its own module runs, so nobody else may read it.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """`x` [T, C] -> [T, D] and the bias [D]."""
        return linear(x, self.weight, self.bias), self.bias.clone()


class RelativeAttention(nn.Module):
    """Multi-head attention inside windows, or over the whole grid (`window` 0)."""

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int], window: int):
        """`dim` C, a multiple of `num_heads`; `grid` of the tokens; `window` in tokens."""
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.qkv = LinearWithBias(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        rows, cols = (window, window) if window else grid
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * rows - 1, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * cols - 1, dim // num_heads))

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """`x` [T, C] in window order -> [T, C]."""
        qkv, bias = self.qkv(x)
        head_dim = self.rel_pos_h.shape[1]
        qkv = qkv.unflatten(1, (3, self.num_heads, head_dim))
        padding = bias.to(qkv.dtype).view(3, self.num_heads, head_dim)[1:]
        table = distance_table(self.rel_pos_h, self.rel_pos_w, head_dim**-0.5).to(qkv.dtype)
        run = self._in_windows if self.window else self._over_grid
        return self.proj(run(qkv, padding, table, layout))

    def _over_grid(
        self, qkv: Tensor, padding: Tensor, table: Tensor, layout: TokenLayout
    ) -> Tensor:
        rows, cols = layout.grid
        raster = qkv.index_select(0, layout.inverse).unflatten(0, (-1, rows * cols))
        attended = self._attend(raster, padding, table, Window(rows, rows, cols))
        return attended.flatten(0, 1).index_select(0, layout.order)

    def _in_windows(
        self, qkv: Tensor, padding: Tensor, table: Tensor, layout: TokenLayout
    ) -> Tensor:
        num_images = len(qkv) // (layout.grid[0] * layout.grid[1])
        groups = window_groups(layout.grid, self.window)
        slices = qkv.split([num_images * group.num_tokens for group in groups])
        attended = []
        for part, group in zip(slices, groups, strict=True):
            windows = part.unflatten(0, (-1, group.rows * group.cols))
            window = Window(self.window, group.rows, group.cols)
            attended.append(self._attend(windows, padding, table, window).flatten(0, 1))
        return torch.cat(attended)

    @staticmethod
    def _attend(qkv: Tensor, padding: Tensor, table: Tensor, window: Window) -> Tensor:
        by_hand = qkv.device.type == "cpu" and torch.is_grad_enabled()
        if by_hand and not torch.compiler.is_compiling():  # a compiler fuses the steps itself
            return CpuAttention.apply(qkv, padding, table, window)
        return attend(qkv, padding, table, window)


class MLP(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [T, C] -> [T, C]."""
        return self.lin2(gelu(self.lin1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, grid: tuple[int, int], window: int
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = RelativeAttention(dim, num_heads, grid, window)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """`x` [T, C] in window order -> [T, C]."""
        x = x + self.attn(self.norm1(x), layout)
        return x + self.mlp(self.norm2(x))


class PatchConv(nn.Conv2d):
    """A convolution of squares that do not overlap: one matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` [S, 3, H, W] -> [S, h, w, C]."""
        size = self.kernel_size[0]
        patches = x.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        return linear(patches.flatten(3), self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Images to tokens."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = PatchConv(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [S, 3, H, W] -> [S, h, w, C]."""
        return self.proj(x)


class GridConv(nn.Conv2d):
    """A convolution that takes and gives channels last, [S, h, w, C], as the norms want them."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` [S, h, w, C] -> [S, h, w, D]."""
        if self.kernel_size == (1, 1):
            return linear(x, self.weight.flatten(1), self.bias)
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ImageEncoder(nn.Module):
    """segment_anything's `ImageEncoderViT` for square images of one size."""

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        out_chans: int = 256,
        window_size: int = 14,
        global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11),
    ):
        """Sizes in pixels (`img_size`, `patch_size`) and tokens (`window_size`).

        Blocks of `global_attn_indexes` attend over the whole grid. Modules are built in
        segment_anything's order, so the same seed gives the same random weights.
        """
        super().__init__()
        self.img_size = img_size
        self.window_size = window_size
        self.activation_checkpointing = False
        grid = (img_size // patch_size, img_size // patch_size)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, *grid, embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                grid,
                0 if index in global_attn_indexes else window_size,
            )
            for index in range(depth)
        )
        self.neck = nn.Sequential(
            GridConv(embed_dim, out_chans, 1, bias=False),
            nn.LayerNorm(out_chans, eps=1e-6),
            GridConv(out_chans, out_chans, 3, padding=1, bias=False),
            nn.LayerNorm(out_chans, eps=1e-6),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`x` [S, 3, H, W] normalised -> [S, C, h, w].

        Raises ValueError when the images do not have the size the encoder was built for.
        """
        if x.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(
                f"images: got {x.shape[-2]} x {x.shape[-1]} pixels, expected {self.img_size} x "
                f"{self.img_size}; resize them, or build the encoder for their size"
            )
        x = self.patch_embed(x) + self.pos_embed
        shape = x.shape
        layout = token_layout(shape[0], (shape[1], shape[2]), self.window_size, x.device)
        tokens = x.flatten(0, 2).index_select(0, layout.order)
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                tokens = checkpoint(block, tokens, layout, use_reentrant=False)
            else:
                tokens = block(tokens, layout)
        x = self.neck(tokens.index_select(0, layout.inverse).view(shape))
        return x.permute(0, 3, 1, 2)

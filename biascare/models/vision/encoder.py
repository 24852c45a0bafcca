"""SAM's image encoder with the same parameters and the same numbers, in less time and memory.

    encoder = ImageEncoder(img_size=256, embed_dim=768, depth=12, num_heads=12, ...)
    encoder.load_state_dict(sam_encoder_weights)   # segment_anything's own names
    embedding = encoder(images)                    # [S, C, h, w]

segment_anything fills incomplete windows with zero tokens and computes on them: a 16 x 16 grid in
windows of 14 becomes 28 x 28 tokens. Here tokens lie in window order from the first block to the
last and only real ones exist; what padding does to the softmax is kept, exactly, by one more key
per window (`relative_attention.py`). The trade-off: an encoder takes images of the one size it was
built for, and its blocks take tokens in window order.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from biascare.models.vision.relative_attention import (
    Window,
    distance_table,
    join,
    relative_attention,
)


class WindowGroup(NamedTuple):
    """The windows of one real shape: the inner ones, or those cut off at an edge or the corner."""

    top: int  # token row of the first window
    left: int
    down: int  # windows per column
    across: int
    rows: int  # real token rows of each window
    cols: int


def window_groups(grid: tuple[int, int], window: int) -> list[WindowGroup]:
    """Cut a grid of (rows, cols) tokens into windows from the top left; at most four shapes."""
    spans = []  # (start, number of windows, tokens of each) of the whole windows and of the rest
    for size in grid:
        full, rest = divmod(size, window)
        spans.append([s for s in ((0, full, window), (full * window, 1, rest)) if s[1] * s[2]])
    return [
        WindowGroup(top, left, down, across, rows, cols)
        for top, down, rows in spans[0]
        for left, across, cols in spans[1]
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


class LinearWithBias(nn.Linear):
    """A linear map that also gives its bias, what it makes of a zero token.

    ZeRO-3 gathers a parameter while its own module runs, so nobody else may read it.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """`x` [T, C] -> [T, D] and the bias [D]."""
        # A copy: ZeRO-3 frees the gathered bias as soon as this module is done.
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
        if self.window:
            return self.proj(self._attend(x, window_groups(layout.grid, self.window), layout))
        # The whole grid is one window in reading order, so that queries of a grid row are
        # neighbours; `position_views` relies on it.
        raster = x.index_select(0, layout.inverse)
        whole = window_groups(layout.grid, max(layout.grid))
        return self.proj(self._attend(raster, whole, layout)).index_select(0, layout.order)

    def _attend(self, x: Tensor, groups: list[WindowGroup], layout: TokenLayout) -> Tensor:
        """`x` [T, C], group after group -> [T, C]."""
        qkv, bias = self.qkv(x)
        head_dim = self.rel_pos_h.shape[1]
        qkv = qkv.unflatten(1, (3, self.num_heads, head_dim))
        # A padded token is zero before the map, so its key and value are the bias; nobody reads
        # what it would ask for.
        padding = bias.to(qkv.dtype).view(3, self.num_heads, head_dim)[1:]
        table = distance_table(self.rel_pos_h, self.rel_pos_w, head_dim**-0.5).to(qkv.dtype)
        num_images = len(x) // (layout.grid[0] * layout.grid[1])
        # Windows of one shape together: at most four calls, whatever the number of windows.
        slices = qkv.split([num_images * g.down * g.across * g.rows * g.cols for g in groups])
        attended = []
        for part, group in zip(slices, groups, strict=True):
            windows = part.unflatten(0, (-1, group.rows * group.cols))
            window = Window(self.window or layout.grid[0], group.rows, group.cols)
            attended.append(relative_attention(windows, padding, table, window).flatten(0, 1))
        return join(attended)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, grid: tuple[int, int], window: int
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = RelativeAttention(dim, num_heads, grid, window)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(  # named, because checkpoints say `mlp.lin1` and `mlp.lin2`
            OrderedDict(lin1=nn.Linear(dim, hidden), act=nn.GELU(), lin2=nn.Linear(hidden, dim))
        )

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """`x` [T, C] in window order -> [T, C]."""
        x = x + self.attn(self.norm1(x), layout)
        return x + self.mlp(self.norm2(x))


class PatchConv(nn.Conv2d):
    """A convolution of squares that do not overlap: one matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` [S, 3, H, W] -> [S, h, w, C]."""
        size = self.kernel_size[0]
        # A convolution would put the channels first, and the blocks want them last.
        patches = x.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        return linear(patches.flatten(3), self.weight.flatten(1), self.bias)


class GridConv(nn.Conv2d):
    """A convolution that takes and gives channels last, [S, h, w, C], as the norms want them."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` [S, h, w, C] -> [S, h, w, D]."""
        if self.kernel_size == (1, 1):  # a matrix product needs no other order of the channels
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
        self.patch_embed = nn.Sequential(  # around one module: checkpoints say `patch_embed.proj`
            OrderedDict(proj=PatchConv(in_chans, embed_dim, patch_size, patch_size))
        )
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
        # Ordered once, because most blocks attend in windows: cutting and joining them in each
        # block would copy every token twice.
        tokens = x.flatten(0, 2).index_select(0, layout.order)
        for block in self.blocks:
            # Not in evaluation: there nothing is kept that could be computed again.
            if self.activation_checkpointing and self.training:
                tokens = checkpoint(block, tokens, layout, use_reentrant=False)
            else:
                tokens = block(tokens, layout)
        x = self.neck(tokens.index_select(0, layout.inverse).view(shape))
        return x.permute(0, 3, 1, 2)

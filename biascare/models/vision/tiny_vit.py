"""LiteMedSAM's image encoder: TinyViT without its classifier, with the checkpoint's names.

    encoder = TinyViT()
    embedding = encoder(images)     # [S, 3, H, W] in [0, 1] -> [S, 256, H / 4, W / 4]

TinyViT (Wu et al., ECCV 2022, arXiv 2207.10666): one stage of inverted bottlenecks, three of window
attention with a 3 x 3 depthwise convolution in every block. LiteMedSAM reads pixels at full
resolution and merges them twice by two.

Batch normalisation always uses the statistics of the checkpoint. A training batch holds a few
images, different ones on every rank: their statistics are noise, would make a mask depend on the
images beside it, and would drift apart between ranks. Scale and shift still train. The trade-off:
from random weights this encoder learns slowly; it is meant to start from LiteMedSAM's.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from biascare.models.buffers import Fp32Buffers


class Stage(NamedTuple):
    """One resolution of the encoder. A stage without window is convolutional."""

    dim: int
    depth: int
    num_heads: int
    window: int  # tokens per side; 0: inverted bottlenecks
    merge_stride: int  # of the step to the next stage; 0: the last


# The strides cannot be read from the kernels. They were chosen by Dice, by the fit of the stored
# statistics and by the correlation of predicted and true overlap (docs/EXPERIMENTS.md).
LITEMEDSAM = (
    Stage(64, 2, 2, 0, 2),
    Stage(128, 2, 4, 7, 2),
    Stage(160, 6, 5, 14, 1),
    Stage(320, 2, 10, 7, 0),
)
MLP_RATIO = 4
EXPANSION = 4


class FixedNorm(Fp32Buffers, nn.Module):
    """Batch normalisation by stored statistics, as the scale and shift of a convolution.

    Called without input, so that its parameters are read in its own forward: ZeRO-3 gathers them
    for that call.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.register_buffer("num_batches_tracked", torch.tensor(0))  # unused, in the checkpoint

    def forward(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, [dim] float32 each."""
        # fp32, as the statistics are kept: what is rounded here, every weight would inherit.
        scale = self.weight.float() * torch.rsqrt(self.running_var.float() + self.eps)
        return scale, self.bias.float() - self.running_mean.float() * scale


class ScaledConv2d(nn.Conv2d):
    """A convolution without bias whose output channels are scaled and shifted.

    Scaling the weights instead of the output saves one map of activations and a pass over it.
    """

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        """`x` [S, C, H, W]; `scale`, `shift` [D] float32 -> [S, D, H', W']."""
        # Multiplied in fp32 and rounded once, so that bf16 stays near the embedding of fp32.
        weight = (self.weight.float() * scale[:, None, None, None]).to(x.dtype)
        return conv2d(
            x, weight, shift.to(x.dtype), self.stride, self.padding, self.dilation, self.groups
        )


class ConvNorm(nn.Module):
    """Convolution and batch normalisation in one."""

    def __init__(self, dim: int, out_dim: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__()
        self.c = ScaledConv2d(
            dim, out_dim, kernel, stride, padding=kernel // 2, groups=groups, bias=False
        )
        self.bn = FixedNorm(out_dim)
        # The norm does not repair a wrong scale here: keep the variance of the input.
        nn.init.kaiming_normal_(self.c.weight, nonlinearity="linear")

    def forward(self, x: Tensor) -> Tensor:
        """`x` [S, C, H, W] -> [S, D, H / stride, W / stride]."""
        return self.c(x, *self.bn())


class Bottleneck(nn.Module):
    """Inverted residual bottleneck (MBConv): widen, mix 3 x 3 within channels, narrow, add."""

    def __init__(self, dim: int):
        super().__init__()
        wide = dim * EXPANSION
        self.conv1 = ConvNorm(dim, wide)
        self.conv2 = ConvNorm(wide, wide, kernel=3, groups=wide)
        self.conv3 = ConvNorm(wide, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[S, C, H, W] -> the same shape."""
        return gelu(x + self.conv3(gelu(self.conv2(gelu(self.conv1(x))))))


class Merge(nn.Module):
    """The step between stages: other width, and `stride` times fewer rows and columns."""

    def __init__(self, dim: int, out_dim: int, stride: int):
        super().__init__()
        self.conv1 = ConvNorm(dim, out_dim)
        self.conv2 = ConvNorm(out_dim, out_dim, kernel=3, stride=stride, groups=out_dim)
        self.conv3 = ConvNorm(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[S, C, H, W] -> [S, D, H / stride, W / stride]."""
        return self.conv3(gelu(self.conv2(gelu(self.conv1(x)))))


class WindowAttention(nn.Module):
    """Attention inside windows, with a learned bias per head and absolute offset."""

    def __init__(self, dim: int, num_heads: int, window: int):
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window**2))

    def position_bias(self) -> Tensor:
        """[heads, N, N] for the N = window^2 tokens of a window, in reading order.

        Entry |dy| * window + |dx| of the table belongs to all pairs that far apart.
        """
        steps = torch.arange(self.window, device=self.attention_biases.device)
        apart = (steps[:, None] - steps).abs()
        table = self.attention_biases.unflatten(1, (self.window, self.window))
        bias = table[:, apart[:, None, :, None], apart[None, :, None, :]]
        return bias.flatten(3, 4).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [n, N, C] tokens of n windows -> the same shape."""
        # The map holds query, key and value of a head together, heads after each other.
        qkv = self.qkv(self.norm(x)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=-1)
        bias = self.position_bias().to(q.dtype).expand(len(x), -1, -1, -1)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(attended.transpose(1, 2).flatten(2))


class WindowBlock(nn.Module):
    """Window attention, a depthwise convolution that joins the windows, perceptron."""

    def __init__(self, dim: int, num_heads: int, window: int):
        super().__init__()
        self.window = window
        self.attn = WindowAttention(dim, num_heads, window)
        self.local_conv = ConvNorm(dim, dim, kernel=3, groups=dim)
        self.mlp = nn.Sequential(  # named as in the checkpoint
            OrderedDict(
                norm=nn.LayerNorm(dim),
                fc1=nn.Linear(dim, MLP_RATIO * dim),
                act=nn.GELU(),
                fc2=nn.Linear(MLP_RATIO * dim, dim),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """[S, C, H, W] -> the same shape."""
        tokens = x.permute(0, 2, 3, 1)
        _, height, width, dim = tokens.shape
        side = self.window
        # Where windows reach over the edge they are filled with zeros, which take part in the
        # attention like any token: the weights were trained that way.
        padded = pad(tokens, (0, 0, 0, -width % side, 0, -height % side))
        windows = padded.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
        attended = self.attn(windows.reshape(-1, side**2, dim)).reshape(windows.shape)
        joined = attended.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        tokens = tokens + joined[:, :height, :width]
        # Without a residual around it, as the weights were trained.
        tokens = self.local_conv(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (tokens + self.mlp(tokens)).permute(0, 3, 1, 2)


class StageLayer(nn.Module):
    """Blocks of one resolution, and the step to the next."""

    def __init__(self, stage: Stage, next_dim: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            WindowBlock(stage.dim, stage.num_heads, stage.window)
            if stage.window
            else Bottleneck(stage.dim)
            for _ in range(stage.depth)
        )
        self.downsample = (
            Merge(stage.dim, next_dim, stage.merge_stride) if stage.merge_stride else None
        )

    def forward(self, x: Tensor, recompute: bool) -> Tensor:
        """[S, C, H, W] -> what the next stage reads; `recompute`: blocks store no activations."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x if self.downsample is None else self.downsample(x)


class TinyViT(nn.Module):
    """Image encoder of LiteMedSAM."""

    activation_checkpointing = False

    def __init__(self, stages: tuple[Stage, ...] = LITEMEDSAM, out_dim: int = 256):
        """`out_dim`: channels of the image embedding."""
        super().__init__()
        dim = stages[0].dim
        # Without strides, where TinyViT has two: LiteMedSAM reads pixels at full resolution.
        convolutions = nn.Sequential(ConvNorm(3, dim // 2), nn.GELU(), ConvNorm(dim // 2, dim))
        self.patch_embed = nn.Sequential(OrderedDict(seq=convolutions))
        dims = [stage.dim for stage in stages]
        self.layers = nn.ModuleList(
            StageLayer(stage, next_dim)
            for stage, next_dim in zip(stages, [*dims[1:], 0], strict=True)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(dims[-1], out_dim, 1, bias=False),
            LayerNorm2d(out_dim),
            nn.Conv2d(out_dim, out_dim, 3, padding=1, bias=False),
            LayerNorm2d(out_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`x` [S, 3, H, W] in [0, 1] -> [S, out_dim, H / 4, W / 4]."""
        recompute = self.activation_checkpointing and self.training
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x, recompute)
        return self.neck(x)

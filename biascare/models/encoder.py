"""SAM's image encoder."""

from __future__ import annotations

from segment_anything.modeling import ImageEncoderViT
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class CheckpointedEncoder(ImageEncoderViT):
    """SAM's ViT whose blocks may be recomputed in the backward pass instead of stored."""

    activation_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """`x` [S, 3, H, W] normalised -> [S, C, h, w]."""
        if not (self.activation_checkpointing and self.training):
            return super().forward(x)
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.neck(x.permute(0, 3, 1, 2))

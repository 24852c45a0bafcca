"""Vision pathway: SAM's image encoder, prompt encoder and mask decoder, for rows instead of images.

    vision = VisionPathway("sam_vit_b", image_size=256)
    embedding = vision.encode_images(images)                     # once per image
    prediction = vision.decode(embedding, row_image, prompts)    # once per row and round

The modules are segment_anything's own, so SAM, MedSAM and IMIS-Net weights carry the same names
(`models/weights` loads them). IMIS-Net adds semantic tokens and a text branch to the decoder;
LiteMedSAM has another image encoder. Three things differ from `Sam`: gradients flow; R rows share S
image embeddings; and rows may have different numbers of prompts, because padding is masked in every
attention. A row's mask is therefore the same alone and in any batch, which SAM's own padding tokens
do not give.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from biascare.choices import unknown
from biascare.interfaces import Prediction, Prompts
from biascare.models.vision.decoder import (
    MASK_HEADS,
    MaskedTwoWayTransformer,
    Multimask,
    RowMaskDecoder,
    RowPromptEncoder,
    ambiguous_rows,
)
from biascare.models.vision.encoder import ImageEncoder
from biascare.models.vision.tiny_vit import TinyViT

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
"""ImageNet statistics on the 0-255 scale, as SAM was trained with."""


class VisionArchitecture(NamedTuple):
    """Sizes of one SAM-style pathway."""

    embed_dim: int
    depth: int
    num_heads: int
    global_attn_indexes: tuple[int, ...]
    prompt_dim: int = 256
    patch_size: int = 16
    window_size: int = 14
    decoder_mlp_dim: int = 2048
    decoder_heads: int = 8
    num_semantic_tokens: int = 0  # learned prompts that stand before the user's
    text_branch: bool = False  # the text also adds to the mask itself
    encoder: Literal["vit", "tiny_vit"] = "vit"  # heads and windows of a TinyViT are its own
    pixels: Literal["imagenet", "min_max"] = "imagenet"  # what the encoder was trained to see
    multimask: Multimask = "never"  # which masks its decoder was trained to give


VISION_ARCHITECTURES = {
    "sam_vit_b": VisionArchitecture(768, 12, 12, (2, 5, 8, 11), multimask="ambiguous"),
    "sam_vit_l": VisionArchitecture(1024, 24, 16, (5, 11, 17, 23), multimask="ambiguous"),
    "sam_vit_h": VisionArchitecture(1280, 32, 16, (7, 15, 23, 31), multimask="ambiguous"),
    "imis_b": VisionArchitecture(
        768,
        12,
        12,
        (2, 5, 8, 11),
        prompt_dim=768,
        num_semantic_tokens=4,
        text_branch=True,
        multimask="always",
    ),
    "medsam": VisionArchitecture(768, 12, 12, (2, 5, 8, 11), pixels="min_max"),
    "litemedsam": VisionArchitecture(
        320, 12, 10, (), patch_size=4, encoder="tiny_vit", pixels="min_max"
    ),
    "tiny": VisionArchitecture(
        96,
        3,
        3,
        (2,),
        prompt_dim=96,
        patch_size=8,
        window_size=8,
        decoder_mlp_dim=256,
        decoder_heads=2,
    ),
}


def build_encoder(architecture: VisionArchitecture, image_size: int) -> ImageEncoder | TinyViT:
    """Image encoder for square inputs of `image_size` pixels."""
    if architecture.encoder == "tiny_vit":
        return TinyViT(out_dim=architecture.prompt_dim)
    return ImageEncoder(
        img_size=image_size,
        patch_size=architecture.patch_size,
        embed_dim=architecture.embed_dim,
        depth=architecture.depth,
        num_heads=architecture.num_heads,
        out_chans=architecture.prompt_dim,
        window_size=architecture.window_size,
        global_attn_indexes=architecture.global_attn_indexes,
    )


def normalise(images: Tensor, pixels: Literal["imagenet", "min_max"]) -> Tensor:
    """`images` [S, 3, H, W] uint8 -> float32 as an encoder was trained to see them.

    "imagenet": by the statistics of SAM's training; "min_max": every image from its own darkest to
    its own brightest value, 0 to 1 (a constant image is 0).
    """
    x = images.float()
    if pixels == "min_max":
        # Over all channels at once, as LiteMedSAM does it: one per channel would shift the colours.
        low, high = (f(x, dim=(1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
        return (x - low) / (high - low).clamp(min=1)  # grey values are whole numbers: 0 or >= 1
    mean, std = (x.new_tensor(v)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
    return (x - mean) / std


class VisionPathway(nn.Module):
    """Image encoder, prompt encoder and mask decoder of one architecture."""

    def __init__(
        self,
        architecture: str,
        image_size: int,
        activation_checkpointing: bool = False,
        multimask: Multimask | None = None,
        mask_prompt_limit: float | None = None,
    ):
        """`architecture`: a name of `VISION_ARCHITECTURES`; `image_size`: pixels, square;
        `multimask`: None as the architecture's weights were trained; `mask_prompt_limit`: the
        largest logit of a mask prompt, None for any."""
        super().__init__()
        if architecture not in VISION_ARCHITECTURES:
            raise ValueError(unknown("model.vision", architecture, VISION_ARCHITECTURES))
        sizes = VISION_ARCHITECTURES[architecture]
        if image_size < 1 or image_size % sizes.patch_size:
            nearest = max(1, round(image_size / sizes.patch_size)) * sizes.patch_size
            raise ValueError(
                f"model.image_size: got {image_size}, expected a multiple of the patches of "
                f"{architecture!r}, {sizes.patch_size} pixels; the nearest is {nearest}"
            )
        self.architecture = architecture
        self.image_size = image_size
        self.prompt_dim = sizes.prompt_dim
        self.pixels = sizes.pixels
        self.mask_prompt_limit = mask_prompt_limit
        self.reads_text = True  # False in the vision stage, which has no text
        grid = image_size // sizes.patch_size
        self.image_encoder = build_encoder(sizes, image_size)
        self.image_encoder.activation_checkpointing = activation_checkpointing
        self.prompt_encoder = RowPromptEncoder(
            sizes.prompt_dim, (grid, grid), (image_size, image_size), mask_in_chans=16
        )
        # A mask prompt first says what no mask prompt says. Only the hardest rows ever see one in
        # training, and from random weights a correction lowered the Dice of good masks
        # (docs/EXPERIMENTS.md, the demo). Pretrained weights replace this.
        with torch.no_grad():
            last = self.prompt_encoder.mask_downscaling[-1]
            nn.init.zeros_(last.weight)
            last.bias.copy_(self.prompt_encoder.no_mask_embed.weight[0])
        self.mask_decoder = RowMaskDecoder(
            transformer_dim=sizes.prompt_dim,
            transformer=MaskedTwoWayTransformer(
                2, sizes.prompt_dim, sizes.decoder_heads, sizes.decoder_mlp_dim
            ),
            num_semantic_tokens=sizes.num_semantic_tokens,
            text_branch=sizes.text_branch,
            multimask=multimask or sizes.multimask,
        )

    @property
    def multimask(self) -> Multimask:
        return self.mask_decoder.multimask

    @property
    def dtype(self) -> torch.dtype:
        return self.prompt_encoder.no_mask_embed.weight.dtype

    def encode_images(self, images: Tensor) -> Tensor:
        """`images` [S, 3, H, W] uint8 RGB -> [S, C, h, w]."""
        # Normalised in fp32 and cast after it: bf16 would round the mean 123.675 to 123.5.
        return self.image_encoder(normalise(images, self.pixels).to(self.dtype))

    def decode(
        self,
        image_embedding: Tensor,
        row_image: Tensor,
        prompts: Prompts,
        text_embedding: Tensor | None = None,
        mask_prompt: Tensor | None = None,
    ) -> Prediction:
        """Decode R rows.

        `image_embedding` [S, C, h, w]; `row_image` [R]; `text_embedding` [R, Q, C] joins the sparse
        prompts (Eq. 2), and its mean over Q is what a text branch reads; `mask_prompt` [R, 4h, 4w]
        are logits of the round before.
        """
        # Here, where training, evaluation and sessions meet: what one of them feeds back, all do.
        if mask_prompt is not None and self.mask_prompt_limit is not None:
            mask_prompt = mask_prompt.clamp(-self.mask_prompt_limit, self.mask_prompt_limit)
        sparse, token_mask, dense = self.prompt_encoder(prompts, mask_prompt)
        text = None
        if text_embedding is not None:
            # After the prompts and never masked: a row without any click still has its text.
            text_embedding = text_embedding.to(sparse.dtype)
            text = text_embedding.mean(1)
            sparse = torch.cat([sparse, text_embedding], 1)
            token_mask = pad(token_mask, (0, text_embedding.shape[1]), value=True)
        low_res_logits, predicted_dice = self.mask_decoder(
            image_embedding,
            row_image,
            self.prompt_encoder.dense_pe(sparse.dtype),
            sparse,
            token_mask,
            dense,
            ambiguous_rows(prompts),
            text,
        )
        # fp32 before the interpolation: the sign near zero decides where a mask ends.
        size = (self.image_size, self.image_size)
        mask_logits = interpolate(low_res_logits[:, None].float(), size=size, mode="bilinear")
        return Prediction(
            mask_logits=mask_logits[:, 0],
            low_res_logits=low_res_logits,
            predicted_dice=predicted_dice.float(),  # ranks cases; bf16 has 0.004 steps near 1
        )

    def unused_parameters(self) -> list[nn.Parameter]:
        """Heads of masks that `multimask` never takes, kept for SAM's checkpoints, and the text
        branch of a pathway that is trained without text (`reads_text`)."""
        # Named so that they stay out of the optimizer: they would never get a gradient.
        heads = enumerate(self.mask_decoder.output_hypernetworks_mlps)
        idle: list[nn.Module] = [head for i, head in heads if i not in MASK_HEADS[self.multimask]]
        if self.mask_decoder.text_output is not None and not self.reads_text:
            idle.append(self.mask_decoder.text_output)
        return [p for module in idle for p in module.parameters()]

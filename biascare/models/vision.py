"""Vision pathway: SAM's image encoder, prompt encoder and mask decoder, for rows instead of images.

    vision = VisionPathway("sam_vit_b", image_size=256)
    embedding = vision.encode_images(images)                     # once per image
    prediction = vision.decode(embedding, row_image, prompts)    # once per row and round

The modules are segment_anything's own, so SAM, MedSAM and IMIS-Net weights carry the same names.
Three things differ from `Sam`: gradients flow; R rows share S image embeddings; and rows may have
different numbers of prompts, because padding is masked in every attention. A row's mask is
therefore the same alone and in any batch, which SAM's own padding tokens do not give.
"""

from __future__ import annotations

import difflib
from functools import partial
from typing import Any, NamedTuple

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention

from biascare.interfaces import (
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    POINT_PADDING,
    Prediction,
    Prompts,
)
from biascare.models.encoder import CheckpointedEncoder

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


VISION_ARCHITECTURES = {
    "sam_vit_b": VisionArchitecture(768, 12, 12, (2, 5, 8, 11)),
    "sam_vit_l": VisionArchitecture(1024, 24, 16, (5, 11, 17, 23)),
    "sam_vit_h": VisionArchitecture(1280, 32, 16, (7, 15, 23, 31)),
    "imis_b": VisionArchitecture(768, 12, 12, (2, 5, 8, 11), prompt_dim=768),
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


class MaskedAttention(Attention):
    """segment_anything's attention with fused kernels and an optional key mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """`q` [R, Nq, C], `k` and `v` [R, Nk, C], `key_mask` [R, Nk] bool, True to attend."""
        q, k, v = (
            self._separate_heads(projection(x), self.num_heads)
            for projection, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        mask = None if key_mask is None else key_mask[:, None, None, :]
        return self.out_proj(
            self._recombine_heads(scaled_dot_product_attention(q, k, v, attn_mask=mask))
        )


class MaskedTwoWayBlock(TwoWayAttentionBlock):
    """Two-way block whose prompt tokens may be padding."""

    def __init__(self, embedding_dim: int, num_heads: int, mlp_dim: int, skip_first_layer_pe: bool):
        super().__init__(embedding_dim, num_heads, mlp_dim, skip_first_layer_pe=skip_first_layer_pe)
        self.self_attn = MaskedAttention(embedding_dim, num_heads)
        self.cross_attn_token_to_image = MaskedAttention(embedding_dim, num_heads, 2)
        self.cross_attn_image_to_token = MaskedAttention(embedding_dim, num_heads, 2)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        query_pe: Tensor,
        key_pe: Tensor,
        token_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`queries` [R, N, C] prompt tokens, `keys` [R, h*w, C] image, `token_mask` [R, N] bool."""
        if self.skip_first_layer_pe:
            queries = self.self_attn(queries, queries, queries, token_mask)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q, q, queries, token_mask)
        queries = self.norm1(queries)
        attended = self.cross_attn_token_to_image(queries + query_pe, keys + key_pe, keys)
        queries = self.norm2(queries + attended)
        queries = self.norm3(queries + self.mlp(queries))
        attended = self.cross_attn_image_to_token(
            keys + key_pe, queries + query_pe, queries, token_mask
        )
        return queries, self.norm4(keys + attended)


class MaskedTwoWayTransformer(TwoWayTransformer):
    """SAM's decoder transformer with a mask over prompt tokens; same parameter names."""

    def __init__(self, depth: int, embedding_dim: int, num_heads: int, mlp_dim: int):
        super().__init__(depth, embedding_dim, num_heads, mlp_dim)
        self.layers = nn.ModuleList(
            MaskedTwoWayBlock(embedding_dim, num_heads, mlp_dim, skip_first_layer_pe=i == 0)
            for i in range(depth)
        )
        self.final_attn_token_to_image = MaskedAttention(embedding_dim, num_heads, 2)

    def forward(
        self,
        image_embedding: Tensor,
        image_pe: Tensor,
        point_embedding: Tensor,
        token_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`image_embedding` [R, C, h, w], `point_embedding` [R, N, C] -> tokens, [R, h*w, C]."""
        keys = image_embedding.flatten(2).transpose(1, 2)
        key_pe = image_pe.flatten(2).transpose(1, 2)
        queries = point_embedding
        for layer in self.layers:
            queries, keys = layer(queries, keys, point_embedding, key_pe, token_mask)
        attended = self.final_attn_token_to_image(queries + point_embedding, keys + key_pe, keys)
        return self.norm_final_attn(queries + attended), keys


class RowPromptEncoder(PromptEncoder):
    """SAM's prompt encoder for rows with different numbers and kinds of prompts."""

    def _apply(self, fn: Any, recurse: bool = True) -> RowPromptEncoder:
        """Keep the Fourier frequencies in fp32: bf16 would move a click by up to a pixel."""
        frequencies = self.pe_layer.positional_encoding_gaussian_matrix
        super()._apply(fn, recurse)
        moved = self.pe_layer.positional_encoding_gaussian_matrix
        if frequencies.is_meta or moved.is_meta:  # no values to keep
            self.pe_layer.positional_encoding_gaussian_matrix = moved.float()
        else:
            self.pe_layer.positional_encoding_gaussian_matrix = frequencies.to(moved.device)
        return self

    @staticmethod
    def _weight(embedding: nn.Embedding) -> Tensor:
        """[1, C] by the module's own forward, which is what ZeRO-3 gathers parameters for."""
        return embedding(torch.zeros(1, dtype=torch.long, device=embedding.weight.device))

    def dense_pe(self, dtype: torch.dtype) -> Tensor:
        """[1, C, h, w] position of every cell of the image embedding."""
        return self.pe_layer(self.image_embedding_size).unsqueeze(0).to(dtype)

    def forward(
        self, prompts: Prompts, mask_prompt: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embed prompts.

        `mask_prompt` [R, 4h, 4w] are the previous round's low-resolution logits.
        Returns sparse [R, N + 1, C], its mask [R, N + 1] (True on real tokens), dense [R, C, h, w].
        As in SAM, a row with clicks and no box carries one extra "not a point" token; padding
        clicks carry none.
        """
        labels = pad(prompts.point_labels, (0, 1), value=POINT_PADDING)
        coords = pad(prompts.point_coords.float() + 0.5, (0, 0, 0, 1))
        is_point = (labels == 0) | (labels == 1)
        is_box = (labels == BOX_TOP_LEFT) | (labels == BOX_BOTTOM_RIGHT)
        token_mask = is_point | is_box
        token_mask[:, -1] = is_point.any(1) & ~is_box.any(1)

        position = self.pe_layer.forward_with_coords(coords, self.input_image_size)
        tables = [self._weight(e) for e in (*self.point_embeddings, self.not_a_point_embed)]
        kind = torch.cat(tables)[torch.where(labels < 0, len(tables) - 1, labels)]
        sparse = kind + (position * (labels >= 0)[..., None]).to(kind.dtype)
        return sparse, token_mask, self._dense(labels.shape[0], mask_prompt)

    def _dense(self, num_rows: int, mask_prompt: Tensor | None) -> Tensor:
        absent = self._weight(self.no_mask_embed)
        if mask_prompt is None:
            return absent.reshape(1, -1, 1, 1).expand(num_rows, -1, *self.image_embedding_size)
        return self._embed_masks(mask_prompt.unsqueeze(1).to(absent.dtype))


class RowMaskDecoder(MaskDecoder):
    """SAM's mask decoder: one mask per row, rows share image embeddings."""

    def forward(
        self,
        image_embedding: Tensor,
        row_image: Tensor,
        image_pe: Tensor,
        sparse: Tensor,
        token_mask: Tensor,
        dense: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`image_embedding` [S, C, h, w], `row_image` [R], `sparse` [R, N, C], `token_mask` [R, N].

        Returns low-resolution logits [R, 4h, 4w] and the quality estimate [R].
        """
        num_rows = sparse.shape[0]
        index = torch.arange(self.num_mask_tokens, device=sparse.device)
        output_tokens = torch.cat([self.iou_token(index[:1]), self.mask_tokens(index)])
        tokens = torch.cat([output_tokens.expand(num_rows, -1, -1), sparse], 1)
        token_mask = pad(token_mask, (len(output_tokens), 0), value=True)
        source = image_embedding[row_image] + dense
        tokens, keys = self.transformer(source, image_pe, tokens, token_mask)
        upscaled = self.output_upscaling(keys.transpose(1, 2).reshape(source.shape))
        kernel = self.output_hypernetworks_mlps[0](tokens[:, 1])
        low_res_logits = torch.einsum("rc,rchw->rhw", kernel, upscaled)
        return low_res_logits, self.iou_prediction_head(tokens[:, 0])[:, 0]


def build_encoder(architecture: VisionArchitecture, image_size: int) -> CheckpointedEncoder:
    """SAM's ViT for square inputs of `image_size` pixels."""
    return CheckpointedEncoder(
        img_size=image_size,
        patch_size=architecture.patch_size,
        embed_dim=architecture.embed_dim,
        depth=architecture.depth,
        num_heads=architecture.num_heads,
        mlp_ratio=4,
        out_chans=architecture.prompt_dim,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=architecture.window_size,
        global_attn_indexes=architecture.global_attn_indexes,
    )


def _architecture(name: str) -> VisionArchitecture:
    if name in VISION_ARCHITECTURES:
        return VISION_ARCHITECTURES[name]
    near = difflib.get_close_matches(name, VISION_ARCHITECTURES, n=1, cutoff=0)[0]
    raise ValueError(
        f"model.vision: got {name!r}, expected one of {', '.join(VISION_ARCHITECTURES)}; "
        f"did you mean {near!r}?"
    )


class VisionPathway(nn.Module):
    """Image encoder, prompt encoder and mask decoder of one architecture."""

    def __init__(self, architecture: str, image_size: int, activation_checkpointing: bool = False):
        """`architecture`: a name of `VISION_ARCHITECTURES`; `image_size`: pixels, square."""
        super().__init__()
        sizes = _architecture(architecture)
        if image_size < 1 or image_size % sizes.patch_size:
            nearest = max(1, round(image_size / sizes.patch_size)) * sizes.patch_size
            raise ValueError(
                f"model.image_size: got {image_size}, expected a multiple of the patches of "
                f"{architecture!r}, {sizes.patch_size} pixels; the nearest is {nearest}"
            )
        self.architecture = architecture
        self.image_size = image_size
        self.prompt_dim = sizes.prompt_dim
        grid = image_size // sizes.patch_size
        self.image_encoder = build_encoder(sizes, image_size)
        self.image_encoder.activation_checkpointing = activation_checkpointing
        self.prompt_encoder = RowPromptEncoder(
            sizes.prompt_dim, (grid, grid), (image_size, image_size), mask_in_chans=16
        )
        self._silence_mask_prompt()
        self.mask_decoder = RowMaskDecoder(
            transformer_dim=sizes.prompt_dim,
            transformer=MaskedTwoWayTransformer(
                2, sizes.prompt_dim, sizes.decoder_heads, sizes.decoder_mlp_dim
            ),
        )

    @torch.no_grad()
    def _silence_mask_prompt(self) -> None:
        """Start with mask prompts that say what no mask prompt says.

        Only the hardest rows ever see one in training; from random weights it would first of all
        disturb the rows whose mask was good. Pretrained weights replace this.
        """
        last = self.prompt_encoder.mask_downscaling[-1]
        nn.init.zeros_(last.weight)
        last.bias.copy_(self.prompt_encoder.no_mask_embed.weight[0])

    @property
    def dtype(self) -> torch.dtype:
        return self.image_encoder.patch_embed.proj.weight.dtype

    def encode_images(self, images: Tensor) -> Tensor:
        """`images` [S, 3, H, W] uint8 RGB -> [S, C, h, w]."""
        mean, std = (images.new_tensor(v, dtype=torch.float32) for v in (PIXEL_MEAN, PIXEL_STD))
        x = (images.float() - mean[:, None, None]) / std[:, None, None]
        return self.image_encoder(x.to(self.dtype))

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
        prompts (Eq. 2); `mask_prompt` [R, 4h, 4w] are logits of the round before.
        """
        sparse, token_mask, dense = self.prompt_encoder(prompts, mask_prompt)
        if text_embedding is not None:
            sparse = torch.cat([sparse, text_embedding.to(sparse.dtype)], 1)
            token_mask = pad(token_mask, (0, text_embedding.shape[1]), value=True)
        low_res_logits, predicted_dice = self.mask_decoder(
            image_embedding,
            row_image,
            self.prompt_encoder.dense_pe(sparse.dtype),
            sparse,
            token_mask,
            dense,
        )
        return Prediction(
            mask_logits=self.resize_logits(low_res_logits, self.image_size),
            low_res_logits=low_res_logits,
            predicted_dice=predicted_dice.float(),
        )

    @staticmethod
    def resize_logits(logits: Tensor, size: int) -> Tensor:
        """[R, h, w] -> [R, size, size] fp32, bilinear."""
        resized = interpolate(logits[:, None].float(), size=(size, size), mode="bilinear")
        return resized[:, 0]

    def unused_parameters(self) -> list[nn.Parameter]:
        """Heads of SAM's three alternative masks: kept for its checkpoints, never run here."""
        heads = self.mask_decoder.output_hypernetworks_mlps
        return [p for head in list(heads)[1:] for p in head.parameters()]

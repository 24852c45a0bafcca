"""SAM's prompt encoder and mask decoder for rows: one mask per row, rows share image embeddings.

    sparse, token_mask, dense = prompt_encoder(prompts)
    low_res_logits, quality = mask_decoder(
        image_embedding, row_image, image_pe, sparse, token_mask, dense, ambiguous
    )

Parameter names and numbers are segment_anything's; tokens that are padding are masked in every
attention. Of SAM's four masks per prompt a row gets one: the quality head chooses among those that
the row may take, before any is drawn. The trade-off: the other candidates are not to be had.
"""

from __future__ import annotations

from typing import Literal

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from biascare.interfaces import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, POINT_PADDING, Prompts
from biascare.models.buffers import Fp32Buffers

Multimask = Literal["never", "ambiguous", "always"]
"""When a row's mask is the best of SAM's masks 1 to 3: SAM itself asks for them where a prompt
leaves open what is meant, and for mask 0 elsewhere."""

MASK_HEADS: dict[Multimask, tuple[int, ...]] = {
    "never": (0,),
    "ambiguous": (0, 1, 2, 3),
    "always": (1, 2, 3),
}
"""Of the four masks, those that a decoder ever takes."""


def ambiguous_rows(prompts: Prompts) -> Tensor:
    """[R] bool: rows with at most one click, or a box alone. The rule of segment_anything's own
    ONNX export, which counts the corners of a box and one padding point where there is none."""
    labels = prompts.point_labels
    clicks = ((labels == 0) | (labels == 1)).sum(1)
    return clicks + (labels == BOX_TOP_LEFT).any(1) <= 1


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
        # In place of those that the parent built: SAM's weights find them under the same names.
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
        if self.skip_first_layer_pe:  # the first block's queries are their own position encoding
            queries = self.self_attn(queries, queries, queries, token_mask)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q, q, queries, token_mask)
        queries = self.norm1(queries)
        # No mask here: the keys are image tokens, and all of them are real. What a padding token
        # gathers is never read, because it is a masked key in every other attention.
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


class RowPromptEncoder(Fp32Buffers, PromptEncoder):
    """SAM's prompt encoder for rows with different numbers and kinds of prompts.

    The Fourier frequencies stay in fp32: bf16 would move a click by up to a pixel.
    """

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
        # One slot more for every row, so that rows with and without a box have the same shape; the
        # token mask decides which rows use it.
        labels = pad(prompts.point_labels, (0, 1), value=POINT_PADDING)
        # Integers stand at pixel centres here, and SAM counts from a pixel's corner. In fp32,
        # because bf16 knows only whole pixels above 128.
        coords = pad(prompts.point_coords.float() + 0.5, (0, 0, 0, 1))
        is_point = (labels == 0) | (labels == 1)
        is_box = (labels == BOX_TOP_LEFT) | (labels == BOX_BOTTOM_RIGHT)
        token_mask = is_point | is_box
        token_mask[:, -1] = is_point.any(1) & ~is_box.any(1)

        position = self.pe_layer.forward_with_coords(coords, self.input_image_size)
        # Looked up in one table instead of assigned by label: no step waits for the device to say
        # which labels there are, and every embedding is read, and gathered, on every rank.
        tables = [self._weight(e) for e in (*self.point_embeddings, self.not_a_point_embed)]
        kind = torch.cat(tables)[torch.where(labels < 0, len(tables) - 1, labels)]
        # As in SAM, "not a point" has no position: the coordinates of padding must not matter.
        sparse = kind + (position * (labels >= 0)[..., None]).to(kind.dtype)
        dense = self._weight(self.no_mask_embed)
        if mask_prompt is None:
            size = self.image_embedding_size
            dense = dense.reshape(1, -1, 1, 1).expand(len(labels), -1, *size)
        else:
            dense = self._embed_masks(mask_prompt.unsqueeze(1).to(dense.dtype))
        return sparse, token_mask, dense


class RowMaskDecoder(MaskDecoder):
    """SAM's mask decoder: one mask per row, rows share image embeddings.

    IMIS-Net's two additions are optional. Semantic tokens act as further prompts of every row. The
    text branch adds the product of projected text and upscaled image to the mask logits; in
    IMIS-Net the text comes from CLIP, here from the language model, so that the branch starts at
    zero: it changes no mask until it has learned to.
    """

    def __init__(
        self,
        *,
        transformer_dim: int,
        transformer: nn.Module,
        num_semantic_tokens: int = 0,
        text_branch: bool = False,
        multimask: Multimask = "never",
    ):
        super().__init__(transformer_dim=transformer_dim, transformer=transformer)
        self.multimask = multimask
        self.semantic_tokens = self.text_output = None
        if num_semantic_tokens:
            self.semantic_tokens = nn.Embedding(num_semantic_tokens, transformer_dim)
        if text_branch:
            self.text_output = nn.Linear(transformer_dim, transformer_dim // 8)
            # Its weights were trained on CLIP's text and mean nothing for ours (class docstring).
            nn.init.zeros_(self.text_output.weight)
            nn.init.zeros_(self.text_output.bias)

    def forward(
        self,
        image_embedding: Tensor,
        row_image: Tensor,
        image_pe: Tensor,
        sparse: Tensor,
        token_mask: Tensor,
        dense: Tensor,
        ambiguous: Tensor,
        text: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`image_embedding` [S, C, h, w], `row_image` [R], `sparse` [R, N, C], `token_mask` [R, N].

        `ambiguous` [R] bool (see `ambiguous_rows`) matters where `multimask` asks for it; `text`
        [R, C] is read by the text branch, if there is one. Returns low-resolution logits
        [R, 4h, 4w] and the quality estimate [R] of the same mask.
        """
        index = torch.arange(self.num_mask_tokens, device=sparse.device)
        # Embeddings are called and not read: ZeRO-3 gathers a parameter for its own module's call.
        # All mask tokens take part although one mask is decoded: the weights were trained with all.
        own = [self.iou_token(index[:1]), self.mask_tokens(index)]
        if self.semantic_tokens is not None:
            semantic = torch.arange(self.semantic_tokens.num_embeddings, device=sparse.device)
            own.append(self.semantic_tokens(semantic))
        own_tokens = torch.cat(own)
        tokens = torch.cat([own_tokens.expand(sparse.shape[0], -1, -1), sparse], 1)
        token_mask = pad(token_mask, (len(own_tokens), 0), value=True)
        # By index, where SAM repeats its one image: each image may have any number of rows.
        source = image_embedding[row_image] + dense
        tokens, keys = self.transformer(source, image_pe, tokens, token_mask)
        upscaled = self.output_upscaling(keys.transpose(1, 2).reshape(source.shape))
        heads = MASK_HEADS[self.multimask]
        kernels = [self.output_hypernetworks_mlps[i](tokens[:, 1 + i]) for i in heads]
        quality = self.iou_prediction_head(tokens[:, 0])[:, heads[0] : heads[-1] + 1]
        # Chosen by kernel: one mask per row is drawn, whatever the number of candidates.
        chosen = self._best(quality, ambiguous)
        rows = torch.arange(len(quality), device=quality.device)
        kernel = torch.stack(kernels, 1)[rows, chosen]
        if self.text_output is not None and text is not None:
            kernel = kernel + self.text_output(text)  # the sum of two products with one map
        low_res_logits = torch.einsum("rc,rchw->rhw", kernel, upscaled)
        return low_res_logits, quality[rows, chosen]

    def _best(self, quality: Tensor, ambiguous: Tensor) -> Tensor:
        """[R] place in `MASK_HEADS` of the mask that each row takes; a choice has no gradient."""
        quality = quality.detach().float()
        if self.multimask == "ambiguous":
            # Mask 0 where the prompts leave no doubt, one of the others where they do.
            is_first = torch.arange(quality.shape[1], device=quality.device) == 0
            quality = quality.masked_fill(is_first == ambiguous[:, None], float("-inf"))
        return quality.argmax(1)

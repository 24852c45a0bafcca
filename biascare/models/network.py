"""The network: an adapted multimodal LLM and a SAM-style pathway, joined by query attention.

    network = open_network("outputs/run/export")         # biascare.models.export_folder
    features = network.encode(batch)                     # every image and sentence once
    prediction = network.decode_masks(features, batch.prompts, batch.row_image)

What a person asks of it in words and pixels is `biascare.BiasCareVL`, which holds one of these.

`encode` holds all expensive work; clicks only decode. The query attends to prompt tokens alone:
with the answer in sight (it is teacher-forced in training) the pooled token would leak the label.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from biascare.choices import unknown
from biascare.interfaces import Batch, Features, Prediction, Prompts
from biascare.models.label_head import LabelHead
from biascare.models.language.pathway import MLLMPathway
from biascare.models.query_attention import CrossModalQueryAttention
from biascare.models.vision.pathway import VisionPathway


class Part(NamedTuple):
    """What trains, freezes and is exported as one."""

    name: str  # as in train.trainable
    parameters: Callable[[DualPathNetwork], list[nn.Parameter]]
    pathway: str  # whose learning rate it trains at
    exported: bool  # frozen too; the others stand in the base model's own files until they train


class DualPathNetwork(nn.Module):
    """The dual-path model. Without `mllm` it is the vision pathway alone (stage 1)."""

    def __init__(
        self,
        vision: VisionPathway,
        mllm: MLLMPathway | None = None,
        query_attention: CrossModalQueryAttention | None = None,
        label_head: LabelHead | None = None,
    ):
        super().__init__()
        if (mllm is None) != (query_attention is None):
            raise ValueError("an MLLM pathway and its query attention come together or not at all")
        self.vision = vision
        self.mllm = mllm
        self.query_attention = query_attention
        self.label_head = label_head

    @property
    def device(self) -> torch.device:
        return next(self.vision.parameters()).device

    def encode(self, batch: Batch) -> Features:
        """Everything that is computed once: image embeddings, hidden states, pooled text.

        The image encoder runs for the images of segmentation rows only; the query attention for
        the sequences of segmentation rows only.
        """
        image_embedding = hidden_states = text_embedding = None
        # Batches without masks have no images here: a question costs the segmentation pathway
        # nothing.
        if batch.images is not None:
            image_embedding = self.vision.encode_images(batch.images)
        if self.mllm is not None and self.query_attention is not None and batch.mllm_inputs:
            hidden_states = self.mllm.hidden_states(batch.mllm_inputs, batch.image_slots)
            if batch.row_sequence is not None:
                assert batch.prompt_mask is not None
                # Questions are not pooled: nothing would read it.
                text_embedding = self.query_attention(
                    hidden_states[batch.row_sequence], batch.prompt_mask[batch.row_sequence]
                )
        return Features(
            image_embedding=image_embedding,
            text_embedding=text_embedding,
            hidden_states=hidden_states,
        )

    def decode_masks(
        self,
        features: Features,
        prompts: Prompts,
        row_image: Tensor,
        *,
        rows: Tensor | None = None,
        mask_prompt: Tensor | None = None,
    ) -> Prediction:
        """Masks of R rows, or of the chosen `rows` [k] of them.

        `prompts` and `mask_prompt` [., 4h, 4w] belong to the rows decoded; `row_image` [R] and the
        text embedding to all of them.
        """
        assert features.image_embedding is not None, "these features were encoded without an image"
        text = features.text_embedding
        if rows is not None:
            row_image = row_image[rows]
            text = None if text is None else text[rows]
        return self.vision.decode(features.image_embedding, row_image, prompts, text, mask_prompt)

    def label_logits(self, features: Features) -> tuple[Tensor, bool]:
        """([S, K] logits of the label head, whether exactly one label holds)."""
        assert self.label_head is not None and features.image_embedding is not None
        return self.label_head(features.image_embedding), self.label_head.exclusive

    def forward(self, batch: Batch) -> tuple[Features, Prediction | None]:
        """Encode, and decode the batch's own prompts where there are images."""
        features = self.encode(batch)
        if batch.prompts is None or batch.row_image is None:
            return features, None
        return features, self.decode_masks(features, batch.prompts, batch.row_image)

    def part_parameters(self, part: str) -> list[nn.Parameter]:
        """Parameters of one of `PARTS`, by its name; empty where the model lacks the part.

        Parameters that no computation here reads belong to no part.
        """
        known = {row.name: row for row in PARTS}
        if part not in known:
            raise ValueError(unknown("part", part, known))
        return known[part].parameters(self)

    def pathway_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of all parts by the pathway whose learning rate they train at."""
        return {
            pathway: [p for part in PARTS if part.pathway == pathway for p in part.parameters(self)]
            for pathway in ("vision", "mllm")
        }

    def set_trainable(self, parts: dict[str, bool]) -> None:
        """Freeze everything, then thaw the named parts."""
        # Everything first, so that what no part names (frozen base, unused heads) stays frozen.
        self.requires_grad_(False)
        for part, trainable in parts.items():
            for parameter in self.part_parameters(part):
                parameter.requires_grad_(trainable)

    def exported_parameters(self) -> set[str]:
        """Names of the parameters that an export holds: all but what the base model's own files
        hold just as well."""
        ours = {id(p) for part in PARTS if part.exported for p in part.parameters(self)}
        base = {id(p) for p in self.mllm.parameters()} - ours if self.mllm is not None else set()
        named = self.named_parameters(remove_duplicate=False)
        return {name for name, p in named if p.requires_grad or id(p) not in base}


def _vision_part(network: DualPathNetwork, module: nn.Module) -> list[nn.Parameter]:
    # A trainable parameter that never gets a gradient would stop DeepSpeed's reduction.
    unused = {id(p) for p in network.vision.unused_parameters()}
    return [p for p in module.parameters() if id(p) not in unused]


PARTS = (
    Part("lora", lambda n: n.mllm.adapter_parameters() if n.mllm else [], "mllm", exported=True),
    Part(
        "vision_encoder",
        lambda n: _vision_part(n, n.vision.image_encoder),
        "vision",
        exported=True,
    ),
    Part(
        "prompt_encoder",
        lambda n: _vision_part(n, n.vision.prompt_encoder),
        "vision",
        exported=True,
    ),
    Part(
        "mask_decoder",
        lambda n: _vision_part(n, n.vision.mask_decoder),
        "vision",
        exported=True,
    ),
    Part(
        "query_attention",
        lambda n: list(n.query_attention.parameters()) if n.query_attention else [],
        "vision",
        exported=True,
    ),
    Part(
        "label_head",
        lambda n: list(n.label_head.parameters()) if n.label_head else [],
        "vision",
        exported=True,
    ),
    Part(
        "mllm_vision_tower",
        lambda n: n.mllm.vision_tower_parameters() if n.mllm else [],
        "mllm",
        exported=False,
    ),
    Part(
        "embeddings",
        lambda n: n.mllm.embedding_parameters() if n.mllm else [],
        "mllm",
        exported=False,
    ),
)
"""Everything that can be trained; `train.trainable` has a key for each."""

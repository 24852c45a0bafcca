"""The nouns that cross packages, and the shape legend they are written in.

All of them are NamedTuples: DeepSpeed's ZeRO-3 hooks walk tensors, tuples, lists and dicts, not
dataclasses.

Shape legend
    B  sequences of the multimodal LLM in a micro-batch, segmentation rows before language rows
    L  tokens of the longest sequence, padding included
    S  distinct images that carry masks
    R  rows of the segmentation pathway, one per (image, target)
    N  prompt points of a row, padding included
    K  labels of a label head
    Q  pooled query tokens per sequence (``num_queries``)
    T  supervised answer tokens of a micro-batch
    C  prompt dimension of the segmentation backbone
    d  hidden size of the language model
    H, W  model input size in pixels; h, w  size of the image embedding grid
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token without language loss."""

POINT_NEGATIVE, POINT_POSITIVE, POINT_PADDING = 0, 1, -1
"""Click labels of SAM: outside the target, inside it, no click."""

BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = 2, 3
"""A box is two more points with these labels, as in SAM's exported prompt encoder."""


class Prompts(NamedTuple):
    """Visual prompts of R rows. A row without any real point is prompted by text alone."""

    point_coords: Tensor  # [R, N, 2] float32, x then y, pixels of the H x W model input
    point_labels: Tensor  # [R, N] int64: 1, 0, -1 padding, 2 and 3 the corners of a box


class Facts(NamedTuple):
    """What is known of one sequence beside its tensors: what training logs by and cases keep.

    Missing attributes are None, never left out.
    """

    image_id: str  # the record's
    task: str  # segmentation | language
    kind: str  # of the question: closed | open | choice | report; of a mask: segmentation
    target: str | None  # the structure to segment; None for a question
    prevalence: str | None  # head | medium | tail | unseen; None for a question
    source: str
    split: str
    modality: str
    anatomy: str
    patient_id: str | None
    sex: str | None
    age: float | None  # years
    race: str | None


class Sample(NamedTuple):
    """One item of the stream: an image with K of its targets, or an image with one question.

    A segmentation sample has K sequences (one instruction per target); a language sample has one.
    """

    sequences: list[dict[str, Any]]  # per sequence: see `biascare.data.chat.build_sequence`
    image: Tensor | None  # [3, H, W] uint8 for segmentation, None for language
    masks: Tensor | None  # [K, H, W] uint8 in {0, 1}, None for language
    point_coords: Tensor | None  # [K, N, 2] float32
    point_labels: Tensor | None  # [K, N] int64
    facts: list[Facts]  # per sequence
    labels: Tensor | None = None  # [K] float32 in the labels stage: 1, 0, NaN where not judged
    position: int | None = None  # in the training stream; None where nothing is drawn
    replaced: tuple[str, ...] = ()  # why samples before this one could not be used


class Batch(NamedTuple):
    """One micro-batch. `images`, `masks` and `prompts` hold segmentation rows only."""

    images: Tensor | None  # [S, 3, H, W] uint8
    row_image: Tensor | None  # [R] int64 into images
    row_sequence: Tensor | None  # [R] int64 into the sequences; None when there is no LLM
    row_target: Tensor | None  # [R] int64, equal for rows that show the same target name
    masks: Tensor | None  # [R, H, W] uint8
    prompts: Prompts | None
    mllm_inputs: dict[str, Tensor]  # input_ids [B, L], attention_mask, pixel_values, ...; may be {}
    image_slots: list[int]  # per image placeholder, in order: which image of pixel_values it shows
    prompt_mask: Tensor | None  # [B, L] bool, True on prompt tokens (never answers or padding)
    answer_positions: Tensor | None  # [T] int64, flat into B*L: the token before each answer
    answer_tokens: Tensor | None  # [T] int64, the answer tokens themselves
    seed: int  # of this micro-batch: every random choice inside the step derives from it
    facts: list[Facts]  # one per sequence, segmentation rows first
    replaced: dict[int, tuple[str, ...]]  # stream position -> why its own samples were unusable
    num_samples: int  # items of the stream in it
    labels: Tensor | None = None  # [S, K] float32 in the labels stage: 1, 0, NaN where not judged


class Features(NamedTuple):
    """What is computed once per image and per sequence, before any mask is decoded."""

    image_embedding: Tensor | None  # [S, C, h, w]
    text_embedding: Tensor | None  # [R, Q, C], Eq. 2, one per segmentation row
    hidden_states: Tensor | None  # [B, L, d], last layer after the final norm


class Prediction(NamedTuple):
    """Masks of R rows."""

    mask_logits: Tensor  # [R, H, W] at the model input size
    low_res_logits: Tensor  # [R, 4h, 4w], the decoder's own size; fed back as mask prompt
    predicted_dice: Tensor  # [R], the quality head's estimate


class Generated(NamedTuple):
    """What a language model said to B prompts."""

    tokens: Tensor  # [B, T] int64
    log_probs: Tensor  # [B, T] fp32, of the full vocabulary at temperature 1
    spoken: Tensor  # [B, T] bool: up to and with the end token; padding follows
    first_log_probs: Tensor  # [B, V] fp32, of the token after the prompt, before any penalty
    cache: Any  # keys and values of the L prompt tokens and of all generated ones but the last


class AnswerHead(Protocol):
    """The language side of a model."""

    def answer_logits(self, hidden_states: Tensor, answer_positions: Tensor) -> Tensor:
        """Next-token logits [T, V] at flat positions [T] of hidden states [B, L, d]."""
        ...


class DualPathModel(Protocol):
    """What training, evaluation and sessions need of a network; `DualPathNetwork` provides it."""

    @property
    def mllm(self) -> AnswerHead | None: ...

    @property
    def device(self) -> torch.device: ...

    def eval(self) -> Any: ...

    def encode(self, batch: Batch) -> Features: ...

    def decode_masks(
        self,
        features: Features,
        prompts: Prompts,
        row_image: Tensor,
        *,
        rows: Tensor | None = None,
        mask_prompt: Tensor | None = None,
    ) -> Prediction: ...

    def label_logits(self, features: Features) -> tuple[Tensor, bool]: ...

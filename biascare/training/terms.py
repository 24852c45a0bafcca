"""The terms of the objective (Eq. 12) as a table. A new loss is one function and one row here, and
one weight among the keys of `objective`.

Each function gets what the first pass of a micro-batch gave and returns a scalar, or None where the
stage or the batch has nothing of its kind. In a micro-batch without anything to learn from, a term
is a 0 that has a graph: under ZeRO-3 all ranks make the same calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from biascare.hitl.clicks import num_hardest, refine_once, select_hardest, selection_valid
from biascare.interfaces import Batch, DualPathModel, Features, Prediction, Prompts
from biascare.losses import (
    alignment_loss,
    dice_loss_per_row,
    label_loss,
    language_loss,
    quality_loss,
    refinement_loss,
    token_nll_sum,
    weighted_dice,
)
from biascare.uncertainty import mask_weighted_embedding


class ObjectiveSettings(NamedTuple):
    """Weights and switches of Eqs. 6-12; the meaning of each stands in the configuration."""

    uncertainty_weighting: bool
    beta_vl: float
    lambda_u: float
    weight_gradient: str
    reduction: str
    alignment: str
    alignment_weight: float
    quality_weight: float


class HITLSettings(NamedTuple):
    """The simulated expert; the meaning of each stands in the configuration."""

    enabled: bool
    ratio: float
    num_rounds: int
    clicks_per_round: int
    policy: str
    mask_prompt: bool


class RowOutcome(NamedTuple):
    """Per-row results of the first pass."""

    dice_loss: Tensor  # [R]
    semantic: Tensor  # [R]
    weight: Tensor  # [R]
    uncertainty: Tensor  # [R]
    valid: Tensor  # [R] bool


class FirstPass(NamedTuple):
    """What the terms of a micro-batch are made of."""

    model: DualPathModel
    batch: Batch
    features: Features
    prediction: Prediction | None  # None, like `rows`, without segmentation rows
    rows: RowOutcome | None
    num_answer_tokens: Tensor | int  # of the whole optimizer step, over ranks and accumulation
    num_micro_batches: int  # likewise
    objective: ObjectiveSettings
    hitl: HITLSettings


def weighted_dice_term(first: FirstPass) -> Tensor | None:
    """Eq. 9: Dice of the rows, the uncertain ones with more weight."""
    if first.rows is None:
        return None
    rows = first.rows
    return weighted_dice(rows.dice_loss, rows.weight, rows.valid, first.objective.reduction)


def refinement_term(first: FirstPass) -> Tensor | None:
    """Human in the loop: the hardest rows get the clicks an expert would give (Eqs. 8, 10)."""
    model, batch, features, prediction, rows, *_ = first
    if not first.hitl.enabled or prediction is None or rows is None:
        return None
    assert batch.masks is not None and batch.prompts is not None and batch.row_image is not None
    settings, masks, row_image = first.hitl, batch.masks, batch.row_image
    # From the number of rows, which every rank shares, so that all make the same calls.
    k = num_hardest(len(row_image), settings.ratio)
    index = select_hardest(rows.uncertainty, rows.valid, settings.ratio, k=k)
    # The first pass chose by its uncertainty and is refined from its own prompts and logits.
    prompts = Prompts(*(field[index] for field in batch.prompts))
    current = Prediction(*(field[index] for field in prediction))
    # Of the micro-batch: clicks are the same whoever runs it, in a resumed run too.
    generator = torch.Generator(device=row_image.device).manual_seed(batch.seed)

    # Image and text are encoded already; a round costs a decoder pass over k rows.
    def decode(prompts: Prompts, mask_prompt: Tensor | None) -> Prediction:
        return model.decode_masks(features, prompts, row_image, rows=index, mask_prompt=mask_prompt)

    dice_rounds = []
    for _ in range(settings.num_rounds):
        prompts, current = refine_once(
            decode,
            prompts,
            current,
            masks[index],
            policy=settings.policy,
            num_clicks=settings.clicks_per_round,
            generator=generator,
            mask_prompt=settings.mask_prompt,
        )
        dice_rounds.append(dice_loss_per_row(current.mask_logits, masks[index]))
    return refinement_loss(dice_rounds, selection_valid(rows.valid, k), first.objective.reduction)


def answer_term(first: FirstPass) -> Tensor | None:
    """Eq. 11: next-token loss of the answers, normalised over the optimizer step."""
    batch, hidden_states = first.batch, first.features.hidden_states
    if batch.answer_tokens is None or hidden_states is None:
        return None
    assert first.model.mllm is not None and batch.answer_positions is not None
    # Only where an answer token comes next: the logits of all other positions are never read.
    logits = first.model.mllm.answer_logits(hidden_states, batch.answer_positions)
    nll_sum = token_nll_sum(logits, batch.answer_tokens)
    return language_loss(nll_sum, first.num_answer_tokens, first.num_micro_batches)


def quality_term(first: FirstPass) -> Tensor | None:
    """The quality head learns the Dice of its own mask; not in the paper."""
    if first.prediction is None or first.rows is None:
        return None
    return quality_loss(first.prediction.predicted_dice, first.rows.dice_loss, first.rows.valid)


def alignment_term(first: FirstPass) -> Tensor | None:
    """Match the text to the image under the true mask; not in the paper."""
    batch, features, rows = first.batch, first.features, first.rows
    if first.objective.alignment == "none" or rows is None or features.text_embedding is None:
        return None
    assert batch.masks is not None and batch.row_target is not None
    assert features.image_embedding is not None
    # Under the predicted mask, a failed row would teach that its wrong region fits the text, and
    # u_vl would be lowest where it should be highest.
    true_vector = mask_weighted_embedding(
        features.image_embedding, batch.masks, row_image=batch.row_image
    )
    return alignment_loss(
        true_vector,
        features.text_embedding,
        rows.valid,
        batch.row_target,
        kind=first.objective.alignment,
    )


def label_term(first: FirstPass) -> Tensor | None:
    """The label head, in its stage alone; not in the paper."""
    if first.batch.labels is None:
        return None
    logits, exclusive = first.model.label_logits(first.features)
    return label_loss(logits, first.batch.labels, exclusive=exclusive)


class Term(NamedTuple):
    """One row of the objective; a weight of 0 switches the term off."""

    name: str  # in logs
    weight: Callable[[ObjectiveSettings], float]
    loss: Callable[[FirstPass], Tensor | None]


TERMS = (
    # The paper's three enter with weight 1 (Eq. 12); what is ours can be switched off.
    Term("dur", lambda objective: 1.0, weighted_dice_term),
    Term("hitl", lambda objective: 1.0, refinement_term),
    Term("vlm", lambda objective: 1.0, answer_term),
    Term("quality", lambda objective: objective.quality_weight, quality_term),
    Term("alignment", lambda objective: objective.alignment_weight, alignment_term),
    Term("labels", lambda objective: 1.0, label_term),
)

"""The terms of the objective (Eq. 12) as a table. A new loss is one function and one row here, and
one weight among the keys of `objective`.

Each function gets what the decoder passes of a micro-batch gave and returns a scalar, or None where
the stage or the batch has nothing of its kind. In a micro-batch without anything to learn from, a
term is a 0 that has a graph: under ZeRO-3 all ranks make the same calls.
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
    click_loss_per_row,
    dice_loss_per_row,
    label_loss,
    language_loss,
    pixel_loss_per_row,
    quality_loss,
    refinement_loss,
    row_loss,
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
    click_weight: float
    pixel_weight: float
    pixel_focus: float


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


class Refinement(NamedTuple):
    """The corrections of the hardest rows."""

    masks: Tensor  # [k, H, W], the truth
    valid: Tensor  # [k] bool, see `selection_valid`
    rounds: list[tuple[Prompts, Prediction]]  # all prompts so far, and the masks by them


class Passes(NamedTuple):
    """What the terms of a micro-batch are made of."""

    model: DualPathModel
    batch: Batch
    features: Features
    prediction: Prediction | None  # None, like `rows`, without segmentation rows
    rows: RowOutcome | None
    refinement: Refinement | None  # None without segmentation rows or without an expert
    num_answer_tokens: Tensor | int  # of the whole optimizer step, over ranks and accumulation
    num_micro_batches: int  # likewise
    objective: ObjectiveSettings


def weighted_dice_term(passes: Passes) -> Tensor | None:
    """Eq. 9: Dice of the rows, the uncertain ones with more weight."""
    if passes.rows is None:
        return None
    rows = passes.rows
    return weighted_dice(rows.dice_loss, rows.weight, rows.valid, passes.objective.reduction)


def refine_hardest(
    model: DualPathModel,
    batch: Batch,
    features: Features,
    prediction: Prediction,
    rows: RowOutcome,
    settings: HITLSettings,
) -> Refinement:
    """Human in the loop: the hardest rows get the clicks an expert would give (Eq. 8)."""
    assert batch.masks is not None and batch.prompts is not None and batch.row_image is not None
    row_image = batch.row_image
    # From the number of rows, which every rank shares, so that all make the same calls.
    k = num_hardest(len(row_image), settings.ratio)
    index = select_hardest(rows.uncertainty, rows.valid, settings.ratio, k=k)
    masks = batch.masks[index]
    # The first pass chose by its uncertainty and is refined from its own prompts and logits.
    prompts = Prompts(*(field[index] for field in batch.prompts))
    current = Prediction(*(field[index] for field in prediction))
    # Of the micro-batch: clicks are the same whoever runs it, in a resumed run too.
    generator = torch.Generator(device=row_image.device).manual_seed(batch.seed)

    # Image and text are encoded already; a round costs a decoder pass over k rows.
    def decode(prompts: Prompts, mask_prompt: Tensor | None) -> Prediction:
        return model.decode_masks(features, prompts, row_image, rows=index, mask_prompt=mask_prompt)

    rounds = []
    for _ in range(settings.num_rounds):
        prompts, current = refine_once(
            decode,
            prompts,
            current,
            masks,
            policy=settings.policy,
            num_clicks=settings.clicks_per_round,
            generator=generator,
            mask_prompt=settings.mask_prompt,
        )
        rounds.append((prompts, current))
    return Refinement(masks, selection_valid(rows.valid, k), rounds)


def refinement_term(passes: Passes) -> Tensor | None:
    """Eq. 10: Dice of the corrected masks."""
    if passes.refinement is None:
        return None
    masks, valid, rounds = passes.refinement
    dice = [dice_loss_per_row(prediction.mask_logits, masks) for _, prediction in rounds]
    return refinement_loss(dice, valid, passes.objective.reduction)


def click_term(passes: Passes) -> Tensor | None:
    """A corrected mask contains its positive clicks and excludes its negative ones; not in the
    paper."""
    if passes.refinement is None:
        return None
    _, valid, rounds = passes.refinement
    missed = [
        click_loss_per_row(prediction.mask_logits, *prompts) for prompts, prediction in rounds
    ]
    return refinement_loss(missed, valid, passes.objective.reduction)


def pixel_term(passes: Passes) -> Tensor | None:
    """Cross entropy of the pixels beside Dice, of the first masks and the corrected ones; not in
    the paper."""
    prediction, rows, masks = passes.prediction, passes.rows, passes.batch.masks
    if prediction is None or rows is None or masks is None:
        return None
    focus, reduction = passes.objective.pixel_focus, passes.objective.reduction
    each = pixel_loss_per_row(prediction.mask_logits, masks, focus=focus)
    loss = row_loss(each, rows.valid, reduction)
    if passes.refinement is None:
        return loss
    masks, valid, rounds = passes.refinement
    corrected = [pixel_loss_per_row(p.mask_logits, masks, focus=focus) for _, p in rounds]
    return loss + refinement_loss(corrected, valid, reduction)


def answer_term(passes: Passes) -> Tensor | None:
    """Eq. 11: next-token loss of the answers, normalised over the optimizer step."""
    batch, hidden_states = passes.batch, passes.features.hidden_states
    if batch.answer_tokens is None or hidden_states is None:
        return None
    assert passes.model.mllm is not None and batch.answer_positions is not None
    # Only where an answer token comes next: the logits of all other positions are never read.
    logits = passes.model.mllm.answer_logits(hidden_states, batch.answer_positions)
    nll_sum = token_nll_sum(logits, batch.answer_tokens)
    return language_loss(nll_sum, passes.num_answer_tokens, passes.num_micro_batches)


def quality_term(passes: Passes) -> Tensor | None:
    """The quality head learns the Dice of its own mask; not in the paper."""
    if passes.prediction is None or passes.rows is None:
        return None
    return quality_loss(passes.prediction.predicted_dice, passes.rows.dice_loss, passes.rows.valid)


def alignment_term(passes: Passes) -> Tensor | None:
    """Match the text to the image under the true mask; not in the paper."""
    batch, features, rows = passes.batch, passes.features, passes.rows
    if passes.objective.alignment == "none" or rows is None or features.text_embedding is None:
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
        kind=passes.objective.alignment,
    )


def label_term(passes: Passes) -> Tensor | None:
    """The label head, in its stage alone; not in the paper."""
    if passes.batch.labels is None:
        return None
    logits, exclusive = passes.model.label_logits(passes.features)
    return label_loss(logits, passes.batch.labels, exclusive=exclusive)


class Term(NamedTuple):
    """One row of the objective; a weight of 0 switches the term off."""

    name: str  # in logs
    weight: Callable[[ObjectiveSettings], float]
    loss: Callable[[Passes], Tensor | None]


TERMS = (
    # The paper's three enter with weight 1 (Eq. 12); what is ours can be switched off.
    Term("dur", lambda objective: 1.0, weighted_dice_term),
    Term("hitl", lambda objective: 1.0, refinement_term),
    Term("vlm", lambda objective: 1.0, answer_term),
    Term("quality", lambda objective: objective.quality_weight, quality_term),
    Term("clicks", lambda objective: objective.click_weight, click_term),
    Term("pixels", lambda objective: objective.pixel_weight, pixel_term),
    Term("alignment", lambda objective: objective.alignment_weight, alignment_term),
    Term("labels", lambda objective: 1.0, label_term),
)

"""The training step: the paper in one screen.

`TrainStep` is the one root module DeepSpeed wraps. Model, human-in-the-loop refinement and
objective live inside its forward, so that ZeRO-3 gathers parameters and autocast applies in every
pass, including the second decoder pass after the simulated clicks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from biascare.hitl.clicks import num_hardest, refine_once, select_hardest, selection_valid
from biascare.interfaces import Batch, DualPathModel, Features, Prediction, Prompts
from biascare.losses import (
    alignment_loss,
    dice_loss_per_row,
    language_loss,
    quality_loss,
    refinement_loss,
    row_weight,
    token_nll_sum,
    total_objective,
    weighted_dice,
)
from biascare.uncertainty import joint_uncertainty, mask_weighted_embedding, semantic_uncertainty


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


class TrainStep(nn.Module):
    """Batch -> named losses. `forward` follows Fig. 1g from left to right."""

    def __init__(self, model: DualPathModel, objective: ObjectiveSettings, hitl: HITLSettings):
        super().__init__()
        self.model = model
        self.objective = objective
        self.hitl = hitl

    def forward(
        self, batch: Batch, num_answer_tokens: Tensor | int, num_micro_batches: int
    ) -> dict[str, Any]:
        """One micro-batch.

        `num_answer_tokens`: of the whole optimizer step, over ranks and accumulation;
        `num_micro_batches`: likewise. Returns the scalar `loss` to back-propagate, every term that
        made it as a detached scalar, and `rows`, the detached `RowOutcome` of segmentation rows or
        None.
        """
        torch.manual_seed(batch.seed)  # dropout depends on the micro-batch, not on who runs it
        features = self.model.encode(batch)
        dur = hitl = vlm = rows = None
        auxiliary: dict[str, tuple[float, Tensor]] = {}
        if batch.masks is not None and batch.prompts is not None and batch.row_image is not None:
            prediction = self.model.decode_masks(features, batch.prompts, batch.row_image)
            rows, auxiliary = self.judge(features, prediction, batch)
            dur = weighted_dice(rows.dice_loss, rows.weight, rows.valid, self.objective.reduction)
            if self.hitl.enabled:
                hitl = self.refine_hardest(features, prediction, batch, rows)
        if batch.answer_tokens is not None and features.hidden_states is not None:
            vlm = self.answer_loss(features, batch, num_answer_tokens, num_micro_batches)
        loss = total_objective(dur, hitl, vlm, auxiliary=auxiliary.values())
        terms = {"dur": dur, "hitl": hitl, "vlm": vlm} | {k: v for k, (_, v) in auxiliary.items()}
        return {
            "loss": loss,
            "terms": {name: term.detach() for name, term in terms.items() if term is not None},
            "rows": rows and RowOutcome(*(value.detach() for value in rows)),
        }

    def judge(
        self, features: Features, prediction: Prediction, batch: Batch
    ) -> tuple[RowOutcome, dict[str, tuple[float, Tensor]]]:
        """Dice, uncertainty and weight of each row (Eqs. 3-7), and the terms that train them."""
        settings = self.objective
        assert batch.masks is not None and features.image_embedding is not None
        valid = batch.masks.bool().flatten(1).any(1)
        dice = dice_loss_per_row(prediction.mask_logits, batch.masks)
        auxiliary = {}
        if settings.quality_weight:
            quality = quality_loss(prediction.predicted_dice, dice, valid)
            auxiliary["quality"] = (settings.quality_weight, quality)
        if features.text_embedding is None:  # the vision stage has no text to be uncertain about
            semantic = torch.zeros_like(dice)
        else:
            image_vector = mask_weighted_embedding(
                features.image_embedding,
                prediction.mask_logits.detach().sigmoid(),  # the mask is Dice's to move
                row_image=batch.row_image,
            )
            semantic = semantic_uncertainty(image_vector, features.text_embedding)
            if settings.alignment != "none" and settings.alignment_weight:
                auxiliary["alignment"] = (
                    settings.alignment_weight,
                    self.alignment(features, batch, valid),
                )
        weight = row_weight(
            semantic,
            dice,
            beta_vl=settings.beta_vl,
            lambda_u=settings.lambda_u,
            weight_gradient=settings.weight_gradient,
            enabled=settings.uncertainty_weighting,
        )
        uncertainty = joint_uncertainty(semantic, dice, settings.beta_vl).detach()
        return RowOutcome(dice, semantic, weight, uncertainty, valid), auxiliary

    def alignment(self, features: Features, batch: Batch, valid: Tensor) -> Tensor:
        """Match the text to the image under the true mask.

        Under the predicted mask, a failed row would teach that its wrong region fits the text, and
        u_vl would be lowest where it should be highest.
        """
        assert batch.masks is not None and batch.row_target is not None
        assert features.image_embedding is not None and features.text_embedding is not None
        true_vector = mask_weighted_embedding(
            features.image_embedding, batch.masks, row_image=batch.row_image
        )
        return alignment_loss(
            true_vector,
            features.text_embedding,
            valid,
            batch.row_target,
            kind=self.objective.alignment,
        )

    def refine_hardest(
        self, features: Features, prediction: Prediction, batch: Batch, rows: RowOutcome
    ) -> Tensor:
        """Human in the loop: the hardest rows get the clicks an expert would give (Eqs. 8, 10)."""
        assert batch.masks is not None and batch.prompts is not None
        assert batch.row_image is not None
        settings = self.hitl
        row_image = batch.row_image
        # From the number of rows, which every rank shares, so that all make the same calls.
        k = num_hardest(len(row_image), settings.ratio)
        index = select_hardest(rows.uncertainty, rows.valid, settings.ratio, k=k)
        prompts = Prompts(*(field[index] for field in batch.prompts))
        current = Prediction(*(field[index] for field in prediction))
        generator = torch.Generator(device=row_image.device).manual_seed(batch.seed)

        def decode(prompts: Prompts, mask_prompt: Tensor | None) -> Prediction:
            return self.model.decode_masks(
                features, prompts, row_image, rows=index, mask_prompt=mask_prompt
            )

        dice_rounds = []
        for _ in range(settings.num_rounds):
            prompts, current = refine_once(
                decode,
                prompts,
                current,
                batch.masks[index],
                policy=settings.policy,
                num_clicks=settings.clicks_per_round,
                generator=generator,
                mask_prompt=settings.mask_prompt,
            )
            dice_rounds.append(dice_loss_per_row(current.mask_logits, batch.masks[index]))
        return refinement_loss(
            dice_rounds, selection_valid(rows.valid, k), self.objective.reduction
        )

    def answer_loss(
        self,
        features: Features,
        batch: Batch,
        num_answer_tokens: Tensor | int,
        num_micro_batches: int,
    ) -> Tensor:
        """Next-token loss of the answers (Eq. 11), normalised over the optimizer step.

        Without any answer token it is a 0 that still calls the language head: under ZeRO-3 all
        ranks make the same calls.
        """
        assert self.model.mllm is not None and features.hidden_states is not None
        assert batch.answer_positions is not None and batch.answer_tokens is not None
        logits = self.model.mllm.answer_logits(features.hidden_states, batch.answer_positions)
        return language_loss(
            token_nll_sum(logits, batch.answer_tokens), num_answer_tokens, num_micro_batches
        )

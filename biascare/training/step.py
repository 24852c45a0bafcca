"""The training step: the paper in one screen.

`TrainStep` is the one root module DeepSpeed wraps. Model, human-in-the-loop refinement and
objective live inside its forward, so that ZeRO-3 gathers parameters and autocast applies in every
pass, including the second decoder pass after the simulated clicks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from biascare.interfaces import Batch, DualPathModel, Features, Prediction
from biascare.losses import dice_loss_per_row, row_weight, total_objective
from biascare.training.terms import (
    TERMS,
    HITLSettings,
    ObjectiveSettings,
    Passes,
    RowOutcome,
    refine_hardest,
)
from biascare.uncertainty import joint_uncertainty, mask_weighted_embedding, semantic_uncertainty


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
        prediction = rows = refinement = None
        if batch.masks is not None and batch.prompts is not None and batch.row_image is not None:
            prediction = self.model.decode_masks(features, batch.prompts, batch.row_image)
            rows = self.judge(features, prediction, batch)
            if self.hitl.enabled:
                refinement = refine_hardest(
                    self.model, batch, features, prediction, rows, self.hitl
                )
        passes = Passes(
            model=self.model,
            batch=batch,
            features=features,
            prediction=prediction,
            rows=rows,
            refinement=refinement,
            num_answer_tokens=num_answer_tokens,
            num_micro_batches=num_micro_batches,
            objective=self.objective,
        )
        # The same terms in the same order on every rank: ZeRO-3 gathers parameters as they come.
        terms: dict[str, tuple[float, Tensor]] = {}
        for term in TERMS:
            weight = term.weight(self.objective)
            # Switched off, a term is not computed: 0 times a NaN would still be NaN.
            loss = term.loss(passes) if weight else None
            if loss is not None:
                terms[term.name] = (weight, loss)
        return {
            "loss": total_objective(terms.values()),
            # Detached: logs keep them for an interval, and graphs would be kept with them.
            "terms": {name: loss.detach() for name, (_, loss) in terms.items()},
            "rows": rows and RowOutcome(*(value.detach() for value in rows)),
        }

    def judge(self, features: Features, prediction: Prediction, batch: Batch) -> RowOutcome:
        """Dice, uncertainty and weight of each row (Eqs. 3-7)."""
        settings = self.objective
        assert batch.masks is not None and features.image_embedding is not None
        # v_i of Eq. 9: against an empty mask, Dice would only teach to answer with nothing.
        valid = batch.masks.bool().flatten(1).any(1)
        dice = dice_loss_per_row(prediction.mask_logits, batch.masks)
        if features.text_embedding is None:  # the vision stage has no text to be uncertain about
            semantic = torch.zeros_like(dice)
        else:
            image_vector = mask_weighted_embedding(
                features.image_embedding,
                prediction.mask_logits.detach().sigmoid(),  # the mask is Dice's to move
                row_image=batch.row_image,
            )
            semantic = semantic_uncertainty(image_vector, features.text_embedding)
        weight = row_weight(
            semantic,
            dice,
            beta_vl=settings.beta_vl,
            lambda_u=settings.lambda_u,
            weight_gradient=settings.weight_gradient,
            enabled=settings.uncertainty_weighting,
        )
        # Ranks rows for the expert even where weighting is off; a ranking has no gradient.
        uncertainty = joint_uncertainty(semantic, dice, settings.beta_vl).detach()
        return RowOutcome(dice, semantic, weight, uncertainty, valid)

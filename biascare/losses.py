"""Row weights and the training objective: Eqs. 7 and 9-12 of the paper.

    dice = dice_loss_per_row(prediction.mask_logits, masks)
    weight = row_weight(semantic, dice, beta_vl=..., lambda_u=..., ...)
    loss = total_objective([(1.0, weighted_dice(dice, weight, valid, "sum")), (1.0, vlm)])

The paper is "Bias-constrained multimodal intelligence for equitable and reliable clinical AI"
(BiasCareVL, arXiv 2604.16884); its Eqs. 3-6, which need no labels, are in
`biascare.uncertainty`. Everything here is a pure function of tensors. Three rules hold:

- fp32 inside, whatever dtype comes in: bf16 resolves only 0.004 near 1, where Dice and cosine live.
- No host synchronisation: rows without a mask are silenced by `torch.where`, never by indexing.
  They contribute exactly 0 and get a gradient of exactly 0.
- A batch without any valid row yields a 0 that still has a graph, so that every rank can run the
  same backward pass.

A loss that sums over rows sums over one micro-batch; the engine then averages micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from biascare.choices import unknown
from biascare.interfaces import IGNORE_INDEX, POINT_NEGATIVE, POINT_POSITIVE
from biascare.uncertainty import joint_uncertainty, mean_query, semantic_uncertainty, unit_vectors

if TYPE_CHECKING:
    from torch import Tensor

DICE_EPS = 1e-3
"""Smoothing of Eq. 9, in pixels. The usual 1.0 gives a missed one-pixel lesion a loss of only 0.5;
this value gives it 0.999, and an empty mask with an empty prediction still gives 0."""


ALIGNMENT_TEMPERATURE = 0.07
"""Scale of the cosines in the contrastive alignment."""

NLL_CHUNK_ELEMENTS = 2**24
"""Largest fp32 copy of language logits held at a time (64 MiB)."""

REDUCTIONS = ("sum", "mean")
ALIGNMENTS = ("none", "cosine", "contrastive")
WEIGHT_GRADIENTS = ("detach", "full")


def dice_loss_per_row(mask_logits: Tensor, masks: Tensor, *, eps: float = DICE_EPS) -> Tensor:
    """The per-row soft Dice loss inside Eq. 9: 1 - (2 sum(pY) + eps) / (sum p + sum Y + eps).

    Args:
        mask_logits: `[R, H, W]` or `[R, 1, H, W]`, any float dtype, at label resolution.
        masks: same size, values in {0, 1}, any dtype.
        eps: smoothing in pixels.

    Returns:
        `[R]` fp32 in [0, 1].

    Raises:
        ValueError: the shapes differ.
    """
    mask_logits, masks = (x.squeeze(1) if x.ndim == 4 else x for x in (mask_logits, masks))
    if mask_logits.shape != masks.shape or mask_logits.ndim != 3:
        raise ValueError(
            f"dice_loss_per_row got mask_logits {list(mask_logits.shape)} and masks "
            f"{list(masks.shape)}, expected the same [R, H, W]; resize the logits to the labels"
        )
    probs, target = mask_logits.float().sigmoid(), masks.float()
    # Per row, not over the batch: pooled, a lesion of one pixel would drown in another row's liver.
    overlap = (probs * target).sum(dim=(1, 2))
    size = probs.sum(dim=(1, 2)) + target.sum(dim=(1, 2))
    # In both places: an empty mask answered with nothing is right, and its loss is 0, not NaN.
    return 1 - (2 * overlap + eps) / (size + eps)


def click_loss_per_row(mask_logits: Tensor, coords: Tensor, labels: Tensor) -> Tensor:
    """How far a mask is from containing its positive and excluding its negative clicks: the binary
    cross entropy at their pixels. Not in the paper.

    Args:
        mask_logits: `[R, H, W]`, any float dtype.
        coords: `[R, N, 2]`, x then y, pixels of the mask.
        labels: `[R, N]`; box corners and padding are no clicks.

    Returns:
        `[R]` fp32, the mean over the clicks of a row; 0 without any.
    """
    height, width = mask_logits.shape[-2:]
    # The pixel that a click lies on; a click of the data may lie between two, or on the border.
    column = coords[..., 0].round().clamp(0, width - 1).long()
    row = coords[..., 1].round().clamp(0, height - 1).long()
    clicked = mask_logits.float().flatten(1).gather(1, row * width + column)
    positive = labels == POINT_POSITIVE
    is_click = positive | (labels == POINT_NEGATIVE)
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        clicked, positive.float(), reduction="none"
    )
    return torch.where(is_click, each, 0.0).sum(1) / is_click.sum(1).clamp(min=1)


def pixel_loss_per_row(mask_logits: Tensor, masks: Tensor, *, focus: float) -> Tensor:
    """The focal loss of each row: binary cross entropy of the pixels, each weighted by
    (1 - probability of its truth) to the power of `focus`. Not in the paper.

    Unlike Dice it has a gradient where a small target is missed with certainty.

    Args:
        mask_logits: `[R, H, W]`, any float dtype.
        masks: same size, values in {0, 1}, any dtype.
        focus: 0 is plain cross entropy.

    Returns:
        `[R]` fp32, the mean over the pixels of a row.
    """
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        mask_logits.float(), masks.float(), reduction="none"
    )
    # exp(-cross entropy) is the probability of the truth; 0 ** 0 would have no gradient.
    if focus:
        each = each * (-torch.expm1(-each)) ** focus
    return each.mean(dim=(1, 2))


def uncertainty_weight(uncertainty: Tensor, lambda_u: float) -> Tensor:
    """Eq. 7: w = exp(lambda_u * u), `[R]` fp32."""
    # Deliberately without a batch maximum: subtracting one that carries gradient turns the gradient
    # of the hardest row negative as soon as a few rows are hard. u is bounded, so exp is too.
    return (lambda_u * uncertainty.float()).exp()


def row_weight(
    semantic: Tensor,
    dice: Tensor,
    *,
    beta_vl: float,
    lambda_u: float,
    weight_gradient: str,
    enabled: bool,
) -> Tensor:
    """Eqs. 6-7 as the training step uses them: `[R]` fp32, or ones when weighting is switched off.

    `detach` treats the weight as a number, `full` is the literal autograd reading.
    """
    if weight_gradient not in WEIGHT_GRADIENTS:
        raise ValueError(unknown("weight_gradient", weight_gradient, WEIGHT_GRADIENTS))
    if not enabled:
        return torch.ones_like(dice, dtype=torch.float32)
    uncertainty = joint_uncertainty(semantic, dice, beta_vl)
    # A weight says which rows matter; it is no path for gradients, or a row could lower its loss by
    # becoming certain. `full` is safe too: d/dl [l exp(l)] = (1 + l) exp(l) > 0.
    if weight_gradient == "detach":
        uncertainty = uncertainty.detach()
    return uncertainty_weight(uncertainty, lambda_u)


def weighted_dice(dice: Tensor, weight: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """Eq. 9: L_dur = sum_i v_i w_i l_dice_i.

    Args:
        dice, weight: `[R]`.
        valid: `[R]` bool, the row has a mask.
        reduction: `sum` is the paper; `mean` divides by the number of valid rows.
    """
    # Masked before and after the product, so that a NaN weight cannot reach a gradient either.
    return row_loss(torch.where(valid, dice.float(), 0.0) * weight.float(), valid, reduction)


def refinement_loss(loss_rounds: Sequence[Tensor], valid: Tensor, reduction: str) -> Tensor:
    """Eq. 10: L_hitl = sum over the refined rows H of their Dice loss, averaged over rounds.

    With one round this is the paper's formula; other losses of refined rows are added up alike.

    Args:
        loss_rounds: one `[k]` per round, the same rows in each.
        valid: `[k]` bool, see `biascare.hitl.clicks.selection_valid`.
        reduction: `sum`, or `mean` to divide by |H|.
    """
    # Averaged, not summed: `num_rounds` changes what the model sees, not how much refinement counts
    # in Eq. 12.
    rounds = [row_loss(dice, valid, reduction) for dice in loss_rounds]
    return torch.stack(rounds).mean()


def alignment_loss(
    image_vector: Tensor,
    text_vector: Tensor,
    valid: Tensor,
    group: Tensor,
    *,
    kind: str,
    temperature: float = ALIGNMENT_TEMPERATURE,
) -> Tensor:
    """Trains the two vectors of Eq. 4 to be comparable; mean over valid rows. Not in the paper.

    `cosine` is the mean of u_vl. `contrastive` is the symmetric InfoNCE loss of the micro-batch:
    the negatives of a row are the valid rows of any image that show another target. A row without
    negatives contributes 0. `none` is the constant 0.

    Args:
        image_vector: `[R, C]`, Eq. 3.
        text_vector: `[R, C]` or `[R, Q, C]`, Eq. 2.
        valid: `[R]` bool.
        group: `[R]` int, equal for rows that show the same target; these are never negatives of
            each other, in one image or in two.
        kind: one of `ALIGNMENTS`.
        temperature: scale of the cosines.
    """
    if kind not in ALIGNMENTS:
        raise ValueError(unknown("alignment", kind, ALIGNMENTS))
    if kind == "none":
        return torch.zeros((), device=image_vector.device)
    # Before any cosine: a NaN in a row without a mask would reach the others through the gradient.
    image_vector = torch.where(valid[:, None], image_vector.float(), 0.0)
    text_vector = torch.where(valid[:, None], mean_query(text_vector), 0.0)
    if kind == "cosine":
        return row_loss(semantic_uncertainty(image_vector, text_vector), valid, "mean")
    # Two livers in two images are no negatives: pushed apart, they would unlearn what liver means.
    own = torch.eye(len(valid), dtype=torch.bool, device=valid.device)
    compared = own | ((group[:, None] != group[None, :]) & valid[:, None] & valid[None, :])
    # Autocast would take the product in bf16, and a small temperature magnifies its error.
    with torch.autocast(image_vector.device.type, enabled=False):
        similarity = unit_vectors(image_vector) @ unit_vectors(text_vector).T / temperature
    similarity = similarity.masked_fill(~compared, float("-inf"))
    # Symmetric: the text must find its region, and the region its text.
    both = similarity.logsumexp(dim=1) + similarity.logsumexp(dim=0)
    return row_loss(both / 2 - similarity.diagonal(), valid, "mean")


def quality_loss(predicted_dice: Tensor, dice_loss: Tensor, valid: Tensor) -> Tensor:
    """Mean squared error of the quality head against the Dice of its own mask. Not in the paper.

    All arguments `[R]`; mean over valid rows.
    """
    # The target is detached: the head learns to judge the mask, the mask not to please the head.
    error = predicted_dice.float() - (1 - dice_loss.float()).detach()
    return row_loss(torch.where(valid, error, 0.0).square(), valid, "mean")


def label_loss(logits: Tensor, labels: Tensor, *, exclusive: bool) -> Tensor:
    """Of a label head: cross entropy of exclusive labels, else the mean binary cross entropy over
    the labels that were judged. Not in the paper.

    Args:
        logits: `[S, K]`, any float dtype.
        labels: `[S, K]`, 1 or 0, NaN where nobody judged.
        exclusive: whether exactly one label holds.

    Returns:
        Scalar fp32; 0 with a graph where nothing was judged.
    """
    logits, labels = logits.float(), labels.float()
    if exclusive:
        return torch.nn.functional.cross_entropy(logits, labels)
    judged = ~labels.isnan()
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.where(judged, labels, 0.0), reduction="none"
    )
    return torch.where(judged, each, 0.0).sum() / judged.sum().clamp_min(1)


def token_nll_sum(logits: Tensor, tokens: Tensor) -> Tensor:
    """The sum inside Eq. 11: negative log-likelihood of the answer tokens, a scalar in fp32.

    Computed in chunks: at most `NLL_CHUNK_ELEMENTS` logits are held in fp32 at a time, in the
    forward and in the backward pass.

    Args:
        logits: `[T, V]`, any float dtype, of the positions before each answer token.
        tokens: `[T]` int64; `IGNORE_INDEX` adds nothing.
    """
    result: Tensor = _TokenNLL.apply(logits, tokens)
    return result


def language_loss(
    nll_sum: Tensor, num_tokens_global: Tensor | int, num_micro_batches_global: int
) -> Tensor:
    """Eq. 11, normalised over the optimizer step and not over the micro-batch.

    Args:
        nll_sum: scalar of this micro-batch, `token_nll_sum`.
        num_tokens_global: N; 0 is allowed and gives 0.
        num_micro_batches_global: M.
    """
    # N = 0 is a step of masks alone: 0 over 1, with a graph for the backward pass of every rank.
    if isinstance(num_tokens_global, int):
        num_tokens: Tensor | int = max(num_tokens_global, 1)
    else:
        num_tokens = num_tokens_global.clamp(min=1)
    # The engine averages gradients over the M micro-batches of ranks and accumulation. With
    # nll_sum * M / N each, the average is the sum of all token losses over the number of all
    # tokens: a long report and a one-word answer count per token, wherever they land.
    return nll_sum.float() * num_micro_batches_global / num_tokens


def total_objective(terms: Iterable[tuple[float, Tensor]]) -> Tensor:
    """Eq. 12: the weighted sum of the (weight, loss) pairs that a stage and a batch have.

    A weight of 0 keeps the term's graph.

    Raises:
        ValueError: there is no term at all.
    """
    weighted = [(weight * loss).float() for weight, loss in terms]
    if not weighted:
        raise ValueError("total_objective got no loss term, expected at least one")
    return torch.stack(weighted).sum()


class _TokenNLL(torch.autograd.Function):
    """Cross-entropy that keeps the low-precision logits and redoes fp32 chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        chunk_rows = max(1, NLL_CHUNK_ELEMENTS // logits.shape[1])
        log_norm = torch.cat([c.float().logsumexp(dim=-1) for c in logits.split(chunk_rows)])
        counted = tokens != IGNORE_INDEX
        # IGNORE_INDEX is negative and no index: it points to token 0 here and is masked below.
        picked = logits.gather(1, torch.where(counted, tokens, 0)[:, None]).squeeze(1).float()
        # One number per token: probabilities kept in fp32 would be twice the logits themselves.
        ctx.save_for_backward(logits, tokens, log_norm)
        ctx.chunk_rows = chunk_rows
        return torch.where(counted, log_norm - picked, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, tokens, log_norm = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for start in range(0, len(tokens), ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            ignored = (tokens[rows] == IGNORE_INDEX)[:, None]
            probs = (logits[rows].float() - log_norm[rows, None]).exp_()
            token = tokens[rows, None].masked_fill(ignored, 0)
            probs.scatter_add_(1, token, torch.full_like(token, -1, dtype=torch.float32))
            gradient[rows] = probs.mul_(grad).masked_fill_(ignored, 0.0)
        return gradient, None


def row_loss(values: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """Sum or mean of `[R]` fp32 values over valid rows; 0 with a graph when there is none."""
    if reduction not in REDUCTIONS:
        raise ValueError(unknown("reduction", reduction, REDUCTIONS))
    # where, not values[valid]: an index of unknown length would wait for the device.
    total = torch.where(valid, values.float(), 0.0).sum()
    return total if reduction == "sum" else total / valid.sum().clamp(min=1)

"""What a model can say about itself: Eqs. 3-6 of the paper, in training and at inference.

    vector = mask_weighted_embedding(image_embedding, mask_probs, row_image=row_image)   # Eq. 3
    semantic = semantic_uncertainty(vector, text_embedding)                              # Eqs. 4-5
    joint = joint_uncertainty(semantic, dice_loss, beta_vl)                              # Eq. 6
    label_free(features, prediction, row_image, beta_vl)    # all that needs no truth, one decoding
    disagreement(mask_logits, others)                       # with masks of moved clicks, or of text

The paper is "Bias-constrained multimodal intelligence for equitable and reliable clinical AI"
(arXiv 2604.16884). fp32 inside, whatever dtype comes in: bf16 resolves only 0.004 near 1, where
cosines live.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import softplus

from biascare.interfaces import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, Prompts

if TYPE_CHECKING:
    from torch import Tensor

    from biascare.interfaces import Features, Prediction


POOLING_EPS = 1e-6
"""Denominator of Eq. 3, in pixels: an empty prediction gives the zero vector."""


NORM_EPS = 1e-8
"""A vector shorter than this has no direction: its cosine is 0 and it receives no gradient."""


def mask_weighted_embedding(
    image_embedding: Tensor, mask_probs: Tensor, *, row_image: Tensor | None = None
) -> Tensor:
    """Eq. 3: the image embedding averaged under the predicted mask.

    Gradients reach both arguments; detach the probabilities to train the embedding alone.

    Args:
        image_embedding: `[R, C, h, w]`, or `[S, C, h, w]` together with `row_image`.
        mask_probs: `[R, H, W]` in [0, 1].
        row_image: `[R]` int64, the image of each row; embeddings are then not copied per row.

    Returns:
        `[R, C]` fp32.

    Raises:
        ValueError: without `row_image`, the number of embeddings is not the number of rows.
    """
    num_images, channels, height, width = image_embedding.shape
    num_rows = mask_probs.shape[0]
    if row_image is None and num_images != num_rows:
        raise ValueError(
            f"mask_weighted_embedding got {num_images} image embeddings for {num_rows} masks, "
            "expected one each; pass row_image= to let rows share an image"
        )
    # Autocast would run these matrix products in bf16.
    with torch.autocast(image_embedding.device.type, enabled=False):
        probs, embedding = mask_probs.float(), image_embedding.float().flatten(2)
        # The paper upsamples the embedding to the mask and sums. Bilinear upsampling is linear, so
        # its adjoint on the mask gives the same sum on the small grid: [C, H, W] never exists.
        rows = bilinear_matrix(height, probs.shape[1], device=probs.device)
        columns = bilinear_matrix(width, probs.shape[2], device=probs.device)
        share = (rows.T @ probs @ columns).flatten(1)  # [R, h*w], the adjoint of upsampling
        if row_image is None:
            total = torch.einsum("rp,rcp->rc", share, embedding)
        else:
            # All row-image products, then each row's own: R*S*C numbers instead of R*C*h*w.
            products = share @ embedding.reshape(num_images * channels, height * width).T
            products = products.reshape(num_rows, num_images, channels)
            total = products.take_along_dim(row_image[:, None, None], dim=1).squeeze(1)
    return total / (probs.sum(dim=(1, 2)) + POOLING_EPS)[:, None]


def bilinear_matrix(
    num_source: int, num_target: int, *, device: torch.device | str = "cpu"
) -> Tensor:
    """`[num_target, num_source]` fp32 matrix of 1-d bilinear resizing, align_corners=False.

    Pixel centres sit at half-integers and the border value is repeated, as in `F.interpolate`.
    """
    target = torch.arange(num_target, device=device, dtype=torch.float32)
    # Clamped: beyond the outermost centres there is nothing to interpolate with.
    centre = ((target + 0.5) * (num_source / num_target) - 0.5).clamp(0, num_source - 1)
    source = torch.arange(num_source, device=device, dtype=torch.float32)
    return (1 - (centre[:, None] - source[None, :]).abs()).clamp(min=0)


def semantic_uncertainty(image_vector: Tensor, text_vector: Tensor) -> Tensor:
    """Eqs. 4-5: u_vl = 1 - cos(image vector, text vector); all that exists without labels.

    Args:
        image_vector: `[R, C]`, Eq. 3.
        text_vector: `[R, C]`, or `[R, Q, C]` whose queries are averaged first, Eq. 2.

    Returns:
        `[R]` fp32 in [0, 2]; 1 where a vector is zero.
    """
    cosine = (unit_vectors(image_vector) * unit_vectors(mean_query(text_vector))).sum(dim=-1)
    # Rounding can leave a cosine a little outside, and u_vl is promised to lie in [0, 2].
    return 1 - cosine.clamp(-1, 1)


def joint_uncertainty(semantic: Tensor, dice: Tensor, beta_vl: float) -> Tensor:
    """Eq. 6: u = beta_vl * u_vl + l_dice, `[R]` fp32.

    With `1 - predicted_dice` in place of the Dice loss it is the label-free form used at inference.
    """
    return beta_vl * semantic.float() + dice.float()


def unit_vectors(vector: Tensor) -> Tensor:
    """Unit vectors along the last axis, fp32; a zero vector stays zero with zero gradient."""
    vector = vector.float()
    norm = vector.norm(dim=-1, keepdim=True)
    # Clamping the norm instead would give a zero vector a gradient of 1 / NORM_EPS.
    usable = norm > NORM_EPS
    return torch.where(usable, vector / torch.where(usable, norm, 1.0), 0.0)


def mean_query(text_vector: Tensor) -> Tensor:
    """`[R, Q, C]` or `[R, C]` -> `[R, C]` fp32."""
    text_vector = text_vector.float()
    return text_vector.mean(dim=1) if text_vector.ndim == 3 else text_vector


def pixel_entropy(logits: Tensor) -> Tensor:
    """Entropy of each pixel's probability: fp32 bits in [0, 1], 1 where the logit is 0."""
    logits = logits.float()
    return (softplus(logits) - logits * logits.sigmoid()) / math.log(2)


def mask_entropy(mask_logits: Tensor) -> Tensor:
    """Mean entropy of the pixels that [R, H, W] logits call the target: `[R]` fp32 bits in [0, 1].

    An empty mask has no pixel to be sure of: 1. Pixels outside are left out, because there are so
    many sure ones that a large image would look certain.
    """
    inside = mask_logits > 0
    # Of the pixels inside alone, which are few: a logarithm for each pixel would cost more than
    # decoding the mask.
    bits = pixel_entropy(mask_logits[inside])
    num = inside.sum(dim=(1, 2))
    row = torch.arange(len(num), device=num.device).repeat_interleave(num)
    total = torch.zeros(len(num), device=num.device).index_add(0, row, bits)
    return torch.where(num > 0, total / num.clamp(min=1), 1.0)


def expected_dice_loss(mask_logits: Tensor) -> Tensor:
    """1 - the Dice that [R, H, W] logits expect of their own mask, if pixels are what their
    probabilities say: 1 - 2 sum(p m) / (sum p + sum m), `[R]` fp32 in [0, 1]; 1 for an empty mask.

    The soft Dice confidence of Borges et al. 2024 (arXiv 2402.10665).
    """
    probs, inside = mask_logits.float().sigmoid(), mask_logits > 0
    shared = (probs * inside).sum(dim=(1, 2))
    size = probs.sum(dim=(1, 2)) + inside.sum(dim=(1, 2))
    return 1 - 2 * shared / size.clamp(min=torch.finfo(size.dtype).tiny)


JITTER_SHARE = 1 / 64
"""How far a click is moved, as a share of the image's side: 4 pixels of 256."""

JITTER = ((1, 1), (-1, -1))
"""Directions, x and y. Two, because each costs a decoding of every row, and four or eight rank
failed masks no better (docs/EXPERIMENTS.md)."""


def jittered(prompts: Prompts, image_size: int) -> Prompts:
    """Prompts of R rows -> those of K*R rows, moved in each direction of `JITTER`, the rows of one
    direction together.

    All clicks of a row move alike and stay in the image. A box shrinks and grows: its corners move
    against each other, and never past its middle. Nothing is drawn: equal prompts give equal ones.
    """
    coords, labels = prompts.point_coords, prompts.point_labels
    shift = coords.new_tensor(JITTER)[:, None, None] * (JITTER_SHARE * image_size)
    sign = torch.where(labels == BOX_BOTTOM_RIGHT, -1.0, 1.0)[None, ..., None]
    moved = (coords[None] + shift * sign).clamp(0, image_size - 1)
    first, last = ((labels == corner)[..., None] for corner in (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT))
    middle = ((coords * first).sum(1, keepdim=True) + (coords * last).sum(1, keepdim=True)) / 2
    moved = torch.where(first, torch.minimum(moved, middle), moved)
    moved = torch.where(last, torch.maximum(moved, middle), moved)
    return Prompts(
        point_coords=moved.flatten(0, 1),
        point_labels=labels.repeat(len(JITTER), 1),
    )


def disagreement(mask_logits: Tensor, others: Tensor) -> Tensor:
    """1 - mean soft Dice of masks with others of the same rows: `[R]` fp32 in [0, 1].

    Soft Dice is 2 sum(p q) / (sum p^2 + sum q^2) of the probabilities, 1 only where they are equal.
    Probabilities and not masks, so that a pixel at the threshold counts for what it is. An empty
    mask answers no click, whatever the others are: 1.

    Args:
        mask_logits: `[R, h, w]`; the decoder's own size is enough, and sixteen times cheaper.
        others: `[K * R, h, w]`, as `jittered` prompts give them.
    """
    probs = mask_logits.float().sigmoid().flatten(1)
    other = others.float().sigmoid().reshape(-1, *probs.shape)
    shared = torch.einsum("rp,krp->kr", probs, other)
    size = (probs**2).sum(1) + torch.einsum("krp,krp->kr", other, other)
    dice = (2 * shared / size.clamp(min=torch.finfo(size.dtype).tiny)).mean(0)
    return torch.where((mask_logits > 0).flatten(1).any(1), 1 - dice.clamp(max=1), 1.0)


def size_surprise(area: float, usual: float) -> float:
    """How far a mask is from the usual size of its target: |log of the ratio of the areas|, both
    shares of the image. An empty mask has the area of half a pixel of a million."""
    return abs(math.log(max(area, SMALLEST_AREA)) - math.log(max(usual, SMALLEST_AREA)))


SMALLEST_AREA = 5e-7


def label_free(
    features: Features, prediction: Prediction, row_image: Tensor, beta_vl: float
) -> dict[str, Tensor]:
    """What can be said of R masks without their truth and from one decoding, by name, `[R]` fp32.

    `predicted_dice_loss` is the quality head's; `mask_entropy` and `expected_dice_loss` the pixels'
    own; `semantic` Eq. 5; `joint_label_free` Eq. 6 with the quality head's in place of the Dice
    loss. Without a text there is nothing to compare with, and the joint one is the quality head's
    alone.
    """
    # The quality head stands in for the truth: it was trained to predict the Dice of its own mask.
    predicted_loss = 1 - prediction.predicted_dice
    said = {
        "joint_label_free": predicted_loss,
        "predicted_dice_loss": predicted_loss,
        # At the size of the model's input: the decoder's own has too few pixels inside small masks.
        "mask_entropy": mask_entropy(prediction.mask_logits),
        "expected_dice_loss": expected_dice_loss(prediction.mask_logits),
    }
    if features.text_embedding is None or features.image_embedding is None:
        return said
    # Under the predicted mask, unlike in the alignment term: there is no other at inference.
    vector = mask_weighted_embedding(
        features.image_embedding, prediction.mask_logits.sigmoid(), row_image=row_image
    )
    semantic = semantic_uncertainty(vector, features.text_embedding)
    joint = joint_uncertainty(semantic, predicted_loss, beta_vl)
    return said | {"semantic": semantic, "joint_label_free": joint}

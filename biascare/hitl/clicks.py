"""The simulated expert: which rows to correct, where to click, decode again (Eq. 8 of the paper).

    index = select_hardest(uncertainty, valid, ratio=0.3)
    prompts, prediction = refine_once(decode, prompts, prediction, masks, policy="uniform", ...)

Pure functions shared by training and evaluation; a session sends a person's clicks down the same
road. Click coordinates are x then y in pixels of the model input, with integers at pixel centres:
the prompt encoder adds the half pixel. The ground-truth box is never a prompt here, because an
expert's click does not carry one.

`uniform` never waits for the device. `center` runs on the CPU with scipy: it is for evaluation.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]

from biascare.choices import unknown
from biascare.interfaces import (
    POINT_NEGATIVE,
    POINT_PADDING,
    POINT_POSITIVE,
    Prediction,
    Prompts,
)

if TYPE_CHECKING:
    from torch import Tensor

CLICK_POLICIES = ("uniform", "center")


class Decode(Protocol):
    """Decodes masks of R rows from prompts and, if given, `[R, 4h, 4w]` previous logits."""

    def __call__(self, prompts: Prompts, previous_logits: Tensor | None, /) -> Prediction: ...


def error_region(mask_logits: Tensor, masks: Tensor) -> Tensor:
    """Eq. 8: E = M xor Y with M = sigmoid(mask_logits) > 0.5.

    Args:
        mask_logits: `[R, H, W]`, any float dtype.
        masks: `[R, H, W]`, values in {0, 1}, any dtype.

    Returns:
        `[R, H, W]` bool, True where the prediction is wrong.

    Raises:
        ValueError: the shapes differ.
    """
    _check_same_shape("mask_logits", mask_logits, masks)
    # On logits: in bf16 the sigmoid of a small positive one rounds to exactly one half.
    return (mask_logits > 0) ^ (masks > 0.5)


def num_hardest(num_valid: int, ratio: float) -> int:
    """Rows to refine among `num_valid`: the share `ratio`, rounded down, at least one."""
    # 0.29 * 100 is 28.999999999999996; a share that is meant to be whole must not lose a row.
    return max(1, math.floor(ratio * num_valid + 1e-9))


def select_hardest(
    uncertainty: Tensor, valid: Tensor, ratio: float, *, k: int | None = None
) -> Tensor:
    """Indices of the most uncertain valid rows, hardest first. Ties go to the earlier row.

    A valid row whose uncertainty is not finite comes after all finite ones. The result always has
    k entries: with fewer valid rows than k the ranking starts over, and with no valid row at all
    some row is returned. `selection_valid` tells the entries that count; use it for Eq. 10.

    Args:
        uncertainty: `[R]`, Eq. 6.
        valid: `[R]` bool, the row has a mask.
        ratio: share r of the valid rows.
        k: the number of rows when the caller knows it, so that all ranks agree and nothing waits
            for the device; by default `num_hardest` of the valid rows, counted on the host.

    Returns:
        `[k]` int64.

    Raises:
        ValueError: there is no row, or k < 1.
    """
    if len(uncertainty) == 0:
        raise ValueError("select_hardest got no row, expected at least one; skip the refinement")
    num_valid = valid.sum()
    # Collectives have to match: training gives the same k to every rank.
    k = num_hardest(int(num_valid), ratio) if k is None else k
    if k < 1:
        raise ValueError(f"select_hardest got k={k}, expected at least 1")
    # Detached: which rows are refined is a choice and no path for gradients.
    score = uncertainty.detach().float()
    # After all finite ones and still before the invalid: a row that has diverged says nothing about
    # how hard it is, but it has a mask.
    score = torch.where(score.isfinite(), score, torch.finfo(score.dtype).min)
    score = torch.where(valid, score, float("-inf"))
    ranking = score.argsort(descending=True, stable=True)
    # Around again instead of fewer: ranks must agree on k, and `selection_valid` drops the rest.
    return ranking[torch.arange(k, device=ranking.device) % num_valid.clamp(min=1)]


def selection_valid(valid: Tensor, k: int) -> Tensor:
    """`[k]` bool: which entries of `select_hardest` are valid rows that appear the first time."""
    return torch.arange(k, device=valid.device) < valid.sum()


def sample_clicks(
    error: Tensor,
    masks: Tensor,
    *,
    num_clicks: int = 1,
    policy: str = "uniform",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Corrective clicks: positive where the target was missed, negative where the mask spilled.

    `uniform` draws error pixels without replacement. `center` takes, in the largest component of
    missed or of spilled pixels (4-connected), the pixel farthest from the component's border; the
    next click takes the next component. It is deterministic: ties go to missed before spilled,
    then to the first in raster order.

    A row without errors gets one positive click inside its mask; with an empty mask as well, none.
    Clicks that a row cannot have are padding: label -1, coordinates 0.

    Args:
        error: `[R, H, W]` bool, Eq. 8.
        masks: `[R, H, W]`, values in {0, 1}, any dtype.
        num_clicks: clicks per row.
        policy: `uniform` (training) or `center` (evaluation).
        generator: of the uniform policy; its device need not be that of `error`.

    Returns:
        coords `[R, num_clicks, 2]` float32, x then y, pixels; labels `[R, num_clicks]` int64.

    Raises:
        ValueError: unknown policy, shapes that differ, or fewer than one click.
    """
    _check_same_shape("error", error, masks)
    num_pixels = error.shape[-2] * error.shape[-1]
    if not 1 <= num_clicks <= num_pixels:
        raise ValueError(f"num_clicks got {num_clicks}, expected 1 to {num_pixels} (the pixels)")
    target = masks > 0.5
    if policy == "uniform":
        pixel = _uniform_pixels(error, target, num_clicks, generator)
    elif policy == "center":
        pixel = _center_pixels(error, target, num_clicks)
    else:
        raise ValueError(unknown("policy", policy, CLICK_POLICIES))
    is_click = pixel >= 0
    pixel = pixel.clamp(min=0)  # padding reads some pixel, and what it reads is replaced below
    inside = target.flatten(1).gather(1, pixel)
    labels = torch.where(inside, POINT_POSITIVE, POINT_NEGATIVE)
    width = target.shape[-1]
    coords = torch.stack([pixel % width, pixel // width], dim=-1).float()
    return coords, torch.where(is_click, labels, POINT_PADDING)


def append_prompts(prompts: Prompts, coords: Tensor, labels: Tensor) -> Prompts:
    """The prompts of R rows followed by new points.

    Args:
        prompts: `[R, N, 2]` and `[R, N]`.
        coords: `[R, M, 2]`, x then y, pixels.
        labels: `[R, M]`.

    Raises:
        ValueError: the number of rows differs.
    """
    if len(coords) != len(prompts.point_coords):
        raise ValueError(
            f"append_prompts got clicks for {len(coords)} rows, expected the "
            f"{len(prompts.point_coords)} rows of the prompts"
        )
    return Prompts(
        point_coords=torch.cat([prompts.point_coords, coords.to(prompts.point_coords)], dim=1),
        point_labels=torch.cat([prompts.point_labels, labels.to(prompts.point_labels)], dim=1),
    )


def refine_once(
    decode: Decode,
    prompts: Prompts,
    prediction: Prediction,
    masks: Tensor,
    *,
    policy: str,
    num_clicks: int,
    generator: torch.Generator | None,
    mask_prompt: bool,
) -> tuple[Prompts, Prediction]:
    """One correction round: click where the prediction is wrong, decode with all clicks so far.

    Args:
        decode: called once, with the longer prompts and the previous low-resolution logits.
        prompts: of the R rows, everything they were prompted with before.
        prediction: what `prompts` gave.
        masks: `[R, H, W]`, the truth the simulated expert sees.
        policy, num_clicks, generator: see `sample_clicks`.
        mask_prompt: feed `prediction.low_res_logits` back, detached.

    Returns:
        The prompts of the next round and its prediction.
    """
    error = error_region(prediction.mask_logits, masks)
    coords, labels = sample_clicks(
        error, masks, num_clicks=num_clicks, policy=policy, generator=generator
    )
    # Appended, because an expert's click corrects what was said before and does not replace it.
    prompts = append_prompts(prompts, coords, labels)
    # Detached, so that a round trains its own decoding and not the one before.
    previous_logits = prediction.low_res_logits.detach() if mask_prompt else None
    return prompts, decode(prompts, previous_logits)


def _uniform_pixels(
    error: Tensor, target: Tensor, num_clicks: int, generator: torch.Generator | None
) -> Tensor:
    """`[R, num_clicks]` int64 flat pixels, -1 where there is no click."""
    error, target = error.flatten(1), target.flatten(1)
    has_error = error.any(dim=1, keepdim=True)
    allowed = torch.where(has_error, error, target)
    device = error.device if generator is None else generator.device
    # The top-k of random keys is a draw without replacement; float64 so that keys never tie.
    keys = torch.rand(error.shape, generator=generator, device=device, dtype=torch.float64)
    keys = torch.where(allowed, keys.to(error.device), -1.0)
    # `nonzero` would tell the pixels too, but its size is known only once the device has finished.
    best = keys.topk(num_clicks, dim=1)
    is_first = torch.arange(num_clicks, device=error.device) == 0
    is_click = (best.values >= 0) & (has_error | is_first)
    return torch.where(is_click, best.indices, -1)


def _center_pixels(error: Tensor, target: Tensor, num_clicks: int) -> Tensor:
    """`[R, num_clicks]` int64 flat pixels, -1 where there is no click."""
    pixel = np.full((len(error), num_clicks), -1, dtype=np.int64)
    rows = zip(error.cpu().numpy(), target.cpu().numpy(), strict=True)
    for row, (wrong, inside) in enumerate(rows):
        # Missed and spilled pixels touch along the true outline; together, the middle of their
        # component could be a click on that outline, whose sign says nothing about the region.
        found = _component_centers([wrong & inside, wrong & ~inside], num_clicks)
        # One click confirms a mask without errors; more would say the same.
        found = found or _component_centers([inside], 1)
        pixel[row, : len(found)] = found
    return torch.from_numpy(pixel).to(error.device)


def _component_centers(regions: list[np.ndarray], limit: int) -> list[int]:
    """Flat pixels inside the `limit` largest components of `[H, W]` bool regions."""
    labelled = [ndimage.label(region)[0] for region in regions]
    sizes = [np.bincount(labels.ravel())[1:] for labels in labelled]
    # Ties are decided, missed pixels first and then reading order, so that an evaluation repeats.
    ranked = sorted(
        (-int(size), which, number)
        for which, counts in enumerate(sizes)
        for number, size in enumerate(counts, start=1)
    )
    centers = []
    for _, which, number in ranked[:limit]:
        # The margin makes image edges border too: a click there would be on the component's rim.
        component = np.pad(labelled[which] == number, 1)
        depth = ndimage.distance_transform_edt(component)[1:-1, 1:-1]
        centers.append(int(depth.argmax()))
    return centers


def _check_same_shape(name: str, got: Tensor, masks: Tensor) -> None:
    """Raise ValueError unless both are the same `[R, H, W]`."""
    if got.shape != masks.shape or got.ndim != 3:
        raise ValueError(
            f"{name} got {list(got.shape)} with masks {list(masks.shape)}, expected the same "
            "[R, H, W]; resize the prediction to the label resolution"
        )

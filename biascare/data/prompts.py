"""Clicks and boxes of training rows, and the first click of evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from biascare.choices import unknown
from biascare.data.mask_resize import EIGHT_CONNECTED, filled_box
from biascare.data.transforms import _PROMPTS, Array, _generator
from biascare.interfaces import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, POINT_PADDING, POINT_POSITIVE

if TYPE_CHECKING:
    from biascare.settings.keys import PromptMixConfig


BOX_JITTER = 0.1

PROMPT_KINDS = ("point", "box", "point_and_box", "text")


def draw_prompts(
    masks: Array, key: int, mix: Mapping[str, float] | PromptMixConfig
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Visual prompts of K training rows: each row draws its own kind.

    Args:
        masks: [K, H, W] of {0, 1} at the model input size.
        key: of the sample.
        mix: relative frequency of each of `PROMPT_KINDS`; what is not named has none.

    Returns:
        point_coords [K, 3, 2] float32, x, y pixels of the model input, and point_labels [K, 3]
        int64: slot 0 the click, slots 1 and 2 the corners of the box; unused slots are (0, 0)
        with the padding label. An empty mask has padding only.

    Raises:
        ValueError: an unknown kind, or weights that are negative or all zero.
    """
    shares = _prompt_shares(mix)
    generator = _generator(key, _PROMPTS)
    point_coords = np.zeros((len(masks), 3, 2), np.float32)
    point_labels = np.full((len(masks), 3), POINT_PADDING, np.int64)
    for row, mask in enumerate(masks):
        # Drawn for an empty mask too, so that it does not change the kinds of the rows after it.
        kind = PROMPT_KINDS[generator.choice(len(PROMPT_KINDS), p=shares)]
        if not np.any(mask):  # a row without a target still has its text
            continue
        if kind in ("point", "point_and_box"):
            point_coords[row, 0] = _draw_point(mask, generator)
            point_labels[row, 0] = POINT_POSITIVE
        if kind in ("box", "point_and_box"):
            # Loose, as a person's box is: a tight one would tell where the target ends.
            x0, y0, x1, y1 = box_from_mask(mask).tolist()
            left, right = _jitter(x0, x1, mask.shape[1] - 1, generator)
            top, bottom = _jitter(y0, y1, mask.shape[0] - 1, generator)
            point_coords[row, 1:] = (left, top), (right, bottom)
            point_labels[row, 1:] = BOX_TOP_LEFT, BOX_BOTTOM_RIGHT
    return point_coords, point_labels


def box_from_mask(mask: Array) -> NDArray[np.float32]:
    """[H, W] -> tight box [4] XYXY float32: x1, y1 are the last column and row, not one past.

    Raises:
        ValueError: the mask is empty.
    """
    if not np.any(mask):
        raise _empty_mask("box")
    rows, columns = filled_box(mask)
    return np.array([columns.start, rows.start, columns.stop - 1, rows.stop - 1], np.float32)


def first_point(mask: Array) -> tuple[int, int]:
    """[H, W] -> x, y of the pixel farthest from the outside; the first in reading order of equals.

    The image border counts as outside. Deterministic: the first click of evaluation.

    Raises:
        ValueError: the mask is empty.
    """
    if not np.any(mask):
        raise _empty_mask("click")
    rows, columns = filled_box(mask)
    # A margin of zeros makes the image border outside: a click there lies on a target's edge.
    padded = np.pad(np.asarray(mask[rows, columns]) != 0, 1)
    # Exact distances, unlike those of a random click: this pixel is the protocol of evaluation.
    depth = ndimage.distance_transform_edt(padded)[1:-1, 1:-1]
    row, column = np.unravel_index(int(np.argmax(depth)), depth.shape)
    return columns.start + int(column), rows.start + int(row)


def _draw_point(mask: Array, generator: Generator) -> tuple[int, int]:
    """x, y inside the mask: a component by the root of its area, then a pixel by its depth.

    The root lets small lesions beside a large one be clicked too; the depth keeps off the border.
    """
    filled = filled_box(mask)
    labels, num_components = ndimage.label(mask[filled], EIGHT_CONNECTED)
    roots = np.sqrt(np.bincount(labels.ravel(), minlength=num_components + 1)[1:])
    index = int(generator.choice(num_components, p=roots / roots.sum())) + 1
    rows, columns = ndimage.find_objects(labels, index)[index - 1]
    # Steps to the outside instead of exact distances: faster, and a click is random.
    component = labels[rows, columns] == index
    outlined = np.zeros((component.shape[0] + 2, component.shape[1] + 2), bool)
    outlined[1:-1, 1:-1] = component
    depth = ndimage.distance_transform_cdt(outlined)[1:-1, 1:-1]
    # From the running sum: `Generator.choice` took nine times as long on 256 x 256 pixels.
    total = np.cumsum(depth)
    pixel = int(np.searchsorted(total, generator.integers(int(total[-1])), side="right"))
    row, column = divmod(pixel, depth.shape[1])
    return filled[1].start + columns.start + column, filled[0].start + rows.start + row


def _jitter(low: float, high: float, limit: int, generator: Generator) -> tuple[float, float]:
    """Two edges moved by up to `BOX_JITTER` of their distance, in 0 .. limit, a pixel apart."""
    shifts = generator.uniform(-BOX_JITTER, BOX_JITTER, 2) * (high - low + 1)
    low, high = np.clip((low + shifts[0], high + shifts[1]), 0, limit).tolist()
    if high - low >= 1:
        return low, high
    # A target one pixel wide has a tight box without extent, which no drawn box has.
    low = max(min((low + high) / 2 - 0.5, limit - 1), 0)
    return low, low + 1


def _prompt_shares(mix: Mapping[str, float] | PromptMixConfig) -> NDArray[np.float64]:
    """[4] probabilities in the order of `PROMPT_KINDS`."""
    named = mix if isinstance(mix, Mapping) else {kind: getattr(mix, kind) for kind in PROMPT_KINDS}
    for kind in named:
        if kind not in PROMPT_KINDS:
            raise ValueError(unknown("a kind of data.prompts", kind, PROMPT_KINDS))
    weights = np.array([float(named.get(kind, 0.0)) for kind in PROMPT_KINDS])
    # Before the division: a sum of zero would make every share nan.
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.sum() > 0):
        raise ValueError(
            f"data.prompts: got {dict(named)}, expected frequencies of 0 or more with a sum above "
            f"0; set at least one of {', '.join(PROMPT_KINDS)}"
        )
    return weights / weights.sum()


def _empty_mask(prompt: str) -> ValueError:
    return ValueError(
        f"mask: got no pixel to place a {prompt} on, expected a non-empty mask; leave out empty "
        f"targets (records list only non-empty ones)"
    )

"""One target in one image under the hands of a person: click, look, undo.

    segmentation = model.segment(image, "liver", points=[(120, 88)])
    segmentation = segmentation.click(140, 60, positive=False)
    segmentation.mask, segmentation.uncertainty, segmentation.predicted_dice
    segmentation = segmentation.undo()

A `Segmentation` never changes; each click gives a new one that knows the one before. So undo is
exact and of any depth, and costs the memory of one small prediction per click. The image and the
words are encoded once, when the first is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from biascare.data.transforms import Geometry, apply_points, restore_logits
from biascare.inference.segmenter import Decoded, Encoded, Segmenter
from biascare.interfaces import (
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    POINT_NEGATIVE,
    POINT_POSITIVE,
    Prompts,
)

Click = tuple[float, float, int]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Segmentation:
    """A mask, how it was prompted, and how sure the model is. Coordinates are pixels of the
    original image, x to the right and y down; the pixel in column 3 and row 0 is (3, 0)."""

    segmenter: Segmenter
    encoded: Encoded
    size: tuple[int, int]  # height, width
    mask_prompt: bool  # feed the logits of the mask before to a correction, as in training
    clicks: tuple[Click, ...]  # x, y, label 1 inside the target or 0 outside
    box: Box | None  # XYXY
    decoded: Decoded
    previous: Segmentation | None = None

    @classmethod
    def start(
        cls,
        segmenter: Segmenter,
        encoded: Encoded,
        size: tuple[int, int],
        *,
        mask_prompt: bool,
        clicks: tuple[Click, ...] = (),
        box: Box | None = None,
    ) -> Segmentation:
        """The first mask of an encoded image. Raises ValueError for prompts outside it."""
        check_prompts(clicks, box, size)
        prompts = prompts_of(clicks, box, size, segmenter.image_size)
        # No mask prompt for the first: there is no mask yet that it could correct.
        return cls(
            segmenter=segmenter,
            encoded=encoded,
            size=size,
            mask_prompt=mask_prompt,
            clicks=clicks,
            box=box,
            decoded=segmenter.decode(encoded, prompts),
        )

    def click(self, x: float, y: float, *, positive: bool = True) -> Segmentation:
        """Correct the mask: `positive` says that (x, y) belongs to the target.

        Raises ValueError outside the image.
        """
        # A click beside the image would be moved or wrapped by the geometry, without a word.
        check_inside(x, y, self.size)
        label = POINT_POSITIVE if positive else POINT_NEGATIVE
        clicks = (*self.clicks, (float(x), float(y), label))
        prompts = prompts_of(clicks, self.box, self.size, self.segmenter.image_size)
        # The logits of the mask on screen: that is what the person corrects.
        before = self.decoded.prediction.low_res_logits if self.mask_prompt else None
        decoded = self.segmenter.decode(self.encoded, prompts, before)
        return replace(self, clicks=clicks, decoded=decoded, previous=self)

    def undo(self) -> Segmentation:
        """As it was before the last click. Raises ValueError where there was none."""
        if self.previous is None:
            raise ValueError("nothing to undo: this is the first mask")
        return self.previous

    def reset(self) -> Segmentation:
        """As it was before the first correction."""
        return self if self.previous is None else self.previous.reset()

    @cached_property
    def logits(self) -> NDArray[np.float32]:
        """[H, W] at native size; the mask is where they are above zero."""
        logits = self.decoded.prediction.mask_logits
        native: NDArray[np.float32] = restore_logits(logits, *self.size)[0].cpu().numpy()
        return native

    @property
    def mask(self) -> NDArray[np.bool_]:
        """[H, W] bool at native size."""
        mask: NDArray[np.bool_] = self.logits > 0
        return mask

    @property
    def predicted_dice(self) -> float:
        """What the quality head expects of this mask."""
        return float(self.decoded.prediction.predicted_dice[0])

    @cached_property
    def uncertainties(self) -> dict[str, float]:
        """All label-free uncertainties by name; see `biascare.uncertainty.label_free`."""
        return {name: float(value[0]) for name, value in self.decoded.uncertainty.items()}

    @cached_property
    def click_disagreement(self) -> float:
        """How far the mask changes when its clicks or its box move by a few pixels, 0 to 1. Decodes
        once more, when it is first asked for: a click must not wait for it."""
        prompts = prompts_of(self.clicks, self.box, self.size, self.segmenter.image_size)
        before = None
        if self.mask_prompt and self.previous is not None:
            before = self.previous.decoded.prediction.low_res_logits
        found = self.segmenter.click_disagreement(self.encoded, prompts, self.decoded, before)
        return float(found[0])

    @property
    def uncertainty(self) -> float:
        """Eq. 6 with the predicted Dice: the higher, the sooner an expert should look."""
        return self.uncertainties["joint_label_free"]


def prompts_of(
    clicks: tuple[Click, ...], box: Box | None, size: tuple[int, int], image_size: int
) -> Prompts:
    """Native clicks and box of one row -> prompts of the square model input."""
    # A box is two more points, as SAM's prompt encoder has it, and stands before the clicks that
    # correct it.
    corners = [] if box is None else [(*box[:2], BOX_TOP_LEFT), (*box[2:], BOX_BOTTOM_RIGHT)]
    points = [*corners, *clicks]
    native = np.array([point[:2] for point in points], np.float64).reshape(-1, 2)
    coords = apply_points(native, Geometry.full(*size, image_size)).astype(np.float32)
    return Prompts(
        point_coords=torch.from_numpy(coords)[None],
        point_labels=torch.tensor([[point[2] for point in points]], dtype=torch.int64),
    )


def check_inside(x: float, y: float, size: tuple[int, int]) -> None:
    """Raises ValueError for a click that hits no pixel."""
    height, width = size
    # Pixel centres are whole numbers, so a pixel reaches half a unit to each side. Written so that
    # NaN fails too.
    if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
        raise ValueError(
            f"click: got x={x:g}, y={y:g}, expected 0 <= x <= {width - 1} and 0 <= y <= "
            f"{height - 1}, pixels of the original image of {height} x {width}"
        )


def check_prompts(clicks: Sequence[Click], box: Box | None, size: tuple[int, int]) -> None:
    """Raises ValueError for a click outside the image, and a box upside down or outside it."""
    for x, y, _ in clicks:
        check_inside(x, y, size)
    if box is None:
        return
    x0, y0, x1, y1 = box
    check_inside(x0, y0, size)
    check_inside(x1, y1, size)
    if x0 > x1 or y0 > y1:
        raise ValueError(
            f"box: got {box}, expected x0, y0, x1, y1 with x0 <= x1 and y0 <= y1, the left, top, "
            "right and bottom edge in pixels"
        )

"""One target in one image under the hands of a person: click, look, undo.

    segmentation = model.segment(image, "liver", points=[(120, 88)])
    segmentation = segmentation.click(140, 60, positive=False)
    segmentation.mask, segmentation.uncertainty, segmentation.predicted_dice
    segmentation = segmentation.undo()

A `Segmentation` never changes; each click gives a new one that knows the one before. So undo is
exact and of any depth, and costs the memory of one small prediction per click. The image and the
words are encoded once, when the first is made.

    session = model.session(image, "liver")
    session.box((40, 30, 160, 120)); session.click(140, 60, positive=False)
    session.undo(); session.redo(); session.reset()
    session.decide("accept")

A `Session` is what a page or a script holds while a person works: a list of segmentations and the
place in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from biascare.choices import unknown
from biascare.data.transforms import Geometry, apply_points, restore_logits
from biascare.inference.segmenter import Decoded, Encoded, Segmenter
from biascare.interfaces import (
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    POINT_NEGATIVE,
    POINT_POSITIVE,
    Prompts,
)
from biascare.uncertainty import pixel_entropy

STEPS = {
    "click": ("kind", "x", "y", "positive"),
    "box": ("kind", "box"),
    "undo": ("kind",),
    "redo": ("kind",),
    "reset": ("kind",),
}
"""What a person can do to a mask, and the keys by which a page or a file says it."""

DECISIONS = ("accept", "reject", "unsure")
Step = TypeVar("Step", bound="Segmentation | None")
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
    mask_before: torch.Tensor | None = None  # [1, 4h, 4w] logits that this one was decoded with

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
        return replace(self, clicks=clicks, decoded=decoded, previous=self, mask_before=before)

    def boxed(self, box: Box) -> Segmentation:
        """The target is in `box` (x0, y0, x1, y1), which takes the place of a box before; clicks
        stay. Raises ValueError for a box upside down or outside the image."""
        check_prompts((), box, self.size)
        prompts = prompts_of(self.clicks, box, self.size, self.segmenter.image_size)
        # Without the mask before: a box says anew where the target is, and training draws boxes for
        # first masks only.
        decoded = self.segmenter.decode(self.encoded, prompts)
        return replace(self, box=box, decoded=decoded, previous=self, mask_before=None)

    def undo(self) -> Segmentation:
        """As it was before the last click or box. Raises ValueError where there was none."""
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
    def pixel_uncertainty(self) -> NDArray[np.float32]:
        """[H, W] at native size: the entropy of each pixel in bits, 1 where the model cannot say
        whether it belongs to the target."""
        bits: NDArray[np.float32] = pixel_entropy(torch.from_numpy(self.logits)).numpy()
        return bits

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
        found = self.segmenter.click_disagreement(
            self.encoded, prompts, self.decoded, self.mask_before
        )
        return float(found[0])

    @property
    def uncertainty(self) -> float:
        """Eq. 6 with the predicted Dice: the higher, the sooner an expert should look."""
        return self.uncertainties["joint_label_free"]


class Session:
    """One target in one image, with everything a person did to it and may take back.

    `current` is the segmentation on screen, None while nothing says what to segment. Undo and redo
    walk through what was kept and decode nothing, so they give the same bits; a new prompt drops
    what was taken back.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        pixels: NDArray[np.uint8],
        encoded: Encoded,
        *,
        mask_prompt: bool,
    ):
        """`pixels` [H, W, 3] and what `segmenter` made of them; with a text, the first mask is the
        one that the words alone give."""
        self.segmenter = segmenter
        self.pixels = pixels
        self.encoded = encoded
        self.size = pixels.shape[0], pixels.shape[1]
        self.mask_prompt = mask_prompt
        self.decision: str | None = None
        first = None if encoded.features.text_embedding is None else self._start()
        self._steps: list[Segmentation | None] = [first]
        self._place = 0

    @property
    def current(self) -> Segmentation | None:
        return self._steps[self._place]

    @property
    def can_undo(self) -> bool:
        return self._place > 0

    @property
    def can_redo(self) -> bool:
        return self._place + 1 < len(self._steps)

    def click(self, x: float, y: float, *, positive: bool = True) -> Segmentation:
        """`positive` says that (x, y) is of the target. Raises ValueError outside the image."""
        if self.current is not None:
            return self._append(self.current.click(x, y, positive=positive))
        label = POINT_POSITIVE if positive else POINT_NEGATIVE
        return self._append(self._start(clicks=((float(x), float(y), label),)))

    def box(self, box: Box) -> Segmentation:
        """The target is in x0, y0, x1, y1. Raises ValueError for a box upside down or outside."""
        if self.current is not None:
            return self._append(self.current.boxed(box))
        return self._append(self._start(box=box))

    def apply(self, prompt: Mapping[str, Any]) -> None:
        """A step as a page or a file writes it: {"kind": "click", "x": 3, "y": 4, "positive":
        true}, {"kind": "box", "box": [x0, y0, x1, y1]}, or the kind "undo", "redo" or "reset".

        Raises ValueError for another kind, a click or box without its numbers, and what the step
        itself refuses; the session is then as before.
        """
        kind = prompt.get("kind")
        if kind not in STEPS:
            raise ValueError(unknown("kind", str(kind), STEPS))
        # A misspelt "positive" would turn a correction into its opposite.
        for key in prompt:
            if key not in STEPS[kind]:
                raise ValueError(unknown(f"key of {kind}", str(key), STEPS[kind]))
        if kind == "click":
            positive = prompt.get("positive", True)
            if not isinstance(positive, bool):
                raise ValueError(f"click: got positive={positive!r}, expected true or false")
            x, y = numbers(prompt, "x", 1) + numbers(prompt, "y", 1)
            self.click(x, y, positive=positive)
        elif kind == "box":
            x0, y0, x1, y1 = numbers(prompt, "box", 4)
            self.box((x0, y0, x1, y1))
        else:
            {"undo": self.undo, "redo": self.redo, "reset": self.reset}[kind]()

    def reset(self) -> None:
        """Back to the beginning, which `undo` takes back like any other step."""
        self._append(self._steps[0])

    def undo(self) -> None:
        """One step back. Raises ValueError where there is none."""
        if not self.can_undo:
            raise ValueError("nothing to undo: this is the beginning")
        self._go(self._place - 1)

    def redo(self) -> None:
        """One step forward again. Raises ValueError where nothing was taken back."""
        if not self.can_redo:
            raise ValueError("nothing to redo: nothing was undone since the last prompt")
        self._go(self._place + 1)

    def decide(self, decision: str) -> None:
        """What the person says of the mask on screen; the next step withdraws it.

        Raises ValueError for a word not in `DECISIONS`, and for accepting no mask.
        """
        if decision not in DECISIONS:
            raise ValueError(unknown("decision", decision, DECISIONS))
        if decision == "accept" and self.current is None:
            raise ValueError("there is no mask to accept yet; click into the target first")
        self.decision = decision

    def _start(self, clicks: tuple[Click, ...] = (), box: Box | None = None) -> Segmentation:
        return Segmentation.start(
            self.segmenter,
            self.encoded,
            self.size,
            mask_prompt=self.mask_prompt,
            clicks=clicks,
            box=box,
        )

    def _append(self, step: Step) -> Step:
        del self._steps[self._place + 1 :]
        self._steps.append(step)
        self._go(self._place + 1)
        return step

    def _go(self, place: int) -> None:
        # A step keeps its small prediction; its logits at native size, which may be a hundred times
        # larger, are made again when it is looked at again.
        if self.current is not None:
            vars(self.current).pop("logits", None)
        self._place, self.decision = place, None


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


def numbers(prompt: Mapping[str, Any], key: str, count: int) -> tuple[float, ...]:
    """The `count` numbers of a prompt under `key`. Raises ValueError for anything else."""
    value = prompt.get(key)
    found = [value] if count == 1 else value
    if not isinstance(found, list | tuple) or len(found) != count:
        raise ValueError(f"{prompt['kind']}: got {key}={value!r}, expected {count} number(s)")
    if not all(type(number) in (int, float) for number in found):
        raise ValueError(f"{prompt['kind']}: got {key}={value!r}, expected numbers in pixels")
    return tuple(float(number) for number in found)


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

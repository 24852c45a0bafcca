"""How images of a raw release are turned before they become records, image and masks alike.

CT, MRI and X-ray records follow the radiological convention: front of the patient up, patient's
right side at image left. A vertical flip and a half turn both bring the spine down, but only one of
them keeps left and right apart, so nothing here is guessed: each entry says what was looked at.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from biascare.choices import did_you_mean


class Orientation(NamedTuple):
    """What is done to every image and mask of a sub-dataset."""

    turn: str  # a key of TURNS
    reviewed: bool  # images were looked at, left and right included
    note: str


TURNS: dict[str, tuple[Image.Transpose | None, Callable[[np.ndarray], np.ndarray]]] = {
    "none": (None, lambda mask: mask),
    "flip_vertical": (Image.Transpose.FLIP_TOP_BOTTOM, np.flipud),
    "flip_horizontal": (Image.Transpose.FLIP_LEFT_RIGHT, np.fliplr),
    "rotate_90": (Image.Transpose.ROTATE_90, lambda mask: np.rot90(mask, 1)),
    "rotate_180": (Image.Transpose.ROTATE_180, lambda mask: np.rot90(mask, 2)),
    "rotate_270": (Image.Transpose.ROTATE_270, lambda mask: np.rot90(mask, 3)),
    "transpose": (Image.Transpose.TRANSPOSE, lambda mask: mask.T),
    "transverse": (Image.Transpose.TRANSVERSE, lambda mask: np.rot90(mask, 2).T),
}
"""Name -> (what Pillow does to the image, what numpy does to a mask [H, W]). The eight symmetries
of a rectangle; rotations are counter-clockwise."""

# A half turn would bring the spine down too, and mirror left and right: `reviewed` says whether
# somebody looked at the sides.
_SPINE_UP = Orientation(
    "flip_vertical",
    False,
    "known to lie with the spine up; the vertical flip was not checked for left and right",
)
_ROTATED = Orientation(
    "none",
    False,
    "known to be rotated by 90 degrees, direction not checked: left as it is. Look at some images "
    "and give --orientation NAME=rotate_90 (or rotate_270, transpose, transverse)",
)

ORIENTATIONS = {
    "BTCV": Orientation(
        "flip_vertical", True, "the release has the spine up and the liver at image left"
    ),
    "AbdomenCT1K": _SPINE_UP,
    "AMOS": _SPINE_UP,
    "AMOS2022": _SPINE_UP,
    "FLARE": _SPINE_UP,
    "FLARE21": _SPINE_UP,
    "FLARE22": _SPINE_UP,
    "MSD_Heart": _SPINE_UP,
    "MSD_Liver": _SPINE_UP,
    "MSD_Prostate": _SPINE_UP,
    "MSD_Spleen": _SPINE_UP,
    "Totalsegmentator_dataset": _SPINE_UP,
    "KiTS": _ROTATED,
    "KiTS2019": _ROTATED,
    "KiTS2021": _ROTATED,
    "finding_lungs": _ROTATED,
    "finding_lungs_in_ct_data": _ROTATED,
}
"""Sub-datasets of IMed-361M. Names are compared without case, "-", "_" and spaces."""

_UNKNOWN = Orientation("none", False, "not in the reviewed table: left as it is")


def _key(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


_BY_KEY = {_key(name): orientation for name, orientation in ORIENTATIONS.items()}


def orientation_of(dataset: str, overrides: dict[str, str] | None = None) -> Orientation:
    """Orientation of a sub-dataset: the user's word first, then the table, else left as it is."""
    chosen = {_key(name): turn for name, turn in (overrides or {}).items()}
    if _key(dataset) in chosen:
        return Orientation(chosen[_key(dataset)], True, "chosen on the command line")
    return _BY_KEY.get(_key(dataset), _UNKNOWN)


def parse_overrides(items: list[str]) -> dict[str, str]:
    """["NAME=flip_vertical", ...] -> {name: turn}. Raises ValueError for an unknown turn."""
    overrides = {}
    for item in items:
        name, separator, turn = item.partition("=")
        if not (name and separator) or turn not in TURNS:
            near = did_you_mean(turn, TURNS)
            raise ValueError(
                f"--orientation takes NAME=TURN with TURN one of {', '.join(TURNS)}; "
                f"got {item!r}{near}"
            )
        overrides[name] = turn
    return overrides


def turn_image(data: bytes, turn: str) -> bytes:
    """Turn an encoded image: bytes -> bytes.

    "none" returns the very bytes; anything else re-encodes as PNG, which loses nothing of the
    pixels, bit depth or palette. The pixels are decoded in any case, so that a truncated file is
    found here (OSError) and not in the middle of a training run.
    """
    operation = TURNS[turn][0]
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        image.load()
        if operation is None:
            # The very bytes, so that a JPEG is not compressed a second time.
            return data
        image.transpose(operation).save(buffer, format="PNG")
    return buffer.getvalue()


def turn_mask(mask: np.ndarray, turn: str) -> np.ndarray:
    """Turn a mask [H, W] exactly as `turn_image` turns its image."""
    return np.ascontiguousarray(TURNS[turn][1](mask))


def sides_agree(targets: list[tuple[str, np.ndarray]]) -> list[bool]:
    """Evidence about left and right in one turned image.

    For every pair "right X" and "left X": whether the right one lies nearer the left border, as the
    radiological convention has it. Masks are bool [H, W].
    """
    # The middle of the columns and not of the pixels: a large organ may bulge over the midline.
    columns = {name: np.flatnonzero(mask.any(axis=0)).mean() for name, mask in targets}
    return [
        bool(columns[name] < columns["left" + name.removeprefix("right")])
        for name in columns
        if name.startswith("right ") and "left" + name.removeprefix("right") in columns
    ]

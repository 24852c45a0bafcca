"""Masks as COCO run-length codes: exact, small, and checked before a byte of them is believed.

    rle = encode_mask(mask)                      # bool [H, W] -> bytes; the size is not part of it
    mask = decode_mask(rle, height, width)       # uint8 [H, W]

A code is a text of characters "0" to "o", 48 and six bits: five of a number, lowest first, and one
that says that the number goes on. The numbers are the lengths of runs of 0 and 1 in turn, down the
columns; from the fourth on they are differences to the run two before.

pycocotools writes the codes. It does not read them here: its C code follows a damaged code beyond
the end of its own memory, and on the outline of an organ it takes several times as long.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco

_FIRST = ord("0")
_MAX_CHARACTERS = 6  # of one number: 30 bits, while MAX_IMAGE_PIXELS needs 27 and a sign


def encode_mask(mask: NDArray[np.bool_]) -> bytes:
    """COCO run-length code of a mask: bool [H, W] -> bytes. Exact; the size is not part of it."""
    # pycocotools takes any uint8: of a label map it would count the changes of value as runs.
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ValueError(
            f"a mask must be a bool array [H, W], got {mask.dtype} {list(mask.shape)}; "
            "threshold or compare it first"
        )
    return bytes(coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"])


def decode_mask(rle: bytes, height: int, width: int, *, by_rows: bool = True) -> NDArray[np.uint8]:
    """Inverse of `encode_mask`: bytes -> uint8 [height, width] in {0, 1}.

    The code runs along columns, and so does the memory of the result without `by_rows`, which
    saves the turn where only a part of the mask is looked at.

    Raises ValueError when the code is damaged or does not describe a mask of this size.
    """
    runs = mask_runs(rle, height, width)
    is_set = (np.arange(len(runs)) % 2).astype(np.uint8)
    mask = np.repeat(is_set, runs).reshape(width, height)
    if not by_rows:
        return mask.T
    # Pillow transposes in blocks, twice as fast as numpy on large masks.
    return np.array(Image.fromarray(mask).transpose(Image.Transpose.TRANSPOSE))


def mask_runs(rle: bytes, height: int, width: int) -> NDArray[np.int64]:
    """Lengths of the runs of a code, of 0 and 1 in turn, down the columns: [R], their sum is
    height * width. Only the first may be 0, so that a mask has one code.

    Raises ValueError when the code is damaged or does not describe a mask of this size.
    """
    try:
        # Everything is checked before `np.repeat` allocates: a damaged length could ask for
        # terabytes.
        runs = _differences(rle)
        # The first number stands alone, those of 1 and of 0 are summed along their own kind.
        runs[1::2] = np.cumsum(runs[1::2])
        runs[2::2] = np.cumsum(runs[2::2])
        if runs[0] < 0 or (runs[1:] <= 0).any():
            raise ValueError("a run has no pixel")
        if runs.sum() != height * width:
            raise ValueError(f"it has {runs.sum()} pixels")
    except ValueError as error:
        raise ValueError(
            f"mask code of {len(rle)} bytes does not describe {height} x {width} pixels: {error}; "
            "it was altered after it was written, or belongs to another image"
        ) from error
    return runs


def _differences(rle: bytes) -> NDArray[np.int64]:
    """The numbers that are written in a code: [R]."""
    bits = np.frombuffer(rle, np.uint8) - np.uint8(_FIRST)  # wraps: a byte below ends above 63
    if not len(bits) or bits.max() > 63:
        raise ValueError("it holds bytes that no code has" if rle else "it is empty")
    last = np.flatnonzero(bits < 32)
    if not len(last) or last[-1] != len(bits) - 1:
        raise ValueError("it ends inside a number")
    lengths = np.diff(last, prepend=-1)
    if lengths.max() > _MAX_CHARACTERS:  # also keeps every sum far from overflow
        raise ValueError("a number in it is too long")
    highest = bits[last].astype(np.int64)
    numbers: NDArray[np.int64] = (highest & 31) - ((highest & 16) << 1)  # two's complement
    longer = np.arange(len(last))
    for place in range(1, int(lengths.max())):  # most numbers have one digit or two
        longer = longer[lengths[longer] > place]
        numbers[longer] = (numbers[longer] << 5) | (bits[last[longer] - place] & 31)
    return numbers

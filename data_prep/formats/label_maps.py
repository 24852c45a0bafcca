"""Label maps: image files whose pixels are numbers of structures, or colours that stand for them.

    values = read_label_map(path.read_bytes())    # [H, W] integers, or [H, W, 3] colours

Programs store the same map in many modes: grey, palette, grey in three channels, opaque RGBA. All
of them are read here to the same numbers, and what could only be guessed is refused: colours are
returned as colours, for whoever knows what they mean.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from biascare.records import MAX_IMAGE_PIXELS
from data_prep.pipeline.shards import UnusableItemError

FORMATS = ("PNG", "TIFF", "BMP", "GIF")
JPEG_START = b"\xff\xd8\xff"
NOT_EXACT = "JPEG mask: its values are not exact, store masks as PNG"


def read_label_map(data: bytes) -> np.ndarray:
    """An image file of labels -> integers [H, W], or colours uint8 [H, W, 3].

    A palette PNG gives its indices; grey stored in three equal channels is grey. Raises
    UnusableItemError for JPEG, transparency, other modes, too many pixels, and unreadable files.
    """
    if data.startswith(JPEG_START):
        raise UnusableItemError(NOT_EXACT)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise UnusableItemError("mask has too many pixels")
            values = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnusableItemError("mask unreadable, or not PNG, TIFF, BMP or GIF") from error
    if values.ndim == 3 and values.shape[2] in (2, 4):
        # A half transparent mask may hold soft edges; where it begins is not ours to say.
        if (values[..., -1] != 255).any():
            raise UnusableItemError("mask is partly transparent")
        values = values[..., :-1]
    # Many tools store a mask as grey in three channels.
    if values.ndim == 3 and (values == values[..., :1]).all():
        values = values[..., 0]
    if values.dtype == np.bool_:
        values = values.astype(np.uint8)
    if values.dtype.kind not in "iu":
        raise UnusableItemError(f"mask holds {values.dtype} numbers, labels are integers")
    return values

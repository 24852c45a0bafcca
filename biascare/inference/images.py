"""What users call an image -> pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from biascare.data.transforms import decode_image

ImageLike = str | Path | bytes | Image.Image | np.ndarray


def as_pixels(image: ImageLike) -> NDArray[np.uint8]:
    """A file, encoded bytes, a PIL image or an array -> [H, W, 3] uint8.

    By the rules of records: grey becomes three channels, more than 8 bits are stretched to the
    image's own range, an EXIF orientation is not applied. Arrays are [H, W] or [H, W, 3] of uint8.

    Raises ValueError for anything else.
    """
    if isinstance(image, str | Path):
        try:
            return decode_image(Path(image).read_bytes())
        except OSError as error:
            raise ValueError(f"image: {image} cannot be read ({error.strerror})") from error
    if isinstance(image, bytes):
        return decode_image(image)
    if isinstance(image, Image.Image):
        encoded = io.BytesIO()
        # TIFF keeps every mode of PIL, 16-bit and floating-point grey too.
        image.save(encoded, "TIFF")
        return decode_image(encoded.getvalue())
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"image: got {type(image).__name__}, expected a path, encoded bytes, a PIL image or an "
            "array"
        )
    grey = image.ndim == 2
    if image.dtype != np.uint8 or not (grey or (image.ndim == 3 and image.shape[2] == 3)):
        raise ValueError(
            f"image: got an array of {image.dtype} {list(image.shape)}, expected uint8 [H, W] or "
            "[H, W, 3]; apply the window of a CT, or scale other values to 0 .. 255, first"
        )
    return np.repeat(image[..., None], 3, axis=2) if grey else np.ascontiguousarray(image)

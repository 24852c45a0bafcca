"""Grey images of more than 8 bits, shown by one range for a whole data set.

    shown = window_of(args.window, files)               # while planning
    image = in_window(read_image(file), shown)          # per image: 8 bits

Each image stretched to its own darkest and brightest value would show one tissue in other greys in
every crop. So the range is stated (`--window LOW HIGH`), or pooled over images of the data set; it
is part of what the manifest says of the preparation.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from data_prep.formats.slices import PERCENTILES, Range, png_of, to_grey
from data_prep.pipeline.release_files import EncodedImage, note
from data_prep.pipeline.shards import UnusableItemError

DEEP_MODES = ("I;16", "I;16B", "I;16L", "I", "F")
"""Pillow's modes of grey with more than 8 bits."""

NUM_POOLED = 200
"""Images that the range is pooled over, evenly spaced."""


def add_window_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--window",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="stored values shown as black and white, of grey images with more than 8 bits; "
        f"default: percentiles {PERCENTILES[0]} and {PERCENTILES[1]} of {NUM_POOLED} images "
        "together",
    )


def window_of(
    stated: Sequence[float] | None, images: Sequence[Callable[[], EncodedImage]]
) -> Range | None:
    """The range of a data set: as stated, or pooled over `images` (readers of single ones), with a
    note; None where none of those that are looked at has more than 8 bits.

    Raises ValueError for a stated range without extent.
    """
    if stated is not None:
        low, high = stated
        if not low < high:
            raise ValueError(f"--window: got {low:g} {high:g}, expected LOW below HIGH")
        return low, high
    chosen = np.linspace(0, len(images) - 1, min(len(images), NUM_POOLED)).astype(int)
    pooled = []
    for index in chosen.tolist():
        try:
            values = _deep_values(images[index]())
        except (UnusableItemError, OSError):
            continue  # met again, and told, when it is converted
        if values is not None:
            # Of a large image some pixels tell its range: memory stays bounded.
            pooled.append(values.ravel()[:: max(1, values.size // 50_000)])
    if not pooled:
        return None
    low, high = (float(end) for end in np.percentile(np.concatenate(pooled), PERCENTILES))
    high = high if high > low else low + 1
    note(
        f"grey images of more than 8 bits are shown from {low:g} to {high:g}, percentiles "
        f"{PERCENTILES[0]} and {PERCENTILES[1]} of {len(pooled)} of them; --window LOW HIGH states "
        "another range"
    )
    return low, high


def in_window(image: EncodedImage, shown: Range | None) -> EncodedImage:
    """An image of at most 8 bits as it is, a deeper one by `shown` as an 8-bit PNG.

    Raises UnusableItemError for a deep image without a range: stretching it alone would be a guess
    that nobody sees.
    """
    values = _deep_values(image)
    if values is None:
        return image
    if shown is None:
        raise UnusableItemError("more than 8 bits: state the range with --window LOW HIGH")
    return image._replace(data=png_of(to_grey(values, shown)))


def _deep_values(image: EncodedImage) -> np.ndarray | None:
    with Image.open(io.BytesIO(image.data)) as opened:
        if opened.mode not in DEEP_MODES:
            return None
        return np.asarray(opened).astype(np.float32)

"""Decode, resize and augment an image together with its masks, clicks and boxes.

    geometry = draw_geometry(height, width, masks, 256, key, augment=True, allow_flip=True)
    model_image = read_image(record_bytes, geometry, intensity_key=key)
    model_masks = np.stack([apply_mask(mask, geometry) for mask in masks])
    point_coords, point_labels = draw_prompts(model_masks, key, {"point": 0.5, "box": 0.5})

One `Geometry` serves image, masks, points and both pathways. Every random choice is a pure function
of an integer key; the functions draw from separate streams, so one key per sample is enough.

Coordinates are x, y pixel centres: the pixel in column 3 and row 0 is the point (3, 0) and covers
[2.5, 3.5] x [-0.5, 0.5]. A scale s moves it to ((x + 0.5) * s - 0.5, (y + 0.5) * s - 0.5).

The trade-off of mask resizing: it costs more than an interpolation, and in return no lesion, vessel
or gland disappears (see `apply_mask`).
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import PCG64, Generator, SeedSequence
from numpy.typing import NDArray
from PIL import Image

from biascare.choices import unknown
from biascare.data.mask_resize import resize_components

Array = NDArray[Any]

MAX_PIXELS = 8192 * 8192
"""A larger image is refused before it is decoded: a few bytes can declare gigabytes."""

REDUCED_MARGIN = 1.25
"""A JPEG is read at a half, a quarter or an eighth where this times the result's pixels remain."""

CROP_SCALE = (0.6, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
MIN_TARGET_SHARE = 0.5

_GEOMETRY, _INTENSITY, _PROMPTS = range(3)  # random streams of one key
_NUM_NOISE = 2**21  # stored normal deviates, of which each image takes a stretch
_SIDE_WORDS = re.compile(
    r"(?<![a-z])(?:(?:left|right)(?:most|wards?|sided)?|(?:bi|uni|ipsi|contra)?lateral(?:ly|ity)?"
    r"|medial(?:ly)?|(?:counter|anti)?clockwise|o'clock)(?![a-z])",
    re.IGNORECASE,
)
_SIDE_SIGNS = re.compile(r"\b(?:L|R|LT|RT|[LR][UL]L|RML|O[DS]|[LR][AV])\b|[左右]")


class Geometry(NamedTuple):
    """A crop of the native image, perhaps mirrored, resized to a square."""

    x0: float  # left edge of the crop in native pixels, as an edge: 0 is the image border
    y0: float
    x1: float  # right edge, exclusive: the width keeps all columns
    y1: float
    flip: bool  # mirrored left to right after the crop
    size: int  # side S of the result in pixels

    @classmethod
    def full(cls, height: int, width: int, size: int, *, flip: bool = False) -> Geometry:
        """The whole image; without flip what evaluation uses, and `restore_logits` inverts."""
        return cls(x0=0, y0=0, x1=width, y1=height, flip=flip, size=size)


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Encoded bytes -> [H, W, 3] uint8, writable.

    Grey becomes three equal channels; the first frame of several counts; transparent pixels are
    laid on black. Grey of more than 8 bits is stretched so that its own minimum becomes 0 and its
    maximum 255 (a constant image becomes 0): converters that know the window, such as those for
    CT, apply it before they write the record. An EXIF orientation is not applied, because height,
    width and masks of a record describe the stored pixels; converters write upright pixels.

    Raises:
        ValueError: not an image, truncated, damaged, or more than `MAX_PIXELS`.
    """
    image, _ = _decode(data)
    return np.array(image.convert("RGB"))


def read_image(
    data: bytes, geometry: Geometry, *, intensity_key: int | None = None
) -> NDArray[np.uint8]:
    """Encoded bytes -> [S, S, 3] uint8: `apply_image(decode_image(data), geometry)`, only faster.

    The same pixels without copying the native image to an array and back, and grey images stay one
    channel until the end. A JPEG much larger than needed is reduced while it is decoded, block by
    block, which differs from resizing by less than one grey level on average.

    With `intensity_key`, `draw_intensity` as well.

    Raises:
        ValueError: see `decode_image` and `apply_image`.
    """
    image, reduction = _decode(data, geometry)
    pixels = _resize(image, geometry, reduction)
    # After the resizing, which leaves fewer pixels to change and noise that no filter has smoothed.
    if intensity_key is not None:
        pixels = draw_intensity(pixels, intensity_key)
    if pixels.shape[2] == 3:
        return pixels
    # Repeated last, so that grey costs a third until here; channels apart in memory.
    return np.moveaxis(np.repeat(np.moveaxis(pixels, 2, 0), 3, axis=0), 0, 2)


def _decode(data: bytes, geometry: Geometry | None = None) -> tuple[Image.Image, int]:
    """A complete image of mode L or RGB, and how many native pixels a side of its pixels spans: 1,
    or more in a JPEG of which `geometry` needs less. See `decode_image` for rules and errors."""
    try:
        image = Image.open(io.BytesIO(data))
        native_width, native_height = image.size  # of the header; nothing is decoded yet
        if native_width * native_height <= MAX_PIXELS:
            drafted = None
            if geometry is not None:
                # Asked for by the crop and not by the image: a small crop needs its pixels.
                needed = REDUCED_MARGIN * geometry.size
                width = needed * native_width / max(geometry.x1 - geometry.x0, 1)
                height = needed * native_height / max(geometry.y1 - geometry.y0, 1)
                drafted = image.draft(None, (math.ceil(width), math.ceil(height)))
            image.load()  # here, so that a truncated file is refused here
            return _to_8_bit(image), 1 if drafted is None else round(native_width / drafted[1][2])
    except Exception as error:  # the parsers of PIL raise whatever damaged bytes make them meet
        raise ValueError(
            f"image: got {len(data)} bytes that do not decode ({type(error).__name__}: {error}), "
            f"expected a complete PNG, JPEG, TIFF or similar file; prepare the record again"
        ) from error
    raise ValueError(
        f"image: got {native_width} x {native_height} pixels, expected at most {MAX_PIXELS}; "
        f"tile or shrink it when preparing the records"
    )


def _to_8_bit(image: Image.Image) -> Image.Image:
    """PIL image of any mode -> mode L or RGB; see `decode_image` for the rules."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image, np.float64)
        # One pixel that is not a number must not set the range of all others.
        finite = np.isfinite(grey)
        low, high = (grey[finite].min(), grey[finite].max()) if finite.any() else (0.0, 0.0)
        scaled = np.where(finite, grey - low, 0.0) * (255.0 / (high - low) if high > low else 0.0)
        return Image.fromarray(np.rint(scaled).astype(np.uint8))
    if image.has_transparency_data:  # what lies behind transparent pixels was never seen
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    if image.mode in ("L", "RGB"):
        return image  # `convert` would copy it
    return image.convert("L" if image.mode == "1" else "RGB")


def apply_image(image: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:
    """[H, W, 3] uint8 native -> [S, S, 3] uint8, bilinear, antialiased when shrinking.

    Raises:
        ValueError: the crop is empty or reaches outside the image.
    """
    return _resize(Image.fromarray(image), geometry)


def apply_whole(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """[H, W, 3] uint8 native -> [size, size, 3] uint8, as evaluation shows an image."""
    return apply_image(image, Geometry.full(image.shape[0], image.shape[1], size))


def _resize(image: Image.Image, geometry: Geometry, reduction: int = 1) -> NDArray[np.uint8]:
    """PIL image of mode L or RGB -> [S, S, C], C = 1 or 3; see `apply_image` and `_decode`.

    The channels lie apart in memory, as the model wants them. torch is twice as fast as Pillow, but
    takes whole pixels only.
    """
    _check_inside(image.height * reduction, image.width * reduction, geometry)
    box = [edge / reduction for edge in geometry[:4]]
    size = (geometry.size, geometry.size)
    # A reduced JPEG can cut the crop's edges between pixels, and only Pillow resizes from there.
    if not all(edge.is_integer() for edge in box):
        image = image.resize(size, Image.Resampling.BILINEAR, box=(box[0], box[1], box[2], box[3]))
        box = [0, 0, *size]
    x0, y0, x1, y1 = map(int, box)
    crop = torch.tensor(np.atleast_3d(np.asarray(image)[y0:y1, x0:x1])).permute(2, 0, 1)
    planes = torch.nn.functional.interpolate(crop[None], size, mode="bilinear", antialias=True)[0]
    return (planes.flip(2) if geometry.flip else planes).permute(1, 2, 0).numpy()


def apply_mask(mask: Array, geometry: Geometry) -> NDArray[np.uint8]:
    """[H, W] of {0, 1} native -> [S, S] uint8 in {0, 1}; nothing inside the crop disappears.

    Interpolating and thresholding at one half erases what is thinner than half a result pixel: all
    lines 2 px wide at a quarter of the size. Here each 8-connected component keeps its area
    instead: with a the exact area it covers in result pixels, it receives max(1, round(a)) of them,
    the densest. Equal sizes give the mask itself, and whole-number enlargements
    what nearest neighbour gives.

    Raises:
        ValueError: the crop is empty or reaches outside the mask.
    """
    mask = _filled(mask)
    _check_inside(mask.shape[0], mask.shape[1], geometry)
    side = geometry.size
    # The general way gives the same here, and would label components for nothing.
    if mask.shape == (side, side) and geometry[:4] == Geometry.full(side, side, side)[:4]:
        resized = mask.astype(np.uint8)
    else:
        resized = resize_components(mask, geometry[:4], side)
    return np.ascontiguousarray(resized[:, ::-1]) if geometry.flip else resized


def _filled(mask: Array) -> NDArray[np.bool_]:
    """Where a mask is not zero; without a copy if it is bool already."""
    mask = np.asarray(mask)
    return mask if mask.dtype == np.bool_ else mask != 0


def _check_inside(height: int, width: int, geometry: Geometry) -> None:
    """ValueError unless the crop lies in an array [height, width, ...]."""
    crop = geometry[:4]
    if not (0 <= crop[0] < crop[2] <= width and 0 <= crop[1] < crop[3] <= height):
        raise ValueError(
            f"geometry: got the crop x0, y0, x1, y1 = {crop} of {width} x {height} pixels, "
            f"expected one inside; image and masks of a record must have its height and width"
        )


def apply_points(coords: Array, geometry: Geometry) -> NDArray[np.float64]:
    """[..., 2] x, y in native pixels -> x, y in pixels of the S x S result. Not clipped."""
    coords = np.asarray(coords, np.float64)
    x = (coords[..., 0] + 0.5 - geometry.x0) * geometry.size / (geometry.x1 - geometry.x0) - 0.5
    y = (coords[..., 1] + 0.5 - geometry.y0) * geometry.size / (geometry.y1 - geometry.y0) - 0.5
    return np.stack([geometry.size - 1 - x if geometry.flip else x, y], axis=-1)


def invert_points(coords: Array, geometry: Geometry) -> NDArray[np.float64]:
    """[..., 2] x, y in pixels of the S x S result -> x, y in native pixels. Not clipped."""
    coords = np.asarray(coords, np.float64)
    x = geometry.size - 1 - coords[..., 0] if geometry.flip else coords[..., 0]
    x = (x + 0.5) * (geometry.x1 - geometry.x0) / geometry.size - 0.5 + geometry.x0
    y = (coords[..., 1] + 0.5) * (geometry.y1 - geometry.y0) / geometry.size - 0.5 + geometry.y0
    return np.stack([x, y], axis=-1)


def restore_logits(logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[..., S, S] logits of `Geometry.full` -> [..., height, width] float32 at native size.

    Bilinear between pixel centres, averaging when native is smaller. Logits are resized, never
    thresholded masks, so the outline keeps its sub-pixel position.
    """
    flat = logits.reshape(-1, 1, *logits.shape[-2:]).float()
    resized = torch.nn.functional.interpolate(
        flat, (height, width), mode="bilinear", align_corners=False, antialias=True
    )
    return resized.reshape(*logits.shape[:-2], height, width)


def restore_mask(logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[..., S, S] logits of `Geometry.full` -> [..., height, width] uint8, 1 where above zero."""
    return (restore_logits(logits, height, width) > 0).to(torch.uint8)


def draw_geometry(
    height: int,
    width: int,
    masks: Array | Sequence[Array],
    size: int,
    key: int,
    *,
    augment: bool,
    allow_flip: bool,
) -> Geometry:
    """The geometry of a training sample: random crop and mirror, or the full image.

    The crop has `CROP_SCALE` of the area and keeps the aspect within `CROP_ASPECT` of the image's.
    It widens in quarters towards the full image until each of `masks` ([K, H, W] or K times [H, W],
    native; none for language) keeps `MIN_TARGET_SHARE` of its area. Never upside down.
    """
    full = Geometry.full(height, width, size)
    if not augment:
        return full
    generator = _generator(key, _GEOMETRY)
    scale = generator.uniform(*CROP_SCALE)
    aspect = math.exp(generator.uniform(*np.log(CROP_ASPECT)))
    crop_width = width * min(1.0, math.sqrt(scale * aspect))
    crop_height = height * min(1.0, math.sqrt(scale / aspect))
    left, top = generator.random(2) * (width - crop_width, height - crop_height)
    flip = bool(generator.random() < 0.5) and allow_flip  # drawn in both cases, as everything here
    # Drawn before the masks are looked at: what a key draws does not depend on the targets.
    targets = [_filled(mask) for mask in masks]
    # Widened and not drawn again: a target in two far corners could refuse every draw.
    for widen in (0.0, 0.25, 0.5, 0.75):
        crop = Geometry(
            # Whole pixels, outwards: torch resizes those, at twice Pillow's speed.
            x0=math.floor((1 - widen) * left),
            y0=math.floor((1 - widen) * top),
            x1=math.ceil((1 - widen) * (left + crop_width) + widen * width),
            y1=math.ceil((1 - widen) * (top + crop_height) + widen * height),
            flip=flip,
            size=size,
        )
        rows, columns = slice(int(crop.y0), int(crop.y1)), slice(int(crop.x0), int(crop.x1))
        # `>=`, because an empty mask has nothing to lose and must not refuse the crop.
        if all(
            np.count_nonzero(target[rows, columns]) >= MIN_TARGET_SHARE * np.count_nonzero(target)
            for target in targets
        ):
            return crop
    return full._replace(flip=flip)


def draw_intensity(image: NDArray[np.uint8], key: int) -> NDArray[np.uint8]:
    """[S, S, C] uint8 -> the same with mild gamma, contrast, brightness and noise.

    The Gaussian noise is one field for all channels, so a grey image stays grey.
    """
    generator = _generator(key, _INTENSITY)
    gamma = math.exp(generator.uniform(-0.2, 0.2))
    contrast = generator.uniform(0.85, 1.15)
    brightness = generator.uniform(-0.08, 0.08)
    sigma = generator.uniform(0.0, 0.02)
    # A table of 256 entries: all of it is a function of one grey value.
    curve = (np.linspace(0, 1, 256) ** gamma - 0.5) * contrast + 0.5 + brightness
    height, width = image.shape[:2]
    if height * width > _NUM_NOISE // 2:  # a stretch could hardly begin anywhere else
        deviates = generator.standard_normal((height, width), np.float32)
    else:
        start = int(generator.integers(_NUM_NOISE - height * width))
        deviates = _stored_noise()[start : start + height * width].reshape(height, width)
    noise = deviates * np.float32(sigma * 255)
    # Half a grey value more, because the conversion to integers rounds down. Channels first, and in
    # place from here: the array is large and this runs for every sample.
    shifted = np.take((curve * 255 + 0.5).astype(np.float32), np.moveaxis(image, 2, 0))
    shifted += noise
    np.clip(shifted, 0, 255, out=shifted)
    return np.moveaxis(shifted.astype(np.uint8), 0, 2)


@functools.cache
def _stored_noise() -> NDArray[np.float32]:
    """[_NUM_NOISE] normal deviates, the same in every process: to cut a stretch takes no time."""
    return Generator(PCG64(0)).standard_normal(_NUM_NOISE, np.float32)


SIDELESS: dict[str, tuple[str, ...] | None] = {
    "dermoscopy": None,
    "microscopy": None,
    "pathology": None,
    "endoscopy": ("colon", "rectum", "bowel", "intestine", "stomach", "esophagus"),
}
"""Modality -> anatomies (None: any) whose mirror image is as possible as the image itself. A hollow
organ seen from inside has no left of its own, and tissue lies on a slide as it fell; a laparoscopy,
an endoscopy too, shows the liver."""

FLIPS = ("safe", "names", "never")


def may_mirror(flip: str, modality: str, anatomy: str, texts: Iterable[str]) -> bool:
    """Whether `data.flip` lets an image with these texts be mirrored.

    `names`: unless a text names a side. `safe`: and only where the picture itself has none. In most
    of medicine it has one whether a text says so or not: mirrored, a CT shows the liver at the
    wrong side, a fundus is of the other eye, a chest film of a patient with situs inversus.
    """
    if flip not in FLIPS:
        raise ValueError(unknown("data.flip", flip, FLIPS))
    if flip == "never" or any(map(names_side, texts)):
        return False
    if flip == "names":
        return True
    anatomies = SIDELESS.get(modality, ())
    return anatomies is None or anatomy.lower() in anatomies


def names_side(text: str) -> bool:
    """Whether a text names a side or a direction of rotation, so that a mirrored image belies it.

    Whole words ("left", "right-sided", "lateral", also inside "kidney_left") and the signs of
    readers ("RUL", "OD", "L"). Generous on purpose: a needless hit costs one mirrored sample.
    """
    # Signs in capitals only: "l" and "r" stand in too many words and units.
    return bool(_SIDE_WORDS.search(text) or _SIDE_SIGNS.search(text))


def _generator(key: int, stream: int) -> Generator:
    """An independent random stream of a key: crop, intensity and prompts do not move together."""
    return Generator(PCG64(SeedSequence(key, spawn_key=(stream,))))

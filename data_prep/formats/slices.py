"""Volumes -> slices as radiologists look at them: orientation, window, 8-bit grey.

    slices = oriented(voxels, affine, "axial")            # [slices, H, W]: patient's right at left
    grey = to_grey(slices[40] * slope + intercept, (-160.0, 240.0))

Orientation is a permutation and flips of the stored axes, never an interpolation: every voxel is a
pixel of exactly one slice, and an oblique volume is shown along its own nearest axes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_prep.pipeline.shards import UnusableItemError

PLANES = {"axial": "SPL", "coronal": "PIL", "sagittal": "LIP"}
"""Plane -> where the slice number, the row and the column grow to. Axial: front up, patient's right
at image left. Coronal: head up, patient's right at left. Sagittal: head up, front at left."""

NATIVE = "native"
"""The plane of PLANES in which the slices of a volume were acquired."""

STORED = "stored"
"""The plane of slices without geometry: shown as they lie in the file."""

SQUASHED = 1.5
"""Pixels of which one side is more than this times the other change what a picture looks like."""

CT_WINDOW = (40.0, 400.0)
"""Level and width in HU: soft tissue."""

PERCENTILES = (0.5, 99.5)
NUM_SAMPLES = 2_000_000
"""Voxels that percentiles are taken from, evenly spaced."""

MAX_VOLUME_BYTES = 4 * 2**30
"""Of the unpacked voxels. A header may state any size; a CT of 2,000 slices has one gigabyte."""

Range = tuple[float, float]
"""Values shown as black and as white."""


class Volume(NamedTuple):
    """Voxels as stored, and what they mean."""

    voxels: np.ndarray  # [I, J, K] numbers; value = voxels * slope + intercept
    slope: float
    intercept: float
    affine: np.ndarray | None  # [4, 4] index (i, j, k) -> mm (right, anterior, superior); None:
    # slices [I, J, K] = [slices, H, W] without geometry, shown as stored
    shown: Range | None  # range that the file asks for
    inverted: bool  # small values are white
    even: bool = True  # slices along I have equal distances
    through: int = 0  # stored axis across the slices as they were acquired


def plane_of(volume: Volume, wanted: str) -> str:
    """Plane that a volume is cut in: `wanted`, of PLANES or NATIVE, or STORED without geometry."""
    if volume.affine is None:
        return STORED
    # A single slice, cut across, is strips of one pixel.
    if wanted != NATIVE and volume.voxels.shape[volume.through] > 1:
        return wanted
    orientations = import_medical("nibabel.orientations")
    # The nearest plane: few slices are acquired without a tilt.
    across = int(orientations.io_orientation(volume.affine)[volume.through, 0])
    return ("sagittal", "coronal", "axial")[across]


def oriented(array: np.ndarray, affine: np.ndarray | None, plane: str) -> np.ndarray:
    """[I, J, K] -> view [slices, H, W] in the order of PLANES; without affine as it is."""
    if affine is None:
        return array
    orientations = import_medical("nibabel.orientations")
    # Permuted and flipped, never interpolated: a mask that is resampled loses one-pixel lesions.
    return np.asarray(orientations.apply_orientation(array, _transform(affine, plane)))


def spacing_of(affine: np.ndarray, plane: str) -> tuple[float, float, float]:
    """Millimetres between slices, rows and columns of the oriented volume."""
    zooms = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    order = _transform(affine, plane)[:, 0].astype(int)
    target = np.empty(3)
    target[order] = zooms
    return (float(target[0]), float(target[1]), float(target[2]))


def slice_affine(volume: Volume, plane: str, shape: tuple[int, int]) -> np.ndarray:
    """[4, 4]: (slice, row, column, 1) of the oriented slices, resized to `shape` (H, W), -> mm
    (right, anterior, superior)."""
    assert volume.affine is not None
    orientations = import_medical("nibabel.orientations")
    transform = _transform(volume.affine, plane)
    stored = orientations.inv_ornt_aff(transform, volume.voxels.shape)
    old = np.array(oriented(volume.voxels, volume.affine, plane).shape[1:])
    # The centre of a resized pixel: the corners of the image stay where they were.
    scale = np.eye(4)
    ratio = old / np.array(shape)
    scale[[1, 2], [1, 2]] = ratio
    scale[1:3, 3] = (ratio - 1) / 2
    return np.asarray(volume.affine @ stored @ scale)


def check_even(volume: Volume, plane: str) -> None:
    """Raises UnusableItemError for a reformation of slices that are not evenly spaced. `plane`: as
    `plane_of` gives it."""
    if (
        volume.affine is not None
        and not volume.even
        # Along their own axis the slices are whole; only other planes cross the gaps between them.
        and _transform(volume.affine, plane)[0, 0] != 0
    ):
        raise UnusableItemError(f"slices are missing: no {plane} images can be cut from the others")


def range_shown(volume: Volume, modality: str, window: str | Range | None) -> Range:
    """Values that become black and white.

    `window`: (level, width), "file", "percentile", or None: what the file asks for, else CT_WINDOW
    for CT, else percentiles of the whole volume. Raises UnusableItemError when that says nothing.
    """
    if window is None:
        # Hounsfield units have the same meaning everywhere; the numbers of MRI have none of their
        # own.
        window = "file" if volume.shown else CT_WINDOW if modality == "ct" else "percentile"
    if window == "file":
        if volume.shown is None:
            raise UnusableItemError("the file states no window; give --window LEVEL,WIDTH")
        return volume.shown
    if window == "percentile":
        return _percentiles(volume)
    assert not isinstance(window, str)
    level, width = window
    return (level - width / 2, level + width / 2)


def slice_values(volume: Volume, plane: str) -> Iterator[np.ndarray]:
    """Slices in display order, float32 [H, W], in the units of the modality."""
    for values in oriented(volume.voxels, volume.affine, plane):
        # One slice at a time: the whole volume as float32 may be twice the voxels as stored.
        yield values.astype(np.float32) * volume.slope + volume.intercept


def to_grey(values: np.ndarray, shown: Range, inverted: bool = False) -> np.ndarray:
    """Values [H, W] -> uint8 [H, W]: linear between the ends of the range, cut off beyond. A value
    that is no number is shown as the lower end."""
    low, high = shown
    scaled = np.nan_to_num((values - low) / (high - low), nan=0.0, posinf=1.0, neginf=0.0)
    grey = np.rint(np.clip(scaled, 0.0, 1.0) * 255).astype(np.uint8)
    return 255 - grey if inverted else grey


def square_shape(shape: tuple[int, int], mm: tuple[float, float]) -> tuple[int, int]:
    """(H, W) at which a slice of `shape` with pixels of `mm` (rows, columns) has square pixels."""
    # The finer side stays as it is: a mask loses nothing where pixels only become more.
    side = min(mm)
    return (max(1, round(shape[0] * mm[0] / side)), max(1, round(shape[1] * mm[1] / side)))


def resized_grey(grey: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W] at a larger shape, linear between pixel centres."""
    if grey.shape == shape:
        return grey
    size = (shape[1], shape[0])
    return np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR))


def resized_labels(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Labels [H, W] at a larger shape, where each pixel takes the label that it lies on."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(shape, labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]


def png_of(grey: np.ndarray) -> bytes:
    """uint8 [H, W] -> PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(grey)).save(buffer, "PNG")
    return buffer.getvalue()


def check_affine(affine: np.ndarray) -> np.ndarray:
    """Raises UnusableItemError for an affine that maps to a plane or to nowhere."""
    # Such a header still opens; which axis is which would then be an accident of rounding.
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise UnusableItemError("orientation unusable: the affine is singular or not finite")
    return affine


def affine_of_codes(codes: str, zooms: tuple[float, ...]) -> np.ndarray:
    """ "RAS" and millimetres -> affine [4, 4]; the letters say where each stored axis grows to."""
    ornt = import_medical("nibabel.orientations").axcodes2ornt(tuple(codes))
    affine = np.eye(4)
    affine[:3, :3] = 0.0
    for axis, (world, sign) in enumerate(ornt):
        affine[int(world), axis] = sign * zooms[axis]
    return affine


def _transform(affine: np.ndarray, plane: str) -> np.ndarray:
    orientations = import_medical("nibabel.orientations")
    stored = orientations.io_orientation(affine)
    wanted = orientations.axcodes2ornt(tuple(PLANES[plane]))
    return np.asarray(orientations.ornt_transform(stored, wanted))


def _percentiles(volume: Volume) -> Range:
    flat = volume.voxels.reshape(-1)
    # Of the whole volume and not of a slice, or the same tissue would change its grey between
    # slices.
    sample = flat[:: 1 + flat.size // NUM_SAMPLES].astype(np.float32)
    sample = sample[np.isfinite(sample)]
    ends = np.percentile(sample, PERCENTILES) if sample.size else np.zeros(2)
    low, high = sorted(float(end) * volume.slope + volume.intercept for end in ends)
    if low == high:
        raise UnusableItemError("volume is constant, there is nothing to see")
    return (low, high)


def import_medical(name: str) -> Any:
    """A module of the extra [medical]. Raises ValueError that says how to install it."""
    # Only volumes need these packages; every other converter must run without them.
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"volumes need {name.partition('.')[0]}, which is not installed: "
            "pip install 'biascare[medical]'"
        ) from error

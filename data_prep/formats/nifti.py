"""NIfTI files -> volumes, with the header held against the file before anything is allocated."""

from __future__ import annotations

import itertools
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.formats.slices import (
    MAX_VOLUME_BYTES,
    Volume,
    affine_of_codes,
    check_affine,
    import_medical,
)
from data_prep.pipeline.shards import UnusableItemError

SUFFIXES = (".nii", ".nii.gz")
DEFLATE_LIMIT = 1032
"""No byte of a gzip file unpacks to more bytes than this."""

SAME_PLACE = 0.1
"""Voxels by which two grids may differ: headers round, and each label still lies on its voxel."""

COARSER = 1.1
"""Slices are this many times as far apart as the pixels of each, or they cannot be told."""


def read_nifti(path: Path, assumed: str | None = None, channel: int | None = None) -> Volume:
    """A 3-D volume. `assumed` ("RAS", ...) is the orientation of files that state none, `channel`
    the number, from 0, of the volume that is meant in files of several.

    Raises UnusableItemError for several volumes without a `channel`, colour or complex voxels,
    sizes that the file cannot hold, unknown orientation and damaged files.
    """
    nibabel = import_medical("nibabel")
    damage = (
        OSError, EOFError, ValueError, OverflowError, zlib.error, MemoryError,
        nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError,
    )  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of header fields that are not used here
            image = nibabel.load(path)
            shape = _checked_shape(path, image, channel)
            # As stored, with slope and intercept beside: scaling at once makes float64 of 16-bit
            # voxels.
            voxels = np.asanyarray(image.dataobj.get_unscaled())
    except damage as error:
        raise UnusableItemError("NIfTI file unreadable or cut off") from error
    if channel is not None and voxels.ndim > 3:
        voxels = voxels.reshape(*voxels.shape[:3], -1)[..., channel]
    voxels = voxels.reshape(shape)
    header = image.header
    zooms = [float(zoom) for zoom in header.get_zooms()[:3]]
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        # nibabel makes an affine up here: left and right would be a guess.
        if assumed is None:
            raise UnusableItemError("orientation unknown; state it with --assume-orientation")
        affine = affine_of_codes(assumed, tuple([*zooms, 1.0][:3]))
    else:
        affine = check_affine(np.asarray(image.affine, dtype=np.float64))
    return Volume(
        voxels=voxels,
        slope=float(image.dataobj.slope),
        intercept=float(image.dataobj.inter),
        affine=affine,
        shown=None,
        inverted=False,
        through=_slice_axis(header, shape, zooms),
    )


def read_label_volume(
    path: Path, image: Volume, assumed: str | None = None, *, resample: bool = False
) -> tuple[Volume, bool]:
    """The label volume of an image: integers of the same shape and place, and whether they were
    resampled. `resample`: of another grid, every voxel of the image takes the nearest label.

    Raises UnusableItemError when it lies elsewhere, holds fractions, or loses a label.
    """
    labels = read_nifti(path, assumed)
    assert labels.affine is not None and image.affine is not None
    values = labels.voxels
    if (labels.slope, labels.intercept) != (1.0, 0.0) or values.dtype.kind == "f":
        exact = values.astype(np.float64) * labels.slope + labels.intercept
        if not np.isfinite(exact).all():
            raise UnusableItemError("label volume holds voxels that are no numbers (NaN or inf)")
        # Some programs save labels as floating point numbers; whole ones are labels, fractions are
        # not.
        values = np.rint(exact)
        if np.abs(values - exact).max() > 1e-3:
            raise UnusableItemError("label volume holds fractions")
    values = values.astype(np.int32)
    to_labels = np.linalg.inv(labels.affine) @ image.affine
    distance = _distance(to_labels, image.voxels.shape)
    is_elsewhere = values.shape != image.voxels.shape or distance > SAME_PLACE
    if is_elsewhere:
        if not resample:
            # Its own number where there is one: a crop of the same grid lies 0 voxels away.
            what = f"orientation or place, by up to {distance:.2g} voxels"
            if values.shape != image.voxels.shape:
                what = f"shape: {list(image.voxels.shape)} and {list(values.shape)}"
            raise UnusableItemError(
                f"image and label volume differ in {what}; look at both, then --resample-labels "
                "nearest gives every voxel of the image the nearest label"
            )
        values = _nearest(values, to_labels, image.voxels.shape)
    return image._replace(voxels=values, slope=1.0, intercept=0.0), is_elsewhere


def _distance(to_labels: np.ndarray, shape: tuple[int, ...]) -> float:
    """Voxels between the places where both grids have the same voxel, at the corner where it is
    most. `to_labels`: [4, 4] index in the image -> index in the label volume."""
    ends = [(0, count - 1) for count in shape]
    corners = np.array([[*corner, 1.0] for corner in itertools.product(*ends)])
    return float(np.abs(corners @ to_labels.T - corners).max())


def _nearest(labels: np.ndarray, to_labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Labels at the voxels of the image, 0 beyond their own volume."""
    found = np.zeros(shape, dtype=np.int32)
    rows, columns = np.meshgrid(*map(np.arange, shape[1:]), indexing="ij")
    for number in range(shape[0]):  # one slice at a time: coordinates are six times the voxels
        index = np.stack([np.full_like(rows, number), rows, columns, np.ones_like(rows)])
        at = np.rint(np.tensordot(to_labels[:3], index, axes=1)).astype(np.int64)
        limits = np.array(labels.shape)[:, None, None]
        inside = ((at >= 0) & (at < limits)).all(axis=0)
        found[number][inside] = labels[tuple(at[:, inside])]
    lost = np.setdiff1d(np.unique(labels), np.unique(found))
    # A structure of one voxel may fall between the voxels of a coarser image.
    if len(lost):
        raise UnusableItemError(f"labels {lost[:5].tolist()} are lost when they are resampled")
    return found


def _slice_axis(header: Any, shape: tuple[int, ...], zooms: list[float]) -> int:
    """Stored axis across the slices as they were acquired: what the header says, else a single
    slice, else the coarsest, else the last."""
    stated = header.get_dim_info()[2]
    if stated is not None:
        return int(stated)
    if 1 in shape:
        return shape.index(1)
    coarsest = int(np.argmax(zooms))
    return coarsest if zooms[coarsest] > COARSER * sorted(zooms)[1] else 2


def _checked_shape(path: Path, image: Any, channel: int | None) -> tuple[int, ...]:
    """[I, J, K] from the header alone."""
    dtype, shape = image.header.get_data_dtype(), image.header.get_data_shape()
    if dtype.kind not in "iuf":
        raise UnusableItemError(f"voxels of type {dtype} are not plain numbers")
    # Some programs write a volume as a series of one time point.
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    num_volumes = int(np.prod([int(n) for n in shape[3:]], dtype=object))
    if len(shape) > 3 and channel is None:
        raise UnusableItemError(
            f"{len(shape)}-D file of shape {list(shape)}: --channel 0 to {num_volumes - 1} takes "
            "one of its volumes"
        )
    if channel is not None and not channel < num_volumes:
        raise UnusableItemError(f"--channel {channel}: the file holds {num_volumes} volumes")
    stored, shape = shape, ((*shape, 1) if len(shape) == 2 else shape[:3])
    if len(shape) != 3 or min(shape) < 1:
        raise UnusableItemError(f"shape {list(shape)} is not that of a volume")
    # Python's own integers: a damaged shape overflows 64 bits and then looks small.
    num_bytes = int(np.prod([int(n) for n in stored], dtype=object)) * dtype.itemsize
    packed = path.stat().st_size * (DEFLATE_LIMIT if path.suffix == ".gz" else 1)
    if num_bytes > MAX_VOLUME_BYTES:
        raise UnusableItemError(f"volume of {num_bytes:,} bytes is above {MAX_VOLUME_BYTES:,}")
    if num_bytes > packed:
        raise UnusableItemError("the header promises more voxels than the file can hold")
    return shape

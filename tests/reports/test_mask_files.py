"""Predicted masks as files: NIfTI that lies on its source, PNG under safe and unique names."""

from __future__ import annotations

import builtins
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from biascare.data.heldout import HeldOutImages
from biascare.evaluation.cases import MaskCase, MaskPrediction
from biascare.evaluation.evaluate import place_of
from biascare.models.export_folder import save_network
from biascare.records import Records, encode_mask
from biascare.reports.mask_files import file_name, save_masks
from scripts import evaluate as program
from tests.tiny import tiny_facts, tiny_model

nibabel = pytest.importorskip("nibabel", reason="the extra [medical] is not installed")

from data_prep import volumes  # noqa: E402

SHAPE = (24, 20, 9)
CENTER = np.array([15.0, 4.0, 6.0])


def oblique(flips: tuple[int, int, int]) -> np.ndarray:
    """An affine of a tilted scan whose axes grow to either side."""
    a, b = 0.2, -0.15
    turn = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    turn = turn @ np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(np.array(flips) * (0.8, 1.1, 3.0))
    affine[:3, 3] = (-31, 12, 7)
    return affine


def scan(root: Path, affine: np.ndarray) -> np.ndarray:
    """A scan and its labels as NIfTI files; the labelled structure [I, J, K]."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    inside = (((grid - CENTER) / (4, 3, 2)) ** 2).sum(-1) <= 1
    inside[20:22, 15:17, 2] = True  # no symmetry: a flip is seen
    for name, array in (("img", np.where(inside, 900, 100)), ("seg", inside)):
        (root / name).mkdir(parents=True)
        image = nibabel.Nifti1Image(array.astype(np.int16), affine)
        nibabel.save(image, root / name / "case.nii.gz")
    return np.asarray(inside)


def perfect_cases(folder: Path) -> list[MaskCase]:
    """Cases of a model that finds exactly the truth."""
    records = Records(folder)
    images = HeldOutImages([records], None, {}, image_size=64)
    cases = []
    for number in range(len(images)):
        (held,) = images.__getitems__([number])
        for item in held.items:
            truth = item.truth.decode()
            prediction = MaskPrediction(
                points=item.points, box=None, mask=truth, predicted_dice=1.0, uncertainty={}
            )
            cases.append(
                MaskCase(
                    id=item.id, facts=item.facts, height=item.height, width=item.width,
                    instruction=None, truth=truth, by_text=None, predictions=[prediction],
                    place=place_of(item), seconds=0.0,
                )
            )  # fmt: skip
    return cases


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal", "native"])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1)])
@pytest.mark.parametrize("square", [False, True])
def test_a_saved_mask_lies_on_the_structure_of_the_source(
    tmp_path: Path, plane: str, flips: tuple[int, int, int], square: bool
) -> None:
    affine = oblique(flips)
    inside = scan(tmp_path, affine)
    options = ["--square-pixels"] * square
    volumes.main(
        ["--nifti", str(tmp_path / "img"), "--masks", str(tmp_path / "seg"), "--labels", "1=organ",
         "--modality", "ct", "--name", "mine", "--plane", plane, "--output",
         str(tmp_path / "out"), *options]
    )  # fmt: skip
    assert save_masks(perfect_cases(tmp_path / "out" / "mine" / "train"), tmp_path / "masks") == 1
    (path,) = (tmp_path / "masks").iterdir()
    saved = nibabel.load(path)
    source = nibabel.load(tmp_path / "seg" / "case.nii.gz")
    # Every voxel of the source, at its place in the world, is looked up in the saved file.
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    world = nibabel.affines.apply_affine(source.affine, grid)
    index = np.rint(nibabel.affines.apply_affine(np.linalg.inv(saved.affine), world)).astype(int)
    mask = np.asarray(saved.dataobj) > 0
    assert (index >= 0).all() and (index < mask.shape).all()
    assert np.array_equal(mask[tuple(np.moveaxis(index, -1, 0))], inside)
    # And the outer corners of both are the same points.
    corners = np.array(np.meshgrid(*[[-0.5, n - 0.5] for n in SHAPE])).reshape(3, -1).T
    there = np.array(np.meshgrid(*[[-0.5, n - 0.5] for n in mask.shape])).reshape(3, -1).T
    ours, theirs = (
        np.array(sorted(np.round(nibabel.affines.apply_affine(a, c), 3).tolist()))
        for a, c in ((source.affine, corners), (saved.affine, there))
    )
    assert ours == pytest.approx(theirs, abs=2e-3)


def test_the_program_scores_and_saves_the_slices_of_a_volume_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    affine = oblique((-1, 1, 1))
    inside = scan(tmp_path, affine)
    volumes.main(
        ["--nifti", str(tmp_path / "img"), "--masks", str(tmp_path / "seg"), "--labels", "1=organ",
         "--modality", "ct", "--name", "mine", "--output", str(tmp_path / "out")]
    )  # fmt: skip
    save_network(tiny_model(None), tmp_path / "export")
    out = tmp_path / "evaluation"
    monkeypatch.setattr("biascare.runs.evaluation_door.prepare_process", lambda: None)
    monkeypatch.setattr(
        sys, "argv",
        ["evaluate.py", str(tmp_path / "export"), "--output", str(out), "--save-masks",
         str(out / "masks"), "--segmentation", str(tmp_path / "out" / "mine" / "train")],
    )  # fmt: skip
    program.main()
    found = json.loads((out / "metrics.json").read_text())["volumes"]
    (each,) = found["each"]
    assert (each["volume"], each["target"]) == ("mine/case/axial", "organ")
    assert each["num_slices"] == inside.any((0, 1)).sum()
    (path,) = (out / "masks").iterdir()
    saved = nibabel.load(path)
    # Reading it as a viewer does, on the grid of the source, gives the Dice of the report.
    ours = np.asarray(nibabel.as_closest_canonical(saved).dataobj) > 0
    source = nibabel.as_closest_canonical(nibabel.load(tmp_path / "seg" / "case.nii.gz"))
    truth = np.asarray(source.dataobj) > 0
    assert nibabel.as_closest_canonical(saved).affine == pytest.approx(source.affine, abs=1e-4)
    assert each["dice"] == pytest.approx(2 * (ours & truth).sum() / (ours.sum() + truth.sum()))


def flat_case(name: str, source: str = "tiny") -> MaskCase:
    mask = np.zeros((3, 5), bool)
    mask[1, 2:4] = True
    prediction = MaskPrediction(
        points=[], box=None, mask=encode_mask(mask).decode(), predicted_dice=1.0, uncertainty={}
    )
    return MaskCase(
        id=name, facts=tiny_facts(name, source=source), height=3, width=5, instruction=None,
        truth=prediction.mask, by_text=None, predictions=[prediction], seconds=0.0,
    )  # fmt: skip


def test_an_image_has_a_png_of_its_own_size_per_target(tmp_path: Path) -> None:
    assert save_masks([flat_case("scan 7/left kidney")], tmp_path / "new" / "masks") == 1
    (path,) = (tmp_path / "new" / "masks").iterdir()
    assert path.name.startswith("tiny_test_scan_7_left_kidney-") and path.suffix == ".png"
    image = np.asarray(Image.open(path))
    assert image.shape == (3, 5) and np.unique(image).tolist() == [0, 255] and image.sum() == 510


def test_names_that_look_alike_or_lead_elsewhere_get_files_of_their_own(tmp_path: Path) -> None:
    names = ["a/b", "a_b", "../../etc/passwd", "CON", "ünïcode", "x" * 400]
    save_masks([flat_case(name) for name in names], tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == len(names) and all(len(name) < 130 for name in files)
    assert all(set(name) <= set("_-." + "".join(map(chr, range(48, 123)))) for name in files)
    assert file_name("a", "b") != file_name("a_b")


def test_without_nibabel_a_volume_is_refused_and_an_image_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan(tmp_path, oblique((1, 1, 1)))
    volumes.main(
        ["--nifti", str(tmp_path / "img"), "--masks", str(tmp_path / "seg"), "--labels", "1=organ",
         "--modality", "ct", "--name", "mine", "--output", str(tmp_path / "out")]
    )  # fmt: skip
    cases = perfect_cases(tmp_path / "out" / "mine" / "train")
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "nibabel":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'biascare\[medical\]'"):
        save_masks(cases, tmp_path / "masks")
    assert save_masks([flat_case("a")], tmp_path / "images") == 1
    # Slices whose place is not recorded are images.
    unplaced = [dataclasses.replace(case, place=None) for case in cases]
    assert save_masks(unplaced, tmp_path / "slices") == len(cases)

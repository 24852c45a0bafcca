"""What the embedded data set is drawn from: shares, prevalences, sizes and planted effects.

    TARGETS["ct"]["liver lesion"].prevalence     # of the CT images that show a liver

An audit of a model trained on the set is held against these numbers, so they stand nowhere else.
"""

from __future__ import annotations

from typing import NamedTuple

NUM_IMAGES = {
    "tiny": {"train": 44, "val": 8, "test": 8},
    "small": {"train": 1200, "val": 150, "test": 150},
    "large": {"train": 12000, "val": 1500, "test": 1500},
}
BIASES = ("none", "prevalence", "appearance", "both")

AVAILABILITY = {
    "ct": 0.30,
    "xray": 0.23,
    "mri": 0.17,
    "dermoscopy": 0.12,
    "ultrasound": 0.08,
    # The last shares are small on purpose: rare modalities are meant to be learned badly.
    "fundus": 0.06,
    "endoscopy": 0.04,
}
"""Share of each modality among the images of a split (each has at least one)."""

ANATOMY = {
    "ct": "abdomen",
    "xray": "chest",
    "mri": "head",
    "dermoscopy": "skin",
    "ultrasound": "abdomen",
    "fundus": "eye",
    "endoscopy": "colon",
}
PATIENT_FRAME = ("ct", "xray", "mri")
"""Modalities in radiological convention: the patient's left is at the image's right."""


class Target(NamedTuple):
    """One thing that can be segmented in a modality."""

    prevalence: float  # share of the images of the modality, among those that show `needs`
    radius: float = 0.0  # median of a finding, half image widths; 0 for a structure
    spread: float = 0.0  # standard deviation of log(radius)
    needs: tuple[str, ...] = ()  # at least one of these must be visible


TARGETS: dict[str, dict[str, Target]] = {
    "ct": {
        "liver": Target(0.95),
        "aorta": Target(0.90),
        "spleen": Target(0.80),
        "right kidney": Target(0.75),
        "left kidney": Target(0.70),
        "liver lesion": Target(0.40, 0.12, 0.40, ("liver",)),
        "kidney stone": Target(0.08, 0.028, 0.30, ("left kidney", "right kidney")),
    },
    "xray": {
        "left lung": Target(1.0),
        "right lung": Target(1.0),
        "heart": Target(0.95),
        "pneumothorax": Target(0.35, 0.17, 0.35),
        "lung nodule": Target(0.15, 0.08, 0.35),
    },
    "mri": {
        "brain": Target(1.0),
        "ventricles": Target(0.85),
        "brain tumor": Target(0.45, 0.17, 0.40),
        "microbleed": Target(0.06, 0.020, 0.25),
    },
    "dermoscopy": {
        "skin lesion": Target(0.65, 0.42, 0.35),
        "ulcer": Target(0.10, 0.10, 0.35, ("skin lesion",)),
    },
    "ultrasound": {
        "liver": Target(1.0),
        "gallbladder": Target(0.75),
        "gallstone": Target(0.40, 0.06, 0.30, ("gallbladder",)),
        "cyst": Target(0.15, 0.11, 0.35),
    },
    "fundus": {
        "optic disc": Target(0.95),
        "vessels": Target(0.90),
        # A part of the disc, and so overlapping with it: masks of one image need not be disjoint.
        "optic cup": Target(0.60, needs=("optic disc",)),
        "haemorrhage": Target(0.40, 0.06, 0.40),
    },
    "endoscopy": {
        "lumen": Target(0.60),
        "polyp": Target(0.45, 0.22, 0.30),
        "instrument": Target(0.06, 0.065, 0.15),
    },
}
"""Head (lungs, liver, aorta), middle and tail (ulcer, microbleed, instrument) by construction."""

RADIUS_LIMITS = (0.012, 0.75)
"""Findings stay between about a pixel and half of the image."""

SEX_SHARES = {"F": 0.5, "M": 0.5}
RACE_SHARES = {"group A": 0.60, "group B": 0.25, "group C": 0.15}
AGE_MEAN, AGE_STD, AGE_LIMITS = 57.0, 17.0, (18.0, 95.0)
IMAGES_PER_PATIENT = {1: 0.5, 2: 0.3, 3: 0.2}


class Effect(NamedTuple):
    """A planted dependence on one attribute; factors of several effects multiply."""

    kind: str  # prevalence | appearance
    quantity: str  # what the factor multiplies
    attribute: str  # sex | age | race
    group: str
    factor: float
    splits: tuple[str, ...]


EFFECTS = (
    Effect("prevalence", "prevalence of findings", "sex", "F", 0.35, ("train",)),
    Effect("appearance", "contrast of findings", "race", "group C", 0.50, ("train", "val", "test")),
    Effect("appearance", "noise", "age", "60+", 2.0, ("train", "val", "test")),
)
"""One effect per attribute. The prevalence effect is a flaw of the training archive alone: held-out
findings are equally frequent in both sexes, so a gap there is the model's."""


def is_finding(modality: str, target: str) -> bool:
    """Whether a target is a finding; the others are structures, which are no disease."""
    return TARGETS[modality][target].radius > 0

"""Who is imaged and what each image shows: pure draws from the tables.

    cases = plan("small", seed=0, split="train")
    truth = draw_truth(0, cases[0], bias="both")     # before anything is rendered

Every draw has a generator of its own, made of (seed, split, modality, patient, purpose): order and
parallelism change nothing, and the same image under another bias differs in that bias alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtr

from data_prep.embedded.tables import (
    AGE_LIMITS,
    AGE_MEAN,
    AGE_STD,
    AVAILABILITY,
    EFFECTS,
    IMAGES_PER_PATIENT,
    NUM_IMAGES,
    RACE_SHARES,
    RADIUS_LIMITS,
    SEX_SHARES,
    TARGETS,
    Effect,
)


class Patient(NamedTuple):
    """Attributes are independent of the modality and of each other."""

    number: int
    split: str
    modality: str
    sex: str
    age: float
    race: str
    habitus: tuple[float, ...]  # [4] in [0, 1], see `Look`


class Case(NamedTuple):
    """One image to be generated."""

    patient: Patient
    image_number: int


class Truth(NamedTuple):
    """What one image shows and how, before it is rendered."""

    present: dict[str, float]  # target -> radius, 0 for a structure
    contrast: float
    noise: float


def plan(size: str, seed: int, split: str) -> list[Case]:
    """All images of a split in a shuffled order; no patient occurs in two splits."""
    cases: list[Case] = []
    for modality, num_images in _quota(NUM_IMAGES[size][split]).items():
        room = num_images
        while room:
            # Patients of one (split, modality) are numbered apart from all others.
            patient = draw_patient(seed, split, modality, len(cases))
            rng = generator(seed, patient, 0)
            wanted = int(rng.choice(list(IMAGES_PER_PATIENT), p=list(IMAGES_PER_PATIENT.values())))
            taken = min(wanted, room)
            cases += [Case(patient, number) for number in range(1, taken + 1)]
            room -= taken
    # Shuffled, so that a reader who takes the first rows sees every modality.
    order = np.random.default_rng([seed, _split_index(split)]).permutation(len(cases))
    return [cases[index] for index in order]


def _quota(num_images: int) -> dict[str, int]:
    """Images per modality: one each, the rest by AVAILABILITY with largest remainders."""
    rest = num_images - len(AVAILABILITY)
    exact = {name: rest * share for name, share in AVAILABILITY.items()}
    # One each: the smallest size would otherwise hold no endoscopy, and no test of it could run.
    counts = {name: 1 + int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: int(exact[name]) - exact[name])
    for name in by_remainder[: num_images - sum(counts.values())]:
        counts[name] += 1
    return counts


def _split_index(split: str) -> int:
    return list(NUM_IMAGES["tiny"]).index(split)


def generator(seed: int, patient: Patient, purpose: int) -> np.random.Generator:
    """Generator of one patient: purpose 0 is the patient, n > 0 the n-th image."""
    # Seeds are integers, and `hash` of a string differs between processes.
    modality = list(TARGETS).index(patient.modality)
    return np.random.default_rng(
        [seed, _split_index(patient.split), modality, patient.number, purpose]
    )


def draw_patient(seed: int, split: str, modality: str, number: int) -> Patient:
    """A patient with attributes from the tables; pure in its arguments."""
    rng = np.random.default_rng([seed, _split_index(split), list(TARGETS).index(modality), number])
    sex = str(rng.choice(list(SEX_SHARES), p=list(SEX_SHARES.values())))
    race = str(rng.choice(list(RACE_SHARES), p=list(RACE_SHARES.values())))
    # The order of these draws is part of the data: a new one goes to the end, or all bytes change.
    age = float(np.clip(rng.normal(AGE_MEAN, AGE_STD), *AGE_LIMITS).round(1))
    habitus = tuple(float(value) for value in rng.random(4))
    return Patient(number, split, modality, sex, age, race, habitus)


def in_group(patient: Patient, effect: Effect) -> bool:
    """Whether a planted effect applies to this patient ("60+" is an age of 60 or more)."""
    if effect.attribute == "age":
        return patient.age >= float(effect.group.removesuffix("+"))
    return bool(getattr(patient, effect.attribute) == effect.group)


def active_effects(bias: str) -> tuple[Effect, ...]:
    """The effects a `--bias` mode plants."""
    return tuple(effect for effect in EFFECTS if bias in (effect.kind, "both"))


def _factor(patient: Patient, bias: str, quantity: str) -> float:
    """Product of the planted factors on a quantity for one patient."""
    factors = [
        effect.factor
        for effect in active_effects(bias)
        # By split: the prevalence effect is a flaw of the training archive alone.
        if effect.quantity == quantity and patient.split in effect.splits
        if in_group(patient, effect)
    ]
    return float(np.prod(factors))


def draw_truth(seed: int, case: Case, bias: str) -> Truth:
    """What one image shows; the same draws under every bias, compared with other thresholds.

    Presence is correlated between the images of a patient (a shared and an own Gaussian), with
    exactly the stated prevalence in each.
    """
    patient = case.patient
    targets = TARGETS[patient.modality]
    # Images of one patient resemble each other: without that, a split by image would leak nothing.
    shared = generator(seed, patient, 1_000_000).normal(size=len(targets))
    rng = generator(seed, patient, case.image_number)
    # Uniform in each image, so that comparing with a threshold gives exactly the stated prevalence.
    levels = ndtr((shared + rng.normal(size=len(targets))) / np.sqrt(2))
    sizes = np.exp(rng.normal(size=len(targets)) * [target.spread for target in targets.values()])
    rarer = _factor(patient, bias, "prevalence of findings")
    present: dict[str, float] = {}
    for (name, target), level, stretch in zip(targets.items(), levels, sizes, strict=True):
        shown = not target.needs or any(organ in present for organ in target.needs)
        # Findings alone: organs are there in everybody.
        if shown and level < target.prevalence * (rarer if target.radius else 1.0):
            radius = np.clip(target.radius * stretch, *RADIUS_LIMITS) if target.radius else 0.0
            present[name] = float(radius)
    contrast = _factor(patient, bias, "contrast of findings")
    return Truth(present, contrast, _factor(patient, bias, "noise"))


def expected_prevalence(patient: Patient, bias: str) -> dict[str, float]:
    """Prevalence of each finding of the modality in the split, averaged over the planted groups."""
    effects = [effect for effect in active_effects(bias) if effect.kind == "prevalence"]
    scale = 1.0
    for effect in effects:
        if patient.split in effect.splits:
            # Averaged over the sexes: yes and no are balanced in the split, not in each group of
            # it.
            scale *= 1 + SEX_SHARES[effect.group] * (effect.factor - 1)
    targets = TARGETS[patient.modality]
    return {name: scale * target.prevalence for name, target in targets.items() if target.radius}


def planted_bias(cases: dict[str, list[Case]], seed: int, bias: str) -> dict[str, Any]:
    """The truth an audit is checked against, JSON-ready."""
    effects = [
        effect._asdict()
        | {
            "images_in_group": {
                split: sum(in_group(case.patient, effect) for case in members)
                for split, members in cases.items()
            }
        }
        for effect in active_effects(bias)
    ]
    prevalence = {
        modality: {name: target.prevalence for name, target in targets.items()}
        for modality, targets in TARGETS.items()
    }
    return {
        "bias": bias,
        "seed": seed,
        "effects": effects,
        "num_images": {split: len(members) for split, members in cases.items()},
        "availability": AVAILABILITY,
        "prevalence": prevalence,
        "shares": {"sex": SEX_SHARES, "race": RACE_SHARES},
    }

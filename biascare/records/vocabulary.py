"""The names records use: one spelling per target and per modality, one key per fact of a question.

`canonical_target("kidney_right") == "right kidney"`. Underscores become spaces and case is lowered;
everything beyond that is a reviewed table, not a string rule, so that no side is lost and no two
structures are merged by accident. A name outside the tables is kept.
"""

from __future__ import annotations

from biascare.choices import did_you_mean

SIDES = ("left", "right")

SIDED_TARGETS = (
    "adrenal gland", "atrial appendage", "autochthon", "brachiocephalic vein", "breast",
    "cerebellum", "clavicle", "clavicula", "common carotid artery", "eye", "femur",
    "gluteus maximus", "gluteus medius", "gluteus minimus", "heart atrium", "heart ventricle",
    "hip", "humerus", "iliac artery", "iliac vena", "iliac vein", "iliopsoas", "kidney",
    "lung", "lung lower lobe", "lung middle lobe", "lung upper lobe", "optic nerve", "parotid",
    "scapula", "subclavian artery", "submandibular gland", "temporal lobe",
)  # fmt: skip
"""Paired structures that some releases write with the side last ("kidney_left")."""

NUM_RIBS = 12

TARGET_SYNONYMS = {
    "arota": "aorta",  # as misspelt in the AMOS release
    "bladder": "urinary bladder",
    # One of the two spellings, or the same structure would be two targets.
    "brain tumour": "brain tumor",
    "covid-19 infection": "COVID-19 infection",
    "gall bladder": "gallbladder",
    "ivc": "inferior vena cava",
    "lad": "left anterior descending artery",
    "lag": "left adrenal gland",
    "left clavicula": "left clavicle",
    "left iliac vena": "left iliac vein",
    "liver tumour": "liver tumor",
    "oesophagus": "esophagus",
    "optic disk": "optic disc",
    "postcava": "inferior vena cava",
    "rag": "right adrenal gland",
    "right clavicula": "right clavicle",
    "right iliac vena": "right iliac vein",
    "tumour": "tumor",
}
"""Spelling with the side first -> spelling in records. Reviewed by hand. Names whose organ depends
on the dataset ("left ventricle" of heart or brain, "tumor") are not unified."""

MODALITIES = {
    "ct": ("ct", "computed tomography", "cbct", "cta"),
    "mri": (
        "mri", "mr", "magnetic resonance imaging", "t1", "t1c", "t1ce", "t1w", "t2", "t2w",
        "flair", "dwi", "adc", "lge", "cine",
    ),
    "pet": ("pet", "pt", "positron emission tomography"),
    "nuclear": ("nuclear", "nm", "nuclear medicine", "scintigraphy", "spect"),
    "xray": ("xray", "x ray", "x-ray", "cr", "dx", "cxr", "radiograph", "radiography"),
    "mammography": ("mammography", "mammogram", "mg"),
    "ultrasound": ("ultrasound", "us", "sonography", "ultrasonography", "echocardiography"),
    "dermoscopy": ("dermoscopy", "dermatoscopy"),
    "fundus": ("fundus", "op", "fundus photography", "retinal fundus", "cfp"),
    "endoscopy": ("endoscopy", "colonoscopy", "laparoscopy", "gastroscopy"),
    "pathology": ("pathology", "histopathology", "histology", "whole slide imaging", "wsi"),
    "microscopy": ("microscopy", "fluorescence microscopy", "electron microscopy", "em"),
    "oct": ("oct", "opt", "optical coherence tomography"),
    "infrared": ("infrared", "infrared reflectance", "ir"),
    "photography": ("photography", "photo", "clinical photograph"),
    "radiology": ("radiology",),  # VQA-RAD mixes CT, MRI and X-ray and does not say which
    "unspecified": ("unspecified",),  # figures of articles, of which none says what it is
}  # fmt: skip
"""Spelling in records -> spellings met in releases."""

UNSPECIFIED_MODALITY = "unspecified"
"""Modality of releases that mix many and do not say which image is which."""


FACTS = {
    "qid": "the source's own name of the question",
    "linked_qid": "shared by questions that rephrase one another",
    "question_relation": "how strictly the answer to a rephrased question must agree",
    "official_split": "split of the question in its release",
    "answer_type": "as the source states it: closed or open",
    "question_type": "what is asked for: presence, position, plane, ...",
    "content_type": "what the question is about: organ, abnormality, ...",
    "base_type": "whether the image or a knowledge base holds the answer",
    "phrase_type": "freeform or rephrased",
    "evaluation": "what the annotators say of the question",
    "triple": "entry of the knowledge base that holds the answer",
    "language": "of the question",
    "modality": "as stated with the question, in the source's words",
    "organ": "as stated with the question",
    "location": "place in the body as stated with the question",
    "case": "teaching case that the image is from",
}
"""Key of a question's facts -> what it says. The words of the source stay as they are."""


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


# A table and no rule: a rule would also move the "left" of names where it is no side of the body.
_SIDE_FIRST = {f"{name} {side}": f"{side} {name}" for name in SIDED_TARGETS for side in SIDES} | {
    f"rib {side} {n}": f"{side} rib {n}" for side in SIDES for n in range(1, NUM_RIBS + 1)
}
_MODALITIES = {alias: name for name, aliases in MODALITIES.items() for alias in aliases}


def canonical_target(name: str) -> str:
    """Spelling of a target in records. Idempotent. Raises ValueError for an empty name."""
    plain = _plain(name)
    if not plain:
        raise ValueError(f"a target needs a name, got {name!r}; name it in the release's labels")
    side_first = _SIDE_FIRST.get(plain, plain)
    # After the sides, so that each synonym is listed once and not once per order of its words.
    return TARGET_SYNONYMS.get(side_first, side_first)


def canonical_modality(name: str) -> str:
    """Spelling of a modality in records. Raises ValueError, with the nearest, when unknown."""
    plain = _plain(name)
    # Not kept as it is, as a target is: flips and windows depend on the modality.
    if plain not in _MODALITIES:
        near = did_you_mean(plain, _MODALITIES)
        raise ValueError(
            f"unknown modality {name!r}{near}; expected one of {', '.join(MODALITIES)}. A new "
            "spelling is added to MODALITIES in biascare/records/vocabulary.py"
        )
    return _MODALITIES[plain]

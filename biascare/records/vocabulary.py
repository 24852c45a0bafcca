"""The names records use: one spelling per target and per modality, one key per fact of a question.

`canonical_target("kidney_right") == "right kidney"`. Underscores become spaces, case is lowered,
and a side at the end of a name is put in front. Everything beyond that is a reviewed table, not a
string rule, so that no two structures are merged by accident. A name outside the table is kept.
"""

from __future__ import annotations

from biascare.choices import nearest

SIDES = ("left", "right")

SIDE_LETTERS = {"l": "left", "r": "right"}

SIDED_TARGETS = (
    "adrenal gland", "carotid artery", "cochlea", "eustachian tube bone", "eye", "femur", "hip",
    "hippocampus", "humerus", "internal auditory canal", "kidney", "lacrimal gland", "lens", "lung",
    "mandible", "mastoid", "middle ear", "optic nerve", "parotid gland", "scapula",
    "submandibular gland", "temporal lobe", "temporomandibular joint", "tympanic cavity",
    "vestibular semicircular canal",
)  # fmt: skip
"""Paired structures that some releases write with a letter for the side ("Cochlea_L"). Only of
these is a letter at the end a side: elsewhere it may be a level or a stage."""

NUM_RIBS = 12

TARGET_SYNONYMS = {
    "arota": "aorta",  # as misspelt in the AMOS release
    "bladder": "urinary bladder",
    "bone mandible": "mandible",
    # One of the two spellings, or the same structure would be two targets.
    "brain tumour": "brain tumor",
    "brainstem": "brain stem",
    "chiasm": "optic chiasm",
    "chiasma": "optic chiasm",
    "clavicula": "clavicle",
    "covid-19 infection": "COVID-19 infection",
    "crystalline lens": "lens",
    "eye lens": "lens",
    "gall bladder": "gallbladder",
    "glottic area": "glottis",
    "glottic larynx": "glottis",
    "iliac vena": "iliac vein",
    "ivc": "inferior vena cava",
    "jaw joint": "temporomandibular joint",
    "lad": "left anterior descending artery",
    "lag": "left adrenal gland",
    "larynx glottic": "glottis",
    "larynx glottis": "glottis",
    "larynx supraglottic": "supraglottic larynx",
    "larynx supraglottis": "supraglottic larynx",
    "liver tumour": "liver tumor",
    "middleear": "middle ear",
    "oesophagus": "esophagus",
    "optic chiasma": "optic chiasm",
    "optic disk": "optic disc",
    "optical chiasm": "optic chiasm",
    "optical chiasma": "optic chiasm",
    "optical nerve": "optic nerve",
    "opticchiasm": "optic chiasm",
    "opticnerve": "optic nerve",
    "opticnrv": "optic nerve",
    "parotid": "parotid gland",
    "pituitary": "pituitary gland",
    "postcava": "inferior vena cava",
    "rag": "right adrenal gland",
    "submandibular": "submandibular gland",
    "supraglottis": "supraglottic larynx",
    "temporal lobes": "temporal lobe",
    "temporallobe": "temporal lobe",
    "thyroid": "thyroid gland",
    "tm joint": "temporomandibular joint",
    "tmj": "temporomandibular joint",
    "tmjoint": "temporomandibular joint",
    "tumour": "tumor",
    "tympaniccavity": "tympanic cavity",
    "vestibulsemi": "vestibular semicircular canal",
}
"""Spelling without its side -> spelling in records, the side put in front again. Reviewed by hand;
the names of SegRap 2023 as published, those of AMOS, TotalSegmentator, HaN-Seg, PDDCA and StructSeg
from memory. Names whose organ depends on the dataset ("left ventricle" of heart or brain, "tumor")
are not unified."""

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


_RIBS = {f"rib {side} {n}": f"{side} rib {n}" for side in SIDES for n in range(1, NUM_RIBS + 1)}
_MODALITIES = {alias: name for name, aliases in MODALITIES.items() for alias in aliases}


def canonical_target(name: str) -> str:
    """Spelling of a target in records. Idempotent. Raises ValueError for an empty name."""
    plain = _plain(name)
    if not plain:
        raise ValueError(f"a target needs a name, got {name!r}; name it in the release's labels")
    # Whole names first: "lag" holds its side, and "rib left 7" has it in the middle.
    whole = TARGET_SYNONYMS.get(plain) or _RIBS.get(plain)
    if whole:
        return whole
    side, rest = _parted(plain)
    # Synonyms without the side, so that each is listed once and not once per side and order.
    return f"{side} {TARGET_SYNONYMS.get(rest, rest)}".strip()


def _parted(plain: str) -> tuple[str, str]:
    """(left, right or nothing, the rest) of a name in lower case."""
    words = plain.split()
    if words[0] in SIDES:
        side, rest = words[0], words[1:]
    else:
        side, rest = words[-1], words[:-1]
    name = " ".join(rest)
    if side in SIDE_LETTERS and TARGET_SYNONYMS.get(name, name) in SIDED_TARGETS:
        side = SIDE_LETTERS[side]
    # In English a side stands before its noun, so one at the end was put there by a release. With
    # two sides in a name nobody knows which of them is the structure's.
    if side not in SIDES or not rest or set(rest) & set(SIDES):
        return "", plain
    return side, name


def canonical_modality(name: str) -> str:
    """Spelling of a modality in records. Raises ValueError, with the nearest, when unknown."""
    plain = _plain(name)
    # Not kept as it is, as a target is: flips and windows depend on the modality.
    if plain not in _MODALITIES:
        near = nearest(plain, _MODALITIES)
        # The spelling of records, which the list holds; the near one may be an alias of it.
        hint = f"; did you mean {_MODALITIES[near]!r}?" if near else ""
        raise ValueError(
            f"unknown modality {name!r}{hint}; expected one of {', '.join(MODALITIES)}. A new "
            "spelling is added to MODALITIES in biascare/records/vocabulary.py"
        )
    return _MODALITIES[plain]

"""Sex and age of people, in the many ways that tables and headers spell them.

    person = person_of(sex="female", age="045Y")      # Person("F", 45.0, noted=())
    person = person_of(sex="", age="90+")             # Person(None, 90.0, noted=())
    person = person_of(sex="x", age="forty")          # Person(None, None, noted=(..., ...))

An attribute that cannot be read is unknown, and noted: the image beside it is sound. What was
written there is not repeated, because misplaced columns hold names of people.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from biascare.records import MAX_AGE

SEXES = {"f": "F", "female": "F", "woman": "F", "m": "M", "male": "M", "man": "M"}

UNKNOWN = (
    "", "nan", "none", "null", "na", "n/a", "-", "unknown", "not reported", "u", "o", "other",
)  # fmt: skip
"""Spellings of "not known" in a column of attributes, in lower case. DICOM's sex O is "other"."""

AGE_UNITS = {"y": 1.0, "m": 1 / 12, "w": 7 / 365.25, "d": 1 / 365.25}
"""Of DICOM's age strings -> years."""

AGE = re.compile(r"(\d+(?:\.\d*)?)\s*([ymwd]?)\+?")
"""A number with DICOM's unit or none, which is years. "90+" is how releases write the ages that
would name their patients; it is read as the least of them."""

UNREADABLE_AGE = f"age unreadable: expected 0 to {MAX_AGE} years, 90+, or 045Y, 006M, 003W, 010D"
UNREADABLE_SEX = f"sex unreadable: expected one of {', '.join(SEXES)}, or unknown"


class Person(NamedTuple):
    """What is known of the person in an image."""

    sex: str | None  # F | M
    age: float | None  # years
    noted: tuple[str, ...]  # why an attribute is unknown though something is written


def person_of(sex: str, age: str) -> Person:
    """Both attributes; one that cannot be read is unknown and noted."""
    noted = []
    known_sex, known_age = None, None
    try:
        known_sex = sex_of(sex)
    except ValueError as error:
        noted.append(str(error))
    try:
        known_age = age_of(age)
    except ValueError as error:
        noted.append(str(error))
    return Person(known_sex, known_age, tuple(noted))


def sex_of(text: str) -> str | None:
    """F, M or None for not known. Raises ValueError for another word."""
    plain = text.strip().lower()
    if plain in UNKNOWN:
        return None
    # Not "unknown": a misread code would be missing from every audit by sex.
    if plain not in SEXES:
        raise ValueError(UNREADABLE_SEX)
    return SEXES[plain]


def age_of(text: str) -> float | None:
    """Years, or None for not known. Raises ValueError for what cannot be an age."""
    plain = text.strip().lower()
    if plain in UNKNOWN:
        return None
    match = AGE.fullmatch(plain)
    age = float(match[1]) * AGE_UNITS[match[2] or "y"] if match else MAX_AGE + 1
    # A birth year in the column of ages would pass as a number.
    if age > MAX_AGE:
        raise ValueError(UNREADABLE_AGE)
    return age


def race_of(text: str) -> str | None:
    """In lower case and on one line, or None for not known; there is no list of races."""
    plain = " ".join(text.lower().split())
    return None if plain in UNKNOWN else plain

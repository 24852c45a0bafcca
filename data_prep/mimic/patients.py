"""Sex, age and race of MIMIC patients, from the tables of MIMIC-IV.

    patients = read_patients(folder)          # patients.csv(.gz), admissions.csv(.gz)
    patients["10000032"].age_in(2180)

MIMIC-CXR has no demographics of its own; it shares subject_id with MIMIC-IV. Dates are shifted by
years that differ between patients but not within one, so differences of years are real.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from biascare.records import MAX_AGE
from data_prep.pipeline.attributes import person_of
from data_prep.pipeline.release_files import find_file, note, number_of, read_table

RACES = {
    "american indian": "native american",
    "asian": "asian",
    "black": "black",
    "hispanic": "hispanic",
    "multiple race": "multiple",
    "native hawaiian": "pacific islander",
    "other": "other",
    "pacific islander": "pacific islander",
    "portuguese": "other",
    "south american": "other",
    "white": "white",
}
"""Beginning of what admissions state -> race in records. Reviewed by hand: "BLACK/CAPE VERDEAN" is
black, "WHITE - RUSSIAN" is white. Nationalities that the release keeps apart are "other"."""

UNKNOWN_RACES = ("", "unknown", "unable to obtain", "patient declined to answer")
RACE_COLUMNS = ("race", "ethnicity")
"""MIMIC-IV 2 and later; MIMIC-IV 1."""


class Patient(NamedTuple):
    """What MIMIC-IV knows of one patient."""

    sex: str | None
    anchor_age: int | None  # years; 91 stands for everything above 89
    anchor_year: int
    race: str | None

    def age_in(self, year: int | None) -> float | None:
        """Age in years in a (shifted) year; None when unknown or impossible."""
        if self.anchor_age is None or year is None:
            return None
        age = self.anchor_age + year - self.anchor_year
        # An impossible age is one of a wrong join, and a wrong age is worse than none.
        return float(age) if 0 < age <= MAX_AGE else None


NOBODY = Patient(sex=None, anchor_age=None, anchor_year=0, race=None)


def read_patients(folder: Path) -> dict[str, Patient]:
    """subject_id -> patient, from the folder of MIMIC-IV or from its folder hosp."""
    folder = folder / "hosp" if (folder / "hosp").is_dir() else folder
    races = _races(find_file(folder, "admissions.csv", "admissions.csv.gz"))
    path = find_file(folder, "patients.csv", "patients.csv.gz")
    columns = ("subject_id", "gender", "anchor_age", "anchor_year")
    patients = {}
    unreadable: Counter[str] = Counter()
    for row in read_table(path, columns):
        person = person_of(row["gender"], row["anchor_age"])
        unreadable.update(person.noted)
        patients[row["subject_id"]] = Patient(
            sex=person.sex,
            # The release holds adults: 0 means that there is none.
            anchor_age=int(person.age) if person.age else None,
            anchor_year=int(number_of(row["anchor_year"], f"{path}, anchor_year")),
            race=races.get(row["subject_id"]),
        )
    for reason, count in unreadable.items():
        note(f"{path.name}: of {count:,} patients, {reason}")
    return patients


def _races(path: Path) -> dict[str, str]:
    """subject_id -> race, for those whose admissions agree on one."""
    stated: dict[str, set[str]] = {}
    strange: Counter[str] = Counter()
    for row in read_table(path, ("subject_id",)):
        column = next((name for name in RACE_COLUMNS if name in row), None)
        if column is None:
            raise ValueError(f"{path} has neither of the columns {RACE_COLUMNS}, got {list(row)}")
        race = race_of(row[column])
        if race is not None:
            stated.setdefault(row["subject_id"], set()).add(race)
        elif row[column].strip().lower() not in UNKNOWN_RACES:
            strange[row[column]] += 1
    if strange:
        # Told, as a later version of MIMIC-IV may use words that nobody has reviewed.
        note(f"races taken for unknown, not in the table: {dict(strange)}")
    # Admissions of one patient may disagree: then nobody but the patient knows, and it stays
    # unknown.
    return {subject: next(iter(races)) for subject, races in stated.items() if len(races) == 1}


def race_of(stated: str) -> str | None:
    """What one admission states -> race in records; None when unknown."""
    plain = stated.strip().lower()
    # By its beginning: the release writes subgroups behind it, "ASIAN - CHINESE".
    return next((race for start, race in RACES.items() if plain.startswith(start)), None)


def year_of(date: str) -> int | None:
    """Year of a date YYYYMMDD, which some programs saved as a number with a point."""
    # "21800506.0", and dates with dashes, from tables that a program has read and written again.
    digits = date.strip().partition(".")[0].replace("-", "")
    return int(digits[:4]) if len(digits) == 8 and digits.isdigit() else None


def unknown_subjects(subjects: Iterable[str], patients: dict[str, Patient]) -> int:
    """How many of the subjects MIMIC-IV does not hold."""
    return sum(subject not in patients for subject in set(subjects))

"""Answer rows to numbers.

    is_correct(kind="choice", prediction="B: ct", reference="B: CT")    # True
    table = summarise_answers(rows)

Answers are compared as whole texts, never by what they contain: "no mass" contains "mass".
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any


def normalise_answer(text: str) -> str:
    """Lower case, single spaces, no full stop or quotes at the ends; the inside stays readable.

    "T2-weighted" and "3.5" keep their characters: removing all punctuation would merge them with
    other answers.
    """
    return re.sub(r"\s+", " ", text.lower()).strip(" \"'.!?")


def _letter_and_option(text: str) -> tuple[str | None, str]:
    """ "b: ct" -> ("b", "ct"); a text without a letter -> (None, text).

    The letter ends the text or is followed by a mark: "a mass" is no choice of option A.
    """
    found = re.match(r"\(?([a-z])(?:[:.)]\s*(.*))?$", text)
    return (found.group(1), found.group(2) or "") if found else (None, text)


def _what_counts(kind: str, reference: str) -> str:
    """The part of a reference that an answer is held against: of a choice, its letter."""
    reference = normalise_answer(reference)
    return (_letter_and_option(reference)[0] or reference) if kind == "choice" else reference


def is_correct(*, kind: str, prediction: str, reference: str) -> bool:
    """Exact match after normalisation.

    A choice is right when its letter is; where the prediction gives no letter, when it repeats the
    text of the right option.
    """
    prediction, reference = normalise_answer(prediction), normalise_answer(reference)
    if kind == "choice":
        chosen, option = _letter_and_option(prediction)
        right, text = _letter_and_option(reference)
        if right is not None:
            return chosen == right if chosen is not None else option == text
    return prediction == reference


def summarise_answers(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy by kind and by modality, beside what constant answers would get.

    `best_constant` is the accuracy of the answer most frequent among these very references, an
    upper bound for any constant; `always_yes` is given for closed questions.
    """
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    return {kind: _accuracy_table(mine) for kind, mine in sorted(by_kind.items())}


def _accuracy_table(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    references = Counter(_what_counts(row["kind"], row["reference"]) for row in rows)
    table: dict[str, Any] = {
        "num": len(rows),
        "accuracy": _share(rows),
        "best_constant": max(references.values()) / len(rows),
        "by_modality": {
            name: {"num": len(mine), "accuracy": _share(mine)}
            for name, mine in sorted(_split(rows, "modality").items())
        },
    }
    if rows[0]["kind"] == "closed":
        table["always_yes"] = references["yes"] / len(rows)
    return table


def _split(rows: Sequence[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    parts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        parts[str(row[key])].append(row)
    return parts


def _share(rows: Sequence[dict[str, Any]]) -> float:
    return sum(row["correct"] for row in rows) / len(rows)

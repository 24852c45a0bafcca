"""Labels of records as what a label head is trained on and judged by.

labels = trained_labels(sources)               # of the record folders, in alphabetical order
presence(row, LabelSpace(labels, exclusive=False))    # [K], None where nobody judged
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from biascare.data.prevalence import drawn_counts
from biascare.records import Records


class LabelSpace(NamedTuple):
    """What a label head tells apart."""

    names: tuple[str, ...]
    exclusive: bool  # exactly one of them holds


def trained_labels(sources: Sequence[Records]) -> tuple[str, ...]:
    """All labels of the folders, in alphabetical order: those that a release says it judged, else
    those that images have. Raises ValueError where they are fewer than two."""
    names: set[str] = set()
    for source in sources:
        first = source[int(source.labelled_units[0])] if len(source.labelled_units) else None
        judged = None if first is None else first["extra"].get("judged_labels")
        # What says that nothing was found ("No finding") is on no list of judged labels.
        names |= set(drawn_counts([source], labelled=True) if judged is None else judged)
    found = tuple(sorted(names))
    if len(found) < 2:
        where = ", ".join(str(source.folder) for source in sources)
        raise ValueError(f"{where}: found the labels {list(found)}, a head needs at least two")
    return found


def presence(row: dict[str, Any], space: LabelSpace) -> list[bool | None]:
    """Which of the labels a record has.

    A record whose release judged only some labels says which (`judged_labels` in its extra); the
    others are None. Raises ValueError where exclusive labels are not exactly one.
    """
    judged = row["extra"].get("judged_labels")
    stated = set(row["labels"]) & set(row["labels"] if judged is None else judged)
    found = [
        True if name in stated else (False if judged is None or name in judged else None)
        for name in space.names
    ]
    if space.exclusive and sum(map(bool, found)) != 1:
        wanted = ", ".join(space.names)
        raise ValueError(f"labels: got {sorted(stated)}, expected exactly one of {wanted}")
    return found

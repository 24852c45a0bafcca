"""Prevalence groups: which targets are head, medium and tail, from training counts alone.

    groups = prevalence_groups({"liver": 900, "spleen": 90, "insulinoma": 3}, 0.5, 0.1)

Held-out counts never enter: a group says how much there was to learn from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

PREVALENCE_GROUPS = ("head", "medium", "tail", "unseen")
"""From most to least frequent; `unseen` is a held-out target without any training mask."""


def total_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sum of several sources' target counts."""
    total: Counter[str] = Counter()
    for source in counts:
        total.update(source)
    return dict(total)


def prevalence_groups(
    counts: Mapping[str, int], head_share: float, tail_share: float
) -> dict[str, str]:
    """Group of each target.

    Head: the most frequent targets, taken until they hold `head_share` of all masks. Tail: the
    rarest targets that together hold at most `tail_share`, and always the rarest one if there are
    at least two. Medium: the rest. Ties are ordered by name.
    """
    ordered = sorted(counts, key=lambda name: (-counts[name], name))
    total = sum(counts.values())
    groups = dict.fromkeys(ordered, "medium")
    held = 0
    for name in ordered:
        if held >= head_share * total:
            break
        groups[name] = "head"
        held += counts[name]
    held = 0
    for name in reversed(ordered[1:]):
        held += counts[name]
        if held > tail_share * total and name != ordered[-1]:
            break
        groups[name] = "tail"
    return groups

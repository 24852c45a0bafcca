"""Prevalence groups: which targets are head, medium and tail, from training counts alone.

    groups = prevalence_groups({"liver": 900, "spleen": 90, "insulinoma": 3}, 0.5, 0.1)
    save_prevalence("prevalence.json", counts, 0.5, 0.1, folders=["prepared/btcv/train"])
    groups = load_prevalence("prevalence.json")

Held-out counts never enter: a group says how much there was to learn from.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from biascare.records import Records

PREVALENCE_GROUPS = ("head", "medium", "tail", "unseen")
"""From most to least frequent; `unseen` is a held-out target without any training mask."""


def total_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sum of several sources' target counts."""
    total: Counter[str] = Counter()
    for source in counts:
        total.update(source)
    return dict(total)


def drawn_counts(images: Sequence[Records], *, labelled: bool) -> dict[str, int]:
    """Number of masks per target, or of images per label, in the training folders."""
    counts = "labels" if labelled else "targets"
    return total_counts(source.manifest[counts] for source in images)


def prevalence_groups(
    counts: Mapping[str, int], head_share: float, tail_share: float
) -> dict[str, str]:
    """Group of each target; targets of equal count are in one group.

    Head: the most frequent targets, taken until they hold `head_share` of all masks. Tail: the
    rarest targets that together hold at most `tail_share`, and always the rarest unless all are
    equally frequent. Medium: the rest.
    """
    # By size and not by name: two targets of equal count must not fall into different groups by
    # the order in which they were read.
    sizes = sorted(Counter(counts.values()).items(), reverse=True)  # (count, targets that have it)
    total = sum(counts.values())
    groups = {}
    held = 0
    for count, num_targets in sizes:
        # Asked before it is added, so the target that crosses the share is still head.
        groups[count] = "head" if held < head_share * total else "medium"
        held += count * num_targets
    held = 0
    # Without the most frequent size: it is head, also where two sizes are all there is.
    for count, num_targets in reversed(sizes[1:]):
        held += count * num_targets
        # The rarest are tail however many masks they hold, or few targets would have no tail.
        if held > tail_share * total and count != sizes[-1][0]:
            break
        groups[count] = "tail"
    return {name: groups[count] for name, count in counts.items()}


def groups_of(
    file: str | None, counts: Mapping[str, int], head_share: float, tail_share: float
) -> dict[str, str]:
    """Groups of a file by `save_prevalence` if one is named, else of these counts."""
    if file is not None:
        return load_prevalence(file)
    return prevalence_groups(counts, head_share, tail_share)


def save_prevalence(
    path: str | Path,
    counts: Mapping[str, int],
    head_share: float,
    tail_share: float,
    *,
    folders: Sequence[str] = (),
) -> dict[str, str]:
    """Write the groups with what they follow from: counts, shares and the training folders."""
    groups = prevalence_groups(counts, head_share, tail_share)
    # With what they follow from, so that a reader can decide them again and notice an edit.
    about = {
        "head_share": head_share,
        "tail_share": tail_share,
        "folders": list(folders),
        "targets": {name: {"masks": counts[name], "group": groups[name]} for name in groups},
    }
    text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    Path(path).write_text(text, encoding="utf-8")
    return groups


def load_prevalence(path: str | Path) -> dict[str, str]:
    """Groups of a file by `save_prevalence`, decided again from its counts and shares.

    Raises ValueError for another kind of file, and for one whose groups were edited by hand: they
    would contradict the shares that a reader of the file goes by.
    """
    try:
        about = json.loads(Path(path).read_text(encoding="utf-8"))
        counts = {name: int(row["masks"]) for name, row in about["targets"].items()}
        stated = {name: row["group"] for name, row in about["targets"].items()}
        groups = prevalence_groups(counts, about["head_share"], about["tail_share"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not hold prevalence groups ({type(error).__name__}: {error}); "
            "write it with scripts/data_bias.py"
        ) from error
    # Of two statements that contradict each other neither is believed.
    wrong = [name for name in stated if stated[name] != groups[name]]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{path}: {len(wrong)} groups contradict the file's own counts and shares, such as "
            f"{name!r}: got {stated[name]!r}, expected {groups[name]!r}; change head_share or "
            "tail_share and write it again with scripts/data_bias.py"
        )
    return groups

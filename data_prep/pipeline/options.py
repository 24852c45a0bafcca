"""What the user states where no release does: names of labels, patients, splits.

labels = parse_labels("1=liver,2=spleen")            # {1: "liver", 2: "spleen"}
labels = parse_labels("#ff0000=liver")                # {(255, 0, 0): "liver"}
labels = parse_labels("nonzero=lesion")               # {None: "lesion"}
split_of = Splits.from_arguments(args).of
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from biascare.records.vocabulary import canonical_modality, canonical_target
from data_prep.pipeline.release_files import note
from data_prep.pipeline.shards import Converted, Release, UnusableItemError
from data_prep.wording.conversations import drawn_split

Item = TypeVar("Item")
Value = int | tuple[int, int, int] | None
"""A label value, a colour, or None: every value but 0."""

SUFFIXES = (
    ".nii.gz", ".nii", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif",
)  # fmt: skip
SPLIT_SYNONYMS = {"training": "train", "validation": "val", "valid": "val", "dev": "val"}
PATIENT_REGEX = "--patient-regex finds the patient in a file's path and keeps them together"
SHARE_TOLERANCE = 0.1
"""A realised share this far from the one asked for is told; the draw is binomial."""


def add_source_arguments(
    parser: argparse.ArgumentParser, *, modality_required: bool = True
) -> None:
    """What a dataset is called and what it shows."""
    parser.add_argument(
        "--name", required=True, type=_source_name, help="of the dataset; its folder in --output"
    )
    parser.add_argument(
        "--modality", required=modality_required, type=_modality, help="ct, mri, xray, ..."
    )
    parser.add_argument("--anatomy", default="", help="for example abdomen; default: not stated")
    parser.add_argument(
        "--version",
        default="unversioned",
        help="of the source, for the manifest; default: %(default)s",
    )
    parser.add_argument(
        "--licence",
        default="not stated",
        help="of the source, for the manifest; default: %(default)s",
    )


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("splits and patients")
    group.add_argument(
        "--split-list",
        action="append",
        default=[],
        metavar="SPLIT=FILE",
        help="official list, one name per line; may be repeated",
    )
    add_share_arguments(group, test=0.0, val=0.0, of="patients, by hash")
    group.add_argument(
        "--patient-regex",
        metavar="PATTERN",
        help="finds the patient in a file's path: its first group",
    )


def add_share_arguments(
    parser: argparse._ActionsContainer, *, test: float, of: str, val: float | None = None
) -> None:
    """--test-share and, unless `val` is None, --val-share. `of`: what is drawn."""
    for split, share in {"test": test, "val": val}.items():
        if share is not None:
            parser.add_argument(
                f"--{split}-share",
                type=float,
                default=share,
                help=f"share of the {of}, from 0 to 1; default: %(default)s",
            )


class Splits(NamedTuple):
    """Which split an item belongs to, and which patient."""

    lists: Mapping[str, str]  # name -> split; empty: drawn by hash
    shares: Mapping[str, float]
    pattern: re.Pattern[str] | None

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Splits:
        """Raises ValueError for a bad pattern, list or share."""
        shares = {"test": args.test_share, "val": args.val_share}
        drawn_split("", shares)  # tells impossible shares
        # An item in no list would be drawn, and an official test image could land in train.
        if args.split_list and any(shares.values()):
            raise ValueError("--split-list and --test-share / --val-share: choose one")
        text, pattern = args.patient_regex, None
        if text is not None:
            try:
                pattern = re.compile(text)
            except re.error as error:
                raise ValueError(
                    f"--patient-regex {text!r} is not a regular expression: {error}"
                ) from error
            # Without a group the whole match would be the patient, slice numbers included.
            if pattern.groups < 1:
                raise ValueError(
                    f"--patient-regex {text!r} needs a group: (...) around the patient"
                )
        return cls(_read_lists(args.split_list), shares, pattern)

    def of(self, name: str, patient: str | None) -> str | None:
        """Split of an item; None when there are lists and none names it.

        `name` is a path without suffix; a list may give it with or without folders and suffix.
        """
        if not self.lists:
            # By the patient, so that no patient is in two splits.
            return drawn_split(patient or name, self.shares)
        found = {self.lists[key] for key in (name, Path(name).name) if key in self.lists}
        # Two folders may hold the same file name, and a list of bare names cannot tell them apart.
        if len(found) > 1:
            raise ValueError(f"{name!r} is in the lists of {sorted(found)}; give full paths there")
        return found.pop() if found else None

    def check_lists(self, names: Iterable[str]) -> None:
        """Raises ValueError when a list holds what is none of `names`, the paths of all items
        without suffix."""
        # A misspelt line of the test list would leave its item out of every split, unnoticed.
        known = {key for name in names for key in (name, Path(name).name)}
        unknown = [name for name in self.lists if name not in known]
        if unknown:
            raise ValueError(
                f"{len(unknown)} names of --split-list are nowhere in the source: "
                f"{', '.join(map(repr, unknown[:3]))}{', ...' if len(unknown) > 3 else ''}; "
                "correct or remove these lines (a name is a path in the source, with or without "
                "folders and suffix)"
            )

    def patient_in(self, path: str) -> str | None:
        """Patient in a path. Raises ValueError when a pattern was given and does not match."""
        if self.pattern is None:
            return None
        match = self.pattern.search(path)
        # No default: an image without its patient would be drawn into a split alone.
        if match is None or not match[1]:
            raise ValueError(
                f"--patient-regex {self.pattern.pattern!r} finds no patient in {path!r}"
            )
        return match[1]


def group_by_split(
    source: str,
    items: Sequence[Item],
    splits: Splits,
    *,
    name_of: Callable[[Item], str],
    patient_of: Callable[[Item], str | None],
    what: str,
    study_of: Callable[[Item], str | None] = lambda item: None,
    mend: str = PATIENT_REGEX,
) -> list[tuple[str, list[Item]]]:
    """(split, items) in order of name. Tells of items that are in no list, of patients that are not
    known and of shares that are not met; `what` the items are. Without a patient the study, if any,
    is drawn. Raises ValueError as `check_lists`."""
    splits.check_lists(map(name_of, items))
    groups: dict[str | None, list[Item]] = {}
    for item in items:
        # The study at least: images of one examination show the same finding.
        drawn = patient_of(item) or study_of(item)
        groups.setdefault(splits.of(name_of(item), drawn), []).append(item)
    # Left out and told: a list is a statement about which items belong to the study.
    unlisted = groups.pop(None, [])
    if unlisted:
        note(f"{source}: {len(unlisted)} {what} are in no --split-list, left out")
    found = {str(split): chosen for split, chosen in groups.items()}
    num_unknown = sum(patient_of(item) is None for item in items)
    note_unknown_patients(source, splits, num_unknown, len(items), what, mend)
    note_shares(source, splits.shares, {split: len(group) for split, group in found.items()}, what)
    return sorted(found.items())


def releases_of(
    groups: Iterable[tuple[str, list[Item]]],
    *,
    source: str,
    version: str,
    licence: str,
    convert: Callable[..., Converted | Iterable[Converted] | None],
    name_of: Callable[[Item], str],
    promises_masks: bool = False,
    how_to_learn: str = "",
) -> list[Release]:
    """One release per (split, items). `convert` takes the split, then the item."""
    return [
        Release(
            source=source,
            split=split,
            version=version,
            licence=licence,
            items=items,
            convert=partial(convert, split),
            name_of=name_of,
            promises_masks=promises_masks,
            how_to_learn=how_to_learn,
        )
        for split, items in groups
    ]


def note_unknown_patients(
    source: str, splits: Splits, num_unknown: int, num_items: int, what: str, mend: str
) -> None:
    """Say so when a split is drawn of items whose patient nothing tells. `mend`: what would."""
    if num_unknown and any(splits.shares.values()):
        note(
            f"{source}: the patient of {num_unknown} of {num_items} {what} is not known, so {what} "
            f"of one patient may land on both sides of the split; {mend}"
        )


def note_shares(
    source: str, shares: Mapping[str, float], counts: Mapping[str, int], what: str
) -> None:
    """Say so when drawn splits are far from the shares asked for, or one is empty. `counts`: items
    per split; what `shares` leave is train."""
    total = sum(counts.values())
    if not (total and any(shares.values())):
        return
    asked = {"train": 1 - sum(shares.values()), **shares}
    found = {split: counts.get(split, 0) / total for split in asked}
    far = any(
        abs(found[split] - asked[split]) > SHARE_TOLERANCE
        or (shares.get(split, 0) > 0 and not counts.get(split))
        for split in asked
    )
    if far:
        told = ", ".join(
            f"{split} {counts.get(split, 0)} ({found[split]:.0%}, asked {asked[split]:.0%})"
            for split in asked
            if asked[split] > 0 or counts.get(split)
        )
        note(
            f"{source}: the splits of {total} {what} are not near the shares asked for: {told}. "
            "Every patient is drawn for itself: with few of them that is chance"
        )


def parse_labels(text: str) -> dict[Value, str]:
    """ "1=liver,2=spleen" -> {1: "liver", 2: "spleen"}, names in canonical spelling. Values are
    numbers, colours "#rrggbb" or "nonzero". Raises ValueError for anything else."""
    labels: dict[Value, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        value, separator, name = item.partition("=")
        if not separator or not name.strip():
            raise ValueError(f"--labels takes VALUE=NAME,VALUE=NAME; got {item!r}")
        key = _value(value.strip())
        if key in labels or canonical_target(name) in labels.values():
            raise ValueError(f"--labels gives a value or a name twice: {item!r}")
        labels[key] = canonical_target(name)
    kinds = {type(key) for key in labels}
    if not labels or len(kinds) > 1 or 0 in labels:
        raise ValueError(
            f"--labels takes numbers above 0, or colours, or nonzero, not a mixture; got {text!r}"
        )
    return labels


def cut_masks(
    values: np.ndarray,
    labels: Mapping[Any, str],
    ignored: Sequence[int] = (),
    named_by: str = "--labels",
) -> list[tuple[str, np.ndarray]]:
    """A label map -> non-empty targets, in the order of `labels`.

    `values`: integers [H, W], or colours uint8 [H, W, 3]; `labels` are keyed by `Value`, and
    `named_by` is what the user may give to name more of them. Returns (name, bool [H, W]). Raises
    UnusableItemError for a value that is neither a label, ignored nor background (0 or black), and
    for colours where numbers are expected.
    """
    coloured = any(isinstance(key, tuple) for key in labels)
    if values.ndim == 3 and not coloured:
        raise UnusableItemError(
            "mask is coloured: name its colours, --labels '#ff0000=liver', or store label numbers"
        )
    if coloured and values.ndim == 2:
        # `read_label_map` makes grey of three equal channels, also where a colour happens to be
        # grey.
        values = np.repeat(values[..., None], 3, axis=2)
    if coloured:
        channels = values.astype(np.int64)
        values = channels[..., 0] << 16 | channels[..., 1] << 8 | channels[..., 2]
    numbers = {
        key[0] << 16 | key[1] << 8 | key[2] if isinstance(key, tuple) else key: name
        for key, name in labels.items()
        if key is not None
    }
    if None in labels:
        masks = [(labels[None], (values != 0) & ~np.isin(values, list(ignored)))]
    else:
        masks = [(name, values == number) for number, name in numbers.items()]
        # A value without a name is a structure that would silently become background. Sorting 10^7
        # pixels to count their values is slow, asking for what is not known is not.
        rest = np.unique(values[~np.isin(values, [0, *ignored, *numbers])])
        if len(rest):
            shown = [f"#{value:06x}" if coloured else str(value) for value in rest[:5]]
            raise UnusableItemError(f"mask holds values that {named_by} does not name: {shown}")
    return [(name, mask) for name, mask in masks if mask.any()]


def stem_of(path: str) -> str:
    """A path without its suffix; "p1/a.b.nii.gz" -> "p1/a.b". Other dots are part of the name."""
    for suffix in SUFFIXES:
        if path.lower().endswith(suffix):
            return path[: -len(suffix)]
    return path


def split_name(text: str) -> str:
    """Split in the spelling of records: train, val, test, or another word as it is."""
    plain = text.strip().lower()
    return SPLIT_SYNONYMS.get(plain, plain)


def _value(text: str) -> Value:
    if text == "nonzero":
        return None
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        return (int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16))
    if re.fullmatch(r"\d+", text):
        return int(text)
    raise ValueError(f"a label is a number, a colour #rrggbb, or nonzero; got {text!r}")


def _source_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no folder name of letters, digits, _ . -")
    return text


def _modality(text: str) -> str:
    try:
        return canonical_modality(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _read_lists(items: Sequence[str]) -> dict[str, str]:
    """["train=train.txt", ...] -> {name: split}."""
    lists: dict[str, str] = {}
    for item in items:
        split, separator, file = item.partition("=")
        if not separator or not Path(file).is_file():
            raise ValueError(f"--split-list takes SPLIT=FILE with a file that exists; got {item!r}")
        # Editors on Windows begin a file with a mark, which would be part of the first name.
        for line in Path(file).read_text(encoding="utf-8-sig").splitlines():
            name = stem_of(line.strip().replace("\\", "/"))
            if name and lists.setdefault(name, split_name(split)) != split_name(split):
                raise ValueError(f"{name!r} is in the lists of {lists[name]!r} and {split!r}")
    return lists

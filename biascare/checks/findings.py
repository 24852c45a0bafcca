"""What checks report: codes with their levels, findings, and how many of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from biascare.records import MAX_AGE, SEXES

CODES: dict[str, tuple[str, str]] = {
    "folder-unreadable": ("error", "the folder cannot be opened"),
    "content-hash": ("error", "the rows are not those the manifest was written for"),
    "units": ("error", "the list of stream units does not match the rows"),
    "manifest-counts": ("error", "a histogram of the manifest does not match the rows"),
    "row-of-another-folder": ("error", "source or split of a row is not that of its folder"),
    "duplicate-id": ("error", "an id occurs more than once in a folder"),
    "image-undecodable": ("error", "the image does not decode"),
    "image-size": ("error", "height and width are not those of the image"),
    "image-line": ("error", "the image is one pixel wide or high: cut along the wrong axis?"),
    "image-is-mask": ("error", "the image is constant in every mask and outside: a label map"),
    "row-unreadable": ("error", "texts, facts or other fields of the record are damaged"),
    "checksum": ("error", "image or masks were altered after they were written"),
    "mask-code": ("error", "the code of a mask is damaged, or is not one of its image's size"),
    "masks-missing": ("error", "the release promises masks, and no record has one"),
    "mask-empty": ("error", "the mask has no pixel"),
    "mask-vanishes": ("error", "the mask has no pixel at the training size"),
    "target-twice": ("error", "a target occurs twice on one image"),
    "turns": ("error", "turns do not alternate, or have no known kind"),
    "options-facts": ("error", "options or facts of a question are none that a record may hold"),
    "empty-text": ("error", "a question or answer has no text"),
    "closed-answer-spelling": ("error", 'a closed answer means yes or no but is not "yes" or "no"'),
    "age-impossible": ("error", f"age below 0, above {MAX_AGE} or not a number"),
    "sex-unknown-code": ("error", f"sex is none of {', '.join(SEXES)} and not missing"),
    "leak-id": ("error", "the same image id stands in several splits"),
    "leak-patient": ("error", "images of one patient stand in several splits"),
    "leak-study": ("error", "images of one study stand in several splits"),
    "leak-image": ("error", "the same pixels stand in several splits"),
    "leak-near": ("warning", "an image and a changed copy stand in several splits; see the sheet"),
    "shared-patient-id": ("warning", "unrelated sources of several splits use one patient id"),
    # A warning: a release that names no patients could else never pass.
    "no-patient": ("warning", "records without patient id: leaks by patient cannot be seen"),
    "image-twice": ("warning", "the same pixels occur more than once in one split"),
    "near-between-sources": ("warning", "nearly the same image in two sources of one split"),
    "image-like-labels": ("warning", "all grey values are small whole numbers, as of a label map"),
    "image-blank": ("warning", "the image has hardly any contrast"),
    "image-rotated-by-tag": ("warning", "an EXIF tag asks viewers to turn the image; we do not"),
    "mask-one-pixel": ("warning", "the mask is a single pixel at the training size"),
    "mask-on-constant": ("warning", "the image is constant around the mask: shifted or turned?"),
    "sides-disagree": ("warning", "right structures lie at image right: turned or mirrored?"),
    "no-units": ("warning", "no record has a mask or a question: training can use none of them"),
    "no-lesson": ("warning", "records with neither a mask nor a question, among others"),
    "masks-lost": ("warning", "masks that the release promises could not be used; see the ledger"),
    "answers-differ": ("warning", "one question about the same pixels has different answers"),
    "closed-answer-other": ("warning", "a closed question is answered by neither yes nor no"),
    "modality-name": ("warning", "the modality is not in the vocabulary's spelling"),
    "target-name": ("warning", "the target is not in the vocabulary's spelling"),
    "target-variants": ("warning", "two target names may mean the same"),
    "label-variants": ("warning", "two labels may mean the same, as two of different case"),
    "target-one-side": ("warning", "one side of a pair is a target, the other is not"),
    "target-unseen": ("warning", "a held-out target occurs in no training folder"),
    "text-edges": ("warning", "a question or answer begins or ends with space"),
}
"""Code -> (level, what it says)."""


class Vocabulary(NamedTuple):
    """Spellings of the project; functions of modules, so that other processes can import them."""

    target: Callable[[str], str]  # canonical spelling
    modality: Callable[[str], str]  # canonical spelling; ValueError when unknown
    sides_agree: Callable[[list[tuple[str, NDArray[np.bool_]]]], list[bool]]


class Finding(NamedTuple):
    """One thing noticed."""

    code: str
    level: str  # error | warning | allowed
    where: str  # source/split, or several
    num: int  # cases: images, masks, names, ...
    examples: list[str]

    @property
    def message(self) -> str:
        return CODES[self.code][1]


class LintSettings(NamedTuple):
    """What is checked against."""

    vocabulary: Vocabulary
    image_size: int  # training size in pixels
    num_examples: int = 5  # kept per finding
    num_workers: int = 0  # processes; 0 checks in this one


class Issues:
    """Counts per code, and the first few examples of each."""

    def __init__(self, num_examples: int) -> None:
        self.num_examples = num_examples
        self.found: dict[str, tuple[int, list[str]]] = {}

    def add(self, code: str, example: str, count: int = 1) -> None:
        """`count` cases, of which `example` is one."""
        # A misspelt code would be found by no --allow and have no level.
        assert code in CODES, code
        number, examples = self.found.get(code, (0, []))
        if len(examples) < self.num_examples:
            examples = [*examples, example]
        self.found[code] = number + count, examples

    def merge(self, other: dict[str, tuple[int, list[str]]]) -> None:
        for code, (count, examples) in other.items():
            number, mine = self.found.get(code, (0, []))
            # Chunks come back in order, so that the examples do not depend on the number of
            # workers.
            self.found[code] = number + count, [*mine, *examples][: self.num_examples]

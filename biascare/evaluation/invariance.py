"""Whether cases depend on how they were computed: the same items in other batches, in another
order, and with an interruption.

    differences = check_invariance(compute, folder)      # compute(path, batch_size, backwards)
    all(difference.passed for difference in differences)

Numbers of one item may differ in their last bits between batches, because sums are taken in another
order; what a reader sees must not: texts are equal, log-probabilities and masks almost.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from biascare.evaluation.cases import AnswerCase, Cases, FinishedCase, MaskCase, Variant
from biascare.evaluation.metrics.segmentation import dice_score
from biascare.records import decode_mask
from biascare.training.ranks import from_rank_zero

MAX_LOG_PROB = 1e-3
MAX_DOUBT = 0.01
"""Of an uncertainty: it follows from pixels, and one at the threshold may fall to either side."""

MIN_DICE = 0.99
"""Of a mask with its twin: a pixel at the threshold may fall to either side, and small masks have
few."""

BATCH_SIZES = (1, 2, 7)


class Difference(NamedTuple):
    """Cases of one way of computing against those of the first."""

    how: str
    num: int
    num_absent: int  # cases that only one of the two has
    num_texts: int  # answers of another text
    log_prob: float  # largest difference
    doubt: float  # largest difference of an uncertainty
    dice: float  # smallest Dice of a mask with its twin

    @property
    def passed(self) -> bool:
        same = not self.num_absent and not self.num_texts
        close = self.log_prob <= MAX_LOG_PROB and self.doubt <= MAX_DOUBT
        return same and close and self.dice >= MIN_DICE


def check_invariance(compute: Callable[[Path, int, bool], Cases], folder: Path) -> list[Difference]:
    """`compute` evaluates into a file, in batches of a size, the items in order or backwards; a
    file that is there is completed. One batch size is the reference, the others, the reverse order
    and an interrupted run follow."""
    first, *others = BATCH_SIZES
    reference = compute(folder / "reference.jsonl", first, False)
    differences = [
        _difference(f"batches of {size}", reference, compute(folder / f"{size}.jsonl", size, False))
        for size in others
    ]
    backwards = compute(folder / "backwards.jsonl", others[-1], True)
    differences.append(_difference("backwards", reference, backwards))
    from_rank_zero(lambda: _interrupt(folder))
    resumed = compute(folder / "cut.jsonl", others[-1], False)
    differences.append(_difference("interrupted", reference, resumed))
    return differences


def _interrupt(folder: Path) -> None:
    """The share of a rank as a kill leaves it: half of the cases, and the next one cut short."""
    lines = (folder / "reference.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    text = "".join(lines[: len(lines) // 2 + 1]) + lines[-1][:20]
    (folder / "cut.rank0.jsonl").write_text(text, encoding="utf-8")


def _difference(how: str, one: Cases, other: Cases) -> Difference:
    ours, theirs = _by_id(one), _by_id(other)
    pairs = [(ours[name], theirs[name]) for name in ours.keys() & theirs.keys()]
    num_texts, log_probs, doubts, dices = 0, [0.0], [0.0], [1.0]
    for a, b in pairs:
        if isinstance(a, AnswerCase) and isinstance(b, AnswerCase):
            # A variant that only one of the two has is a text that differs.
            names = a.variants.keys() & b.variants.keys()
            both: list[tuple[AnswerCase | Variant, AnswerCase | Variant]] = [(a, b)]
            both += [(a.variants[name], b.variants[name]) for name in names]
            num_texts += len(a.variants.keys() ^ b.variants.keys())
            num_texts += sum(x.text != y.text for x, y in both)
            stated = [
                *((x.option_log_probs or [], y.option_log_probs or []) for x, y in both),
                # Of other texts the tokens are others.
                (a.token_log_probs, b.token_log_probs) if a.text == b.text else ([], []),
            ]
            log_probs += [abs(x - y) for xs, ys in stated for x, y in zip(xs, ys, strict=True)]
        elif isinstance(a, MaskCase) and isinstance(b, MaskCase):
            dices += _agreements(a, b)
            doubts += _doubt_differences(a, b)
    return Difference(
        how=how,
        num=len(pairs),
        num_absent=len(ours.keys() ^ theirs.keys()),
        num_texts=num_texts,
        log_prob=max(log_probs),
        doubt=max(doubts),
        dice=min(dices),
    )


def _by_id(cases: Cases) -> dict[str, FinishedCase]:
    every: list[FinishedCase] = [*cases.masks, *cases.answers]
    return {case.id: case for case in every}


def _doubt_differences(one: MaskCase, other: MaskCase) -> list[float]:
    """Of every uncertainty of a case and its twin's; infinite where only one of the two has it."""
    pairs = [(one.by_text, other.by_text), *zip(one.predictions, other.predictions, strict=True)]
    stated = [(a.uncertainty, b.uncertainty) for a, b in pairs if a is not None and b is not None]
    return [
        abs(a[name] - b[name]) if name in a and name in b else float("inf")
        for a, b in stated
        for name in a.keys() | b.keys()
    ]


def _agreements(one: MaskCase, other: MaskCase) -> list[float]:
    """Dice of every mask of a case with its twin."""
    size = one.height, one.width
    masks = [
        [p.mask for p in (case.by_text, *case.predictions) if p is not None]
        for case in (one, other)
    ]
    return [
        1.0 if a == b else dice_score(*(decode_mask(m.encode("ascii"), *size) for m in (a, b)))
        for a, b in zip(*masks, strict=True)
    ]

"""Questions and answers of the embedded data set: each answer is computed from the masks.

    turns = converse(rng, observe("ct", rendering), prevalence)

All phrasings are lower case and share a small vocabulary: a language model of a million parameters,
trained for minutes, has to read them. Yes and no, and the options of a choice, are balanced by
construction, so that no answer can be guessed from the words of its question.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from biascare.records import Turn
from data_prep.embedded.renderers import Rendering
from data_prep.embedded.tables import ANATOMY, AVAILABILITY, PATIENT_FRAME, TARGETS, is_finding
from data_prep.wording.conversations import Question, turns_of

PHRASES: dict[str, tuple[str, ...]] = {
    "modality": ("which modality is this?", "what type of image is this?", "name the modality."),
    "is modality": ("is this {a} image?", "is {a} image shown?", "does this look like {a} image?"),
    "is finding": ("is there {a}?", "is {a} present?", "does this image show {a}?"),
    "is visible": (
        "{is} the {name} visible?",
        "{is} the {name} seen here?",
        "{is} the {name} in view?",
    ),
    "is side": ("is the {name} {where}?", "does the {name} lie {where}?"),
    "side": ("on which side is the {name}?", "which side is the {name} on?"),
    "largest": ("which structure is the largest?", "name the largest structure."),
    "finding": ("what is the finding?", "what abnormality is shown?", "name the finding."),
    "which structure": ("which structure is visible?", "which of these is visible?"),
    "report": ("write a short report.", "describe this image.", "what does this image show?"),
}
NO_FINDING = "no finding"
SMALL_SHARE, LARGE_SHARE = 0.01, 0.05
"""Shares of the image's pixels at which a finding is called medium, then large."""


_STRUCTURE_SHARES = {
    name: sum(AVAILABILITY[m] * t[name].prevalence for m, t in TARGETS.items() if name in t)
    for targets in TARGETS.values()
    for name, target in targets.items()
    if not target.radius
}
"""Share of all images that show each structure; livers are shown by two modalities."""


class Observation(NamedTuple):
    """What is known of one rendered image; every answer is computed from it."""

    modality: str
    shares: dict[str, float]  # target -> share of the image's pixels
    sides: dict[str, str | None]  # target -> left, right, None if it straddles the midline


def observe(modality: str, rendering: Rendering) -> Observation:
    """Sizes and sides of the masks. A side holds nine tenths of the pixels, or there is none."""
    shares, sides = {}, {}
    for name, mask in rendering.targets.items():
        shares[name] = float(mask.mean())
        at_left = float(mask[:, : mask.shape[1] // 2].sum() / mask.sum())
        # A structure across the midline has no side, and asking for one would teach a guess.
        side = "left" if at_left >= 0.9 else "right" if at_left <= 0.1 else None
        if side and modality in PATIENT_FRAME:
            side = "right" if side == "left" else "left"
        sides[name] = side
    return Observation(modality, shares, sides)


def converse(
    rng: np.random.Generator, seen: Observation, prevalence: dict[str, float]
) -> list[Turn]:
    """Three to six questions with answers that follow from what is seen.

    Args:
        rng: of this sample; draws which questions, which wording.
        prevalence: of each finding in the split; balances yes and no, see `_ask_finding`.
    """
    pairs = [_choice(rng, seen), _open(rng, seen), _ask_modality(rng, seen)]
    if _structures(seen):
        pairs.append(_ask_visible(rng, seen))
    pairs += _ask_finding(rng, seen, prevalence)
    sided = [name for name in _findings(seen) if seen.sides[name]]
    if sided and rng.random() < 0.5:
        # A fair coin for the side that is asked, so that neither answer is the commoner one.
        name = str(rng.choice(sided))
        side = "left" if rng.random() < 0.5 else "right"
        words = {"name": name, "where": _where(seen.modality, side)}
        answer = _yes_no(side == seen.sides[name])
        pairs.append(_pose(rng, "closed", "is side", answer, **words))
    elif rng.random() < 0.6:
        pairs.append(_pose(rng, "report", "report", report(seen)))
    # In any order: a model that reads whole conversations could else tell the kind by its place.
    ordered = [pairs[index] for index in rng.permutation(len(pairs))]
    return turns_of([question for question, _ in ordered], [facts for _, facts in ordered])


Posed = tuple[Question, dict[str, str]]
"""A question and its facts: which of PHRASES it is."""


def _pose(
    rng: np.random.Generator,
    kind: str,
    task: str,
    answer: str,
    options: Sequence[str] = (),
    **words: str,
) -> Posed:
    """A question in one of the phrasings of its task."""
    phrasings = PHRASES[task]
    text = phrasings[int(rng.integers(len(phrasings)))].format(**words)
    return Question(text, answer, kind, tuple(options)), {"question_type": task}


def _article(name: str) -> str:
    """`name` with its indefinite article; "mri" and "xray" begin with spoken vowels."""
    return f"an {name}" if name[0] in "aeiou" or name in ("mri", "xray") else f"a {name}"


def _findings(seen: Observation) -> list[str]:
    return [name for name in seen.shares if is_finding(seen.modality, name)]


def _structures(seen: Observation) -> list[str]:
    return [name for name in seen.shares if not is_finding(seen.modality, name)]


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"


def _draw(rng: np.random.Generator, shares: dict[str, float]) -> str:
    weights = np.array(list(shares.values()))
    return str(rng.choice(list(shares), p=weights / weights.sum()))


def _ask_modality(rng: np.random.Generator, seen: Observation) -> Posed:
    """A fair coin decides the answer, then a fitting modality is asked for."""
    name = seen.modality
    if rng.random() < 0.5:
        name = _draw(rng, {k: share for k, share in AVAILABILITY.items() if k != seen.modality})
    answer = _yes_no(name == seen.modality)
    return _pose(rng, "closed", "is modality", answer, a=_article(name))


def _ask_visible(rng: np.random.Generator, seen: Observation) -> Posed:
    """A fair coin; absent structures are asked for as often as they are shown elsewhere."""
    visible = _structures(seen)
    name = str(rng.choice(visible))
    if rng.random() < 0.5:
        name = _draw(rng, {k: v for k, v in _STRUCTURE_SHARES.items() if k not in visible})
    words = {"is": "are" if name.endswith("s") else "is", "name": name}
    return _pose(rng, "closed", "is visible", _yes_no(name in visible), **words)


def _ask_finding(
    rng: np.random.Generator, seen: Observation, prevalence: dict[str, float]
) -> Iterator[Posed]:
    """Nothing, or one question about a finding the image could show.

    The commoner answer is asked for less often, by the odds of the prevalence, so that yes and no
    are equally frequent for every finding on its own: no answer can be guessed from the words.
    """
    targets = TARGETS[seen.modality]
    possible = {
        name: share
        for name, share in prevalence.items()
        if not targets[name].needs or any(organ in seen.shares for organ in targets[name].needs)
    }
    if not possible:
        return
    name = _draw(rng, possible)
    odds = prevalence[name] / (1 - prevalence[name])
    present = name in seen.shares
    # A rare finding is always asked for when it is there (1 / odds is above 1), and seldom if not.
    if rng.random() < (1 / odds if present else odds):
        yield _pose(rng, "closed", "is finding", _yes_no(present), a=_article(name))


def _where(modality: str, side: str) -> str:
    """Place in words; the frame is named because the patient's left is not the image's."""
    if modality in PATIENT_FRAME:
        return f"on the patient's {side} side"
    return f"on the {side} side of the image"


def _open(rng: np.random.Generator, seen: Observation) -> Posed:
    """One of the open questions that have a single right answer here."""
    pairs = [_pose(rng, "open", "modality", seen.modality)]
    findings = _findings(seen)
    # With two findings, "what is the finding?" has no single answer.
    if len(findings) < 2:
        pairs.append(_pose(rng, "open", "finding", findings[0] if findings else NO_FINDING))
    for name in findings:
        if seen.sides[name] and seen.modality in PATIENT_FRAME:
            pairs.append(_pose(rng, "open", "side", str(seen.sides[name]), name=name))
    ordered = sorted(_structures(seen), key=lambda name: -seen.shares[name])
    # Of two structures nearly as large the eye cannot tell the larger one.
    if len(ordered) > 1 and seen.shares[ordered[0]] > 1.15 * seen.shares[ordered[1]]:
        pairs.append(_pose(rng, "open", "largest", ordered[0]))
    return pairs[int(rng.integers(len(pairs)))]


def _choice(rng: np.random.Generator, seen: Observation) -> Posed:
    """A question with four options, one of them right."""
    findings, structures = _findings(seen), _structures(seen)
    tasks = (
        ["modality"] + ["finding"] * (len(findings) < 2) + ["which structure"] * bool(structures)
    )
    task = str(rng.choice(tasks))
    if task == "modality":
        answer, others = seen.modality, list(AVAILABILITY)
    elif task == "finding":
        answer = findings[0] if findings else NO_FINDING
        others = [NO_FINDING, *(n for m in TARGETS for n in TARGETS[m] if is_finding(m, n))]
    else:
        answer, others = str(rng.choice(structures)), list(_STRUCTURE_SHARES)
    # Nothing that the image shows may be a wrong option, or two options were right.
    wrong = [name for name in others if name != answer and name not in seen.shares]
    options = [answer, *(str(name) for name in rng.choice(wrong, 3, replace=False))]
    options = [options[index] for index in rng.permutation(4)]
    return _pose(rng, "choice", task, answer, options)


def report(seen: Observation) -> str:
    """Two sentences: what is shown; which findings, how large, where."""
    structures = _structures(seen)
    shown = f" showing the {_listed(structures)}" if structures else ""
    findings = []
    for name in _findings(seen):
        share, side = seen.shares[name], seen.sides[name]
        size = "small" if share < SMALL_SHARE else "medium" if share < LARGE_SHARE else "large"
        findings.append(f"a {size} {name}" + (f" {_where(seen.modality, side)}" if side else ""))
    verdict = f"there is {_listed(findings)}." if findings else "no finding is seen."
    return f"{seen.modality} of the {ANATOMY[seen.modality]}{shown}. {verdict}"


def _listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)

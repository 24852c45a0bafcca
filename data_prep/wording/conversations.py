"""Words of the language records: how a question is asked, what its options are, what "yes" is.

    draw = draw_for("ham10000/ISIC_0024306")
    turns = choice_turns(draw.choice(DIAGNOSIS_QUESTIONS), DIAGNOSES.values(), "melanoma", draw)

Every converter writes its turns through these functions, so that an answer has one spelling in all
datasets. Wordings are drawn by the record's own id: a second run, another number of workers or
another order of the images changes nothing.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from biascare.records import Turn

IMAGE_PLACEHOLDER = "<image>"
"""Where LLaVA-style conversations put the image. The chat template does that, and a control token
inside a text is refused by the loader."""

UNSTATED = ("NULL", "None", "nan")
"""How releases write that a field is empty."""

DIAGNOSES = {
    "akiec": "actinic keratosis or intraepithelial carcinoma",
    "bcc": "basal cell carcinoma",
    "bkl": "benign keratosis",
    "df": "dermatofibroma",
    "mel": "melanoma",
    "nv": "melanocytic nevus",
    "vasc": "vascular lesion",
}
"""Code of HAM10000 and of ISIC 2018 task 3 (there in capitals) -> diagnosis."""

MALIGNANT = ("akiec", "bcc", "mel")
"""Codes counted as malignant. Actinic keratosis is a precursor, intraepithelial carcinoma a
carcinoma in situ; the release does not separate them, and the usual reading is malignant."""

DIAGNOSIS_QUESTIONS = (
    "What is the diagnosis of this skin lesion?",
    "Which diagnosis fits this dermoscopic image best?",
    "Choose the most likely diagnosis of the lesion.",
)
MALIGNANCY_QUESTIONS = (
    "Is this skin lesion malignant?",
    "Is the lesion in this image malignant?",
    "Does this dermoscopic image show a malignant lesion?",
)
LOCALIZATION_QUESTIONS = (
    "Where on the body is this skin lesion?",
    "Which body site was photographed?",
)
FINDING_QUESTIONS = (
    "Which findings does this chest X-ray show?",
    "List the abnormal findings of this chest X-ray.",
    "What is abnormal in this chest radiograph?",
)
REPORT_QUESTIONS = (
    "Write the radiology report of this chest X-ray: findings and impression.",
    "Please report this chest radiograph.",
    "Describe the findings of this chest X-ray and give your impression.",
    "Dictate a report for this radiograph.",
)
GLAUCOMA_CHOICES = (
    "How would you grade this eye?",
    "Which diagnosis fits this fundus photograph?",
    "Choose the ophthalmologist's diagnosis of this eye.",
)
GLAUCOMA_QUESTIONS = (
    "Does this eye have glaucoma?",
    "Is there glaucoma in this fundus photograph?",
    "Does this retinal image show glaucoma?",
)


class Question(NamedTuple):
    """One question about one image, as a release asks it."""

    text: str
    answer: str  # of a choice: one of the options, word for word
    kind: str  # closed | open | choice | report
    options: tuple[str, ...] = ()


class Asked(NamedTuple):
    """One row of a release: a question, or the reason why it is none."""

    image: str  # the key its image is known by
    name: str  # of the row, for the ledger
    question: Question | None
    reason: str  # empty when there is a question
    facts: dict[str, str]  # what the release says of this question; keys of the vocabulary's FACTS


class ImageQuestions(NamedTuple):
    """All questions about one image, in the order of the release."""

    image: str
    questions: tuple[Question, ...]
    facts: tuple[dict[str, str], ...]  # parallel to questions


class Refused(NamedTuple):
    """A row that cannot be used. It is an item like any other, so that the ledger counts it."""

    name: str
    reason: str


class Gathered(NamedTuple):
    """What one split of a release holds."""

    items: list[ImageQuestions | Refused]
    num_questions: int
    num_repeated: int  # the same question with the same answer about the same image


def one_line(text: str) -> str:
    """Text without line breaks, repeated blanks, and placeholders of the image."""
    return " ".join(text.replace(IMAGE_PLACEHOLDER, " ").split())


def pair(question: str, answer: str, kind: str) -> list[Turn]:
    """A question of the user and the assistant's answer."""
    return turns_of([Question(question, answer, kind)])


def draw_for(record_id: str) -> random.Random:
    """The random numbers that belong to one record; the same for the same id, anywhere."""
    # Python's own generator, whose sequence for a seed does not change between versions of numpy.
    return random.Random(int.from_bytes(_digest(record_id)[:8], "big"))


def drawn_split(key: str, shares: Mapping[str, float], rest: str = "train") -> str:
    """The split a key falls into, by its own hash and nothing else.

    `shares` are those of the held-out splits, {"test": 0.2, "val": 0.1}; what remains is `rest`. A
    key keeps its split when the release grows, shrinks or is prepared in parts; the realised shares
    are binomial around the stated ones. Raises ValueError when they are no shares.
    """
    if not (all(share >= 0 for share in shares.values()) and sum(shares.values()) <= 1):
        raise ValueError(f"held-out shares are numbers from 0 with a sum up to 1, got {shares}")
    # Another hash than that of wordings, or the split would tell how its questions are worded.
    position = int.from_bytes(_digest(f"split: {key}")[:8], "big") / 2**64
    for split, share in shares.items():
        if position < share:
            return split
        position -= share
    return rest


def closed_answer(answer: str) -> str | None:
    """ "Yes", "NO." -> "yes", "no"; None for anything that is not a plain yes or no."""
    # Nothing more is stripped: "no, it is normal" is an answer with a reason, and stays open.
    word = one_line(answer).lower().rstrip(".!")
    return word if word in ("yes", "no") else None


def question_of(text: str, answer: str, kind: str | None = None) -> Question:
    """A question of a release in canonical form.

    `kind` is "closed" or "open" as the release says it; None derives it: closed means a yes or a
    no. Whatever the kind, a plain yes or no of a closed question is written "yes" or "no"; other
    answers keep their words.

    Raises ValueError when question or answer is empty, or the kind is another word.
    """
    text, answer = one_line(text), one_line(answer)
    # After the placeholders are gone: "<image>" alone is no question.
    if not (text and answer):
        raise ValueError("question or answer is empty")
    canonical = closed_answer(answer)
    if kind is None:
        kind = "open" if canonical is None else "closed"
    kind = kind.strip().lower()
    if kind not in ("closed", "open"):
        raise ValueError(f"question of unknown type {kind!r}")
    # A release calls "left or right?" closed as well; its answer keeps its words.
    if kind == "closed" and canonical is not None:
        answer = canonical
    return Question(text=text, answer=answer, kind=kind)


def asked(
    image: str, name: str, text: str, answer: str, kind: str | None = None, **facts: Any
) -> Asked:
    """A row of a release; what `question_of` refuses becomes the reason."""
    # Also of a row that is refused: the ledger can then name it.
    stated = facts_of(**facts)
    try:
        return Asked(image, name, question_of(text, answer, kind), "", stated)
    except ValueError as error:
        return Asked(image, name, None, str(error), stated)


def facts_of(**stated: Any) -> dict[str, str]:
    """What a release says of a question, in its own words; what it leaves open is left out. Several
    words are joined by commas."""
    facts = {
        key: one_line(", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for key, value in stated.items()
        # A fact that says "not known" in words would be counted as an answer type of its own.
        if value is not None
    }
    return {key: text for key, text in facts.items() if text and text not in UNSTATED}


def gather(
    rows: Iterable[Asked],
    seen: Iterable[tuple[str, Question]] = (),
    *,
    keep_repeated: bool = False,
) -> Gathered:
    """Rows of one split -> one item per image, in order of first appearance.

    A repeated question, and one of `seen` (the questions of another split), is counted, and left
    out unless `keep_repeated`: a benchmark is its official rows, and a score on fewer of them is
    the score of another one.
    """
    images: dict[str, list[Asked]] = {}
    refused: list[Refused] = []
    known = set(seen)
    num_repeated = 0
    for row in rows:
        if row.question is None:
            refused.append(Refused(row.name, row.reason))
        # The answer is part of the question here: two answers to one question are both kept, and
        # the linter tells of them.
        else:
            repeated = (row.image, row.question) in known
            num_repeated += repeated
            if keep_repeated or not repeated:
                known.add((row.image, row.question))
                images.setdefault(row.image, []).append(row)
    items = [
        ImageQuestions(
            image=image,
            questions=tuple(row.question for row in rows if row.question is not None),
            facts=tuple(row.facts for row in rows),
        )
        for image, rows in images.items()
    ]
    num_questions = sum(len(rows) for rows in images.values())
    return Gathered([*items, *refused], num_questions, num_repeated)


def questions_of(gathered: Gathered) -> set[tuple[str, Question]]:
    """(image, question) of all items: what another split must not repeat."""
    return {
        (item.image, question)
        for item in gathered.items
        if isinstance(item, ImageQuestions)
        for question in item.questions
    }


def name_of(item: ImageQuestions | Refused) -> str:
    """How an item is named in the ledger."""
    return item.image if isinstance(item, ImageQuestions) else item.name


def choice_of(question: str, options: Sequence[str], right: int) -> Question:
    """A question with its options, of which the one at position `right` is the answer. Raises
    ValueError when another option reads the same: an answer must mean one of them."""
    # Other options may repeat one another, as some releases do: the answer still means one.
    if options.count(options[right]) > 1:
        raise ValueError("several choices have the text of the answer")
    return Question(question, options[right], "choice", tuple(options))


def choice_turns(
    question: str, options: Iterable[str], answer: str, draw: random.Random
) -> list[Turn]:
    """A multiple-choice question with its options in drawn order, so that the position of the right
    one says nothing."""
    options = list(options)
    # `sample` and not `shuffle`, which would change the caller's list.
    shuffled = draw.sample(options, len(options))
    return turns_of([choice_of(question, shuffled, shuffled.index(answer))])


def turns_of(questions: Sequence[Question], facts: Sequence[Mapping[str, str]] = ()) -> list[Turn]:
    """Questions in their order -> alternating turns. `facts`, when given, run parallel."""
    turns = []
    for asked, stated in zip(questions, facts or [{}] * len(questions), strict=True):
        turns += [
            Turn("user", asked.text, asked.kind, asked.options, stated),
            Turn("assistant", asked.answer, asked.kind),
        ]
    return turns


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8")).digest()

"""Answer cases to numbers.

    is_correct("B: CT", case)
    table = summarise_answers(cases)

Answers are compared as whole texts, never by what they contain: "no mass" contains "mass". Answers
from a closed set are read by stated rules (`read_closed`); what they do not read is wrong and
counted, never a nearest or a random option.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from string import ascii_lowercase
from typing import Any

import numpy as np
from sklearn.metrics import precision_recall_fscore_support

from biascare.evaluation.cases import AnswerCase, Variant
from biascare.evaluation.metrics.bootstrap import NUM_DRAWS
from biascare.evaluation.metrics.calibration import calibration_errors, excess_ece, ranking
from biascare.evaluation.metrics.variants import blind_table, counterfactual_table


def normalise_answer(text: str) -> str:
    """Lower case, single spaces, no full stop or quotes at the ends; the inside stays readable.

    "T2-weighted" and "3.5" keep their characters: removing all punctuation would merge them with
    other answers.
    """
    return re.sub(r"\s+", " ", text.lower()).strip(" \"'.!?")


def read_choice(text: str, options: Sequence[str]) -> str | None:
    """Which of the lettered options a text chooses: by its letter, else by the whole option.

    The letter ends the text or is followed by a mark: "a mass" is no choice of option A. None for
    anything else.
    """
    text = normalise_answer(text)
    # Only a letter alone or with a mark: "a mass" must not choose option A.
    lettered = re.match(r"\(?([a-z])(?:[:.)]\s*.*)?$", text)
    if lettered:
        place = ascii_lowercase.index(lettered.group(1))
        return options[place] if place < len(options) else None
    return next((option for option in options if normalise_answer(option) == text), None)


def read_choice_leniently(text: str, options: Sequence[str]) -> str | None:
    """The only option that a text names, by letter ("B: MR", "the answer is B") or by its words as
    in `read_closed`; None where a letter and the words name different ones."""
    plain = normalise_answer(text)
    letter = re.match(r"\(?([a-z])(?:[:.)](.*))?$", plain, re.DOTALL)
    letter = letter or re.search(
        r"\b(?:answer|option|choice)(?: is)?:? \(?([a-z])(?:[:.)](.*))?$", plain
    )
    if letter is None:
        return read_closed(text, options, "lenient")
    place, after = ascii_lowercase.index(letter[1]), (letter[2] or "")
    named = {option for _, _, option in _mentions(words(after), options)}
    if place >= len(options) or named - {options[place]}:
        return None
    return options[place]


WORD = re.compile(r"[^\W_]+(?:[-./'][^\W_]+)*")
"""A word: "T2-weighted" and "3.5" stay whole."""

NEGATIONS = ("no", "not", "non", "without", "neither", "nor", "never")

JOINTS = ("and", "or", "nor")


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return WORD.findall(text.lower())


def read_closed(text: str, options: Sequence[str], reading: str = "strict") -> str | None:
    """Which option an answer to a closed question names; None where it names none or several.

    "strict": the option that the text begins with, as whole words ("Yes, there is a nodule" is
    yes, "unknown" is not no); "yes or no" is neither. "lenient": the only option mentioned
    anywhere, unless a negation stands before it: "not normal" does not say normal.
    """
    if reading not in ("strict", "lenient"):
        raise ValueError(f"reading: got {reading!r}, expected 'strict' or 'lenient'")
    said = words(text)
    found = _mentions(said, options)
    if reading == "strict":
        first = next(iter(found), None)
        if first is None or first[0] != 0:
            return None
        _, end, option = first
        joined = [
            other for start, _, other in found[1:] if said[end:start] in ([j] for j in JOINTS)
        ]
        return None if any(other != option for other in joined) else option
    named = {
        option
        for start, _, option in found
        if start == 0 or said[start - 1] not in NEGATIONS or said[start - 1] == option.lower()
    }
    return named.pop() if len(named) == 1 else None


def _mentions(said: list[str], options: Sequence[str]) -> list[tuple[int, int, str]]:
    """(first word, word after it, option) of what a text names, the longest option first: "right
    lung" is no mention of the option "lung"."""
    spelt = sorted(((words(option), option) for option in options), key=lambda o: -len(o[0]))
    found, place = [], 0
    while place < len(said):
        here = [o for o in spelt if o[0] and said[place : place + len(o[0])] == o[0]]
        if here:
            found.append((place, place + len(here[0][0]), here[0][1]))
        place += len(here[0][0]) if here else 1
    return found


def open_recall(prediction: str, reference: str) -> float:
    """Share of the reference's words that the prediction holds, each as often as it is there.

    An empty reference is recalled by an empty prediction alone.
    """
    said, wanted = Counter(words(prediction)), Counter(words(reference))
    if not wanted:
        return float(not said)
    return (said & wanted).total() / wanted.total()


def recall_llava(prediction: str, reference: str) -> float:
    """Recall as LLaVA-Med's evaluation counts it: a shared word counts as often as the prediction
    repeats it, so that repeating raises the score. For comparison with published numbers alone."""
    said, wanted = Counter(prediction.lower().split()), Counter(reference.lower().split())
    hits = sum(num for word, num in said.items() if word in wanted)
    missed = sum(num for word, num in wanted.items() if word not in said)
    return hits / (hits + missed) if hits + missed else 0.0


def is_correct(text: str, case: AnswerCase) -> bool:
    """Whether a text answers a case: by choice where options were shown, else as a whole."""
    # Only a choice was asked with letters; "A" to an open question is just a wrong word.
    if case.facts.kind == "choice" and case.options:
        return read_choice(text, case.options) == case.reference
    return normalise_answer(text) == normalise_answer(case.reference)


def likeliest(case: AnswerCase, answered: AnswerCase | Variant | None = None) -> str | None:
    """The option of highest log-probability, of the case or of a variant of it; None where none was
    scored."""
    log_probs = (answered or case).option_log_probs
    if log_probs is None:
        return None
    return max(zip(log_probs, case.options, strict=True))[1]


def chosen_answer(case: AnswerCase, answered: AnswerCase | Variant) -> str:
    """What counts as one answer: the likeliest option where options were scored, else the text."""
    return normalise_answer(likeliest(case, answered) or answered.text)


def option_is_correct(
    case: AnswerCase, answered: AnswerCase | Variant | None = None
) -> bool | None:
    """Whether the likeliest option, of the case or of a variant of it, is the reference; None where
    none was scored."""
    option = likeliest(case, answered)
    return None if option is None else normalise_answer(option) == normalise_answer(case.reference)


def summarise_answers(cases: Sequence[AnswerCase]) -> dict[str, Any]:
    """Accuracy by kind and by modality, beside what constant answers would get.

    `best_constant` answers every question of a source with the answer most frequent among its very
    references, an upper bound for any constant; `always_yes` is given for closed questions;
    `accuracy_by_option` takes the likeliest option instead of the text, where options were scored.
    """
    by_kind = _split(cases, lambda case: case.facts.kind)
    return {kind: _accuracy_table(mine) for kind, mine in sorted(by_kind.items())}


def _accuracy_table(cases: Sequence[AnswerCase]) -> dict[str, Any]:
    table: dict[str, Any] = {
        "num": len(cases),
        "accuracy": _share(is_correct(case.text, case) for case in cases),
        "best_constant": best_constant(cases),
        "by_modality": {
            name: {
                "num": len(mine),
                "accuracy": _share(is_correct(case.text, case) for case in mine),
            }
            for name, mine in sorted(_split(cases, lambda case: case.facts.modality).items())
        },
    }
    # Its own number: questions without options would silently change what the accuracy is of.
    scored = [case for case in cases if case.option_log_probs is not None]
    if scored:
        table["num_scored"] = len(scored)
        table["accuracy_by_option"] = _share(bool(option_is_correct(case)) for case in scored)
    table["calibration"] = _calibration_table(cases)
    if cases[0].facts.kind == "open":
        table["recall"] = float(np.mean([open_recall(c.text, c.reference) for c in cases]))
    table |= asked_otherwise(cases)
    if cases[0].facts.kind == "choice":
        table["readings"] = choice_readings_table(cases)
    if cases[0].facts.kind == "closed":
        table["readings"] = readings_table(cases)
        # Beside the best constant, which may be "no": to agree with every question is a failure of
        # its own.
        table["always_yes"] = _share(normalise_answer(case.reference) == "yes" for case in cases)
    return table


def best_constant(cases: Sequence[AnswerCase]) -> float:
    """Accuracy of the answer most frequent among the references of each source."""
    # Per source, because sources ask about different things: one constant for all of them would be
    # a weaker opponent than what a model can learn from the source alone.
    most = (
        max(Counter(normalise_answer(case.reference) for case in mine).values())
        for mine in _split(cases, lambda case: case.facts.source).values()
    )
    return sum(most) / len(cases)


def asked_otherwise(
    cases: Sequence[AnswerCase], num_draws: int = NUM_DRAWS, seed: int = 0
) -> dict[str, Any]:
    """`blind` and `counterfactual` of cases of one kind, each where there are such variants."""
    measures: dict[str, Callable[[AnswerCase, AnswerCase | Variant], float]] = {
        "text": lambda case, answered: float(is_correct(answered.text, case)),
        "option": _option_score,
    }
    if cases[0].facts.kind == "open":
        measures["recall"] = lambda case, answered: open_recall(answered.text, case.reference)
    tables = {
        "blind": blind_table(cases, measures, num_draws, seed),
        "counterfactual": counterfactual_table(cases, chosen_answer, num_draws, seed),
    }
    return {name: table for name, table in tables.items() if table}


def _option_score(case: AnswerCase, answered: AnswerCase | Variant) -> float:
    right = option_is_correct(case, answered)
    return math.nan if right is None else float(right)


CLOSED = ("yes", "no")
"""Labels of the macro scores of closed questions: fixed, or an answer that cannot be read would
become a third class of its own."""


def readings_table(cases: Sequence[AnswerCase]) -> dict[str, Any]:
    """Closed questions whose reference is yes or no, by each reading."""
    mine = [case for case in cases if normalise_answer(case.reference) in CLOSED]
    wanted = [normalise_answer(case.reference) for case in mine]
    read: dict[str, list[str | None]] = {
        reading: [read_closed(case.text, CLOSED, reading) for case in mine]
        for reading in ("strict", "lenient")
    }
    if mine and all(case.option_log_probs is not None for case in mine):
        read["option"] = [normalise_answer(likeliest(case) or "") for case in mine]
    table: dict[str, Any] = {"num": len(mine)}
    for reading, said in read.items() if mine else ():
        scores = precision_recall_fscore_support(
            wanted,
            [answer or "unread" for answer in said],
            labels=CLOSED,
            average="macro",
            zero_division=0,
        )
        table[reading] = {
            "accuracy": _share(a == w for a, w in zip(said, wanted, strict=True)),
            "num_unread": sum(answer is None for answer in said),
            **dict(
                zip(
                    ("macro_precision", "macro_recall", "macro_f1"),
                    map(float, scores[:3]),
                    strict=True,
                )
            ),
        }
    return table


def choice_readings_table(cases: Sequence[AnswerCase]) -> dict[str, Any]:
    """Choices by each reading; no macro scores, because options differ between questions."""
    shown = [case for case in cases if case.options]
    read: dict[str, list[str | None]] = {
        "strict": [read_choice(case.text, case.options) for case in shown],
        "lenient": [read_choice_leniently(case.text, case.options) for case in shown],
    }
    if shown and all(case.option_log_probs is not None for case in shown):
        read["option"] = [likeliest(case) for case in shown]
    table: dict[str, Any] = {"num": len(shown)}
    for reading, said in read.items() if shown else ():
        table[reading] = {
            "accuracy": _share(a == c.reference for a, c in zip(said, shown, strict=True)),
            "num_unread": sum(answer is None for answer in said),
        }
    return table


def option_confidence(case: AnswerCase) -> float | None:
    """Probability of the likeliest option among the options; None where none was scored."""
    if case.option_log_probs is None:
        return None
    return 1 / sum(math.exp(p - max(case.option_log_probs)) for p in case.option_log_probs)


def text_confidence(case: AnswerCase) -> float | None:
    """Geometric mean of the probabilities of the generated tokens; None for an empty answer."""
    if not case.token_log_probs:
        return None
    return min(1.0, math.exp(sum(case.token_log_probs) / len(case.token_log_probs)))


def _calibration_table(cases: Sequence[AnswerCase]) -> dict[str, Any]:
    """Both confidences against being right, each with its null; `num_missing` had none."""
    answers: dict[str, Callable[[AnswerCase], tuple[float | None, bool]]] = {
        "option": lambda case: (
            option_confidence(case),
            bool(option_is_correct(case)),
        ),
        "text": lambda case: (text_confidence(case), is_correct(case.text, case)),
    }
    table = {}
    for name, judged in answers.items():
        pairs = [judged(case) for case in cases]
        stated = [(confidence, right) for confidence, right in pairs if confidence is not None]
        if not stated:
            continue
        confidence, right = zip(*stated, strict=True)
        table[name] = {
            **calibration_errors(confidence, right)._asdict(),
            **excess_ece(confidence, right)._asdict(),
            **ranking(confidence, right),
            "num_missing": len(pairs) - len(stated),
        }
    return table


def _split(
    cases: Iterable[AnswerCase], key: Callable[[AnswerCase], str]
) -> dict[str, list[AnswerCase]]:
    parts: dict[str, list[AnswerCase]] = defaultdict(list)
    for case in cases:
        parts[key(case)].append(case)
    return parts


def _share(values: Iterable[bool]) -> float:
    found = list(values)
    return sum(found) / len(found)

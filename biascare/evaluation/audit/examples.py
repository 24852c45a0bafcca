"""Which cases a person should look at: the worst masks, and the wrong answers that were surest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from biascare.data.prevalence import PREVALENCE_GROUPS
from biascare.evaluation.audit.rows import AuditTable, true_share
from biascare.evaluation.audit.tables import Row
from biascare.evaluation.cases import AnswerCase, FinishedCase, MaskCase
from biascare.evaluation.metrics.answers import likeliest

NUM_EXAMPLES = 10
PER_TARGET = 2
"""Examples of one target, or of one kind of question: a frequent one must not fill the list."""


def worst_masks(table: AuditTable) -> list[tuple[MaskCase, Row]]:
    """The lowest Dice; among equals tail targets first, then small masks."""
    rare_first = {name: -place for place, name in enumerate((*PREVALENCE_GROUPS, "unseen"))}
    order = []
    for case, dice in zip(table.cases, table.metrics["dice"].tolist(), strict=True):
        assert isinstance(case, MaskCase)
        rarity = rare_first.get(case.facts.prevalence or "", 1)
        order.append(((round(dice, 2), rarity, true_share(case), case.id), case, dice))
    order.sort(key=lambda entry: entry[0])
    picked = _at_most(((case, dice) for _, case, dice in order), lambda c: c.facts.target)
    return [(case, _mask_row(case, dice)) for case, dice in picked if isinstance(case, MaskCase)]


def _mask_row(case: MaskCase, dice: float) -> Row:
    share = true_share(case)
    return _about(case) | {
        "target": case.facts.target,
        "prevalence": case.facts.prevalence,
        "dice": dice,
        "predicted_dice": _finite(case.predictions[0].predicted_dice),
        "true_pixels": round(share * case.height * case.width),
        "share_of_image": share,
    }


def surest_errors(table: AuditTable) -> list[Row]:
    """Wrong answers of the highest confidence: the likeliest option where options were scored, else
    the text. A confidence is of what it stands beside: an option may be right and the text not."""
    option, option_right = table.confidences["confidence of the option"]
    text, text_right = table.confidences["confidence of the text"]
    order = []
    for i, case in enumerate(table.cases):
        scored = not np.isnan(option[i])
        stated, right = (option[i], option_right[i]) if scored else (text[i], text_right[i])
        if right == 0 and not np.isnan(stated):
            order.append((-float(stated), case.id, case))
    order.sort(key=lambda entry: entry[:2])
    rows = []
    for case, stated in _at_most(
        ((case, -minus) for minus, _, case in order),
        lambda c: (c.facts.modality, c.facts.kind),
    ):
        assert isinstance(case, AnswerCase)
        rows.append(
            _about(case)
            | {
                "kind": case.facts.kind,
                "question": case.question,
                "answered": likeliest(case) or case.text,
                "reference": case.reference,
                "confidence": stated,
            }
        )
    return rows


def _at_most(
    ordered: Iterable[tuple[FinishedCase, float]], kind: Callable[[Any], Any]
) -> list[tuple[FinishedCase, float]]:
    seen: Counter[Any] = Counter()
    picked = []
    for case, value in ordered:
        seen[kind(case)] += 1
        if seen[kind(case)] <= PER_TARGET:
            picked.append((case, value))
        if len(picked) == NUM_EXAMPLES:
            break
    return picked


def _about(case: FinishedCase) -> Row:
    facts = case.facts
    return {
        "source": facts.source,
        "split": facts.split,
        "id": case.id,
        "modality": facts.modality,
        "sex": facts.sex,
        "age": facts.age,
        "race": facts.race,
    }


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None

"""A reader study whose effects are known: label cases and the answers of readers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from biascare.evaluation.cases import CaseWriter, Header, LabelCase
from biascare.evaluation.reader_log import WITH, WITHOUT, ReaderAnswer
from tests.tiny import tiny_facts

CATEGORIES = ("melanoma", "nevus", "keratosis")


def planted_cases(
    num: int = 120,
    seed: int = 0,
    categories: Sequence[str] = CATEGORIES,
    images_per_patient: int = 1,
    right: float = 0.85,
) -> list[LabelCase]:
    """One category each; the model is right in a share `right`."""
    rng = np.random.default_rng(seed)
    cases = []
    for number in range(num):
        truth = int(rng.integers(len(categories)))
        said = truth if rng.random() < right else int((truth + 1) % len(categories))
        share = np.where(np.arange(len(categories)) == said, 0.8, 0.2 / (len(categories) - 1))
        facts = tiny_facts(
            f"img_{number}",
            patient_id=f"p{number // images_per_patient}",
            anatomy="skin",
            sex="F" if number % 2 else "M",
            age=float(rng.integers(20, 90)),
        )
        cases.append(
            LabelCase(
                id=f"img_{number}",
                facts=facts,
                labels=list(categories),
                probabilities=share.tolist(),
                present=[k == truth for k in range(len(categories))],
                exclusive=True,
                seconds=0.1,
            )
        )
    return cases


def planted_answers(
    cases: Sequence[LabelCase],
    skill: dict[str, tuple[float, float]],
    seed: int = 0,
) -> list[ReaderAnswer]:
    """`skill`: reader -> share right without, and share of the cases in which the reader takes what
    the model says instead."""
    rng = np.random.default_rng(seed)
    answers = []
    for reader, (right, follows) in skill.items():
        for case in cases:
            names = case.labels
            truth = names[case.present.index(True)]
            said = names[int(np.argmax(case.probabilities))]
            others = [name for name in names if name != truth]
            own = truth if rng.random() < right else str(rng.choice(others))
            changed = said if rng.random() < follows else own
            sure = float(np.round(rng.uniform(0.55, 1.0), 2))
            shared = {"reader": reader, "case": case.id, "confidence": sure}
            answers.append(
                ReaderAnswer(round=WITHOUT, choices=[own], seconds=float(rng.gamma(4, 3)), **shared)
            )
            answers.append(
                ReaderAnswer(
                    round=WITH,
                    choices=[changed],
                    seconds=float(rng.gamma(4, 2)),
                    suggestion=[said],
                    suggestion_confidence=0.8,
                    **shared,
                )
            )
    return answers


def write_cases(path: Path, cases: Sequence[LabelCase]) -> Path:
    header = Header(
        model="tiny",
        weights="0",
        commit="0",
        data=[],
        settings={},
        beta_vl=0.5,
        prevalence={},
        disc_share=None,
        disc_share_by_target={},
    )
    with CaseWriter(path, header) as writer:
        writer.append(cases)
    return path


def write_log(path: Path, answers: Sequence[ReaderAnswer]) -> Path:
    lines = [json.dumps(dataclasses.asdict(answer)) for answer in answers]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path

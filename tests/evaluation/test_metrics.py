"""From finished cases to numbers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biascare.evaluation.cases import AnswerCase, Header, MaskCase, MaskPrediction
from biascare.evaluation.metrics.answers import (
    is_correct,
    likeliest,
    normalise_answer,
    read_choice,
    summarise_answers,
)
from biascare.evaluation.metrics.segmentation import (
    DISC_SHARES,
    dice_score,
    disc,
    failure_auroc,
    fit_disc,
    mean_by,
    summarise_segmentation,
)
from biascare.records import encode_mask
from tests.tiny import HEIGHT, WIDTH, tiny_facts


def test_the_disc_baseline_takes_the_size_that_scores_best_in_training() -> None:
    share = DISC_SHARES[6]
    truth = disc(64, 64, (30, 30), share * 64 * 64)
    fitted = fit_disc([("liver", truth, (30.0, 30.0))] * 3 + [("cyst", truth[::-1], (30.0, 33.0))])
    assert fitted is not None and fitted.share == share
    assert fitted.by_target == pytest.approx({"liver": truth.mean(), "cyst": truth.mean()})
    assert fit_disc([]) is None


def test_dice_of_empty_masks() -> None:
    empty, full = np.zeros((2, 2), bool), np.ones((2, 2), bool)
    assert dice_score(empty, empty) == 1.0
    assert dice_score(empty, full) == dice_score(full, empty) == 0.0
    assert dice_score(full, full) == 1.0


def test_dice_by_hand() -> None:
    prediction = np.array([[1, 1, 0], [0, 0, 0]], np.uint8)
    truth = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    assert dice_score(prediction, truth) == 2 * 1 / (2 + 3)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**12 - 1), st.integers(0, 2**12 - 1))
def test_dice_is_symmetric_bounded_and_one_only_for_equal_masks(a: int, b: int) -> None:
    first, second = (np.array([[m >> k & 1 for k in range(12)]], bool) for m in (a, b))
    score = dice_score(first, second)
    assert score == dice_score(second, first) and 0 <= score <= 1
    assert (score == 1) == (a == b)


def test_a_disc_has_the_area_it_was_asked_for() -> None:
    area = 400.0
    drawn = disc(HEIGHT, WIDTH, (36, 24), area)
    assert drawn.shape == (HEIGHT, WIDTH) and drawn[24, 36]
    assert abs(int(drawn.sum()) - area) < 0.05 * area


HEADER = Header(
    model="",
    weights="",
    commit="",
    data=[],
    settings={},
    beta_vl=0.5,
    prevalence={},
    disc_share=None,
    disc_share_by_target={},
)


def code(num: int) -> str:
    """A mask of 1 x 20 pixels, the first `num` of them set."""
    return encode_mask(np.arange(20)[None] < num).decode()


def mask_case(num: int, target: str, prevalence: str, doubt: float, **known: Any) -> MaskCase:
    """A truth of 10 pixels, of which `num` were found: Dice 2 num / (num + 10)."""
    prediction = MaskPrediction(
        points=[(0.0, 0.0, 1)],
        box=None,
        mask=code(num),
        predicted_dice=0.5,
        uncertainty={"semantic": doubt},
    )
    return MaskCase(
        id=target,
        facts=tiny_facts("image", target=target, prevalence=prevalence, **known),
        height=1,
        width=20,
        instruction=None,
        truth=code(10),
        by_text=None,
        predictions=[prediction],
        seconds=0.0,
    )


CASES = [
    mask_case(10, "liver", "head", 0.1),  # Dice 1
    mask_case(6, "liver", "head", 0.4),  # 12 / 16
    mask_case(8, "liver", "head", 0.2),  # 16 / 18
    mask_case(2, "duct", "tail", 0.3),  # 4 / 12
]
DICE = [1, 12 / 16, 16 / 18, 4 / 12]


def test_a_summary_gives_the_means_computed_by_hand() -> None:
    summary = summarise_segmentation(CASES, HEADER)
    assert summary["num_masks"] == 4
    assert summary["dice"]["mean"] == pytest.approx(sum(DICE) / 4)
    liver = sum(DICE[:3]) / 3
    assert summary["dice"]["mean_over_targets"] == pytest.approx((liver + DICE[3]) / 2)
    assert summary["dice"]["by_prevalence"]["head"] == {"num": 3, "mean": pytest.approx(liver)}
    assert summary["dice"]["by_target"]["duct"] == {"num": 1, "mean": pytest.approx(DICE[3])}
    assert summary["semantic"]["mean"] == pytest.approx(0.25)
    # One failed mask, doubted more than two of the three good ones.
    assert summary["semantic"]["failure_auroc"] == pytest.approx(2 / 3)
    assert json.loads(json.dumps(summary)) == summary


def test_the_disc_stands_beside_the_model_where_its_size_is_known() -> None:
    header = Header(**(vars(HEADER) | {"disc_share": 0.05, "disc_share_by_target": {"liver": 0.5}}))
    summary = summarise_segmentation(CASES, header)
    # A disc of one pixel finds it, of ten around the first pixel two (radius 1.8).
    assert summary["dice_disc"]["mean"] == pytest.approx(2 / 11)
    by_target = summary["dice_disc_by_target"]["by_target"]
    assert by_target["liver"]["mean"] == pytest.approx(4 / 12)
    assert by_target["duct"]["mean"] == pytest.approx(2 / 11)  # of unknown size: the one for all


def test_unknown_attributes_form_a_group_of_their_own() -> None:
    table = mean_by(["F", "M", None, "F"], [0.9, 0.8, 0.7, 0.2])
    assert table["missing"] == {"num": 1, "mean": pytest.approx(0.7)}
    assert table["F"] == {"num": 2, "mean": pytest.approx(0.55)}


def test_failures_cannot_be_ranked_when_all_masks_are_good_or_there_are_none() -> None:
    assert failure_auroc(DICE[:3], [0.1, 0.4, 0.2]) is None
    assert summarise_segmentation([], HEADER) == {"num_masks": 0}


def answer_case(kind: str, reference: str, text: str, **known: Any) -> AnswerCase:
    stated: dict[str, Any] = {"options": [], "option_log_probs": None}
    facts = {name: known.pop(name) for name in ("modality", "source") if name in known}
    return AnswerCase(
        id="",
        facts=tiny_facts("image", task="language", kind=kind, **facts),
        question="",
        question_facts={},
        prompt="",
        text=text,
        token_log_probs=[],
        reference=reference,
        seconds=0.0,
        **(stated | known),
    )


@pytest.mark.parametrize(
    "kind, text, reference, correct",
    [
        ("closed", "Yes.", "yes", True),
        ("closed", "yes it is", "yes", False),
        ("closed", "", "no", False),
        ("open", "T2-weighted", "t2-weighted", True),
        ("open", "T2 weighted", "T2-weighted", False),
        ("open", "3.5", "3.5", True),
        ("open", "35", "3.5", False),
        ("open", "  The  liver\n", "the liver", True),
        ("open", "no mass", "mass", False),
        ("choice", "B: ct", "CT", True),
        ("choice", "B", "CT", True),
        ("choice", "(b) MR", "CT", True),
        ("choice", "A: MR", "CT", False),
        ("choice", "ct", "CT", True),
        ("choice", "mr", "CT", False),
        ("choice", "a mass", "MR", False),
        ("choice", "D: CT", "CT", False),
        ("choice", "", "MR", False),
    ],
)
def test_an_answer_is_right_when_it_says_the_reference(
    kind: str, text: str, reference: str, correct: bool
) -> None:
    options = ["MR", "CT", "PET"] if kind == "choice" else []
    case = answer_case(kind, reference, text, options=options)
    assert is_correct(text, case) is correct


def test_a_choice_is_read_by_letter_or_as_the_whole_option_and_else_not_at_all() -> None:
    options = ["liver", "no lesion"]
    assert read_choice("B) whatever", options) == "no lesion"
    assert read_choice("No lesion.", options) == "no lesion"
    assert read_choice("lesion", options) is None
    assert read_choice("z", options) is None


@settings(deadline=None, max_examples=30)
@given(st.text(max_size=20))
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    once = normalise_answer(text)
    assert normalise_answer(once) == once


def test_accuracy_stands_beside_what_constants_would_get() -> None:
    cases = [
        answer_case("closed", "Yes", "yes"),
        answer_case("closed", "yes.", "no"),
        answer_case("closed", "no", "no", modality="MR"),
        answer_case("closed", "no", "No"),
        answer_case("closed", "no", "yes"),
        answer_case("open", "liver", "spleen"),
    ]
    table = summarise_answers(cases)
    assert list(table) == ["closed", "open"]
    closed = table["closed"]
    assert (closed["num"], closed["accuracy"]) == (5, pytest.approx(3 / 5))
    assert closed["best_constant"] == pytest.approx(3 / 5)
    assert closed["always_yes"] == pytest.approx(2 / 5)
    assert closed["by_modality"]["MR"] == {"num": 1, "accuracy": 1.0}
    assert "always_yes" not in table["open"] and "accuracy_by_option" not in closed
    assert summarise_answers([]) == {}


def test_the_best_constant_is_the_commonest_option_of_each_source() -> None:
    """Not the best letter: options stand in drawn order, a letter means nothing."""
    cases = [
        answer_case("choice", reference, "A", source=source, options=["nevus", "melanoma"])
        for source, reference in (
            *(("one", "nevus"),) * 2,
            ("one", "melanoma"),
            *(("other", "melanoma"),) * 3,
        )
    ]
    assert summarise_answers(cases)["choice"]["best_constant"] == pytest.approx(5 / 6)


def test_options_are_also_judged_by_their_likelihood() -> None:
    cases = [
        answer_case("closed", "no", "yes", options=["yes", "no"], option_log_probs=[-2.0, -0.5]),
        answer_case("closed", "no", "no", options=["yes", "no"], option_log_probs=[-1.0, -1.5]),
        answer_case("closed", "maybe", "maybe"),  # not among options, so it was not scored
    ]
    assert [likeliest(case) for case in cases] == ["no", "yes", None]
    table = summarise_answers(cases)["closed"]
    assert (table["num"], table["num_scored"]) == (3, 2)
    assert table["accuracy_by_option"] == pytest.approx(1 / 2)
    assert table["accuracy"] == pytest.approx(2 / 3)

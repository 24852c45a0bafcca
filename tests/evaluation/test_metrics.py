"""From finished cases to numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_hausdorff_distance, compute_iou, compute_surface_dice

from biascare.evaluation.cases import AnswerCase, Header, MaskCase, MaskPrediction, SlicePlace
from biascare.evaluation.metrics.answers import (
    is_correct,
    likeliest,
    normalise_answer,
    open_recall,
    option_confidence,
    read_choice,
    read_closed,
    recall_llava,
    summarise_answers,
    text_confidence,
)
from biascare.evaluation.metrics.segmentation import (
    DISC_SHARES,
    click_auc,
    dice_score,
    disc,
    fit_disc,
    iou_score,
    mask_scores,
    mean_by,
    noc,
    resized_nearest,
    summarise_segmentation,
    summarise_volumes,
    surface_scores,
)
from biascare.records import encode_mask
from biascare.reports.tables import corrections_table
from tests.tiny import HEIGHT, WIDTH, tiny_facts

BY_MONAI = pytest.mark.filterwarnings("ignore:monai")  # of an argument that it passes itself


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


def scores_of(cases: list[MaskCase], header: Header) -> list[dict[str, float]]:
    return [mask_scores(case, header) for case in cases]


CASES = [
    mask_case(10, "liver", "head", 0.1),  # Dice 1
    mask_case(6, "liver", "head", 0.4),  # 12 / 16
    mask_case(8, "liver", "head", 0.2),  # 16 / 18
    mask_case(2, "duct", "tail", 0.3),  # 4 / 12
]
DICE = [1, 12 / 16, 16 / 18, 4 / 12]


def test_a_summary_gives_the_means_computed_by_hand() -> None:
    summary = summarise_segmentation(CASES, scores_of(CASES, HEADER))
    assert summary["num_masks"] == 4
    assert summary["dice"]["mean"] == pytest.approx(sum(DICE) / 4)
    liver = sum(DICE[:3]) / 3
    assert summary["dice"]["mean_over_targets"] == pytest.approx((liver + DICE[3]) / 2)
    assert summary["dice"]["by_prevalence"]["head"] == {"num": 3, "mean": pytest.approx(liver)}
    assert summary["dice"]["by_target"]["duct"] == {"num": 1, "mean": pytest.approx(DICE[3])}
    assert json.loads(json.dumps(summary)) == summary


def test_the_disc_stands_beside_the_model_where_its_size_is_known() -> None:
    header = Header(**(vars(HEADER) | {"disc_share": 0.05, "disc_share_by_target": {"liver": 0.5}}))
    summary = summarise_segmentation(CASES, scores_of(CASES, header))
    # A disc of one pixel finds it, of ten around the first pixel two (radius 1.8).
    assert summary["dice_disc"]["mean"] == pytest.approx(2 / 11)
    by_target = summary["dice_disc_by_target"]["by_target"]
    assert by_target["liver"]["mean"] == pytest.approx(4 / 12)
    assert by_target["duct"]["mean"] == pytest.approx(2 / 11)  # of unknown size: the one for all


def test_clicks_are_counted_from_a_click_and_from_a_box_apart() -> None:
    """IoU of n of 10 found pixels is n / 10. A box is no click."""

    def corrected(box: Any, *found: int) -> MaskCase:
        case = mask_case(found[0], "liver", "head", 0.1)
        first = dataclasses.replace(case.predictions[0], box=box)
        rest = [dataclasses.replace(first, mask=code(n)) for n in found[1:]]
        return dataclasses.replace(case, predictions=[first, *rest])

    box = (0.0, 0.0, 9.0, 0.0)
    cases = [
        corrected(None, 5, 9, 9),  # 85 and 90 at the second click
        corrected(None, 5, 6, 7),  # never
        corrected(None, 9, 9, 10),  # both at the first
        corrected(box, 9, 9, 9),  # from the box alone
        corrected(box, 0, 10, 10),  # after one click; empty, so without a distance
    ]
    summary = summarise_segmentation(cases, scores_of(cases, HEADER))
    click, by_box = summary["clicks"]["click"], summary["clicks"]["box"]
    assert click["num"] == 3 and click["noc_90"] == {"mean": 1.5, "num_failed": 1}
    assert click["mean_iou_over_clicks"] == pytest.approx((0.8 + 0.6 + 0.925) / 3)
    assert by_box["noc_85"] == {"mean": 0.5, "num_failed": 0}
    # Of the truth's pixels 5 to 9 the last is 5 from what was found, of pixel 9 alone 1.
    far, near = (np.quantile([0] * n + list(range(1, 11 - n)), 0.95) for n in (5, 9))
    assert summary["hd95"] == {"mean": pytest.approx((far + near) / 2), "num_undefined": 1}
    assert summary["iou"]["mean"] == pytest.approx((0.5 + 0.5 + 0.9 + 0.9 + 0) / 5)
    assert json.loads(json.dumps(summary)) == summary


def test_dice_after_corrections_is_given_by_group_with_its_greatest_fall_by_hand() -> None:
    """Truth: pixels 0 to 9 of 20; n found of 10 is a Dice of 2 n / (n + 10)."""

    def corrected(modality: str, *found: int) -> MaskCase:
        case = mask_case(found[0], "liver", "head", 0.1, modality=modality)
        first = case.predictions[0]
        # A click on what is missing, then one beside the target; at a native border, half a pixel
        # beyond it.
        points = [[], [(8.6, 0.4, 1)], [(8.6, 0.4, 1), (19.5, -0.5, 0)]]
        predictions = [
            dataclasses.replace(first, mask=code(n), points=[*first.points, *clicks])
            for n, clicks in zip(found, points, strict=True)
        ]
        return dataclasses.replace(case, predictions=predictions)

    cases = [corrected("CT", 10, 6, 20), corrected("MR", 2, 10, 10)]
    table = summarise_segmentation(cases, scores_of(cases, HEADER))["corrections"]
    assert list(table) == ["all", "pixels: under 32 x 32", "modality: CT", "modality: MR"]
    one, other = (1, 12 / 16, 20 / 30), (4 / 12, 1, 1)
    assert table["modality: CT"]["dice"] == pytest.approx(one)
    assert table["modality: CT"]["greatest_fall"] == pytest.approx(1 / 4)
    assert table["modality: CT"]["after"] == 1
    # Of six pixels the tenth is none, and the last of all twenty is no background.
    assert table["modality: CT"]["positive_inside"] == [1, 1 / 2, 1]
    assert table["modality: CT"]["negative_outside"] == [None, None, 0]
    assert table["modality: MR"]["greatest_fall"] == 0 and table["modality: MR"]["after"] is None
    means = [(a + b) / 2 for a, b in zip(one, other, strict=True)]
    assert table["all"]["num"] == 2 and table["all"]["dice"] == pytest.approx(means)
    assert table["all"]["greatest_fall"] == pytest.approx(means[1] - means[2])
    assert table["all"]["positive_inside"] == [1, 3 / 4, 1]
    assert table["all"]["negative_outside"] == [None, None, 1 / 2]
    uncorrected = summarise_segmentation(CASES, scores_of(CASES, HEADER))
    assert uncorrected["corrections"] == {}
    shown = corrections_table(table)
    assert shown is not None and shown.row_count == 4
    assert list(shown.columns[5].cells)[:3] == ["0.042 (2)", "0.042 (2)", "0.250 (1)"]
    assert corrections_table(uncorrected["corrections"]) is None


def test_unknown_attributes_form_a_group_of_their_own() -> None:
    table = mean_by(["F", "M", None, "F"], [0.9, 0.8, 0.7, 0.2])
    assert table["missing"] == {"num": 1, "mean": pytest.approx(0.7)}
    assert table["F"] == {"num": 2, "mean": pytest.approx(0.55)}


def test_a_mean_over_images_counts_an_image_of_many_targets_once() -> None:
    one = [dataclasses.replace(case, facts=case.facts._replace(image_id="a")) for case in CASES[:3]]
    other = dataclasses.replace(CASES[3], facts=CASES[3].facts._replace(image_id="b"))
    summary = summarise_segmentation([*one, other], scores_of([*one, other], HEADER))
    assert summary["dice"]["mean_over_images"] == pytest.approx((sum(DICE[:3]) / 3 + DICE[3]) / 2)


def test_masks_are_scored_at_256_pixels_and_those_that_vanish_there_are_counted() -> None:
    truth = np.zeros((1024, 512), bool)
    truth[100:140, 200:240] = True
    speck = np.zeros((1024, 512), bool)
    speck[0, 0] = True  # between the centres of pixels of 4 x 2
    shifted = np.roll(truth, 20, axis=0)
    cases = [
        dataclasses.replace(
            mask_case(10, "liver", "head", 0.1),
            height=1024,
            width=512,
            truth=encode_mask(wanted).decode(),
            predictions=[
                dataclasses.replace(CASES[0].predictions[0], mask=encode_mask(found).decode())
            ],
        )
        for wanted, found in ((truth, shifted), (speck, speck))
    ]
    large, lost = scores_of(cases, HEADER)
    assert large["dice_256"] == 0.5 and large["iou_256"] == pytest.approx(1 / 3)
    assert math.isnan(lost["dice_256"]) and lost["dice"] == 1
    summary = summarise_segmentation(cases, [large, lost])
    assert summary["dice_256"]["mean"] == 0.5 and summary["dice_256"]["num_undefined"] == 1
    assert summary["dice"]["by_pixels"] == {
        "32 x 32 to 96 x 96": {"num": 1, "mean": 0.5},
        "under 32 x 32": {"num": 1, "mean": 1},
    }
    assert set(summary["dice"]["by_share"]) == {"0.1 to 1 %", "under 0.1 %"}
    only = summarise_segmentation(cases[1:], [lost])
    assert only["dice_256"]["mean"] is None and only["dice_256"]["by_target"] == {}
    assert json.loads(json.dumps(only)) == only


def test_masks_of_the_protocols_size_or_smaller_lose_nothing() -> None:
    mask = np.random.default_rng(0).random((100, 256)) > 0.5
    assert np.array_equal(resized_nearest(np.ones((256, 256), bool), 256), np.ones((256, 256)))
    rows = (np.arange(256) + 0.5) * 100 / 256
    assert np.array_equal(resized_nearest(mask, 256), mask[rows.astype(int)])


def slice_case(number: int, truth: np.ndarray, found: np.ndarray, **known: Any) -> MaskCase:
    prediction = dataclasses.replace(CASES[0].predictions[0], mask=encode_mask(found).decode())
    place = SlicePlace(volume="v", number=number, num_slices=6, spacing=(5.0, 1.0, 0.5))
    return dataclasses.replace(
        mask_case(10, "liver", "head", 0.1, **known),
        height=truth.shape[0],
        width=truth.shape[1],
        truth=encode_mask(truth).decode(),
        predictions=[prediction],
        place=place,
    )


@BY_MONAI
def test_slices_of_a_volume_are_scored_as_one_mask_in_millimetres() -> None:
    rng = np.random.default_rng(0)
    truth, found = (np.zeros((6, 20, 30), bool) for _ in range(2))
    truth[2:5, 5:12, 8:20] = True
    found[2:5, 6:13, 8:21] = True
    found[2:5] &= rng.random((3, 20, 30)) > 0.1
    cases = [slice_case(n, truth[n], found[n]) for n in (4, 2, 3)]
    (each,) = (summary := summarise_volumes(cases, HEADER))["each"]
    assert each["dice"] == dice_score(found, truth) and each["iou"] == iou_score(found, truth)
    pair = [torch.from_numpy(m[None, None].astype(np.float32)) for m in (found, truth)]
    spacing = (5.0, 1.0, 0.5)
    distance = compute_hausdorff_distance(
        *pair, include_background=True, percentile=95, spacing=spacing
    )
    assert each["hd95"] == pytest.approx(distance.item(), abs=1e-5)
    share = compute_surface_dice(
        *pair, class_thresholds=[2.0], include_background=True, spacing=spacing
    )
    assert each["nsd"] == pytest.approx(share.item(), abs=1e-6)
    assert (summary["num"], summary["num_undefined_hd95"], each["num_slices"]) == (1, 0, 3)
    assert json.loads(json.dumps(summary)) == summary


def test_volumes_of_empty_predictions_images_and_samples_have_defined_scores() -> None:
    truth, empty = np.ones((4, 4), bool), np.zeros((4, 4), bool)
    found = summarise_volumes([slice_case(0, truth, empty)], HEADER)
    assert (found["dice"], found["nsd"], found["hd95"], found["num_undefined_hd95"]) == (
        0,
        0,
        None,
        1,
    )
    assert summarise_volumes(CASES, HEADER) == {}
    # A limit left slices out, which would count as slices without the target.
    limited = dataclasses.replace(HEADER, settings={"limit": 10})
    assert summarise_volumes([slice_case(0, truth, truth)], limited) == {}
    twice = [slice_case(0, truth, truth), slice_case(0, truth, truth)]
    with pytest.raises(ValueError, match="expected each slice once"):
        summarise_volumes(twice, HEADER)


def test_without_masks_there_is_nothing_but_their_number() -> None:
    assert summarise_segmentation([], []) == {"num_masks": 0}


def answer_case(kind: str, reference: str, text: str, **known: Any) -> AnswerCase:
    stated: dict[str, Any] = {"options": [], "option_log_probs": None, "token_log_probs": []}
    facts = {name: known.pop(name) for name in ("modality", "source") if name in known}
    return AnswerCase(
        id="",
        facts=tiny_facts("image", task="language", kind=kind, **facts),
        question="",
        question_facts={},
        prompt="",
        text=text,
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


def test_closed_answers_are_scored_by_each_reading_with_fixed_labels() -> None:
    scored: dict[str, Any] = {"options": ["yes", "no"], "option_log_probs": [-0.1, -2.0]}
    cases = [
        answer_case("closed", "yes", "Yes, there is.", **scored),
        answer_case("closed", "no", "There is no nodule", **scored),
        answer_case("closed", "yes", "unknown", **scored),
        answer_case("closed", "left", "left"),  # closed, and neither yes nor no
    ]
    table = summarise_answers(cases)["closed"]["readings"]
    assert table["num"] == 3
    assert table["strict"]["accuracy"] == pytest.approx(1 / 3)
    assert (table["strict"]["num_unread"], table["lenient"]["num_unread"]) == (2, 1)
    # yes: precision 1, recall 1/2, F1 2/3; no: nothing. Unread is no third class.
    assert table["strict"]["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert table["lenient"]["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert table["option"]["accuracy"] == pytest.approx(2 / 3)


def test_both_confidences_of_answers_are_calibrated_against_being_right() -> None:
    case = answer_case(
        "closed",
        "yes",
        "yes",
        options=["yes", "no"],
        option_log_probs=[math.log(0.3), math.log(0.1)],
        token_log_probs=[math.log(0.5), math.log(0.125)],
    )
    assert option_confidence(case) == pytest.approx(0.75)
    assert text_confidence(case) == pytest.approx(0.25)
    silent = answer_case("closed", "yes", "", token_log_probs=[])
    assert option_confidence(silent) is None and text_confidence(silent) is None
    table = summarise_answers([case, silent])["closed"]["calibration"]
    assert table["option"]["ece"] == pytest.approx(0.25) and table["option"]["num_missing"] == 1
    assert table["text"]["signed"] == pytest.approx(-0.75) and table["text"]["auroc"] is None
    assert (
        summarise_answers([answer_case("open", "left lung", "the lung")])["open"]["recall"] == 0.5
    )


YES_NO = ("yes", "no")


@pytest.mark.parametrize(
    "text, strict, lenient",
    [
        ("Yes, there is a nodule", "yes", "yes"),
        ("Yes, there is no doubt", "yes", None),
        ("No.", "no", "no"),
        ("no", "no", "no"),
        ("There is no nodule", None, "no"),
        ("unknown", None, None),
        ("Not normal", None, None),
        ("nope", None, None),
        ("yes and no", None, None),
        ("Yes or no", None, None),
        ("yes, yes", "yes", "yes"),
        ("", None, None),
        ("   ...", None, None),
        ("normal", None, None),
        ("YES", "yes", "yes"),
        ("noyes", None, None),
        ("I cannot answer medical questions.", None, None),
    ],
)
def test_closed_answers_are_read_by_whole_words_or_not_at_all(
    text: str, strict: str | None, lenient: str | None
) -> None:
    assert read_closed(text, YES_NO) == strict
    assert read_closed(text, YES_NO, "lenient") == lenient


@pytest.mark.parametrize(
    "text, options, strict, lenient",
    [
        ("right lung", ("lung", "right lung"), "right lung", "right lung"),
        ("the right lung", ("lung", "right lung"), None, "right lung"),
        ("lung and right lung", ("lung", "right lung"), None, None),
        ("not normal", ("normal", "abnormal"), None, None),
        ("abnormal", ("normal", "abnormal"), "abnormal", "abnormal"),
        ("A and B", ("A", "B"), None, None),
        ("T2-weighted", ("T2", "T2-weighted"), "T2-weighted", "T2-weighted"),
        ("3.5 cm", ("3", "3.5"), "3.5", "3.5"),
        ("anything", (), None, None),
    ],
)
def test_options_of_several_words_are_read_whole(
    text: str, options: tuple[str, ...], strict: str | None, lenient: str | None
) -> None:
    assert read_closed(text, options) == strict
    assert read_closed(text, options, "lenient") == lenient


def test_an_unknown_reading_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 'strict' or 'lenient'"):
        read_closed("yes", YES_NO, "loose")


def test_open_recall_counts_each_word_as_often_as_the_reference_has_it() -> None:
    assert open_recall("the left lung", "left lower lung") == pytest.approx(2 / 3)
    assert open_recall("lung lung lung", "left lung") == 0.5
    assert open_recall("T2 weighted", "T2-weighted") == 0.0
    assert open_recall("", "lung") == 0.0
    assert (open_recall("", ""), open_recall("lung", "")) == (1.0, 0.0)
    # Three hits of one word against one that was missed.
    assert recall_llava("lung lung lung", "left lung") == 0.75
    assert recall_llava("", "") == 0.0


def blob(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    center, size = rng.integers(8, 24, 2), rng.integers(3, 9, 2)
    y, x = np.ogrid[:32, :40]
    return ((y - center[0]) / size[0]) ** 2 + ((x - center[1]) / size[1]) ** 2 <= 1


@BY_MONAI
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("spacing", [None, (0.7, 1.5)])
def test_iou_and_surface_scores_are_those_of_monai(seed: int, spacing: Any) -> None:
    prediction, truth = blob(seed), blob(seed + 100)
    tensors = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, truth)]
    assert iou_score(prediction, truth) == pytest.approx(float(compute_iou(*tensors)), abs=1e-6)
    ours = surface_scores(prediction, truth, 2.0, spacing)
    theirs = compute_surface_dice(*tensors, class_thresholds=[2.0], spacing=spacing)
    assert ours.nsd == pytest.approx(float(theirs), abs=1e-6)  # MONAI counts in float32
    distance = compute_hausdorff_distance(*tensors, percentile=95, spacing=spacing)
    assert ours.hd95 == pytest.approx(float(distance), rel=1e-6)


@BY_MONAI
def test_a_volume_has_the_surface_scores_of_monai_too() -> None:
    prediction, truth = (np.stack([blob(s + i) for i in range(4)]) for s in (0, 50))
    tensors = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, truth)]
    ours = surface_scores(prediction, truth, 2.0)
    theirs = compute_surface_dice(*tensors, class_thresholds=[2.0])
    assert ours.nsd == pytest.approx(float(theirs), abs=1e-6)


def test_empty_and_one_pixel_masks_have_defined_surface_scores() -> None:
    empty, one = np.zeros((5, 5), bool), np.zeros((5, 5), bool)
    one[2, 2] = True
    assert surface_scores(empty, empty, 2) == (1.0, None)
    assert surface_scores(one, empty, 2) == surface_scores(empty, one, 2) == (0.0, None)
    assert surface_scores(one, one, 0) == (1.0, 0.0)
    assert iou_score(empty, empty) == 1.0 and iou_score(one, empty) == 0.0
    moved = np.roll(one, 2, axis=1)
    assert surface_scores(one, moved, 2) == (1.0, 2.0) and surface_scores(one, moved, 1).nsd == 0


def test_clicks_until_a_threshold_and_the_area_over_clicks_are_those_by_hand() -> None:
    scores = [0.5, 0.7, 0.8, 0.85, 0.9]
    assert click_auc(scores) == pytest.approx(3.05) and click_auc(scores) / 4 == pytest.approx(
        0.7625
    )
    assert (noc(scores, 0.85), noc(scores, 0.9), noc(scores, 0.95)) == (4, 5, None)
    assert noc([], 0.5) is None and click_auc([0.5]) == 0

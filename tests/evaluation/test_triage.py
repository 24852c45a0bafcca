"""Which masks should be looked at first: uncertainties against failures, reviews, promises."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from biascare.evaluation.cases import MaskCase, MaskPrediction
from biascare.evaluation.metrics.triage import (
    MAX_RISK,
    REVIEWED,
    RISK_ERROR,
    apply_mix,
    aurc,
    auroc_interval,
    exact_counts,
    failure_auroc,
    reviewed,
    risk_threshold,
    summarise_triage,
)
from tests.tiny import tiny_facts


def case(name: str, doubts: dict[str, float], **known: Any) -> MaskCase:
    prediction = MaskPrediction(
        points=[(0.0, 0.0, 1)], box=None, mask="", predicted_dice=0.5, uncertainty=doubts
    )
    return MaskCase(
        id=name,
        facts=tiny_facts(name, target="liver", **known),
        height=1,
        width=1,
        instruction=None,
        truth="",
        by_text=None,
        predictions=[prediction],
        seconds=0.0,
    )


def cases_of(doubts: Sequence[float], **known: Any) -> list[MaskCase]:
    return [case(str(i), {"doubt": doubt}, **known) for i, doubt in enumerate(doubts)]


def scored(before: Sequence[float], after: Sequence[float] | None = None) -> list[dict[str, float]]:
    if after is None:
        return [{"dice": dice} for dice in before]
    return [{"dice": d, "dice_click_1": c} for d, c in zip(before, after, strict=True)]


def many(num: int, seed: int, prefix: str, per_patient: int = 1) -> Any:
    """Cases of which one signal knows much of the Dice, one little and one nothing."""
    rng = np.random.default_rng(seed)
    hard = np.repeat(rng.normal(size=-(-num // per_patient)), per_patient)[:num]
    dice = np.clip(0.8 - 0.2 * hard + rng.normal(0, 0.05, num), 0, 1)
    noise = rng.normal(size=(3, num))
    cases = [
        case(
            f"{prefix}{i}",
            {"much": h + 0.4 * a, "little": h + 3 * b, "constant": 1.0},
            patient_id=f"{prefix}{i // per_patient}",
            sex="FM"[i % 2],
            prevalence="tail" if i % 3 else "head",
        )
        for i, (h, a, b) in enumerate(zip(hard, noise[0], noise[1], strict=True))
    ]
    return cases, scored(dice.tolist(), np.minimum(dice + 0.2, 1).tolist())


# ---------------------------------------------------------------- ranking


def test_a_signal_is_ranked_by_hand() -> None:
    # Failed are the first and the last; the last is doubted less than one of the two good ones.
    found = summarise_triage(cases_of([0.9, 0.5, 0.1, 0.3]), scored([0.2, 0.8, 0.7, 0.69]))
    signal = found["signals"]["doubt"]
    assert (found["num"], found["num_failed"], signal["num"]) == (4, 2, 4)
    assert signal["auroc"] == 3 / 4
    # Kept from the most certain on: 0 of 1, 1 of 2, 1 of 3, 2 of 4 failed.
    assert signal["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
    assert signal["mean"] == pytest.approx(0.45)
    assert found["mix"] is None and found["risk_control"] is None
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("dice", [0.1, 0.9])
def test_where_every_mask_or_none_failed_there_is_no_auroc(dice: float) -> None:
    found = summarise_triage(cases_of([0.1, 0.2, 0.3]), scored([dice] * 3))
    signal = found["signals"]["doubt"]
    assert (signal["auroc"], signal["low"], signal["high"]) == (None, None, None)
    assert signal["aurc"] == float(dice < 0.7)


def test_one_mask_or_none_is_a_defined_result() -> None:
    one = summarise_triage(cases_of([0.1]), scored([0.2], [0.4]))
    assert one["review"]["orders"]["random"]["overall"][-1] == pytest.approx(0.4)
    none = summarise_triage([], [])
    assert (none["num"], none["signals"], none["review"]["num"]) == (0, {}, 0)
    assert json.loads(json.dumps([one, none])) == [one, none]


def test_a_signal_that_is_no_number_is_left_out_and_its_cases_are_counted() -> None:
    found = summarise_triage(cases_of([0.9, float("nan"), 0.1]), scored([0.2, 0.1, 0.8], [1] * 3))
    assert (found["signals"]["doubt"]["num"], found["num"]) == (2, 3)
    assert found["signals"]["doubt"]["auroc"] == 1
    # An order of all cases needs a doubt of all.
    assert set(found["review"]["orders"]) == {"random", "oracle"}


def test_groups_have_their_own_auroc_and_a_missing_attribute_is_one_of_them() -> None:
    sexes = ["F", "F", "M", None]
    cases = [
        case(str(i), {"doubt": doubt}, sex=sex, patient_id=str(i))
        for i, (doubt, sex) in enumerate(zip([0.9, 0.1, 0.2, 0.3], sexes, strict=True))
    ]
    found = summarise_triage(cases, scored([0.1, 0.9, 0.9, 0.1]))["signals"]["doubt"]["by_group"]
    assert found["sex"]["F"]["auroc"] == 1 and found["sex"]["F"]["num_failed"] == 1
    assert found["sex"]["M"] == {
        "num": 1, "num_failed": 0, "auroc": None, "low": None, "high": None
    }  # fmt: skip
    assert found["sex"]["missing"]["num"] == 1 and "race" not in found


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=30))
def test_the_auroc_is_that_of_scikit_learn_and_lies_in_its_interval(rows: Any) -> None:
    doubt = np.array([float(row[0]) for row in rows])
    failed = np.array([row[1] for row in rows])
    found = failure_auroc(doubt, failed)
    low, high = auroc_interval(doubt, failed, np.arange(len(rows)), num_draws=200)
    if failed.all() or not failed.any():
        assert (found, low, high) == (None, None, None)
        return
    assert found is not None and low is not None and high is not None
    assert found == pytest.approx(roc_auc_score(failed, doubt), abs=1e-12)
    assert 0 <= low <= high <= 1
    # The same order is the same AUROC, whatever the scale.
    assert failure_auroc(np.exp(doubt), failed) == found


def test_an_interval_draws_whole_patients_and_weighs_ties_half() -> None:
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(12), 5)
    doubt = np.round(rng.normal(size=60) + np.repeat(rng.normal(size=12), 5), 0)
    failed = doubt + rng.normal(0, 2, 60) > 0
    drawn = []
    chosen = np.random.default_rng(0).integers(0, 12, (300, 12))
    for patients_drawn in chosen:
        rows = np.concatenate([np.flatnonzero(patients == p) for p in patients_drawn])
        if len(np.unique(failed[rows])) == 2:
            drawn.append(roc_auc_score(failed[rows], doubt[rows]))
    found = auroc_interval(doubt, failed, patients, num_draws=300, seed=0)
    assert found == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=1e-9)
    alone = auroc_interval(doubt, failed, np.arange(60), num_draws=300)
    assert alone[0] is not None and found[0] is not None and found[1] is not None
    assert found[1] - found[0] != pytest.approx((alone[1] or 0) - alone[0], abs=1e-3)


def test_equal_doubts_make_an_aurc_that_no_order_of_the_rows_decides() -> None:
    failed = np.array([True, False, False, True])
    assert aurc(np.zeros(4), failed) == aurc(np.zeros(4), failed[::-1]) == 0.5
    assert aurc(np.zeros(0), failed[:0]) is None


# ---------------------------------------------------------------- review


def test_a_review_curve_by_hand_beside_chance_and_the_oracle() -> None:
    # Four cases; reviewing the most doubtful quarter each gains 0.4, 0, 0.2 and 0.2.
    before, after = [0.4, 0.8, 0.6, 0.6], [0.8, 0.8, 0.8, 0.8]
    found = summarise_triage(cases_of([4.0, 3.0, 2.0, 1.0]), scored(before, after))["review"]
    quarters = [0, 5, 10, 15, 20]
    curve = np.array(found["orders"]["doubt"]["overall"])[quarters]
    assert curve == pytest.approx([0.6, 0.7, 0.7, 0.75, 0.8])
    assert np.array(found["orders"]["random"]["overall"]) == pytest.approx(0.6 + 0.2 * REVIEWED)
    oracle = np.array(found["orders"]["oracle"]["overall"])[quarters]
    assert oracle == pytest.approx([0.6, 0.7, 0.75, 0.8, 0.8])
    # Areas by the trapezoid rule over quarters; the straight line of chance has 0.7.
    area = (0.65 + 0.7 + 0.725 + 0.775) / 4 - 0.7
    best = (0.65 + 0.725 + 0.775 + 0.8) / 4 - 0.7
    assert found["orders"]["doubt"]["area"] == pytest.approx(area)
    assert found["orders"]["doubt"]["share_of_oracle"] == pytest.approx(area / best)
    # Three failed; the most doubtful half holds one of them.
    assert np.array(found["orders"]["doubt"]["found"])[quarters] == pytest.approx(
        [0, 1 / 3, 1 / 3, 2 / 3, 1]
    )


def test_a_review_of_one_correction_may_cost_dice_and_says_so() -> None:
    found = summarise_triage(cases_of([2.0, 1.0]), scored([0.9, 0.5], [0.7, 0.6]))["review"]
    assert found["orders"]["doubt"]["area"] < 0 < found["orders"]["oracle"]["area"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_a_review_spends_its_budget_and_nothing_more(doubts: list[int]) -> None:
    share = reviewed(np.array(doubts, float))
    assert share.sum(1) == pytest.approx(REVIEWED * len(doubts))
    assert ((share >= 0) & (share <= 1)).all() and (np.diff(share, axis=0) >= -1e-12).all()
    # Equal doubts are treated alike, and no case goes before one that is doubted more.
    order = np.argsort(doubts)
    assert (np.diff(share[:, order], axis=1) >= -1e-12).all()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), min_size=1))
def test_no_order_gains_more_than_the_oracle(rows: list[tuple[float, float, float]]) -> None:
    before, after, doubt = zip(*rows, strict=True)
    orders = summarise_triage(cases_of(doubt), scored(before, after))["review"]["orders"]
    for order in orders.values():
        assert (np.array(order["overall"]) <= np.array(orders["oracle"]["overall"]) + 1e-9).all()
        assert order["overall"][-1] == pytest.approx(np.mean(after))


def test_cases_without_corrections_have_no_review() -> None:
    review = summarise_triage(cases_of([0.1, 0.2]), scored([0.1, 0.9]))["review"]
    assert (review["num"], review["orders"], review["by_group"]) == (0, {}, {})


def test_the_curves_of_groups_add_up_to_that_of_all() -> None:
    cases, scores = many(60, 0, "a")
    review = summarise_triage(cases, scores)["review"]
    by_sex = review["by_group"]["sex"]
    for name in ("much", "random", "oracle"):
        mixed = sum(by_sex[sex]["num"] * np.array(by_sex[sex]["orders"][name]) for sex in "FM") / 60
        assert mixed == pytest.approx(np.array(review["orders"][name]["overall"]))
        tail = review["by_group"]["prevalence"]["tail"]["orders"][name]
        assert tail == review["orders"][name]["tail"]


# ---------------------------------------------------------------- mix


def test_the_mix_is_the_logistic_regression_of_scikit_learn_as_plain_numbers() -> None:
    known, known_scores = many(200, 1, "v")
    cases, scores = many(100, 0, "a")
    found = summarise_triage(cases, scores, (known, known_scores))
    mix = json.loads(json.dumps(found["mix"]))
    names = mix["signals"]
    assert set(names) == {"much", "little", "constant"} and mix["num_patients"] == 200

    def table(some: list[MaskCase]) -> Any:
        return [[c.predictions[0].uncertainty[name] for name in names] for c in some]

    failed = [score["dice"] < 0.7 for score in known_scores]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    expected = model.fit(table(known), failed).predict_proba(table(cases))[:, 1]
    columns = np.transpose(table(cases))
    signals = dict(zip(names, columns, strict=True))
    assert apply_mix(mix, signals) == pytest.approx(expected, abs=1e-9)
    assert found["signals"]["mix"]["auroc"] >= found["signals"]["little"]["auroc"]


def test_without_failures_in_validation_there_is_no_mix_and_a_reason() -> None:
    cases, scores = many(20, 0, "a")
    known, _ = many(20, 1, "v")
    found = summarise_triage(cases, scores, (known, scored([0.9] * 20)))
    assert found["mix"] is None and found["why_no_mix"] == "no mask of the validation cases failed"
    assert "mix" not in found["signals"] and "mix" not in found["risk_control"]


@pytest.mark.parametrize("shared", ["the case", "the patient"])
def test_what_is_judged_may_not_have_been_fitted_on(shared: str) -> None:
    cases, scores = many(20, 0, "a")
    known, known_scores = many(20, 1, "v")
    known[3] = cases[2] if shared == "the case" else case("new", {"much": 0.0}, patient_id="a2")
    with pytest.raises(ValueError, match=r"validation: case .* expected cases of other patients"):
        summarise_triage(cases, scores, (known, known_scores))


# ---------------------------------------------------------------- promises


def test_with_one_mask_per_patient_the_counts_are_the_plain_ones() -> None:
    failed = np.array([True] + [False] * 9)
    assert exact_counts(failed, np.arange(10)) == (1, 10)
    # All masks of one patient: one mask.
    assert exact_counts(failed, np.zeros(10, int)) == pytest.approx((0.1, 1))
    # Two masks each that fail together count once, and a little less for want of patients.
    twice = exact_counts(np.repeat(failed, 2), np.repeat(np.arange(10), 2))
    assert twice[1] < 10 and twice[0] / twice[1] == pytest.approx(0.1)


def test_a_threshold_is_the_largest_that_the_binomial_allows() -> None:
    # 100 patients, the first 80 certain and good, the rest failed.
    doubt, failed = np.arange(100.0), np.arange(100) >= 80
    found = risk_threshold(doubt, failed, np.arange(100))
    assert found.threshold is not None and found.why is None
    allowed = [
        d for d in doubt
        if binom.cdf(failed[doubt <= d].sum(), (doubt <= d).sum(), MAX_RISK) <= RISK_ERROR / 4
    ]  # fmt: skip
    # Rungs are 5 cases apart.
    assert max(allowed) - 5 < found.threshold <= max(allowed)
    assert found.bound is not None and found.bound <= MAX_RISK


@pytest.mark.parametrize("num, why", [(10, "patients without any failure"), (200, "too many")])
def test_what_cannot_be_promised_is_not(num: int, why: str) -> None:
    failed = np.arange(num) % 2 == 0 if num > 50 else np.zeros(num, bool)
    found = risk_threshold(np.arange(float(num)), failed, np.arange(num))
    assert found.threshold is None and found.why is not None and why in found.why


def test_a_threshold_keeps_its_promise_on_new_patients_as_often_as_it_says() -> None:
    broken = given = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        patient = np.repeat(np.arange(150), 3)
        hard = rng.normal(size=150)[patient]
        doubt = hard + rng.normal(0, 0.3, 450)
        chance = np.clip(0.02 + 0.12 * (hard + 1), 0, 1)
        failed = rng.random(450) < chance
        found = risk_threshold(doubt, failed, patient)
        if found.threshold is None:
            continue
        given += 1
        hard = rng.normal(size=100_000)
        taken = hard + rng.normal(0, 0.3, len(hard)) <= found.threshold
        broken += np.clip(0.02 + 0.12 * (hard + 1), 0, 1)[taken].mean() > MAX_RISK
    assert given > 60 and broken / given <= RISK_ERROR


def test_a_promise_is_checked_on_the_cases_that_are_judged_and_in_every_group() -> None:
    cases, scores = many(300, 0, "a")
    found = summarise_triage(cases, scores, many(600, 1, "v"))["risk_control"]["much"]
    assert found["threshold"] is not None
    test = found["test"]
    assert test["num"] == 300 and 0 < test["num_accepted"] < 300
    assert test["low"] <= test["share"] <= test["high"]
    sexes = found["by_group"]["sex"]
    assert sum(sexes[sex]["num_accepted"] for sex in "FM") == test["num_accepted"]

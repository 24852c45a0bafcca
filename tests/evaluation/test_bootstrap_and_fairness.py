"""Clustered intervals, and differences between groups beside their null."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fairlearn.metrics import MetricFrame
from scipy.stats import norm

from biascare.evaluation.metrics.bootstrap import (
    cluster_numbers,
    clustered,
    percentile_interval,
    row_weights,
)
from biascare.evaluation.metrics.fairness import (
    MISSING,
    adjusted,
    cceg,
    deferral,
    disparity,
    equity_scaled,
    esce,
    holm,
    named_groups,
    permuted_means,
    standardised,
)
from biascare.evaluation.metrics.groups import Measured, age_band, sex_and_age, summarise_groups
from tests.tiny import tiny_facts

EACH = np.arange(2000)


def test_rows_without_a_patient_are_clustered_by_their_image() -> None:
    patients, images = ["p1", None, "p1", None, None], ["a", "b", "c", "b", "d"]
    assert cluster_numbers(patients, images).tolist() == [0, 1, 0, 1, 2]


def test_draws_of_means_are_those_of_rows_weighted_by_their_patient() -> None:
    rng = np.random.default_rng(0)
    values, clusters = rng.random(40), rng.integers(0, 9, 40)
    group = rng.integers(0, 3, 40)
    drawn = clustered(values, clusters, group, 3, num_draws=25, seed=4)
    assert drawn.estimate == pytest.approx([values[group == g].mean() for g in range(3)])
    for draw, weights in zip(drawn.draws, row_weights(clusters, 25, seed=4), strict=True):
        for g in range(3):
            mine = group == g
            if weights[mine].sum():
                expected = np.average(values[mine], weights=weights[mine])
                assert draw[g] == pytest.approx(expected, abs=1e-12)
            else:
                assert math.isnan(draw[g])


def test_blocks_of_draws_change_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    values, clusters = np.arange(30.0), np.arange(30) // 3
    whole = clustered(values, clusters, num_draws=50)
    monkeypatch.setattr("biascare.evaluation.metrics.bootstrap.BLOCK", 40)
    assert np.array_equal(clustered(values, clusters, num_draws=50).draws, whole.draws)


def test_many_images_of_one_patient_widen_the_interval_as_theory_says() -> None:
    """Equal rows of a patient say what one row says: the standard error is that of patients."""
    rng = np.random.default_rng(1)
    patients = rng.random(400)
    values, clusters = np.repeat(patients, 5), np.repeat(np.arange(400), 5)
    low, high = clustered(values, clusters).interval()
    width = 2 * norm.ppf(0.975) * patients.std() / math.sqrt(400)
    assert high[0] - low[0] == pytest.approx(width, rel=0.1)
    alone = clustered(values, EACH).interval()
    assert alone[1][0] - alone[0][0] == pytest.approx(width / math.sqrt(5), rel=0.1)


def test_missing_values_and_empty_groups_are_counted_and_not_averaged() -> None:
    values = [1.0, float("nan"), 0.0, 5.0]
    drawn = clustered(values, np.arange(4), [0, 0, 0, -1], 2, num_draws=200)
    assert drawn.estimate[0] == 0.5 and math.isnan(drawn.estimate[1])
    low, high = drawn.interval()
    assert math.isnan(low[1]) and math.isnan(high[1]) and 0 <= low[0] <= high[0] <= 1
    assert drawn.num_empty()[1] == 200 and 0 < drawn.num_empty()[0] < 60
    assert np.isnan(percentile_interval(np.full((3, 1), np.nan))).all()
    weighted = clustered([1.0, 0.0], np.arange(2), weights=[3, 1], num_draws=1)
    assert weighted.estimate[0] == 0.75


def test_means_by_group_are_those_of_fairlearn() -> None:
    rng = np.random.default_rng(2)
    correct = rng.integers(0, 2, 2000)
    sex = rng.choice(["F", "M"], 2000)
    ours = disparity(correct, sex.tolist(), EACH, num_draws=10)
    frame = MetricFrame(
        metrics=lambda truth, answer: float(np.mean(truth == answer)),
        y_true=np.ones(2000),
        y_pred=correct,
        sensitive_features=sex,
    )
    assert [g.mean for g in ours.groups] == pytest.approx(frame.by_group.tolist(), abs=1e-9)
    assert ours.gap == pytest.approx(frame.difference(), abs=1e-9)
    assert ours.ratio == pytest.approx(frame.ratio(), abs=1e-9)


def test_a_gap_of_nothing_lies_inside_its_null_where_its_bootstrap_interval_excludes_zero() -> None:
    rng = np.random.default_rng(5)
    groups = rng.choice(list("abcde"), 2000).tolist()
    found = disparity(rng.random(2000), groups, EACH, num_draws=400)
    assert found.gap is not None and found.null_mean is not None
    assert found.p is not None and found.p > 0.05
    assert abs(found.excess or 0) < found.gap / 2 and found.gap > 0


def test_false_alarms_stay_at_their_level_and_a_planted_gap_is_found() -> None:
    rng, alarms, hits = np.random.default_rng(6), 0, 0
    for seed in range(120):
        patients = np.repeat(np.arange(60), 4)
        sex = rng.choice(["F", "M"], 60)[patients].tolist()
        base = rng.normal(0, 1, 60)[patients] + rng.normal(0, 0.3, 240)
        nothing = disparity(base, sex, patients, num_draws=199, seed=seed)
        alarms += (nothing.p or 1) <= 0.05
        assert nothing.detectable is not None
        planted = base + np.array([nothing.detectable if s == "M" else 0 for s in sex])
        hits += (disparity(planted, sex, patients, num_draws=199, seed=seed).p or 1) <= 0.05
    print(f"false alarms {alarms} of 120, planted gaps of the detectable size found {hits}")
    assert alarms <= 14  # the 99.9th percentile of a binomial of 120 at 0.05
    assert 120 * 0.65 <= hits <= 120 * 0.97


def test_one_patients_many_images_do_not_make_a_difference() -> None:
    """Dealt row by row, two patients with hundreds of images would look like a finding."""
    clusters = np.repeat(np.arange(8), 100)
    values = np.repeat([1.0, 0, 0, 1, 0, 1, 0, 0], 100)
    sex = np.repeat(list("FFFFMMMM"), 100).tolist()
    by_patient = disparity(values, sex, clusters, num_draws=400)
    by_row = disparity(values, sex, np.arange(800), num_draws=400)
    assert (by_row.p or 0) < 0.01 < 0.5 < (by_patient.p or 0)


def test_what_the_case_mix_explains_is_no_difference_within_it() -> None:
    """Women have the hard cases: within hard and within easy cases nothing differs."""
    rng = np.random.default_rng(8)
    hard = np.repeat([True, False], 400)
    sex = np.where(rng.random(800) < np.where(hard, 0.8, 0.2), "F", "M").tolist()
    values = np.where(hard, 0.3, 0.9) + rng.normal(0, 0.05, 800)
    plain = disparity(values, sex, np.arange(800), num_draws=200)
    strata = ["hard" if h else "easy" for h in hard]
    within = disparity(adjusted(values, strata), sex, np.arange(800), num_draws=200)
    assert (plain.p or 1) < 0.01 and plain.worst == "F" and (within.p or 0) > 0.05
    means = standardised(values, sex, strata)
    assert abs(means["F"][0] - means["M"][0]) < 0.02 and means["F"][1] == 1.0


def test_adjusted_values_have_the_mean_of_all_in_every_stratum() -> None:
    values = [1.0, 3.0, float("nan"), 8.0]
    assert adjusted(values, ["x", "x", "x", "y"])[[0, 1, 3]].tolist() == [3.0, 5.0, 4.0]


def test_a_standardised_mean_says_how_much_of_the_mix_it_stands_on() -> None:
    # Group b has no row of stratum y, which is a quarter of all.
    found = standardised([1, 0, 1, 1], ["a", "a", "b", "b"], ["x", "y", "x", "x"])
    assert found["a"] == pytest.approx((0.75 * 1 + 0.25 * 0, 1.0))
    assert found["b"] == pytest.approx((1.0, 0.75))


def test_small_groups_and_unknown_attributes_are_shown_and_not_compared() -> None:
    sex = ["F"] * 30 + ["M"] * 30 + ["X"] * 3 + [None] * 40
    values = [1.0] * 30 + [0.0] * 30 + [0.0] * 3 + [0.5] * 40
    found = disparity(values, sex, np.arange(103), num_draws=50)
    shown = {g.name: (g.num, g.compared) for g in found.groups}
    assert shown == {"F": (30, True), "M": (30, True), "X": (3, False), MISSING: (40, False)}
    assert (found.best, found.worst, found.gap) == ("F", "M", 1.0)
    lower = disparity(values, sex, np.arange(103), higher_is_better=False, num_draws=50)
    assert (lower.best, lower.worst) == ("M", "F")


@pytest.mark.parametrize("attribute", [[None] * 50, ["F"] * 50, ["F"] * 49 + ["M"]])
def test_an_attribute_that_compares_nothing_has_no_gap(attribute: list) -> None:
    found = disparity(np.ones(50), attribute, np.arange(50), num_draws=20)
    assert found.gap is None and found.p is None and sum(g.num for g in found.groups) == 50


def test_groups_are_in_the_order_of_their_names_and_missing_is_last() -> None:
    number, names = named_groups(["b", None, "a", "z"])
    assert names == ["a", "b", "z", MISSING] and number.tolist() == [1, 3, 0, 2]


def test_permuted_means_of_two_rows_are_always_as_far_apart() -> None:
    means = permuted_means(np.array([0.0, 1.0]), np.array([0, 1]), np.arange(2), num_draws=9)
    assert np.ptp(means, axis=1).tolist() == [1.0] * 9


def test_holms_adjustment_is_the_published_one() -> None:
    # Sorted .01 .02 .03 .04 times 4 3 2 1, made monotone.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_calibration_gaps_of_groups_are_those_computed_by_hand() -> None:
    # Pairs .1, .3, .2: mean .2. Population std of .1 .2 .4 is sqrt(.0466667 / 3).
    by_group = {"a": 0.1, "b": 0.2, "c": 0.4}
    assert cceg(by_group) == pytest.approx(0.2) and cceg({"a": 0.3}) == 0
    std = math.sqrt((0.1333333**2 + 0.0333333**2 + 0.1666667**2) / 3)
    assert esce(0.24, by_group) == pytest.approx(0.24 / (1 - std), abs=1e-6)
    assert equity_scaled(0.8, by_group) == pytest.approx(0.8 * (1 - std), abs=1e-6)
    assert equity_scaled(0.3, {"a": 0.1, "b": 0.5}, "deviation") == pytest.approx(0.3 / 1.4)
    with pytest.raises(ValueError, match="expected 'std' or 'deviation'"):
        equity_scaled(0.8, by_group, "other")


def test_one_threshold_keeps_groups_by_their_scores_and_ties_in_part() -> None:
    kept = deferral([0.9, 0.8, 0.5, 0.5], ["a", "a", "b", "c"], 0.75)
    assert kept == {"a": 1.0, "b": 0.5, "c": 0.5}
    assert deferral([0.1, 0.2], ["a", "b"], 0) == {"a": 0.0, "b": 0.0}


def measured(sex: list[str | None], age: list[float | None], values: list[float]) -> Measured:
    facts = [
        tiny_facts(f"i{n}", patient_id=f"p{n}", sex=s, age=a)
        for n, (s, a) in enumerate(zip(sex, age, strict=True))
    ]
    return Measured("dice", facts, values, ["CT"] * len(facts))


def test_ages_are_grouped_in_bands_and_intersections_need_both() -> None:
    ages = [None, 39.9, 40.0, 60.0, 80.0]
    facts = [tiny_facts("i", age=age, sex="F") for age in ages]
    assert [age_band(f) for f in facts] == [None, "under 40", "40 to 59", "60 to 79", "80 and over"]
    assert sex_and_age(facts[1]) == "F, under 40" and sex_and_age(facts[0]) is None


def test_every_known_attribute_is_compared_and_adjusted_as_a_family() -> None:
    rng = np.random.default_rng(9)
    sex = ["F", "M"] * 100
    values = [0.5 + 0.3 * (s == "M") + rng.normal(0, 0.1) for s in sex]
    ages = [30.0] * 100 + [50.0] * 100
    found = summarise_groups([measured(list(sex), list(ages), values)], num_draws=200)["dice"]
    assert set(found) == {"sex", "age", "sex and age"}
    by_sex = found["sex"]
    assert (by_sex["worst"], by_sex["best"]) == ("F", "M") and by_sex["p"] == pytest.approx(1 / 201)
    assert by_sex["p_holm"] == pytest.approx(3 / 201) and found["age"]["p_holm"] > 0.05
    assert by_sex["groups"][0]["standardised"] == pytest.approx(by_sex["groups"][0]["mean"])
    assert by_sex["p_case_mix"] < 0.05 and by_sex["groups"][0]["mix_covered"] == 1


def test_nothing_known_of_patients_makes_no_comparison() -> None:
    assert summarise_groups([measured([None] * 30, [None] * 30, [0.5] * 30)]) == {}
    small = summarise_groups([measured(["F"] * 3, [None] * 3, [0.5] * 3)])["dice"]["sex"]
    assert small["gap"] is None and small["p_holm"] is None and small["p_case_mix_holm"] is None


def simulated(seed: int, effect: float) -> list[Measured]:
    """60 patients with eight masks each of six kinds, easy and hard; women lose `effect`."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(6, (60, 8), p=[0.3, 0.3, 0.2, 0.1, 0.05, 0.05])
    patient = rng.normal(0, 0.05, (60, 1))
    scores = 0.9 - 0.12 * kinds + patient + rng.normal(0, 0.1, kinds.shape)
    facts = []
    for number in range(60):
        known = {
            "sex": rng.choice(["F", "M"]),
            "age": float(rng.integers(20, 90)),
            "race": rng.choice(["A", "B", "C"], p=[0.6, 0.25, 0.15]),
        }
        facts += [tiny_facts(f"{number}/{k}", patient_id=f"p{number}", **known) for k in range(8)]
    values = scores.ravel() - effect * np.array([f.sex == "F" for f in facts])
    mix = [str(kind) for kind in kinds.ravel()]
    right = (rng.random(len(facts)) < 0.7).astype(float)
    return [Measured("dice", facts, values, mix), Measured("accuracy", facts, right, mix)]


@pytest.mark.slow
def test_a_whole_evaluation_without_bias_gives_a_false_alarm_in_five_of_a_hundred() -> None:
    """And one with a planted gap is found, by the groups it was planted in."""
    alarms, found = {"p_holm": 0, "p_case_mix_holm": 0}, 0
    for seed in range(100):
        groups = summarise_groups(simulated(seed, 0), num_draws=499, seed=seed)
        every = [cell for by_name in groups.values() for cell in by_name.values()]
        for key in alarms:
            alarms[key] += any(cell[key] <= 0.05 for cell in every)
        biased = summarise_groups(simulated(seed, 0.08), num_draws=499, seed=seed)
        planted = biased["dice"]["sex"]
        found += planted["p_case_mix_holm"] <= 0.05 and planted["worst"] == "F"
    print(f"false alarms {alarms}, planted gaps found {found} of 100")
    assert max(alarms.values()) <= 12  # the 99.9th percentile of a binomial of 100 at 0.05
    assert found >= 90

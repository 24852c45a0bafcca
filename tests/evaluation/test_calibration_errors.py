"""Calibration errors against hand-computed numbers, scikit-learn and their own null."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

from biascare.evaluation.metrics.calibration import (
    accuracy_at_coverage,
    bin_index,
    brier_parts,
    calibration_errors,
    classwise_ece,
    excess_ece,
    negative_log_likelihood,
    ranking,
    reliability_bins,
    risk_coverage,
)

ROWS = st.lists(st.tuples(st.floats(0, 1, allow_nan=False), st.booleans()), min_size=1, max_size=60)


def test_all_errors_of_four_answers_are_those_computed_by_hand() -> None:
    # Bin (0.5, 0.6]: 0.6 right. Bin (0.8, 0.9]: 0.9 right, 0.9 wrong. Bin (0, 0.1]: 0 wrong.
    errors = calibration_errors([0.6, 0.9, 0.9, 0.0], [1, 1, 0, 0])
    assert errors.num == 4
    assert errors.ece == pytest.approx((0.4 + 2 * 0.4 + 0) / 4)
    assert errors.mce == pytest.approx(0.4)
    assert errors.ace == pytest.approx((0.4 + 0.4 + 0) / 3)
    assert errors.rmsce == pytest.approx(math.sqrt((0.16 + 2 * 0.16) / 4))
    assert errors.signed == pytest.approx(2.4 / 4 - 0.5)
    assert errors.brier == pytest.approx((0.16 + 0.01 + 0.81 + 0) / 4)
    two = calibration_errors([0.2, 0.4, 0.6, 0.8], [0, 0, 1, 1], num_bins=2)
    assert two.adaptive_ece == pytest.approx((0.6 + 0.6) / 4)  # {0.2, 0.4} and {0.6, 0.8}


def test_a_bin_holds_its_upper_edge_and_the_first_holds_zero() -> None:
    tenths = np.arange(11) / 10
    assert bin_index(tenths, 10).tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert bin_index(np.array([0.3 * 3, 0.1 + 0.2]), 10).tolist() == [8, 2]


@settings(max_examples=60, deadline=None)
@given(ROWS, st.randoms())
def test_errors_do_not_depend_on_the_order_of_the_rows(rows: list, random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = (calibration_errors(*zip(*r, strict=True)) for r in (rows, shuffled))
    assert one == pytest.approx(other, abs=1e-12)
    one_curve, other_curve = (risk_coverage(*zip(*r, strict=True)) for r in (rows, shuffled))
    assert np.allclose(one_curve.risk, other_curve.risk, atol=1e-12)
    assert one.ece <= one.rmsce + 1e-12 <= one.mce + 2e-12


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_where_definitions_agree_numbers_are_those_of_scikit_learn(rows: list) -> None:
    confidence, correct = (np.array(column, float) for column in zip(*rows, strict=True))
    ours = calibration_errors(confidence, correct)
    assert ours.brier == pytest.approx(brier_score_loss(correct, confidence), abs=1e-9)
    ranks = ranking(confidence, correct)
    if len(set(correct)) < 2:
        assert ranks == {"auroc": None, "auprc": None}
    else:
        assert ranks["auroc"] == pytest.approx(roc_auc_score(correct, confidence), abs=1e-9)
        expected = average_precision_score(correct, confidence)
        assert ranks["auprc"] == pytest.approx(expected, abs=1e-9)
    inside = np.clip(confidence, 1e-6, 1 - 1e-6)
    expected = log_loss(correct, inside, labels=[0, 1])
    assert negative_log_likelihood(inside, correct) == pytest.approx(expected, abs=1e-9)
    bins = reliability_bins(confidence, correct)
    filled = bins.num > 0
    coarse = np.repeat(bins.confidence[filled], bins.num[filled])
    parts = brier_parts(confidence, correct)
    order = np.argsort(bin_index(confidence, 10), kind="stable")
    murphy = parts.reliability - parts.resolution + parts.uncertainty
    assert murphy == pytest.approx(np.mean((coarse - correct[order]) ** 2), abs=1e-9)


def test_the_mean_over_classes_of_a_table_is_that_of_its_columns() -> None:
    table, labels = [[0.7, 0.3], [0.4, 0.6]], [0, 0]
    first = calibration_errors([0.7, 0.4], [1, 1]).ece
    second = calibration_errors([0.3, 0.6], [0, 0]).ece
    assert classwise_ece(table, labels) == pytest.approx((first + second) / 2)


@pytest.mark.parametrize("num, expected", [(20, 0.155), (100, 0.071), (500, 0.031)])
def test_the_null_of_a_calibrated_model_shrinks_with_the_rows(num: int, expected: float) -> None:
    confidence = np.linspace(0.5, 1, num)
    null = excess_ece(confidence, np.ones(num), num_draws=4000)
    print(f"{num}: {null.null_mean:.4f}")
    assert null.null_mean == pytest.approx(expected, rel=0.2)
    assert null.excess == pytest.approx(null.ece - null.null_mean)
    assert null.null_mean < null.null_95 < 2 * null.null_mean


def test_a_calibrated_model_is_found_at_fault_no_more_often_than_said() -> None:
    rng, low = np.random.default_rng(3), 0
    for seed in range(200):
        confidence = rng.uniform(0.5, 1, 60)
        found = excess_ece(confidence, rng.random(60) < confidence, num_draws=200, seed=seed)
        low += found.p <= 0.05
    print(f"{low} of 200 below 0.05")
    assert low <= 19  # the 99.9th percentile of a binomial of 200 at 0.05


def test_blocks_of_draws_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    confidence, correct = np.linspace(0.1, 0.9, 50), np.arange(50) % 2
    whole = excess_ece(confidence, correct, num_draws=90)
    monkeypatch.setattr("biascare.evaluation.metrics.calibration.BLOCK", 700)
    assert excess_ece(confidence, correct, num_draws=90) == whole


def test_the_risk_of_ties_is_the_mean_over_their_orders() -> None:
    # The two at 0.5 come in either order: half an error each.
    curve = risk_coverage([0.9, 0.5, 0.5], [1, 0, 1])
    assert curve.risk.tolist() == pytest.approx([0, 0.25, 1 / 3])
    assert curve.aurc == pytest.approx((0.25 + 1 / 3) / 3)
    assert accuracy_at_coverage([0.9, 0.5, 0.5], [1, 0, 1], 2 / 3) == pytest.approx(0.75)


@pytest.mark.parametrize(
    "confidence, correct, message",
    [
        ([0.5, 1.1], [1, 0], r"\[0, 1\]"),
        ([float("nan")], [1], r"could not be parsed and count it"),
        ([0.5], [2], "correct be 0 or 1"),
        ([0.5, 0.5], [1], "one length"),
    ],
)
def test_what_is_no_confidence_is_refused(confidence: list, correct: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_errors(confidence, correct)


def test_no_rows_have_no_error_and_are_no_fault() -> None:
    empty = calibration_errors([], [])
    assert empty.num == 0 and all(math.isnan(value) for value in empty[1:])
    assert excess_ece([], []).num == 0 and math.isnan(risk_coverage([], []).aurc)

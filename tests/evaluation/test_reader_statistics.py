"""Readers with and without a model: what is published, what two ways agree on, what chance does."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from biascare.evaluation.metrics.readers import (
    against_alone,
    case_covariance,
    compare_tests,
    delong,
    hillis_test,
    jackknife,
    mean_of_readers,
    unbiased_covariance,
)

Array = NDArray[np.float64]


def right_answers(
    rng: np.random.Generator,
    effect: float = 0.0,
    num_readers: int = 5,
    num_cases: int = 100,
    reader_spread: float = 0.2,
) -> Array:
    """[2, R, N] right (1) or wrong (0), after Roe and Metz: readers, cases and their mixtures all
    vary, and test 1 is better by `effect` on the latent scale."""

    def draw(*shape: int, spread: float) -> Array:
        return rng.normal(0, spread, shape)

    cases, readers = num_cases, num_readers
    latent = (
        draw(1, readers, 1, spread=reader_spread)
        + draw(2, readers, 1, spread=reader_spread)
        + draw(1, 1, cases, spread=0.6)
        + draw(2, 1, cases, spread=0.3)
        + draw(1, readers, cases, spread=0.3)
        + draw(2, readers, cases, spread=0.7)
    )
    return (latent + np.array([0, effect])[:, None, None] > -0.5).astype(np.float64)


def compared(correct: Array):
    units = correct.reshape(-1, correct.shape[2])
    return compare_tests(np.nanmean(correct, 2), unbiased_covariance(units))


# ---------------------------------------------------------------- published numbers


def test_the_published_example_of_five_readers_gives_its_published_test() -> None:
    """Mean squares and covariances of VanDyke's 5 readers x 2 tests x 114 cases."""
    found = hillis_test(0.004796171, 0.0005510306, 0.0003395265, 0.0002358497, 2, 5)
    assert found.f == pytest.approx(4.484854, abs=5e-6)
    assert found.df1 == 1
    assert found.df2 == pytest.approx(15.06611, abs=5e-5)
    assert found.p == pytest.approx(0.05123303, abs=5e-7)
    assert found.standard_error == pytest.approx(0.0206825, abs=5e-8)


def test_published_areas_and_covariances_give_the_published_intervals() -> None:
    """The same study by the jackknife, as OR-DBM MRMC 2.51 prints it."""
    areas = np.array(
        [
            [0.91964573, 0.85877617, 0.90386473, 0.97310789, 0.82979066],
            [0.94782609, 0.90531401, 0.92173913, 0.99935588, 0.92995169],
        ]
    )
    same_test, same_reader = np.kron(np.eye(2), np.ones((5, 5))), np.tile(np.eye(5), (2, 2))
    covariance = np.where(same_test == 1, 0.00034407, 0.00023903)
    covariance = np.where(same_reader == 1, 0.00034661, covariance)
    covariance = np.where(np.eye(10) == 1, 0.00080229, covariance)
    found = compare_tests(areas, covariance)
    assert found.ms_t == pytest.approx(0.00479617, abs=5e-9)
    assert found.ms_tr == pytest.approx(0.00055103, abs=5e-9)
    assert (found.cov1, found.cov2, found.cov3) == pytest.approx(
        (0.00034661, 0.00034407, 0.00023903)
    )
    assert (found.df2, found.p) == pytest.approx((15.26, 0.0517), rel=1e-3)
    assert (found.low, found.high) == pytest.approx((-0.00036, 0.08796), abs=1e-5)
    without = mean_of_readers(areas[0], np.full((5, 5), 0.00048396))
    assert (without.standard_error, without.df) == pytest.approx((0.03317360, 12.74), rel=1e-3)
    assert (without.low, without.high) == pytest.approx((0.82522360, 0.96885048), abs=1e-5)


# ---------------------------------------------------------------- two ways


def test_delong_agrees_with_counting_pairs_by_hand() -> None:
    """Positives 3, 5, 4 against 1, 4: 5.5 of 6 pairs are in order, one tied."""
    ratings, positive = [[3.0, 5.0, 4.0, 1.0, 4.0]], [True, True, True, False, False]
    area, covariance = delong(ratings, positive)
    assert area[0] == pytest.approx((2 * 1 + 1 + 1.5) / 6)
    # V10 = .5, 1, .75 (variance .0625); V01 = 1, .5 (variance .125).
    assert covariance[0, 0] == pytest.approx(0.0625 / 3 + 0.125 / 2)


def test_delong_is_scikit_learns_area_with_about_the_jackknifes_variance() -> None:
    rng = np.random.default_rng(0)
    positive = np.arange(150) < 60
    shared = rng.normal(size=150) + positive
    ratings = np.round(shared + rng.normal(size=(4, 150)), 1)
    area, covariance = delong(ratings, positive)
    assert area == pytest.approx([roc_auc_score(positive, row) for row in ratings])
    again, by_jackknife = jackknife(
        lambda values, kept: float(roc_auc_score(positive[kept], values)), ratings
    )
    assert again == pytest.approx(area)
    print("largest difference", np.abs(by_jackknife / covariance - 1).max())
    assert by_jackknife == pytest.approx(covariance, rel=0.05)


def test_the_unbiased_covariance_of_a_mean_is_the_jackknifes() -> None:
    correct = right_answers(np.random.default_rng(1)).reshape(10, -1)
    _, by_jackknife = jackknife(lambda values, kept: float(values.mean()), correct)
    assert unbiased_covariance(correct) == pytest.approx(by_jackknife)
    assert case_covariance(correct - correct.mean(1, keepdims=True)) == pytest.approx(by_jackknife)


def test_the_standard_error_is_that_of_the_four_moments_of_gallas() -> None:
    """Readers and cases drawn at random: the variance of the mean difference by products on the
    same or another reader and the same or another case."""
    found = 0
    for seed in range(20):
        correct = right_answers(np.random.default_rng(seed), 0.4)
        difference = correct[1] - correct[0]
        num_readers, num_cases = difference.shape
        per_reader, per_case, total = difference.sum(1), difference.sum(0), difference.sum()
        same_both = (difference**2).sum()
        same_reader = (per_reader**2).sum() - same_both
        same_case = (per_case**2).sum() - same_both
        neither = total**2 - same_both - same_reader - same_case
        pairs = num_readers * num_cases
        m = [
            same_both / pairs,
            same_reader / (pairs * (num_cases - 1)),
            same_case / (pairs * (num_readers - 1)),
            neither / (pairs * (num_cases - 1) * (num_readers - 1)),
        ]
        variance = (
            m[0] + (num_cases - 1) * m[1] + (num_readers - 1) * m[2]
            + (num_readers - 1) * (num_cases - 1) * m[3]
        ) / pairs - m[3]  # fmt: skip
        test = compared(correct)
        if test.cov2 > test.cov3:  # where it is less, the analysis takes 0 on purpose
            assert test.standard_error**2 == pytest.approx(variance)
            found += 1
    assert found > 10


def test_two_tests_are_the_readers_mean_difference() -> None:
    correct = right_answers(np.random.default_rng(3), 0.4)
    test = compared(correct)
    difference = correct[1] - correct[0]
    mean = mean_of_readers(difference.mean(1), unbiased_covariance(difference))
    assert (mean.value, mean.standard_error) == pytest.approx(
        (test.difference, test.standard_error)
    )
    assert (mean.df, mean.p, mean.low) == pytest.approx((test.df2, test.p, test.low))


def test_an_area_does_not_change_under_an_increasing_map_or_the_order_of_cases() -> None:
    rng = np.random.default_rng(4)
    positive, ratings = np.arange(40) % 3 == 0, rng.integers(0, 5, (3, 40)).astype(float)
    area, covariance = delong(ratings, positive)
    order = rng.permutation(40)
    again, other = delong(np.exp(ratings)[:, order], positive[order])
    assert again == pytest.approx(area) and other == pytest.approx(covariance)


# ---------------------------------------------------------------- chance


def test_without_an_effect_about_five_of_a_hundred_studies_find_one() -> None:
    rng = np.random.default_rng(0)
    found = [compared(right_answers(rng, 0.0)).p for _ in range(600)]
    share = np.mean([p is not None and p < 0.05 for p in found])
    print("false alarms", share)
    assert 0.02 <= share <= 0.075


def test_intervals_cover_the_true_difference_in_about_95_of_100_studies() -> None:
    rng, effect = np.random.default_rng(1), 0.4
    spread = np.sqrt(2 * 0.2**2 + 0.6**2 + 0.3**2 + 0.3**2 + 0.7**2)
    true = norm.cdf((0.5 + effect) / spread) - norm.cdf(0.5 / spread)
    studies = [compared(right_answers(rng, effect)) for _ in range(600)]
    covered = np.mean([study.low <= true <= study.high for study in studies])
    print("covered", covered, "of", true)
    assert 0.925 <= covered <= 0.985


def test_the_chance_of_a_false_alarm_stays_where_readers_skip_cases() -> None:
    rng = np.random.default_rng(2)
    found = []
    for _ in range(400):
        correct = right_answers(rng, 0.0)
        correct[rng.random(correct.shape) < 0.3] = np.nan
        found.append(compared(correct).p)
    share = np.mean([p is not None and p < 0.05 for p in found])
    print("false alarms", share)
    assert share <= 0.075


# ---------------------------------------------------------------- cases that were not read


def test_covariances_with_missing_cells_are_right_on_average() -> None:
    """Two units that share 30 of 50 cases each: the covariance of their means over repeated studies
    is what the estimates say on average."""
    rng = np.random.default_rng(5)
    means, products, sums = [], [], []
    for _ in range(4000):
        shared = rng.normal(size=70)
        values = shared + rng.normal(size=(2, 70))
        values[0, :20] = np.nan
        values[1, 50:] = np.nan
        means.append(np.nanmean(values, 1))
        products.append(case_covariance(values - np.nanmean(values, 1, keepdims=True))[0, 1])
        sums.append(unbiased_covariance(values)[0, 1])
    true = 30 / (50 * 50)
    assert np.cov(np.array(means).T)[0, 1] == pytest.approx(true, rel=0.1)
    assert np.mean(products) == pytest.approx(true, rel=0.05)
    assert np.mean(sums) == pytest.approx(true, rel=0.05)


def test_readers_of_different_cases_share_no_error() -> None:
    values = np.array([[1.0, 0, 1, np.nan, np.nan, np.nan], [np.nan, np.nan, np.nan, 0, 1, 1]])
    assert unbiased_covariance(values)[0, 1] == 0
    assert case_covariance(values - np.nanmean(values, 1, keepdims=True))[0, 1] == 0


def test_a_reader_without_cases_of_a_class_is_refused_with_what_to_do() -> None:
    ratings = np.array([[1.0, 2, 3, 4], [1.0, 2, 3, np.nan]])
    with pytest.raises(ValueError, match=r"unit 2 has 1 cases of a class.*leave the reader out"):
        delong(ratings, np.array([False, False, True, True]))
    with pytest.raises(ValueError, match=r"reader 2 has no estimate in test 1.*leave that reader"):
        compare_tests([[0.5, np.nan], [0.5, 0.6]], np.eye(4))
    with pytest.raises(ValueError, match=r"got 2 tests and 1 readers.*of that reader alone"):
        compare_tests([[0.5], [0.6]], np.eye(2))


# ---------------------------------------------------------------- edges


def test_readers_who_all_change_alike_on_no_case_are_not_tested() -> None:
    correct = np.ones((2, 3, 10))
    found = compared(correct)
    assert (found.f, found.p, found.difference) == (None, None, 0)


def test_readers_who_all_gain_the_same_leave_the_cases_as_the_only_chance() -> None:
    rng = np.random.default_rng(6)
    before = (rng.random(80) < 0.5).astype(float)
    after = np.where(np.arange(80) < 10, 1.0, before)
    found = compared(np.array([[before] * 3, [after] * 3]))
    assert found.ms_tr == 0 and np.isinf(found.df2)
    assert found.p is not None and 0 < found.p < 0.1
    assert found.low < found.difference < found.high


def test_patients_with_many_images_count_once_by_the_jackknife() -> None:
    """Every image four times: leaving out patients gives the interval of the images once."""
    correct = right_answers(np.random.default_rng(7))[0]
    once = jackknife(lambda values, kept: float(values.mean()), correct)[1]
    patients = np.repeat(np.arange(correct.shape[1]), 4)
    often = np.repeat(correct, 4, axis=1)
    assert jackknife(lambda v, k: float(v.mean()), often, patients)[1] == pytest.approx(once)
    assert unbiased_covariance(often)[0, 0] < once[0, 0] / 3


def test_a_model_alone_is_compared_with_readers_on_the_same_cases() -> None:
    rng = np.random.default_rng(8)
    correct = right_answers(rng)[0]
    model = (rng.random(correct.shape[1]) < 0.9).astype(float)
    covariance = unbiased_covariance(np.vstack([correct, model]))
    found = against_alone(correct.mean(1), float(model.mean()), covariance)
    direct = correct - model
    expected = mean_of_readers(direct.mean(1), unbiased_covariance(direct))
    assert found == pytest.approx(expected)


def test_a_reader_like_the_model_differs_from_it_by_chance_alone() -> None:
    rng, alarms = np.random.default_rng(9), 0
    for _ in range(300):
        drawn = right_answers(rng, num_readers=5, reader_spread=0.0)[0]
        readers, model = drawn[:4], drawn[4]
        covariance = unbiased_covariance(drawn)
        p = against_alone(readers.mean(1), float(model.mean()), covariance).p
        alarms += p is not None and p < 0.05
    print("false alarms", alarms / 300)
    assert alarms / 300 <= 0.08

"""Multi-reader multi-case statistics: do readers with a model do better, beyond these readers and
these cases?

    correct = ...                                      # [T, R, N] 1, 0, NaN where not read
    found = compare_tests(correct.mean(2), unbiased_covariance(correct.reshape(T * R, N)))
    found.difference, found.low, found.high, found.p
    auc, covariance = delong(ratings, positive)        # [U, N], [N] bool -> [U], [U, U]
    jackknife(figure, columns, patients)               # any figure of merit, patients left out

T tests (without and with the model), R readers, N cases; a unit is a reader in a test, and all of
its cases are one row of U = T * R. The analysis is that of Obuchowski and Rockette (1995) with the
degrees of freedom of Hillis (2007): readers and cases are both samples, so an interval speaks of
readers and cases that were not in the study. Every reader must have read in every test, but not
every case: a covariance is estimated from the cases that two units share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chi2, f, rankdata, t

Array = NDArray[np.float64]
LEVEL = 0.95


class ReaderMean(NamedTuple):
    """A mean over readers, or of readers' differences, with its interval."""

    value: float
    standard_error: float
    df: float  # infinite where readers do not differ
    low: float  # 95 % interval
    high: float
    p: float | None  # of a true value of 0; None where nothing varies


class ReaderComparison(NamedTuple):
    """Obuchowski and Rockette's analysis of T tests and R readers."""

    means: list[float]  # [T]
    ms_t: float  # mean square of tests
    ms_tr: float  # of tests by readers
    variance: float  # of one unit's estimate, averaged
    cov1: float  # same reader, another test
    cov2: float  # same test, another reader
    cov3: float  # another reader and another test
    f: float | None  # None where neither readers nor cases vary: nothing can be tested
    df1: float
    df2: float
    p: float | None
    standard_error: float  # of a difference of two tests
    difference: float  # of the last test and the first
    low: float  # 95 % interval
    high: float


class Hillis(NamedTuple):
    """The test that all tests are equal."""

    f: float | None
    df1: float
    df2: float
    p: float | None
    standard_error: float


# ---------------------------------------------------------------- the test


def hillis_test(
    ms_t: float, ms_tr: float, cov2: float, cov3: float, num_tests: int, num_readers: int
) -> Hillis:
    """From mean squares and covariances, as publications print them."""
    cases = num_readers * max(cov2 - cov3, 0.0)
    error, df1 = ms_tr + cases, float(num_tests - 1)
    # All readers changed by the same: their own share of the error, which limits the degrees of
    # freedom, is then 0.
    df2 = error**2 / (ms_tr**2 / (df1 * (num_readers - 1))) if ms_tr > 0 else np.inf
    if error <= 0:
        return Hillis(None, df1, float("inf"), None, 0.0)
    ratio = ms_t / error
    p = f.sf(ratio, df1, df2) if np.isfinite(df2) else chi2.sf(ratio * df1, df1)
    return Hillis(ratio, df1, float(df2), float(p), float(np.sqrt(2 * error / num_readers)))


def compare_tests(estimates: ArrayLike, covariance: Array) -> ReaderComparison:
    """`estimates` [T, R] of a figure of merit; `covariance` [T * R, T * R] of their errors that
    come from the cases, units in the order of `estimates.ravel()`.

    Raises ValueError for fewer than two tests or readers, and for a reader without an estimate.
    """
    found = np.asarray(estimates, np.float64)
    num_tests, num_readers = found.shape
    if num_tests < 2 or num_readers < 2:
        raise ValueError(
            f"got {num_tests} tests and {num_readers} readers, expected at least 2 of each: with "
            "one reader there is no spread of readers to compare with; compare the tests of that "
            "reader alone, or add readers"
        )
    _check_complete(found)
    means, readers = found.mean(1), found.mean(0)
    ms_t = num_readers * float(((means - found.mean()) ** 2).sum()) / (num_tests - 1)
    rest = found - means[:, None] - readers + found.mean()
    # Rounding leaves 1e-34 where all readers changed by the same, and would be taken for a spread.
    rest[np.abs(rest) < 1e-12] = 0.0
    ms_tr = float((rest**2).sum()) / ((num_tests - 1) * (num_readers - 1))
    table = covariance.reshape(num_tests, num_readers, num_tests, num_readers)
    same_test = np.eye(num_tests, dtype=bool)[:, None, :, None]
    same_reader = np.eye(num_readers, dtype=bool)[None, :, None, :]

    def mean_of(chosen: NDArray[np.bool_]) -> float:
        return float(table[np.broadcast_to(chosen, table.shape)].mean())

    cov2, cov3 = mean_of(same_test & ~same_reader), mean_of(~same_test & ~same_reader)
    test = hillis_test(ms_t, ms_tr, cov2, cov3, num_tests, num_readers)
    difference = float(means[-1] - means[0])
    reach = float(t.ppf((1 + LEVEL) / 2, test.df2)) * test.standard_error
    return ReaderComparison(
        means=[float(mean) for mean in means],
        ms_t=ms_t,
        ms_tr=ms_tr,
        variance=mean_of(same_test & same_reader),
        cov1=mean_of(~same_test & same_reader),
        cov2=cov2,
        cov3=cov3,
        f=test.f,
        df1=test.df1,
        df2=test.df2,
        p=test.p,
        standard_error=test.standard_error,
        difference=difference,
        low=difference - reach,
        high=difference + reach,
    )


def mean_of_readers(estimates: ArrayLike, covariance: Array) -> ReaderMean:
    """The mean of `estimates` [R] in one test, for readers and cases like these; `covariance`
    [R, R]. Raises ValueError for fewer than two readers."""
    found = np.asarray(estimates, np.float64)
    num = len(found)
    if num < 2:
        raise ValueError(f"got {num} readers, expected at least 2 for a mean over readers")
    _check_complete(found[None])
    between = float(found.var(ddof=1))
    between = between if between > 1e-24 else 0.0
    shared = float(covariance[~np.eye(num, dtype=bool)].mean())
    error = between + num * max(shared, 0.0)
    df = float(error**2 / (between**2 / (num - 1))) if between else float("inf")
    value, deviation = float(found.mean()), float(np.sqrt(error / num))
    reach = float(t.ppf((1 + LEVEL) / 2, df)) * deviation
    p = 2 * float(t.sf(abs(value) / deviation, df)) if deviation else None
    return ReaderMean(value, deviation, df, value - reach, value + reach, p)


def against_alone(estimates: ArrayLike, alone: float, covariance: Array) -> ReaderMean:
    """Readers' `estimates` [R] less that of a model alone on the same cases.

    `covariance` [R + 1, R + 1]; the model stands last. The model is one and fixed: only readers and
    cases are samples, so each reader's difference is averaged like an estimate of its own.
    """
    own, with_model = covariance[:-1, :-1], covariance[:-1, -1]
    of_differences = own - with_model[:, None] - with_model[None, :] + covariance[-1, -1]
    return mean_of_readers(np.asarray(estimates, np.float64) - alone, of_differences)


def _check_complete(estimates: Array) -> None:
    if not np.isnan(estimates).any():
        return
    test, reader = (int(place[0]) for place in np.nonzero(np.isnan(estimates)))
    raise ValueError(
        f"reader {reader + 1} has no estimate in test {test + 1}: every reader must have read some "
        "cases in every test (with both classes, for an AUC); leave that reader out of the "
        "comparison, or let the missing part be read"
    )


# ---------------------------------------------------------------- covariances


def case_covariance(residuals: Array) -> Array:
    """[U, U] covariance of means over cases from `residuals` [U, N], each less the mean of its own
    row, NaN where a unit did not read the case."""
    read = ~np.isnan(residuals)
    values = np.where(read, residuals, 0.0)
    num = read.sum(1).astype(np.float64)
    if (num < 2).any():
        unit = int(np.flatnonzero(num < 2)[0])
        raise ValueError(
            f"unit {unit + 1} has {int(num[unit])} cases of a class, expected at least 2: a "
            "variance needs two; read more cases or leave the reader out"
        )
    pairs = np.outer(num, num)
    shared = read.astype(np.float64) @ read.T
    # What the sum of products of residuals falls short by, since each is taken from its own mean;
    # with all cases read it is the familiar (n - 1) / n.
    short = 1 - 1 / num[:, None] - 1 / num[None, :] + shared / pairs
    products = values @ values.T
    # Two units that share no case have no common error.
    return np.divide(products / pairs, short, out=np.zeros_like(pairs), where=shared > 0)


def delong(ratings: ArrayLike, positive: ArrayLike) -> tuple[Array, Array]:
    """(AUC [U], its covariance [U, U]) of `ratings` [U, N], NaN where not read; `positive` [N].

    DeLong, DeLong and Clarke-Pearson (1988) by midranks (Sun and Xu, 2014). Ties count half. An AUC
    is NaN, and an error is raised, where a unit has fewer than two cases of a class.
    """
    found, is_positive = np.asarray(ratings, np.float64), np.asarray(positive, bool)
    places = np.full(found.shape, np.nan)
    for row, out in zip(found, places, strict=True):
        read = ~np.isnan(row)
        up, down = read & is_positive, read & ~is_positive
        ranks = np.full(len(row), np.nan)
        ranks[read] = rankdata(row[read])
        # A case's rank among all less its rank among its own class counts the other class below it.
        out[up] = (ranks[up] - rankdata(row[up])) / max(down.sum(), 1)
        out[down] = 1 - (ranks[down] - rankdata(row[down])) / max(up.sum(), 1)
    classes = (places[:, is_positive], places[:, ~is_positive])
    # First the counts, in an error of their own, before a mean over nothing warns.
    covariance = sum(
        (case_covariance(part - _row_means(part)[:, None]) for part in classes),
        start=np.zeros((len(found), len(found))),
    )
    return _row_means(classes[0]), covariance


def unbiased_covariance(values: ArrayLike) -> Array:
    """[U, U] covariance of the means of `values` [U, N] (1 and 0 for right and wrong answers), NaN
    where not read.

    Gallas, Pennello and Meyers (2007): a product on the same case less the mean product on two
    cases, both unbiased whatever the design.
    """
    found = np.asarray(values, np.float64)
    read = ~np.isnan(found)
    filled, num = np.where(read, found, 0.0), read.sum(1).astype(np.float64)
    shared, pairs = read.astype(np.float64) @ read.T, np.outer(num, num)
    if (num < 2).any():
        raise ValueError(
            f"unit {int(np.flatnonzero(num < 2)[0]) + 1} has fewer than 2 cases: a variance needs "
            "two; read more cases or leave the reader out"
        )
    same_case = filled @ filled.T
    two_cases = np.outer(filled.sum(1), filled.sum(1)) - same_case
    mean_same = np.divide(same_case, shared, out=np.zeros_like(pairs), where=shared > 0)
    mean_two = two_cases / (pairs - shared)
    return shared / pairs * (mean_same - mean_two)


def jackknife(
    figure: Callable[[Array, NDArray[np.int64]], float],
    values: ArrayLike,
    clusters: NDArray[np.int64] | None = None,
) -> tuple[Array, Array]:
    """(estimates [U], covariance [U, U]) of any figure of merit.

    `figure(values of the cases kept [n], their numbers [n])` -> one number. `values` [U, N], NaN
    where not read. `clusters` [N]: whole patients are left out instead of single cases, where a
    patient has several.
    """
    found = np.asarray(values, np.float64)
    groups = np.arange(found.shape[1]) if clusters is None else clusters
    residuals = np.full((len(found), int(groups.max()) + 1), np.nan)
    estimates = np.empty(len(found))
    for unit, row in enumerate(found):
        numbers = np.flatnonzero(~np.isnan(row))
        estimates[unit] = figure(row[numbers], numbers)
        left_out = np.unique(groups[numbers])
        without = [numbers[groups[numbers] != group] for group in left_out]
        each = np.array([figure(row[kept], kept) for kept in without])
        residuals[unit, left_out] = (len(each) - 1) * (each.mean() - each)
    return estimates, case_covariance(residuals)


def _row_means(values: Array) -> Array:
    read = ~np.isnan(values)
    sums, num = np.where(read, values, 0.0).sum(1), read.sum(1)
    return np.divide(sums, num, out=np.full(len(values), np.nan), where=num > 0)

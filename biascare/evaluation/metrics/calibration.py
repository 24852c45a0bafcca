"""How well confidences say what they claim: calibration errors, their null, selective prediction.

    errors = calibration_errors(confidence, correct)      # errors.ece, errors.mce, ...
    null = excess_ece(confidence, correct)                # the same with what chance alone gives
    curve = risk_coverage(confidence, correct)

`confidence` [N] in [0, 1] is the stated probability of being right, `correct` [N] whether it was.
All errors share one binning: bins are (lo, hi], and 0 belongs to the first. A calibration error is
never 0 on finite data, so each comes with its value under perfect calibration.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from biascare.evaluation.metrics.bootstrap import p_value

NUM_BINS = 10
BLOCK = 4_000_000
"""Random numbers held at a time."""


class ReliabilityBins(NamedTuple):
    """A reliability diagram, [B] each; means of empty bins are NaN."""

    num: NDArray[np.int64]
    confidence: NDArray[np.float64]  # mean
    accuracy: NDArray[np.float64]


class CalibrationErrors(NamedTuple):
    """All in [0, 1] but `signed`; NaN without any row."""

    num: int
    ece: float  # expected: gaps weighted by the rows of their bins
    mce: float  # maximum: the largest gap
    ace: float  # average: the mean gap over bins that have rows
    adaptive_ece: float  # expected, over bins of equal numbers of rows
    rmsce: float  # root of the weighted mean of squared gaps
    signed: float  # mean confidence minus accuracy: above 0 is overconfident
    brier: float  # mean squared difference


class ExcessECE(NamedTuple):
    """An ECE beside what a perfectly calibrated model of the same confidences would show."""

    num: int
    ece: float
    null_mean: float
    null_95: float  # 95th percentile
    excess: float  # ece - null_mean
    p: float  # share of calibrated draws with an ECE at least as large, the data itself counted


class BrierParts(NamedTuple):
    """Murphy's decomposition over the bins: brier = reliability - resolution + uncertainty, up to
    the spread of confidences inside a bin."""

    reliability: float
    resolution: float
    uncertainty: float


class RiskCoverage(NamedTuple):
    """What is wrong among the most confident, as more are taken; [N] each."""

    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]
    aurc: float  # mean risk over all coverages


def _checked(
    confidence: ArrayLike, correct: ArrayLike, *, scores: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    found, right = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if found.shape != right.shape or found.ndim != 1:
        raise ValueError(
            f"confidence {found.shape} and correct {right.shape} must be of one length"
        )
    # NaN fails too: an unparsed confidence is left out by the caller, and counted there.
    known = (right >= 0) & (right <= 1) if scores else np.isin(right, (0, 1))
    if not ((found >= 0) & (found <= 1)).all() or not known.all():
        raise ValueError(
            "confidences must lie in [0, 1] and correct be 0 or 1; leave out what could not be "
            "parsed and count it"
        )
    return found, right


def bin_index(confidence: NDArray[np.float64], num_bins: int) -> NDArray[np.int64]:
    """[N] bin of each confidence: (lo, hi], 0 in the first."""
    # A product such as 0.3 * 10 may end just above its whole number, and would open another bin.
    place = np.ceil(np.round(confidence * num_bins, 12)).astype(np.int64) - 1
    return np.clip(place, 0, num_bins - 1)


def _bin_means(
    index: NDArray[np.int64], values: NDArray[np.float64], num_bins: int
) -> NDArray[np.float64]:
    num = np.bincount(index, minlength=num_bins)
    sums = np.bincount(index, values, minlength=num_bins)
    return np.divide(sums, num, out=np.full(num_bins, np.nan), where=num > 0)


def reliability_bins(
    confidence: ArrayLike, correct: ArrayLike, num_bins: int = NUM_BINS
) -> ReliabilityBins:
    """The bins that every error here is computed from; a score in [0, 1] may stand for `correct`,
    and the "accuracy" is its mean."""
    found, right = _checked(confidence, correct, scores=True)
    index = bin_index(found, num_bins)
    return ReliabilityBins(
        num=np.bincount(index, minlength=num_bins),
        confidence=_bin_means(index, found, num_bins),
        accuracy=_bin_means(index, right, num_bins),
    )


def calibration_errors(
    confidence: ArrayLike, correct: ArrayLike, num_bins: int = NUM_BINS
) -> CalibrationErrors:
    """All errors at once.

    Raises ValueError for lengths that differ, confidences outside [0, 1] and NaN.
    """
    found, right = _checked(confidence, correct)
    if not len(found):
        return CalibrationErrors(0, *[float("nan")] * 7)
    bins = reliability_bins(found, right, num_bins)
    filled = bins.num > 0
    gap = np.abs(bins.accuracy - bins.confidence)[filled]
    weight = bins.num[filled] / len(found)
    return CalibrationErrors(
        num=len(found),
        ece=float(weight @ gap),
        mce=float(gap.max()),
        ace=float(gap.mean()),
        adaptive_ece=_adaptive_ece(found, right, num_bins),
        rmsce=float(np.sqrt(weight @ gap**2)),
        signed=float(found.mean() - right.mean()),
        brier=float(np.mean((found - right) ** 2)),
    )


def _adaptive_ece(
    confidence: NDArray[np.float64], correct: NDArray[np.float64], num_bins: int
) -> float:
    # Equal confidences stay in one bin, or the result would depend on the order of the rows.
    _, inverse, num = np.unique(confidence, return_inverse=True, return_counts=True)
    middle = np.cumsum(num) - num / 2
    index = np.minimum((middle * num_bins / len(confidence)).astype(np.int64), num_bins - 1)[
        inverse
    ]
    gap = np.bincount(index, correct - confidence, minlength=num_bins)
    return float(np.abs(gap).sum() / len(confidence))


def excess_ece(
    confidence: ArrayLike,
    correct: ArrayLike,
    num_bins: int = NUM_BINS,
    num_draws: int = 1000,
    seed: int = 0,
) -> ExcessECE:
    """An ECE with its null: the same confidences, right as often as each of them says
    (consistency resampling).

    A calibrated model shows .155 on 20 rows and .031 on 500, so an ECE alone says little.
    """
    found, right = _checked(confidence, correct)
    if not len(found):
        return ExcessECE(0, *[float("nan")] * 5)
    ece = calibration_errors(found, right, num_bins).ece
    index = bin_index(found, num_bins)
    claimed = np.bincount(index, found, minlength=num_bins)
    # Rows sorted by bin once, so that a draw sums each bin in one pass.
    order = np.argsort(index, kind="stable")
    starts = np.flatnonzero(np.diff(index[order], prepend=-1))
    filled = index[order][starts]
    rng, drawn = np.random.default_rng(seed), []
    block = max(1, BLOCK // len(found))
    for first in range(0, num_draws, block):
        size = (min(block, num_draws - first), len(found))
        hits = np.add.reduceat(rng.random(size) < found[order], starts, axis=1, dtype=np.float64)
        drawn.append(np.abs(hits - claimed[filled]).sum(1) / len(found))
    return _beside(len(found), ece, np.concatenate(drawn))


def _beside(num: int, ece: float, null: NDArray[np.float64]) -> ExcessECE:
    """An ECE beside the draws of its null."""
    return ExcessECE(
        num=num,
        ece=ece,
        null_mean=float(null.mean()),
        null_95=float(np.quantile(null, 0.95)),
        excess=float(ece - null.mean()),
        p=p_value(ece, null),
    )


def excess_score_error(
    predicted: ArrayLike,
    score: ArrayLike,
    clusters: NDArray[np.int64],
    num_bins: int = NUM_BINS,
    num_draws: int = 1000,
    seed: int = 0,
) -> ExcessECE:
    """The ECE of a `predicted` score [N] in [0, 1], such as a Dice, against the `score` itself.

    A score is no coin: what a calibrated prediction would show is drawn by turning the sign of
    each patient's differences (`clusters` [N]), which are as often above 0 as below where the
    prediction is right on average.
    """
    found, real = np.asarray(predicted, np.float64), np.asarray(score, np.float64)
    if not len(found):
        return ExcessECE(0, *[float("nan")] * 5)
    index, differences = bin_index(found, num_bins), real - found
    gaps = np.abs(np.bincount(index, differences, num_bins))
    ece = float(gaps.sum() / len(found))
    rng, num_clusters = np.random.default_rng(seed), int(clusters.max()) + 1
    null = np.empty(num_draws)
    for draw in range(num_draws):
        sign = rng.choice((-1.0, 1.0), num_clusters)[clusters]
        null[draw] = np.abs(np.bincount(index, sign * differences, num_bins)).sum() / len(found)
    return _beside(len(found), ece, null)


def classwise_ece(probabilities: ArrayLike, labels: ArrayLike, num_bins: int = NUM_BINS) -> float:
    """Mean over classes of the ECE of each class's probability; `probabilities` [N, K], `labels`
    [N] of class numbers."""
    table, truth = np.asarray(probabilities, np.float64), np.asarray(labels)
    each = [
        calibration_errors(table[:, k], truth == k, num_bins).ece for k in range(table.shape[1])
    ]
    return float(np.mean(each))


def brier_parts(confidence: ArrayLike, correct: ArrayLike, num_bins: int = NUM_BINS) -> BrierParts:
    """Reliability (lower is better), resolution (higher is better), uncertainty (of the data)."""
    _, right = _checked(confidence, correct)
    bins = reliability_bins(confidence, correct, num_bins)
    filled, base = bins.num > 0, right.mean()
    weight = bins.num[filled] / len(right)
    return BrierParts(
        reliability=float(weight @ (bins.confidence - bins.accuracy)[filled] ** 2),
        resolution=float(weight @ (bins.accuracy[filled] - base) ** 2),
        uncertainty=float(base * (1 - base)),
    )


def negative_log_likelihood(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Mean -log of the probability given to what happened; infinite where it was 0."""
    found, right = _checked(confidence, correct)
    with np.errstate(divide="ignore"):
        return float(-np.log(np.where(right == 1, found, 1 - found)).mean())


def ranking(confidence: ArrayLike, correct: ArrayLike) -> dict[str, float | None]:
    """`auroc` and `auprc` of telling right from wrong; None where all are of one kind."""
    found, right = _checked(confidence, correct)
    if len(np.unique(right)) < 2:
        return {"auroc": None, "auprc": None}
    return {
        "auroc": float(roc_auc_score(right, found)),
        "auprc": float(average_precision_score(right, found)),
    }


def risk_coverage(confidence: ArrayLike, correct: ArrayLike) -> RiskCoverage:
    """The curve of selective prediction. Rows of equal confidence come in random order, and the
    curve shows the mean over those orders: it does not depend on the order of the rows."""
    found, right = _checked(confidence, correct)
    order = np.argsort(-found, kind="stable")
    _, first, num = np.unique(-found[order], return_index=True, return_counts=True)
    # The share of errors of its tie stands in for each row's own.
    share = np.add.reduceat(1 - right[order], first) / num if len(found) else np.zeros(0)
    taken = np.arange(1, len(found) + 1)
    risk = np.cumsum(np.repeat(share, num)) / taken
    return RiskCoverage(
        coverage=taken / max(len(found), 1),
        risk=risk,
        aurc=float(risk.mean()) if len(found) else float("nan"),
    )


def accuracy_at_coverage(confidence: ArrayLike, correct: ArrayLike, coverage: float) -> float:
    """Accuracy of the most confident share `coverage` of the rows, at least one of them."""
    curve = risk_coverage(confidence, correct)
    num = max(1, round(coverage * len(curve.risk)))
    return float(1 - curve.risk[num - 1]) if len(curve.risk) else float("nan")

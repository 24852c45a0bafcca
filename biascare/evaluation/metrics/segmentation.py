"""Segmentation rows to numbers.

    rows = [...]                       # from biascare.evaluation.runner
    table = summarise_segmentation(rows)

Scores are per mask at native size. Means are given over masks and, so that frequent targets do not
hide rare ones, over targets.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score

FAILURE_DICE = 0.5
"""A mask below this Dice counts as failed when uncertainties are asked to find failures."""


def dice_score(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Dice of two [H, W] binary masks; 1 if both are empty."""
    prediction, truth = prediction.astype(bool), truth.astype(bool)
    size = int(prediction.sum()) + int(truth.sum())
    return 2 * int((prediction & truth).sum()) / size if size else 1.0


def disc(height: int, width: int, center: Sequence[float], area: float) -> np.ndarray:
    """[H, W] bool disc of `area` pixels around `center` (x, y): the trivial answer to a click."""
    y, x = np.ogrid[:height, :width]
    return (x - center[0]) ** 2 + (y - center[1]) ** 2 <= area / np.pi


DISC_SHARES = tuple(float(share) for share in np.geomspace(1e-3, 0.5, 12))
"""Sizes tried for the disc baseline, as shares of the image."""


class DiscBaseline(NamedTuple):
    """The trivial answers to a click, sized on training masks: a disc as a share of the image."""

    share: float  # the one size that scores best over all targets
    by_target: dict[str, float]  # mean share of each target: needs to be told what is shown


def fit_disc(
    masks: Iterable[tuple[str, np.ndarray, Sequence[float]]],
) -> DiscBaseline:
    """Size the discs on (target, [H, W] mask, click x and y) of the training records.

    Raises ValueError without any mask.
    """
    scores: list[list[float]] = []
    areas: dict[str, list[float]] = defaultdict(list)
    for target, mask, click in masks:
        height, width = mask.shape
        guesses = (disc(height, width, click, s * mask.size) for s in DISC_SHARES)
        scores.append([dice_score(guess, mask) for guess in guesses])
        areas[target].append(float(mask.mean()))
    if not scores:
        raise ValueError(
            "the disc baseline needs training masks; --train names folders without any"
        )
    best = int(np.mean(scores, axis=0).argmax())
    return DiscBaseline(
        share=DISC_SHARES[best],
        by_target={target: float(np.mean(values)) for target, values in areas.items()},
    )


def mean_by(rows: Iterable[dict[str, Any]], key: str, metric: str) -> dict[str, dict[str, float]]:
    """{group: {"num", "mean"}} of a mask metric; rows without the attribute form "missing"."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        value = row["attributes"].get(key) if key in row["attributes"] else row.get(key)
        groups["missing" if value is None else str(value)].append(row["mask_metrics"][metric])
    return {
        name: {"num": len(values), "mean": float(np.mean(values))}
        for name, values in sorted(groups.items())
    }


def failure_auroc(rows: Sequence[dict[str, Any]], uncertainty: str) -> float | None:
    """How well an uncertainty ranks failed masks before good ones; None without both kinds."""
    failed = [row["mask_metrics"]["dice"] < FAILURE_DICE for row in rows]
    if len(set(failed)) < 2:
        return None
    return float(roc_auc_score(failed, [row["uncertainty"][uncertainty] for row in rows]))


def summarise_segmentation(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over masks and targets, by group, and how uncertainty ranks failures."""
    if not rows:
        return {"num_masks": 0}
    summary: dict[str, Any] = {"num_masks": len(rows)}
    for metric in rows[0]["mask_metrics"]:
        by_target = mean_by(rows, "target", metric)
        summary[metric] = {
            "mean": float(np.mean([row["mask_metrics"][metric] for row in rows])),
            "mean_over_targets": float(np.mean([v["mean"] for v in by_target.values()])),
            "by_target": by_target,
            "by_group": mean_by(rows, "group", metric),
            "by_modality": mean_by(rows, "modality", metric),
        }
    for name in rows[0]["uncertainty"]:
        summary[name] = {
            "mean": float(np.mean([row["uncertainty"][name] for row in rows])),
            "failure_auroc": failure_auroc(rows, name),
        }
    return summary

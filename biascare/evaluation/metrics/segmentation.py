"""Mask cases to numbers.

    scores = [mask_scores(case, header) for case in cases]
    table = summarise_segmentation(cases, scores)

    volumes = summarise_volumes(cases, header)      # slices of one volume as one mask, in mm

Scores are per mask at native size, and at 256 x 256 beside them. Means are given over masks; over
images, so that one of many targets counts once; and over targets, so that frequent ones do not hide
rare ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]
from scipy.integrate import trapezoid  # type: ignore[import-untyped, unused-ignore]

from biascare.evaluation.cases import Header, MaskCase
from biascare.records import decode_mask, mask_runs

NOC_THRESHOLDS = (0.85, 0.90)
"""IoU that clicks are counted to."""

PIXEL_BANDS = ((32**2, "under 32 x 32"), (96**2, "32 x 32 to 96 x 96"))
"""First area of the truth, in native pixels, that is no longer in the band; those of COCO."""

SHARE_BANDS = ((0.001, "under 0.1 %"), (0.01, "0.1 to 1 %"), (0.1, "1 to 10 %"))
"""The same as a share of the image."""

LARGEST = "larger"

PROTOCOL_SIZE = 256
"""Side in pixels at which IMed-361M's protocol compares masks."""


def _band(size: float, bands: Sequence[tuple[float, str]]) -> str:
    return next((name for end, name in bands if size < end), LARGEST)


def mask_area(code: str, height: int, width: int) -> int:
    """Pixels of a COCO run-length code, which is not decoded for it."""
    return int(mask_runs(code.encode("ascii"), height, width)[1::2].sum())


def _truth_area(case: MaskCase) -> int:
    return mask_area(case.truth, case.height, case.width)


GROUPINGS: dict[str, Callable[[MaskCase], str | None]] = {
    "target": lambda case: case.facts.target,
    "prevalence": lambda case: case.facts.prevalence,
    "modality": lambda case: case.facts.modality,
    "pixels": lambda case: _band(_truth_area(case), PIXEL_BANDS),
    "share": lambda case: _band(_truth_area(case) / (case.height * case.width), SHARE_BANDS),
}
"""What means are given by. Size counts twice: few pixels are hard to draw, and a small share of the
image is hard to find."""


def resized_nearest(mask: np.ndarray, side: int) -> np.ndarray:
    """[H, W] -> [side, side]: each pixel takes the one that its centre lies on, as the protocols
    that score at one size do. A structure between the centres vanishes."""
    rows, columns = (((np.arange(side) + 0.5) * n / side).astype(int) for n in mask.shape)
    return np.asarray(mask[rows[:, None], columns])


def dice_score(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Dice of two [H, W] binary masks; 1 if both are empty."""
    prediction, truth = prediction.astype(bool), truth.astype(bool)
    # Both empty agree completely; only one empty is a complete failure, whatever its size.
    size = int(prediction.sum()) + int(truth.sum())
    return 2 * int((prediction & truth).sum()) / size if size else 1.0


def iou_score(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two binary masks of one shape; 1 if both are empty."""
    prediction, truth = prediction.astype(bool), truth.astype(bool)
    union = int((prediction | truth).sum())
    return int((prediction & truth).sum()) / union if union else 1.0


class SurfaceScores(NamedTuple):
    """Agreement of two outlines."""

    nsd: float  # normalised surface Dice: share of both outlines within the tolerance of the other
    hd95: float | None  # the larger of the two 95th percentiles; None where a mask is empty


def surface_scores(
    prediction: np.ndarray,
    truth: np.ndarray,
    tolerance: float,
    spacing: Sequence[float] | None = None,
) -> SurfaceScores:
    """Of two binary masks [H, W] or [D, H, W]; `tolerance` and `hd95` are in the unit of `spacing`
    (one per axis), or in pixels.

    The outline of a mask are its pixels with a neighbour outside it, as in MONAI; what lies beyond
    the image is outside. Both empty agree completely (1), one empty not at all (0).
    """
    prediction, truth = prediction.astype(bool), truth.astype(bool)
    if not prediction.any() or not truth.any():
        return SurfaceScores(float(prediction.any() == truth.any()), None)
    # Only the box around both is looked at: a structure of 20 pixels in an image of a million.
    box = ndimage.find_objects((prediction | truth).astype(np.int8))[0]
    outlines = [np.pad(mask[box], 1) for mask in (prediction, truth)]
    outlines = [mask & ~ndimage.binary_erosion(mask) for mask in outlines]
    distances = [
        ndimage.distance_transform_edt(~other, sampling=spacing)[own]
        for own, other in (outlines, outlines[::-1])
    ]
    near = sum(int((found <= tolerance).sum()) for found in distances)
    return SurfaceScores(
        nsd=near / sum(len(found) for found in distances),
        hd95=float(max(np.quantile(found, 0.95) for found in distances)),
    )


def noc(iou_per_click: Sequence[float], threshold: float) -> int | None:
    """Number of clicks until the IoU reaches `threshold`; None where it never does. Its mean is
    only of those that do: failures are counted apart."""
    return next((n for n, iou in enumerate(iou_per_click, 1) if iou >= threshold), None)


def click_auc(score_per_click: Sequence[float]) -> float:
    """Area under a score over clicks 1 to n by the trapezoid rule, in units of clicks; divided by
    n - 1 it is a mean score. One click has no area."""
    return float(trapezoid(score_per_click))


NSD_TOLERANCE = 2.0
"""Pixels at native size."""


def mask_scores(case: MaskCase, header: Header) -> dict[str, float]:
    """Scores of everything a case holds: by the first prompt (`dice`, `iou`, `nsd`, `hd95`, which
    is NaN where a mask is empty; `dice_256` and `iou_256` at `PROTOCOL_SIZE`, NaN where the truth
    vanishes there), by text alone (`dice_text`), after each correction
    (`dice_click_1`, `iou_click_1`, ...), and of the trivial answers to its first click: a disc of
    one size for all (`dice_disc`), or of its target's mean size (`dice_disc_by_target`)."""
    size = case.height, case.width

    def decoded(mask: str) -> np.ndarray:
        return decode_mask(mask.encode("ascii"), *size)

    truth = decoded(case.truth)
    scores = {}
    if case.by_text is not None:
        scores["dice_text"] = dice_score(decoded(case.by_text.mask), truth)
    for number, prediction in enumerate(case.predictions):
        mask, after = decoded(prediction.mask), f"_click_{number}" if number else ""
        scores |= {f"dice{after}": dice_score(mask, truth), f"iou{after}": iou_score(mask, truth)}
        if not number:
            surface = surface_scores(mask, truth, NSD_TOLERANCE)
            scores["nsd"] = surface.nsd
            scores["hd95"] = float("nan") if surface.hd95 is None else surface.hd95
            small = [resized_nearest(m, PROTOCOL_SIZE) for m in (mask, truth)]
            # A truth that is not there any more would make every empty answer right.
            lost = truth.any() and not small[1].any()
            for name, of in (("dice_256", dice_score), ("iou_256", iou_score)):
                scores[name] = float("nan") if lost else of(*small)
    # A disc needs a click to stand on; a box says more than its size and has no such baseline.
    first = case.predictions[0]
    if header.disc_share is not None and first.points:
        own = header.disc_share_by_target.get(case.facts.target or "", header.disc_share)
        shares = {"dice_disc": header.disc_share, "dice_disc_by_target": own}
        for name, share in shares.items():
            guess = disc(*size, first.points[0][:2], share * truth.size)
            scores[name] = dice_score(guess, truth)
    return scores


def disc(height: int, width: int, center: Sequence[float], area: float) -> np.ndarray:
    """[H, W] bool disc of `area` pixels around `center` (x, y): the trivial answer to a click."""
    # May be cut by the border of the image, as the structures that it stands for are.
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
) -> DiscBaseline | None:
    """Size the discs on (target, [H, W] mask, click x and y) of the training records; None without
    any."""
    scores: list[list[float]] = []
    areas: dict[str, list[float]] = defaultdict(list)
    for target, mask, click in masks:
        height, width = mask.shape
        guesses = (disc(height, width, click, s * mask.size) for s in DISC_SHARES)
        scores.append([dice_score(guess, mask) for guess in guesses])
        areas[target].append(float(mask.mean()))
    if not scores:
        return None
    # The best of a few sizes on training masks: fitted on test masks it would be no baseline.
    best = int(np.mean(scores, axis=0).argmax())
    return DiscBaseline(
        share=DISC_SHARES[best],
        by_target={target: float(np.mean(values)) for target, values in areas.items()},
    )


def mean_by(groups: Iterable[str | None], values: Iterable[float]) -> dict[str, dict[str, float]]:
    """{group: {"num", "mean"}}; what has no group forms "missing"."""
    found: dict[str, list[float]] = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        found["missing" if group is None else str(group)].append(value)
    return {
        name: {"num": len(mine), "mean": float(np.mean(mine))}
        for name, mine in sorted(found.items())
    }


UNDEFINED = ("hd95", "dice_256", "iou_256")
"""Scores that some masks do not have; how many is counted."""


def summarise_segmentation(
    cases: Sequence[MaskCase], scores: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """Means over masks and targets, and by group; `scores` are the `mask_scores` of the cases."""
    summary: dict[str, Any] = {"num_masks": len(cases)}
    groups = {name: [of(case) for case in cases] for name, of in GROUPINGS.items()}
    images = [f"{case.facts.source}/{case.facts.image_id}" for case in cases]
    for metric in scores[0] if scores else ():
        if metric.startswith("iou_click"):
            continue
        values = np.array([score[metric] for score in scores])
        defined = np.flatnonzero(~np.isnan(values)).tolist()
        counts = {"num_undefined": len(values) - len(defined)} if metric in UNDEFINED else {}
        if metric == "hd95":
            mean = float(values[defined].mean()) if defined else None
            summary[metric] = {"mean": mean} | counts
            continue

        def by(names: Sequence[str | None], values: Any = values, rows: Any = defined) -> Any:
            return mean_by([names[i] for i in rows], values[rows].tolist())

        tables = {f"by_{name}": by(names) for name, names in groups.items()}
        # Each target once: in the mean over masks a rare one hardly counts.
        means = {"mean": values[defined].tolist()} | {
            f"mean_over_{what}": [cell["mean"] for cell in table.values()]
            for what, table in (("images", by(images)), ("targets", tables["by_target"]))
        }
        summary[metric] = {
            name: float(np.mean(found)) if found else None for name, found in means.items()
        }
        summary[metric] |= counts | tables
    if scores:
        summary["clicks"] = _click_table(cases, scores)
        summary["corrections"] = _correction_table(cases, scores)
    return summary


def _correction_table(
    cases: Sequence[MaskCase], scores: Sequence[dict[str, float]]
) -> dict[str, dict[str, Any]]:
    """{"all", "pixels: ...", "modality: ...": what corrections do}; {} where nobody corrected."""
    num = len(cases[0].predictions)  # of an evaluation, the same for all
    if num == 1:
        return {}
    names = ["dice", *(f"dice_click_{n}" for n in range(1, num))]
    members: dict[str, list[int]] = {"all": list(range(len(cases)))}
    for axis in ("pixels", "modality"):
        for i in range(len(cases)):
            members.setdefault(f"{axis}: {GROUPINGS[axis](cases[i]) or 'missing'}", []).append(i)
    table = {}
    for name, mine in members.items():
        dice = np.array([[scores[i][metric] for metric in names] for i in mine]).mean(0)
        # A group as a whole: of single masks some always lose.
        steps = np.diff(dice)
        kept = [clicks_kept([cases[i] for i in mine], n) for n in range(num)]
        table[name] = {
            "num": len(mine),
            "dice": dice.tolist(),
            "greatest_fall": max(0.0, -float(steps.min())),
            "after": int(steps.argmin()) + 1 if steps.min() < 0 else None,
            "positive_inside": [positive for positive, _ in kept],
            "negative_outside": [negative for _, negative in kept],
        }
    return table


def clicks_kept(cases: Sequence[MaskCase], number: int) -> tuple[float | None, float | None]:
    """(share of positive clicks inside, share of negative clicks outside) of all clicks that the
    masks after `number` corrections were asked by; None where there is no such click."""
    right: dict[int, list[bool]] = {1: [], 0: []}
    for case in cases:
        prediction = case.predictions[number]
        mask = decode_mask(prediction.mask.encode("ascii"), case.height, case.width)
        for x, y, label in prediction.points:
            # Corrections are clicked at the model's size, so at native size between pixels; the
            # centre of a border pixel may round to the one beyond it.
            row = min(max(round(y), 0), case.height - 1)
            column = min(max(round(x), 0), case.width - 1)
            right[label].append(bool(mask[row, column]) == bool(label))
    positive, negative = (float(np.mean(found)) if found else None for found in right.values())
    return positive, negative


def _click_table(
    cases: Sequence[MaskCase], scores: Sequence[dict[str, float]]
) -> dict[str, dict[str, Any]]:
    """{"click" or "box" (what a case started with): how IoU grows with clicks}; only of cases with
    corrections. A box is no click: a mask that is good from its box needs 0."""
    table: dict[str, dict[str, Any]] = {}
    for start in ("click", "box"):
        curves = [
            [score["iou"], *(score[f"iou_click_{n}"] for n in range(1, len(case.predictions)))]
            for case, score in zip(cases, scores, strict=True)
            if len(case.predictions) > 1
            and (case.predictions[0].box is not None) == (start == "box")
        ]
        if not curves:
            continue
        table[start] = {"num": len(curves)}
        for threshold in NOC_THRESHOLDS:
            needed = [noc(curve, threshold) for curve in curves]
            found = [number - (start == "box") for number in needed if number is not None]
            table[start][f"noc_{threshold:.0%}".rstrip("%")] = {
                "mean": float(np.mean(found)) if found else None,
                "num_failed": len(needed) - len(found),
            }
        areas = [click_auc(curve) for curve in curves]
        table[start]["click_auc"] = float(np.mean(areas))
        shares = [found / (len(curve) - 1) for found, curve in zip(areas, curves, strict=True)]
        table[start]["mean_iou_over_clicks"] = float(np.mean(shares))
    return table


# ---------------------------------------------------------------- volumes

NSD_TOLERANCE_MM = 2.0


def volumes_of(cases: Sequence[MaskCase]) -> dict[tuple[str, str, str], list[MaskCase]]:
    """(source, volume, target) -> its slices in order."""
    found: dict[tuple[str, str, str], list[MaskCase]] = defaultdict(list)
    for case in cases:
        if case.place is not None:
            facts = case.facts
            found[facts.source, case.place.volume, facts.target or ""].append(case)
    for slices in found.values():
        slices.sort(key=lambda case: case.place.number if case.place else 0)
    return dict(found)


def stacked(slices: Sequence[MaskCase], codes: Sequence[str]) -> np.ndarray:
    """[num_slices, H, W] bool of the masks of one volume; slices without a case stay empty.

    Raises ValueError where slices are of several sizes or one is there twice.
    """
    first = slices[0].place
    assert first is not None
    size = slices[0].height, slices[0].width
    numbers = [case.place.number for case in slices if case.place is not None]
    if len(set(numbers)) < len(numbers) or any((c.height, c.width) != size for c in slices):
        raise ValueError(
            f"volume {first.volume}: got slices {numbers} of {size} and perhaps other pixels, "
            "expected each slice once and all of one size; prepare its records again"
        )
    masks = np.zeros((first.num_slices, *size), bool)
    for number, code in zip(numbers, codes, strict=True):
        masks[number] = decode_mask(code.encode("ascii"), *size)
    return masks


def summarise_volumes(cases: Sequence[MaskCase], header: Header) -> dict[str, Any]:
    """Dice, IoU, NSD and HD95 (mm) of every volume and target by the first prompt; {} without
    volumes, or where a limit left slices out.

    Nobody clicks where the target is not, so such slices have no case and count as empty on both
    sides: false alarms beyond the ends of the target are not seen.
    """
    # A slice that was left out would count as one without the target.
    if header.settings.get("limit"):
        return {}
    rows: list[dict[str, Any]] = []
    for (source, volume, target), slices in volumes_of(cases).items():
        place = slices[0].place
        assert place is not None
        truth = stacked(slices, [case.truth for case in slices])
        prediction = stacked(slices, [case.predictions[0].mask for case in slices])
        surface = surface_scores(prediction, truth, NSD_TOLERANCE_MM, place.spacing)
        rows.append(
            {
                "source": source,
                "volume": volume,
                "target": target,
                "num_slices": len(slices),
                "dice": dice_score(prediction, truth),
                "iou": iou_score(prediction, truth),
                "nsd": surface.nsd,
                "hd95": surface.hd95,
            }
        )
    if not rows:
        return {}
    means: dict[str, Any] = {"num": len(rows), "tolerance_mm": NSD_TOLERANCE_MM}
    for metric in ("dice", "iou", "nsd", "hd95"):
        values = [row[metric] for row in rows if row[metric] is not None]
        means[metric] = float(np.mean(values)) if values else None
    means["num_undefined_hd95"] = sum(row["hd95"] is None for row in rows)
    by_target = mean_by([row["target"] for row in rows], [row["dice"] for row in rows])
    return means | {"dice_by_target": by_target, "each": rows}

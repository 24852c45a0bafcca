"""Pictures of finished cases and of data.

panels = mask_panels(representative_cases(cases.masks), records)
contact_sheet(panels, "contact_sheet.png")
overlay_sheet([Overlay(title="btcv/17", image=image, masks=[("liver", mask)])], "data.png")
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from biascare.data.prevalence import PREVALENCE_GROUPS
from biascare.data.transforms import decode_image
from biascare.evaluation.cases import MaskCase
from biascare.evaluation.metrics.segmentation import dice_score
from biascare.interfaces import POINT_POSITIVE
from biascare.records import Records, decode_mask

TRUTH_COLOR, PREDICTION_COLOR = "#00d084", "#ffb000"
CLICK_COLORS = {1: "#00e5ff", 0: "#ff3b6b"}
BOX_COLOR = "#ffe14d"
TITLE_WIDTH = 34  # characters above a panel
MASK_COLORS = (  # Tol's bright and vibrant palettes: told apart on grey with any colour vision
    *("#66CCEE", "#EE6677", "#CCBB44", "#228833", "#AA3377", "#EE7733", "#4477AA", "#009988"),
    *("#EE3377", "#BBBBBB"),
)


class MaskPanel(NamedTuple):
    """One (image, target) with what a reader compares, all at native size."""

    title: str
    image: np.ndarray  # [H, W, 3] uint8
    truth: np.ndarray  # [H, W] bool
    predictions: list[np.ndarray]  # [H, W] bool: by the first prompt, and after one correction
    clicks: list[tuple[float, float, int]]  # x, y, label, in the order they were given
    box: tuple[float, float, float, float] | None  # XYXY, of the first prompt


def representative_cases(cases: Sequence[MaskCase], per_group: int = 4) -> list[MaskCase]:
    """Cases that show the whole range: of each prevalence group, evenly spaced by Dice."""
    chosen = []
    # By group and over the whole range of scores: the best masks alone would flatter, and a draw
    # over all cases would show hardly any rare target.
    for group in PREVALENCE_GROUPS:
        mine = sorted(
            (c for c in cases if c.facts.prevalence == group),
            key=lambda c: dice_score(_mask(c, c.predictions[0].mask), _mask(c, c.truth)),
        )
        picks = np.linspace(0, len(mine) - 1, min(per_group, len(mine))).astype(int)
        chosen += [mine[i] for i in picks]
    return chosen


def _mask(case: MaskCase, code: str) -> np.ndarray:
    """[H, W] bool at native size."""
    return decode_mask(code.encode("ascii"), case.height, case.width) > 0


def mask_panels(cases: Sequence[MaskCase], records: Sequence[Records]) -> list[MaskPanel]:
    """Pictures of finished cases; their images are read from the records, no model is asked."""
    places = {
        (source.manifest["source"], source.manifest["split"], name): (source, row)
        for source in records
        for row, name in enumerate(source.ids())
    }
    panels = []
    for case in cases:
        source, row = places[case.facts.source, case.facts.split, case.facts.image_id]
        shown = case.predictions[:2]
        panels.append(
            MaskPanel(
                title=f"{case.facts.modality}: {case.facts.target} ({case.facts.prevalence})",
                image=decode_image(source[row]["image"]),
                truth=_mask(case, case.truth),
                predictions=[_mask(case, prediction.mask) for prediction in shown],
                clicks=shown[-1].points,
                box=case.predictions[0].box,
            )
        )
    return panels


def contact_sheet(panels: Sequence[MaskPanel], path: str | Path, title: str = "") -> None:
    """Write a PNG: per case the image, the truth, the first prediction, and after one click."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases_per_line = 2
    lines = -(-len(panels) // cases_per_line)
    figure, axes = plt.subplots(
        lines, 4 * cases_per_line, figsize=(14, 1.95 * lines + 0.7), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for i, panel in enumerate(panels):
        line, side = divmod(i, cases_per_line)
        _draw_case(axes[line, 4 * side : 4 * side + 4], panel)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(pad=0.4, rect=(0, 0, 1, 0.985))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_case(axes: Any, panel: MaskPanel) -> None:
    scores = [dice_score(mask, panel.truth) for mask in panel.predictions]
    prompt = "box" if panel.box is not None else "first click"
    titles = [panel.title, "truth", f"{prompt} {scores[0]:.2f}"]
    titles += [f"one correction {score:.2f}" for score in scores[1:]]
    masks = [None, panel.truth, *panel.predictions]
    colors = [None, TRUTH_COLOR, *[PREDICTION_COLOR] * len(scores)]
    # A row without errors left may have had no correction; then all clicks are of the first prompt.
    num_first = len(panel.clicks) - len(scores) + 1
    shown = [0, 0, num_first, len(panel.clicks)]
    drawn = len(titles)
    for axis, text, mask, color, num_clicks in zip(
        axes[:drawn], titles, masks, colors, shown[:drawn], strict=True
    ):
        axis.imshow(panel.image)
        axis.set_title(textwrap.fill(text, TITLE_WIDTH), fontsize=7)
        if mask is not None and mask.any():
            # Padded, so that a mask at the image border has a closed outline too.
            rows, columns = (np.arange(-1, n + 1) for n in mask.shape)
            outline = np.pad(mask, 1)
            axis.contour(columns, rows, outline, levels=[0.5], colors=[color], linewidths=1.2)
        for x, y, label in panel.clicks[:num_clicks]:
            marker = "+" if label == POINT_POSITIVE else "x"
            axis.plot(x, y, marker, color=CLICK_COLORS[label], markersize=6, markeredgewidth=1.6)
        if panel.box is not None and text == titles[2]:
            _draw_box(axis, panel.box, linewidth=1.2)
        axis.set_xlim(-0.5, panel.image.shape[1] - 0.5)
        axis.set_ylim(panel.image.shape[0] - 0.5, -0.5)


def _draw_box(axis: Any, box: Sequence[float], **style: Any) -> None:
    x0, y0, x1, y1 = box
    axis.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], **({"color": BOX_COLOR} | style))


class Overlay(NamedTuple):
    """An image with what is known about it, in pixels of that image."""

    title: str  # may have several lines
    image: np.ndarray  # [H, W, 3] uint8
    masks: Sequence[tuple[str, np.ndarray]] = ()  # name, [H, W] of {0, 1}
    clicks: Sequence[tuple[float, float, int]] = ()  # x, y, label
    boxes: Sequence[tuple[float, float, float, float]] = ()  # XYXY


def overlay_sheet(
    overlays: Sequence[Overlay], path: str | Path, *, title: str = "", columns: int = 4
) -> None:
    """Write a PNG: images with filled and outlined masks, their names below in their colours,
    clicks (+ inside, x outside the target) and boxes. Tiny masks are ringed, to be found."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = max(1, min(columns, len(overlays)))
    lines = -(-len(overlays) // columns)
    cells = [overlays[line * columns : (line + 1) * columns] for line in range(lines)]
    above = [_LINE * max(cell.title.count("\n") + 1 for cell in line) for line in cells]
    below = [
        _LINE * max(-(-len(c.masks) // _NAMES_PER_LINE) for c in line) + 0.15 for line in cells
    ]
    whole = sum(above) + sum(below) + lines * _CELL + _TITLE
    figure = plt.figure(figsize=(columns * (_CELL + 0.1), whole))
    figure.text(0.01, 1 - 0.08 / whole, title, fontsize=9, va="top", weight="bold")
    top = whole - _TITLE
    for line, over, under in zip(cells, above, below, strict=True):
        place = (top - over - _CELL) / whole
        for column, cell in enumerate(line):
            left, width = (column + 0.03) / columns, 0.94 / columns
            _draw_overlay(figure.add_axes((left, place, width, _CELL / whole)), cell)
        top -= over + _CELL + under
    figure.savefig(path, dpi=150)
    plt.close(figure)


_CELL, _LINE, _TITLE = 2.25, 0.14, 0.35  # inches: an image, a line of text, the title
_NAMES_PER_LINE = 2


def _draw_overlay(axis: Any, cell: Overlay) -> None:
    from matplotlib.colors import to_rgb

    height, width = cell.image.shape[:2]
    # The extent puts pixel centres on whole numbers, where clicks and boxes are.
    axis.imshow(cell.image, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    axis.set_anchor("N")
    axis.axis("off")
    axis.set_title(cell.title, fontsize=6.5, loc="left", pad=2)
    for i, (name, mask) in enumerate(cell.masks):
        color = MASK_COLORS[i % len(MASK_COLORS)]
        _draw_mask(axis, np.asarray(mask) != 0, color)
        line, place = divmod(i, _NAMES_PER_LINE)
        axis.annotate(
            "\u25a0 " + (name if len(name) <= 22 else name[:20] + " \u2026"),
            (place / _NAMES_PER_LINE, 0),
            xytext=(0, -2 - 10 * line),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=6.5,
            va="top",
            # Dark enough to be read on white.
            color=tuple(0.75 * channel for channel in to_rgb(color)),
        )
    for box in cell.boxes:
        _draw_box(axis, box, color="black", linewidth=2.2)
        _draw_box(axis, box, linewidth=1.2)
    for x, y, label in cell.clicks:
        marker = "+" if label == POINT_POSITIVE else "x"
        axis.plot(x, y, marker, color="black", markersize=9, markeredgewidth=3)
        axis.plot(x, y, marker, color=CLICK_COLORS[label], markersize=8, markeredgewidth=1.6)
    axis.set_xlim(-0.5, width - 0.5)
    axis.set_ylim(height - 0.5, -0.5)


def _draw_mask(axis: Any, mask: np.ndarray, color: str) -> None:
    if not mask.any():
        return
    from matplotlib.colors import to_rgb

    fill = np.zeros((*mask.shape, 4))
    fill[mask] = (*to_rgb(color), 0.25)
    height, width = mask.shape
    axis.imshow(fill, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")
    # Padded, so that a mask at the image border has a closed outline too.
    xs, ys = np.arange(-1, width + 1), np.arange(-1, height + 1)
    axis.contour(xs, ys, np.pad(mask, 1), levels=[0.5], colors=[color], linewidths=1.0)
    rows, columns = np.nonzero(mask)
    # A lesion of a few pixels vanishes in a sheet of thumbnails; these are the ones to look for.
    if max(np.ptp(rows), np.ptp(columns)) < 0.03 * max(mask.shape):
        axis.plot(columns.mean(), rows.mean(), "o", mfc="none", mec=color, ms=11, mew=1.0)

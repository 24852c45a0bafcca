"""Pictures of predictions and of data.

panels = mask_panels(model, images, indices, settings)
contact_sheet(panels, "contact_sheet.png")
overlay_sheet([Overlay(title="btcv/17", image=image, masks=[("liver", mask)])], "data.png")
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from biascare.data.heldout import HeldOutImages
from biascare.data.loader import to_device
from biascare.evaluation.metrics.segmentation import dice_score
from biascare.hitl.clicks import refine_once
from biascare.interfaces import POINT_POSITIVE, DualPathModel, Prediction, Prompts

TRUTH_COLOR, PREDICTION_COLOR = "#00d084", "#ffb000"
CLICK_COLORS = {1: "#00e5ff", 0: "#ff3b6b"}
BOX_COLOR = "#ffe14d"
TITLE_WIDTH = 34  # characters above a panel
MASK_COLORS = (  # Tol's bright and vibrant palettes: told apart on grey with any colour vision
    *("#66CCEE", "#EE6677", "#CCBB44", "#228833", "#AA3377", "#EE7733", "#4477AA", "#009988"),
    *("#EE3377", "#BBBBBB"),
)


class MaskPanel(NamedTuple):
    """One (image, target) with what a reader compares, all at the model input size."""

    title: str
    image: np.ndarray  # [S, S, 3] uint8
    truth: np.ndarray  # [S, S] bool
    predictions: list[np.ndarray]  # [S, S] bool: first, after one click, ...
    clicks: list[tuple[float, float, int]]  # x, y, label, in the order they were given


def representative_targets(
    rows: Sequence[dict[str, Any]], per_group: int = 4
) -> list[dict[str, Any]]:
    """Rows that show the whole range: of each prevalence group, evenly spaced by Dice."""
    chosen = []
    for group in ("head", "medium", "tail"):
        mine = sorted(
            (r for r in rows if r["group"] == group), key=lambda r: r["mask_metrics"]["dice"]
        )
        picks = np.linspace(0, len(mine) - 1, min(per_group, len(mine))).astype(int)
        chosen += [mine[i] for i in picks]
    return chosen


@torch.inference_mode()
def mask_panels(
    model: DualPathModel, images: HeldOutImages, rows: Sequence[dict[str, Any]]
) -> list[MaskPanel]:
    """Predict the chosen evaluation rows again and keep the pictures."""
    model.eval()
    index = {images.image_id(i): i for i in range(len(images))}
    return [_panel(model, images, index[row["image_id"]], row) for row in rows]


def _panel(
    model: DualPathModel, images: HeldOutImages, index: int, row: dict[str, Any]
) -> MaskPanel:
    batch = to_device(images.one_target(index, row["target"]), model.device)
    assert batch.prompts is not None and batch.row_image is not None and batch.masks is not None
    assert batch.images is not None
    row_image = batch.row_image
    features = model.encode(batch)

    def decode(prompts: Prompts, mask_prompt: torch.Tensor | None) -> Prediction:
        return model.decode_masks(features, prompts, row_image, mask_prompt=mask_prompt)

    first = decode(batch.prompts, None)
    prompts, refined = refine_once(
        decode,
        batch.prompts,
        first,
        batch.masks,
        policy="center",
        num_clicks=1,
        generator=None,
        mask_prompt=True,
    )
    points = zip(prompts.point_coords[0].tolist(), prompts.point_labels[0].tolist(), strict=True)
    return MaskPanel(
        title=f"{row['modality']}: {row['target']} ({row['group']})",
        image=batch.images[0].permute(1, 2, 0).cpu().numpy(),
        truth=batch.masks[0].bool().cpu().numpy(),
        predictions=[(p.mask_logits[0] > 0).cpu().numpy() for p in (first, refined)],
        clicks=[(x, y, label) for (x, y), label in points if label >= 0],
    )


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
    titles = [
        panel.title,
        "truth",
        f"first click {scores[0]:.2f}",
        f"one correction {scores[1]:.2f}",
    ]
    masks = [None, panel.truth, *panel.predictions]
    colors = [None, TRUTH_COLOR, PREDICTION_COLOR, PREDICTION_COLOR]
    shown = [0, 0, 1, len(panel.clicks)]
    for axis, text, mask, color, num_clicks in zip(axes, titles, masks, colors, shown, strict=True):
        axis.imshow(panel.image)
        axis.set_title(textwrap.fill(text, TITLE_WIDTH), fontsize=7)
        if mask is not None and mask.any():
            axis.contour(mask, levels=[0.5], colors=[color], linewidths=1.2)
        for x, y, label in panel.clicks[:num_clicks]:
            marker = "+" if label == POINT_POSITIVE else "x"
            axis.plot(x, y, marker, color=CLICK_COLORS[label], markersize=6, markeredgewidth=1.6)


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
    height, width = cell.image.shape[:2]
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
            color=_dark(color),
        )
    for x0, y0, x1, y1 in cell.boxes:
        xs, ys = [x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0]
        axis.plot(xs, ys, color="black", linewidth=2.2)
        axis.plot(xs, ys, color=BOX_COLOR, linewidth=1.2)
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
    if max(np.ptp(rows), np.ptp(columns)) < 0.03 * max(mask.shape):
        axis.plot(columns.mean(), rows.mean(), "o", mfc="none", mec=color, ms=11, mew=1.0)


def _dark(color: str) -> tuple[float, ...]:
    """The colour, dark enough to be read on white."""
    from matplotlib.colors import to_rgb

    return tuple(0.75 * channel for channel in to_rgb(color))

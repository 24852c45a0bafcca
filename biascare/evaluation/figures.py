"""Pictures of predictions.

panels = mask_panels(model, images, indices, settings)
contact_sheet(panels, "contact_sheet.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from biascare.data.heldout import HeldOutImages
from biascare.data.loader import to_device
from biascare.evaluation.segmentation import dice_score
from biascare.hitl.clicks import refine_once
from biascare.interfaces import POINT_POSITIVE, DualPathModel, Prediction, Prompts

TRUTH_COLOR, PREDICTION_COLOR = "#00d084", "#ffb000"
CLICK_COLORS = {1: "#00e5ff", 0: "#ff3b6b"}


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
    batch = to_device(images.__getitems__([index])[0], model.device)
    assert batch.prompts is not None and batch.row_image is not None and batch.masks is not None
    assert batch.images is not None
    row_image = batch.row_image
    features = model.encode(batch)
    r = [meta["target"] for meta in batch.meta].index(row["target"])
    rows = torch.tensor([r], device=row_image.device)

    def decode(prompts: Prompts, mask_prompt: torch.Tensor | None) -> Prediction:
        return model.decode_masks(features, prompts, row_image, rows=rows, mask_prompt=mask_prompt)

    prompts = Prompts(*(field[rows] for field in batch.prompts))
    first = decode(prompts, None)
    prompts, refined = refine_once(
        decode,
        prompts,
        first,
        batch.masks[rows],
        policy="center",
        num_clicks=1,
        generator=None,
        mask_prompt=True,
    )
    points = zip(prompts.point_coords[0].tolist(), prompts.point_labels[0].tolist(), strict=True)
    return MaskPanel(
        title=f"{row['modality']}: {row['target']} ({row['group']})",
        image=batch.images[0].permute(1, 2, 0).cpu().numpy(),
        truth=batch.masks[r].bool().cpu().numpy(),
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
        axis.set_title(text, fontsize=7)
        if mask is not None and mask.any():
            axis.contour(mask, levels=[0.5], colors=[color], linewidths=1.2)
        for x, y, label in panel.clicks[:num_clicks]:
            marker = "+" if label == POINT_POSITIVE else "x"
            axis.plot(x, y, marker, color=CLICK_COLORS[label], markersize=6, markeredgewidth=1.6)

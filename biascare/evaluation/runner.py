"""Model and held-out records to rows, one per mask or question.

    rows = segmentation_rows(model, images, settings)
    rows += answer_rows(model, questions, settings)

Rows are plain dicts that go to predictions.jsonl as they are. Under several ranks each evaluates
its share; the caller gathers. Metrics never look at a model again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from biascare.data.heldout import HeldOut, HeldOutImages, HeldOutQuestions, heldout_loader
from biascare.data.loader import to_device
from biascare.data.prompts import box_from_mask
from biascare.data.transforms import Geometry, apply_points, restore_mask
from biascare.evaluation.metrics.answers import is_correct, summarise_answers
from biascare.evaluation.metrics.segmentation import (
    DiscBaseline,
    dice_score,
    disc,
    summarise_segmentation,
)
from biascare.hitl.clicks import refine_once
from biascare.interfaces import (
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    POINT_PADDING,
    Batch,
    DualPathModel,
    Features,
    Prediction,
    Prompts,
)
from biascare.records import decode_mask
from biascare.uncertainty import joint_uncertainty, mask_weighted_embedding, semantic_uncertainty


class RunnerSettings(NamedTuple):
    """How to run; scores do not depend on the first three."""

    batch_size: int = 8
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    num_clicks: int = 1  # simulated corrections after the first prediction
    max_new_tokens: int = 32
    beta_vl: float = 0.5
    synced_generation: bool = False  # ZeRO-3: all ranks generate equally long
    prompt: Literal["point", "box"] = "point"  # of the first prediction


def _batches(model: DualPathModel, items: HeldOut, settings: RunnerSettings) -> Iterator[Batch]:
    loader = heldout_loader(
        items,
        settings.batch_size,
        rank=settings.rank,
        world_size=settings.world_size,
        num_workers=settings.num_workers,
    )
    for batch in loader:
        yield to_device(batch, model.device)


@torch.inference_mode()
def segmentation_rows(
    model: DualPathModel,
    images: HeldOutImages,
    settings: RunnerSettings,
    discs: DiscBaseline | None = None,
) -> list[dict[str, Any]]:
    """One row per (image, target): Dice at native size from the first prompt, from text alone (with
    an MLLM), and after each simulated correction, with the uncertainties of the first prediction.

    The first prompt is the deterministic click, or the tight box of the true mask, as benchmarks of
    promptable models have it.

    `discs`: trivial answers to the first click; adds `dice_disc` (one size for all) and
    `dice_disc_by_target` (the mean size of the named target).
    """
    model.eval()
    rows = []
    for batch in _batches(model, images, settings):
        if settings.prompt == "box":
            batch = _with_boxes(batch, images.image_size)
        features = model.encode(batch)
        predictions = dict(_predict(model, features, batch, settings.num_clicks))
        uncertainty = _uncertainties(features, predictions["dice"], batch, settings.beta_vl)
        for r, meta in enumerate(batch.meta):
            if not meta["is_repeat"]:
                logits = {name: p.mask_logits[r] for name, p in predictions.items()}
                values = {name: float(v[r]) for name, v in uncertainty.items()}
                rows.append(_mask_row(meta, logits, values, discs))
    return rows


def _with_boxes(batch: Batch, image_size: int) -> Batch:
    """The batch with tight boxes instead of clicks; `meta["box"]` are their native pixels, XYXY."""
    assert batch.prompts is not None
    corners = []
    for meta in batch.meta:
        height, width = meta["height"], meta["width"]
        box = box_from_mask(decode_mask(meta["rle"], height, width))
        meta["box"] = box.tolist()
        corners.append(apply_points(box.reshape(2, 2), Geometry.full(height, width, image_size)))
    old = batch.prompts
    kinds = old.point_labels.new_tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT])
    return batch._replace(
        prompts=Prompts(
            point_coords=torch.as_tensor(np.stack(corners)).to(old.point_coords),
            point_labels=kinds.expand(len(corners), -1).clone(),
        )
    )


def _predict(
    model: DualPathModel, features: Features, batch: Batch, num_clicks: int
) -> Iterator[tuple[str, Prediction]]:
    """(metric name, prediction) for every way of prompting."""
    assert batch.prompts is not None and batch.row_image is not None and batch.masks is not None
    row_image, prompts = batch.row_image, batch.prompts
    if features.text_embedding is not None:
        no_point = prompts._replace(
            point_labels=torch.full_like(prompts.point_labels, POINT_PADDING)
        )
        yield "dice_text", model.decode_masks(features, no_point, row_image)
    prediction = model.decode_masks(features, prompts, row_image)
    yield "dice", prediction

    def decode(prompts: Prompts, mask_prompt: Tensor | None) -> Prediction:
        return model.decode_masks(features, prompts, row_image, mask_prompt=mask_prompt)

    for click in range(1, num_clicks + 1):
        prompts, prediction = refine_once(
            decode,
            prompts,
            prediction,
            batch.masks,
            policy="center",
            num_clicks=1,
            generator=None,
            mask_prompt=True,
        )
        yield f"dice_click_{click}", prediction


def _uncertainties(
    features: Features, prediction: Prediction, batch: Batch, beta_vl: float
) -> dict[str, Tensor]:
    """Label-free uncertainties of R rows: Eq. 5, and Eq. 6 with the quality head's own Dice."""
    predicted_loss = 1 - prediction.predicted_dice
    if features.text_embedding is None or features.image_embedding is None:
        return {"joint_label_free": predicted_loss}
    vector = mask_weighted_embedding(
        features.image_embedding, prediction.mask_logits.sigmoid(), row_image=batch.row_image
    )
    semantic = semantic_uncertainty(vector, features.text_embedding)
    return {
        "semantic": semantic,
        "joint_label_free": joint_uncertainty(semantic, predicted_loss, beta_vl),
        "predicted_dice_loss": predicted_loss,
    }


def _mask_row(
    meta: dict[str, Any],
    logits: dict[str, Tensor],
    uncertainty: dict[str, float],
    discs: DiscBaseline | None,
) -> dict[str, Any]:
    height, width = meta["height"], meta["width"]
    truth = decode_mask(meta["rle"], height, width)
    scores = {
        name: dice_score(restore_mask(value, height, width).cpu().numpy(), truth)
        for name, value in logits.items()
    }
    if discs is not None:
        shares = {
            "dice_disc": discs.share,
            "dice_disc_by_target": discs.by_target.get(meta["target"], discs.share),
        }
        for name, share in shares.items():
            guess = disc(height, width, meta["point"], share * height * width)
            scores[name] = dice_score(guess, truth)
    return _common(meta) | {
        "id": f"{meta['id']}/{meta['target']}",
        "target": meta["target"],
        "group": meta["group"],
        "prompt": {"box": meta["box"]} if "box" in meta else {"point": meta["point"]},
        "pixels": int(truth.sum()),
        "mask_metrics": scores,
        "uncertainty": uncertainty,
    }


def _common(meta: dict[str, Any]) -> dict[str, Any]:
    same = {k: meta[k] for k in ("patient_id", "source", "split", "task", "modality", "anatomy")}
    attributes = {k: meta[k] for k in ("sex", "age", "race")}
    return {"image_id": meta["id"], "attributes": attributes} | same


@torch.inference_mode()
def answer_rows(
    model: DualPathModel, questions: HeldOutQuestions, settings: RunnerSettings
) -> list[dict[str, Any]]:
    """One row per question: the greedy answer and whether it is right."""
    assert questions.chat is not None
    model.eval()
    rows = []
    for batch in _batches(model, questions, settings):
        tokens = model.generate(
            batch,
            max_new_tokens=settings.max_new_tokens,
            synced_gpus=settings.synced_generation,
        )
        for meta, prediction in zip(batch.meta, questions.chat.decode(tokens), strict=True):
            if not meta["is_repeat"]:
                rows.append(_answer_row(meta, prediction))
    return rows


def _answer_row(meta: dict[str, Any], prediction: str) -> dict[str, Any]:
    kind, reference = meta["target"], meta["reference"]
    return _common(meta) | {
        "id": f"{meta['id']}/{meta['turn']}",
        "kind": kind,
        "prompt": meta["question"],
        "prediction": prediction,
        "reference": reference,
        "correct": is_correct(kind=kind, prediction=prediction, reference=reference),
    }


def summarise(masks: list[dict[str, Any]], answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Numbers of both kinds of rows: `segmentation` and `answers`, each where there are rows."""
    summary: dict[str, Any] = {}
    if masks:
        summary["segmentation"] = summarise_segmentation(masks)
    if answers:
        summary["answers"] = summarise_answers(answers)
    return summary


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """One JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")

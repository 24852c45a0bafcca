"""Pictures of an audit's worst masks: true outline and model's outline side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from biascare.data.transforms import decode_image
from biascare.evaluation.cases import MaskCase
from biascare.records import Records, decode_mask
from biascare.reports.audit_parts import Chart, Row
from biascare.reports.audit_words import SEXES
from biascare.reports.charts import outlines


def mask_pictures(
    rows: Sequence[Row], cases: Sequence[MaskCase], folders: Sequence[Records]
) -> list[Chart]:
    """One picture per row of `worst_masks`. Images come from record folders; without theirs the
    outlines stand on a blank canvas, and a line says so."""
    wanted = {(row["source"], row["split"], row["id"]) for row in rows}
    by_key = {_key(case): case for case in cases if _key(case) in wanted}
    images = _images(list(by_key.values()), folders)
    pictures = []
    for row in rows:
        case = by_key[row["source"], row["split"], row["id"]]
        first = case.predictions[0]
        masks = [("truth", _mask(case, case.truth)), ("model", _mask(case, first.mask))]
        image = images.get((case.facts.source, case.facts.split, case.facts.image_id))
        # A folder that was prepared again may hold another picture under the name.
        if image is not None and image.shape[:2] != (case.height, case.width):
            image = None
        title = f"{case.facts.modality}: {case.facts.target}, Dice {row['dice']:.2f}"
        pictures.append(Chart(title, outlines(image, masks, title), list(_about(row, image))))
    return pictures


def _about(row: Row, image: Any) -> list[str]:
    known = [
        SEXES.get(row["sex"] or "", row["sex"]),
        None if row["age"] is None else f"{row['age']:.0f} years",
        row["race"],
    ]
    facts = [text for text in (row["prevalence"] and f"{row['prevalence']} target", *known) if text]
    size = f"{row['true_pixels']:,} pixels ({row['share_of_image']:.2%} of the image)"
    return [
        "; ".join([row["id"], *facts, size]),
        *(["image not given: name its folder after --records"] if image is None else []),
    ]


def _key(case: MaskCase) -> tuple[str, str, str]:
    return case.facts.source, case.facts.split, case.id


def _images(
    cases: Sequence[MaskCase], folders: Sequence[Records]
) -> dict[tuple[str, str, str], np.ndarray]:
    wanted = {(c.facts.source, c.facts.split, c.facts.image_id) for c in cases}
    found = {}
    for records in folders:
        source, split = records.manifest["source"], records.manifest["split"]
        for row, name in enumerate(records.ids()):
            if (source, split, name) in wanted:
                found[source, split, name] = decode_image(records[row]["image"])
    return found


def _mask(case: MaskCase, code: str) -> np.ndarray:
    return decode_mask(code.encode("ascii"), case.height, case.width) > 0

"""What a model was trained on, beside the cases that it is judged by.

    training_facts(folders, tables, header)["overlap"]

From columns alone, no image is read: millions of rows take seconds. Pixels that are equal under
other names are what `scripts/lint_data.py` finds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from biascare.checks.leaks import id_key, id_keys
from biascare.checks.statistics import imbalance, profile_folders
from biascare.evaluation.audit.rows import AuditTable
from biascare.evaluation.audit.tables import Draws, Row, means
from biascare.evaluation.cases import Header
from biascare.records import Records

MAX_CATEGORIES = 40
"""Rows of one axis in the table; rarer ones are summed up in a last row."""


def training_facts(
    folders: Sequence[Records], tables: Sequence[AuditTable], header: Header, draws: Draws
) -> Row:
    """{"folders", "composition", "imbalance", "overlap", "without_overlap"}."""
    profile = profile_folders(folders)
    composition: list[Row] = []
    for axis, distribution in profile.items():
        total = sum(distribution.raw.values())
        items = list(distribution.raw.items())
        if len(items) > MAX_CATEGORIES:
            rest = items[MAX_CATEGORIES - 1 :]
            items = items[: MAX_CATEGORIES - 1]
            items.append((f"{len(rest)} rarer ones together", sum(n for _, n in rest)))
        composition += [
            {"axis": axis, "category": name, "num": int(num), "share": num / total}
            for name, num in items
        ]
    hashes = {entry["content_hash"]: entry for entry in header.data}
    return {
        "folders": [
            {
                "source": r.manifest["source"],
                "split": r.manifest["split"],
                "images": len(r),
                "masks": r.manifest["num_targets"],
                "content_hash": r.manifest["content_hash"],
                "was_evaluated": r.manifest["content_hash"] in hashes,
            }
            for r in folders
        ],
        "composition": composition,
        "imbalance": [
            {"axis": axis} | imbalance(distribution.raw)._asdict()
            for axis, distribution in profile.items()
            if distribution.raw
        ],
        **_overlap(folders, tables, draws),
    }


def _overlap(folders: Sequence[Records], tables: Sequence[AuditTable], draws: Draws) -> Row:
    """Cases whose image or patient stands in training, and the primary metrics without them."""
    known = {
        column: np.unique(np.concatenate([id_keys(r, column) for r in folders]))
        for column in ("id", "patient_id")
    }
    overlap: list[Row] = []
    without: list[Row] = []
    for table in tables:
        keys = {
            "id": [id_key(f.source, "id", f.image_id) for f in table.facts],
            "patient_id": [
                id_key(f.source, "patient_id", f.patient_id) if f.patient_id else 0
                for f in table.facts
            ],
        }
        found = {
            column: np.isin(np.array(mine, np.uint64), known[column])
            & (np.array(mine, np.uint64) != 0)
            for column, mine in keys.items()
        }
        either = found["id"] | found["patient_id"]
        overlap.append(
            {
                "unit": table.unit,
                "num": len(table.facts),
                "num_image_in_training": int(found["id"].sum()),
                "num_patient_in_training": int(found["patient_id"].sum()),
                "num_without_patient": sum(not f.patient_id for f in table.facts),
            }
        )
        if either.any() and not either.all():
            apart = ["in training" if e else "not in training" for e in either]
            for metric, values in table.metrics.items():
                without += means(table, metric, values, "overlap", apart, draws)
    return {"overlap": overlap, "without_overlap": without}

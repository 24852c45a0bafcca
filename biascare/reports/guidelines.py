"""Which items of three guidelines an audit answers, and where; the others are said to be open.

In our words and by topic. An item that rows of predictions cannot answer (who was recruited, what
was approved) is named all the same: a reader must not take silence for compliance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

NOT_ANSWERABLE = "not answerable from these rows"


class Item(NamedTuple):
    """One item."""

    guideline: str
    topic: str
    section: str | None  # anchor of the section that answers it; None: rows cannot
    needs: str | None = None  # key of the audit that must hold something
    note: str = ""


TRIPOD = "TRIPOD+AI (2024)"
CLAIM = "CLAIM (2024 update)"
FDA = "FDA draft, AI-enabled device software functions (Jan 2025)"

ITEMS = (
    Item(TRIPOD, "Objectives, intended use and users (items 3, 4)", None),
    Item(TRIPOD, "Sources of data, dates, setting (5, 6)", "provenance", None, "names and hashes"),
    Item(TRIPOD, "Eligibility and recruitment of participants (6)", None),
    Item(TRIPOD, "How the reference outcome was assessed (8)", None),
    Item(TRIPOD, "Sample size (10)", "cohort", None, "numbers, and which gaps they can show"),
    Item(TRIPOD, "Missing data (11)", "cohort", None, "missing attributes are a group"),
    Item(TRIPOD, "Performance measures and their definitions (12)", "provenance"),
    Item(TRIPOD, "Class imbalance (13)", "training", "training", "composition of the training"),
    Item(TRIPOD, "Fairness: how it was approached and found (14)", "groups", "disparities"),
    Item(TRIPOD, "Differences between training and evaluation data (16)", "training", "training"),
    Item(TRIPOD, "Ethics, registration, protocol, funding (17, 18)", None),
    Item(TRIPOD, "Patient and public involvement (19)", None),
    Item(TRIPOD, "Participants and their characteristics (20)", "cohort"),
    Item(TRIPOD, "Performance with intervals, by key subgroups (23)", "performance"),
    Item(TRIPOD, "Limitations, generalisability (25 to 27)", "threats", None, "in part"),
    Item(CLAIM, "Data sources, selection, de-identification", None),
    Item(CLAIM, "Reference standard and its annotators", None),
    Item(CLAIM, "How data were divided; independence of the parts", "training", "training"),
    Item(CLAIM, "Model: architecture, training, parameters", None, None, "see the model card"),
    Item(CLAIM, "Metrics with statistical uncertainty", "performance"),
    Item(CLAIM, "Robustness, sensitivity, subgroups", "groups", "disparities"),
    Item(CLAIM, "Confidence and its calibration", "calibration", "calibration"),
    Item(CLAIM, "Analysis of failures", "examples"),
    Item(CLAIM, "External testing", None, None, "rows do not say whether a source is external"),
    Item(CLAIM, "Comparison with another model", "comparison", "comparison"),
    Item(FDA, "Device description, user interface, labelling", None),
    Item(FDA, "Risk assessment", None),
    Item(FDA, "Data management: representativeness of test data", "cohort"),
    Item(FDA, "Independence of development and test data", "training", "training"),
    Item(FDA, "Model description and development", None, None, "see the model card"),
    Item(FDA, "Performance validation with confidence intervals", "performance"),
    Item(FDA, "Subgroup performance; small subgroups named", "groups", "disparities"),
    Item(FDA, "Acceptance criteria fixed beforehand", "verdict", "verdict", "if they were"),
    Item(FDA, "Human and model as a team", None, None, "a reader study measures it"),
    Item(FDA, "Performance monitoring after release", None),
    Item(FDA, "Cybersecurity", None),
)


def guideline_rows(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the map; `section` is None where an item stays open."""
    rows = []
    for item in ITEMS:
        section = item.section if item.needs is None or audit[item.needs] else None
        rows.append(
            {
                "guideline": item.guideline,
                "topic": item.topic,
                "answered in": NOT_ANSWERABLE if section is None else section,
                "note": item.note,
            }
        )
    return rows

"""Sections that only some cases have: questions asked otherwise, labels, volumes.

    if audit["blind"]: section = image_reliance(audit)

The sentences come first and are those of `audit_words`; each number stands beside its count.
"""

from __future__ import annotations

from collections.abc import Sequence

from biascare.reports.audit_parts import (
    INTERVAL,
    NUM,
    Chart,
    Column,
    Row,
    Section,
    Table,
    anything,
    count,
    percent,
    score,
    signed,
    words,
)
from biascare.reports.audit_words import (
    WAYS_TO_SCORE,
    flip_sentence,
    label_sentences,
    metric_title,
    reliance_sentence,
    volume_sentence,
)
from biascare.reports.charts import Mark, forest

MOST_LABELS = 30
"""Labels of the chart, rarest first; the table holds all."""

ALWAYS_SHOWN = ("auroc", "average_precision")
"""Scores whose column stands also where no label has one: that is what is said of them."""

MOST_WAYS = 10
"""Rows of blind baselines that are shown unfolded."""

MOST_VOLUMES = 10
"""Volumes of the table that is open; the other holds all."""


DIFFERENCE = (
    Column("difference", "difference", signed),
    Column("low", "95 % from", signed),
    Column("high", "to", signed),
)


def image_reliance(audit: Row) -> Section:
    """Blind baselines, and what the image adds to the best of them."""
    first = [words("kind", "questions"), words("measure", "scored by")]
    last = [Column("num", "n", count), Column("with_image", "with the image", score)]
    reliance = [
        *first,
        words("best_blind", "best without looking"),
        *last,
        Column("blind", "without looking", score),
        Column("value", "image reliance", signed),
        *DIFFERENCE[1:],
    ]
    blind = [
        *first,
        words("asked", "asked"),
        *last,
        Column("blind", "asked so", score),
        *DIFFERENCE,
        Column("num_missing", "not asked so", count),
    ]
    sentences = [reliance_sentence(row) for row in audit["image_reliance"]]
    return Section(
        "image",
        "Does it look at the image?",
        [
            *sentences[:1],
            "Every question was asked again without its image, with a black one and with that of "
            "another case. Image reliance is the score with the image less that of the best of "
            "these, over the questions that have all; the choice of the best is part of its "
            "interval. A model may look and gain nothing by it: what is measured is the gain.",
        ],
        points=sentences[1:],
        tables=[
            Table("image_reliance", "Image reliance", _scored(audit["image_reliance"]), reliance),
            Table(
                "blind",
                "Each way not to look",
                _scored(audit["blind"]),
                blind,
                folded=len(audit["blind"]) > MOST_WAYS,
            ),
        ],
    )


def _scored(rows: Sequence[Row]) -> list[Row]:
    return [dict(row) | {"measure": WAYS_TO_SCORE[row["measure"]]} for row in rows]


def counterfactual(audit: Row) -> Section:
    """How often words about the patient change an answer, beside neutral words."""
    columns = [
        words("kind", "questions"),
        words("attribute"),
        Column("num", "n", count),
        Column("num_without", "ask for it", count),
        Column("flipped_words", "flipped", percent),
        Column("flipped_neutral", "by neutral words", percent),
        Column("flipped_difference", "difference", signed),
        Column("flipped_low", "95 % from", signed),
        Column("flipped_high", "to", signed),
        Column("moved_words", "probability moved", score),
        Column("moved_neutral", "by neutral words", score),
        Column("moved_difference", "difference", signed),
        Column("moved_low", "95 % from", signed),
        Column("moved_high", "to", signed),
    ]
    ways = [
        words("kind", "questions"),
        words("attribute"),
        words("asked"),
        Column("num", "n", count),
        Column("flipped", "flipped", percent),
    ]
    rows = audit["counterfactual"]
    # What is more than neutral words do is told by name; else one sentence tells of most flips.
    asked = sorted((row for row in rows if row["num"]), key=lambda row: -row["flipped_words"])
    found = [row for row in asked if row["flipped_low"] > 0] or asked[:1]
    sentences = [flip_sentence(row) for row in found]
    return Section(
        "words",
        "Do words about the patient change its answers?",
        [
            *(sentences[:1] or ["Every question asks for the attribute itself: nothing is shown."]),
            "The same image and question, with the patient's sex, age or race stated, swapped or "
            "removed. Neutral words before the question are the control: a model that any words "
            "upset flips by them too. Probability moved: mean change of the probability of the "
            "option first chosen. Questions that ask for the attribute itself are left out, and "
            f"counted. Intervals are not adjusted for the {len(asked)} comparisons.",
        ],
        points=sentences[1:],
        tables=[
            Table("counterfactual", "Flips beside those of neutral words", rows, columns),
            Table(
                "counterfactual_ways",
                "Each way to say it",
                audit["counterfactual_ways"],
                ways,
                folded=True,
            ),
        ],
    )


def labels(audit: Row) -> Section:
    """Every label, rarest first, those without a positive image too."""
    rows = audit["labels"]
    several = len(audit["label_scores"]) > 1
    about = [words("set")] if several else []
    columns = [
        *about,
        words("label"),
        words("group", "in training"),
        Column("num", "judged", count),
        Column("num_positive", "positive", count),
        Column("prevalence", "prevalence", percent),
    ]
    scores = {
        "auroc": "AUROC",
        "auroc_low": "95 % from",
        "auroc_high": "to",
        "average_precision": "average precision",
        "average_precision_low": "95 % from",
        "average_precision_high": "to",
        "recall": "recall",
        "precision": "precision",
        "f1": "F1",
        "accuracy": "accuracy",
        "threshold": "threshold",
    }
    # Recall is of classes and a threshold of findings: what no row has would be a column of dashes.
    columns += [
        Column(key, title, score)
        for key, title in scores.items()
        if key.startswith(("auroc", "average_precision"))
        or any(row[key] is not None for row in rows)
    ]
    smallest = audit["settings"]["min_group"]
    marks = [
        Mark(
            label=row["label"],
            num=row["num_positive"],
            mean=row["auroc"],
            low=row["auroc_low"],
            high=row["auroc_high"],
            weak=row["num_positive"] < smallest,
        )
        for row in rows
        if row["auroc"] is not None
    ]
    charts = []
    if marks:
        title = f"AUROC by label (n = positive images; hollow below {smallest})"
        svg = forest(marks[:MOST_LABELS], "AUROC", reference=0.5, reference_name="chance")
        charts.append(Chart(title, svg))
    totals = audit["label_scores"]
    keys = dict.fromkeys(key for row in totals for key in row)
    totals = [{key: row.get(key) for key in keys} for row in totals]
    whole = [Column(key, key.replace("_", " "), anything) for key in keys]
    return Section(
        "labels",
        "Label by label",
        [
            *(text for row in audit["label_scores"] for text in label_sentences(audit, row)),
            "AUROC of 0.5 is chance; average precision by chance is the prevalence, so it is "
            "compared between labels of one prevalence alone. Labels are in the order of their "
            "positive images, rarest first: of a handful every number is a guess. No interval: "
            "every draw of patients says the same, which is no certainty.",
        ],
        charts=charts,
        tables=[
            Table("labels", "Every label", rows, columns),
            Table("label_scores", "Over all labels", totals, whole, folded=True),
        ],
    )


def volumes(audit: Row) -> Section:
    """Slices of one volume as one mask."""
    means = [
        dict(row) | {"metric": metric_title(audit, row["metric"])} for row in audit["volume_means"]
    ]
    columns = [
        words("source"),
        words("volume"),
        words("target"),
        Column("num_slices", "slices", count),
        Column("dice", "Dice", score),
        Column("iou", "IoU", score),
        Column("nsd", "surface Dice", score),
        Column("hd95", "HD95, mm", score),
    ]
    marks = [
        Mark(label=r["group"], num=r["num"], mean=r["mean"], low=r["low"], high=r["high"])
        for r in audit["volume_means"]
        if r["metric"] == "dice" and r["by"] == "target"
    ]
    svg = forest(marks[:MOST_LABELS], "Dice of volumes")
    worst = audit["volumes"][:MOST_VOLUMES]
    return Section(
        "volumes",
        "Volumes as a whole",
        [
            volume_sentence(audit),
            "All slices of a volume that show a target are one mask, measured in mm. Slices "
            "without the target are nobody's click and count as empty on both sides: false alarms "
            "beyond its ends are not seen here.",
        ],
        charts=[Chart("Dice of volumes by target (n = volumes)", svg)] if marks else [],
        tables=[
            Table(
                "volume_means",
                "Means over volumes",
                means,
                [words("metric"), words("by"), words("group"), *NUM, *INTERVAL],
            ),
            Table("worst_volumes", "Worst volumes", worst, columns),
            Table("volumes", "Every volume, worst first", audit["volumes"], columns, folded=True),
        ],
    )

"""The sections of an audit: its words, charts and tables, for every form that it is written in.

for section in sections_of(found, pictures): section.title, section.text, section.tables
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence

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
    p_text,
    percent,
    score,
    signed,
    word,
    words,
    yes,
)
from biascare.reports.audit_summaries import counterfactual, image_reliance, labels, volumes
from biascare.reports.audit_words import (
    ASKED,
    changes,
    group_name,
    group_sentence,
    metric_title,
    threats,
)
from biascare.reports.charts import Mark, curve, forest
from biascare.reports.guidelines import guideline_rows

MOST_BARS = 30
"""Marks of one chart; the table holds all."""


# ---------------------------------------------------------------- sections


def sections_of(audit: Row, pictures: Sequence[Chart]) -> Iterator[Section]:
    """All sections; one without anything to say is left out, but its tables' files are not."""
    yield from _verdict(audit)
    yield _cohort(audit)
    yield _performance(audit)
    if audit["blind"]:
        yield image_reliance(audit)
    if audit["labels"]:
        yield labels(audit)
    if audit["volumes"]:
        yield volumes(audit)
    yield _groups(audit)
    if audit["counterfactual"]:
        yield counterfactual(audit)
    if audit["calibration"]:
        yield _calibration(audit)
    if audit["triage"] is not None:
        yield _triage(audit)
    if audit["deferral"]:
        yield _deferral(audit)
    yield _slices(audit)
    yield _examples(audit, pictures)
    if audit["comparison"] is not None:
        yield _comparison(audit)
    if audit["training"] is not None:
        yield _training(audit)
    yield Section(
        "warnings",
        "Small numbers and missing facts",
        points=audit["warnings"] or ["Nothing to warn of."],
    )
    yield Section("threats", "Threats to validity", points=threats(audit))
    yield _guidelines(audit)
    yield _provenance(audit)


def _verdict(audit: Row) -> Iterator[Section]:
    if audit["verdict"] is None:
        return
    rows = [
        dict(row)
        | {
            "metric": metric_title(audit, row["metric"]),
            "group": " against ".join(
                group_name(row["attribute"], group) for group in row["group"].split(" against ")
            ),
            "limit": ASKED[row["limit"]],
        }
        for row in audit["verdict"]["rows"]
    ]
    columns = [
        words("verdict"),
        words("metric"),
        words("attribute"),
        words("group"),
        words("limit", "asked"),
        Column("threshold", "", score),
        Column("num", "n", count),
        *INTERVAL,
    ]
    yield Section(
        "verdict",
        "Verdict against the thresholds",
        [
            "PASS: even the bad end of the 95 % interval clears the threshold. FAIL: even its good "
            "end misses it. INSUFFICIENT DATA: the threshold lies inside the interval, or the "
            f"group has fewer than {audit['verdict']['min_group']} cases. The worst word counts.",
        ],
        tables=[Table("verdict", "Every limit", rows, columns)],
    )


def _cohort(audit: Row) -> Section:
    units = [unit for unit in ("masks", "answers", "reports") if f"num_{unit}" in audit["cohort"]]
    units += ["images"]
    rows = [
        dict(row) | {"group": group_name(row["attribute"], row["group"])}
        for row in audit["attributes"]
        # Of what nothing is missing a sentence speaks.
        if row["images"] or row["group"] != "missing"
    ]
    complete = [
        r["attribute"] for r in audit["attributes"] if r["group"] == "missing" and not r["images"]
    ]
    columns = [
        words("attribute"),
        words("group"),
        *(Column(unit, unit, count) for unit in units),
        Column("patients", "patients", count),
        Column("share", "share of cases", percent),
    ]
    return Section(
        "cohort",
        "Who was audited",
        [
            "A group that is not in this table was not audited. Missing values are a group; "
            f"nothing is missing in: {', '.join(complete) or 'none of the attributes'}."
        ],
        tables=[Table("cohort", "Cases, images and patients by what is known", rows, columns)],
    )


def _performance(audit: Row) -> Section:
    columns = [words("metric"), words("by"), words("group"), *NUM, *INTERVAL]
    columns.append(Column("count", "of n", count))
    rows = [
        dict(row) | {"metric": metric_title(audit, row["metric"])} for row in audit["performance"]
    ]
    charts = []
    for metric, about in audit["metrics"].items():
        if not about["primary"]:
            continue
        mine = [r for r in audit["performance"] if r["metric"] == metric]
        overall = next(r for r in mine if r["by"] == "all")
        for by in ("prevalence", "kind", "modality"):
            marks = [_mark(by, r) for r in mine if r["by"] == by][:MOST_BARS]
            if marks:
                svg = forest(marks, about["title"], reference=overall["mean"])
                charts.append(Chart(f"{about['title']} by {by}", svg))
    primary = {about["title"] for about in audit["metrics"].values() if about["primary"]}
    main = [r for r in rows if r["metric"] in primary and r["by"] != "target"]
    rest = [r for r in rows if not (r["metric"] in primary and r["by"] != "target")]
    return Section(
        "performance",
        "How good the model is",
        [
            "Means with 95 % intervals from draws of whole patients. Where all cases of a group "
            "agree, the end of the interval is the exact binomial one.",
        ],
        charts=charts,
        tables=[
            Table("performance", "Main numbers", main, columns),
            Table(
                "benchmark",
                "By the protocol of the benchmark",
                audit["benchmark"],
                [words("what"), Column("value", "value", anything)],
                folded=True,
            ),
            Table(
                "performance_details", "By target, and all other numbers", rest, columns
            )._replace(folded=True),
        ],
    )


def _mark(by: str, row: Row) -> Mark:
    return Mark(
        label=group_name(by, row["group"]),
        num=row["num"],
        mean=row["mean"],
        low=row["low"],
        high=row["high"],
        weak=not row.get("compared", True),
    )


def _groups(audit: Row) -> Section:
    primary = [r for r in audit["disparities"] if r["family"] == "primary"]
    other = [r for r in audit["disparities"] if r["family"] != "primary"]
    columns = [
        words("metric"),
        words("attribute"),
        words("worst", "worst group"),
        words("best", "best group"),
        Column("gap", "gap", score),
        Column("null_mean", "by chance", score),
        Column("excess", "excess", score),
        Column("p_holm", "p (Holm)", p_text),
        Column("adjusted_gap", "gap, same mix", score),
        Column("p_case_mix", "p, same mix, alone", p_text),
        Column("p_case_mix_holm", "p, same mix (Holm)", p_text),
        Column("detectable", "detectable gap", score),
    ]
    equity = [
        words("metric"),
        words("attribute"),
        Column("overall", "overall", score),
        Column("ratio", "ratio", score),
        Column("null_ratio", "ratio by chance", score),
        Column("std", "std", score),
        Column("null_std", "std by chance", score),
        Column("null_worst", "worst by chance", score),
        Column("equity_scaled_std", "equity-scaled (std)", score),
        Column("equity_scaled_deviation", "equity-scaled (deviation)", score),
    ]
    group_columns = [
        words("metric"),
        words("attribute"),
        words("group"),
        *NUM,
        *INTERVAL,
        Column("count", "of n", count),
        Column("adjusted", "mean, same mix", score),
        Column("mix_covered", "mix covered", percent),
        Column("compared", "compared", yes, number=False),
    ]
    errors = [
        words("attribute"),
        Column("equalized_odds_difference", "equalised odds difference", score),
        words("decided_by", "decided by"),
        Column("equalized_odds_p_holm", "p (Holm)", p_text),
        Column("true_positive_gap", "true positive gap", score),
        Column("false_positive_gap", "false positive gap", score),
        Column("demographic_parity_difference", "demographic parity difference", score),
        Column("demographic_parity_p_holm", "p (Holm)", p_text),
    ]
    charts = []
    for metric, about in audit["metrics"].items():
        for row in (r for r in primary if r["metric"] == metric and about["primary"]):
            marks = [
                _mark(row["attribute"], g)
                for g in audit["groups"]
                if g["metric"] == metric and g["attribute"] == row["attribute"] and g["num"]
            ]
            svg = forest(marks[:MOST_BARS], about["title"], reference=row["overall"])
            charts.append(Chart(f"{about['title']} by {row['attribute']}", svg))
    num = len([r for r in primary if r["p"] is not None])
    shown_groups = [
        dict(g)
        | {
            "metric": metric_title(audit, g["metric"]),
            "group": group_name(g["attribute"], g["group"]),
        }
        for g in audit["groups"]
    ]
    named = {about["title"] for about in audit["metrics"].values() if about["primary"]}
    return Section(
        "groups",
        "Groups of patients",
        [
            "A gap between groups is never 0, so each stands beside its chance: the same numbers "
            "with the groups dealt anew among patients. A finding is a p within the same kinds of "
            "case (modality and target, or kind of question) of at most "
            f"{audit['settings']['level']} after Holm's adjustment over the {num} primary "
            "comparisons. The detectable gap would be found in 80 of 100 such data sets; where it "
            "is large, no finding means little. "
            "Hollow marks are groups that are too small or unknown, and not compared.",
        ],
        points=[group_sentence(audit, row) for row in primary if row["p"] is not None],
        charts=charts,
        tables=[
            Table("disparities", "Primary comparisons", _named(audit, primary), columns),
            Table(
                "groups",
                "Every group, primary metrics",
                [g for g in shown_groups if g["metric"] in named],
                group_columns,
            ),
            Table(
                "equity",
                "The same groups in other measures",
                _named(audit, primary),
                equity,
                "ratio is the worst mean by the best; equity-scaled (std): overall x (1 - std of "
                "the groups); equity-scaled (deviation): overall / (1 + sum of the groups' "
                "distances from it).",
                folded=True,
            ),
            Table(
                "error_types",
                "Yes-no questions: kinds of error",
                [
                    dict(row) | {"decided_by": metric_title(audit, row["decided_by"])}
                    for row in audit["error_types"]
                ],
                errors,
                "As fairlearn defines them: the larger gap of true and false positive rates; "
                "the gap in how often yes is said. Part of the secondary family.",
            ),
            Table(
                "disparities_secondary",
                "Secondary comparisons",
                _named(audit, other),
                columns,
                "Adjusted among themselves, for orientation; findings come from the primary ones.",
                folded=True,
            ),
            Table(
                "groups_secondary",
                "Every group, secondary metrics",
                [g for g in shown_groups if g["metric"] not in named],
                group_columns,
                folded=True,
            ),
        ],
    )


def _named(audit: Row, rows: Sequence[Row]) -> list[Row]:
    """Rows with names for readers in place of keys."""
    return [
        dict(row)
        | {"metric": metric_title(audit, row["metric"])}
        | {
            key: None if row[key] is None else group_name(row["attribute"], row[key])
            for key in ("worst", "best")
        }
        for row in rows
    ]


def _calibration(audit: Row) -> Section:
    smallest = audit["settings"]["min_calibration_group"]
    rows = [
        dict(row)
        | {
            "group": group_name(row["attribute"], row["group"]),
            "statement": "" if row["supports_statement"] else "too few for a statement",
        }
        for row in audit["calibration"]
    ]
    columns = [
        words("confidence"),
        words("attribute"),
        words("group"),
        Column("num", "n", count),
        Column("ece", "ECE", score),
        Column("null_mean", "if calibrated", score),
        Column("excess", "excess", score),
        Column("p", "p", p_text),
        Column("signed", "signed", score),
        Column("auroc", "AUROC", score),
        words("statement", ""),
    ]
    gaps = [
        words("confidence"),
        words("attribute"),
        words("compared"),
        Column("cceg", "CCEG", score),
        Column("null_mean", "by chance", score),
        Column("excess", "excess", score),
        Column("p", "p", p_text),
        Column("p_holm", "p (Holm)", p_text),
        Column("detectable", "detectable", score),
        Column("esce", "ESCE", score),
        Column("esce_null_mean", "by chance", score),
        Column("esce_p", "p", p_text),
    ]
    charts = []
    for name in dict.fromkeys(row["confidence"] for row in audit["reliability_bins"]):
        bins = [row for row in audit["reliability_bins"] if row["confidence"] == name]
        points = [(row["claimed"], row["true"]) for row in bins]
        notes = [(row["claimed"], row["true"], f"{row['num']:,}") for row in bins]
        num = sum(row["num"] for row in bins)
        what = "Dice" if name == "predicted Dice" else "share that is right"
        svg = curve([(name, points)], name, what, diagonal=True, notes=notes)
        charts.append(Chart(f"{name} (n = {num:,}; cases of each bin beside its point)", svg))
    shown_gaps = [
        dict(row) | {"compared": row["compared"] or f"fewer than two of {smallest}"}
        for row in audit["calibration_gaps"]
    ]
    return Section(
        "calibration",
        "Do confidences say what they claim",
        [
            "A calibration error (ECE) is never 0 either: beside it stands what a perfectly "
            "calibrated model would show on as many cases. Signed: above 0 is overconfident. "
            f"Groups below {smallest} cases support no statement. CCEG is the mean difference of "
            "the groups' ECE, ESCE the ECE raised by how they differ; by chance: groups dealt "
            "anew.",
        ],
        charts=charts,
        tables=[
            Table(
                "calibration",
                "All cases",
                [r for r in rows if r["attribute"] == "all"],
                columns,
            ),
            Table("calibration_gaps", "Between groups", shown_gaps, gaps),
            Table(
                "calibration_groups",
                "Every group",
                [r for r in rows if r["attribute"] != "all"],
                columns,
                folded=True,
            ),
            Table(
                "reliability_bins",
                "Bins of the diagrams",
                audit["reliability_bins"],
                [
                    words("confidence"),
                    Column("bin", "bin", count),
                    Column("num", "n", count),
                    Column("claimed", "claimed", score),
                    Column("true", "true", score),
                ],
                folded=True,
            ),
        ],
    )


def _triage(audit: Row) -> Section:
    found = audit["triage"]
    review = found["review"]
    signals = [{"signal": name} | dict(cell) for name, cell in found["signals"].items()]
    by_group = [
        {"signal": row["signal"], "by": axis, "group": group_name(axis, group)} | cell
        for row in signals
        for axis, groups in row.pop("by_group").items()
        for group, cell in groups.items()
    ]
    orders = [{"order": name} | dict(cell) for name, cell in review["orders"].items()]
    columns = [
        Column("num", "n", count),
        Column("num_failed", "failed", count),
        Column("auroc", "AUROC", score),
        Column("low", "95 % from", score),
        Column("high", "to", score),
    ]
    charts = []
    if orders:
        lines = [
            (row["order"], list(zip(review["fraction"], row["overall"], strict=True)))
            for row in sorted(orders, key=lambda row: (-(row["area"] or 0), row["order"]))[:5]
        ]
        # Corrections move a mean by hundredths: over [0, 1] all orders would be one line.
        reached = [value for _, points in lines for _, value in points]
        bounds = math.floor(min(reached) * 20) / 20, math.ceil(max(reached) * 20 + 1e-9) / 20
        svg = curve(
            lines,
            "share of masks that get one correction",
            "mean Dice",
            y_bounds=bounds if bounds[0] < bounds[1] else (0.0, 1.0),
        )
        charts.append(Chart(f"Review curve (n = {review['num']:,}; best five orders)", svg))
    promises = [
        {"signal": name, "threshold": row["threshold"], "why": row.get("why")}
        | {f"validation {k}": v for k, v in (row.get("validation") or {}).items()}
        | {f"test {k}": v for k, v in (row.get("test") or {}).items()}
        for name, row in (found["risk_control"] or {}).items()
    ]
    keys = dict.fromkeys(key for row in promises for key in row)
    promises = [{key: row.get(key) for key in keys} for row in promises]
    area = [
        words("order"),
        Column("area", "Dice gained over random order", signed),
        Column("area_low", "95 % from", signed),
        Column("area_high", "to", signed),
        Column("share_of_oracle", "share of the oracle's gain", percent),
    ]
    return Section(
        "triage",
        "Does the model know which masks are wrong",
        [
            f"{found['num_failed']:,} of {found['num']:,} masks have a Dice below "
            f"{found['failure_dice']}. AUROC: how well each uncertainty, which needs no truth, "
            "ranks them before the others (0.5 is chance). The review curve corrects the most "
            "uncertain masks by one simulated click; the oracle knows the truth.",
            *([f"No mix of the signals: {found['why_no_mix']}."] if found["why_no_mix"] else []),
        ],
        charts=charts,
        tables=[
            Table("triage", "Signals", signals, [words("signal"), *columns]),
            Table(
                "triage_review",
                "Orders of review",
                [
                    {k: v for k, v in row.items() if not isinstance(v, list | dict)}
                    for row in orders
                ],
                area,
            ),
            Table(
                "triage_promises",
                "Accepted without review, threshold from the validation run",
                promises,
                [
                    Column(
                        key,
                        key.replace("_", " ").replace(" num", " n", 1),
                        anything,
                        number=key not in ("signal", "why"),
                    )
                    for key in keys
                ],
            ),
            Table(
                "triage_groups",
                "Signals by group",
                by_group,
                [words("signal"), words("by"), words("group"), *columns],
                folded=True,
            ),
        ],
    )


def _deferral(audit: Row) -> Section:
    rows = [
        dict(row) | {"group": group_name(row["attribute"], row["group"])}
        for row in audit["deferral"]
    ]
    columns = [
        words("confidence"),
        words("attribute"),
        words("group"),
        Column("num", "n", count),
        Column("coverage", "kept of all", percent),
        Column("kept", "kept of group", percent),
        Column("mean_kept", "mean of kept", score),
        Column("mean_all", "mean of all", score),
        Column("gap", "gap", score),
        Column("null_mean", "by chance", score),
        Column("p_holm", "p (Holm)", p_text),
    ]
    middle = [row for row in rows if row["coverage"] == 0.8]
    return Section(
        "deferral",
        "Who would be sent to a person",
        [
            "If the model answers only where it is surest, whose cases does it keep? One threshold "
            "for all may send one group away more often than another.",
        ],
        tables=[
            Table("deferral_80", "80 % of all cases kept", middle, columns, folded=True),
            Table("deferral", "Every coverage", rows, columns, folded=True),
        ],
    )


def _slices(audit: Row) -> Section:
    columns = [
        words("metric"),
        words("slice"),
        *NUM,
        Column("mean", "mean", score),
        Column("others", "elsewhere", score),
        Column("same_kind_elsewhere", "same kinds elsewhere", score),
        Column("p", "p", p_text),
        Column("q", "q (FDR)", p_text),
        Column("confirmed", "confirmed", yes, number=False),
    ]
    rows = [dict(row) | {"metric": metric_title(audit, row["metric"])} for row in audit["slices"]]
    text = [
        f"{metric_title(audit, s['metric'])}: {s['num_searched']:,} combinations of up to three "
        f"facts were searched in one half of the patients; {s['num_tested']} of the worst were "
        f"tested on the other half, and {s['num_confirmed'] or 'none'} "
        f"{'is' if s['num_confirmed'] == 1 else 'are'} confirmed."
        for s in audit["slice_search"]
    ]
    return Section(
        "slices",
        "Weak spots",
        [
            *text,
            "Means are of the half that was not searched. q is the p adjusted by Benjamini and "
            "Hochberg. Same kinds elsewhere: what the same targets or questions score outside the "
            "slice; where it is no better, the kind of case is the weakness.",
        ],
        tables=[
            Table("slices", "Confirmed", [r for r in rows if r["confirmed"]], columns),
            Table(
                "slices_unconfirmed",
                "Tested and not confirmed",
                [r for r in rows if not r["confirmed"]],
                columns,
                folded=True,
            ),
        ],
    )


def _examples(audit: Row, pictures: Sequence[Chart]) -> Section:
    masks = [
        words("id"),
        words("modality"),
        words("target"),
        words("prevalence"),
        Column("dice", "Dice", score),
        Column("predicted_dice", "predicted", score),
        Column("true_pixels", "pixels", count),
        words("sex"),
        Column("age", "age", word),
        words("race"),
    ]
    answers = [
        words("id"),
        words("modality"),
        words("question"),
        words("answered"),
        words("reference", "true answer"),
        Column("confidence", "confidence", score),
    ]
    return Section(
        "examples",
        "What to look at",
        [
            "The worst masks, at most two of a target, rare and small ones first among equals; and "
            "the wrong answers of the highest confidence, at most two of a modality and kind.",
        ],
        charts=pictures,
        tables=[
            Table("worst_masks", "Worst masks", audit["worst_masks"], masks),
            Table("surest_errors", "Surest wrong answers", audit["surest_errors"], answers),
        ],
    )


def _comparison(audit: Row) -> Section:
    found = audit["comparison"]
    rows = [
        dict(row)
        | {
            "metric": metric_title(audit, row["metric"]),
            "group": group_name(row["by"], row["group"]),
        }
        for row in found["rows"]
    ]
    columns = [
        words("metric"),
        words("by"),
        words("group"),
        Column("num", "n", count),
        Column("baseline", "baseline", score),
        Column("run", "this run", score),
        Column("difference", "difference", score),
        Column("low", "95 % from", score),
        Column("high", "to", score),
        Column("num_better", "better", count),
        Column("num_worse", "worse", count),
        words("who", "who"),
    ]
    primary = [name for name, about in audit["metrics"].items() if about["primary"]]
    titles = {metric_title(audit, name) for name in primary}
    main = [r for r in rows if r["metric"] in titles and r["by"] != "target"]
    return Section(
        "comparison",
        "Against the baseline: who gained, who paid",
        [
            f"Baseline: {found['baseline']['model']}. {found['num_shared']:,} cases are paired by "
            f"name; {found['num_only_run']:,} are in this run alone and "
            f"{found['num_only_baseline']:,} in the baseline alone. Intervals are of differences "
            "case by case, patients drawn together; gained and paid: the interval excludes 0.",
            *(text for name in primary for text in changes(audit, name)),
        ],
        tables=[
            Table("comparison", "Main numbers", main, columns),
            Table(
                "comparison_details",
                "By target, and all other numbers",
                [r for r in rows if r not in main],
                columns,
                folded=True,
            ),
        ],
    )


def _training(audit: Row) -> Section:
    found = audit["training"]
    composition = [
        words("axis"),
        words("category"),
        Column("num", "n", count),
        Column("share", "share", percent),
    ]
    overlap = [
        words("unit", "of"),
        Column("num", "cases", count),
        Column("num_image_in_training", "image in training", count),
        Column("num_patient_in_training", "patient in training", count),
        Column("num_without_patient", "without patient", count),
    ]
    folders = [
        words("source"),
        words("split"),
        Column("images", "images", count),
        Column("masks", "masks", count),
        Column("was_evaluated", "evaluated here", yes, number=False),
    ]
    imbalance = [
        words("axis"),
        Column("num_categories", "categories", count),
        Column("ratio", "largest : smallest", score),
        Column("effective_number", "worth equal ones", score),
        Column("missing_share", "missing", percent),
    ]
    without = [words("metric"), words("group", "cases"), *NUM, *INTERVAL]
    return Section(
        "training",
        "What the model was trained on",
        ["As the folders named after --train say; whether the model saw others is not known here."],
        tables=[
            Table("training_folders", "Folders", found["folders"], folders),
            Table("training_overlap", "Overlap with the cases above", found["overlap"], overlap),
            Table(
                "training_without_overlap",
                "Numbers with the overlap apart",
                [
                    dict(row) | {"metric": metric_title(audit, row["metric"])}
                    for row in found["without_overlap"]
                ],
                without,
            ),
            Table("training_imbalance", "Imbalance", found["imbalance"], imbalance),
            Table(
                "training_composition",
                "Composition",
                found["composition"],
                composition,
                folded=True,
            ),
        ],
    )


def _guidelines(audit: Row) -> Section:
    columns = [words("guideline"), words("topic"), words("answered in"), words("note", "")]
    return Section(
        "guidelines",
        "Reporting guidelines",
        ["Where this page helps with an item. It does not by itself fulfil any of them."],
        tables=[Table("guidelines", "Map", guideline_rows(audit), columns, folded=True)],
    )


def _provenance(audit: Row) -> Section:
    header = audit["provenance"]
    settings = header["settings"] | {f"audit: {k}": v for k, v in audit["settings"].items()}
    rows = [
        {"what": key, "value": header[key]}
        for key in ("model", "weights", "commit", "benchmark", "format", "format_version")
    ]
    rows += [
        {
            "what": f"data, {d['task']}",
            "value": f"{d['source']}/{d['split']} {d['version']}; {d['licence']}; "
            f"content {d['content_hash']}",
        }
        for d in header["data"]
    ]
    rows += [{"what": key, "value": json.dumps(value)} for key, value in settings.items()]
    rows += [
        {"what": f"{key} (sha256)", "value": value} for key, value in audit.get("files", {}).items()
    ]
    definitions = [
        {
            "metric": about["title"],
            "of": about["unit"],
            "family": "primary" if about["primary"] else "secondary",
            "better": "no direction"
            if not about["judged"]
            else ("higher" if about["higher_is_better"] else "lower"),
        }
        for about in audit["metrics"].values()
    ]
    return Section(
        "provenance",
        "Provenance and definitions",
        [
            "Every number is defined in docs/evaluation.md and docs/audit.md of biascare, and can "
            "be computed again from the cases without the model.",
        ],
        tables=[
            Table("provenance", "Provenance", rows, [words("what"), words("value")]),
            Table(
                "metrics",
                "Metrics of this audit",
                definitions,
                [words("metric"), words("of"), words("family"), words("better", "better is")],
            ),
        ],
    )

"""A reader study as a page, Markdown, JSON and CSV: plain sentences first, then charts and tables.

    write_reader_study(found, "outputs/reader_study")

`found` is what `evaluation.reader_study.analyse` computed; nothing is computed here. The page is
one file without script, font or network.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from biascare.durable import write_text
from biascare.evaluation.reader_log import WITH, WITHOUT
from biascare.evaluation.reader_study import ALL_READERS
from biascare.reports.audit import csv_text, markdown_sections
from biascare.reports.audit_parts import (
    Chart,
    Column,
    Row,
    Section,
    Table,
    count,
    p_text,
    percent,
    score,
    signed,
    word,
    words,
    yes,
)
from biascare.reports.charts import Mark, forest
from biascare.reports.page import page, paragraph, section, table

TITLE = "Reader study"
LEVEL = 0.05
MOST_MARKS = 30
"""Marks of one chart; the tables hold all."""


def write_reader_study(found: Row, folder: str | Path) -> list[Path]:
    """Write all forms; their paths, the page first."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sections = list(sections_of(found))
    text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)
    files = {
        "reader_study.html": html_page(found, sections),
        "reader_study.md": markdown(found, sections),
        "reader_study.json": text + "\n",
    }
    files |= {f"{one.name}.csv": csv_text(one.rows) for part in sections for one in part.tables}
    for name, text in files.items():
        write_text(folder / name, text)
    return [folder / name for name in files]


def html_page(found: Row, sections: Sequence[Section]) -> str:
    parts = ["<div class='audit'>"]
    parts += [paragraph(line) for line in sentences(found)]
    for one in sections:
        parts += [section(one.title), *(paragraph(text) for text in one.text)]
        points = "".join(f"<li>{html.escape(point)}</li>" for point in one.points)
        parts.append(f"<ul>{points}</ul>" if points else "")
        figures = "".join(
            f"<figure><figcaption>{html.escape(chart.title)}</figcaption>{chart.svg}"
            + "".join(f"<p>{html.escape(line)}</p>" for line in chart.lines)
            + "</figure>"
            for chart in one.charts
        )
        parts.append(f"<div class='charts'>{figures}</div>" if figures else "")
        for cells in (cells for cells in one.tables if cells.rows):
            titles = [column.title for column in cells.columns]
            body = f"<div class='wide'>{table(titles, cells.shown())}</div>"
            if cells.folded:
                body = f"<details><summary>{html.escape(cells.title)}</summary>{body}</details>"
            else:
                body = f"<h3>{html.escape(cells.title)}</h3>{body}"
            parts.append(body)
    return page(TITLE, [*parts, "</div>"])


def markdown(found: Row, sections: Sequence[Section]) -> str:
    lines = [f"# {TITLE}"]
    for line in sentences(found):
        lines += ["", line]
    return "\n".join([*lines, *markdown_sections(sections)]) + "\n"


# ---------------------------------------------------------------- sentences


def sentences(found: Row) -> Iterator[str]:
    """What a busy person should take away, most important first."""
    num = len({row["reader"] for row in found["rounds"]})
    yield (
        f"{num} {'reader' if num == 1 else 'readers'} gave {found['num_answers']:,} answers on "
        f"{found['num_cases']:,} cases of {found['num_patients']:,} patients, first without and "
        "then with what the model suggests."
    )
    yield from _comparison_sentences(found)
    worse = [row for row in found["readers"] if row["worse"]]
    for row in worse:
        yield (
            f"Reader {row['reader']} got worse with the model: {row['right_to_wrong']} right "
            f"answers became wrong and {row['wrong_to_right']} wrong ones right, on "
            f"{row['num']:,} cases (p {_p(row['p_holm'])} for {len(found['readers'])} readers "
            f"together{', so chance explains it' if row['p_holm'] > LEVEL else ''})."
        )
    if found["readers"] and not worse:
        yield "No reader got worse with the model."
    yield from _suggestion_sentences(found)
    yield from _alone_sentences(found)
    yield _group_sentence(found)


def _comparison_sentences(found: Row) -> Iterator[str]:
    compared = found["comparison"]
    accuracy, area, lasted = (compared[key] for key in ("accuracy", "auc", "seconds_ratio"))
    if accuracy is not None:
        before, after = accuracy["means"]
        yield (
            f"With the model readers are right in {after:.1%} of their cases, without it in "
            f"{before:.1%}: {accuracy['difference'] * 100:+.1f} points (95 % interval "
            f"{accuracy['low'] * 100:+.1f} to {accuracy['high'] * 100:+.1f}; "
            f"{_p_of(accuracy['p'])}). {_verdict(accuracy)}"
        )
    if area is not None:
        before, after = area["means"]
        yield (
            f"The area under the ROC curve, by the readers' confidence, is {after:.3f} with the "
            f"model and {before:.3f} without it: {area['difference']:+.3f} (95 % interval "
            f"{area['low']:+.3f} to {area['high']:+.3f}; {_p_of(area['p'])})."
        )
    if lasted is not None:
        yield (
            f"A case takes {lasted['ratio']:.2f} times as long with the model (95 % interval "
            f"{lasted['low']:.2f} to {lasted['high']:.2f}; {_p_of(lasted['p'])})."
        )


def _verdict(accuracy: Row) -> str:
    if accuracy["p"] is None:
        return "Nothing varies between readers or cases, so nothing can be tested."
    if accuracy["p"] > LEVEL:
        return "Other readers and cases might show no difference, or the opposite one."
    change = "a gain" if accuracy["difference"] > 0 else "a loss"
    return f"This is {change} beyond the chance of which readers and cases were in the study."


def _suggestion_sentences(found: Row) -> Iterator[str]:
    for row in found["suggestions"]:
        if row["reader"] == ALL_READERS:
            yield (
                f"Where the suggestion was {row['suggestion']} ({row['num']:,} readings), readers "
                f"were right in {row['right_without']:,} before and in {row['right_with']:,} with "
                f"it: {row['wrong_to_right']:,} wrong answers became right and "
                f"{row['right_to_wrong']:,} right ones wrong."
            )


def _alone_sentences(found: Row) -> Iterator[str]:
    alone = found["alone"]
    if alone is None:
        return
    yield (
        f"The model alone is right in {alone['accuracy']:.1%} of {alone['num']:,} cases (95 % "
        f"interval {alone['low']:.1%} to {alone['high']:.1%})."
    )
    for name in (WITHOUT, WITH):
        row = alone[name]
        if row is not None:
            than = "better" if row["value"] > 0 else "worse"
            yield (
                f"Readers {name} it are {abs(row['value']) * 100:.1f} points {than} than the model "
                f"alone (95 % interval {row['low'] * 100:+.1f} to {row['high'] * 100:+.1f}; "
                f"{_p_of(row['p'])})."
            )


def _group_sentence(found: Row) -> str:
    tested = [row for row in found["groups"] if row["p_holm"] is not None]
    if not tested:
        return (
            "Groups of patients cannot be compared: for no attribute two groups of at least 20 "
            "cases are known."
        )
    beyond = [row for row in tested if row["p_holm"] <= LEVEL]
    if not beyond:
        least = min(row["detectable"] for row in tested)
        return (
            f"None of {len(tested)} comparisons of groups of patients (by reader, round and "
            f"attribute) shows more than chance; a difference below {least * 100:.0f} points would "
            "not have been found reliably."
        )
    largest = max(beyond, key=lambda row: row["gap"])
    return (
        f"{len(beyond)} of {len(tested)} comparisons of groups of patients show more than chance. "
        f"The largest: {_who(largest)} {largest['round']} the model, by {largest['attribute']}: "
        f"{largest['gap'] * 100:.0f} points between {largest['worst']} and {largest['best']} "
        f"(chance alone: {largest['null_mean'] * 100:.0f}; p {_p(largest['p_holm'])})."
    )


def _who(row: Row) -> str:
    return row["reader"] if row["reader"] == ALL_READERS else f"reader {row['reader']}"


def _p(value: float) -> str:
    return p_text(value) if value < 0.001 else f"= {p_text(value)}"


def _p_of(value: float | None) -> str:
    return "nothing to test" if value is None else f"p {_p(value)}"


# ---------------------------------------------------------------- sections


def sections_of(found: Row) -> Iterator[Section]:
    yield _reader_section(found)
    yield _comparison_section(found)
    yield _time_section(found)
    yield _category_section(found)
    yield _group_section(found)
    yield _limits(found)


def _reader_section(found: Row) -> Section:
    marks = [
        Mark(
            f"{row['reader']}, {row['round']}", row["num"], row["accuracy"], row["low"], row["high"]
        )
        for row in found["rounds"]
    ]
    changes = [
        Mark(row["reader"], row["num"], row["difference"], row["low"], row["high"])
        for row in found["readers"]
    ]
    charts = [Chart("Right answers by reader and round", forest(marks[:MOST_MARKS], "share right"))]
    if changes:
        reach = max(max(abs(mark.low or 0), abs(mark.high or 0)) for mark in changes)
        reach = min(math.ceil(reach * 10) / 10 or 0.1, 1.0)
        svg = forest(
            changes[:MOST_MARKS],
            "with less without the model",
            reference=0.0,
            reference_name="no change",
            bounds=(-reach, reach),
        )
        charts.append(Chart("Change by reader, cases of both rounds", svg))
    columns = [
        words("reader"),
        Column("num", "cases of both rounds", count),
        Column("accuracy_without", "right without", percent),
        Column("accuracy_with", "right with", percent),
        Column("difference", "change", _signed),
        Column("low", "95 % from", _signed),
        Column("high", "to", _signed),
        Column("wrong_to_right", "wrong to right", count),
        Column("right_to_wrong", "right to wrong", count),
        Column("p", "p", p_text),
        Column("p_holm", "p, all readers", p_text),
        Column("worse", "got worse", yes),
    ]
    suggested = [
        words("reader"),
        words("suggestion", "suggestion was"),
        *_change_columns("readings"),
    ]
    return Section(
        "readers",
        "Readers",
        [
            "Without and with the model, with 95 % intervals for cases like these. p is the exact "
            "one of McNemar, then adjusted for the number of readers (Holm)."
        ],
        charts=charts,
        tables=[
            Table("readers", "Change by reader", found["readers"], columns),
            Table("suggestions", "Right and wrong suggestions", found["suggestions"], suggested),
        ],
    )


def _comparison_section(found: Row) -> Section:
    rows = []
    for key, title in (("accuracy", "share right"), ("auc", "area under the ROC curve")):
        one = found["comparison"][key]
        if one is not None:
            before, after = one["means"]
            rows.append({"measure": title, "without": before, "with": after} | one)
    alone = []
    for name in (WITHOUT, WITH):
        for key, title in ((name, "share right"), (f"{name}_auc", "area under the ROC curve")):
            row = None if found["alone"] is None else found["alone"][key]
            if row is not None:
                alone.append({"round": name, "measure": title} | row)
    test = [
        words("measure"),
        Column("num_readers", "readers", count),
        Column("without", "without", score),
        Column("with", "with", score),
        Column("difference", "difference", signed),
        Column("low", "95 % from", signed),
        Column("high", "to", signed),
        Column("f", "F", _three),
        Column("df2", "df", _three),
        Column("p", "p", p_text),
        Column("ms_t", "MS(T)", _small),
        Column("ms_tr", "MS(T:R)", _small),
        Column("variance", "variance", _small),
        Column("cov1", "Cov1", _small),
        Column("cov2", "Cov2", _small),
        Column("cov3", "Cov3", _small),
    ]
    less = [
        words("round"),
        words("measure"),
        Column("value", "readers less model", signed),
        Column("low", "95 % from", signed),
        Column("high", "to", signed),
        Column("df", "df", _three),
        Column("p", "p", p_text),
    ]
    covariance = "by leaving out patients" if found["patients_repeat"] else (
        "by Gallas' unbiased products for right answers and DeLong's for areas"
    )  # fmt: skip
    return Section(
        "comparison",
        "With against without the model, and the model alone",
        [
            "Obuchowski and Rockette's analysis with Hillis' degrees of freedom: readers and cases "
            "both stand for others like them. Covariances are estimated "
            f"{covariance}. The model alone is one and fixed; each reader is compared with it on "
            "the cases that this reader has read."
        ],
        tables=[
            Table("comparison", "The two rounds", rows, test),
            Table("alone", "Readers against the model alone", alone, less),
        ],
    )


def _time_section(found: Row) -> Section:
    rows = found["rounds"]
    marks = [
        Mark(
            f"{row['reader']}, {row['round']}",
            row["num"],
            row["seconds_median"],
            row["seconds_first_quartile"],
            row["seconds_third_quartile"],
        )
        for row in rows
    ]
    longest = 4.0 * math.ceil(max((mark.high or 0.0 for mark in marks), default=0.0) / 4) or 4.0
    columns = [
        words("reader"),
        words("round"),
        Column("num", "cases", count),
        Column("accuracy", "right", percent),
        Column("low", "95 % from", percent),
        Column("high", "to", percent),
        Column("seconds_median", "median seconds", _tenth),
        Column("seconds_first_quartile", "first quartile", _tenth),
        Column("seconds_third_quartile", "third quartile", _tenth),
        Column("seconds_total", "seconds in all", _tenth),
    ]
    svg = forest(marks[:MOST_MARKS], "seconds for a case", bounds=(0.0, longest))
    return Section(
        "time",
        "Time for a case",
        ["Medians with first and third quartile: a break of ten minutes would rule a mean."],
        charts=[Chart("Median seconds and quartiles", svg)],
        tables=[Table("rounds", "Every reader and round", rows, columns)],
    )


def _category_section(found: Row) -> Section:
    rows = found["categories_changed"]
    pooled = [row for row in rows if row["reader"] == ALL_READERS]
    marks = [
        Mark(
            f"{row['category']}, {name}", row["num"], row[f"right_{name}"] / row["num"], None, None
        )
        for row in pooled
        if row["state"] == "present"
        for name in (WITHOUT, WITH)
    ]
    columns = [
        words("category"),
        words("state", "category is"),
        words("reader"),
        *_change_columns("readings"),
    ]
    charts = [Chart("Found where present", forest(marks[:MOST_MARKS], "share of readings"))]
    return Section(
        "categories",
        "Change by category",
        [
            "A category is right where it is ticked and present, or neither. Readings of all "
            "readers are added up here; a rare category stands on few cases, however many readers "
            "have read them."
        ],
        charts=charts if marks else [],
        tables=[
            Table("categories_all", "All readers", pooled, columns),
            Table("categories", "Reader by reader", rows, columns, folded=True),
        ],
    )


def _group_section(found: Row) -> Section:
    rows = found["groups"]
    each = [
        {key: row[key] for key in ("attribute", "round", "reader")} | {
            key: group[key] for key in ("name", "num", "num_patients", "mean", "low", "high")
        } | {"compared": group["compared"]}
        for row in rows
        for group in row["groups"]
    ]  # fmt: skip
    marks = [
        Mark(
            f"{row['attribute']}, {row['reader']}, {row['round']}",
            sum(group["num"] for group in row["groups"] if group["compared"]),
            row["gap"],
            row["gap_low"],
            row["gap_high"],
        )
        for row in rows
        if row["gap"] is not None
    ]
    spread = [
        words("attribute"),
        words("round"),
        words("reader"),
        words("worst"),
        words("best"),
        Column("gap", "spread", score),
        Column("null_mean", "by chance", score),
        Column("detectable", "detectable", score),
        Column("p", "p", p_text),
        Column("p_holm", "p, all", p_text),
    ]
    group = [
        words("attribute"),
        words("round"),
        words("reader"),
        words("name", "group"),
        Column("num", "cases", count),
        Column("num_patients", "patients", count),
        Column("mean", "right", percent),
        Column("low", "95 % from", percent),
        Column("high", "to", percent),
        Column("compared", "compared", yes),
    ]
    widest = max((mark.high or 0.0 for mark in marks), default=1.0)
    bounds = (0.0, min(math.ceil(widest * 5) / 5 or 0.2, 1.0))
    svg = forest(marks[:MOST_MARKS], "best less worst group", bounds=bounds)
    charts = [Chart("Spread between groups", svg)]
    return Section(
        "groups",
        "Groups of patients",
        [
            "Spread is the share right of the best group less that of the worst. It is never 0 by "
            "chance, so it stands beside the mean spread when the groups are dealt anew. Groups of "
            "fewer than 20 cases are shown and not compared."
        ],
        charts=charts if marks else [],
        tables=[
            Table("spread", "Spread by reader and round", rows, spread),
            Table("groups", "Every group", each, group, folded=True),
        ],
    )


def _limits(found: Row) -> Section:
    points = [
        *found["notes"],
        "The round with the model comes after the one without: that readers see a case again, and "
        "get used to the task, may be part of a gain.",
        "Intervals of one reader speak of other cases and not of other readers; only the "
        "comparison of the rounds speaks of both.",
        "This is no medical device and no certificate.",
    ]
    return Section("limits", "What this study cannot say", points=points)


def _change_columns(what: str) -> list[Column]:
    return [
        Column("num", what, count),
        Column("right_without", "right without", count),
        Column("right_with", "right with", count),
        Column("wrong_to_right", "wrong to right", count),
        Column("right_to_wrong", "right to wrong", count),
    ]


def _signed(value: Any) -> str:
    return word(None) if value is None else f"{value:+.1%}"


def _three(value: Any) -> str:
    return word(None) if value is None else f"{value:.2f}"


def _small(value: Any) -> str:
    return word(None) if value is None else f"{value:.3g}"


def _tenth(value: Any) -> str:
    return word(None) if value is None else f"{value:,.1f}"

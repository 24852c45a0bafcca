"""An audit as a page, as Markdown, as JSON and as CSV: one list of sections, shown four times.

    write_audit(found, "outputs/audit", pictures)      # audit.html, .md, .json, one CSV per table

`found` is what `evaluation.audit.audit` computed; nothing is computed here. The page is one file
without script, font or network, is printed as it stands, and carries nothing in colour alone.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from biascare.durable import write_text
from biascare.reports.audit_parts import Chart, Row, Section, Table
from biascare.reports.audit_sections import sections_of
from biascare.reports.audit_words import headlines, verdict_sentence
from biascare.reports.page import STYLE
from biascare.version import __version__

SIGNS = {"PASS": "✓", "FAIL": "✗", "INSUFFICIENT DATA": "?"}


def write_audit(audit: Row, folder: str | Path, pictures: Sequence[Chart] = ()) -> list[Path]:
    """Write all forms; their paths, the page first. `pictures` are of the worst masks, in order."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sections = list(sections_of(audit, pictures))
    files = {
        "audit.html": html_page(audit, sections),
        "audit.md": markdown(audit, sections),
        "audit.json": json.dumps(audit, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    tables = [table for section in sections for table in section.tables]
    # Every table has its file, an empty one too: a missing file would be a question.
    files |= {f"{table.name}.csv": csv_text(table.rows) for table in tables}
    for name, text in files.items():
        write_text(folder / name, text)
    return [folder / name for name in files]


def html_page(audit: Row, sections: Sequence[Section]) -> str:
    """The whole document."""
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("audit.html.jinja")
    verdict = "NO VERDICT" if audit["verdict"] is None else audit["verdict"]["overall"]
    return template.render(
        name=audit["provenance"]["model"],
        style=Markup(STYLE),
        verdict=verdict,
        verdict_class=verdict.lower().replace(" ", "-"),
        sign=SIGNS.get(verdict, "-"),
        why=verdict_sentence(audit),
        counts=counts_sentence(audit),
        headlines=headlines(audit),
        sections=sections,
        version=__version__,
    )


def counts_sentence(audit: Row) -> str:
    """What was audited, in one line."""
    cohort = audit["cohort"]
    units = [
        f"{cohort[f'num_{unit}']:,} {unit}"
        for unit in ("masks", "answers", "reports")
        if f"num_{unit}" in cohort
    ]
    patients = cohort["num_patients"]
    who = f"{patients:,} patients" if patients else "patients unknown"
    data = sorted({f"{d['source']}/{d['split']}" for d in audit["provenance"]["data"]})
    benchmark = audit["provenance"]["benchmark"]
    where = f"; benchmark {benchmark}" if benchmark else ""
    return (
        f"{', '.join(units) or 'cases'} on {cohort['num_images']:,} images of {who}; "
        f"{', '.join(data)}{where}"
    )


def markdown(audit: Row, sections: Sequence[Section]) -> str:
    """The same words and tables; charts are in the page alone."""
    verdict = "NO VERDICT" if audit["verdict"] is None else audit["verdict"]["overall"]
    lines = [f"# Audit of {audit['provenance']['model']}", "", f"**{verdict}.** "]
    lines[-1] += verdict_sentence(audit)
    lines += ["", counts_sentence(audit), ""]
    lines += [f"{n}. {text}" for n, text in enumerate(headlines(audit), 1)]
    return "\n".join([*lines, *markdown_sections(sections)]) + "\n"


def markdown_sections(sections: Sequence[Section]) -> Iterator[str]:
    """Lines of words and tables, without charts; the lines below a chart stay."""
    for section in sections:
        yield from ("", f"## {section.title}")
        for text in section.text:
            yield from ("", text)
        if section.points:
            yield from ("", *(f"- {text}" for text in section.points))
        for chart in section.charts:
            if chart.lines:
                yield f"- {chart.title}: {' '.join(chart.lines)}"
        for table in section.tables:
            if table.rows:
                yield from ("", f"### {table.title}", "")
                if table.note:
                    yield from (table.note, "")
                yield from markdown_table(table)


def markdown_table(table: Table) -> Iterator[str]:
    cells = [[column.title for column in table.columns], ["---"] * len(table.columns)]
    for row in [*cells, *table.shown()]:
        # A bar inside a name would end its cell, and a line break the table.
        yield "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in row) + " |"


def csv_text(rows: Sequence[Row]) -> str:
    """Every key of the rows in the order in which keys appear; None is an empty cell."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

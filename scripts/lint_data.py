"""Check prepared record folders before anything is trained on them.

    python scripts/lint_data.py prepared/*/train prepared/*/test --num-workers 8

Reads every row: content hash against the manifest, every image decoded, masks against images,
texts, attributes, names; then all folders together: duplicates by pixels and by perceptual hash,
different answers to one question about the same pixels, and leaks between splits by image, study
and patient, within a dataset and between datasets that share images.
Name the folders of all splits in one call, or leaks cannot be seen.

Writes to --output: lint.json, lint.html (self-contained), orientation_N.png (a few images per
source with their masks, to check by eye), near_N.png (near duplicates side by side).

Exit code: 0 no errors, 1 errors (with --strict also warnings), 2 wrong arguments. A finding that is
known and accepted is acknowledged with --allow CODE: it is shown, but does not count.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from biascare.checks.lint import LintSettings, Report
    from biascare.records import Records
    from biascare.reports.sheets import Overlay

IMAGES_PER_SOURCE = 4
IMAGES_PER_SHEET = 48
SMALL = 16  # pixels; the table counts masks below it


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="prepared record folders")
    parser.add_argument("--output", default="outputs/lint", help="folder of the report")
    parser.add_argument(
        "--image-size", type=int, default=256, help="training size in pixels, for mask areas"
    )
    parser.add_argument("--num-workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--examples", type=int, default=5, help="ids shown per finding")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="CODE", help="a finding that is accepted"
    )
    parser.add_argument("--strict", action="store_true", help="warnings fail too")
    parser.add_argument("--no-sheets", action="store_true", help="no PNG, no pictures in the page")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> LintSettings:
    from biascare.checks.lint import LintSettings, Vocabulary
    from biascare.records.vocabulary import canonical_modality, canonical_target
    from data_prep.formats.orientation import sides_agree

    return LintSettings(
        vocabulary=Vocabulary(canonical_target, canonical_modality, sides_agree),
        image_size=options.image_size,
        num_examples=options.examples,
        num_workers=options.num_workers,
    )


def check(options: argparse.Namespace) -> Report:
    """Run all checks behind a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from biascare.checks.lint import check_codes, lint

    check_codes(options.allow)  # before the bar
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("images", total=None)
        return lint(
            options.folders,
            settings_of(options),
            allowed=options.allow,
            begin=lambda total: progress.update(task, total=total),
            advance=lambda rows: progress.update(task, advance=rows),
        )


# ---------------------------------------------------------------- sheets


def overlay_of(records: Records, index: int, note: str = "") -> Overlay:
    """One stored image with all its masks at native size."""
    from biascare.checks.lint import name_of
    from biascare.data.transforms import decode_image
    from biascare.records import decode_mask
    from biascare.reports.sheets import Overlay

    row = records[index]
    size = row["height"], row["width"]
    masks = [(target["name"], decode_mask(target["rle"], *size)) for target in row["targets"]]
    identity = row["id"] if len(row["id"]) <= 34 else "… " + row["id"][-32:]
    title = f"{name_of(records)}  {row['modality']}\n{identity}" + (f"\n{note}" if note else "")
    return Overlay(title=title, image=decode_image(row["image"]), masks=masks)


def readable(records: Records, index: int, note: str = "") -> list[Overlay]:
    """The overlay, or nothing where the row is damaged: the findings say so."""
    try:
        return [overlay_of(records, index, note)]
    except ValueError:
        return []


def orientation_overlays(report: Report) -> list[Overlay]:
    """Of each source, the images with the most targets: sides and organs in one look."""
    import numpy as np
    import pyarrow.compute as pc

    from biascare.checks.statistics import column_table

    first: dict[str, Records] = {}
    for records in report.records:
        first.setdefault(records.manifest["source"], records)
    overlays = []
    for records in first.values():
        targets = column_table(records, ("targets",))["targets"]
        counts = np.asarray(pc.list_value_length(targets).to_numpy())
        # Evenly spaced stretches of the folder, and in each the richest image.
        parts = np.array_split(np.arange(len(counts)), min(IMAGES_PER_SOURCE, len(counts)))
        for part in parts:
            overlays += readable(records, int(part[counts[part].argmax()]))
    return overlays


def near_overlays(report: Report) -> list[Overlay]:
    overlays = []
    for number, pair in enumerate(report.near, start=1):
        for folder, row in pair:
            overlays += readable(report.records[folder], row, f"pair {number}")
    return overlays


def write_sheets(report: Report, folder: Path) -> list[Path]:
    from biascare.reports.sheets import overlay_sheet

    written = []
    for name, overlays, title in (
        ("orientation", orientation_overlays(report), "Is every image upright, every side right?"),
        ("near", near_overlays(report), "Nearly equal images in several splits or sources"),
    ):
        for old in folder.glob(f"{name}_*.png"):
            old.unlink()
        for start in range(0, len(overlays), IMAGES_PER_SHEET):
            path = folder / f"{name}_{start // IMAGES_PER_SHEET + 1}.png"
            overlay_sheet(overlays[start : start + IMAGES_PER_SHEET], path, title=title)
            written.append(path)
    return written


# ---------------------------------------------------------------- report


def as_json(report: Report) -> dict[str, Any]:
    return {
        "errors": report.num_findings("error"),
        "warnings": report.num_findings("warning"),
        "allowed": report.num_findings("allowed"),
        "findings": [f._asdict() | {"message": f.message} for f in report.findings],
        "folders": [summary._asdict() for summary in report.folders],
    }


def print_report(report: Report) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    if report.folders:
        console.print(_folder_table(report))
    styles = {"error": "bold red", "warning": "yellow", "allowed": "dim"}
    for finding in report.findings:
        head = f"[{styles[finding.level]}]{finding.level}[/] [bold]{finding.code}[/]"
        console.print(f"{head} {finding.num:,} in {escape(finding.where)}: {finding.message}")
        for example in finding.examples:
            console.print(f"    [dim]{escape(example[:200])}[/]")


def _folder_table(report: Report) -> Any:
    from rich.table import Table

    table = Table(title="Folders", caption=_FOLDER_CAPTION)
    for name in _FOLDER_COLUMNS:
        left = name == "folder"
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for cells in _folder_rows(report):
        table.add_row(*cells)
    return table


_FOLDER_COLUMNS = ("folder", "images", "masks", "small", "small then", "point", "thin")
_FOLDER_CAPTION = (
    f"small: masks below {SMALL} native pixels; small then: below {SMALL} pixels at the training "
    "size; point: a single pixel there; thin: plain nearest-neighbour resizing would erase it, "
    "ours keeps it"
)


def _folder_rows(report: Report) -> Iterator[list[str]]:
    """Cells of `_FOLDER_COLUMNS`."""
    for f in report.folders:
        then = f.training_areas
        small = _below(f.native_areas, SMALL), _below(then, SMALL)
        numbers = (f.num_rows, f.num_masks, *small, then.get(1, 0), f.num_thin)
        yield [f.where, *(f"{number:,}" for number in numbers)]


def _below(areas: dict[int, int], limit: int) -> int:
    return sum(count for area, count in areas.items() if area < limit)


def write_page(report: Report, path: Path, sheets: list[Path]) -> None:
    """lint.html: verdict, findings, folders, mask areas, sheets, in one file."""
    numbers = [f"{level}s: {report.num_findings(level)}" for level in ("error", "warning")]
    parts = [
        "<h1>Prepared data</h1>",
        f"<p>Kinds of finding: {', '.join(numbers)}, accepted: {report.num_findings('allowed')}.",
        "<table><thead><tr><th>level<th>code<th>where<th>cases<th>what, and examples</tr></thead>",
    ]
    for f in report.findings:
        examples = "".join(f"<li>{html.escape(example)}" for example in f.examples)
        parts.append(
            f"<tr class={f.level}><td>{f.level}<td>{f.code}<td>{html.escape(f.where)}"
            f"<td>{f.num:,}<td>{html.escape(f.message)}<ul>{examples}</ul></tr>"
        )
    parts.append("</table>")
    if report.folders:
        parts += ["<h2>Folders</h2>", _html_table(_FOLDER_COLUMNS, _folder_rows(report))]
        parts += [f"<p>{_FOLDER_CAPTION}.", "<h2>Mask areas</h2>", _area_table(report)]
    for sheet in sheets:
        data = base64.b64encode(sheet.read_bytes()).decode()
        parts.append(f'<h2>{sheet.stem}</h2><img alt="" src="data:image/png;base64,{data}">')
    path.write_text(
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Prepared data</title>"
        f"<style>{_STYLE}</style><main>{''.join(parts)}</main></html>\n",
        encoding="utf-8",
    )


def _area_table(report: Report) -> str:
    """Masks per area, in powers of two, at native and at training size."""
    rows = []
    for f in report.folders:
        for kind, areas in (("native", f.native_areas), ("training", f.training_areas)):
            if areas:
                bins = "; ".join(f"{_bin(area)}: {count:,}" for area, count in areas.items())
                rows.append([f.where, kind, bins])
    text = (
        "<p>Number of masks by area. Native: in pixels of the image as stored; training: after "
        "resizing. A bin goes from a power of two to just below the next."
    )
    return text + _html_table(("folder", "size", "pixels: masks"), rows)


def _bin(area: int) -> str:
    """The bin whose lower bound is `area`, 0 or a power of two."""
    return str(area) if area < 2 else f"{area:,} to {2 * area - 1:,}"


def _html_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}" for name in columns)
    body = ("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    return f"<table><thead><tr>{head}</thead>{''.join(body)}</table>"


_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;color:#222;margin:0}main{max-width:1200px;"
    "margin:auto;padding:1.5rem}img{max-width:100%}table{border-collapse:collapse}"
    "th,td{padding:.25rem .8rem .25rem 0;border-bottom:1px solid #ddd;text-align:left;"
    "vertical-align:top;overflow-wrap:anywhere}ul{margin:.2rem 0;padding-left:1.1rem;color:#555}"
    ".error td:first-child{color:#b00020;font-weight:700}.warning td:first-child{color:#8a5a00}"
    ".allowed{color:#777}"
)


def _kinds(number: int) -> str:
    return "1 kind" if number == 1 else f"{number} kinds"


def main() -> None:
    options = parse(sys.argv[1:])
    try:
        report = check(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    sheets = [] if options.no_sheets else write_sheets(report, folder)
    text = json.dumps(as_json(report), indent=2, ensure_ascii=False)
    (folder / "lint.json").write_text(text + "\n", encoding="utf-8")
    write_page(report, folder / "lint.html", sheets)
    print_report(report)
    errors, warnings = report.num_findings("error"), report.num_findings("warning")
    counts = f"{_kinds(errors)} of error, {_kinds(warnings)} of warning"
    print(f"{counts}; the report is in {folder}/lint.html")
    raise SystemExit(1 if errors or (options.strict and warnings) else 0)


if __name__ == "__main__":
    main()

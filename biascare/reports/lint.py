"""What the linter found, for the terminal, as JSON and as a page; and sheets to check by eye.

sheets = write_sheets(report, folder)
write_page(report, folder / "lint.html", sheets)
print_report(report)
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from biascare.checks.lint import Report
from biascare.checks.statistics import column_table
from biascare.data.transforms import decode_image
from biascare.records import Records, decode_mask
from biascare.reports.page import page, paragraph, picture, section, table
from biascare.reports.sheets import Overlay, overlay_sheet

IMAGES_PER_SOURCE = 4
IMAGES_PER_SHEET = 48
SMALL = 16  # pixels; the table counts masks below it


def overlay_of(records: Records, index: int, where: str, note: str = "") -> Overlay:
    """One stored image with all its masks at native size. `where`: the name of its folder."""
    row = records[index]
    size = row["height"], row["width"]
    masks = [(target["name"], decode_mask(target["rle"], *size)) for target in row["targets"]]
    identity = row["id"] if len(row["id"]) <= 34 else "… " + row["id"][-32:]
    title = f"{where}  {row['modality']}\n{identity}" + (f"\n{note}" if note else "")
    return Overlay(title=title, image=decode_image(row["image"]), masks=masks)


def readable(records: Records, index: int, where: str, note: str = "") -> list[Overlay]:
    """The overlay, or nothing where the row is damaged: the findings say so."""
    # A sheet must come out of damaged data most of all.
    try:
        return [overlay_of(records, index, where, note)]
    except ValueError:
        return []


def orientation_overlays(report: Report) -> list[Overlay]:
    """Of each source, the images with the most targets: sides and organs in one look."""
    first: dict[str, tuple[Records, str]] = {}
    for records, summary in zip(report.records, report.folders, strict=True):
        first.setdefault(records.manifest["source"], (records, summary.where))
    overlays = []
    for records, where in first.values():
        targets = column_table(records, ("targets",))["targets"]
        counts = np.asarray(pc.list_value_length(targets).to_numpy())
        # Evenly spaced stretches of the folder, and in each the richest image.
        parts = np.array_split(np.arange(len(counts)), min(IMAGES_PER_SOURCE, len(counts)))
        for part in parts:
            overlays += readable(records, int(part[counts[part].argmax()]), where)
    return overlays


def write_sheets(report: Report, folder: Path) -> list[Path]:
    near = []
    for number, pair in enumerate(report.near, start=1):
        for index, row in pair:
            where = report.folders[index].where
            near += readable(report.records[index], row, where, f"pair {number}")
    written = []
    for name, overlays, title in (
        ("orientation", orientation_overlays(report), "Is every image upright, every side right?"),
        ("near", near, "Nearly equal images in several splits or sources"),
    ):
        # A shorter report would leave the last sheets of the one before beside its own.
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
    console = Console(highlight=False)
    if report.folders:
        folders = Table(title="Folders", caption=_FOLDER_CAPTION)
        for name in _FOLDER_COLUMNS:
            # Folded, not cut: the end of a path is what tells two folders apart.
            left = name == "folder"
            folders.add_column(name, justify="left" if left else "right", overflow="fold")
        for cells in _folder_rows(report):
            folders.add_row(*cells)
        console.print(folders)
    styles = {"error": "bold red", "warning": "yellow", "allowed": "dim"}
    for finding in report.findings:
        head = f"[{styles[finding.level]}]{finding.level}[/] [bold]{finding.code}[/]"
        # Escaped: a folder or a question in square brackets is no style.
        console.print(f"{head} {finding.num:,} in {escape(finding.where)}: {finding.message}")
        for example in finding.examples:
            console.print(f"    [dim]{escape(example[:200])}[/]")


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
    accepted = f"accepted: {report.num_findings('allowed')}"
    parts = [paragraph(f"Kinds of finding: {', '.join(numbers)}, {accepted}."), _findings(report)]
    if report.folders:
        parts += [section("Folders"), table(_FOLDER_COLUMNS, _folder_rows(report))]
        parts += [paragraph(f"{_FOLDER_CAPTION}."), section("Mask areas"), _area_table(report)]
    for sheet in sheets:
        parts += [section(sheet.stem), picture(sheet, sheet.stem)]
    path.write_text(page("Prepared data", parts), encoding="utf-8")


def _findings(report: Report) -> str:
    """A table of its own: rows have the colour of their level, and examples below the message."""
    columns = ("level", "code", "where", "cases", "what, and examples")
    rows = []
    for f in report.findings:
        examples = "".join(f"<li>{html.escape(example)}</li>" for example in f.examples)
        rows.append(
            f"<tr class={f.level}><td>{f.level}</td><td>{f.code}</td>"
            f"<td>{html.escape(f.where)}</td>"
            f"<td>{f.num:,}</td><td>{html.escape(f.message)}<ul>{examples}</ul></td></tr>"
        )
    head = "".join(f"<th>{name}</th>" for name in columns)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _area_table(report: Report) -> str:
    """Masks per area, in powers of two, at native and at training size."""
    rows = []
    for f in report.folders:
        for kind, areas in (("native", f.native_areas), ("training", f.training_areas)):
            if areas:
                # A bin is named by its lower bound, 0 or a power of two.
                names = (str(n) if n < 2 else f"{n:,} to {2 * n - 1:,}" for n in areas)
                counts = zip(names, areas.values(), strict=True)
                bins = "; ".join(f"{name}: {count:,}" for name, count in counts)
                rows.append([f.where, kind, bins])
    text = (
        "Number of masks by area. Native: in pixels of the image as stored; training: after "
        "resizing. A bin goes from a power of two to just below the next."
    )
    return paragraph(text) + table(("folder", "size", "pixels: masks"), rows)

"""Cells of an .xlsx file: the first sheet as rows of text.

    for row in read_sheet(Path("patient_data_od.xlsx")):
        row.get("A"), row.get("B")

An .xlsx file is a zip of XML. Reading the cells takes these few lines; formulas count by their
saved value, dates stay the numbers they are stored as, formats are ignored.
"""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from data_prep.formats.archives import SafeArchive
from data_prep.pipeline.shards import UnusableItemError

NAMESPACE = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
SHARED_TEXTS = "xl/sharedStrings.xml"
SHEET = re.compile(r"xl/worksheets/sheet(\d+)\.xml")
COLUMN = re.compile(r"[A-Z]+")


def read_sheet(path: Path) -> list[dict[str, str]]:
    """Rows of the first sheet: column letters -> text; empty cells are absent.

    Raises ValueError for what is not an .xlsx file, and for one with a document type of its own,
    which no spreadsheet program writes.
    """
    try:
        with SafeArchive(path) as archive:
            sheets = [name for name in archive.names() if SHEET.fullmatch(name)]
            if not sheets:
                raise ValueError(f"{path} holds no worksheet; expected an .xlsx file")
            texts = []
            if SHARED_TEXTS in archive:  # a workbook of numbers alone has none
                shared = _parse(archive.read(SHARED_TEXTS))
                texts = [_text(item) for item in shared.iter(f"{NAMESPACE}si")]
            first = min(sheets, key=lambda name: int(SHEET.fullmatch(name)[1]))  # type: ignore[index]
            root = _parse(archive.read(first))
        rows = root.iter(f"{NAMESPACE}row")
        return [dict(_cells(row, texts)) for row in rows]
    except (ElementTree.ParseError, UnusableItemError, IndexError) as error:
        raise ValueError(f"{path} is not a readable .xlsx file: {error}") from error


def _parse(data: bytes) -> ElementTree.Element:
    # Before parsing: entities that refer to one another expand without end.
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise UnusableItemError("it declares a document type")
    return ElementTree.fromstring(data)


def _text(item: ElementTree.Element) -> str:
    """Text of an element that may be cut into runs of different format."""
    return "".join(part.text or "" for part in item.iter(f"{NAMESPACE}t"))


def _cells(row: ElementTree.Element, texts: list[str]) -> list[tuple[str, str]]:
    cells = []
    for cell in row.iter(f"{NAMESPACE}c"):
        column = COLUMN.match(cell.get("r", ""))
        value = cell.findtext(f"{NAMESPACE}v", "")
        # Spreadsheet programs keep each text once, in a list of its own; the cell holds its number.
        if cell.get("t") == "s" and value:
            value = texts[int(value)]
        elif cell.get("t") == "inlineStr":
            value = _text(cell)
        if column and value.strip():
            cells.append((column[0], value.strip()))
    return cells

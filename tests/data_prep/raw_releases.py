"""Raw files for converter tests: images, tables and spreadsheets as releases write them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from biascare.checks.lint import LintSettings, Vocabulary, lint
from biascare.records import Records, decode_mask
from biascare.records.vocabulary import canonical_modality, canonical_target
from data_prep.formats.orientation import sides_agree

SETTINGS = LintSettings(
    Vocabulary(canonical_target, canonical_modality, sides_agree), image_size=64
)


def picture(number: int = 0, size: tuple[int, int] = (6, 4), kind: str = "JPEG") -> bytes:
    """An encoded image of (width, height); its pixels depend on the number."""
    width, height = size
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    return path


def put_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A CSV table with the columns of the first row; gzip when the name ends so."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode("utf-8")
    return put(path, gzip.compress(data) if path.suffix == ".gz" else data)


def put_json(path: Path, value: Any) -> Path:
    return put(path, json.dumps(value, ensure_ascii=False, indent=1))


def put_zip(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def put_sheet(path: Path, rows: Iterable[Mapping[str, str | float]]) -> Path:
    """An .xlsx file as spreadsheet programs write it: texts in a shared table, numbers in cells."""
    texts: list[str] = []
    lines = []
    for number, row in enumerate(rows, start=1):
        cells = ""
        for column, value in row.items():
            if isinstance(value, str):
                texts.append(value)
                cells += f'<c r="{column}{number}" t="s"><v>{len(texts) - 1}</v></c>'
            else:
                cells += f'<c r="{column}{number}"><v>{value}</v></c>'
        lines.append(f'<row r="{number}">{cells}</row>')
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    sheet = f"<worksheet {space}><sheetData>{''.join(lines)}</sheetData></worksheet>"
    shared = "".join(f"<si><t>{text}</t></si>" for text in texts)
    return put_zip(
        path,
        {
            "[Content_Types].xml": b"<Types/>",
            "xl/worksheets/sheet1.xml": sheet.encode(),
            "xl/sharedStrings.xml": f"<sst {space}>{shared}</sst>".encode(),
        },
    )


def run(converter: ModuleType, source: Path, output: Path, *more: str) -> None:
    converter.main(["--source", str(source), "--output", str(output), *more])


def assert_lint_passes(output: Path) -> None:
    """Every prepared folder in `output`, alone: generated pictures repeat, so splits share some."""
    for manifest in sorted(output.rglob("manifest.json")):
        findings = lint([manifest.parent], SETTINGS).findings
        assert not [finding for finding in findings if finding.level == "error"], findings


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """All rows of a prepared folder by id, after its content hash and the linter's rules."""
    records = Records(folder)
    records.verify()
    assert_lint_passes(folder)
    rows = [records[index] for index in range(len(records))]
    return {row["id"]: row for row in rows}


def said(row: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(question, answer, kind) of a row."""
    turns = row["conversations"]
    return [
        (asked["text"], answered["text"], asked["kind"])
        for asked, answered in zip(turns[::2], turns[1::2], strict=True)
    ]


def options_of(row: dict[str, Any]) -> list[tuple[str, ...]]:
    """Options of each question of a row; empty where it is no choice."""
    return [tuple(turn["options"]) for turn in row["conversations"][::2]]


def facts_of(row: dict[str, Any]) -> list[dict[str, str]]:
    """Facts of each question of a row."""
    return [turn["facts"] for turn in row["conversations"][::2]]


def masks_of(row: dict[str, Any]) -> dict[str, np.ndarray]:
    return {
        target["name"]: decode_mask(target["rle"], row["height"], row["width"])
        for target in row["targets"]
    }


def skipped(folder: Path) -> list[tuple[str, str]]:
    """(item, reason) of the ledger of a prepared folder."""
    path = folder.with_name(f"{folder.name}.skipped.jsonl")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(line["item"], line["reason"]) for line in lines]

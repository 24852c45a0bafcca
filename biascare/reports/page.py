"""One look for every HTML page: self-contained, readable without a network.

text = page("Prepared data", [section("Folders"), table(("folder", "images"), rows)])
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable
from pathlib import Path

STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;color:#222;margin:0}main{max-width:1200px;"
    "margin:auto;padding:1.5rem}img{max-width:100%}h2{margin-top:2rem}"
    "table{border-collapse:collapse;margin:.6rem 0}"
    "th,td{padding:.2rem .8rem .2rem 0;border-bottom:1px solid #ddd;text-align:left;"
    "vertical-align:top;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}"
    "ul{margin:.2rem 0;padding-left:1.1rem;color:#555}"
    ".error td:first-child{color:#b00020;font-weight:700}.warning td:first-child{color:#8a5a00}"
    ".allowed{color:#777}"
)


def page(title: str, parts: Iterable[str]) -> str:
    """A whole document. `parts` are HTML; the title is text."""
    # One file without script or font from elsewhere: it is mailed and opened behind firewalls.
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style><main><h1>{html.escape(title)}</h1>{''.join(parts)}</main></html>\n"
    )


def section(title: str) -> str:
    return f"<h2>{html.escape(title)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def table(columns: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Cells are text."""
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def picture(path: str | Path, alt: str) -> str:
    """A PNG inside the page."""
    # Inside the page: a file beside it would be lost when the page is passed on.
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'

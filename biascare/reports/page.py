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
    # Audits: a first screen, tables that scroll by themselves, pages that print.
    ".audit td,.audit th{padding:.2rem .7rem .2rem 0;overflow-wrap:break-word}"
    ".audit th{font-weight:600;border-bottom:2px solid #555;vertical-align:bottom}"
    ".audit .number{text-align:right}.audit td{max-width:24rem}"
    ".wide{overflow-x:auto}.note,.kicker,.counts,.audit footer{color:#555}"
    ".audit ul{color:#222}.first p{margin:.35rem 0}.kicker b{color:#222;overflow-wrap:anywhere}"
    ".verdict{display:inline-flex;align-items:center;gap:.6rem;font-size:1.7rem;font-weight:700;"
    "padding:.3rem .9rem;margin:.2rem 0;border:3px solid #1b1b1b;border-radius:.3rem}"
    ".verdict.pass{border-style:double;border-width:6px;color:#00406b}"
    ".verdict.fail{background:#5c1300;color:#fff;border-color:#5c1300}"
    ".verdict.insufficient-data{border-style:dashed;background:#f3e9d0}"
    ".verdict.no-verdict{border-color:#999;font-size:1.1rem;color:#555}"
    ".findings{padding-left:1.4rem;color:#111;font-size:1.05rem}.findings li{margin:.5rem 0}"
    "nav{margin-top:1rem;line-height:1.9;font-size:.9rem}details{margin:.6rem 0}"
    "summary{cursor:pointer;font-weight:600}h3{margin:1.1rem 0 .2rem}"
    ".charts{display:flex;flex-wrap:wrap;gap:1rem 2rem}.charts figure{margin:0;width:370px;"
    "max-width:100%}.charts figcaption{font-weight:600;overflow-wrap:anywhere}"
    ".charts figure p{margin:.1rem 0;font-size:.85rem;color:#555;overflow-wrap:anywhere}"
    ".chart{max-width:100%;height:auto}a{color:#00406b}"
    "@media(max-width:600px){main{padding:.8rem}.verdict{font-size:1.3rem}"
    ".findings{font-size:1rem}.audit td:not(.number){min-width:5rem}}"
    # Sizes are in rem, so that the root decides how small everything prints.
    "@media print{html{font-size:9px}body{font-size:1rem}main{max-width:none;padding:0}"
    "nav{display:none}details::details-content{content-visibility:visible;block-size:auto}"
    "summary{list-style:none;break-after:avoid}.wide{overflow:visible}"
    "thead{display:table-header-group}figure,tr,li,.verdict{break-inside:avoid}"
    "h2,h3,.note{break-after:avoid}p{orphans:3;widows:3}p:has(+.charts){break-after:avoid}"
    "section{break-inside:auto}"
    ".charts{gap:1rem}.charts figure{width:calc(33% - 1rem)}*{print-color-adjust:exact}}"
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

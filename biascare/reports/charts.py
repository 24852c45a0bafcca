"""Charts as inline SVG: no script, no font, the same bytes for the same numbers.

    forest([Mark(label="F", num=40, mean=0.61, low=0.5, high=0.7)], "Dice", reference=0.66)

Each chart is 420 units wide, so that its words can be read on a telephone too. Shapes and positions
carry what is said; colours only help.
"""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image

WIDTH = 420
INK, QUIET, ACCENT = "#1b1b1b", "#767676", "#005a8f"
LABEL_WIDTH = 58  # characters of a line

MOST_PIXELS = 256
"""Longer side of a picture in a page."""


class Mark(NamedTuple):
    """One line of a forest chart."""

    label: str
    num: int
    mean: float
    low: float | None
    high: float | None
    weak: bool = False  # too few for a comparison: drawn hollow


def forest(
    marks: Sequence[Mark],
    axis: str,
    *,
    reference: float | None = None,
    reference_name: str = "all",
    bounds: tuple[float, float] = (0.0, 1.0),
) -> str:
    """Means with their intervals, one below the other, and a dashed line to compare with."""
    left, right = 14.0, WIDTH - 14.0
    low, high = bounds

    def x(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (right - left)

    parts: list[str] = []
    y = 8.0
    for mark in marks:
        text = f"{mark.label} (n = {mark.num:,}): {mark.mean:.2f}"
        if mark.low is not None and mark.high is not None:
            text += f" [{mark.low:.2f}, {mark.high:.2f}]"
        for line in textwrap.wrap(text, LABEL_WIDTH):
            y += 15
            parts.append(_text(left, y, line))
        y += 10
        if mark.low is not None and mark.high is not None:
            parts.append(
                f'<line x1="{x(mark.low):.1f}" x2="{x(mark.high):.1f}" y1="{y:.1f}" y2="{y:.1f}" '
                f'stroke="{ACCENT}" stroke-width="2.5"/>'
            )
        fill = "#fff" if mark.weak else ACCENT
        parts.append(
            f'<circle cx="{x(mark.mean):.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" '
            f'stroke="{ACCENT}" stroke-width="2"/>'
        )
        y += 5
    bottom = y + 6
    if reference is not None:
        at = x(reference)
        parts.insert(
            0,
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="6" y2="{bottom:.1f}" stroke="{QUIET}" '
            'stroke-dasharray="4 3"/>',
        )
        axis = f"{axis}; dashed: {reference_name} ({reference:.2f})"
    parts.append(_axis(bottom, left, right, low, high, axis))
    return _svg(bottom + 38, parts, axis)


def _axis(y: float, left: float, right: float, low: float, high: float, title: str) -> str:
    ticks = [low + (high - low) * k / 4 for k in range(5)]
    parts = [f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{INK}"/>']
    for k, value in enumerate(ticks):
        at = left + (right - left) * k / 4
        anchor = "start" if k == 0 else "end" if k == 4 else "middle"
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y:.1f}" y2="{y + 4:.1f}" stroke="{INK}"/>'
        )
        parts.append(_text(at, y + 16, f"{value:.3g}", size=11, anchor=anchor))
    parts.append(_text((left + right) / 2, y + 32, title, size=12, anchor="middle"))
    return "".join(parts)


def curve(
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    x_axis: str,
    y_axis: str,
    *,
    diagonal: bool = False,
    notes: Sequence[tuple[float, float, str]] = (),
    y_bounds: tuple[float, float] = (0.0, 1.0),
) -> str:
    """Named lines over [0, 1] x `y_bounds`, told apart by dashes; `notes` are small words at
    points."""
    left, right, top, bottom = 54.0, WIDTH - 14.0, 12.0, 262.0

    low, high = y_bounds

    def place(x: float, y: float) -> tuple[float, float]:
        share = (min(max(y, low), high) - low) / (high - low)
        return left + x * (right - left), bottom - share * (bottom - top)

    parts = [
        f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" fill="none" '
        f'stroke="{QUIET}"/>'
    ]
    for k in range(5):
        across, up = k / 4, low + (high - low) * k / 4
        tick_x, tick_y = place(across, up)
        parts.append(_text(tick_x, bottom + 15, f"{across:g}", size=11, anchor="middle"))
        parts.append(_text(left - 6, tick_y + 4, f"{up:.3g}", size=11, anchor="end"))
    if diagonal:
        (ax, ay), (bx, by) = place(0, low), place(1, high)
        parts.append(
            f'<line x1="{ax:.1f}" y1="{ay:.1f}" x2="{bx:.1f}" y2="{by:.1f}" stroke="{QUIET}" '
            'stroke-dasharray="2 3"/>'
        )
    for number, (_, points) in enumerate(lines):
        dash = DASHES[number % len(DASHES)]
        at = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(*point) for point in points))
        parts.append(
            f'<polyline points="{at}" fill="none" stroke="{STROKES[number % len(STROKES)]}" '
            f'stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        if len(points) <= 12:
            parts += [
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{STROKES[number % 5]}"/>'
                for px, py in (place(*point) for point in points)
            ]
    for x, y, text in notes:
        px, py = place(x, y)
        # Above the point, and below where that would leave the chart.
        parts.append(_text(px, py - 7 if py > 30 else py + 16, text, size=10, anchor="middle"))
    parts.append(_text((left + right) / 2, bottom + 32, x_axis, size=12, anchor="middle"))
    parts.append(
        f'<text transform="translate(12 {(top + bottom) / 2:.1f}) rotate(-90)" '
        f'text-anchor="middle" font-size="12" fill="{INK}">{html.escape(y_axis)}</text>'
    )
    y = bottom + 40
    for number, (name, _) in enumerate(lines if len(lines) > 1 else ()):
        y += 16
        stroke, dash = STROKES[number % len(STROKES)], DASHES[number % len(DASHES)]
        parts.append(
            f'<line x1="{left}" x2="{left + 36}" y1="{y - 4:.1f}" y2="{y - 4:.1f}" '
            f'stroke="{stroke}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        parts.append(_text(left + 44, y, name))
    return _svg(y + 8, parts, f"{y_axis} against {x_axis}")


STROKES = ("#005a8f", "#b34700", "#1b1b1b", "#5b8a00", "#8a4f8a")
DASHES = ("none", "7 4", "2 3", "10 3 2 3", "1 4")


def outlines(image: np.ndarray | None, masks: Sequence[tuple[str, np.ndarray]], about: str) -> str:
    """Side by side: the part of an image around the masks, with one outlined in each copy.

    `image` [H, W, 3] uint8, or None for a blank canvas; `masks` are names and [H, W] bool. Two
    pictures and not two colours: they are told apart in grey too.
    """
    rows, columns = _window(np.logical_or.reduce([mask for _, mask in masks]))
    height, width = rows.stop - rows.start, columns.stop - columns.start
    half, gap = (WIDTH - 10) / 2, 10
    scale = half / max(height, width)
    parts = []
    picture = None if image is None else _png(image[rows, columns])
    for number, (name, mask) in enumerate(masks):
        left = number * (half + gap)
        view = (
            f'<svg x="{left:.1f}" y="18" width="{width * scale:.1f}" '
            f'height="{height * scale:.1f}" viewBox="0 0 {width} {height}">'
        )
        background = f'<rect width="{width}" height="{height}" fill="#444"/>'
        if picture is not None:
            background = (
                f'<image width="{width}" height="{height}" preserveAspectRatio="none" '
                f'href="{picture}"/>'
            )
        path = _edges(mask[rows, columns])
        # White on black: seen on any grey.
        lines = "".join(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{size}" '
            'vector-effect="non-scaling-stroke" stroke-linecap="square"/>'
            for colour, size in (("#000", 4), ("#fff", 1.8))
        )
        parts.append(_text(left, 12, name) + view + background + lines + "</svg>")
    return _svg(height * scale + 20, parts, about)


def _window(mask: np.ndarray) -> tuple[slice, slice]:
    """A square around what is in a mask, as large again on every side where the image allows, and
    at least a quarter of the image: a lesion of ten pixels is seen, and so is where it lies."""
    height, width = mask.shape
    if not mask.any():
        return slice(0, height), slice(0, width)
    ys, xs = np.nonzero(mask)
    side = 2 * max(int(np.ptp(ys)), int(np.ptp(xs))) + 1
    side = max(side, max(height, width) // 4, 16)
    return _around((ys.min() + ys.max()) // 2, side, height), _around(
        (xs.min() + xs.max()) // 2, side, width
    )


def _around(centre: int, side: int, length: int) -> slice:
    side = min(side, length)
    start = int(min(max(centre - side // 2, 0), length - side))
    return slice(start, start + side)


def _png(image: np.ndarray) -> str:
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((MOST_PIXELS, MOST_PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=9)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _edges(mask: np.ndarray) -> str:
    """SVG path of the pixel edges between inside and outside."""
    padded = np.pad(mask.astype(bool), 1)
    path = []
    for y, row in enumerate(np.diff(padded.astype(np.int8), axis=0)):
        path += [f"M{a - 1} {y}h{b - a}" for a, b in _runs(row)]
    for x, column in enumerate(np.diff(padded.astype(np.int8), axis=1).T):
        path += [f"M{x} {a - 1}v{b - a}" for a, b in _runs(column)]
    return "".join(path)


def _runs(line: np.ndarray) -> list[tuple[int, int]]:
    """(first, one past the last) of every stretch of one value that is not 0."""
    changes = np.flatnonzero(np.diff(line, prepend=0, append=0))
    return [(int(a), int(b)) for a, b in pairwise(changes) if line[a] != 0]


def _text(x: float, y: float, text: str, *, size: int = 13, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="{INK}">{html.escape(text)}</text>'
    )


def _svg(height: float, parts: Sequence[str], about: str) -> str:
    return (
        f'<svg class="chart" role="img" aria-label="{html.escape(about)}" '
        f'viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'font-family="system-ui,sans-serif">{"".join(parts)}</svg>'
    )

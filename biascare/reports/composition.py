"""The composition of a mixture as figures and a page, as in the paper's Fig. 1a-f for any data.

    figure_files(profile, groups, "outputs/bias", title="stage 2")     # bias.png, bias.svg
    write_page("outputs/bias/bias.html", profile, groups, sources, "outputs/bias/bias.png", "...")

Bars are what lies on disk. Diamonds are what the run draws, on the scale of the bars: there the bar
would end if the data on disk had the shares of the run, which stand beside as numbers of the same
colour. Every category of an axis is drawn or stands in a last bar that says how many more there
are; unknown values have their own, light bar.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from biascare.checks.statistics import MISSING, Distribution, SourceUse, imbalance
from biascare.records import Records
from biascare.reports.page import page, section, table
from biascare.reports.page import picture as image

# Okabe and Ito's palette: told apart with any colour vision, and in grey.
GROUP_COLORS = {"head": "#0072B2", "medium": "#56B4E9", "tail": "#E69F00"}
STREAM_COLOR = "#D55E00"
# Colours have a meaning for targets only, so other bars are grey.
BAR_COLOR, MISSING_COLOR = "#5A6570", "#C4C4C4"

MAX_BARS = 64
"""Longest panel; what is rarer is summed up in one bar."""

MAX_NAMES = 3
"""Sources that a title names."""

LOG_SPAN = 50
"""Largest over smallest value from which a logarithmic axis is used."""

TITLES = {
    "modality": "Modality",
    "anatomy": "Anatomy",
    "target": "Target",
    "label": "Finding or diagnosis",
    "age": "Age in years",
    "sex": "Sex",
    "race": "Race",
}
SEX_NAMES = {"F": "female", "M": "male"}
_COLUMNS = (("modality", "anatomy"), ("target",), ("label",), ("age", "sex", "race"))
_BAR_HEIGHT, _ABOVE, _BELOW = 0.17, 0.4, 0.46  # inches: a bar, a panel's title, its axis
_TOP = 0.55  # inches: title and legend
_NAMES, _BARS, _COUNTS, _SHARES = 1.8, 1.52, 0.96, 0.42  # inches: parts of a column, left to right


def bars_of(distribution: Distribution, limit: int = MAX_BARS) -> list[tuple[str, float, float]]:
    """(category, count on disk, share of the stream) of each bar, in order; none is lost."""
    stream = distribution.stream
    names = [name for name in {**distribution.raw, **stream} if name != MISSING]
    known = [(name, distribution.raw.get(name, 0.0), stream.get(name, 0.0)) for name in names]
    if len(known) > limit:
        rest = known[limit - 1 :]
        label = f"{len(rest)} rarer ones together"
        known = [*known[: limit - 1], (label, sum(r[1] for r in rest), sum(r[2] for r in rest))]
    if MISSING in distribution.raw or MISSING in stream:
        known.append((MISSING, distribution.raw.get(MISSING, 0.0), stream.get(MISSING, 0.0)))
    return known


def bias_figure(
    profile: Mapping[str, Distribution], groups: Mapping[str, str], title: str = ""
) -> Any:
    """A matplotlib figure with one panel per axis that holds anything."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = [[axis for axis in column if profile[axis].raw] for column in _COLUMNS]
    columns = [column for column in columns if column]
    # A panel grows with its bars: a long tail squeezed into a fixed height could not be read.
    heights = [
        [len(bars_of(profile[axis])) * _BAR_HEIGHT + _ABOVE + _BELOW for axis in column]
        for column in columns
    ]
    height = max(sum(column) for column in heights)
    whole = height + _TOP
    has_stream = any(distribution.stream for distribution in profile.values())
    pitch = _NAMES + _BARS + _COUNTS + (_SHARES if has_stream else 0.0)
    inches = pitch * len(columns)
    figure = plt.figure(figsize=(inches, whole))
    letters = iter("abcdefgh")
    for number, (axes, sizes) in enumerate(zip(columns, heights, strict=True)):
        top = height
        for axis, size in zip(axes, sizes, strict=True):
            bottom, inner = top - size + _BELOW, size - _BELOW - _ABOVE
            left = (number * pitch + _NAMES) / inches
            place = figure.add_axes((left, bottom / whole, _BARS / inches, inner / whole))
            _draw_panel(place, axis, profile[axis], groups, next(letters))
            top -= size
    figure.text(0.1 / inches, 1 - 0.1 / whole, title, fontsize=11, va="top", weight="bold")
    _draw_legend(figure, profile, groups)
    return figure


def figure_files(
    profile: Mapping[str, Distribution],
    groups: Mapping[str, str],
    folder: str | Path,
    title: str = "",
) -> list[Path]:
    """Write bias.png (200 dpi) and bias.svg (text stays text); their paths."""
    import matplotlib
    import matplotlib.pyplot as plt

    paths = [Path(folder) / "bias.png", Path(folder) / "bias.svg"]
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "svg.fonttype": "none"}):
        figure = bias_figure(profile, groups, title)
        for path in paths:
            figure.savefig(path, dpi=200)
        plt.close(figure)
    return paths


def _draw_panel(
    place: Any, axis: str, distribution: Distribution, groups: Mapping[str, str], letter: str
) -> None:
    bars = bars_of(distribution)
    total = sum(distribution.raw.values()) if axis != "label" else None
    counts = [count for _, count, _ in bars]
    ys = list(range(len(bars)))
    names = [_shown(axis, name) for name, _, _ in bars]
    colors = [
        MISSING_COLOR
        if name == MISSING
        else GROUP_COLORS.get(groups.get(name, "") if axis == "target" else "", BAR_COLOR)
        for name, _, _ in bars
    ]
    place.barh(ys, counts, height=0.72, color=colors, linewidth=0)
    place.set_yticks(ys, names, fontsize=7)
    place.set_ylim(len(bars) - 0.5, -0.5)
    whole = total or max(counts)
    shares = [share * whole for _, _, share in bars]
    if axis != "label" and any(shares):
        shown = [(share, y) for share, y in zip(shares, ys, strict=True) if share > 0]
        place.plot(*zip(*shown, strict=True), "D", ms=3.2, mfc="white", mec=STREAM_COLOR, mew=1.0)
    else:
        shares = []
    _scale(place, [*counts, *shares], may_be_log=axis not in ("age", "sex", "race"))
    for y, count in zip(ys, counts, strict=True):
        text = f"{count:,.0f}" + (f"  {count / total:.1%}" if total else "")
        _beside(place, y, text, inches=_BARS + 0.03, color="#444444")
    for y, (_, _, share) in zip(ys, bars, strict=True) if shares else ():
        _beside(place, y, f"{share:.1%}", inches=_BARS + _COUNTS, color=STREAM_COLOR)
    unit = "masks" if axis == "target" else "images"
    place.set_xlabel(unit, fontsize=7, labelpad=1)
    place.tick_params(axis="x", labelsize=6.5, length=2, pad=1.5)
    place.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        place.spines[side].set_visible(False)
    _above(place, f"{letter}  {TITLES[axis]}", points=13, fontsize=9, weight="bold")
    _above(place, _summary_line(distribution), points=4, fontsize=6.5, color="#444444")


def _above(place: Any, text: str, *, points: float, **style: Any) -> None:
    """Text so far above the panel, from the left edge of its names."""
    left = (0.15 - _NAMES) / _BARS
    place.annotate(
        text,
        (left, 1),
        xytext=(0, points),
        xycoords="axes fraction",
        textcoords="offset points",
        **style,
    )


def _beside(place: Any, y: int, text: str, *, inches: float, color: str) -> None:
    """Text at the height of a bar, so far right of the panel's left edge."""
    place.annotate(
        text,
        (inches / _BARS, y),
        xycoords=("axes fraction", "data"),
        fontsize=6.5,
        va="center",
        color=color,
    )


def _scale(place: Any, values: Sequence[float], *, may_be_log: bool) -> None:
    """Logarithmic where the positive values span decades; else bars start at zero."""
    from matplotlib.ticker import NullLocator

    positive = [value for value in values if value > 0]
    if may_be_log and positive and max(positive) / min(positive) > LOG_SPAN:
        place.set_xscale("log")
        low = 10 ** math.floor(math.log10(min(positive)) - 1e-9)
        place.set_xlim(low if min(positive) > 1 else 0.5 * min(positive), 1.3 * max(positive))
        # Minor ticks would print their numbers over each other in a panel this narrow.
        place.xaxis.set_minor_locator(NullLocator())
    else:
        place.set_xlim(0, 1.08 * max(positive, default=1))
        place.locator_params(axis="x", nbins=4)


def _draw_legend(
    figure: Any, profile: Mapping[str, Distribution], groups: Mapping[str, str]
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(color=color, label=f"{group} targets")
        for group, color in GROUP_COLORS.items()
        if group in groups.values()
    ]
    if any(MISSING in distribution.raw for distribution in profile.values()):
        handles.append(Patch(color=MISSING_COLOR, label="unknown"))
    if any(distribution.stream for distribution in profile.values()):
        style: dict[str, Any] = {"mfc": "white", "mec": STREAM_COLOR, "ls": "", "ms": 4}
        label = "what the run draws, on the scale of the bars, and its share"
        handles.append(Line2D([], [], marker="D", label=label, **style))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - 0.27 / figure.get_figheight()),
        ncols=max(len(handles), 1),
        fontsize=7,
        frameon=False,
        handlelength=1.2,
    )


def _shown(axis: str, name: str) -> str:
    if name == MISSING:
        return "no finding listed" if axis == "label" else "unknown"
    text = SEX_NAMES.get(name, name) if axis == "sex" else name
    return text if len(text) <= 34 else text[:32].rstrip() + " …"


def _summary_line(distribution: Distribution) -> str:
    numbers = imbalance(distribution.raw)
    if numbers.ratio is None or numbers.effective_number is None:
        return "unknown throughout"
    if numbers.num_categories == 1:
        return "1 category"
    # A decimal of a ratio in the hundreds would pretend to more than the counts know.
    ratio = f"{numbers.ratio:,.0f}" if numbers.ratio >= 10 else f"{numbers.ratio:.1f}"
    return (
        f"{numbers.num_categories} categories, worth {numbers.effective_number:.1f} equal ones; "
        f"largest : smallest {ratio} : 1"
    )


# ---------------------------------------------------------------- page


def write_report(
    folder: Path,
    profile: Mapping[str, Distribution],
    groups: Mapping[str, str],
    sources: Sequence[Mapping[str, Any]],
    title: str,
) -> None:
    """Figures, page and bias.json in `folder`; both tables on the terminal."""
    picture, _ = figure_files(profile, groups, folder, title)
    write_page(folder / "bias.html", profile, groups, sources, picture, title)
    text = json.dumps(as_json(profile, sources), indent=2, ensure_ascii=False)
    (folder / "bias.json").write_text(text + "\n", encoding="utf-8")
    console = Console()
    console.print(sources_table(sources))
    console.print(imbalance_table(profile))


def write_page(
    path: str | Path,
    profile: Mapping[str, Distribution],
    groups: Mapping[str, str],
    sources: Sequence[Mapping[str, Any]],
    picture: str | Path,
    title: str,
) -> None:
    """One HTML file that needs no other: the figure, a table of sources, a table per axis.

    `sources`: rows of equal keys, shown as they are.
    """
    parts = [_table(sources), image(picture, "distributions")]
    for axis, distribution in profile.items():
        if distribution.raw or distribution.stream:
            parts += [section(TITLES[axis]), f"<p>{_summary_line(distribution)}</p>"]
            parts.append(_table(_axis_rows(axis, distribution, groups)))
    Path(path).write_text(page(title, parts), encoding="utf-8")


def _axis_rows(
    axis: str, distribution: Distribution, groups: Mapping[str, str]
) -> list[dict[str, Any]]:
    total = sum(distribution.raw.values())
    rows = []
    for name, count, share in bars_of(distribution, limit=1 << 30):
        row: dict[str, Any] = {TITLES[axis].lower(): _shown(axis, name), "on disk": f"{count:,.0f}"}
        if axis == "target":
            row["group"] = groups.get(name, "")
        if axis != "label":
            row["share"] = f"{count / total:.2%}" if total else ""
        if distribution.stream:
            row["share of the run"] = f"{share:.2%}"
        rows.append(row)
    return rows


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    return table(rows[0], (row.values() for row in rows)) if rows else ""


# ---------------------------------------------------------------- tables


def describe_sources(uses: Sequence[SourceUse]) -> list[dict[str, Any]]:
    """Rows of the table of sources: what there is and what the run draws."""
    total = sum(use.num_drawn for use in uses)
    rows = []
    for use in uses:
        records = use.records
        segments = use.task == "segmentation"
        units = len(records.segmentation_units if segments else records.language_units)
        rows.append(
            {
                "source": records.manifest["source"],
                "split": records.manifest["split"],
                "task": use.task,
                "images": f"{len(records):,}",
                "units": f"{units:,}",
                "drawn": f"{use.num_drawn:,}",
                "share": f"{use.num_drawn / max(total, 1):.2%}",
                "passes": f"{use.num_drawn / units:.2f}",
            }
        )
    return rows


def describe_folders(folders: Sequence[Records]) -> list[dict[str, Any]]:
    """Rows of the table of sources where there is no run: what there is."""
    return [
        {
            "source": records.manifest["source"],
            "split": records.manifest["split"],
            "images": f"{len(records):,}",
            "masks": f"{records.manifest['num_targets']:,}",
            "questions": f"{len(records.language_units):,}",
        }
        for records in folders
    ]


def title_of(sources: Sequence[Mapping[str, Any]]) -> str:
    """The first few sources, and how many more there are."""
    names = list(dict.fromkeys(f"{row['source']}/{row['split']}" for row in sources))
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def as_json(
    profile: Mapping[str, Distribution], sources: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The numbers of figure and tables."""
    return {
        "sources": sources,
        "axes": {
            axis: {
                "on_disk": distribution.raw,
                "imbalance_on_disk": imbalance(distribution.raw)._asdict(),
                "run": distribution.stream,
                # None, not zeros: without a run nothing is known about what it would draw.
                "imbalance_run": (
                    imbalance(distribution.stream)._asdict() if distribution.stream else None
                ),
            }
            for axis, distribution in profile.items()
        },
    }


def sources_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What `describe_sources` or `describe_folders` says, for a terminal."""
    shown = Table(title="Sources")
    for name in rows[0]:
        shown.add_column(name, justify="left" if name in ("source", "split", "task") else "right")
    for row in rows:
        shown.add_row(*(str(value) for value in row.values()))
    return shown


def imbalance_table(profile: Mapping[str, Distribution]) -> Table:
    """One line per axis: on disk, and where there is a run, what it draws."""
    shown = Table(title="How uneven")
    columns = ("axis", "of", "categories", "largest : smallest", "evenness", "effective", "unknown")
    for column in columns:
        shown.add_column(column, justify="left" if column in ("axis", "of") else "right")
    for axis, distribution in profile.items():
        for kind, counts in (("disk", distribution.raw), ("run", distribution.stream)):
            if counts:
                numbers = imbalance(counts)
                uneven = (numbers.ratio, numbers.evenness, numbers.effective_number)
                shown.add_row(
                    axis if kind == "disk" else "",
                    kind,
                    str(numbers.num_categories),
                    # All values may be unknown, and then there is nothing to be uneven.
                    *(
                        "-" if number is None else format(number, style)
                        for number, style in zip(uneven, (",.1f", ".3f", ".1f"), strict=True)
                    ),
                    f"{numbers.missing_share:.1%}",
                )
    return shown

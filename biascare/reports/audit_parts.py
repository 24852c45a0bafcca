"""What the sections of an audit are made of: tables, columns, charts, and how values are written.

    Table("groups", "Every group", rows, [words("group"), Column("mean", "mean", score)])

A table has the columns that a reader is shown; its CSV has every key of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Column(NamedTuple):
    """One column of a table: the key of its rows and how a value is written."""

    key: str
    title: str
    write: Callable[[Any], str]
    number: bool = True


class Table(NamedTuple):
    """Rows of the audit and the columns that a page shows; a CSV holds every key."""

    name: str
    title: str
    rows: Sequence[Row]
    columns: Sequence[Column]
    note: str = ""
    folded: bool = False

    def shown(self) -> list[list[str]]:
        """The cells as a reader sees them."""
        return [[column.write(row[column.key]) for column in self.columns] for row in self.rows]


class Chart(NamedTuple):
    """A chart, its title, and lines below it."""

    title: str
    svg: str
    lines: Sequence[str] = ()


class Section(NamedTuple):
    """A part of the page."""

    anchor: str
    title: str
    text: Sequence[str] = ()
    points: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()


# ---------------------------------------------------------------- how values are written


def word(value: Any) -> str:
    return "-" if value is None else str(value)


def count(value: Any) -> str:
    return "-" if value is None else f"{value:,}"


def score(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"


def signed(value: Any) -> str:
    return "-" if value is None else f"{value:+.3f}"


def percent(value: Any) -> str:
    return "-" if value is None else f"{value:.1%}"


def anything(value: Any) -> str:
    return score(value) if isinstance(value, float) else word(value)


def p_text(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 0.001 else "<0.001"


def yes(value: Any) -> str:
    return "yes" if value else "no"


def words(key: str, title: str | None = None) -> Column:
    return Column(key, title or key, word, number=False)


INTERVAL = (
    Column("mean", "mean", score),
    Column("low", "95 % from", score),
    Column("high", "to", score),
)
NUM = (Column("num", "n", count), Column("num_patients", "patients", count))

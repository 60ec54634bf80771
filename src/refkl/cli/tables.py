"""Tables of the commands, and formatting of a run's numbers in them."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

WIDTH = 112
"""Width of a table in columns. In a narrower terminal its lines wrap and nothing is lost."""


def new_table(*columns: str) -> Table:
    """Make a table with a column for each name; ">" at the end of a name aligns numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", no_wrap=True)
    return table


def first_to_last(values: Sequence[float], most: int = 10) -> tuple[float, float]:
    """Return the means of the first and of the last values: of `most` each, or of half of them if there are fewer."""
    span = min(most, max(1, len(values) // 2))
    return sum(values[:span]) / span, sum(values[-span:]) / span

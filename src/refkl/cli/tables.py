"""Tables as the commands print them."""

from __future__ import annotations

from rich import box
from rich.table import Table

WIDTH = 112
"""Columns that a table takes: in a narrower terminal its lines wrap, which loses nothing."""


def new_table(*columns: str) -> Table:
    """With a column for each name; ">" at its end sets numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", no_wrap=True)
    return table

"""The tables of the documentation."""

from __future__ import annotations

import re

from support.launching import ROOT

DOCS = ROOT / "docs"


def text(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def rows(page: str, section: str) -> list[list[str]]:
    """Cells of the first table under a heading, its head left out."""
    _, _, after = text(page).partition(f"\n{section}\n")
    assert after, f"{page}.md has no section {section!r}"
    table = re.search(r"^\|.*?(?=\n\n)", after, re.MULTILINE | re.DOTALL)
    assert table is not None
    lines = [line.strip()[1:-1].split("|") for line in table[0].splitlines()]
    return [[cell.strip() for cell in line] for line in lines[2:]]

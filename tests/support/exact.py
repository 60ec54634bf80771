"""The estimators' errors by enumeration, and what docs/estimators.md says of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

DOCS = (Path(__file__).parents[2] / "docs" / "estimators.md").read_text(encoding="utf-8")


ESTIMATORS = ["k1", "k2", "k3", "abs"]


EXACT = {"rtol": 1e-10, "atol": 1e-13}


def fp64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def quoted(*cells: str | float) -> None:
    """The row of a table in docs/estimators.md with these first cells; floats to three significant digits."""
    row = "| " + " | ".join(x if isinstance(x, str) else f"{x:.3g}" for x in cells) + " |"
    assert row in DOCS, f"docs/estimators.md lacks: {row}"


def error(found: Tensor, truth: Tensor) -> float:
    """Length of the error by length of the truth."""
    return ((found - truth).norm() / truth.norm()).item()

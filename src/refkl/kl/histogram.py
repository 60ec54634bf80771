"""Histogram of the log-ratios of tokens. Its bins are fixed, so histograms of micro-batches and ranks can be added.

Notation: d = log p_policy - log p_reference of a token. The bins are the same for both signs, ten in each power of ten
of |d| (the preferred numbers of ISO 3), from 1e-5 to 1000 nats. One bin holds d = 0 exactly, one on either side holds
values nearer to 0 than 1e-5, and the outermost two hold all values beyond them, including infinities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

_STEPS = (1.0, 1.25, 1.6, 2.0, 2.5, 3.15, 4.0, 5.0, 6.3, 8.0)
MAGNITUDES = (0.0, *(float(f"{step}e{power}") for power in range(-5, 3) for step in _STEPS), 1000.0)
"""Bin edges in nats: |d| is in bin i if MAGNITUDES[i - 1] < |d| <= MAGNITUDES[i], and in bin 0 if it is 0."""
_SIDE = len(MAGNITUDES) - 1
BINS = 2 * _SIDE + 1
"""Number of bins. The bin of d = 0 is in the middle."""


def count_log_ratios(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Count the log-ratios in each bin.

    Args:
        log_ratio: any shape, nats.
        mask: same shape, True = counts. A NaN is in no bin.

    Returns:
        [BINS] int64.
    """
    flat = log_ratio.detach().flatten()
    bounds = _bounds(flat.dtype, flat.device)
    place = torch.bucketize(flat.abs(), bounds).clamp_(max=_SIDE)
    place = torch.where(flat < 0, -place, place) + _SIDE
    place = torch.where(mask.bool().flatten() & ~flat.isnan(), place, BINS)
    return torch.bincount(place, minlength=BINS + 1)[:BINS]


@cache
def _bounds(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(MAGNITUDES, dtype=dtype, device=device)


@dataclass(frozen=True)
class Histogram:
    """Counts of the tokens' log-ratios; `+` adds two histograms."""

    counts: tuple[int, ...]
    """One count per bin, from the most negative log-ratios to the largest."""
    largest: float
    """Largest |log-ratio|, in nats: values in the outermost bins may be far beyond the edges. NaN if any log-ratio was
    NaN."""
    edges: ClassVar[tuple[float, ...]] = (*(-x for x in MAGNITUDES[:0:-1]), 0.0, *MAGNITUDES)
    """Bin edges in nats: bin i spans edges[i] to edges[i + 1], including the edge further from 0. The bin of 0 has no
    width."""

    def __add__(self, other: Histogram) -> Histogram:
        counts = (a + b for a, b in zip(self.counts, other.counts, strict=True))
        both = self.largest, other.largest
        return Histogram(tuple(counts), math.nan if any(map(math.isnan, both)) else max(both))

    @property
    def tokens(self) -> int:
        """Number of log-ratios counted."""
        return sum(self.counts)

    def quantile(self, q: float, *, magnitude: bool = False) -> float:
        """Return the quantile `q` in nats, as torch.quantile does, to the width of a bin.

        Values are assumed to be spread evenly over their bin, whose outer edge is at most 1.28 times as far from 0 as
        its inner edge. The result is at most `largest` and at most 1000 away from 0. It is NaN if any log-ratio was.

        Args:
            q: from 0 to 1.
            magnitude: return the quantile of |log-ratio|.

        Raises:
            ValueError: `q` is out of range, or nothing was counted.
        """
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"q must be a share of the tokens, from 0 to 1, got {q}.")
        counts, edges = self.counts, self.edges
        if magnitude:
            both = zip(counts[_SIDE + 1 :], reversed(counts[:_SIDE]), strict=True)
            counts, edges = (counts[_SIDE], *(a + b for a, b in both)), (0.0, *MAGNITUDES)
        if math.isnan(self.largest):
            return math.nan
        if not (total := sum(counts)):
            raise ValueError("This histogram counts no tokens, so it has no quantiles.")
        place = q * (total - 1)
        low = int(place)
        below = _value(counts, edges, low)
        above = _value(counts, edges, min(low + 1, total - 1))
        value = below + (above - below) * (place - low)
        return max(-self.largest, min(self.largest, value))

    def trimmed(self) -> dict[str, list[float] | list[int]]:
        """Return {"edges", "counts"} from the first non-empty bin to the last, as plain numbers for JSON."""
        held = [i for i, count in enumerate(self.counts) if count]
        if not held:
            return {"edges": [], "counts": []}
        first, last = held[0], held[-1] + 1
        return {"edges": list(self.edges[first : last + 1]), "counts": list(self.counts[first:last])}


def _value(counts: Sequence[int], edges: Sequence[float], rank: int) -> float:
    """Return the value of this rank, counted from 0 at the smallest."""
    for count, lower, upper in zip(counts, edges[:-1], edges[1:], strict=True):
        if rank < count:
            return lower + (upper - lower) * (rank + 0.5) / count
        rank -= count
    raise AssertionError("a rank is below the count of all")

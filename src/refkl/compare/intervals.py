"""Means per token and per sequence with 95 % intervals that treat prompts, not tokens, as independent.

The tokens of one sequence depend on each other, and so do the answers to one prompt. The independent unit is a prompt
with all its answers, or a sequence if each has its own prompt. A mean is a ratio of sums over the U units, θ = Σ s_u /
Σ n_u, where s_u sums the values of unit u and n_u counts its tokens (or sequences). Its standard error is the
cluster-robust one of a ratio (W. G. Cochran, "Sampling Techniques", 3rd ed. 1977, chapter 6):

    se² = U / (U - 1) · Σ (s_u - θ n_u)² / (Σ n_u)²,        θ ± t · se,   t: Student's, with U - 1 degrees of freedom

Per sequence, with one sequence per unit, this is Student's own interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
_MANY = 200
"""Number of degrees of freedom from which the expansion for large degrees is accurate to ten digits."""


@dataclass(frozen=True)
class Mean:
    """A mean and its 95 % interval."""

    mean: float
    low: float | None
    """None if there is no interval: a single unit, or a mean that is not finite."""
    high: float | None


def ratio_mean(
    sums: NDArray[np.float64], counts: NDArray[np.float64], units: NDArray[np.int64], *, floor: float | None = None
) -> Mean:
    """Compute Σ sums / Σ counts, with its interval.

    Args:
        sums, counts: [S] per sequence: the sum of its values, and their number.
        units: [S] the unit of each sequence.
        floor: lower bound of all values, and therefore of the interval.
    """
    mean = float(sums.sum() / counts.sum())
    if not math.isfinite(mean):
        return Mean(mean, None, None)
    _, member = np.unique(units, return_inverse=True)
    number = int(member.max()) + 1
    if number < 2:
        return Mean(mean, None, None)
    residuals = np.bincount(member, sums) - mean * np.bincount(member, counts)
    error = math.sqrt(number / (number - 1) * float((residuals**2).sum())) / float(counts.sum())
    half = student(number - 1) * error
    low = mean - half
    return Mean(mean, low if floor is None else max(low, floor), mean + half)


@lru_cache
def student(freedom: int) -> float:
    """Return the t such that ± t contains 95 % of Student's distribution."""
    if freedom >= _MANY:
        z = NormalDist().inv_cdf((1 + LEVEL) / 2)
        first = (z**3 + z) / 4
        second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
        third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
        return z + first / freedom + second / freedom**2 + third / freedom**3
    low, high = 0.0, 1e3
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < LEVEL else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """Return Student's mass within ± t: a finite sum for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and
    4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for step in range(2 + odd, freedom + 1, 2):
        total += term
        term *= square * (step - 1) / step
    return 2 / math.pi * (angle + sine * total) if odd else sine * total

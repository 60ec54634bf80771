"""From [B, T] per-token values to one scalar.

    token-mean            Σ x / number of scored tokens
    seq-mean-token-sum    Σ_b (Σ_t x) / number of sequences
    seq-mean-token-mean   Σ_b (Σ_t x / tokens of b) / number of sequences

Each is a sum over the batch divided by a count. A micro-batch, or one rank of several, gives the right share of the
whole batch's value when the count is that of the whole: pass it as `normalizer`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from refkl.messages import unknown
from refkl.types import require_shape

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


def aggregate(
    per_token: Tensor, mask: Tensor, mode: str = "token-mean", *, normalizer: float | Tensor | None = None
) -> Tensor:
    """One scalar from per-token values.

    Args:
        per_token: [B, T].
        mask: [B, T], True = counts. What is elsewhere does not matter, NaN and inf included.
        mode: "token-mean", "seq-mean-token-sum" or "seq-mean-token-mean".
        normalizer: what to divide by instead of this batch's own count (see `aggregation_count`), in tokens for
            "token-mean" and in sequences otherwise; positive.

    Returns:
        Scalar in the units of `per_token`. 0.0, connected to the graph, if nothing is scored. A sequence without a
        scored token does not count as one.

    Raises:
        ValueError: an unknown mode, shapes that differ, or a normalizer that is not positive and finite.
    """
    if mode not in AGGREGATIONS:
        raise unknown("aggregation", mode, AGGREGATIONS)
    if per_token.dim() != 2:
        raise ValueError(f"per_token must be [B, T], got shape {list(per_token.shape)}.")
    require_shape("mask", mask, per_token.shape, "per_token")
    if normalizer is not None and not 0.0 < float(normalizer) < math.inf:
        raise ValueError(f"normalizer must be positive and finite, got {float(normalizer)}.")
    mask = mask.bool()
    values = per_token.to(torch.promote_types(per_token.dtype, torch.float32)).masked_fill(~mask, 0.0)
    if mode == "seq-mean-token-mean":
        values = values / mask.sum(-1, keepdim=True).clamp(min=1)
    count = aggregation_count(mask, mode).clamp(min=1) if normalizer is None else normalizer
    return values.sum() / count


def aggregation_count(mask: Tensor, mode: str = "token-mean") -> Tensor:
    """Scalar integer: what `mode` divides by: scored tokens for "token-mean", sequences that have some otherwise.

    Args:
        mask: [..., T], True = counts.
        mode: as in `aggregate`.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in AGGREGATIONS:
        raise unknown("aggregation", mode, AGGREGATIONS)
    mask = mask.bool()
    return mask.sum() if mode == "token-mean" else mask.any(-1).sum()

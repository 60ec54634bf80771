"""Aggregation of [B, T] per-token values to one scalar.

    token-mean               Σ x / number of scored tokens
    token-sum                Σ x
    seq-mean-token-sum       Σ_b (Σ_t x) / number of sequences
    seq-mean-token-mean      Σ_b (Σ_t x / tokens of b) / number of sequences
    seq-mean-token-sum-norm  Σ_b (Σ_t x / length) / number of sequences, with one constant length for all
                             ("Dr. GRPO", Liu et al., arXiv:2503.20783)

Each is a sum over the batch divided by a count. A micro-batch or a rank contributes its correct share of the whole
batch's value if it divides by the whole batch's count: pass that count as `normalizer`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from refkl.messages import unknown
from refkl.types import require_shape

CONSTANT_LENGTH = "seq-mean-token-sum-norm"
"""The only mode that takes a `length`."""
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", CONSTANT_LENGTH)
"""The modes of `aggregate`."""


def aggregate(
    per_token: Tensor,
    mask: Tensor,
    mode: str = "token-mean",
    *,
    normalizer: float | Tensor | None = None,
    length: float | None = None,
) -> Tensor:
    """Aggregate per-token values to one scalar.

    Args:
        per_token: [B, T].
        mask: [B, T], True = counts. Values elsewhere are ignored, including NaN and inf.
        mode: one of AGGREGATIONS.
        normalizer: positive divisor that replaces the count of this batch (see `aggregation_count`): in tokens for
            "token-mean", a plain number for "token-sum", in sequences otherwise.
        length: constant that divides every sequence's sum, in tokens, such as the longest allowed completion; for
            "seq-mean-token-sum-norm". None means the width T. Micro-batches and ranks then add up to the whole batch
            only if every batch is padded to the same width (KLConfig requires a length).

    Returns:
        Scalar in the units of `per_token`. 0.0, connected to the graph, if nothing is scored. A sequence without a
        scored token is not counted.

    Raises:
        ValueError: an unknown mode, shapes that differ, a normalizer or length that is not positive and finite, or a
            length given to a mode that does not use one.
    """
    if per_token.dim() != 2:
        raise ValueError(f"per_token must be [B, T], got shape {list(per_token.shape)}.")
    if mode == CONSTANT_LENGTH and length is None:
        length = max(1, per_token.shape[1])
    check_aggregation(mode, length)
    require_shape("mask", mask, per_token.shape, "per_token")
    if normalizer is not None and not 0.0 < float(normalizer) < math.inf:
        raise ValueError(f"normalizer must be positive and finite, got {float(normalizer)}.")
    mask = mask.bool()
    values = per_token.to(torch.promote_types(per_token.dtype, torch.float32)).masked_fill(~mask, 0.0)
    if mode == "seq-mean-token-mean":
        values = values / mask.sum(-1, keepdim=True).clamp(min=1)
    elif length is not None:
        values = values / length
    count = aggregation_count(mask, mode).clamp(min=1) if normalizer is None else normalizer
    return values.sum() / count


def aggregation_count(mask: Tensor, mode: str = "token-mean") -> Tensor:
    """Return the count that `mode` divides by, as an integer scalar.

    It is the number of scored tokens for "token-mean", 1 for "token-sum" whatever the mask, and the number of sequences
    that have a scored token otherwise. The counts of parts add up to the count of the whole, except for "token-sum"
    (`refkl.global_normalizer` handles that).

    Args:
        mask: [..., T], True = counts.
        mode: as in `aggregate`.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in AGGREGATIONS:
        raise unknown("aggregation", mode, AGGREGATIONS)
    mask = mask.bool()
    if mode == "token-mean":
        return mask.sum()
    if mode == "token-sum":
        return torch.ones((), dtype=torch.int64, device=mask.device)
    return mask.any(-1).sum()


def check_aggregation(mode: str, length: float | None) -> None:
    """Raise ValueError if the mode does not exist, or if `length` is missing, unused or invalid."""
    if mode not in AGGREGATIONS:
        raise unknown("aggregation", mode, AGGREGATIONS)
    if mode != CONSTANT_LENGTH:
        if length is not None:
            raise ValueError(
                f"length {length} has no use with aggregation {mode!r}: only {CONSTANT_LENGTH!r} takes one. Leave it "
                "out."
            )
    elif length is None:
        raise ValueError(
            f"Aggregation {CONSTANT_LENGTH!r} divides by a constant length and was given none. Set length, for example "
            "to the longest allowed completion: the width of a batch would change with its padding."
        )
    elif not 0.0 < length < math.inf:
        raise ValueError(f"length must be positive and finite, got {length}.")

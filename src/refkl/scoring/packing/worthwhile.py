"""The cost of a batch, packed and as it is, in tokens that pass the model. Packing is used only if it costs less."""

from __future__ import annotations

from typing import Any

from torch import nn

from refkl.scoring.packing.packed_batch import PackedBatch
from refkl.scoring.packing.prefix_mask import BLOCK, Seen
from refkl.types import TokenBatch

GAIN = 0.93
"""The packed row is taken if its cost is at most this share of the batch's: the estimate is not exact."""


def may_gain(base: nn.Module, batch: TokenBatch) -> bool:
    """Return True if a packed row could cost less, even if all prompts were the same. Takes few operations, before
    packing."""
    scored = batch.completion_mask.long()
    run = batch.attention_mask.bool() & (scored.flip(1).cumsum(1).flip(1) > 0)  # no further than the last scored token
    prompts, lengths = (run & (scored.cumsum(1) == 0)).sum(1), run.sum(1)
    own = (lengths - prompts - 1).clamp(min=0)
    pairs = (own * (lengths - 1)).sum()
    return float(own.sum() + prompts.max() + pairs / pairs_per_token(base)) <= GAIN * plain_cost(base, batch)


def plain_cost(base: nn.Module, batch: TokenBatch) -> float:
    """Return the cost of the batch as it is, in tokens that pass the model."""
    config: Any = getattr(base, "config", None)
    rows, size = batch.input_ids.shape
    attention = getattr(config, "_attn_implementation", None)
    # Torch's attention computes what a mask hides; other kernels do not.
    whole = attention == "eager" or (attention == "sdpa" and not bool(batch.attention_mask.bool().all()))
    return rows * size + rows * size**2 * (1.0 if whole else 0.5) / pairs_per_token(base)


def pairs_per_token(base: nn.Module) -> int:
    """Pairs of a query and a key that cost as much as a token in all else that a layer does."""
    return 6 * (getattr(getattr(base, "config", None), "hidden_size", None) or 1)


def saves(base: nn.Module, packed: PackedBatch, seen: Seen, batch: TokenBatch, *, dense: bool) -> bool:
    """Return True if the packed row costs less than the batch as it is.

    Args:
        dense: the mask is computed in full, [N, N].
    """
    blocks, pairs = (0.0, packed.tokens**2) if dense else (BLOCK / 8 * len(seen.blocks), seen.pairs())
    return packed.tokens + blocks + pairs / pairs_per_token(base) <= GAIN * plain_cost(base, batch)

"""Cost of a batch, packed and unpacked, in tokens run through the model. A batch is packed only if that costs less."""

from __future__ import annotations

from typing import Any

from torch import nn

from refkl.scoring.packing.packed_batch import PackedBatch
from refkl.scoring.packing.prefix_mask import BLOCK, Seen
from refkl.types import TokenBatch

GAIN = 0.93
"""A batch is packed if that costs at most this share of the unpacked cost. It is below 1 because the costs are
estimates."""


def may_gain(base: nn.Module, batch: TokenBatch) -> bool:
    """Return True if packing would cost less in the best case, in which all prompts are the same. A quick check before
    packing."""
    scored = batch.completion_mask.long()
    run = batch.attention_mask.bool() & (scored.flip(1).cumsum(1).flip(1) > 0)  # no further than the last scored token
    prompts, lengths = (run & (scored.cumsum(1) == 0)).sum(1), run.sum(1)
    own = (lengths - prompts - 1).clamp(min=0)
    pairs = (own * (lengths - 1)).sum()
    return float(own.sum() + prompts.max() + pairs / pairs_per_token(base)) <= GAIN * plain_cost(base, batch)


def plain_cost(base: nn.Module, batch: TokenBatch) -> float:
    """Return the cost of the unpacked batch, in tokens run through the model."""
    config: Any = getattr(base, "config", None)
    rows, size = batch.input_ids.shape
    attention = getattr(config, "_attn_implementation", None)
    # Torch's attention also computes masked pairs; other kernels do not.
    whole = attention == "eager" or (attention == "sdpa" and not bool(batch.attention_mask.bool().all()))
    return rows * size + rows * size**2 * (1.0 if whole else 0.5) / pairs_per_token(base)


def pairs_per_token(base: nn.Module) -> int:
    """Return the number of query-key pairs that cost as much as one token does in the rest of a layer."""
    return 6 * (getattr(getattr(base, "config", None), "hidden_size", None) or 1)


def saves(base: nn.Module, packed: PackedBatch, seen: Seen, batch: TokenBatch, *, dense: bool) -> bool:
    """Return True if the packed row costs less than the unpacked batch.

    Args:
        base: the model without wrappers.
        packed: the packed row.
        seen: the attention of the packed row.
        batch: the unpacked batch.
        dense: True if the model computes attention with a full mask [N, N].
    """
    blocks, pairs = (0.0, packed.tokens**2) if dense else (BLOCK / 8 * len(seen.blocks), seen.pairs())
    return packed.tokens + blocks + pairs / pairs_per_token(base) <= GAIN * plain_cost(base, batch)

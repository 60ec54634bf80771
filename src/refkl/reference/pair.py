"""Policy and reference on the same tokens, in one call."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from refkl.kl import divergence as dense_divergence
from refkl.reference.base import Reference
from refkl.scoring import ScoredLogits, completion_logits, scores_from
from refkl.types import PairScores, TokenBatch


def score_pair(
    policy: nn.Module,
    reference: Reference,
    batch: TokenBatch,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    divergence: str | None = None,
) -> PairScores:
    """Score a batch under both: the policy with grad, the reference under no_grad.

    Args:
        policy: as it is wrapped; called once.
        reference: from build_reference.
        batch: what to score.
        temperature: divides the logits of both.
        entropy: also the policy's and the reference's entropies.
        divergence: "reverse_kl", "forward_kl" or "jsd": also the exact divergence per scored token.

    Raises:
        ValueError: an unknown divergence; vocabularies of different size; as `score_tokens`.
    """
    scored = completion_logits(policy, batch)
    policy_scores = scores_from(scored, temperature=temperature, entropy=entropy)
    exact = None
    with reference.logits(batch) as ref_scored:
        ref_scores = scores_from(ref_scored, temperature=temperature, entropy=entropy).to(batch.input_ids.device)
        ref_scores = replace(ref_scores, fingerprint=reference.stamp)
    if divergence is not None:
        exact = scored.spread(_exact(scored, ref_scored.logits.to(scored.logits.device), divergence, temperature))
    return PairScores(policy_scores, ref_scores, exact)


def _exact(scored: ScoredLogits, ref_logits: Tensor, kind: str, temperature: float) -> Tensor:
    mask = scored.mask
    rows = dense_divergence(
        scored.logits[mask].to(torch.promote_types(scored.logits.dtype, torch.float32)) / temperature,
        ref_logits[mask].to(torch.promote_types(ref_logits.dtype, torch.float32)) / temperature,
        kind,
    )
    return torch.zeros(mask.shape, dtype=rows.dtype, device=rows.device).masked_scatter(mask, rows)

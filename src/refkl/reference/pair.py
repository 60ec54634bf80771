"""Policy and reference on the same tokens, in one call."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from refkl.kl import divergence as dense_divergence
from refkl.kl.rows import Divergence
from refkl.reference.base import Reference
from refkl.scoring import (
    Against,
    Head,
    HeadError,
    ScoredLogits,
    completion_logits,
    find_head,
    score_model,
    score_tokens,
    scores_from,
)
from refkl.types import PairScores, TokenBatch


def score_pair(
    policy: nn.Module,
    reference: Reference,
    batch: TokenBatch,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    divergence: str | None = None,
    jsd_weight: float = 0.5,
    order: float | None = None,
    top_k: int | None = None,
) -> PairScores:
    """Score a batch under both: the policy with grad, the reference under no_grad.

    Args:
        policy: as it is wrapped; called once.
        reference: from build_reference.
        batch: what to score.
        temperature: divides the logits of both.
        entropy: also the policy's and the reference's entropies.
        divergence: one of kl.DIVERGENCES: also the exact divergence per scored token, with `jsd_weight`, `order` and
            `top_k` as in kl.divergence.

    Raises:
        ValueError: an unknown divergence; one from a reference with a cache; vocabularies of different size; as
            `score_tokens`.
    """
    if divergence is None:
        with reference.paired(policy, batch):
            ref_scores = reference.score(batch, temperature=temperature, entropy=entropy)
            return PairScores(score_tokens(policy, batch, temperature=temperature, entropy=entropy), ref_scores)
    reference.check_exact()
    how = Divergence(divergence, jsd_weight, order, top_k)
    with reference.paired(policy, batch):
        return _with_divergence(policy, reference, batch, temperature, entropy, how)


def _with_divergence(
    policy: nn.Module, reference: Reference, batch: TokenBatch, temperature: float, entropy: bool, how: Divergence
) -> PairScores:
    head = _common_head(policy, reference)
    if head is None:
        return _through_logits(policy, reference, batch, temperature, entropy, how)
    ref_scores = reference.score(batch, temperature=temperature, entropy=entropy, hidden=True)
    options = {"jsd_weight": how.weight, "order": how.order, "top_k": how.top_k}
    against = Against(ref_scores, head, how.kind, options)
    try:
        scored = score_model(policy, batch, temperature=temperature, entropy=entropy, against=against)
    except HeadError:
        return _through_logits(policy, reference, batch, temperature, entropy, how)
    assert scored.against is not None
    ref_logp, exact = scored.against
    return PairScores(scored.scores, replace(ref_scores, logp=ref_logp, hidden=None), exact)


def _common_head(policy: nn.Module, reference: Reference) -> Head | None:
    """The reference's head, if the two heads' logits can be compared inside the policy's forward."""
    try:
        own, other = find_head(policy), reference.head()
    except HeadError:
        return None
    if other is None or (own.logit_scale, own.softcap) != (other.logit_scale, other.softcap):
        return None
    return other


def _through_logits(
    policy: nn.Module, reference: Reference, batch: TokenBatch, temperature: float, entropy: bool, how: Divergence
) -> PairScores:
    """Both sides' logits in full: for a head that is adapted, sharded, or on another device."""
    scored = completion_logits(policy, batch)
    policy_scores = scores_from(scored, temperature=temperature, entropy=entropy)
    with reference.logits(batch) as ref_scored:
        ref_scores = scores_from(ref_scored, temperature=temperature, entropy=entropy).to(batch.input_ids.device)
        ref_logits = ref_scored.logits.to(scored.logits.device)
    exact = scored.call.spread(_exact(scored, ref_logits, how, temperature))
    return PairScores(policy_scores, replace(ref_scores, fingerprint=reference.stamp), exact)


def _exact(scored: ScoredLogits, ref_logits: Tensor, how: Divergence, temperature: float) -> Tensor:
    mask = scored.call.mask
    rows = dense_divergence(
        scored.logits[mask].to(torch.promote_types(scored.logits.dtype, torch.float32)) / temperature,
        ref_logits[mask].to(torch.promote_types(ref_logits.dtype, torch.float32)) / temperature,
        how.kind,
        weight=how.weight,
        order=how.order,
        top_k=how.top_k,
    )
    return torch.zeros(mask.shape, dtype=rows.dtype, device=rows.device).masked_scatter(mask, rows)

"""Scores of policy and reference on the same tokens, in one call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from refkl.backend import evaluating, unwrap
from refkl.kl import divergence as dense_divergence
from refkl.kl.divergence_rows import Divergence
from refkl.kl.job import Observer
from refkl.reference.contract import Reference
from refkl.scoring import (
    Against,
    Entropies,
    Head,
    HeadError,
    Scored,
    ScoredLogits,
    completion_logits,
    find_head,
    score_model,
    score_tokens,
    scored_through_logits,
    scores_from,
)
from refkl.scoring.packing.pack import packed_once
from refkl.types import PairScores, TokenBatch, TokenScores


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
    """Score a batch under both: the policy with grad, the reference without.

    Args:
        policy: a causal language model, bare or wrapped; called once.
        reference: the result of `build_reference`.
        batch: the sequences to score.
        temperature: divides the logits of both.
        entropy: True to return the entropies of both, too.
        divergence: one of kl.DIVERGENCES, to return the exact divergence of each scored token, too.
        jsd_weight: as `weight` in kl.divergence.
        order: as in kl.divergence.
        top_k: as in kl.divergence.

    Raises:
        ValueError: an unknown divergence; a divergence from a reference with a cache; vocabularies of different size;
            see also `score_tokens`.
    """
    if divergence is None:
        with scored_together(policy, reference, batch):
            ref_scores = reference.score(batch, temperature=temperature, entropy=entropy)
            return PairScores(score_tokens(policy, batch, temperature=temperature, entropy=entropy), ref_scores)
    how = Divergence(divergence, jsd_weight, order, top_k)
    found = compare(policy, reference, batch, how, temperature=temperature, entropy=entropy)
    return PairScores(found.scored.scores, found.reference, found.divergence)


@contextmanager
def scored_together(policy: nn.Module, reference: Reference, batch: TokenBatch) -> Iterator[None]:
    """Share the work that both scores of a batch need, the policy's and the reference's, while this is open."""
    with packed_once(batch), reference.sharing_work_with(policy, batch):
        yield


def measure_pair(
    policy: nn.Module, reference: Reference, batch: TokenBatch, *, temperature: float = 1.0, exact: bool = False
) -> PairScores:
    """Score a batch under both without grad, with dropout off in the policy too.

    Args:
        policy: as in `score_pair`.
        reference: as in `score_pair`.
        batch: as in `score_pair`.
        temperature: as in `score_pair`.
        exact: True to return the exact KL(policy ‖ reference) of each token, too.

    Raises:
        ValueError: see `score_pair`.
    """
    divergence = "reverse_kl" if exact else None
    with torch.no_grad(), evaluating(unwrap(policy)):
        return score_pair(policy, reference, batch, temperature=temperature, divergence=divergence)


@dataclass(frozen=True, eq=False)
class Compared:
    """One forward pass of the policy, and the divergence from its reference."""

    scored: Scored
    """The policy's scores, with grad."""
    reference: TokenScores
    """The reference's scores, without grad."""
    divergence: Tensor
    """[B, T] nats, exact, with grad to the policy."""


def compare(
    policy: nn.Module,
    reference: Reference,
    batch: TokenBatch,
    how: Divergence,
    *,
    temperature: float = 1.0,
    entropy: Entropies = False,
    observe: Observer | None = None,
    ref_scores: TokenScores | None = None,
    **forward: Any,
) -> Compared:
    """Score as `score_pair` does with an exact divergence, and return the policy's own outputs, too.

    Args:
        policy: as in `score_pair`.
        reference: as in `score_pair`.
        batch: as in `score_pair`.
        how: the divergence.
        temperature: as in `score_pair`.
        entropy: as in `score_model`.
        observe: as in `score_model`, for the policy.
        ref_scores: the reference's scores with `hidden`, if they were computed before.
        **forward: further arguments for the policy's forward.

    Raises:
        ValueError: see `score_pair`.
    """
    reference.check_exact()
    with scored_together(policy, reference, batch):
        head = _common_head(policy, reference)
        if head is not None:
            if ref_scores is None:
                ref_scores = reference.score(batch, temperature=temperature, entropy=bool(entropy), hidden=True)
            options = {"jsd_weight": how.weight, "order": how.order, "top_k": how.top_k}
            against = Against(ref_scores, head, how.kind, options)
            with suppress(HeadError):  # then through the logits
                scored = score_model(
                    policy, batch, temperature=temperature, entropy=entropy, against=against, observe=observe, **forward
                )
                assert scored.against is not None
                ref_logp, exact = scored.against
                return Compared(scored, replace(ref_scores, logp=ref_logp, hidden=None), exact)
        logits = completion_logits(policy, batch, **forward)
        return compare_logits(logits, reference, how, temperature=temperature, entropy=entropy, observe=observe)


def _common_head(policy: nn.Module, reference: Reference) -> Head | None:
    """Return the reference's head if the two heads' logits can be compared inside the policy's forward, else None."""
    try:
        own, other = find_head(policy), reference.head()
    except HeadError:
        return None
    if other is None or (own.logit_scale, own.softcap) != (other.logit_scale, other.softcap):
        return None
    return other


def compare_logits(
    logits: ScoredLogits,
    reference: Reference,
    how: Divergence,
    *,
    temperature: float = 1.0,
    entropy: Entropies = False,
    observe: Observer | None = None,
) -> Compared:
    """Return what `compare` does, from the policy's logits. The reference's logits are computed in full, too.

    This is for a head that is adapted, sharded, or on another device, and for a forward pass that refkl did not run.
    Open `scored_together` around that forward pass and this call.
    """
    scored = scored_through_logits(logits, temperature=temperature, entropy=entropy, observe=observe)
    batch = scored.call.batch
    with reference.logits(batch) as ref_scored:
        ref_scores = scores_from(ref_scored, temperature=temperature, entropy=bool(entropy))
        ref_logits = ref_scored.logits.to(logits.logits.device)
    exact = logits.call.spread(_exact(logits, ref_logits, how, temperature))
    ref_scores = replace(ref_scores.to(batch.input_ids.device), fingerprint=reference.recorded_fingerprint)
    return Compared(scored, ref_scores, exact)


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

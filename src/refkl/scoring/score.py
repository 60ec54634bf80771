"""Log-probabilities of the tokens of a batch, under a policy or a reference: one function for both.

Inside the model's own forward, the output head is redirected to a fused op, so the logits [B, K, V] are never stored.
If a head cannot be redirected (adapted by PEFT, quantised, patched), the model is scored through its logits, by the
same maths.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from refkl.backend.exclusive import use_of
from refkl.kl import linear_logp, linear_pair, token_logp
from refkl.kl.job import Observer
from refkl.scoring.call import Call
from refkl.scoring.forward import ScoredLogits, completion_logits, prepare
from refkl.scoring.head.linear_head import Head, HeadError
from refkl.scoring.head.probe import distrust, find_head
from refkl.scoring.head.redirect import redirected
from refkl.types import TokenBatch, TokenScores

Entropies = bool | Literal["detached"]


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of one forward pass."""

    scores: TokenScores
    outputs: Any
    """The model's own output object. Its logits are meaningless if the head was redirected."""
    call: Call
    against: tuple[Tensor, Tensor] | None = None
    """[B, T] each: the reference's log-probabilities and the divergence; None without `against`."""


@dataclass(frozen=True, eq=False)
class Against:
    """The reference's scores and head, for an exact divergence per token inside the policy's forward."""

    scores: TokenScores
    """The reference's scores, with `hidden`."""
    head: Head
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `linear_divergence`: jsd_weight, order, top_k, vocab_size."""


def score_tokens(
    model: nn.Module, batch: TokenBatch, *, temperature: float = 1.0, entropy: bool = False
) -> TokenScores:
    """Compute log-probabilities of the scored tokens, with grad, in the model's present mode (train or eval).

    Args:
        model: a causal language model, bare or wrapped in PEFT, DDP or a DeepSpeed engine.
        batch: the sequences to score.
        temperature: divides the logits; give the temperature at which the tokens were sampled.
        entropy: if True, also compute the entropy of each predicting distribution.

    Raises:
        ValueError: see `prepare`; the temperature is not positive; a reference has borrowed the model in this thread
            (`reference.keep_active`, `reference.logits`).
    """
    return score_model(model, batch, temperature=temperature, entropy=entropy).scores


def score_model(
    model: nn.Module,
    batch: TokenBatch,
    *,
    temperature: float = 1.0,
    entropy: Entropies = False,
    hidden: bool = False,
    against: Against | None = None,
    observe: Observer | None = None,
    **forward: Any,
) -> Scored:
    """Run one forward of the model through its wrappers, and score the batch's tokens.

    Args:
        model: as in `score_tokens`.
        batch: as in `score_tokens`.
        temperature: as in `score_tokens`.
        entropy: also compute the entropy: True with grad, "detached" without.
        hidden: if True, also return the states that enter the output head.
        against: also compute the exact divergence from this reference. `find_head` must find the policy's head.
        observe: called as observe(logits [n, V], rows [n]) on scored rows, without grad, to take statistics of the
            logits after the temperature; `rows` are indices into the flattened [B, K]. It must not change the logits.
        forward: further arguments for the model's forward.

    Raises:
        ValueError: see `score_tokens`.
        HeadError: `against` is given, and the policy's head cannot be redirected.
    """
    wanted = _Wanted(temperature, entropy, hidden, against, observe)
    with use_of(model).running():
        try:
            return _redirected(model, find_head(model), prepare(model, batch, **forward), wanted)
        except HeadError:
            if against is not None:
                raise
            return _through_logits(model, batch, wanted, forward)


@dataclass(frozen=True, eq=False)
class _Wanted:
    """Arguments of `score_model`, with the same names."""

    temperature: float
    entropy: Entropies
    hidden: bool
    against: Against | None
    observe: Observer | None


def _redirected(model: nn.Module, head: Head, call: Call, wanted: _Wanted) -> Scored:
    """Run the model's forward, in which its head computes the scores instead of the logits."""
    entropy, against = wanted.entropy, wanted.against
    states: list[Tensor] = []

    def fused(entering: Tensor) -> Tensor:
        rows = call.predicting(entering)
        if wanted.hidden:
            states.append(rows)
        options: dict[str, Any] = {
            "bias": head.bias,
            "logit_scale": head.logit_scale,
            "softcap": head.softcap,
            "temperature": wanted.temperature,
            "entropy": entropy,
            "mask": call.mask.flatten(),
            "observe": wanted.observe,
        }
        flat, targets = rows.flatten(0, 1), call.targets.flatten()
        if against is None:
            found = linear_logp(flat, head.weight, targets, **options)
        else:
            assert against.scores.hidden is not None
            other = against.scores.hidden[:, call.columns].flatten(0, 1)
            ref = against.head
            options |= {"ref_bias": ref.bias, **against.options}
            found = linear_pair(flat, head.weight, targets, other, ref.weight, against.kind, **options)
        return torch.stack([x for x in found if x is not None], -1)

    try:
        with redirected(head, fused) as redirect:
            outputs = call.run(model)
        found = redirect.stats(outputs)
    except HeadError as error:
        distrust(model, head.module, error)
        raise
    stats = [call.spread(x.view(call.targets.shape)) for x in found.unbind(-1)]
    scores = TokenScores(
        logp=stats[0],
        entropy=(stats[1].detach() if entropy == "detached" else stats[1]) if entropy else None,
        hidden=call.spread(states[0]) if wanted.hidden else None,
        temperature=wanted.temperature,
    )
    return Scored(scores, outputs, call, None if against is None else (stats[-2].detach(), stats[-1]))


def _through_logits(model: nn.Module, batch: TokenBatch, wanted: _Wanted, forward: dict[str, Any]) -> Scored:
    logits = completion_logits(model, batch, hidden=wanted.hidden, **forward)
    return scored_through_logits(logits, temperature=wanted.temperature, entropy=wanted.entropy, observe=wanted.observe)


def scored_through_logits(
    scored: ScoredLogits, *, temperature: float = 1.0, entropy: Entropies = False, observe: Observer | None = None
) -> Scored:
    """Return the result of `score_model`, from logits that are already computed."""
    if observe is not None:
        with torch.no_grad():
            rows = scored.call.mask.flatten().nonzero()[:, 0]
            observe(scored.logits.flatten(0, 1)[rows] / temperature, rows)
    return Scored(scores_from(scored, temperature=temperature, entropy=entropy), scored.outputs, scored.call)


def scores_from(scored: ScoredLogits, *, temperature: float = 1.0, entropy: Entropies = False) -> TokenScores:
    """Return TokenScores, from logits that are already computed."""
    call = scored.call
    result = token_logp(
        scored.logits.flatten(0, 1),
        call.targets.flatten(),
        temperature=temperature,
        entropy=bool(entropy),
        mask=call.mask.flatten(),
    )
    shape = call.targets.shape
    entropies = None if result.entropy is None else call.spread(result.entropy.view(shape))
    return TokenScores(
        logp=call.spread(result.logp.view(shape)),
        entropy=entropies.detach() if entropies is not None and entropy == "detached" else entropies,
        hidden=None if scored.hidden is None else call.spread(scored.hidden),
        temperature=temperature,
    )

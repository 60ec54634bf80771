"""Log-probabilities of the tokens of a batch, under a policy or a reference: one function for both."""

from __future__ import annotations

from torch import nn

from refkl.kl import token_logp
from refkl.scoring.forward import ScoredLogits, completion_logits
from refkl.types import TokenBatch, TokenScores


def score_tokens(
    model: nn.Module, batch: TokenBatch, *, temperature: float = 1.0, entropy: bool = False
) -> TokenScores:
    """Log-probabilities of the scored tokens, with grad, in the mode (train or eval) that the model is in.

    Args:
        model: a causal language model, bare or inside PEFT, DDP or a DeepSpeed engine.
        batch: what to score.
        temperature: divides the logits; the one that the tokens were sampled at.
        entropy: also give the entropy of each predicting distribution.

    Raises:
        ValueError: as `completion_logits`; a temperature that is not positive.
    """
    return scores_from(completion_logits(model, batch), temperature=temperature, entropy=entropy)


def scores_from(scored: ScoredLogits, *, temperature: float = 1.0, entropy: bool = False) -> TokenScores:
    """TokenScores from logits that are at hand."""
    result = token_logp(
        scored.logits.flatten(0, 1),
        scored.targets.flatten(),
        temperature=temperature,
        entropy=entropy,
        mask=scored.mask.flatten(),
    )
    shape = scored.targets.shape
    return TokenScores(
        logp=scored.spread(result.logp.view(shape)),
        entropy=None if result.entropy is None else scored.spread(result.entropy.view(shape)),
        hidden=None if scored.hidden is None else scored.spread(scored.hidden),
        temperature=temperature,
    )

"""Scores of a TokenBatch under a model, as TokenScores. Tokens are shifted only in this package."""

from refkl.scoring.call import Call
from refkl.scoring.forward import ScoredLogits, check_causal, completion_logits, prepare
from refkl.scoring.head.linear_head import Head, HeadError
from refkl.scoring.head.probe import find_head
from refkl.scoring.score import (
    Against,
    Entropies,
    Scored,
    score_model,
    score_tokens,
    scored_through_logits,
    scores_from,
)

__all__ = [
    "Against",
    "Call",
    "Entropies",
    "Head",
    "HeadError",
    "Scored",
    "ScoredLogits",
    "check_causal",
    "completion_logits",
    "find_head",
    "prepare",
    "score_model",
    "score_tokens",
    "scored_through_logits",
    "scores_from",
]

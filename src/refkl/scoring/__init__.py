"""Model + TokenBatch -> TokenScores. The only place where tokens are shifted."""

from refkl.backend.learned_prompt import Prompt, learned_prompt, without_prompt
from refkl.scoring.call import Call, ScoredLogits, completion_logits, prepare
from refkl.scoring.head.linear_head import Head, HeadError, base_model, decoder_layers
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
    "Prompt",
    "Scored",
    "ScoredLogits",
    "base_model",
    "completion_logits",
    "decoder_layers",
    "find_head",
    "learned_prompt",
    "prepare",
    "score_model",
    "score_tokens",
    "scored_through_logits",
    "scores_from",
    "without_prompt",
]

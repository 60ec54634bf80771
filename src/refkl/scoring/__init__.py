"""Model + TokenBatch -> TokenScores. The only place where tokens are shifted."""

from refkl.scoring.forward import ScoredLogits, completion_logits
from refkl.scoring.score import score_tokens, scores_from

__all__ = ["ScoredLogits", "completion_logits", "score_tokens", "scores_from"]

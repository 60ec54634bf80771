"""TRL's names for refkl's fused head."""

from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

__all__ = ["ChunkedLogProbFunction", "selective_log_softmax_and_entropy"]

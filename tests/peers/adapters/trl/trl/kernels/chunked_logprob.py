"""TRL's name for log-probabilities from hidden states and the head's weight."""

from __future__ import annotations

import torch
from torch import Tensor

import refkl

# TRL's tests set it: how many tokens are projected at a time.
TOKEN_CHUNK_SIZE = 4096

__all__ = ["TOKEN_CHUNK_SIZE", "ChunkedLogProbFunction", "torch"]


class ChunkedLogProbFunction:
    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Log-probabilities, entropies and three statistics, [N] each; refkl's tiles hold the whole vocabulary."""
        seen: list[tuple[Tensor, Tensor]] = []
        scores = refkl.kl.linear_logp(
            hidden,
            weight,
            targets,
            # TRL scales the sum of product and bias, refkl the product alone.
            bias=None if bias is None else bias * logit_scale,
            logit_scale=logit_scale,
            softcap=final_logit_softcapping,
            temperature=temperature,
            entropy=True,
            chunk=TOKEN_CHUNK_SIZE,
            observe=lambda logits, rows: seen.append((rows, logits.clone())),
        )
        rows = torch.cat([rows for rows, _ in seen])
        logits = torch.cat([logits for _, logits in seen])[rows.argsort()]
        squares = torch.logsumexp(2 * torch.log_softmax(logits.float(), -1), -1)
        return scores.logp, scores.entropy, squares, logits.mean(-1), logits.argmax(-1) == targets

"""TRL's name for log-probabilities and entropies of logits, together."""

from __future__ import annotations

from torch import Tensor

import refkl


def selective_log_softmax_and_entropy(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    found = refkl.kl.token_logp(
        logits.flatten(0, -2),
        index.flatten(),
        temperature=temperature,
        entropy=True,
        mask=None if row_mask is None else row_mask.flatten(),
    )
    assert found.entropy is not None
    return found.logp.view(index.shape), found.entropy.view(index.shape)

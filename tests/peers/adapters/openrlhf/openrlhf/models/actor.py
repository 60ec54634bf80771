"""OpenRLHF's actor, as far as refkl has one: the log-probabilities and entropies of a model's tokens."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor, nn

import refkl


class Actor:
    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        self.model = model
        self.temperature = temperature

    def __call__(
        self,
        sequences: Tensor,
        action_mask: Tensor,
        attention_mask: Tensor,
        return_output: bool = True,
        return_entropy: bool = True,
    ) -> tuple[Tensor, SimpleNamespace]:
        # An action is a token after the first; OpenRLHF's rows begin there and end where the sequence ends.
        scored = attention_mask.clone()
        scored[:, 1:] = action_mask
        batch = refkl.TokenBatch(sequences, attention_mask, scored)
        scores = refkl.score_tokens(self.model, batch, temperature=self.temperature, entropy=True)
        assert scores.entropy is not None
        return scores.logp[:, 1:], SimpleNamespace(entropy=scores.entropy[:, 1:])

"""A model inside another, as TRL's value heads hold it; there is no value here."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM


class AutoModelForCausalLMWithValueHead(nn.Module):
    def __init__(self, pretrained_model: nn.Module) -> None:
        super().__init__()
        self.pretrained_model = pretrained_model

    @classmethod
    def from_pretrained(cls, name: str) -> AutoModelForCausalLMWithValueHead:
        return cls(AutoModelForCausalLM.from_pretrained(name))

    def forward(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        outputs = self.pretrained_model(**inputs)
        return outputs.logits, outputs.loss

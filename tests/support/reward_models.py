"""Small reward models, and their scores one text at a time."""

from __future__ import annotations

from typing import Any

import torch
from support.models import EOS, PAD, VOCABULARY
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


WIDE = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "num_labels": 1}


def classifier(kind: str = "llama", **overrides: Any) -> PreTrainedModel:
    tokens = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
    if kind == "llama":
        config = LlamaConfig(**{**SIZE, **WIDE, **tokens, "max_position_embeddings": 128, **overrides})
        return LlamaForSequenceClassification(config).eval()
    if kind == "gpt2":  # absolute positions, and dropout
        size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
        return GPT2ForSequenceClassification(GPT2Config(**{**size, **WIDE, **tokens, **overrides})).eval()
    config = BertConfig(**{**SIZE, **WIDE, "max_position_embeddings": 128, **overrides})
    return BertForSequenceClassification(config).eval()


def alone(model: PreTrainedModel, made: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """[B, labels] plain forwards of one text each, without padding."""
    with torch.no_grad():
        rows = [made(text, return_tensors="pt", padding=False) for text in texts]
        return torch.cat([model(input_ids=r["input_ids"], attention_mask=r["attention_mask"]).logits for r in rows])

"""Tiny models, a byte tokenizer and batches for the tests: made here from configurations, nothing is downloaded.

Weights depend on torch's seed alone, which conftest.py sets before each test. They are drawn wide
(initializer_range 0.2), so that the distributions are far from uniform and a wrong position or shift shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from refkl import TokenBatch

VOCABULARY, PAD, EOS = 258, 0, 1
_COMMON = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "initializer_range": 0.2,
}
_SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}


def llama(**overrides: Any) -> LlamaForCausalLM:
    """Rotary positions, grouped heads, untied; in eval mode, as from_pretrained gives it."""
    size = {**_SIZE, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**_COMMON, **size, **overrides})).eval()


def qwen2(**overrides: Any) -> Qwen2ForCausalLM:
    """As llama, with biases in the attention."""
    size = {**_SIZE, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(**{**_COMMON, **size, **overrides})).eval()


def gpt_neox(**overrides: Any) -> GPTNeoXForCausalLM:
    """Partly rotary positions, attention and MLP in parallel."""
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**_COMMON, **_SIZE, "num_attention_heads": 4, **overrides})).eval()


def gpt2(**overrides: Any) -> GPT2LMHeadModel:
    """Absolute positions, tied; its dropouts (resid_pdrop, embd_pdrop, attn_pdrop) are 0 unless asked for."""
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**{**_COMMON, **size, **dropout, **overrides})).eval()


MODELS = {"llama": llama, "gpt2": gpt2, "qwen2": qwen2, "gpt_neox": gpt_neox}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, as wide as the models' vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left", model_max_length=128
    )


SHARED = ((0, 5), (1, 3), (0, 2), (1, 6), (0, 1), (2, 4))
"""Rows, as (which prompt, tokens of its completion)."""


def batch(
    lengths: Sequence[int] = (9, 6, 4),
    completion: int | Sequence[int] = 3,
    *,
    padding: str = "right",
    width: int | None = None,
    seed: int = 0,
    **fields: Any,
) -> TokenBatch:
    """Random sequences of these lengths, the last `completion` tokens of each scored; same tokens for either padding.

    Args:
        lengths: real tokens of each sequence.
        completion: scored tokens of each sequence, or of all.
        padding: "left" or "right".
        width: columns; None takes the longest.
        seed: of the tokens; torch's own is left alone.
        fields: position_ids, model_inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    attention = torch.zeros_like(ids)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    counts = [completion] * len(lengths) if isinstance(completion, int) else completion
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        start = width - length if padding == "left" else 0
        ids[row, start : start + length] = torch.randint(2, VOCABULARY, (length,), generator=generator)
        attention[row, start : start + length] = 1
        scored[row, start + length - count : start + length] = True
    return TokenBatch(ids, attention, scored, **fields)


def shared_batch(
    rows: Sequence[tuple[int, int]] = SHARED, lengths: Sequence[int] = (7, 4, 1), *, left: bool = True, **options: Any
) -> TokenBatch:
    """Completions of a few prompts: left-padded prompts and right-padded completions, as GRPO has them, or all padding
    on the right.

    Args:
        rows: of each, which prompt and how many tokens of its completion.
        lengths: of the prompts.
        left: where prompts are padded.
        options: fields of the batch.
    """
    source = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, VOCABULARY, (n,), generator=source) for n in lengths]
    ahead = max(lengths) + 2 if left else 0
    width = max(lengths) + 2 + max(c for _, c in rows) + 1
    ids, attention, scored = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for row, (which, count) in enumerate(rows):
        prompt = prompts[which]
        at = ahead - len(prompt) if left else 0
        end = at + len(prompt)
        ids[row, at:end] = prompt
        ids[row, end : end + count] = torch.randint(2, VOCABULARY, (count,), generator=source)
        attention[row, at : end + count] = 1
        scored[row, end : end + count] = 1
    return TokenBatch(ids, attention, scored, **options)


def scored(values: Tensor, like: TokenBatch) -> Tensor:
    """[B, T, …] -> [N, …]: the values of the scored tokens, row after row, wherever the padding is."""
    return values[like.completion_mask]


def longrope(original: int = 12, **overrides: Any) -> Phi3ForCausalLM:
    """Rotary positions whose scale depends on the longest row of a batch, from `original` tokens on."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [8.0, 5.0, 3.0, 2.0]}
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": original, **factors}
    size = {**_SIZE, "num_attention_heads": 4, "original_max_position_embeddings": original, "rope_parameters": rope}
    return Phi3ForCausalLM(Phi3Config(**{**_COMMON, **size, **overrides})).eval()


def dynamic_rope(original: int = 12) -> LlamaForCausalLM:
    """As longrope, by another rule."""
    return llama(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 8.0}, max_position_embeddings=original
    )

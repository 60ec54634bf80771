"""Random tiny models, batches and settings for tests/hostile, and the plain scores of one row at a time in fp64."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from support.models import gpt2, gpt_neox, llama, qwen2
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from refkl import TokenBatch

FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox", "gemma2", "mistral", "dynamic")
_LORA = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"]}
_WINDOW = 3
_DYNAMIC_FROM = 8
"""Length from which on the position encoding of "dynamic" depends on the longest row."""


@dataclass(eq=False, repr=False)
class Subject:
    """A random model, and what its plain scores depend on."""

    model: nn.Module
    family: str
    vocabulary: int
    made_with: str
    """For the report of a failure."""

    def __repr__(self) -> str:
        return f"Subject({self.family}, {self.vocabulary} tokens, {self.made_with})"


@st.composite
def subjects(draw: st.DrawFn, families: tuple[str, ...] = FAMILIES) -> Subject:
    """Return a model of 2 layers: width 16 or 32, 11 to 40 tokens, in fp32 or fp64, sometimes with LoRA."""
    family = draw(st.sampled_from(families))
    vocabulary, width = draw(st.integers(11, 40)), draw(st.sampled_from([16, 32]))
    torch.manual_seed(seed := draw(st.integers(0, 2**31)))
    model = _made(family, vocabulary, width, tied=(tied := draw(st.booleans())))
    targets = None
    if draw(st.booleans()):
        targets = _LORA.get(family, ["q_proj", "v_proj", "down_proj"])
        if draw(st.booleans()) and family != "gpt2":  # whose head PEFT would not adapt by this name
            targets = [*targets, "embed_out" if family == "gpt_neox" else "lm_head"]
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    # transformers' eager attention gives NaN for padding in fp64: its least fp64 number is -inf in fp32.
    dtype = draw(st.sampled_from([torch.float32] if family == "gemma2" else [torch.float32, torch.float64]))
    return Subject(model.to(dtype), family, vocabulary, f"{seed=} {width=} {tied=} {targets=} {dtype=}")


def _made(family: str, vocabulary: int, width: int, *, tied: bool) -> Any:
    size: dict[str, Any] = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 24}
    common = {"tie_word_embeddings": tied, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    if family == "gpt2":
        return gpt2(vocab_size=vocabulary, n_embd=width, n_head=2, n_positions=64)
    if family == "gpt_neox":
        return gpt_neox(**size, num_attention_heads=2, tie_word_embeddings=tied)
    if family == "gemma2":
        size |= {"head_dim": 8, "sliding_window": _WINDOW, "query_pre_attn_scalar": 8, "final_logit_softcapping": 4.0}
        return Gemma2ForCausalLM(Gemma2Config(**{**common, **size, **heads})).eval()
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(**{**common, **size, **heads, "sliding_window": _WINDOW})).eval()
    if family == "dynamic":
        rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 8.0}
        size |= {"rope_parameters": rope, "max_position_embeddings": _DYNAMIC_FROM}
    return {"qwen2": qwen2}.get(family, llama)(
        **size, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied
    )


@st.composite
def batches(draw: st.DrawFn, subject: Subject, *, rows: int = 5) -> TokenBatch:
    """Return a batch with shared prompts, duplicate rows, padding anywhere, empty completions and empty rows.

    A model with an attention window gets no padding inside a row: transformers counts it as part of the window.
    """
    vocabulary = subject.vocabulary
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    prompts = [torch.randint(vocabulary, (n,), generator=source) for n in lengths]
    placed, seen = [], []
    for _ in range(draw(st.integers(1, rows))):
        if seen and draw(st.integers(0, 4)) == 0:
            tokens, start = draw(st.sampled_from(seen))  # the same row again
        else:
            prompt = draw(st.sampled_from(prompts))
            completion = torch.randint(vocabulary, (draw(st.integers(0, 6)),), generator=source)
            tokens, start = torch.cat([prompt, completion]), len(prompt)
        seen.append((tokens, start))
        placed.append((tokens, start, draw(st.integers(0, 3))))
    left = draw(st.booleans())  # prompts end in one column, as GRPO has them
    ahead = max(start + (0 if left else gap) for _, start, gap in placed)
    width = max(1, ahead + max(len(t) - s for t, s, _ in placed) + max(g for _, _, g in placed))
    ids = torch.randint(vocabulary, (len(placed), width), generator=source)  # padding may hold any token
    attention, scored = torch.zeros_like(ids), torch.zeros_like(ids)
    mode = draw(st.sampled_from(["completion", "all", "some"]))
    for row, (tokens, start, gap) in enumerate(placed):
        at = ahead - start if left else gap
        ids[row, at : at + len(tokens)] = tokens
        attention[row, at : at + len(tokens)] = 1
        scored[row, at + (start if mode == "completion" else 0) : at + len(tokens)] = 1
    if mode == "some":
        scored &= torch.rand(scored.shape, generator=source) < 0.5
    if subject.family not in ("mistral", "gemma2") and draw(st.integers(0, 3)) == 0:  # holes
        attention &= torch.rand(scored.shape, generator=source) < 0.8
    masks = attention, scored & attention
    if draw(st.booleans()):
        masks = masks[0].bool(), masks[1].bool()
    ids = ids.to(draw(st.sampled_from([torch.long, torch.long, torch.int32])))
    return TokenBatch(ids, *masks, prefix=draw(st.sampled_from(["auto", "auto", "off"])))


def double_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy in fp64."""
    return copy.deepcopy(model).double()


def row_logits(model: nn.Module, family: str, batch: TokenBatch) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """Return what plain code gives for each row with a scored token.

    Returns:
        One entry a row: its number, the scored columns [n], the targets [n], and the logits [n, V] that predict them.
    """
    ids, attention = batch.input_ids.long(), batch.attention_mask.bool()
    positions = (attention.long().cumsum(-1) - 1).clamp(min=0)
    longest = int(attention.sum(-1).max())
    together = None
    if family == "dynamic" and longest >= _DYNAMIC_FROM:  # each row's scores depend on the longest row
        for module in model.modules():  # transformers keeps the scale of the longest row that the model has ever seen
            if (rope := getattr(module, "rotary_emb", None)) is not None:
                module.rotary_emb = type(rope)(rope.config)
        together = model(input_ids=ids, attention_mask=attention.long(), position_ids=positions).logits
    found = []
    for row in range(len(batch)):
        columns = batch.completion_mask[row].nonzero()[:, 0]
        if not len(columns):
            continue
        real = attention[row].nonzero()[:, 0]
        if together is not None:
            logits = together[row, columns - 1]
        else:
            alone = model(input_ids=ids[row, real][None]).logits[0]
            logits = alone[torch.searchsorted(real, columns) - 1]
        found.append((row, columns, ids[row, columns], logits))
    return found


def spread(batch: TokenBatch, rows: list[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Return [B, T] in fp64, from (row, columns, values): 0.0 elsewhere."""
    whole = torch.zeros(batch.input_ids.shape, dtype=torch.float64)
    for row, columns, values in rows:
        whole = whole.index_put((torch.full_like(columns, row), columns), values)
    return whole

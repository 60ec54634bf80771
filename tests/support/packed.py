"""Packed batches beside the same batches as they are."""

from __future__ import annotations

import torch
from support.families import tiny
from support.models import shared_batch
from torch import Tensor, nn
from transformers import PreTrainedModel

from refkl import TokenBatch, score_tokens

# Of the models that are most used, in CI; of all others with --slow.
USUAL = (
    "FalconForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "OPTForCausalLM", "PhiForCausalLM",
    "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
)  # fmt: skip


def weighted(logp: Tensor) -> Tensor:
    """A loss in which no two tokens count alike."""
    return (logp * torch.linspace(0.5, 1.5, logp.numel()).view_as(logp)).sum()


def scored(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logp = score_tokens(model, batch).logp
    weighted(logp).backward()
    return logp.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_alike(one: tuple[Tensor, dict[str, Tensor]], plain: tuple[Tensor, dict[str, Tensor]]) -> None:
    (found, ours), (right, gradients) = one, plain
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        mine = ours.get(name, torch.zeros(()))  # an expert that no token went to has none, or zeros
        assert float((mine - gradient).abs().max()) <= 1e-4 * largest, name
    assert all(float(ours[n].abs().max()) == 0.0 for n in ours.keys() - gradients.keys())


def variants(name: str) -> dict[str, PreTrainedModel]:
    """The model; and one that sees few tokens back, if it has a setting for it, in all layers or in the first."""
    made = {"": tiny(name)}
    for key in ("sliding_window", "attention_chunk_size", "window_size"):
        if hasattr(made[""].config, key):
            made[key] = tiny(name, **{key: 4})
    if "sliding_window" in made and hasattr(made[""].config, "layer_types"):
        kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
        if hasattr(made[""].config, "use_sliding_window"):
            kinds["use_sliding_window"] = True
        try:
            made["first layer"] = tiny(name, **kinds)
            with torch.no_grad():
                score_tokens(made["first layer"], shared_batch(prefix="off"))
        except (KeyError, ValueError):
            made.pop("first layer", None)  # not a model of both kinds
    return made

"""The choice to give a model a packed batch: only if that is exact, and costs less."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from refkl.backend import base_model, own_class, submodules
from refkl.scoring.packing.attention_kernels import give_masks, no_masks
from refkl.scoring.packing.packed_batch import Layout
from refkl.scoring.packing.prefix_mask import BLOCK, Seen, SharedMask
from refkl.types import TokenBatch

GAIN = 0.93
"""The one row is taken where it costs at most so much of the batch as it is: what is estimated is not the time."""

# fmt: off
EXACT = frozenset(
    name if name.endswith("Model") else f"{name}ForCausalLM"
    for name in (
        "AXK1", "Afmoe", "Apertus", "Arcee", "AriaText", "Beam", "BioGpt", "BitNet", "CTRLLMHeadModel",
        "CodeGen", "Cohere2", "Cohere2Moe", "CohereCompass", "Cohere", "Cwm", "Dbrx", "DeepseekV2",
        "DeepseekV3", "DiffLlama", "Dots1", "Emu3", "Ernie4_5", "Ernie4_5_Moe", "Exaone4", "ExaoneMoe",
        "Falcon", "FlexOlmo", "Flint", "GPT2LMHeadModel", "GPTBigCode", "GPTJ", "GPTNeoX", "GPTNeoXJapanese",
        "Gemma2", "Gemma3", "Gemma4", "Gemma4Unified", "Gemma", "Git", "Glm4", "Glm4Moe", "Glm4MoeLite", "Glm",
        "GptOss", "Granite", "GraniteMoe", "GraniteMoeSWA", "GraniteMoeShared", "GraniteSWA", "HYV3", "Helium",
        "HrmText", "HunYuanDenseV1", "HunYuanMoEV1", "HyperCLOVAX", "Jais2", "JetMoe", "Kolibri1", "Laguna",
        "Llama", "LongcatFlash", "Mellum", "MiMoV2Flash", "MiniCPM3", "MiniMaxM2", "MiniMaxM3VL", "Ministral3",
        "Ministral", "Mistral", "Mixtral", "Mllama", "ModernBertDecoder", "Moshi", "NanoChat", "Nemotron",
        "OPT", "Olmo2", "Olmo3", "Olmo", "Olmoe", "Persimmon", "Phi3", "Phi4Multimodal", "Phi", "Phimoe",
        "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "SeedOss", "SmolLM3", "SolarOpen", "StableLm", "Starcoder2",
        "VaultGemma", "XGLM", "Youtu"
    )
)
# fmt: on
"""Models of transformers whose scores and gradients are the plain ones, which a test finds out for each class anew."""


def why_not(model: nn.Module, base: nn.Module) -> str | None:
    """Why a model, as it is wrapped, cannot be given its rows' tokens in one row; None if it can.

    Which models can is a list, since only their code says it: those of transformers' own whose scores and gradients
    were found to be the plain ones. Left out are models with a state (Mamba, hybrids), with a bias by distance
    (ALiBi), with attention in chunks or sparse attention of their own, and encoder-decoders.
    """
    kind = own_class(base)
    name = kind.__name__
    if not kind.__module__.startswith("transformers.models.") or name not in EXACT:
        return f"{name} is not among the models for which that is known to be exact"
    config: Any = base.config
    if (attention := no_masks(base)) is not None:
        return attention
    if getattr(config, "alibi", False):
        return "its attention has a bias by distance (ALiBi)"
    if others := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return f"it has layers of {', '.join(sorted(others))}"
    if scaled := _rope_types(config) & {"dynamic", "longrope"}:
        return f"its positions are scaled by the longest row ({', '.join(sorted(scaled))})"
    if getattr(config, "output_router_logits", False):
        return "its router's auxiliary loss counts the tokens of the batch as it is"
    if any(m._compiled_call_impl is not None or isinstance(m, OptimizedModule) for m in submodules(model)):
        return "it is compiled, for which each batch would be a new shape"
    return None


def _rope_types(config: Any) -> set[str]:
    """Return the RoPE types of all layers; they may be told apart by their kind."""
    settings = getattr(config, "rope_parameters", None) or {}
    each = [settings, *(x for x in settings.values() if isinstance(x, dict))]
    return {str(x["rope_type"]) for x in each if "rope_type" in x}


def shares_prompts(model: nn.Module, batch: TokenBatch) -> bool:
    """Return True if rows of this batch can share their prompts in this model."""
    return batch.prefix == "auto" and not batch.model_inputs and why_not(model, base_model(model)) is None


def may_gain(base: nn.Module, batch: TokenBatch) -> bool:
    """Return True if a packed row could cost less, even if all prompts were the same. Takes few operations, before
    packing."""
    scored = batch.completion_mask.long()
    run = batch.attention_mask.bool() & (scored.flip(1).cumsum(1).flip(1) > 0)  # no further than the last scored token
    prompts, lengths = (run & (scored.cumsum(1) == 0)).sum(1), run.sum(1)
    own = (lengths - prompts - 1).clamp(min=0)
    pairs = (own * (lengths - 1)).sum()
    return float(own.sum() + prompts.max() + pairs / _scale(base)) <= GAIN * _plainly(base, batch)


def _plainly(base: nn.Module, batch: TokenBatch) -> float:
    """Return the cost of the batch as it is, in tokens that pass the model."""
    config: Any = getattr(base, "config", None)
    rows, size = batch.input_ids.shape
    attention = getattr(config, "_attn_implementation", None)
    # Torch's attention computes what a mask hides; other kernels do not.
    whole = attention == "eager" or (attention == "sdpa" and not bool(batch.attention_mask.bool().all()))
    return rows * size + rows * size**2 * (1.0 if whole else 0.5) / _scale(base)


def _scale(base: nn.Module) -> int:
    """Pairs of a query and a key that cost as much as a token in all else that a layer does."""
    return 6 * (getattr(getattr(base, "config", None), "hidden_size", None) or 1)


def masks_for(base: nn.Module, layout: Layout, batch: TokenBatch) -> Any:
    """Return the attention mask to give the model, or None if the batch as it is costs less."""
    config: Any = base.config
    eager = config._attn_implementation == "eager"
    seen = Seen(layout, _scale(base))
    pairs = layout.tokens**2 if eager else seen.pairs()
    here = layout.tokens + len(seen.blocks) * (0 if eager else BLOCK / 8) + pairs / _scale(base)
    if here > GAIN * _plainly(base, batch):
        return None
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    short = window is None or layout.longest() <= window
    if kinds == {"full_attention"} and not short and "layer_types" not in vars(config):
        return None

    give_masks(base)

    def mask(window: int | None) -> Tensor:
        dtype = base.get_input_embeddings().weight.dtype  # type: ignore[operator]
        return seen.dense(window, dtype) if eager else SharedMask.of(seen, window)

    if "sliding_attention" not in kinds:
        return mask(None)
    return {kind: mask(None if kind == "full_attention" else window) for kind in kinds}

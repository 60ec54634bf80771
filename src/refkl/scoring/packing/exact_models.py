"""Models that may get a packed batch: those whose scores and gradients do not change under packing."""

from __future__ import annotations

from typing import Any

from peft import PeftModel, PeftType
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from refkl.backend import own_class, submodules, unwrap
from refkl.scoring.packing.attention_kernels import no_masks
from refkl.scoring.rope import rope_settings

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
"""Classes of transformers whose scores and gradients do not change when a batch is packed. A test measures each."""


def why_not(model: nn.Module, base: nn.Module) -> str | None:
    """Return why a model, with its wrappers and adapters, cannot get a packed row; None if it can.

    EXACT lists the classes, because only a model's code shows this. The list leaves out models with a state (Mamba,
    hybrids), with a bias by distance (ALiBi), with chunked or sparse attention, and encoder-decoders.
    """
    if not is_listed(base):
        return f"{own_class(base).__name__} is not among the models for which that is known to be exact"
    config: Any = base.config
    if (adapter := _by_row(model)) is not None:
        return adapter
    if (attention := no_masks(base)) is not None:
        return attention
    if getattr(config, "alibi", False):
        return "its attention has a bias by distance (ALiBi)"
    if others := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return f"it has layers of {', '.join(sorted(others))}"
    types = {str(settings["rope_type"]) for settings in rope_settings(config) if "rope_type" in settings}
    if scaled := types & {"dynamic", "longrope"}:
        return f"its positions are scaled by the longest row ({', '.join(sorted(scaled))})"
    if getattr(config, "output_router_logits", False):
        return "its router's auxiliary loss counts the tokens of the batch as it is"
    if [m for m in submodules(model) if m._compiled_call_impl is not None or isinstance(m, OptimizedModule)]:
        return "it is compiled, for which each batch would be a new shape"
    return None


def is_listed(base: nn.Module) -> bool:
    """Return True if the class is on the list: a causal language model that computes each row by itself."""
    kind = own_class(base)
    return kind.__module__.startswith("transformers.models.") and kind.__name__ in EXACT


def _by_row(model: nn.Module) -> str | None:
    """Return why an active adapter cannot get a packed row: it depends on the content of each row. None if it can."""
    inner = unwrap(model)
    if not isinstance(inner, PeftModel):
        return None
    for name in inner.active_adapters:
        config = inner.peft_config[name]
        if getattr(config, "alora_invocation_tokens", None) is not None:  # only LoRA's configuration has it
            return f"its adapter {name!r} (aLoRA) looks for its invocation tokens in each row"
        if config.peft_type == PeftType.XLORA:
            return f"its adapter {name!r} (X-LoRA) weights its experts by the row"
    return None

"""A tiny model of every class that transformers maps to causal language modelling, from its configuration alone.

Sizes are found by the names that configurations use for them. What a model does to its logits is set so that it shows:
factors far from 1 and caps low enough to bend them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCABULARY = 258
_NAMES: tuple[tuple[str, Any], ...] = (
    ("hidden_size d_model n_embd embedding_size hidden_size_global word_embed_proj_dim", 32),
    ("intermediate_size ffn_dim n_inner d_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size mamba_d_ssm", 64),
    ("moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size d_ff dff", 64),
    ("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers", 2),
    ("num_decoder_layers num_encoder_layers num_blocks mamba_expand", 2),
    ("num_attention_heads n_head n_heads num_heads decoder_attention_heads rotary_dim", 4),
    ("encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads", 4),
    ("num_key_value_heads num_kv_heads kv_n_heads num_experts_per_tok moe_topk moe_k top_k", 2),
    ("num_experts n_routed_experts num_local_experts moe_num_experts", 4),
    ("max_position_embeddings n_positions n_ctx", 128),
    ("head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim hidden_size_per_layer_input", 8),
    ("mamba_n_heads mamba_d_head mamba_d_state", 8),
    ("q_lora_rank kv_lora_rank", 16),
    ("vocab_size vocab_size_per_layer_input", VOCABULARY),
    ("pad_token_id", 0),
    ("bos_token_id eos_token_id mamba_n_groups n_shared_experts", 1),
    ("encoder_hash_byte_group_vocab", 300),
    ("encoder_hash_byte_group_size", [3]),
    ("initializer_range", 0.2),
    # what happens after the head
    ("final_logit_softcapping logits_soft_cap output_logit_soft_cap", 3.0),
    ("logit_scale", 0.37),
    ("logits_scaling", 2.7),
    ("lm_head_multiplier", 0.3),
    ("unpadded_vocab_size", 200),
)
_SIZES = {name: value for names, value in _NAMES for name in names.split()}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_OWN: dict[str, dict[str, Any]] = {
    "AXK1ForCausalLM": {"n_group": 1, "topk_group": 1},
    "BailingHybridForCausalLM": _HYBRID,
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "CohereCompassForCausalLM": {
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "DbrxForCausalLM": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32},
    },
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0},
    "GraniteMoeHybridForCausalLM": _HYBRID,
    "JambaForCausalLM": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "KimiLinearForCausalLM": _HYBRID,
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Lfm3ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8},
    "Qwen3NextForCausalLM": _HYBRID,
    "Qwen3_5ForCausalLM": _HYBRID,
    "Qwen3_5MoeForCausalLM": _HYBRID,
    "Qwen4ExpForCausalLM": {
        **_HYBRID,
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
        **{"indexer_budget": 8, "indexer_compress_ratio": 2},
    },
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
    "ReformerModelWithLMHead": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "ZambaForCausalLM": {"num_hidden_layers": 5, "layer_types": ["mamba", "mamba", "hybrid", "mamba", "hybrid"]},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}


def classes() -> dict[str, type[PreTrainedModel]]:
    """By name, each once."""
    found: dict[str, type[PreTrainedModel]] = {}
    for value in MODEL_FOR_CAUSAL_LM_MAPPING.values():
        found.update({cls.__name__: cls for cls in (value if isinstance(value, tuple) else (value,))})
    return dict(sorted(found.items()))


def tiny(name: str, **overrides: Any) -> PreTrainedModel:
    """In eval mode; overrides are of the configuration."""
    cls = classes()[name]
    config = _config(cls.config_class, {**_OWN.get(name, {}), **overrides})
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    assert size < 2e7, f"{name} still has {size} parameters"
    return cls(config).eval()


def _config(cls: type[PreTrainedConfig], own: dict[str, Any]) -> PreTrainedConfig:
    usual = cls()
    aliases = usual.attribute_map
    names = set(usual.to_dict()) | set(aliases)
    values = {aliases.get(name, name): value for name, value in _SIZES.items() if name in names}
    if "kv_lora_rank" in names:  # latent attention: one key head for each query head
        values["num_key_value_heads"] = 4
    for name, kind in cls.sub_configs.items():
        if (part := getattr(usual, name)) is not None:
            values[name] = _config(type(part) if kind is AutoConfig else kind, {}).to_dict()
    return cls(**{**values, **own})

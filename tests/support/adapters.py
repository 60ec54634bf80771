"""Adapters of all kinds on a small policy, and policies that have moved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from peft.tuners.lora.config import CordaConfig
from support.models import batch, llama, qwen2
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from refkl import score_tokens, trainable_parameters


def lora(**options: object) -> PeftModel:
    return get_peft_model(llama(), LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options}))


def moved(policy: nn.Module, by: float = 0.3) -> nn.Module:
    """As if trained: every trained tensor moves."""
    with torch.no_grad():
        for parameter in trainable_parameters(policy):
            parameter.add_(by * torch.randn_like(parameter))
    return policy


def corda() -> PeftModel:
    pytest.importorskip("attr")
    from peft.tuners.lora.corda import preprocess_corda

    base = llama()
    options = {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")}
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options)
    preprocess_corda(base, config, run_model=lambda: base(input_ids=batch().input_ids[:1]))
    return get_peft_model(base, config)


def lora_ga() -> PeftModel:
    base, ids = llama(), batch().input_ids
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
    )
    preprocess_loraga(base, config, lambda: base(input_ids=ids, labels=ids).loss.backward())
    return get_peft_model(base, config)


def like_loftq() -> PeftModel:
    """What LoftQ leaves behind (PEFT makes it on a GPU alone): a rounded base, and factors that make up for it."""
    policy = lora()
    with torch.no_grad():
        for module in policy.modules():
            if hasattr(module, "lora_B"):
                weight = module.base_layer.weight
                rounded = (weight * 4).round() / 4
                u, s, v = torch.linalg.svd(weight - rounded)
                module.lora_A["default"].weight.copy_(v[:4])
                module.lora_B["default"].weight.copy_(u[:, :4] * s[:4])
                weight.copy_(rounded)
    return policy


def experts() -> PeftModel:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4}
    config = Qwen3MoeConfig(vocab_size=258, num_experts_per_tok=2, initializer_range=0.2, **sizes, **heads)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return get_peft_model(
        Qwen3MoeForCausalLM(config).eval(),
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters),
    )


def norms_by_hand() -> PeftModel:
    policy = lora()
    for name, parameter in policy.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    return policy


ADAPTERS: dict[str, Callable[[], nn.Module]] = {
    "LoRA": lora,
    "DoRA": lambda: lora(use_dora=True),
    "rsLoRA": lambda: lora(use_rslora=True),
    "LoRA with a bias": lambda: lora(lora_bias=True),
    "embedding": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "trainable tokens": lambda: lora(trainable_token_indices=[3, 5, 7]),
    "modules to save": lambda: lora(modules_to_save=["lm_head"]),
    "parameters of experts": experts,
    "IA3": lambda: get_peft_model(
        llama(), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
    "VeRA": lambda: get_peft_model(llama(), VeraConfig(r=8, target_modules=["q_proj", "o_proj"])),
    "AdaLoRA": lambda: get_peft_model(
        llama(), AdaLoraConfig(init_r=6, target_r=4, total_step=10, target_modules=["q_proj"])
    ),
    "PiSSA": lambda: lora(init_lora_weights="pissa"),
    "OLoRA": lambda: lora(init_lora_weights="olora"),
    "CorDA": corda,
    "LoRA-GA": lora_ga,
    "as LoftQ leaves it": like_loftq,
    "bias of all layers": lambda: get_peft_model(qwen2(), LoraConfig(r=4, target_modules=["q_proj"], bias="all")),
    "bias of LoRA's layers": lambda: get_peft_model(
        qwen2(), LoraConfig(r=4, target_modules=["q_proj"], bias="lora_only")
    ),
    "norms unfrozen by hand": norms_by_hand,
}


def scored(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return score_tokens(model, batch()).logp

"""A change of what a reference shares with the policy is put right, or refused by name, at the next score."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import IA3Config, LoraConfig, OFTConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from support.models import batch, gpt2, llama
from torch import nn
from trl.generation.vllm_generation import VLLMGeneration

from refkl import Reference, build_reference
from refkl.backend import canonical_name
from refkl.backend.adapters import base_kept, keeping_base

FAMILIES: dict[str, tuple[Callable[..., Any], list[str]]] = {"llama": (llama, ["q_proj"]), "gpt2": (gpt2, ["c_attn"])}
ADAPTERS: dict[str, tuple[type[PeftConfig], dict[str, Any]]] = {
    "LoRA": (LoraConfig, {}),
    "DoRA": (LoraConfig, {"use_dora": True}),
    "IA3": (IA3Config, {"feedforward_modules": []}),
    "OFT": (OFTConfig, {"oft_block_size": 4}),
}


def made(family: str, kind: str = "LoRA", dtype: torch.dtype = torch.float32) -> PeftModel:
    make, target = FAMILIES[family]
    config, options = ADAPTERS[kind]
    return get_peft_model(make().to(dtype), config(task_type="CAUSAL_LM", target_modules=target, **options))


@torch.no_grad()
def trained(policy: nn.Module, by: float = 0.3) -> None:
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * by)


def built(policy: PeftModel, strategy: str) -> tuple[Reference, torch.Tensor]:
    reference = build_reference(policy, strategy)
    right = reference.score(batch()).logp
    trained(policy)
    assert torch.equal(reference.score(batch()).logp, right)
    return reference, right


@pytest.mark.parametrize("strategy", ["clone", "adapter", "swap"])
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_is_merged_later(family: str, kind: str, strategy: str) -> None:
    if (family, kind) == ("gpt2", "OFT"):
        pytest.skip("PEFT has no OFT for Conv1D")
    policy = made(family, kind)
    reference, _ = built(policy, strategy)
    policy.merge_adapter()
    with pytest.raises(ValueError, match=r"(adapter of|adapter at) .* (merged|was on)"):
        reference.score(batch())
    if kind != "LoRA":
        return  # others leave rounding; see below
    with base_kept(policy):
        policy.unmerge_adapter()  # what base_kept keeps here is the merged base
    with pytest.raises(ValueError, match="changed without an update or load"):
        reference.score(batch())


@pytest.mark.parametrize("strategy", ["clone", "adapter", "swap"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_is_merged_and_unloaded(family: str, strategy: str) -> None:
    policy = made(family)
    reference, _ = built(policy, strategy)
    policy.merge_and_unload()
    with pytest.raises(ValueError, match=r"no longer has"):
        reference.score(batch())


@pytest.mark.parametrize("strategy", ["clone", "adapter", "swap"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_loaded_over_the_base(family: str, strategy: str) -> None:
    policy = made(family)
    reference, right = built(policy, strategy)
    same = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    policy.load_state_dict(same)  # the same numbers are no change
    assert torch.equal(reference.score(batch()).logp, right)
    policy.load_state_dict({n: t + 0.1 for n, t in same.items() if "lora_" not in n}, strict=False)
    with pytest.raises(ValueError, match=r"changed without an update or load: .*shares with the policy"):
        reference.score(batch())


@pytest.mark.parametrize("strategy", ["adapter", "swap"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_changed_before_the_first_score(family: str, strategy: str) -> None:
    policy = made(family)
    reference = build_reference(policy, strategy)
    name, weight = next((n, p) for n, p in policy.named_parameters() if not p.requires_grad)
    with torch.no_grad():
        weight.add_(0.0)  # the same numbers are no change
    with reference.keep_active():
        reference.score(batch())
    changed = build_reference(policy, strategy)
    with torch.no_grad():
        weight.add_(0.1)
    message = f"changed without an update or load: {canonical_name(name)}, which it shares with the policy"
    with pytest.raises(ValueError, match=message), changed.keep_active():
        pass
    with pytest.raises(ValueError, match=message):
        changed.score(batch())


@pytest.mark.parametrize("strategy", ["clone", "adapter", "swap"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_scaling_of_lora_is_the_references_own(family: str, strategy: str) -> None:
    policy = made(family)
    trained(policy)
    strategy = "swap" if strategy == "adapter" else strategy
    reference, right = built(policy, strategy)
    layers = [module for module in policy.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.set_scale("default", 3.0)
    scaled = [dict(layer.scaling) for layer in layers]
    assert torch.equal(reference.score(batch()).logp, right)
    assert [dict(layer.scaling) for layer in layers] == scaled


@pytest.mark.parametrize("strategy", ["adapter", "swap"])
def test_a_module_that_is_replaced(strategy: str) -> None:
    policy = made("llama")
    reference, _ = built(policy, strategy)
    policy.get_base_model().model.layers[1].mlp.act_fn = nn.ReLU()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.act_fn was a SiLU\w* when .* is a ReLU now"):
        reference.score(batch())


def test_a_clone_has_modules_of_its_own() -> None:
    policy = made("llama")
    reference, right = built(policy, "clone")
    policy.get_base_model().model.layers[1].mlp.act_fn = nn.ReLU()
    assert torch.equal(reference.score(batch()).logp, right)


def test_a_base_with_running_statistics_is_not_the_reference() -> None:
    class Normed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.norm = inner, nn.BatchNorm1d(32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.norm(x.transpose(1, 2)).transpose(1, 2))

    base = llama()
    base.model.layers[0].mlp = Normed(base.model.layers[0].mlp)
    policy = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="running statistics change while the policy trains"):
        build_reference(policy, "adapter")


@pytest.mark.parametrize("strategy", ["adapter", "clone", "swap"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trls_sync_to_vllm_leaves_the_base_to_the_bit(family: str, strategy: str) -> None:
    """TRL's own code merges and unmerges, in bf16, where both round."""
    policy = made(family, dtype=torch.bfloat16)
    reference, right = built(policy, strategy)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    generation: Any = VLLMGeneration.__new__(VLLMGeneration)
    generation.model, generation.accelerator = policy, Accelerator(cpu=True)
    generation._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda params: base_kept(nn.Module()))
    sent: dict[str, torch.Tensor] = {}
    keeping_base(policy, lambda: sent.update(generation._iter_named_params()))()
    assert sent and all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert torch.equal(reference.score(batch()).logp, right)
    list(generation._iter_named_params())  # as TRL does it alone
    with pytest.raises(ValueError, match="merged adapter that was unmerged"):
        reference.score(batch())

"""What of a model belongs to PEFT's adapters, how they are switched, and what is under them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from refkl.backend.learned_prompt import learned_prompt, without_prompt
from refkl.backend.modules import named_weights, parameters_in, submodules

_SAME_FORWARD = {"ALoraLinearVariant", "MiCAEmbeddingVariant", "MiCALinearVariant", "VeloraLinearVariant"}
"""Variants of LoRA whose forward outside of training adds the product of the two factors, as plain LoRA's does."""


@dataclass(frozen=True)
class LoraFactors:
    """The two factors of one adapter in one layer, by their canonical names."""

    module: str
    """The layer's name in the model, for messages."""
    a: str
    """[r, inputs]; of a layer of experts [experts · r, inputs]"""
    b: str
    """[outputs, r]; of a layer of experts [outputs, r · experts]"""
    experts: int
    scaling: float
    """The layer's weight changes by scaling · B · A."""
    refused: str | None = None
    """Why that is not all that the adapter does, so that averages of it are not averages of the layer; else None."""


def lora_factors(model: nn.Module) -> list[LoraFactors]:
    """Of each LoRA layer and each of its adapters, on or not."""
    names = {id(tensor): name for name, tensor in named_weights(model)}
    found = []
    for module_name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter, scaling in module.scaling.items():
            if (factors := _factors(module, adapter)) is None:
                continue
            refused, (a, b) = _refused(module, adapter), factors
            experts = module.num_experts if isinstance(module, ParamWrapper) else 1
            found.append(LoraFactors(module_name, names[id(a)], names[id(b)], experts, float(scaling), refused))
    uses = Counter(name for layer in found for name in (layer.a, layer.b))
    shared = "shares a factor with another layer"
    return [replace(f, refused=f.refused or shared) if max(uses[f.a], uses[f.b]) > 1 else f for f in found]


def rank_dims(layers: Iterable[LoraFactors]) -> dict[str, int]:
    """The dimension of each factor that counts the rank."""
    return {name: dim for layer in layers for name, dim in ((layer.a, 0), (layer.b, 1))}


def check_scalings(layers: Iterable[LoraFactors], saved: Mapping[str, float], other: Collection[str]) -> None:
    """Raise ValueError if a saved layer's factors would make another product here.

    Args:
        saved: by name of B, the scaling with which it was saved; older folders have none.
        other: names of factors that were saved with another rank.
    """
    for layer in layers:
        found = saved.get(layer.b)
        if found == layer.scaling or (found is None and not {layer.a, layer.b} & set(other)):
            continue
        raise ValueError(
            f"The saved reference multiplies the factors of {layer.module} by "
            f"{'what was not recorded' if found is None else found}, and this policy by {layer.scaling}: its adapter "
            "was made with another r or lora_alpha. Load it beside a policy that is configured as the saved one's was."
        )


def _factors(module: LoraLayer, adapter: str) -> tuple[Tensor, Tensor] | None:
    """What an adapter has for A and B, in whatever shape; None if it has no such two."""
    if adapter in module.lora_embedding_A:
        return module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    if adapter not in module.lora_A:
        return None
    a, b = (_weight(factor[adapter]) for factor in (module.lora_A, module.lora_B))
    return None if a is None or b is None else (a, b)


def _weight(factor: Tensor | nn.Module) -> Tensor | None:
    """AdaLoRA's factors are parameters, which a ModuleDict is not said to hold."""
    weight = factor if isinstance(factor, Tensor) else getattr(factor, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _refused(module: LoraLayer, adapter: str) -> str | None:
    variant = module.lora_variant.get(adapter)
    if module.use_dora.get(adapter):
        return "is DoRA, which divides by a norm of the product"
    if variant is not None and type(variant).__name__ not in _SAME_FORWARD:
        return f"is of another kind than plain LoRA ({type(variant).__name__})"
    if adapter in module.lora_embedding_A:
        return None
    kinds = [type(factor[adapter]) for factor in (module.lora_A, module.lora_B)]
    if kinds != [nn.Linear, nn.Linear]:
        return f"has factors ({kinds[0].__name__}, {kinds[1].__name__}) that are not two matrices"
    return None


def adapter_parameters(policy: nn.Module) -> set[int]:
    """ids of the adapters' parameters, trained or not: AdaLoRA changes those that hold its ranks."""
    modules = _adapter_modules(policy, copies=True)
    return {id(parameter) for module in modules for parameter in module._parameters.values() if parameter is not None}


def adapter_buffers(policy: nn.Module) -> set[int]:
    """ids of the adapters' buffers, such as the projections that VeRA's layers share: nothing changes them."""
    modules = _adapter_modules(policy, copies=False)
    return {id(buffer) for module in modules for buffer in module._buffers.values() if buffer is not None}


def adapter_tensors(policy: nn.Module) -> set[int]:
    """ids of all that PEFT added: what the model inside would not have without it."""
    return adapter_parameters(policy) | adapter_buffers(policy)


def _adapter_modules(policy: nn.Module, *, copies: bool) -> Iterator[nn.Module]:
    """What an adapted layer has beside the layer that it adapts; learned prompts; with `copies` modules_to_save too.

    One walk with a stack: each score of an adapter's base makes it, and `modules()` of every part takes five times as
    long.
    """
    stack = [(policy, False)]
    while stack:
        module, added = stack.pop()
        if added:
            yield module
        layer, prompts = isinstance(module, BaseTunerLayer), isinstance(module, PeftModel)
        saved = copies and isinstance(module, ModulesToSaveWrapper)
        for name, child in module._modules.items():
            if child is not None:
                new = (layer and name != "base_layer") or (prompts and name == "prompt_encoder")
                stack.append((child, added or new or (saved and name == "modules_to_save")))


def switches(policy: nn.Module) -> dict[str, str]:
    """Of each adapted layer, which of its adapters are on, and whether they are merged."""
    return {
        name: f"{'off' if module.disable_adapters else 'on'} with {list(module.active_adapters)}"
        + (f", merged {list(module.merged_adapters)}" if module.merged_adapters else "")
        for name, module in policy.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    }


@contextmanager
def switched_off(policy: PeftModel) -> Iterator[None]:
    """While open the policy's adapter is off, layer by layer, and so is a prompt that it learns.

    PEFT's disable_adapter first makes a report of all layers, which takes several times as long as switching them, and
    in the end turns on what was off before, and requires_grad of all that the user froze in the adapter.
    """
    modules = submodules(policy)
    trains = [(p, p.requires_grad) for p in parameters_in(modules)]
    with ExitStack() as stack:
        stack.callback(_let_train, trains)
        if learned_prompt(policy) is not None:
            stack.enter_context(without_prompt(policy))
        for layer in modules:
            if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper) and not layer.disable_adapters:
                stack.callback(layer.enable_adapters, True)
                layer.enable_adapters(False)
        yield


def _let_train(before: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in before:
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)


def quantised(policy: nn.Module) -> str:
    """Words to add to a reference's source where the base that it shares with the policy is quantised, else ""."""
    base = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    config = getattr(getattr(base, "hf_quantizer", None), "quantization_config", None)
    if config is None:
        return ""
    method = getattr(config.quant_method, "value", config.quant_method)
    return f"; its base is quantised ({method}), and so is the reference"

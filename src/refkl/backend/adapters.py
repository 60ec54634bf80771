"""PEFT adapters of a model: their tensors, switching them on and off, and their LoRA factors."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
from refkl.backend.zero import local_shard

_SAME_FORWARD = {"ALoraLinearVariant", "MiCAEmbeddingVariant", "MiCALinearVariant", "VeloraLinearVariant"}
"""LoRA variants whose forward in eval mode adds the product of the two factors, like plain LoRA."""


@dataclass(frozen=True)
class LoraFactors:
    """Canonical names of the two factors of one adapter in one layer."""

    module: str
    """The layer's name in the model, for messages."""
    a: str
    """[r, inputs]; for a layer of experts [experts · r, inputs]."""
    b: str
    """[outputs, r]; for a layer of experts [outputs, r · experts]."""
    experts: int
    scaling: float
    """The adapter adds scaling · B · A to the layer's weight."""
    refused: str | None = None
    """None if the adapter does nothing else. Otherwise the reason why averaging it does not average the layer."""


def lora_factors(model: nn.Module) -> list[LoraFactors]:
    """Return the factors of each LoRA layer and each of its adapters, active or not."""
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


def lora_scalings(model: nn.Module) -> dict[str, dict[str, float]]:
    """Return the scaling of each adapter of a LoRA layer, by the layer's name. `set_scale` and `scale_layer` change
    it."""
    return {name: dict(m.scaling) for name, m in model.named_modules() if isinstance(m, LoraLayer)}


@contextmanager
def scaled_as(model: nn.Module, scalings: Mapping[str, Mapping[str, float]]) -> Iterator[None]:
    """Set these scalings in the LoRA layers; restore the previous ones on exit."""
    changed = []
    for name, wanted in scalings.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, LoraLayer), "the layers are those that the factors were read from"
        if dict(layer.scaling) != wanted:
            changed.append((layer.scaling, dict(layer.scaling)))
            layer.scaling.update(wanted)
    try:
        yield
    finally:
        for factors, before in changed:
            factors.clear()
            factors.update(before)


def rank_dims(layers: Iterable[LoraFactors]) -> dict[str, int]:
    """Return the rank's dimension in each factor."""
    return {name: dim for layer in layers for name, dim in ((layer.a, 0), (layer.b, 1))}


def check_scalings(layers: Iterable[LoraFactors], saved: Mapping[str, float], other: Collection[str]) -> None:
    """Raise ValueError if a saved layer's factors would give another product with this policy's scaling.

    Args:
        layers: the LoRA layers of this policy.
        saved: the scaling of each saved layer, by the name of its B; older folders have none.
        other: names of factors that were saved with another rank.
    """
    for layer in layers:
        found = saved.get(layer.b)
        if found == layer.scaling or (found is None and not {layer.a, layer.b} & set(other)):
            continue
        raise ValueError(
            f"The saved reference multiplies the factors of {layer.module} by "
            f"{'a scaling that was not recorded' if found is None else found}, this policy by {layer.scaling}: the "
            "saved adapter had another r or lora_alpha. Load the reference beside a policy with the saved r and "
            "lora_alpha."
        )


def _factors(module: LoraLayer, adapter: str) -> tuple[Tensor, Tensor] | None:
    """Return an adapter's A and B, of any shape; None if it does not have both."""
    if adapter in module.lora_embedding_A:
        return module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    if adapter not in module.lora_A:
        return None
    a, b = (_weight(factor[adapter]) for factor in (module.lora_A, module.lora_B))
    return None if a is None or b is None else (a, b)


def _weight(factor: Tensor | nn.Module) -> Tensor | None:
    """Return a factor's weight. AdaLoRA's factors are parameters, which the type of a ModuleDict does not include."""
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
    """Return ids of the adapters' parameters, trainable or not: AdaLoRA also changes those that hold its ranks."""
    modules = adapter_modules(policy, copies=True)
    return {id(parameter) for module in modules for parameter in module._parameters.values() if parameter is not None}


def adapter_buffers(policy: nn.Module) -> set[int]:
    """Return ids of the adapters' buffers, such as the projections shared by VeRA's layers. They never change."""
    modules = adapter_modules(policy, copies=False)
    return {id(buffer) for module in modules for buffer in module._buffers.values() if buffer is not None}


def adapter_tensors(policy: nn.Module) -> set[int]:
    """Return ids of all tensors that PEFT added to the model."""
    return adapter_parameters(policy) | adapter_buffers(policy)


def adapter_modules(policy: nn.Module, *, copies: bool) -> Iterator[nn.Module]:
    """Yield an adapted layer's modules other than its base layer, learned prompts, and with `copies` modules_to_save.

    Each score of an adapter's base calls this. One walk with a stack takes a fifth of the time of calling `modules()`
    on every part.
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
    """Return for each adapted layer which adapters are active, and whether they are merged."""
    return {
        name: f"{'off' if module.disable_adapters else 'on'} with {list(module.active_adapters)}"
        + (f", merged {list(module.merged_adapters)}" if module.merged_adapters else "")
        for name, module in policy.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    }


@contextmanager
def switched_off(policy: PeftModel) -> Iterator[None]:
    """Switch off the policy's adapter, layer by layer, and its learned prompt; restore both on exit.

    PEFT's disable_adapter first makes a report of all layers, which takes several times as long as switching them. On
    exit it turns on layers that were off before, and sets requires_grad on adapter parameters that the user froze.
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


@contextmanager
def base_kept(policy: nn.Module) -> Iterator[None]:
    """Restore the base parameters of adapted layers on exit, bit for bit.

    Undoing a merge leaves rounding errors in them, and gives a quantised layer other parameters. While this is open,
    host memory holds a copy of this rank's part of them.
    """
    kept = [
        (layer, name, parameter, local_shard(parameter).detach().to("cpu", copy=True))
        for layer in dict.fromkeys(m.get_base_layer() for m in submodules(policy) if isinstance(m, BaseTunerLayer))
        for name, parameter in layer._parameters.items()
        if parameter is not None
    ]
    try:
        yield
    finally:
        for layer, name, parameter, numbers in kept:
            if layer._parameters[name] is not parameter:
                layer._parameters[name] = parameter
            # Through .data, which does not raise the tensor's version: code that watches the version sees no change.
            local_shard(parameter).data.copy_(numbers)


def keeping_base(policy: nn.Module, function: Callable[[], None]) -> Callable[[], None]:
    """Return the function with `base_kept` open around it."""

    @functools.wraps(function)
    def run() -> None:
        with base_kept(policy):
            function()

    return run


def _let_train(before: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in before:
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)


def quantised(policy: nn.Module) -> str:
    """Return a suffix for a reference's source if the base that it shares with the policy is quantised, else ""."""
    base = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    config = getattr(getattr(base, "hf_quantizer", None), "quantization_config", None)
    if config is None:
        return ""
    method = getattr(config.quant_method, "value", config.quant_method)
    return f"; its base is quantised ({method}), and so is the reference"

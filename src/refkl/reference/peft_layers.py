"""What of a model belongs to PEFT's adapters, how they are switched, and what is under them."""

from __future__ import annotations

from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn


def adapter_parameters(policy: nn.Module) -> set[int]:
    """ids of the adapters' parameters, trained or not: AdaLoRA changes those that hold its ranks."""
    copies = (module.modules_to_save for module in policy.modules() if isinstance(module, ModulesToSaveWrapper))
    return {id(parameter) for part in (*_adapter_parts(policy), *copies) for parameter in part.parameters()}


def adapter_buffers(policy: nn.Module) -> set[int]:
    """ids of the adapters' buffers, such as the projections that VeRA's layers share: nothing changes them."""
    return {id(buffer) for part in _adapter_parts(policy) for buffer in part.buffers()}


def adapter_tensors(policy: nn.Module) -> set[int]:
    """ids of all that PEFT added: what the model inside would not have without it."""
    return adapter_parameters(policy) | adapter_buffers(policy)


def _adapter_parts(policy: nn.Module) -> Iterator[nn.Module]:
    """What an adapted layer has beside the layer that it adapts; and learned prompts."""
    for module in policy.modules():
        if isinstance(module, BaseTunerLayer):
            yield from (part for name, part in module.named_children() if name != "base_layer")
        elif isinstance(module, PeftModel) and "prompt_encoder" in module._modules:
            yield module.prompt_encoder


def switches(policy: nn.Module) -> dict[str, str]:
    """Of each adapted layer, which of its adapters are on, and whether they are merged."""
    return {
        name: f"{'off' if module.disable_adapters else 'on'} with {list(module.active_adapters)}"
        + (f", merged {list(module.merged_adapters)}" if module.merged_adapters else "")
        for name, module in policy.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    }


def quantised(policy: nn.Module) -> str:
    """Words to add to a reference's source where the base that it shares with the policy is quantised, else ""."""
    base = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    config = getattr(getattr(base, "hf_quantizer", None), "quantization_config", None)
    if config is None:
        return ""
    method = getattr(config.quant_method, "value", config.quant_method)
    return f"; its base is quantised ({method}), and so is the reference"

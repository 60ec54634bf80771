"""The state in which an adapter changes nothing. A reference that was the switched-off adapter averages from there."""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera import VeraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from refkl.backend import layout_of, local_shard, named_weights, whole


def neutral_state(policy: PeftModel) -> dict[str, Tensor]:
    """Return this rank's part of the tensors, by canonical name, with which the adapter does nothing. Tensors that are
    not returned keep their values.

    Raises:
        ValueError: for this kind of adapter they are not known.
    """
    found: dict[int, Tensor] = {}
    for name, module in policy.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            base = dict(module.original_module.named_parameters())
            for adapter in module.active_adapters:
                parameters = module.modules_to_save[adapter].named_parameters()
                found |= {id(parameter): local_shard(base[key]) for key, parameter in parameters}
        elif isinstance(module, TrainableTokensLayer):
            weight = module.get_base_layer().get_parameter("weight")
            for adapter in module.active_adapters:
                rows: Tensor = module.trainable_tokens_delta[adapter]
                found[id(rows)] = layout_of(rows).cut(whole(weight)[module.token_indices[adapter]])
        elif isinstance(module, BaseTunerLayer):
            fill = next((fill for kind, fill in _NEUTRAL.items() if isinstance(module, kind)), None)
            if fill is None or any(getattr(module, "use_dora", {}).values()):
                kind = "DoRA" if fill else type(module).__name__
                raise ValueError(
                    f"{name} has an adapter ({kind}), and refkl does not know the values with which it does nothing, "
                    "so an average with alpha < 1 has no start. Use alpha 1, or reference.strategy 'swap', which keeps "
                    "the adapter as it was when the reference was built."
                )
            prefixes, value = fill
            assert isinstance(module, nn.Module), "every layer of PEFT is"
            for key, parameter in module.named_parameters():
                if key.split(".")[0] in prefixes:
                    found[id(parameter)] = torch.full_like(local_shard(parameter), value)
    return {name: found[id(tensor)] for name, tensor in named_weights(policy) if id(tensor) in found}


_NEUTRAL: dict[type, tuple[tuple[str, ...], float]] = {
    LoraLayer: (("lora_B", "lora_embedding_B"), 0.0),
    VeraLayer: (("vera_lambda_b",), 0.0),
    IA3Layer: (("ia3_l",), 1.0),
}
"""Tensors of an adapted layer to fill, and the value, so that the layer computes the same as its base."""

"""Copies of a policy that are the policy's no more: frozen, with what does not train shared, and no forward that leads
back to it."""

from __future__ import annotations

import copy
import types
from typing import Any

from torch import nn

from refkl.backend import named_weights
from refkl.backend.adapters import adapter_parameters
from refkl.backend.linear_layers import linear_layers
from refkl.reference.quantized.layers import QuantizedLinear


def frozen_copy(
    policy: nn.Module, *, share: bool, on_host: bool = False, quantize: str | None = None
) -> tuple[nn.Module, set[str]]:
    """A deep copy, and the names of the parameters whose storage it shares with the policy. Ties are kept.

    With `on_host`, weights go to host memory one by one: the device never has room for more. With `quantize`, linear
    layers that are not shared are quantised, one after the other, and never copied in full.
    """
    memo: dict[int, Any] = {}
    shared: set[str] = set()
    tuned = adapter_parameters(policy)
    for name, parameter in named_weights(policy):
        if on_host:
            kept = parameter.detach().to("cpu", copy=True)
            is_parameter = isinstance(parameter, nn.Parameter)
            memo[id(parameter)] = nn.Parameter(kept, requires_grad=False) if is_parameter else kept
            continue
        if not isinstance(parameter, nn.Parameter):
            continue
        if share and not parameter.requires_grad and id(parameter) not in tuned:
            # A Parameter of our own on the same storage: the policy's own object could be unfrozen later.
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
            shared.add(name)
    if quantize is not None:
        for _, layer in linear_layers(policy):
            if id(layer.weight) not in memo:
                memo[id(layer)] = QuantizedLinear(layer, quantize, copy.deepcopy(layer.bias, memo))  # type: ignore[arg-type]
    model = copy.deepcopy(policy, memo)
    for module in model.modules():
        # TRL's fused head replaces forward by a function that calls the *policy's* own forward. The class's forward is
        # what it wraps, and what refkl scores with.
        if "forward" in vars(module) and _holder(vars(module)["forward"]) is not None:
            del module.forward
    return model, shared


def foreign_forward(policy: nn.Module) -> str | None:
    """A sentence if some module's forward was replaced in a way that a copy cannot undo."""
    for name, module in policy.named_modules():
        holder = _holder(vars(module).get("forward"))
        if holder is None:
            continue
        where = holder.__globals__["__name__"]  # functools.wraps hides it everywhere else
        if not where.startswith("trl."):
            return (
                f"the forward of {name or 'the policy'} was replaced by a function that holds on to the policy "
                f"({holder.__code__.co_name} of {where}), so a copy would run the policy's weights. Build the "
                "reference before that patch is made."
            )
    return None


def replaced_forward(policy: nn.Module) -> str | None:
    """A sentence if some module's forward is not its class's, nor one that a library put there to train it: a model
    made from the policy's configuration would lack it."""
    for name, module in policy.named_modules():
        forward = vars(module).get("forward")
        if forward is None:
            continue
        function = getattr(forward, "__func__", forward)
        where = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
        if where.split(".")[0] not in ("trl", "accelerate", "transformers", "torch", "deepspeed", "peft"):
            return (
                f"the forward of {name or 'the policy'} was replaced by one of {where}, which a model made from the "
                "policy's configuration would not have. Use reference.strategy 'swap'."
            )
    return None


def _holder(forward: Any) -> types.FunctionType | None:
    """The function, of those that `forward` is wrapped from, that closes over a module; a copy would go on using it.

    What a method is bound to is no matter: deepcopy binds it to the copy.
    """
    if isinstance(forward, types.MethodType):
        forward = forward.__func__
    if not isinstance(forward, types.FunctionType):
        inner = getattr(forward, "model_forward", None)  # accelerate's ConvertOutputsToFp32
        return None if inner is None else _holder(inner)
    for cell in forward.__closure__ or ():
        held = cell.cell_contents
        if isinstance(held, nn.Module) or isinstance(getattr(held, "__self__", None), nn.Module):
            return forward
        if callable(held) and (found := _holder(held)) is not None:
            return found
    return None

"""Frozen copies of a policy: weights that do not train are shared, and no forward leads back to the policy."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from refkl.backend import named_weights
from refkl.backend.adapters import adapter_parameters
from refkl.backend.linear_layers import linear_layers
from refkl.reference.quantized.layers import QuantizedLinear

_DEEPEST = 20
"""Number of wrappers that are followed, one inside the other."""


def frozen_copy(
    policy: nn.Module, *, share: bool, on_host: bool = False, quantize: str | None = None
) -> tuple[nn.Module, set[str]]:
    """Return a deep copy, and the names of the parameters whose storage it shares with the policy. Ties are kept.

    With `on_host`, weights are copied to host memory one by one, without extra device memory. With `quantize`, linear
    layers that are not shared are quantised one by one, and never copied in full precision.
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
            # A new Parameter on the same storage: the policy's own object could be unfrozen later.
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
            shared.add(name)
    if quantize is not None:
        for _, layer in linear_layers(policy):
            if id(layer.weight) not in memo:
                memo[id(layer)] = QuantizedLinear(layer, quantize, copy.deepcopy(layer.bias, memo))  # type: ignore[arg-type]
    model = copy.deepcopy(policy, memo)
    for module in model.modules():
        # TRL's fused head replaces forward by a function that calls the *policy's* own forward. It wraps the class's
        # forward, with which refkl scores.
        if "forward" in vars(module) and _holder(vars(module)["forward"]) is not None:
            del module.forward
    return model, shared


def foreign_forward(policy: nn.Module) -> str | None:
    """Return a sentence if a module's forward was replaced in a way that a copy cannot undo, else None."""
    for name, module in policy.named_modules():
        holder = _holder(vars(module).get("forward"))
        if holder is None:
            continue
        where = holder.__globals__["__name__"]  # functools.wraps hides it everywhere else
        if not where.startswith("trl."):
            return (
                f"the forward of {name or 'the policy'} was replaced by a function that refers to the policy "
                f"({holder.__code__.co_name} of {where}), so a copy would run the policy's weights. Build the "
                "reference before that replacement."
            )
    return None


def replaced_forward(policy: nn.Module) -> str | None:
    """Return a sentence if a module's forward is neither its class's nor one that a training library put there, else
    None. A model made from the policy's configuration would lack such a forward."""
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
    """Return the function inside the wrapped `forward` that closes over a module, or None. A copy would still use that
    module.

    The object that a method is bound to does not matter: deepcopy binds it to the copy.
    """
    if isinstance(forward, types.MethodType):
        forward = forward.__func__
    if not isinstance(forward, types.FunctionType):
        inner = getattr(forward, "model_forward", None)  # accelerate's ConvertOutputsToFp32
        return None if inner is None else _holder(inner)
    # functools.wraps leaves what it wrapped in __wrapped__, also where the call itself is to a global.
    for held in (*(cell.cell_contents for cell in forward.__closure__ or ()), getattr(forward, "__wrapped__", None)):
        if isinstance(held, nn.Module) or isinstance(getattr(held, "__self__", None), nn.Module):
            return forward
        if callable(held) and (found := _holder(held)) is not None:
            return found
    return None


def runs_another(model: nn.Module, other: nn.Module) -> str | None:
    """Return the name of a module in `model` whose own `forward` runs a module that only `other` has; None if there is
    no such module. The model itself has the name ""."""
    foreign = {id(module) for module in other.modules()} - {id(module) for module in model.modules()}
    for name, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if forward is not None and any(id(found) in foreign for found in _modules_in(forward, _DEEPEST)):
            return name
    return None


def _modules_in(value: Any, depth: int) -> Iterator[nn.Module]:
    """Yield the modules that a function is bound to or has in its closure."""
    if isinstance(value, nn.Module):
        yield value
    elif depth and callable(value):
        parts = [
            getattr(value, "__self__", None),
            getattr(value, "__func__", None),
            getattr(value, "__wrapped__", None),
        ]
        if isinstance(value, partial):
            parts += [value.func, *value.args, *value.keywords.values()]
        for cell in getattr(value, "__closure__", None) or ():
            try:
                parts.append(cell.cell_contents)
            except ValueError:  # a cell that is not filled yet
                continue
        for part in parts:
            if part is not None and part is not value:
                yield from _modules_in(part, depth - 1)

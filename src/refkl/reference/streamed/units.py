"""The units in which a model's weights are moved to the device: layers, and the modules beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from refkl.backend import named_weights

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class Unit:
    """Modules that are moved to the device together."""

    name: str
    module: nn.Module
    tensors: list[Tensor]
    """Parameters and persistent buffers."""
    layer: bool
    """True if it is an entry of a list of modules, which processes rows in chunks."""


def units_of(model: nn.Module) -> tuple[list[Unit], list[Tensor]]:
    """Return the units in the order in which the model registers them, and the weights that are in no unit, which are
    on the device for a whole sweep. Buffers that no checkpoint holds, such as rotary frequencies, are in neither."""
    weights = {id(tensor): tensor for _, tensor in named_weights(model)}
    units: dict[nn.Module, Unit] = {}
    for name, module, layer in _split(model):
        own = {id(t): t for t in (*module.parameters(), *module.buffers()) if id(t) in weights}
        if own and module not in units:
            units[module] = Unit(name, module, list(own.values()), layer)
    inside = {id(tensor) for unit in units.values() for tensor in unit.tensors}
    return list(units.values()), [tensor for key, tensor in weights.items() if key not in inside]


def _split(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield the entries of each list of modules, and the largest modules beside the lists that contain no list, such as
    an adapted head."""
    listed = isinstance(module, _CONTAINERS)
    for name, child in module.named_children():
        if isinstance(child, _CONTAINERS) or (
            not listed and any(isinstance(m, nn.ModuleList) for m in child.modules())
        ):
            yield from _split(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child, listed


def unit_bytes(model: nn.Module, *, dtype: torch.dtype | None, without: set[int]) -> tuple[list[int], int]:
    """Return the bytes of each unit in order, and of the weights in no unit. Floating-point weights count in `dtype`,
    if given; weights whose id() is in `without` do not count. Also works for a model on the meta device."""

    def size(tensors: list[Tensor]) -> int:
        kept = [t for t in tensors if id(t) not in without]
        return sum(t.numel() * (dtype if dtype and t.is_floating_point() else t.dtype).itemsize for t in kept)

    units, rest = units_of(model)
    return [size(unit.tensors) for unit in units], size(rest)


def largest_pair(sizes: list[int]) -> int:
    """Return the most bytes that two consecutive units take together."""
    return max((a + b for a, b in pairwise(sizes)), default=sum(sizes))


def unstreamable(model: nn.Module) -> str | None:
    """Return a sentence if a weight is not a plain tensor, so that it cannot be moved; else None."""
    for name, tensor in named_weights(model):
        if type(tensor) not in (nn.Parameter, Tensor):
            return (
                f"{name} is a {type(tensor).__name__}, quantised or packed, and cannot be moved as a plain tensor. "
                "Leave reference.offload out, or load the policy without quantisation."
            )
    return None

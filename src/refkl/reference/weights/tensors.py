"""What strategies do with tensors: count and pair them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from refkl.types import MemoryReport


def bytes_held(tensors: Iterable[torch.Tensor], home: torch.device) -> MemoryReport:
    """Bytes of the tensors' storages, each counted once: on the host, if they are on a CPU that is not where the model
    runs (`home`)."""
    sizes, seen = {"device": 0, "host": 0}, set()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if (key := (tensor.device, storage.data_ptr())) not in seen and storage.nbytes():
            seen.add(key)
            where = "host" if tensor.device.type == "cpu" and home.type != "cpu" else "device"
            sizes[where] += storage.nbytes()
    return MemoryReport(**sizes)


def bytes_offloaded(weights: Iterable[torch.Tensor], rest: Iterable[torch.Tensor]) -> MemoryReport:
    """Bytes of weights that wait in host memory, and of what stays on the device, also where the device is a CPU."""
    cpu = torch.device("cpu")
    return MemoryReport(host=bytes_held(weights, cpu).total, device=bytes_held(rest, cpu).total)


def check_pairs(
    found: dict[str, torch.Size], own: dict[str, torch.Size], what: str, free: Mapping[str, int] | None = None
) -> None:
    """Raise ValueError unless both hold the same names with the same shapes, but for the dimension that `free` names of
    a weight: the rank of a LoRA factor."""
    if missing := sorted(own.keys() - found.keys()):
        raise ValueError(f"{what} has no weight {missing[0]!r} ({len(missing)} missing); it is another model.")
    if extra := sorted(found.keys() - own.keys()):
        raise ValueError(f"{what} has a weight {extra[0]!r} that the reference lacks ({len(extra)} in all).")
    for name, shape in own.items():
        dim = None if free is None else free.get(name)
        if _without(found[name], dim) != _without(shape, dim):
            raise ValueError(f"{what} has {name!r} with shape {list(found[name])}; the reference has {list(shape)}.")


def _without(shape: torch.Size, dim: int | None) -> list[int]:
    return [size for place, size in enumerate(shape) if place != dim]

"""What strategies do with tensors: count, mix and pair them."""

from __future__ import annotations

from collections.abc import Iterable

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


def mix(own: torch.Tensor, theirs: torch.Tensor, alpha: float) -> None:
    """own <- (1 - alpha) own + alpha theirs, in place. At 1, and for integers, it is a copy: to the bit."""
    theirs = theirs.detach().to(device=own.device, dtype=own.dtype)
    if alpha == 1.0 or not own.is_floating_point():
        own.copy_(theirs)
    else:
        own.lerp_(theirs, alpha)


def check_pairs(found: dict[str, torch.Size], own: dict[str, torch.Size], what: str) -> None:
    """Raise ValueError unless both hold the same names with the same shapes."""
    if missing := sorted(own.keys() - found.keys()):
        raise ValueError(f"{what} has no weight {missing[0]!r} ({len(missing)} missing); it is another model.")
    if extra := sorted(found.keys() - own.keys()):
        raise ValueError(f"{what} has a weight {extra[0]!r} that the reference lacks ({len(extra)} in all).")
    for name, shape in own.items():
        if found[name] != shape:
            raise ValueError(f"{what} has {name!r} with shape {list(found[name])}; the reference has {list(shape)}.")

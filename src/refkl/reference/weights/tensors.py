"""Byte counts of the strategies' tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from refkl.types import MemoryReport


def bytes_held(tensors: Iterable[torch.Tensor], home: torch.device) -> MemoryReport:
    """Return the bytes of the tensors' storages, each counted once. A CPU tensor counts as `host` if the model runs on
    another kind of device (`home`)."""
    sizes, seen = {"device": 0, "host": 0}, set()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if (key := (tensor.device, storage.data_ptr())) not in seen and storage.nbytes():
            seen.add(key)
            where = "host" if tensor.device.type == "cpu" and home.type != "cpu" else "device"
            sizes[where] += storage.nbytes()
    return MemoryReport(**sizes)


def bytes_offloaded(weights: Iterable[torch.Tensor], rest: Iterable[torch.Tensor]) -> MemoryReport:
    """Return the bytes of weights that wait in host memory, and of tensors that stay on the device, even a CPU."""
    cpu = torch.device("cpu")
    return MemoryReport(host=bytes_held(weights, cpu).total, device=bytes_held(rest, cpu).total)

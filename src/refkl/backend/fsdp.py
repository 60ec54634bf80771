"""FSDP2: parameters that are DTensors between forwards, and whole during them."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule


def reshard(model: nn.Module) -> None:
    """Free what a forward left gathered, so that every parameter is its shard again: FSDP2 keeps the root's own."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

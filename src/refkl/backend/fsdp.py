"""FSDP2: parameters that are DTensors between forwards, and whole during them."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard


def reshard(model: nn.Module) -> None:
    """Free what a forward left gathered, so that every parameter is its shard again: FSDP2 keeps the root's own."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards some module of the model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class before FSDP2 put its own in front of it."""
    classes = (c for c in type(module).__mro__ if issubclass(c, nn.Module))
    return next(c for c in classes if not issubclass(c, FSDPModule))


def shard_like(model: nn.Module, policy: nn.Module) -> None:
    """Shard a model as a policy of the same modules is: the same units, mesh, mixed precision and offload.

    Every unit frees its parameters after its forward, the root's too: nothing follows that would use them again.
    """
    modules, seen = dict(model.named_modules()), set()
    names = {module: name for name, module in policy.named_modules()}
    for name, theirs in reversed(list(policy.named_modules())):  # what is inside first
        if not isinstance(theirs, FSDPModule):
            continue
        state = theirs._get_fsdp_state()
        if id(state) in seen:
            continue
        seen.add(id(state))
        for group in state._fsdp_param_groups:
            units = [modules[names[unit]] for unit in group.modules]
            fully_shard(
                units if len(units) > 1 else modules[name],
                mesh=group.mesh_info.mesh,
                reshard_after_forward=True,
                mp_policy=group.mp_policy,
                offload_policy=group.offload_policy,
            )

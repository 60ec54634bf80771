"""FSDP2: parameters are DTensors between forwards, and whole during them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard

from refkl.backend.modules import submodules


def reshard(model: nn.Module) -> None:
    """Free gathered parameters, so that every parameter is its shard again: FSDP2 keeps the root's after a forward."""
    for module in _sharding(model):
        module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Return True if FSDP2 shards a module of the model."""
    return bool(_sharding(model))


def _sharding(model: nn.Module) -> list[FSDPModule]:
    """Return the modules that FSDP2 shards. Without a process group there are none, so no walk over all modules."""
    if not dist.is_initialized():
        return []
    return [module for module in submodules(model) if isinstance(module, FSDPModule)]


def mixed_precision(model: nn.Module) -> list[str]:
    """Return the dtypes to which FSDP2 casts parameters for a forward; empty if it casts none."""
    dtypes = {group.mp_policy.param_dtype for group in _groups(model)}
    return sorted(str(dtype) for dtype in dtypes if dtype is not None)


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that the module had before FSDP2 replaced it."""
    return _own_class(type(module))  # type: ignore[arg-type]  # mypy compares the class with the instances' __hash__


@cache
def _own_class(cls: type[nn.Module]) -> type[nn.Module]:
    classes = (c for c in cls.__mro__ if issubclass(c, nn.Module))
    return next(c for c in classes if not issubclass(c, FSDPModule))


def shard_like(model: nn.Module, policy: nn.Module, *, offload: bool = False) -> None:
    """Shard a model like a policy with the same modules: the same units, mesh, mixed precision and offload.

    With `offload` the shards stay in host memory between forwards, wherever the policy's are. Every unit, including the
    root, frees its parameters after its forward, since nothing uses them again.
    """
    modules, seen = dict(model.named_modules()), set()
    names = {module: name for name, module in policy.named_modules()}
    for name, theirs in reversed(list(policy.named_modules())):  # inner modules first
        if not isinstance(theirs, FSDPModule):
            continue
        state = theirs._get_fsdp_state()
        if id(state) in seen:
            continue
        seen.add(id(state))
        groups = state._fsdp_param_groups
        if len(groups) > 1:
            raise ValueError(
                f"{name or 'The policy'} is sharded over several meshes at once. Use reference.strategy 'swap', which "
                "follows any sharding."
            )
        # A root without parameters outside its inner units has no group of its own, but must be sharded too.
        like = groups[0] if groups else next(iter(_groups(policy)))
        units = [modules[names[unit]] for unit in groups[0].modules] if groups else [modules[name]]
        fully_shard(
            units if len(units) > 1 else units[0],
            mesh=like.mesh_info.mesh,
            reshard_after_forward=True,
            mp_policy=like.mp_policy,
            offload_policy=_offloading(like.mesh_info.mesh) if offload else like.offload_policy,
        )


def _offloading(mesh: DeviceMesh) -> CPUOffloadPolicy:
    return CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")


def _groups(model: nn.Module) -> Iterator[Any]:
    """Yield FSDP2's groups of parameters that are sharded and gathered together."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield from module._get_fsdp_state()._fsdp_param_groups

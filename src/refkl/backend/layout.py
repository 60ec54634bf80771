"""Layouts of a weight over the ranks: whole on each, a ZeRO-3 partition, or a shard of a DTensor (FSDP2).

A layout splits a whole weight, joins its parts again, and knows which elements of the whole this rank holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from refkl.backend.modules import named_weights, parameters_in, submodules
from refkl.backend.zero import full_shape, gathered, is_partitioned, local_shard


class Run(NamedTuple):
    """Elements that are contiguous both in the local part and in the whole."""

    local: int
    """Index of the first element in the flattened local part."""
    whole: int
    """Index of the first element in the flattened whole."""
    length: int


class Block(NamedTuple):
    """A rectangular part of a tensor, as described in a file of parts."""

    whole: tuple[int, ...]
    """Shape of the whole: the weight's shape, or [elements] if ranks hold parts of the flattened weight."""
    start: tuple[int, ...]
    shape: tuple[int, ...]

    def runs(self) -> Iterator[Run]:
        """Yield the contiguous runs of its elements in the whole."""
        if not prod(self.shape):
            return
        # From the last split dimension on, elements are contiguous.
        split = max((dim for dim, n in enumerate(self.shape) if n != self.whole[dim]), default=0)
        length = prod(self.shape[split:])
        strides = [prod(self.whole[dim + 1 :]) for dim in range(len(self.shape))]
        for number in range(prod(self.shape[:split])):
            rest, whole = number, 0
            for dim in reversed(range(split)):
                rest, index = divmod(rest, self.shape[dim])
                whole += (self.start[dim] + index) * strides[dim]
            first = self.start[split] * strides[split] if self.shape else 0
            yield Run(number * length, whole + first, length)


def holds_shards(model: nn.Module) -> bool:
    """Return True if ranks hold parts of the model's weights, so that every rank must run a forward together."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    modules = submodules(model)
    wrapped = any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in modules)
    return wrapped or any(map(is_partitioned, parameters_in(modules)))


@dataclass(frozen=True)
class Layout(ABC):
    """The part of a weight that this rank holds."""

    shape: torch.Size
    """Shape of the whole weight."""

    sharded = True
    """True if no rank holds the whole weight."""
    counted = True
    """True if this rank's part should be counted, so that each element is counted once over all ranks."""

    @abstractmethod
    def cut(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a whole weight, as a view or a copy. Every rank has the whole weight."""

    @abstractmethod
    def join(self, local: Tensor) -> Tensor:
        """Return the whole weight on every rank, from the parts; collective if sharded."""

    @abstractmethod
    def block(self) -> Block:
        """Return the block of this rank's part, without padding, for a file of parts."""

    def part(self, local: Tensor) -> Tensor:
        """Return this rank's part in the shape of its block."""
        return local

    def runs(self) -> Iterator[Run]:
        """Yield the contiguous runs of this rank's part in the whole; padding is in none."""
        return self.block().runs()

    def empty(self, dtype: torch.dtype) -> Tensor:
        """Return zeros for this rank's part."""
        return torch.zeros(self.block().shape, dtype=dtype)


class Whole(Layout):
    """A weight that every rank holds entirely."""

    sharded = False

    def cut(self, whole: Tensor) -> Tensor:
        return whole

    def join(self, local: Tensor) -> Tensor:
        return local

    def block(self) -> Block:
        return Block(tuple(self.shape), (0,) * len(self.shape), tuple(self.shape))


@dataclass(frozen=True)
class Partition(Layout):
    """ZeRO-3: each rank holds an equal part of the flattened weight; the last parts may include padding."""

    size: int
    """Number of elements of a rank's part."""
    group: dist.ProcessGroup

    def cut(self, whole: Tensor) -> Tensor:
        part = whole.new_zeros(self.size)
        for run in self.runs():
            part[: run.length] = whole.reshape(-1)[run.whole : run.whole + run.length]
        return part

    def join(self, local: Tensor) -> Tensor:
        local = local.to(communicating_device(self.group)).contiguous()
        flat = local.new_empty(self.size * self.group.size())
        dist.all_gather_into_tensor(flat, local, group=self.group)
        return flat[: prod(self.shape)].view(self.shape)

    def block(self) -> Block:
        total = prod(self.shape)
        start = min(self.group.rank() * self.size, total)
        return Block((total,), (start,), (min(self.size, total - start),))

    def part(self, local: Tensor) -> Tensor:
        return local[: self.block().shape[0]]

    def empty(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.size, dtype=dtype)


@dataclass(frozen=True)
class Sharded(Layout):
    """A DTensor, sharded over some dimensions of its mesh and replicated over others."""

    like: DTensor
    """A DTensor of the same shape, mesh and placements; its values do not matter."""

    @property
    def counted(self) -> bool:  # type: ignore[override]
        at = self.like.device_mesh.get_coordinate()
        return at is not None and all(
            at[i] == 0 for i, placement in enumerate(self.like.placements) if isinstance(placement, Replicate)
        )

    def cut(self, whole: Tensor) -> Tensor:
        _, start, shape = self.block()
        for dim, (length, first) in enumerate(zip(shape, start, strict=True)):
            whole = whole.narrow(dim, first if length else 0, length)
        return whole

    def join(self, local: Tensor) -> Tensor:
        mesh = self.like.device_mesh
        part = DTensor.from_local(
            local.to(mesh.device_type),
            mesh,
            self.like.placements,
            run_check=False,
            shape=self.shape,
            stride=self.like.stride(),
        )
        return part.full_tensor()

    def block(self) -> Block:
        for placement in self.like.placements:
            if not (isinstance(placement, Replicate) or type(placement) is Shard):
                raise ValueError(
                    f"A weight of shape {list(self.shape)} is placed as {placement} on its device mesh. refkl supports "
                    "plain shards and replicas only: use FSDP2 without tensor parallelism on the same dimension."
                )
        shape, start = compute_local_shape_and_global_offset(self.shape, self.like.device_mesh, self.like.placements)
        return Block(tuple(self.shape), tuple(start), tuple(shape))


def layout_of(tensor: Tensor) -> Layout:
    """Return the present layout of a parameter or buffer."""
    if is_partitioned(tensor):
        return Partition(full_shape(tensor), tensor.ds_tensor.ds_numel, tensor.ds_process_group)  # type: ignore[attr-defined]
    if isinstance(tensor, DTensor):
        return Sharded(tensor.shape, tensor.detach())  # type: ignore[arg-type] # still a DTensor when detached
    return Whole(tensor.shape)


def whole(tensor: Tensor) -> Tensor:
    """Return the whole parameter or buffer, on every rank; collective if it is sharded."""
    if is_partitioned(tensor) and not local_shard(tensor).numel():  # on NVMe
        with gathered([tensor]):
            return tensor.detach().clone()
    return layout_of(tensor).join(local_shard(tensor).detach())


class Weight(NamedTuple):
    """A weight of the reference, as far as this rank holds it."""

    name: str
    """The canonical name."""
    local: Tensor
    """This rank's part, to read and to write in place."""
    layout: Layout


def weights_of(model: nn.Module, *, without: Collection[int] = ()) -> Iterator[Weight]:
    """Yield parameters and persistent buffers, except those whose id() is in `without`; tied ones once."""
    for name, tensor in named_weights(model):
        if id(tensor) in without:
            continue
        local = local_shard(tensor).detach()
        if is_partitioned(tensor) and not local.numel():  # on NVMe, where it cannot be read in place
            with gathered([tensor]):
                yield Weight(name, tensor.detach(), Whole(tensor.shape))
        else:
            yield Weight(name, local, layout_of(tensor))


def communicating_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Return the device on which a tensor must be so that the ranks of a group can exchange it."""
    on_accelerator = "gloo" not in dist.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if on_accelerator else torch.device("cpu")

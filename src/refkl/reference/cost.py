"""The cost of a reference, computed from the tensors of a policy and the way a backend shards them.

A policy in memory, a policy that is sharded already and one that is only planned (on torch's meta device) have the same
shape, and therefore the same costs. For sharded tensors, bytes are those of the rank that holds the most, so that all
ranks compute the same numbers and make the same choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from refkl.backend import Backend, base_model, full_shape, is_partitioned, unwrap
from refkl.backend.adapters import adapter_buffers, adapter_parameters
from refkl.backend.linear_layers import linear_layers, matrix_shape

Spread = Literal["whole", "flat", "rows"]
"""The part of a parameter that each rank holds: all of it, an equal share of its flattened elements (ZeRO), or of its
rows (FSDP2)."""

SPREADS: dict[str, Spread] = {"zero3": "flat", "fsdp1": "flat", "fsdp2": "rows"}
"""The way a backend shards parameters; a backend that is not listed leaves them whole."""

BATCH_BYTES = 21
"""Bytes per token, from device to host and back: int64 id and mask, a bool that is True if it is scored, fp32 score."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost that a reference adds on one rank, beyond the policy and its training state."""

    device: int = 0
    """Bytes held on the device."""
    host: int = 0
    """Bytes held in host memory."""
    scoring: int = 0
    """Bytes on the device that a score takes in addition to `device` and to the policy's own forward."""
    flops: int = 0
    """Extra floating-point operations of one step, on the device; 0 if the step is not known."""
    host_flops: int = 0
    """Extra floating-point operations of one step, on the host's processors; 0 if the step is not known."""
    moved: int = 0
    """Bytes moved in one step between this rank's device and other ranks or the host; 0 if the step is not known."""

    @property
    def total(self) -> int:
        """Bytes held on device and host together."""
        return self.device + self.host


@dataclass(frozen=True)
class Step:
    """The tokens that the reference scores on one rank per step, in one forward, and the size of the model."""

    sequences: int = 0
    length: int = 0
    """Tokens per sequence."""
    layers: int = 0
    hidden: int = 0
    """Width of the hidden states."""

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return self.sequences * self.length


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of the policy. Tied tensors are one entry."""

    shape: torch.Size
    """The shape of the whole tensor, however it is sharded."""
    dtype: torch.dtype
    buffer: bool = False
    persistent: bool = True
    """True if a checkpoint holds it."""
    trained: bool = False
    tuned: bool = False
    """True if it is a parameter of an adapter, trained or not."""
    constant: bool = False
    """True if it is a buffer of an adapter, which nothing changes."""
    base: bool = True
    """True if the model inside PEFT also has it."""
    lookup: bool = False
    """True if a forward only reads rows of it: an embedding that is not also the output head."""
    ways: int | None = None
    """Number of ranks over which it is sharded already; None if it is not."""
    linear: torch.Size | None = None
    """[out, in] of a linear layer that `quantize` packs; None for all other tensors."""

    @property
    def size(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize

    def elements(self, spread: Spread, processes: int) -> int:
        """Return the number of elements on the rank that holds the most."""
        ways = self.ways or processes
        if self.buffer or spread == "whole" or not self.shape:
            return prod(self.shape)
        if spread == "flat":
            return -(-prod(self.shape) // ways)
        return -(-self.shape[0] // ways) * prod(self.shape[1:])


@dataclass(frozen=True)
class Shape:
    """The numbers of a run from which a strategy computes its cost."""

    backend: Backend
    entries: tuple[Entry, ...]
    """Parameters, then buffers."""
    step: Step
    on_host: bool
    """True if the policy itself runs on the host's processors, so that host memory is its device."""
    memory: int | None = None
    """Bytes of the device, if they are known."""

    @property
    def parameters(self) -> list[Entry]:
        """All tensors except buffers."""
        return [e for e in self.entries if not e.buffer]

    @property
    def spread(self) -> Spread:
        """The way the backend shards the policy's parameters."""
        return SPREADS.get(self.backend.name, "whole")

    def elements(self, entries: Iterable[Entry], spread: Spread | None = None) -> int:
        """Return the number of elements on the rank that holds the most of each; `spread` is the policy's own if
        None."""
        return sum(e.elements(spread or self.spread, self.backend.processes) for e in entries)

    def held(self, entries: Iterable[Entry], spread: Spread | None = None, dtype: torch.dtype | None = None) -> int:
        """Return the bytes on the rank that holds the most of each; floating-point ones in `dtype`, if given."""
        return sum(
            self.elements([e], spread) * (dtype if dtype and e.dtype.is_floating_point else e.dtype).itemsize
            for e in entries
        )

    def gathered(self, spread: Spread | None = None) -> int:
        """Return the bytes that a forward of the model receives from other ranks: those that this rank lacks."""
        if not self.step.tokens:
            return 0
        return self.held(self.parameters, "whole") - self.held(self.parameters, spread)

    def offloaded(self, entries: Iterable[Entry], spread: Spread) -> Cost:
        """Return the cost of a sharded model whose shards wait in host memory. The policy's forward gathers as much, so
        a score takes only the largest shard in addition."""
        entries = list(entries)
        weights = [e for e in entries if not e.buffer]
        sizes = [self.held([e], spread) for e in weights]
        return Cost(
            device=self.held(e for e in entries if e.buffer),
            host=sum(sizes),
            scoring=max(sizes),
            flops=self.forward(),
            moved=self.gathered(spread) + (sum(sizes) if self.step.tokens else 0),
        )

    def forward(self, entries: Iterable[Entry] | None = None) -> int:
        """Return the floating-point operations of a step's forward pass through these parameters (all, if None).

        Each token counts 2 for each weight that multiplies, and 2·layers·length·hidden for causal attention (Kaplan et
        al. 2020, arXiv:2001.08361, section 2.1). All experts of a mixture are counted.
        """
        step = self.step
        weights = sum(
            prod(e.shape)
            for e in (self.parameters if entries is None else entries)
            if not e.buffer and not e.lookup and len(e.shape) >= 2
        )
        return 2 * step.tokens * (weights + step.layers * step.length * step.hidden)


def shape_of(policy: nn.Module, backend: Backend, step: Step, *, on_host: bool, memory: int | None = None) -> Shape:
    """Return the shape of a policy that is whole, sharded, or without memory on the meta device."""
    inner = unwrap(policy)
    tuned, constant = adapter_parameters(inner), adapter_buffers(inner)
    inside = base_model(policy)
    base = {id(t) for t in (*inside.parameters(), *inside.buffers())} - tuned - constant
    lookups = _lookups(inner)
    linear = {id(layer.weight): matrix_shape(layer) for _, layer in linear_layers(policy)}
    persistent = inner.state_dict(keep_vars=True)
    named = {id(t): (name, t) for name, t in (*inner.named_parameters(), *inner.named_buffers())}
    return Shape(
        backend,
        tuple(
            Entry(
                shape=full_shape(tensor),
                dtype=tensor.dtype,
                buffer=not isinstance(tensor, nn.Parameter),
                persistent=name in persistent,
                trained=tensor.requires_grad,
                tuned=key in tuned,
                constant=key in constant,
                base=key in base,
                lookup=key in lookups,
                ways=_ways(tensor),
                linear=linear.get(key),
            )
            for key, (name, tensor) in named.items()
        ),
        step,
        on_host,
        memory,
    )


def _ways(tensor: Tensor) -> int | None:
    if is_partitioned(tensor):
        return int(tensor.ds_process_group.size())  # type: ignore[attr-defined]
    if isinstance(tensor, DTensor):
        pairs = enumerate(tensor.placements)
        return prod(tensor.device_mesh.size(i) for i, placement in pairs if isinstance(placement, Shard))
    return None


def _lookups(policy: nn.Module) -> set[int]:
    """Return ids of the weights of embeddings that are not tied to a head."""
    rows = {id(m.weight) for m in policy.modules() if isinstance(m, nn.Embedding)}
    return rows - {id(m.weight) for m in policy.modules() if isinstance(m, nn.Linear)}

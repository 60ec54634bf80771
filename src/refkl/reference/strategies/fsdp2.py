"""`fsdp2`: a separate frozen model, sharded layer by layer like the policy, so that each rank holds 1/world of it.

FSDP2 refuses a deep copy. If the policy is sharded already, the reference is made from the policy's configuration
without memory, sharded like the policy, and filled from this rank's shards: nothing is gathered or sent. Otherwise it
is a plain copy, which is sharded at the first score after the policy was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn

from refkl.backend import (
    is_sharded,
    local_shard,
    named_weights,
    outside_inference_mode,
    own_class,
    reshard,
    shard_like,
    unwrap,
)
from refkl.messages import size
from refkl.reference.cost import Cost
from refkl.reference.request import BuildRequest, held_in_place
from refkl.reference.strategies.frozen_copy import foreign_forward, frozen_copy, replaced_forward
from refkl.reference.strategies.whole_copy import WholeCopy
from refkl.reference.weights.pairing import Pair, check_pairs
from refkl.reference.weights.tensors import bytes_held, bytes_offloaded
from refkl.types import MemoryReport


class FSDP2Reference(WholeCopy):
    """A copy of the policy, sharded by FSDP2."""

    strategy = "fsdp2"

    @classmethod
    def supports(cls, request: BuildRequest) -> str | None:
        policy, config = unwrap(request.policy), request.config
        if request.backend.name != "fsdp2":
            return f"it is sharded by FSDP2, and this is {request.backend}."
        if (why_not := held_in_place(request)) is not None:
            return why_not
        if config.source != "policy":
            return f"it is filled from the policy, but reference.source asks for {config.source!r}."
        if config.dtype is not None or config.device is not None:
            return "FSDP2 holds its shards in the policy's dtype: reference.dtype and .device cannot be set."
        if config.quantize is not None:
            return (
                "FSDP2 shards weights in the policy's dtype: reference.quantize cannot be set. Leave it out, or run "
                "under DDP or ZeRO-2 with 'clone'."
            )
        if isinstance(policy, PeftModel):
            return "the policy's base does not train, so a copy of it would waste memory."
        if not request.planned and any(p.is_meta for p in policy.parameters()):
            return (
                "the policy has no weights yet on this rank (fsdp_cpu_ram_efficient_loading). Build the reference "
                "after accelerator.prepare."
            )
        return replaced_forward(policy) if is_sharded(policy) else foreign_forward(policy)

    @classmethod
    def auto(cls, request: BuildRequest) -> bool:
        return True

    @classmethod
    def cost(cls, request: BuildRequest) -> Cost:
        shape = request.shape
        if request.config.offload:
            return shape.offloaded(shape.entries, "rows")
        return Cost(device=shape.held(shape.entries), flops=shape.forward(), moved=shape.gathered())

    @classmethod
    def why(cls, request: BuildRequest) -> str:
        where = " in host memory" if request.config.offload else ""
        return (
            f"it is sharded like the policy, so that each rank holds 1/{request.backend.processes} of it{where}, "
            f"{size(cls.cost(request).total)} ({request.backend})"
        )

    @classmethod
    def build(cls, request: BuildRequest, reason: str) -> FSDP2Reference:
        policy = unwrap(request.policy)
        if is_sharded(policy):
            reshard(policy)
            model = _sharded_twin(policy, offload=request.config.offload)
        else:
            model, _ = frozen_copy(policy, share=False)
        reference = cls(request, reason, "the policy as it stood when the reference was built", model)
        reference.fingerprint()
        return reference

    @outside_inference_mode()
    def follow_policy(self) -> None:
        """Shard the reference like the policy once the policy has been sharded."""
        policy = self._policy()
        if self.weights_freed or policy is None or is_sharded(self.model) or not is_sharded(policy):
            return
        reshard(policy)
        first = next(policy.parameters())
        offloaded = first.device.type == "cpu" and self._accelerator is not None
        device = self._accelerator.device if offloaded and self._accelerator is not None else first.device
        # With offload, it goes through the device unit by unit, while each unit is sharded.
        self.model.to(device=None if self.config.offload else device, dtype=first.dtype)
        before = self.digests
        shard_like(self.model, policy, offload=self.config.offload)
        self.model.requires_grad_(False)
        if next(iter(before.values())).split()[0] != str(first.dtype):
            self.fingerprint()  # the same numbers in another dtype: an allowed change, so record it again

    @contextmanager
    def activate(self) -> Iterator[nn.Module]:
        self._evaluate()
        try:
            yield self.model
        finally:
            reshard(self.model)

    def before_writing(self) -> None:
        reshard(self.model)

    def pairs(self, policy: nn.Module) -> list[Pair]:
        reshard(unwrap(policy))
        return super().pairs(policy)

    def memory_of_weights(self) -> MemoryReport:
        """Return the bytes of this rank's shards."""
        if self.config.offload:
            return bytes_offloaded(map(local_shard, self.model.parameters()), self.model.buffers())
        tensors = (*self.model.parameters(), *self.model.buffers())
        return bytes_held((local_shard(t) for t in tensors), self.home())


def _sharded_twin(policy: nn.Module, *, offload: bool) -> nn.Module:
    """Return a model of the policy's class and configuration, sharded like the policy and filled from its shards on
    this rank."""
    with torch.device("meta"):
        model = own_class(policy)(copy.deepcopy(policy.config))
    theirs = dict(named_weights(policy))
    own_shapes = {name: tensor.shape for name, tensor in named_weights(model)}
    try:
        check_pairs({name: t.shape for name, t in theirs.items()}, own_shapes, "the policy")
    except ValueError as error:
        raise ValueError(
            f"The policy differs from a model made from its configuration: {error} Build the reference before the "
            "policy is sharded, or use reference.strategy 'swap'."
        ) from None
    for name, tensor in named_weights(model):
        tensor.data = tensor.data.to(theirs[name].dtype)
    shard_like(model, policy, offload=offload)
    model.to_empty(device="cpu" if offload else local_shard(next(policy.parameters())).device)
    buffers = dict(policy.named_buffers())
    with torch.no_grad():
        for name, tensor in named_weights(model):
            local_shard(tensor).copy_(local_shard(theirs[name]))
        for name, buffer in model.named_buffers():  # also rotary frequencies, which no checkpoint holds
            buffer.data = buffers[name].detach().clone()
    return model

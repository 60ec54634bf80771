"""`zero3`: a separate model whose parameters DeepSpeed ZeRO-3 partitions, so that each rank holds 1/world of it.

A deep copy of a partitioned policy would be a model of placeholders. This model is made from the policy's configuration
and filled from this rank's parts of the policy, or from weights on disk: nothing is gathered.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from refkl.backend import base_model, gathered, layout_of, local_shard, named_weights, unwrap, whole
from refkl.backend.zero import (
    full_shape,
    inference_config,
    inference_engine,
    is_partitioned,
    partitioned,
    release,
    run_config,
    transformers_zero3,
)
from refkl.messages import size
from refkl.reference.cost import Cost
from refkl.reference.request import BuildRequest, held_in_place
from refkl.reference.strategies.from_folder import load_pretrained, source_folder
from refkl.reference.strategies.frozen_copy import replaced_forward
from refkl.reference.strategies.whole_copy import WholeCopy
from refkl.reference.weights.pairing import Pair, check_pairs
from refkl.reference.weights.tensors import bytes_held, bytes_offloaded
from refkl.types import MemoryReport


class Zero3Reference(WholeCopy):
    """A separate partitioned model in an inference engine."""

    strategy = "zero3"

    def __init__(self, request: BuildRequest, reason: str, engine: nn.Module, source: str) -> None:
        super().__init__(request, reason, source, unwrap(engine))
        self._engine = engine

    @classmethod
    def supports(cls, request: BuildRequest) -> str | None:
        if not request.backend.name.startswith("zero"):
            return f"it partitions under DeepSpeed ZeRO-3, and this is {request.backend}."
        if not request.planned and run_config(request.policy, request.accelerator) is None:
            return "the policy is partitioned, but there is no accelerator or engine with a DeepSpeed configuration."
        if request.config.device is not None or request.config.dtype is not None:
            return "DeepSpeed holds its partitions in the run's dtype: reference.device and .dtype cannot be set."
        if request.config.quantize is not None:
            return (
                "DeepSpeed partitions weights in the run's dtype: reference.quantize cannot be set. Leave it out, or "
                "run under ZeRO-2 with 'clone'."
            )
        if (why_not := held_in_place(request)) is not None:
            return why_not
        if request.config.source == "policy" and base_model(request.policy) is not unwrap(request.policy):
            return (
                "the policy has a PEFT adapter, whose base does not train, so a copy of it would waste memory. Set "
                "reference.source to 'base' to compare with the base without the adapter."
            )
        if request.config.source == "policy":
            return replaced_forward(unwrap(request.policy))
        try:
            source_folder(request)
        except ValueError as error:
            return str(error)
        return None

    @classmethod
    def auto(cls, request: BuildRequest) -> bool:
        """Return True under ZeRO-3 only: a policy that is whole on each rank (ZeRO-1, ZeRO-2) has room for a copy that
        needs no gathering."""
        return request.backend.name == "zero3"

    @classmethod
    def cost(cls, request: BuildRequest) -> Cost:
        shape = request.shape
        base = [e for e in shape.entries if e.base]
        if request.config.offload:
            return shape.offloaded(base, "flat")
        held = shape.held(base, "flat")
        return Cost(device=held, flops=shape.forward(), moved=shape.gathered("flat"))

    @classmethod
    def why(cls, request: BuildRequest) -> str:
        where = " in host memory" if request.config.offload else ""
        return (
            f"it is partitioned, so that each rank holds 1/{request.backend.processes} of it{where}, "
            f"{size(cls.cost(request).total)} ({request.backend})"
        )

    @classmethod
    def build(cls, request: BuildRequest, reason: str) -> Zero3Reference:
        training = run_config(request.policy, request.accelerator)
        assert training is not None, "supports() lets no other backend in"
        config = inference_config(training, offload=request.config.offload)
        if request.config.source == "policy":
            source = "the policy as it stood when the reference was built"
            model = _from_memory(unwrap(request.policy), config)
        else:
            source = source_folder(request)
            with transformers_zero3(config):
                model = load_pretrained(request, source, dtype=None)
        model.requires_grad_(False)  # before DeepSpeed looks at it
        for parameter in model.parameters():
            parameter.ds_persist = False  # type: ignore[attr-defined]
        reference = cls(request, reason, inference_engine(model, config), source)
        reference.fingerprint()
        return reference

    @contextmanager
    def activate(self) -> Iterator[nn.Module]:
        self._evaluate()
        yield self._engine

    def before_writing(self) -> None:
        # Parameters that a forward left gathered would hide the new shards from the next forward.
        release(self.model.parameters())

    def drop_weights(self) -> bool:
        self._engine = nn.Module()
        return super().drop_weights()

    def pairs(self, policy: nn.Module) -> list[Pair]:
        """Return the pairs, for a policy that is partitioned alike or whole."""
        inner = unwrap(policy)
        for name, tensor in (*named_weights(self.model), *named_weights(inner)):
            if is_partitioned(tensor) and not local_shard(tensor).numel():
                raise ValueError(f"{name} is offloaded to NVMe and cannot be synced. Offload it to CPU memory instead.")
        return super().pairs(policy)

    def memory_of_weights(self) -> MemoryReport:
        """Return the bytes of this rank's partitions, and of parameters that a forward left gathered."""
        if self.config.offload:
            gathered = (t.data for t in self.model.parameters() if is_partitioned(t))
            return bytes_offloaded(map(local_shard, self.model.parameters()), (*self.model.buffers(), *gathered))
        parts = [
            part
            for tensor in (*self.model.parameters(), *self.model.buffers())
            for part in ((local_shard(tensor), tensor.data) if is_partitioned(tensor) else (tensor,))
        ]
        return bytes_held(parts, self.home())


def _from_memory(policy: nn.Module, config: dict[str, Any]) -> nn.Module:
    """Return a partitioned model of the policy's class and configuration, filled from the policy's parts on this
    rank."""
    model = partitioned(type(policy), copy.deepcopy(policy.config), next(policy.parameters()).dtype, config)
    theirs = dict(named_weights(policy))
    own_shapes = {name: full_shape(tensor) for name, tensor in named_weights(model)}
    try:
        check_pairs({name: full_shape(t) for name, t in theirs.items()}, own_shapes, "the policy")
    except ValueError as error:
        raise ValueError(
            f"The policy differs from a model made from its configuration: {error} Use reference.strategy 'swap', or "
            "set reference.source to the folder of the model to compare with."
        ) from None
    buffers = dict(policy.named_buffers())
    with torch.no_grad():
        for name, own in named_weights(model):
            _fill(own, theirs[name])
        for name, buffer in model.named_buffers():  # also rotary frequencies, which no checkpoint holds
            buffer.data = buffers[name].detach().clone()
    return model


def _fill(own: Tensor, theirs: Tensor) -> None:
    """Fill this rank's part of a weight from the policy's part, or from the whole if it is not partitioned alike."""
    part = local_shard(own)
    if is_partitioned(own) and not part.numel():  # on NVMe
        numbers = whole(theirs)
        with gathered([own], write=True):
            own.data.copy_(numbers)
        return
    alike = is_partitioned(theirs) == is_partitioned(own) and local_shard(theirs).shape == part.shape
    part.copy_(local_shard(theirs) if alike else layout_of(own).cut(whole(theirs)))

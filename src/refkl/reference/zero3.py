"""`zero3`: under DeepSpeed ZeRO-3, reloaded from pretrained weights into partitioned parameters.

Each rank holds 1/world of it. A deep copy of a partitioned policy would be a model of placeholders.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from refkl.backend import Weight, local_shard, named_weights, unwrap, weights_of
from refkl.backend.zero import (
    active_zero3_config,
    full_shape,
    inference_config,
    inference_engine,
    is_partitioned,
    release,
    transformers_zero3,
)
from refkl.messages import size
from refkl.reference.base import BuildRequest, Reference, check_pairs
from refkl.reference.pretrained import load_pretrained, source_folder
from refkl.scoring.forward import base_model
from refkl.types import MemoryReport


class Zero3Reference(Reference):
    """A partitioned model of its own in an inference engine."""

    strategy = "zero3"

    def __init__(self, request: BuildRequest, reason: str, engine: nn.Module, source: str) -> None:
        super().__init__(request, reason, source)
        self._engine = engine
        self.model = unwrap(engine)
        """The partitioned module, with the policy's parameter names."""

    @classmethod
    def supports(cls, request: BuildRequest) -> str | None:
        if request.backend.name != "zero3":
            return f"it partitions under DeepSpeed ZeRO-3, and this is {request.backend}."
        if active_zero3_config(request.accelerator) is None:
            return "the policy is partitioned, but there is no accelerator with a ZeRO-3 configuration to follow."
        if request.config.device is not None or request.config.dtype is not None:
            return "DeepSpeed places its partitions in the run's dtype: reference.device and .dtype cannot be set."
        if request.config.source == "policy" and base_model(request.policy) is not unwrap(request.policy):
            return (
                "the policy has a PEFT adapter that is not provably off, which weights from disk do not have. Set "
                "reference.source to 'pretrained' to compare with the base without it."
            )
        try:
            source_folder(request)
        except ValueError as error:
            return str(error)
        return None

    @classmethod
    def cost(cls, request: BuildRequest) -> int:
        parameters = list(base_model(request.policy).parameters())
        total = sum(full_shape(p).numel() * p.element_size() for p in parameters)
        return total // request.backend.processes

    @classmethod
    def why(cls, request: BuildRequest) -> str:
        return (
            f"it is reloaded in parts, so that each rank holds 1/{request.backend.processes} of it, "
            f"{size(cls.cost(request))} ({request.backend})"
        )

    @classmethod
    def build(cls, request: BuildRequest, reason: str) -> Zero3Reference:
        training = active_zero3_config(request.accelerator)
        assert training is not None, "supports() lets no other backend in"
        config = inference_config(training)
        folder = source_folder(request)
        with transformers_zero3(config):
            model = load_pretrained(request, folder, dtype=None)
        if request.config.source == "policy":
            _check_unchanged(unwrap(request.policy), model, folder)
        model.requires_grad_(False)
        model.eval()
        for parameter in model.parameters():
            parameter.ds_persist = False  # type: ignore[attr-defined]
        reference = cls(request, reason, inference_engine(model, config), folder)
        reference.fingerprint()
        return reference

    @contextmanager
    def _active(self) -> Iterator[nn.Module]:
        for module in self.model.modules():
            module.training = False
        yield self._engine

    def _weights(self) -> Iterator[Weight]:
        return weights_of(self.model)

    def _before_writing(self) -> None:
        # What a forward left gathered would hide the new shards from the next one.
        release(self.model.parameters())

    def check_movable(self, policy: nn.Module) -> None:
        self._pairs(policy)

    def _pairs(self, policy: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Own and policy's weights, of which each rank holds matching parts."""
        own, theirs = dict(named_weights(self.model)), dict(named_weights(unwrap(policy)))
        own_shapes, their_shapes = ({name: full_shape(t) for name, t in w.items()} for w in (own, theirs))
        check_pairs(their_shapes, own_shapes, "the policy")
        for name, tensor in own.items():
            if is_partitioned(tensor) != is_partitioned(theirs[name]):
                raise ValueError(f"{name} is partitioned in one of policy and reference, not in both.")
            mine, other = local_shard(tensor), local_shard(theirs[name])
            if mine.shape != other.shape or not other.numel():
                raise ValueError(
                    f"This rank's part of {name} is {list(other.shape)} in the policy and {list(mine.shape)} in the "
                    "reference. Parameters offloaded to NVMe cannot be synced."
                )
        return [(tensor, theirs[name]) for name, tensor in own.items()]

    def _move(self, policy: nn.Module, alpha: float) -> None:
        """Shard by shard on each rank: policy and reference are partitioned alike, so nothing is gathered or sent."""
        pairs = self._pairs(policy)
        self._before_writing()
        for own, theirs in pairs:
            shard, target = local_shard(own), local_shard(theirs)
            target = target.to(device=shard.device, dtype=shard.dtype)
            if alpha == 1.0 or not shard.is_floating_point():
                shard.copy_(target)
            else:
                shard.lerp_(target, alpha)

    def memory(self) -> MemoryReport:
        """Bytes of this rank's partitions, and of anything that a forward left gathered."""
        sizes = {"cpu": 0, "device": 0}
        accelerated = self._accelerator is not None and self._accelerator.device.type != "cpu"
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            for part in (local_shard(tensor), tensor.data) if is_partitioned(tensor) else (tensor,):
                where = "cpu" if accelerated and part.device.type == "cpu" else "device"
                sizes[where] += part.numel() * part.element_size()
        return MemoryReport(device=sizes["device"], host=sizes["cpu"])


def _check_unchanged(policy: nn.Module, fresh: nn.Module, folder: str) -> None:
    """Raise ValueError if the policy in memory is not what `folder` holds: its reload would be another reference."""
    theirs, fresh_weights = dict(named_weights(policy)), dict(named_weights(fresh))
    if extra := sorted(theirs.keys() - fresh_weights.keys()):
        raise ValueError(
            f"{extra[0]} is in the policy and not in {folder}: the policy is another model. Save the policy and set "
            "reference.source to that folder."
        )
    for name, own in fresh_weights.items():
        if name not in theirs or full_shape(theirs[name]) != full_shape(own):
            difference = "is missing" if name not in theirs else f"has shape {list(full_shape(theirs[name]))}"
            raise ValueError(
                f"{name} {difference} in the policy, and in {folder} it has shape {list(full_shape(own))}: the "
                "policy is another model. Set reference.source to the folder of the model to compare with."
            )
        if not _equal(theirs[name], own):
            raise ValueError(
                f"{name} was changed after the policy was loaded from {folder}, so weights from there are not the "
                "policy's. Save the policy and set reference.source to that folder, or set reference.source to "
                "'pretrained' if the weights on disk are the reference that you want."
            )


def _equal(theirs: Tensor, own: Tensor) -> bool:
    """Whether the two hold the same numbers on every rank, compared in the coarser of their dtypes."""
    coarse = (
        min(theirs.dtype, own.dtype, key=lambda dtype: torch.finfo(dtype).bits) if own.is_floating_point() else None
    )
    if is_partitioned(theirs) == is_partitioned(own):
        pair = local_shard(theirs), local_shard(own)
        same = torch.equal(*(x.to(device=own.device, dtype=coarse or own.dtype) for x in pair))
    else:
        from refkl.backend import gathered

        with gathered([theirs, own]):
            same = torch.equal(*(x.data.to(device=own.device, dtype=coarse or own.dtype) for x in (theirs, own)))
    verdict = torch.tensor(float(same), device=own.device)
    if dist.is_initialized():
        dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
    return bool(verdict.item())

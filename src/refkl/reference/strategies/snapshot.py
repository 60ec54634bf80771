"""A snapshot of a policy's trained tensors, which is exchanged with them during a score.

It holds a copy of the trained tensors: for a PEFT policy only of the adapter, of any type and with any initialisation
or earlier training. Nothing is added to the user's model, so users save only their own weights. Tensors on the policy's
device are swapped in by pointer. In host memory, or if the policy is sharded, values are exchanged one tensor at a time
(a LoRA factor of another rank than the policy's is replaced by a copy instead).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from refkl.backend import (
    Layout,
    Weight,
    Whole,
    is_partitioned,
    layout_of,
    local_shard,
    named_weights,
    outside_inference_mode,
    reshard,
    unwrap,
    weights_of,
)
from refkl.backend.adapters import (
    LoraFactors,
    adapter_buffers,
    adapter_parameters,
    lora_factors,
    lora_scalings,
    rank_dims,
    scaled_as,
    switches,
)
from refkl.backend.zero import release
from refkl.reference.cost import Entry
from refkl.reference.held import ALL_SETTINGS, HeldReference
from refkl.reference.request import BuildRequest
from refkl.reference.weights.pairing import Pair, paired_weights
from refkl.reference.weights.sharing import SharedWeights
from refkl.reference.weights.tensors import bytes_held
from refkl.scoring import Head, find_head
from refkl.types import MemoryReport

_SMALL = 0.1
"""Share of a device's memory up to which a snapshot stays on the device by default."""


class Snapshot:
    """A copy of the policy's trained tensors from the time when it was taken.

    Args:
        policy: the unwrapped policy.
        on_host: if True, keep the copy in host memory (pinned for a GPU) instead of beside the policy's tensors.
    """

    def __init__(self, policy: nn.Module, *, on_host: bool) -> None:
        self._policy = policy
        self._host = on_host
        self._kept: dict[str, Tensor] = {}
        """This rank's part of each tensor, by canonical name."""
        self._layouts: dict[str, Layout] = {}
        self._shapes: dict[str, torch.Size] = {}
        """The policy's shapes of LoRA factors that have another rank here."""
        self._waiting: dict[str, Tensor] = {}
        """Tensors in host memory while a copy of them, with another shape than the policy's, is in the policy."""
        self.in_policy = False
        """True while the policy holds these tensors and the snapshot holds the policy's."""
        for name, tensor in snapshot_of(policy).items():
            self._kept[name] = self._place(local_shard(tensor).detach(), copy=True)
            self._layouts[name] = layout_of(tensor)
        self._switches: dict[str, Any] = switches(policy)
        self._scalings = lora_scalings(policy)

    @property
    def names(self) -> set[str]:
        """The canonical names of the tensors."""
        return set(self._kept)

    def drop(self) -> None:
        """Drop the tensors."""
        self._kept, self._layouts, self._shapes = {}, {}, {}

    def fill(self, values: dict[str, Tensor]) -> None:
        """Copy this rank's parts of some tensors into it, by name."""
        for name, value in values.items():
            self._kept[name].copy_(value)

    def follow_policy(self) -> bool:
        """Shard, move and cast the tensors like the policy's present ones; return True if a dtype changed."""
        if self.in_policy:
            return False
        reshard(self._policy)
        changed = False
        current = self._current()
        for name, kept in self._kept.items():
            if (tensor := current.get(name)) is None:
                raise ValueError(
                    f"The policy no longer has {name}, of which the reference holds a copy. Build the reference after "
                    "the last change to the policy's modules."
                )
            local, layout = local_shard(tensor), layout_of(tensor)
            if (expected := self._shapes.get(name)) is None:
                if type(layout) is not type(self._layouts[name]):
                    kept = layout.cut(self._layouts[name].join(kept)).clone()
                self._layouts[name], expected = layout, kept.shape
            elif layout.sharded:
                raise ValueError(
                    f"{name} has another LoRA rank in the reference ({list(kept.shape)}) than in the policy, which was "
                    "sharded since: a sharded reference needs the policy's shapes. Use lora='product' only if the "
                    "policy is whole on each rank."
                )
            if expected != local.shape:
                raise ValueError(
                    f"{name} has shape {list(local.shape)} in the policy and {list(kept.shape)} in the reference: it "
                    "changed after the reference was built (was the vocabulary resized?). Build it after that."
                )
            changed |= kept.dtype != local.dtype
            self._kept[name] = self._place(kept.to(local.dtype), like=local)
        return changed

    @contextmanager
    def activate(self) -> Iterator[nn.Module]:
        """Yield the policy with these tensors in it. They are exchanged back on exit, also if a score raises."""
        named = dict(named_weights(self._policy))
        self._check_policy(named)
        tensors = {name: tensor for name, tensor in named.items() if name in self._kept}
        release(tensors.values())
        with ExitStack() as stack:
            stack.callback(torch.clear_autocast_cache)
            # A forward may leave the reference's weights gathered: ZeRO-3 and FSDP2 would reuse them for the policy.
            stack.callback(release, tensors.values())
            stack.callback(reshard, self._policy)
            for name, tensor in tensors.items():
                if tensor.requires_grad and tensor.is_leaf and not is_partitioned(tensor):
                    stack.callback(tensor.register_hook(_refuse_backward).remove)
                self._exchange(tensor, name)
                stack.callback(self._exchange, tensor, name)
            stack.enter_context(scaled_as(self._policy, self._scalings))
            torch.clear_autocast_cache()  # it caches casts by parameter, whose values have changed
            self.in_policy = True
            stack.callback(setattr, self, "in_policy", False)
            yield self._policy

    def head(self) -> Head | None:
        """Return the policy's head, or one with the snapshot's weights if the head trains; None if these are not whole
        on the policy's device."""
        head = find_head(self._policy)
        names = {id(tensor): name for name, tensor in self._current().items()}
        ours = [None if t is None else names.get(id(t)) for t in (head.module.weight, head.module.bias)]
        if ours == [None, None]:
            return head
        if self._host or any(name is not None and self._layouts[name].sharded for name in ours):
            return None
        weight, bias = (
            None if theirs is None else theirs.detach() if name is None else self._kept[name]
            for theirs, name in zip((head.module.weight, head.module.bias), ours, strict=True)
        )
        assert weight is not None
        return head.holding(weight, bias)

    def weights(self) -> Iterator[Weight]:
        self.check_closed()
        tensors = self._current()
        for name, kept in self._kept.items():
            yield Weight(name, kept, self._layouts[name])
        yield from weights_of(self._policy, without={id(t) for t in tensors.values()})

    def pairs(self, policy: nn.Module) -> list[Pair]:
        self.check_closed()
        inner = unwrap(policy)
        reshard(inner)
        own = [Weight(name, kept, self._layouts[name]) for name, kept in self._kept.items()]
        theirs = (weight for weight in weights_of(inner) if weight.name in self._kept)
        return paired_weights(own, theirs, rank_dims(lora_factors(self._policy)))

    def replace_weights(self, weights: dict[str, Tensor]) -> None:
        for name, tensor in self._current().items():
            if (new := weights.get(name)) is not None:
                self._kept[name] = self._place(new.to(tensor.dtype), like=tensor)
                self._layouts[name] = Whole(new.shape)
                self._shapes.pop(name, None)
                if new.shape != tensor.shape:
                    self._shapes[name] = tensor.shape

    def memory(self, home: torch.device) -> MemoryReport:
        """Return the bytes of the snapshot. In host memory, a score also takes device memory for its largest tensor."""
        held = bytes_held(self._kept.values(), home)
        return MemoryReport(host=held.total, device=0) if self._host else held

    def _current(self) -> dict[str, Tensor]:
        """Return the policy's tensors that have a copy here."""
        return {name: tensor for name, tensor in named_weights(self._policy) if name in self._kept}

    def check_closed(self) -> None:
        if self.in_policy:
            raise ValueError(
                "reference.keep_active is open, so the policy holds the reference's weights and the reference the "
                "policy's. Leave that context first."
            )

    def _place(self, tensor: Tensor, *, like: Tensor | None = None, copy: bool = False) -> Tensor:
        """Move a tensor to the place of the snapshot: beside the policy's, or host memory (pinned for a GPU)."""
        device = (tensor if like is None else like).device
        if not self._host:
            return tensor.to(device, copy=copy)
        moved = tensor.to("cpu", copy=copy)
        return moved.pin_memory() if device.type == "cuda" and not moved.is_pinned() else moved

    def _exchange(self, tensor: Tensor, name: str) -> None:
        """Exchange the policy's values with those that the snapshot holds."""
        kept = self._kept[name]
        if not self._host and not self._layouts[name].sharded:
            # By pointer: the policy's own storage stays untouched, also for a later backward pass.
            theirs = tensor.data
            tensor.data = kept
            self._kept[name] = theirs
            return
        if name in self._shapes:
            self._exchange_by_pointer(tensor, name)
            return
        local = local_shard(tensor).detach()
        theirs = local.clone()
        local.copy_(kept)
        kept.copy_(theirs)

    def _exchange_by_pointer(self, tensor: Tensor, name: str) -> None:
        """Exchange a tensor in host memory that has another shape than the policy's: the policy gets a copy of it."""
        if (waiting := self._waiting.pop(name, None)) is not None:
            tensor.data, self._kept[name] = self._kept[name], waiting
            return
        kept, theirs = self._kept[name], tensor.data
        tensor.data = kept.to(tensor.device)
        self._kept[name], self._waiting[name] = theirs, kept

    def _check_policy(self, named: dict[str, Tensor]) -> None:
        """Raise ValueError if the policy with the snapshot in it would not be the model that was captured."""
        for name, tensor in named.items():
            if tensor.requires_grad and name not in self._kept:
                raise ValueError(
                    f"{name} trains now, but did not when the reference was built, so the reference "
                    "has no copy of it. Unfreeze it before build_reference."
                )
        now = switches(self._policy)
        for name, before in self._switches.items():
            if now.get(name) != before:
                raise ValueError(
                    f"The adapter at {name} was {before} when the reference was built and is {now.get(name)} now, so "
                    "the reference cannot be scored. Switch, merge or unmerge adapters before build_reference, or undo "
                    "the change."
                )


class OnSnapshot(HeldReference):
    """A reference that scores inside the policy, with its snapshot swapped in if it has one."""

    takes = ALL_SETTINGS

    def __init__(self, request: BuildRequest, reason: str, source: str) -> None:
        policy = unwrap(request.policy)
        super().__init__(request, reason, source, borrowed_from=policy)
        # A batch is scored on the policy's device; `reference.device` says where the snapshot is.
        self.device = None
        self._policy = policy
        self.snapshot: Snapshot | None = None

    @property
    def _taken(self) -> Snapshot:
        assert self.snapshot is not None, "asked only where there is one"
        return self.snapshot

    def _share(self, names: Iterable[str]) -> None:
        """Watch these weights of the policy, which the reference shares."""
        self._sharing = SharedWeights(self._policy, names, lambda name: self.digests.get(name), modules=True)

    def check_shared(self) -> None:
        """Raise ValueError if weights that the reference shares with the policy have changed."""
        if self._active is None:
            self._sharing.check()

    @outside_inference_mode()
    def follow_policy(self) -> None:
        self.check_shared()
        if self._taken.follow_policy() and self.recorded_fingerprint is not None:
            self.fingerprint()  # the same numbers in another dtype: an allowed change, so record it again

    @contextmanager
    def keep_active(self) -> Iterator[None]:
        with self.use.borrowed(self, "reference.keep_active"):
            if self._active is None:
                self.follow_policy()
            with self.activated():
                yield

    def activate(self) -> AbstractContextManager[nn.Module]:
        return self._taken.activate()

    def head(self) -> Head | None:
        return self._taken.head()

    def weights(self) -> Iterator[Weight]:
        return self._taken.weights()

    def owns(self, name: str) -> bool:
        return self.snapshot is not None and name in self.snapshot.names

    def holds_parts(self) -> bool:
        """Return True if the policy is sharded: its layouts are the same with the reference's weights in it."""
        reshard(self._policy)
        return any(weight.layout.sharded for weight in weights_of(self._policy))

    def pairs(self, policy: nn.Module) -> list[Pair]:
        return self._taken.pairs(policy)

    def lora_layers(self) -> list[LoraFactors]:
        return lora_factors(self._policy)

    def replace_weights(self, weights: dict[str, Tensor]) -> None:
        self._taken.replace_weights(weights)

    def memory_of_weights(self) -> MemoryReport:
        return MemoryReport(device=0, host=0) if self.snapshot is None else self.snapshot.memory(self.home())

    def provenance(self) -> dict[str, Any]:
        swapped = sorted(self.snapshot.names) if self.snapshot is not None else []
        return {**super().provenance(), "swapped": swapped}


def snapshot_of(policy: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a snapshot must hold, by canonical name: trainable parameters, the adapters' other
    parameters (AdaLoRA's ranks), and persistent buffers, which a forward in training mode may change."""
    tuned, constant = adapter_parameters(policy), adapter_buffers(policy)
    return {
        name: tensor
        for name, tensor in named_weights(policy)
        if (
            tensor.requires_grad or id(tensor) in tuned
            if isinstance(tensor, nn.Parameter)
            else id(tensor) not in constant
        )
    }


def _refuse_backward(grad: Tensor) -> NoReturn:
    raise RuntimeError(
        "A backward pass through the policy began while the reference's weights were swapped into it, so its gradients "
        "would be wrong. Leave the reference's context first."
    )


def on_host(request: BuildRequest) -> bool:
    """Return True if a snapshot belongs in host memory: it was asked for, or the snapshot is too large for the
    device."""
    shape = request.shape
    if request.config.offload or request.config.device == "cpu":
        return True
    return shape.memory is not None and not shape.on_host and shape.held(entries(request)) > _SMALL * shape.memory


def entries(request: BuildRequest) -> list[Entry]:
    """Return the entries of the tensors that a snapshot holds; see `snapshot_of`."""
    return [e for e in request.shape.entries if (e.persistent and not e.constant if e.buffer else e.trained or e.tuned)]

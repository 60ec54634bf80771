"""Separate frozen models beside the policy: the common part of clone, zero3, fsdp2 and shared_trunk."""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from refkl.backend import Weight, canonical_name, is_sharded, named_weights, outside_inference_mode, unwrap, weights_of
from refkl.backend.adapters import LoraFactors, lora_factors, rank_dims
from refkl.reference.held import ALL_SETTINGS, HeldReference
from refkl.reference.request import BuildRequest
from refkl.reference.weights.pairing import Pair, paired_weights
from refkl.reference.weights.sharing import SharedWeights
from refkl.reference.weights.tensors import bytes_held
from refkl.scoring import Head, find_head
from refkl.types import MemoryReport


class WholeCopy(HeldReference):
    """A separate model, frozen and in eval mode: `model` has the policy's parameter names."""

    takes = ALL_SETTINGS

    def __init__(self, request: BuildRequest, reason: str, source: str, model: nn.Module) -> None:
        super().__init__(request, reason, source)
        model.requires_grad_(False)
        stay_in_eval(model)
        self.model = model
        """The copy, with the policy's parameter names."""
        self._policy = weakref.ref(unwrap(request.policy))

    @contextmanager
    def activate(self) -> Iterator[nn.Module]:
        self._evaluate()
        yield self.model

    def _evaluate(self) -> None:
        # refkl does not override submodules' .train(); each score puts all of them back in eval mode.
        for module in self.model.modules():
            module.training = False

    def weights(self) -> Iterator[Weight]:
        return weights_of(self.model)

    def pairs(self, policy: nn.Module) -> list[Pair]:
        return paired_weights(self.weights(), weights_of(unwrap(policy)))

    def drop_weights(self) -> bool:
        self.model = nn.Module()
        return True


class SharingCopy(WholeCopy):
    """A copy of the policy that shares the storage of weights that do not train, unless it is another model."""

    def __init__(self, request: BuildRequest, reason: str, source: str, model: nn.Module, shared: set[str]) -> None:
        super().__init__(request, reason, source, model)
        self._shared = shared
        self._placed: tuple[torch.device, torch.dtype, list[int]] | None = None
        policy = unwrap(request.policy)
        self._sharing = SharedWeights(policy, shared, lambda name: self.digests.get(name), modules=False)
        self._stays = request.config.device is not None
        """True if the reference has its own device and does not follow the policy's."""

    @outside_inference_mode()
    def follow_policy(self) -> None:
        """Follow the policy's device and dtype (unless they were set), and share its storage again."""
        policy = self._policy()
        if policy is None or self.weights_freed:
            return
        self._check_still_frozen(policy)
        first = next(policy.parameters())
        if is_sharded(policy):
            raise ValueError(
                "The policy was sharded by FSDP2 after this reference was built as a whole copy on each rank. Build "
                "the reference after fully_shard, or give build_reference the accelerator that shards the policy."
            )
        self._sharing.check()
        weights = dict(named_weights(policy))
        # A move may keep the device's name and still copy, as one to "cpu:0" does.
        placed = first.device, first.dtype, [weights[name].data_ptr() for name in self._shared if name in weights]
        if self._placed == placed:
            return
        recorded, changed = self.recorded_fingerprint, self._move(weights, first)
        self._move_buffers(policy, first)
        self._placed = placed
        if changed and recorded is not None:
            self.fingerprint()  # the same numbers in another dtype: an allowed change, so record it again

    def _move(self, weights: dict[str, Tensor], first: Tensor) -> bool:
        """Give weights the device and dtype of the policy's, or of its first one. Return True if a dtype changed."""
        changed = False
        before = first.dtype if self._placed is None else self._placed[1]
        for name, own in named_weights(self.model):
            theirs = weights.get(name)
            if theirs is None and not isinstance(own, nn.Parameter):
                continue  # a buffer, which is moved later
            # A model of another class has weights that the policy lacks; those in the policy's dtype follow it.
            like = first if theirs is None else theirs
            follows = self.config.dtype is None and own.is_floating_point() and like.is_floating_point()
            dtype = like.dtype if follows and (theirs is not None or own.dtype == before) else own.dtype
            device = own.device if self._stays else like.device
            changed |= dtype != own.dtype
            own.data = own.data.to(device=device, dtype=dtype)
            # A move gave the policy new storage; share it again where it holds the same numbers.
            if theirs is None or name not in self._shared:
                continue
            alike = own.dtype == theirs.dtype and own.device == theirs.device and own.shape == theirs.shape
            if alike and torch.equal(own, theirs):
                own.data = theirs.data
        return changed

    def _move_buffers(self, policy: nn.Module, first: Tensor) -> None:
        buffers = dict(policy.named_buffers())
        held = {id(own) for _, own in named_weights(self.model)} if self._stays else set()
        # named_buffers() also has buffers that no checkpoint holds, such as rotary frequencies.
        for name, buffer in self.model.named_buffers():
            dtype = buffers[name].dtype if self.config.dtype is None and name in buffers else buffer.dtype
            device = buffer.device if id(buffer) in held else self.device or first.device
            buffer.data = buffer.data.to(device=device, dtype=dtype)

    def _check_still_frozen(self, policy: nn.Module) -> None:
        for full_name, parameter in policy.named_parameters():
            if parameter.requires_grad and (name := canonical_name(full_name)) in self._shared:
                raise ValueError(
                    f"{name} trains now, but did not when the reference was built, and the reference shares its "
                    "storage: training would change the reference too. Unfreeze it before build_reference."
                )

    def head(self) -> Head | None:
        """Return the copy's head; None if reference.device is set."""
        return None if self.device is not None else find_head(self.model)

    def owns(self, name: str) -> bool:
        return name not in self._shared

    def pairs(self, policy: nn.Module) -> list[Pair]:
        pairs = paired_weights(self.weights(), weights_of(unwrap(policy)), rank_dims(self.lora_layers()))
        return [pair for pair in pairs if self.owns(pair.own.name)]

    def lora_layers(self) -> list[LoraFactors]:
        return lora_factors(self.model)

    def replace_weights(self, weights: dict[str, Tensor]) -> None:
        for name, own in named_weights(self.model):
            if (new := weights.get(name)) is not None:
                placed = new.to(own.device, own.dtype)
                own.data = placed.pin_memory() if own.device.type == "cpu" and own.is_pinned() else placed

    def drop_weights(self) -> bool:
        self._shared = set()
        return super().drop_weights()

    def memory_of_weights(self) -> MemoryReport:
        """Return the bytes of storages that the reference holds and the policy does not."""
        return self._bytes_beside_policy(self.model)

    def _bytes_beside_policy(self, *models: nn.Module) -> MemoryReport:
        policy = self._policy()
        theirs = [] if policy is None else [*policy.parameters(), *policy.buffers()]
        shared = {_storage(t) for t in theirs}
        own = (t for m in models for t in (*m.parameters(), *m.buffers()) if _storage(t) not in shared)
        return bytes_held(own, theirs[0].device if theirs else torch.device("cpu"))


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def must_copy_all(policy: nn.Module, request: BuildRequest) -> bool:
    """Return True if sharing storage would be wrong: another dtype, device or offload was asked for, or a merged
    adapter may be unmerged in place."""
    config = request.config
    merged = any(isinstance(m, BaseTunerLayer) and m.merged for m in policy.modules())
    return merged or config.offload or config.dtype is not None or config.device is not None


def stay_in_eval(model: nn.Module) -> None:
    """Put a model in eval mode permanently: its `train` method does nothing from now on."""
    model.eval()
    model.train = types.MethodType(_ignore_train, model)  # type: ignore[method-assign]


def _ignore_train(self: nn.Module, mode: bool = True) -> nn.Module:
    """Do nothing: a reference has no training mode."""
    return self

"""`adapter`: the PEFT policy itself, with its adapter switched off. It adds no memory.

If the reference is the policy as it was when the reference was built, this is correct only for a fresh adapter. If the
reference is the bare base (reference.source "base", or a learned prompt, which always changes the policy), it is
correct for a trained adapter too. `disable_adapter()` gives back neither if making the adapter changed the base (PiSSA,
OLoRA, CorDA, LoftQ, LoRA-GA), with `bias="all"`, with base parameters unfrozen by hand, or on a merged model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from refkl.backend import (
    Weight,
    is_partitioned,
    learned_prompt,
    local_shard,
    outside_inference_mode,
    parameters_in,
    reshard,
    submodules,
    unwrap,
    weights_of,
)
from refkl.backend.adapters import adapter_tensors, quantised, switched_off
from refkl.reference.cost import Cost
from refkl.reference.moving.average import Move
from refkl.reference.moving.lora_update import LastUpdate, planned
from refkl.reference.moving.mover import Mover
from refkl.reference.moving.neutral_adapter import neutral_state
from refkl.reference.request import BuildRequest
from refkl.reference.strategies.bare_base import base_trains, is_bare, not_provably_bare, not_provably_off
from refkl.reference.strategies.snapshot import OnSnapshot, Snapshot, on_host, snapshot_of
from refkl.reference.weights.fingerprint import combined, digests
from refkl.reference.weights.pairing import Pair
from refkl.reference.weights.saved import Saved
from refkl.scoring import Head, find_head


class AdapterMover(Mover):
    """Moves a reference that starts as the policy with its adapter off. Its first move takes a snapshot."""

    _held: AdapterReference

    def check(self, policy: nn.Module, step: Move) -> None:
        held = self._held
        if held.snapshot is not None:
            return super().check(policy, step)
        inner = held.policy
        if learned_prompt(inner) is not None:
            raise ValueError(
                "strategy 'adapter' cannot move if a prompt is learned: its reference is the bare base, which never "
                "changes. Leave the sync out."
            )
        if not step.copies:
            neutral_state(inner)
        # The snapshot will have the policy's shapes.
        tensors = snapshot_of(inner)
        if any(is_partitioned(t) and not local_shard(t).numel() for t in tensors.values()):
            raise ValueError("An adapter that ZeRO-3 keeps on NVMe cannot be copied part by part, so it cannot move.")
        weights = [weight for weight in weights_of(inner) if weight.name in tensors]
        planned(step, [Pair(weight, weight) for weight in weights], held.lora_layers())

    def update(self, policy: nn.Module, step: Move) -> LastUpdate:
        """Make a move. The first one takes a snapshot, which the reference keeps from then on."""
        held = self._held
        if held.snapshot is not None:
            return super().update(policy, step)
        self.check(policy, step)
        start = {} if step.copies else neutral_state(held.policy)
        snapshot = held.take_snapshot()
        try:
            snapshot.fill(start)
            return super().update(policy, step)
        except BaseException:
            if not held.updates and not self.half_moved:
                held.drop_snapshot()
            raise

    def keep_initial(self) -> None:
        """Keep only the fingerprint: the first state is the policy with its adapter off."""
        held = self._held
        if self.initial_fingerprint is None:
            if held.updates:
                raise ValueError(
                    "The reference has moved already, and its first state was not kept. Call reference.keep_first() "
                    "before the first update."
                )
            self.initial_fingerprint = held.recorded_fingerprint or held.fingerprint()

    def exchange_initial(self) -> None:
        self._held.shows_base = not self._held.shows_base

    def recalled_initial(self, fingerprint: str | None) -> str | None:
        return fingerprint if fingerprint == combined(digests(self._held.base_weights())) else None


class AdapterReference(OnSnapshot):
    """The policy with its adapter off. After the first move: the policy with a snapshot of its adapter swapped in."""

    strategy = "adapter"
    movers = AdapterMover

    def __init__(self, request: BuildRequest, reason: str) -> None:
        source = "bare base, without its adapter" if is_bare(request) else "base, under its fresh adapter"
        super().__init__(request, reason, f"the policy's {source}" + quantised(unwrap(request.policy)))
        policy = unwrap(request.policy)
        assert isinstance(policy, PeftModel), "supports() lets no other policy in"
        self.policy = policy
        self.shows_base = False
        """True while it scores in its state before the first move."""
        self._built_for = reason
        self._on_host = on_host(request)
        self._share([weight.name for weight in self.base_weights()])
        self._dtypes, self._all_dtypes = self._current_dtypes(), _dtypes_of(policy)

    @classmethod
    def supports(cls, request: BuildRequest) -> str | None:
        policy = unwrap(request.policy)
        if not isinstance(policy, PeftModel):
            return f"the policy is a {type(policy).__name__} and has no PEFT adapter to switch off."
        if request.backend.name == "fsdp1":
            return "FSDP1 flattens adapter and base into one parameter. Use FSDP2."
        config = request.config
        if config.source not in ("policy", "base"):
            return f"it uses the policy's own base, but reference.source asks for {config.source!r}."
        if config.dtype is not None or config.device is not None:
            return "it shares the policy's weights, so reference.dtype and reference.device cannot be set."
        if config.offload:
            return "it has no weights of its own that reference.offload could keep in host memory."
        if config.quantize is not None:
            return "it shares the policy's weights, so reference.quantize cannot be set."
        if is_bare(request):
            return not_provably_bare(policy, fresh=request.planned)
        return not_provably_off(policy, fresh=request.planned)

    @classmethod
    def cost(cls, request: BuildRequest) -> Cost:
        shape = request.shape
        return Cost(flops=shape.forward(e for e in shape.entries if e.base), moved=shape.gathered())

    @classmethod
    def auto(cls, request: BuildRequest) -> bool:
        return True

    @classmethod
    def why(cls, request: BuildRequest) -> str:
        if (prompt := learned_prompt(request.policy)) is not None:
            return (
                f"the policy's adapter is a learned prompt ({prompt.kind}), which changes the policy from the start, "
                "so the reference is the bare base without the prompt and adds no memory"
            )
        if request.config.source == "base":
            return "reference.source asks for the bare base, which is the policy with its adapter off: adds no memory"
        return (
            "the policy's adapter is fresh and nothing else trains, so the policy with its adapter off is the "
            "reference and adds no memory"
        )

    @classmethod
    def build(cls, request: BuildRequest, reason: str) -> AdapterReference:
        reference = cls(request, reason)
        reference.fingerprint()
        return reference

    @property
    def _off(self) -> bool:
        """True if the reference is the policy with its adapter off, without a snapshot."""
        return self.snapshot is None or self.shows_base

    @outside_inference_mode()
    def follow_policy(self) -> None:
        """Follow a cast of the policy: DeepSpeed casts fp32 weights that will train in bf16."""
        if not self._off:
            super().follow_policy()
            return
        self.check_shared()
        if self._all_dtypes == (found := _dtypes_of(self.policy)):
            return  # finding the base's dtypes among them takes longer than scoring a small batch
        self._all_dtypes = found
        if self._dtypes != (now := self._current_dtypes()):
            self._dtypes = now
            if self.recorded_fingerprint is not None and not self.shows_base:
                self.fingerprint()  # the same numbers in another dtype: an allowed change, so record it again

    def _current_dtypes(self) -> list[torch.dtype]:
        return [weight.local.dtype for weight in self.base_weights()]

    @contextmanager
    def activate(self) -> Iterator[nn.Module]:
        if not self._off:
            with super().activate() as model:
                yield model
            return
        if why_not := base_trains(self.policy):  # a merged adapter was refused by check_shared
            raise ValueError(f"The policy with its adapter off is not the reference: {why_not}")
        with switched_off(self.policy):
            yield self.policy

    def head(self) -> Head | None:
        """Return the policy's own head; a head that an adapter changes is not found."""
        return find_head(self.policy) if self._off else super().head()

    def drop_weights(self) -> bool:
        return False

    def weights(self) -> Iterator[Weight]:
        return self.base_weights() if self._off else super().weights()

    def base_weights(self) -> Iterator[Weight]:
        """Yield the weights of the policy without its adapter."""
        reshard(self.policy)  # FSDP2 has other objects for parameters that a forward left gathered
        return weights_of(self.policy, without=adapter_tensors(self.policy))

    def take_snapshot(self) -> Snapshot:
        """Hold a copy of the policy's trained tensors from now on, as "swap" does."""
        self.snapshot, self.strategy = Snapshot(self.policy, on_host=self._on_host), "swap"
        self.reason = "the reference has moved, so the policy's trainable weights are swapped for the reference's copy"
        return self.snapshot

    def drop_snapshot(self) -> None:
        """Drop the snapshot: the reference is the policy with its adapter off again."""
        self.snapshot, self.strategy, self.reason = None, type(self).strategy, self._built_for

    def load(self, folder: str | Path) -> None:
        with self._idle("be loaded into"):
            saved = Saved(Path(folder))
            bare = saved.digests.keys() == {weight.name for weight in self.base_weights()}
            if bare == (self.snapshot is None) or not (bare or saved.record.updates):
                return super().load(folder)
            before = self.snapshot, self.strategy, self.reason
            with self.known.restored_on_error():
                if bare:
                    self.drop_snapshot()
                else:
                    self.take_snapshot()
                try:
                    super().load(folder)
                except BaseException:
                    self.snapshot, self.strategy, self.reason = before
                    raise


def _dtypes_of(policy: PeftModel) -> list[torch.dtype]:
    modules = submodules(policy)
    buffers = (buffer for module in modules for buffer in module._buffers.values() if buffer is not None)
    return [tensor.dtype for tensor in (*parameters_in(modules), *buffers)]

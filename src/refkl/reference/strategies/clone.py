"""`clone`: a frozen copy that costs only what trains.

What the policy does not train is shared, storage and all, so that a LoRA policy's clone holds a copy of the adapter
and of nothing else.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from refkl.backend import (
    Weight,
    Whole,
    base_model,
    canonical_name,
    eight_bit_layer,
    is_sharded,
    named_weights,
    unwrap,
    weights_of,
)
from refkl.backend.adapters import LoraFactors, adapter_tensors, lora_factors, quantised, rank_dims
from refkl.messages import size
from refkl.reference.contract import BuildRequest, Reference, held_in_place
from refkl.reference.cost import BATCH_BYTES, Cost, Entry
from refkl.reference.moving.average import Pair, paired_weights
from refkl.reference.quantized.kl_floor import Gauge
from refkl.reference.quantized.layers import FORMATS, QuantizedLinear, why_not_quantized
from refkl.reference.strategies.from_folder import load_pretrained, source_folder
from refkl.reference.strategies.frozen_copy import foreign_forward, frozen_copy
from refkl.reference.streamed.stream import Stream, largest_pair, unit_bytes, unstreamable
from refkl.reference.weights.saved import Saved
from refkl.reference.weights.tensors import bytes_held, bytes_offloaded
from refkl.scoring import Head, find_head
from refkl.types import KLFloor, MemoryReport, TokenBatch


class CloneReference(Reference):
    """A deep copy of the policy: frozen, in eval mode for good, sharing what does not train."""

    strategy = "clone"

    def __init__(
        self,
        request: BuildRequest,
        reason: str,
        model: nn.Module,
        source: str,
        shared: set[str],
        gauge: Gauge | None = None,
    ) -> None:
        super().__init__(request, reason, source)
        self.model = model
        """The copy, with the policy's parameter names."""
        self._policy = weakref.ref(unwrap(request.policy))
        self._shared = shared
        self._stream = Stream(model) if request.config.offload else None
        self._head: Head | None = None
        self._gauge = gauge
        self._placed: tuple[torch.device, torch.dtype, list[int]] | None = None

    @classmethod
    def supports(cls, request: BuildRequest) -> str | None:
        if request.backend.name == "zero3":
            return (
                "under ZeRO-3 a copied parameter is a placeholder of size 0 whose forward fails, and a whole copy on "
                "each rank is what ZeRO-3 is there to avoid."
            )
        if request.backend.name.startswith("fsdp"):
            return "FSDP shards the policy's parameters, and a whole copy on each rank was not built for that."
        if any(isinstance(p, DTensor) for p in request.policy.parameters()):
            return "the policy's parameters are sharded (DTensor)."
        if (why_not := held_in_place(request)) is not None:
            return why_not
        if request.config.offload and (request.config.device, request.config.quantize) != (None, None):
            return (
                "reference.offload runs a copy in full precision on the policy's device, so reference.device and "
                ".quantize cannot be set with it."
            )
        if request.config.offload and (why_not := unstreamable(unwrap(request.policy))) is not None:
            return why_not
        if request.config.quantize is not None and (why_not := why_not_quantized(request)) is not None:
            return why_not
        if request.config.source != "policy":
            try:
                source_folder(request)
            except ValueError as error:
                return str(error)
            return None
        if (layer := eight_bit_layer(request.policy)) is not None:
            return (
                f"{layer} is in 8 bits (bitsandbytes): a copy that shares its weight has not what it computes with, "
                "and in eval mode it computes something else."
            )
        return foreign_forward(unwrap(request.policy))

    @classmethod
    def cost(cls, request: BuildRequest) -> Cost:
        shape, config = request.shape, request.config
        if config.source != "policy":
            copied = [e for e in shape.entries if e.base]
        elif must_copy_all(unwrap(request.policy), request):
            copied = list(shape.entries)
        else:
            copied = [e for e in shape.entries if e.trained or e.tuned or e.buffer]
        dtype = getattr(torch, config.dtype) if config.dtype else None
        if config.offload:
            return _streamed_cost(request, copied, dtype)
        packed = [e.linear for e in copied if e.linear is not None and config.quantize is not None]
        whole = [e for e in copied if e.linear is None or config.quantize is None]
        held = shape.held(whole, "whole", dtype)
        restoring = 0
        if config.quantize is not None and packed:
            form = FORMATS[config.quantize]
            held += sum(form.size(*matrix) for matrix in packed)
            restoring = max(form.transient * out * width for out, width in packed)
        if config.device is None:
            return Cost(device=held, scoring=restoring, flops=shape.forward())
        moved = BATCH_BYTES * shape.step.tokens
        if config.device == "cpu" and not shape.on_host:
            return Cost(host=held, host_flops=shape.forward(), moved=moved)
        return Cost(device=held, scoring=restoring, flops=shape.forward(), moved=moved)

    @classmethod
    def why(cls, request: BuildRequest) -> str:
        what = "of what trains" if request.config.source == "policy" else f"from {request.config.source}"
        if request.config.offload:
            what = "in host memory, streamed through the device layer by layer,"
        what += "" if request.config.quantize is None else f", its linear layers in {request.config.quantize},"
        return f"a frozen copy {what} is the reference and adds {size(cls.cost(request).total)} ({request.backend})"

    @classmethod
    def build(cls, request: BuildRequest, reason: str) -> CloneReference:
        policy = unwrap(request.policy)
        dtype, kind = getattr(torch, request.config.dtype) if request.config.dtype else None, request.config.quantize
        loaded = None
        if request.config.source == "policy":
            share = not must_copy_all(policy, request)
            model, shared = frozen_copy(policy, share=share, on_host=request.config.offload, quantize=kind)
            source = "the policy as it stood when the reference was built" + quantised(policy)
        else:
            source = source_folder(request)
            model, shared = load_pretrained(request, source, dtype), set()
            if kind is not None:
                loaded = model
                model, _ = frozen_copy(loaded, share=False, quantize=kind)
        if request.config.source != "policy":
            dtype = None  # it was loaded in it, and its rotary frequencies stay in fp32
        if dtype is not None or request.config.device is not None:
            model.to(device=request.config.device, dtype=dtype)
        model.requires_grad_(False)
        _stay_in_eval(model)
        gauge = None if kind is None else Gauge(request.config, policy, loaded)
        reference = cls(request, reason, model, source, shared, gauge)
        reference.follow_policy()
        reference.fingerprint()
        if gauge is not None:
            given = request.calibration
            if given is None:
                gauge.watch()
            else:
                reference._measure([given] if isinstance(given, TokenBatch) else given)
        return reference

    def follow_policy(self) -> None:
        """Follow the policy's device and dtype (unless they were set), and share storage with it again."""
        policy = self._policy()
        if policy is None:
            return
        self._check_still_frozen(policy)
        first = next(policy.parameters())
        if is_sharded(policy):
            raise ValueError(
                "The policy was sharded by FSDP2 after this reference was built, which is a whole copy on each rank. "
                "Build it after fully_shard, or give build_reference the accelerator that shards the policy."
            )
        weights = dict(named_weights(policy))
        # A move may keep the device's name and still copy, as one to "cpu:0" does.
        placed = first.device, first.dtype, [weights[name].data_ptr() for name in self._shared if name in weights]
        if self._placed == placed:
            return
        recorded, changed = self._recorded, False
        stays = self.config.device is not None or self._stream is not None
        held = {id(own) for _, own in named_weights(self.model)} if stays else set()
        before = first.dtype if self._placed is None else self._placed[1]
        for name, own in named_weights(self.model):
            theirs = weights.get(name)
            if theirs is None and not isinstance(own, nn.Parameter):
                continue  # a buffer, which follows below
            # A model of its own class has weights that the policy lacks; those in the policy's dtype follow it.
            like = first if theirs is None else theirs
            follows = self.config.dtype is None and own.is_floating_point() and like.is_floating_point()
            dtype = like.dtype if follows and (theirs is not None or own.dtype == before) else own.dtype
            device = own.device if stays else like.device
            changed |= dtype != own.dtype
            own.data = own.data.to(device=device, dtype=dtype)
            # A move gave the policy storage of its own; take part in it again where it holds the same numbers.
            if theirs is None or name not in self._shared:
                continue
            alike = own.dtype == theirs.dtype and own.device == theirs.device and own.shape == theirs.shape
            if alike and torch.equal(own, theirs):
                own.data = theirs.data
        buffers = dict(policy.named_buffers())
        # named_buffers() has those that no checkpoint holds too, such as rotary frequencies.
        for name, buffer in self.model.named_buffers():
            dtype = buffers[name].dtype if self.config.dtype is None and name in buffers else buffer.dtype
            device = buffer.device if id(buffer) in held else self._device or first.device
            buffer.data = buffer.data.to(device=device, dtype=dtype)
        for module in self.model.modules():
            if isinstance(module, QuantizedLinear) and self.config.dtype is None:
                module.dtype = first.dtype
        if self._stream is not None:
            self._stream.follow(first.device)
        self._placed = placed
        if changed and recorded is not None:
            self.fingerprint()  # the same numbers in another dtype: sanctioned, so recorded anew

    def _check_still_frozen(self, policy: nn.Module) -> None:
        for full_name, parameter in policy.named_parameters():
            if parameter.requires_grad and (name := canonical_name(full_name)) in self._shared:
                raise ValueError(
                    f"{name} trains now, but did not when the reference was built, and the reference shares its "
                    "storage: training would move the reference too. Unfreeze before build_reference."
                )

    @contextmanager
    def activate(self) -> Iterator[nn.Module]:
        # Submodules' .train() is not ours to override; scoring puts every one of them back in eval.
        for module in self.model.modules():
            module.training = False
        with nullcontext() if self._stream is None else self._stream.sweep():
            yield self.model

    @contextmanager
    def _scoring(self, batch: TokenBatch) -> Iterator[tuple[nn.Module, TokenBatch]]:
        with super()._scoring(batch) as (model, moved):
            if self._stream is not None:
                moved = self._stream.taken(moved)
                self._stream.learn(moved)
            yield model, moved

    @property
    def one_sweep(self) -> bool:
        return self._stream is not None

    def head(self) -> Head | None:
        """The copy's, unless it is held on a device of its own; offloaded, a copy of it on the policy's device."""
        if self._device is not None:
            return None
        if self._stream is None:
            return find_head(self.model)
        self.follow_policy()
        if self._head is None:
            with self.activate() as model:
                self._head = find_head(model)
        module, device = self._head.module, self._stream.device
        return self._head.holding(*(None if t is None else t.detach().to(device) for t in (module.weight, module.bias)))

    def weights(self) -> Iterator[Weight]:
        layers = {f"{canonical_name(n)}." for n, m in self.model.named_modules() if isinstance(m, QuantizedLinear)}
        for weight in weights_of(self.model):
            layer, _, part = weight.name.rpartition(".")
            if f"{layer}." in layers and part != "bias":
                yield weight._replace(name=f"{layer}.weight.{part}")
            else:
                yield weight

    @property
    def kl_floor(self) -> KLFloor | None:
        return None if self._gauge is None else self._gauge.floor

    def recall_floor(self, found: dict[str, Any]) -> None:
        if self._gauge is None:
            return super().recall_floor(found)
        self._gauge.recall(found)

    def before_scoring(self, batch: TokenBatch) -> None:
        if self._gauge is not None and not self._gauge.done:
            self._measure([batch])

    def _measure(self, batches: Iterable[TokenBatch]) -> None:
        assert self._gauge is not None
        says = self._accelerator is None or self._accelerator.is_main_process
        with self.activate() as model, self._autocast():
            self._gauge.measure(model, batches, says=says)

    def load(self, folder: str | Path) -> None:
        super().load(folder)
        if self._gauge is not None and (found := Saved(Path(folder)).provenance["kl_floor"]) is not None:
            self._gauge.recall(found)

    def provenance(self) -> dict[str, Any]:
        if self._gauge is None:
            return super().provenance()
        return {**super().provenance(), "quantize": self.config.quantize, "kl_floor": self._gauge.record()}

    def free_weights(self) -> bool:
        self.model, self._shared, self._stream, self._head = nn.Module(), set(), None, None
        if self._gauge is not None:
            self._gauge.loaded = None
        return True

    def owns(self, name: str) -> bool:
        return name not in self._shared

    def pairs(self, policy: nn.Module) -> list[Pair]:
        packed = {canonical_name(n): m for n, m in self.model.named_modules() if isinstance(m, QuantizedLinear)}
        own = [
            weight
            for weight in weights_of(self.model)
            if weight.name.endswith(".bias") or weight.name.rpartition(".")[0] not in packed
        ]
        # The place of a quantised weight is held by its bytes, which are never read as its numbers.
        own += [Weight(f"{n}.weight", m.get_buffer("qdata"), Whole(m.numbers_shape)) for n, m in packed.items()]
        pairs = paired_weights(own, weights_of(unwrap(policy)), rank_dims(self.lora_layers()))
        layers = {f"{name}.weight": layer for name, layer in packed.items()}
        return [pair._replace(packed=layers.get(pair.own.name)) for pair in pairs if self.owns(pair.own.name)]

    def lora_layers(self) -> list[LoraFactors]:
        return lora_factors(self.model)

    def replace_weights(self, weights: dict[str, Tensor]) -> None:
        for name, own in named_weights(self.model):
            if (new := weights.get(name)) is not None:
                placed = new.to(own.device, own.dtype)
                own.data = placed.pin_memory() if own.device.type == "cpu" and own.is_pinned() else placed

    def memory_of_weights(self) -> MemoryReport:
        """Bytes of storages that the reference holds and the policy does not; a model that was loaded to be quantised
        is among them until the floor is measured. Offloaded, a score also takes device memory for two units of it."""
        if self._stream is not None:
            weights = {id(tensor): tensor for _, tensor in named_weights(self.model)}
            return bytes_offloaded(weights.values(), (b for b in self.model.buffers() if id(b) not in weights))
        policy = self._policy()
        theirs = [] if policy is None else [*policy.parameters(), *policy.buffers()]
        shared = {_storage(t) for t in theirs}
        models = [self.model, *([self._gauge.loaded] if self._gauge is not None and self._gauge.loaded else [])]
        own = (t for m in models for t in (*m.parameters(), *m.buffers()) if _storage(t) not in shared)
        return bytes_held(own, theirs[0].device if theirs else torch.device("cpu"))


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def must_copy_all(policy: nn.Module, request: BuildRequest) -> bool:
    """True where sharing would be wrong: other numbers were asked for, or a merged adapter may be unmerged in place."""
    config = request.config
    merged = any(isinstance(m, BaseTunerLayer) and m.merged for m in policy.modules())
    return merged or config.offload or config.dtype is not None or config.device is not None


def _streamed_cost(request: BuildRequest, copied: list[Entry], dtype: torch.dtype | None) -> Cost:
    """Of a whole copy in host memory, of which two units at most are on the device."""
    shape, policy, without = request.shape, unwrap(request.policy), set[int]()
    if request.config.source != "policy":
        policy, without = base_model(policy), adapter_tensors(policy)
    units, rest = unit_bytes(policy, dtype=dtype, without=without)
    stays = [e for e in copied if e.buffer and not e.persistent]
    return Cost(
        device=shape.held(stays, "whole", dtype),
        host=shape.held(copied, "whole", dtype) - shape.held(stays, "whole", dtype),
        scoring=largest_pair(units) + rest,
        flops=shape.forward(),
        moved=sum(units) + rest if shape.step.tokens else 0,
    )


def _stay_in_eval(model: nn.Module) -> None:
    model.eval()
    model.train = types.MethodType(_ignore_train, model)  # type: ignore[method-assign]


def _ignore_train(self: nn.Module, mode: bool = True) -> nn.Module:
    """A reference has no training mode."""
    return self

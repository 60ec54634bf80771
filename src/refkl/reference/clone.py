"""`clone`: a frozen copy that costs only what trains.

What the policy does not train is shared, storage and all, so that a LoRA policy's clone holds a copy of the adapter
and of nothing else.
"""

from __future__ import annotations

import copy
import types
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from refkl.backend import Weight, canonical_name, is_sharded, named_weights, unwrap, weights_of
from refkl.messages import size
from refkl.reference.base import BuildRequest, Reference, bytes_held, check_pairs, held_in_place, mix
from refkl.reference.peft_layers import adapter_parameters, quantised
from refkl.reference.pretrained import load_pretrained, source_folder
from refkl.reference.shape import BATCH_BYTES, Cost
from refkl.scoring import Head, find_head
from refkl.types import MemoryReport


class CloneReference(Reference):
    """A deep copy of the policy: frozen, in eval mode for good, sharing what does not train."""

    strategy = "clone"

    def __init__(self, request: BuildRequest, reason: str, model: nn.Module, source: str, shared: set[str]) -> None:
        super().__init__(request, reason, source)
        self.model = model
        """The copy, with the policy's parameter names."""
        self._policy = weakref.ref(unwrap(request.policy))
        self._config = request.config
        self._shared = shared
        self._placed: tuple[torch.device, torch.dtype] | None = None

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
        if request.config.source != "policy":
            try:
                source_folder(request)
            except ValueError as error:
                return str(error)
            return None
        return foreign_forward(unwrap(request.policy))

    @classmethod
    def cost(cls, request: BuildRequest) -> Cost:
        shape, config = request.shape, request.config
        if config.source != "policy":
            copied = [e for e in shape.entries if e.base]
        elif _must_copy_all(unwrap(request.policy), request):
            copied = list(shape.entries)
        else:
            copied = [e for e in shape.entries if e.trained or e.tuned or e.buffer]
        held = shape.held(copied, "whole", getattr(torch, config.dtype) if config.dtype else None)
        if config.device is None:
            return Cost(device=held, flops=shape.forward())
        moved = BATCH_BYTES * shape.step.tokens
        if config.device == "cpu" and not shape.on_host:
            return Cost(host=held, host_flops=shape.forward(), moved=moved)
        return Cost(device=held, flops=shape.forward(), moved=moved)

    @classmethod
    def why(cls, request: BuildRequest) -> str:
        what = "of what trains" if request.config.source == "policy" else f"from {request.config.source}"
        return f"a frozen copy {what} is the reference and adds {size(cls.cost(request).total)} ({request.backend})"

    @classmethod
    def build(cls, request: BuildRequest, reason: str) -> CloneReference:
        policy = unwrap(request.policy)
        dtype = getattr(torch, request.config.dtype) if request.config.dtype else None
        if request.config.source == "policy":
            model, shared = frozen_copy(policy, share=not _must_copy_all(policy, request))
            source = "the policy as it stood when the reference was built" + quantised(policy)
        else:
            source = source_folder(request)
            model, shared = load_pretrained(request, source, dtype), set()
        if dtype is not None or request.config.device is not None:
            model.to(device=request.config.device, dtype=dtype)
        model.requires_grad_(False)
        _stay_in_eval(model)
        reference = cls(request, reason, model, source, shared)
        reference.settle()
        reference.fingerprint()
        return reference

    def settle(self) -> None:
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
        if self._placed == (first.device, first.dtype):
            return
        weights = dict(named_weights(policy))
        recorded, changed = self._recorded, False
        for name, own in named_weights(self.model):
            theirs = weights.get(name)
            if theirs is None:
                continue
            dtype = theirs.dtype if self._config.dtype is None and own.is_floating_point() else own.dtype
            device = own.device if self._config.device else theirs.device
            changed |= dtype != own.dtype
            own.data = own.data.to(device=device, dtype=dtype)
            # A move gave the policy storage of its own; take part in it again where it holds the same numbers.
            alike = own.dtype == theirs.dtype and own.device == theirs.device and own.shape == theirs.shape
            if name in self._shared and alike and torch.equal(own, theirs):
                own.data = theirs.data
        buffers = dict(policy.named_buffers())
        # named_buffers() has those that no checkpoint holds too, such as rotary frequencies.
        for name, buffer in self.model.named_buffers():
            dtype = buffers[name].dtype if self._config.dtype is None and name in buffers else buffer.dtype
            buffer.data = buffer.data.to(device=self._config.device or first.device, dtype=dtype)
        self._placed = (first.device, first.dtype)
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
    def _active(self) -> Iterator[nn.Module]:
        # Submodules' .train() is not ours to override; scoring puts every one of them back in eval.
        for module in self.model.modules():
            module.training = False
        yield self.model

    def head(self) -> Head | None:
        """The copy's, unless it is held on a device of its own."""
        return find_head(self.model) if self._device is None else None

    def _weights(self) -> Iterator[Weight]:
        return weights_of(self.model)

    def _free(self) -> bool:
        self.model, self._shared = nn.Module(), set()
        return True

    def _owns(self, name: str) -> bool:
        return name not in self._shared

    def check_movable(self, policy: nn.Module) -> None:
        self._check_held("be moved")
        self._pairs(policy)

    def _pairs(self, policy: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Own and policy's weights that are to be mixed."""
        own, theirs = dict(named_weights(self.model)), dict(named_weights(unwrap(policy)))
        own_shapes, their_shapes = ({name: t.shape for name, t in w.items()} for w in (own, theirs))
        check_pairs(their_shapes, own_shapes, "the policy")
        return [(tensor, theirs[name]) for name, tensor in own.items() if self._owns(name)]

    def _move(self, policy: nn.Module, alpha: float) -> None:
        pairs = self._pairs(policy)
        if alpha < 1.0 and any(own.dtype in (torch.bfloat16, torch.float16) for own, _ in pairs):
            warnings.warn(
                "The reference is held in 16 bits, where small steps of a moving average round to nothing. "
                "Set reference.dtype to 'float32'.",
                stacklevel=4,
            )
        for own, theirs in pairs:
            mix(own.data, theirs, alpha)

    def memory(self) -> MemoryReport:
        """Bytes of storages that the reference holds and the policy does not."""
        policy = self._policy()
        theirs = [] if policy is None else [*policy.parameters(), *policy.buffers()]
        shared = {_storage(t) for t in theirs}
        own = (t for t in (*self.model.parameters(), *self.model.buffers()) if _storage(t) not in shared)
        return bytes_held(own, theirs[0].device if theirs else torch.device("cpu"))


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _must_copy_all(policy: nn.Module, request: BuildRequest) -> bool:
    """True where sharing would be wrong: other numbers were asked for, or a merged adapter may be unmerged in place."""
    config = request.config
    merged = any(isinstance(m, BaseTunerLayer) and m.merged for m in policy.modules())
    return merged or config.dtype is not None or config.device is not None


def frozen_copy(policy: nn.Module, *, share: bool) -> tuple[nn.Module, set[str]]:
    """A deep copy, and the names of the parameters whose storage it shares with the policy. Ties are kept."""
    memo: dict[int, Any] = {}
    shared: set[str] = set()
    tuned = adapter_parameters(policy)
    for name, parameter in named_weights(policy):
        if not isinstance(parameter, nn.Parameter):
            continue
        if share and not parameter.requires_grad and id(parameter) not in tuned:
            # A Parameter of our own on the same storage: the policy's own object could be unfrozen later.
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
            shared.add(name)
    model = copy.deepcopy(policy, memo)
    for module in model.modules():
        # TRL's fused head replaces forward by a function that calls the *policy's* own forward. The class's forward is
        # what it wraps, and what refkl scores with.
        if "forward" in vars(module) and _holder(vars(module)["forward"]) is not None:
            del module.forward
    return model, shared


def foreign_forward(policy: nn.Module) -> str | None:
    """A sentence if some module's forward was replaced in a way that a copy cannot undo."""
    for name, module in policy.named_modules():
        holder = _holder(vars(module).get("forward"))
        if holder is None:
            continue
        where = holder.__globals__["__name__"]  # functools.wraps hides it everywhere else
        if not where.startswith("trl."):
            return (
                f"the forward of {name or 'the policy'} was replaced by a function that holds on to the policy "
                f"({holder.__code__.co_name} of {where}), so a copy would run the policy's weights. Build the "
                "reference before that patch is made."
            )
    return None


def replaced_forward(policy: nn.Module) -> str | None:
    """A sentence if some module's forward is not its class's, nor one that a library put there to train it: a model
    made from the policy's configuration would lack it."""
    for name, module in policy.named_modules():
        forward = vars(module).get("forward")
        if forward is None:
            continue
        function = getattr(forward, "__func__", forward)
        where = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
        if where.split(".")[0] not in ("trl", "accelerate", "transformers", "torch", "deepspeed", "peft"):
            return (
                f"the forward of {name or 'the policy'} was replaced by one of {where}, which a model made from the "
                "policy's configuration would not have. Use reference.strategy 'swap'."
            )
    return None


def _holder(forward: Any) -> types.FunctionType | None:
    """The function, of those that `forward` is wrapped from, that closes over a module; a copy would go on using it.

    What a method is bound to is no matter: deepcopy binds it to the copy.
    """
    if isinstance(forward, types.MethodType):
        forward = forward.__func__
    if not isinstance(forward, types.FunctionType):
        inner = getattr(forward, "model_forward", None)  # accelerate's ConvertOutputsToFp32
        return None if inner is None else _holder(inner)
    for cell in forward.__closure__ or ():
        held = cell.cell_contents
        if isinstance(held, nn.Module) or isinstance(getattr(held, "__self__", None), nn.Module):
            return forward
        if callable(held) and (found := _holder(held)) is not None:
            return found
    return None


def _stay_in_eval(model: nn.Module) -> None:
    model.eval()
    model.train = types.MethodType(_ignore_train, model)  # type: ignore[method-assign]


def _ignore_train(self: nn.Module, mode: bool = True) -> nn.Module:
    """A reference has no training mode."""
    return self

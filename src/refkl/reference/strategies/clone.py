"""`clone`: a frozen copy that takes memory only for trainable weights.

Weights that the policy does not train share its storage, so a LoRA policy's clone holds only a copy of the adapter.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from refkl.backend import eight_bit_layer, unwrap
from refkl.backend.adapters import quantised
from refkl.messages import size
from refkl.reference.cost import BATCH_BYTES, Cost
from refkl.reference.quantized.layers import FORMATS
from refkl.reference.request import BuildRequest, held_in_place
from refkl.reference.strategies.from_folder import load_pretrained, source_folder
from refkl.reference.strategies.frozen_copy import foreign_forward, frozen_copy
from refkl.reference.strategies.offloaded_clone import OffloadedClone, streamed_cost
from refkl.reference.strategies.quantized_clone import QuantizedClone, why_not_quantized
from refkl.reference.strategies.whole_copy import SharingCopy, must_copy_all
from refkl.reference.streamed.units import unstreamable


class CloneReference(SharingCopy):
    """A deep copy of the policy: frozen, always in eval mode, and sharing the weights that do not train."""

    strategy = "clone"

    @classmethod
    def supports(cls, request: BuildRequest) -> str | None:
        if request.backend.name == "zero3":
            return (
                "under ZeRO-3 a copied parameter is a placeholder of size 0 whose forward fails, and ZeRO-3 exists to "
                "avoid a whole copy on each rank."
            )
        if request.backend.name.startswith("fsdp"):
            return "FSDP shards the policy's parameters, and a whole copy on each rank is not supported under it."
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
                f"{layer} is in 8 bits (bitsandbytes): a copy that shares its weight lacks the state that it computes "
                "with, and in eval mode it computes another result."
            )
        return foreign_forward(unwrap(request.policy))

    @classmethod
    def auto(cls, request: BuildRequest) -> bool:
        return True

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
            return streamed_cost(request, copied, dtype)
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
        what = "of the trainable weights" if request.config.source == "policy" else f"from {request.config.source}"
        if request.config.offload:
            what = "in host memory, streamed through the device layer by layer,"
        what += "" if request.config.quantize is None else f", its linear layers in {request.config.quantize},"
        return f"a frozen copy {what} is the reference and adds {size(cls.cost(request).total)} ({request.backend})"

    @classmethod
    def build(cls, request: BuildRequest, reason: str) -> SharingCopy:
        policy, config = unwrap(request.policy), request.config
        dtype = getattr(torch, config.dtype) if config.dtype else None
        loaded: nn.Module | None = None
        if config.source == "policy":
            share = not must_copy_all(policy, request)
            model, shared = frozen_copy(policy, share=share, on_host=config.offload, quantize=config.quantize)
            source = "the policy as it stood when the reference was built" + quantised(policy)
        else:
            source = source_folder(request)
            model, shared = load_pretrained(request, source, dtype), set()
            if config.quantize is not None:
                loaded = model
                model, _ = frozen_copy(loaded, share=False, quantize=config.quantize)
        if config.source != "policy":
            dtype = None  # the model was loaded in this dtype, and its rotary frequencies stay in fp32
        if dtype is not None or config.device is not None:
            model.to(device=config.device, dtype=dtype)
        reference: SharingCopy
        if config.quantize is not None:
            reference = _Quantized(request, reason, source, model, shared, loaded)
        else:
            reference = (_Offloaded if config.offload else cls)(request, reason, source, model, shared)
        reference.follow_policy()
        reference.fingerprint()
        if isinstance(reference, _Quantized):
            reference.begin(request.calibration)
        return reference


class _Quantized(QuantizedClone, CloneReference):
    """A clone with reference.quantize."""


class _Offloaded(OffloadedClone, CloneReference):
    """A clone with reference.offload."""

"""`swap`: the policy itself; its trainable weights are replaced by saved originals while the reference scores."""

from __future__ import annotations

from peft import PeftModel

from refkl.backend import is_partitioned, local_shard, named_weights, unwrap
from refkl.backend.adapters import quantised
from refkl.messages import size
from refkl.reference.cost import Cost
from refkl.reference.request import BuildRequest, held_in_place
from refkl.reference.strategies.snapshot import OnSnapshot, Snapshot, entries, on_host


class SwapReference(OnSnapshot):
    """A snapshot of the policy's trained tensors."""

    strategy = "swap"

    @classmethod
    def supports(cls, request: BuildRequest) -> str | None:
        policy, config = unwrap(request.policy), request.config
        if (why_not := held_in_place(request)) is not None:
            return why_not
        if config.source != "policy":
            return f"it holds the weights that the policy had, but reference.source asks for {config.source!r}."
        if config.dtype is not None:
            return "its tensors replace the policy's during a score, so reference.dtype cannot be set."
        if config.quantize is not None:
            return "its tensors replace the policy's during a score, so reference.quantize cannot be set."
        if config.device not in (None, "cpu"):
            return (
                f"its tensors are swapped into the policy, so reference.device must be None (beside the policy) or "
                f"'cpu' (in host memory), not {config.device!r}."
            )
        if request.backend.name == "fsdp1":
            return "FSDP1 flattens parameters, trainable and frozen ones together. Use FSDP2."
        trained = [p for p in policy.parameters() if p.requires_grad]
        if not trained:
            return "the policy has no trainable parameters" + (
                " (was its adapter loaded with is_trainable=False?)." if isinstance(policy, PeftModel) else "."
            )
        if any(is_partitioned(p) and not local_shard(p).numel() for p in trained):
            return "parameters that ZeRO-3 keeps on NVMe cannot be swapped in place."
        return None

    @classmethod
    def cost(cls, request: BuildRequest) -> Cost:
        shape, host, kept = request.shape, on_host(request), entries(request)
        held, largest = shape.held(kept), max(shape.held([e]) for e in kept)
        # Swapped in and out, and each time in both directions.
        moved = shape.gathered() + (4 * held if host and shape.step.tokens else 0)
        return Cost(
            device=0 if host else held,
            host=held if host else 0,
            scoring=0 if shape.spread == "whole" and not host else largest,
            flops=shape.forward(),
            moved=moved,
        )

    @classmethod
    def auto(cls, request: BuildRequest) -> bool:
        """Return False if the whole policy trains: a separate copy then costs as much memory, and scores without moving
        weights."""
        return not all(p.requires_grad for p in unwrap(request.policy).parameters())

    @classmethod
    def why(cls, request: BuildRequest) -> str:
        where = "in host memory" if on_host(request) and not request.shape.on_host else ""
        return (
            f"the policy's trainable weights are swapped for a copy from when the reference was built, which adds "
            f"{size(cls.cost(request).total)} {where}".rstrip()
            + f" ({request.backend})"
        )

    @classmethod
    def build(cls, request: BuildRequest, reason: str) -> SwapReference:
        policy = unwrap(request.policy)
        reference = cls(request, reason, "the policy as it stood when the reference was built" + quantised(policy))
        reference.snapshot = Snapshot(policy, on_host=on_host(request))
        reference._share(n for n, _ in named_weights(policy) if n not in reference.snapshot.names)
        reference.fingerprint()
        return reference

    def drop_weights(self) -> bool:
        self._taken.drop()
        return True

"""Which model is the reference, how it is held, and how a batch goes through it and the policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from refkl.config.options import DtypeName, Prefix, Quantization, check_offered


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The model that is the reference, and the way it is held."""

    strategy: str = "auto"
    """"auto" or a name in STRATEGIES ("adapter", "swap", "clone", "shared_trunk", "zero3", "fsdp2"). Auto: a PEFT
    policy with a fresh adapter takes "adapter"; any other of which part trains "swap"; else ZeRO-3 takes "zero3", FSDP2
    "fsdp2" and all else "clone"."""
    source: str = "policy"
    """"policy": the policy as it stands when the reference is built; where a prompt is learned (prompt, prefix and
    p-tuning) the bare base, since a new prompt changes the policy at once. "base": the bare base of a PEFT policy,
    without its adapter, be that trained or not. "pretrained": the weights that the policy was loaded from, also where
    it has been changed since. Anything else is a model folder or hub name: a model of its own class, with the policy's
    vocabulary."""
    dtype: DtypeName | None = None
    """Kind of number the reference is held in; None follows the policy. A lower one puts a floor under the KL."""
    device: str | None = None
    """Where "clone" is held, as in "cuda:1"; for "swap", "cpu" is host memory. None follows the policy; but of "swap",
    what is more than a tenth of a GPU's memory is held by the host."""
    offload: bool = False
    """The reference's weights wait in host memory, and it runs on the device all the same: "clone" streams through it
    layer by layer, "zero3" and "fsdp2" part by part, "swap" exchanges one tensor at a time, as with device "cpu". A
    score moves all of them, so score whole rollout batches."""
    cache: str | None = None
    """A folder: log-probabilities that were scored once are kept there and not scored again, whatever the strategy, in
    this run or a later one. For preference data and repeated prompts; exact divergences are refused then."""
    quantize: Quantization | None = None
    """For "clone": its linear layers, but for the output head, in 8 bits ("int8", torchao) or 4 ("int4", torchao;
    "nf4", bitsandbytes). Puts a floor under the KL, which is measured before the first score: Reference.kl_floor."""
    max_tokens: int | None = None
    """Tokens that are scored at once; of more, rows are scored in parts, long ones with long ones. None for as many as
    the memory that is free allows; but where weights are sharded, for all of them, which moves the weights once. GRPO
    and RLOO then score a whole rollout in such parts, and otherwise in the micro-batches of its losses."""
    averages: Literal["device", "host"] = "device"
    """For a reference in 16 bits, or in fewer, that moves with alpha < 1: where the fp32 averages that it is written
    from are kept. Sharded as the reference is."""
    max_kl_floor: float = 0.05
    """For `quantize`: nats per token, the mean; a reference that rounding moved further than this is refused."""
    options: dict[str, Any] = field(default_factory=dict)
    """The settings of a strategy that was registered with `Options`, by name; refkl's own strategies have none."""

    def __post_init__(self) -> None:
        check_offered("reference", self)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"reference.max_tokens must be at least 1, got {self.max_tokens}.")
        if not self.max_kl_floor > 0:
            raise ValueError(f"reference.max_kl_floor must be positive, got {self.max_kl_floor}.")
        if self.quantize is None and self.max_kl_floor != type(self).max_kl_floor:
            raise ValueError(
                "reference.max_kl_floor limits what quantising does, and reference.quantize is not set. Leave it out."
            )
        if not self.strategy:
            raise ValueError("reference.strategy is empty: use 'auto' or the name of a strategy.")
        if not self.source:
            raise ValueError("reference.source is empty: use 'policy', 'base', 'pretrained' or a model folder.")
        if self.cache == "":
            raise ValueError("reference.cache is empty: name a folder, or leave it out.")


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How a batch goes through policy and reference."""

    prefix: Prefix = "auto"
    """"auto": a prompt that several rows of a batch share is run once, and padding is not, for policy and reference
    alike, where scores and gradients are the same and it costs less. GRPO's and RLOO's micro-batches of one optimizer
    step are put together so that completions of one prompt meet. "off": batches are run as they are."""

    def __post_init__(self) -> None:
        check_offered("scoring", self)

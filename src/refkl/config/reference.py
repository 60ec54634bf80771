"""Configuration of the reference model, and of how policy and reference compute a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from refkl.config.options import DtypeName, Prefix, Quantization, check_offered


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The reference model and how it is held."""

    strategy: str = "auto"
    """"auto" or a name in STRATEGIES ("adapter", "swap", "clone", "shared_trunk", "zero3", "fsdp2"). "auto" takes
    "adapter" for a PEFT policy with a fresh adapter, and "swap" for any other policy of which only a part trains.
    Otherwise it takes "zero3" under ZeRO-3, "fsdp2" under FSDP2, and else "clone"."""
    source: str = "policy"
    """"policy": the policy as it is when the reference is built. If the policy learns a prompt (prompt, prefix and
    p-tuning), it is the bare base, since a new prompt changes the policy at once. "base": the bare base of a PEFT
    policy, without its adapter, whether the adapter was trained or not. "pretrained": the weights that the policy was
    loaded from, even if it has been changed since. Anything else is a model folder or hub name: a model of the class
    that the folder names, with the policy's vocabulary."""
    dtype: DtypeName | None = None
    """Dtype of the reference's weights; None follows the policy. With a lower precision, the KL is nonzero even to an
    untrained policy."""
    device: str | None = None
    """Device of the reference for "clone", such as "cuda:1"; for "swap", "cpu" means host memory. None follows the
    policy, except that "swap" uses host memory if its copy takes more than a tenth of the GPU's memory."""
    offload: bool = False
    """Keep the reference's weights in host memory, while it still runs on the device. "clone" streams them through the
    device layer by layer, "zero3" and "fsdp2" part by part; "swap" exchanges one tensor at a time, as with device
    "cpu". Every score moves all of the weights, so score whole rollout batches."""
    cache: str | None = None
    """Folder in which log-probabilities are stored, so that the same tokens are not scored again, in this run or a
    later one, with any strategy. It helps with preference data and repeated prompts. Exact divergences are refused with
    it."""
    quantize: Quantization | None = None
    """Quantisation of the reference's linear layers except the output head, for "clone": 8 bits ("int8", torchao) or 4
    bits ("int4", torchao; "nf4", bitsandbytes). A quantised reference has a nonzero KL even to an untrained policy.
    refkl measures this floor before the first score: Reference.kl_floor."""
    max_tokens: int | None = None
    """Largest number of tokens to score at once. If a batch has more, it is scored in parts, with rows of similar
    length together. None means as many as the free memory allows, or all of them if weights are sharded, which moves
    the weights only once. If it is set or weights are moved, GRPO and RLOO score a whole rollout in such parts;
    otherwise they score the micro-batches of their losses."""
    averages: Literal["device", "host"] = "device"
    """Place of the fp32 averages that a reference in 16 bits or fewer is written from if it moves with alpha < 1. They
    are sharded as the reference is."""
    max_kl_floor: float = 0.05
    """Largest allowed floor of the KL of a quantised reference (`quantize`), in nats per token, as a mean. A reference
    above it is refused."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of a strategy that was registered with `Options`, by name; refkl's own strategies have none."""

    def __post_init__(self) -> None:
        check_offered("reference", self)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"reference.max_tokens must be at least 1, got {self.max_tokens}.")
        if not self.max_kl_floor > 0:
            raise ValueError(f"reference.max_kl_floor must be positive, got {self.max_kl_floor}.")
        if self.quantize is None and self.max_kl_floor != type(self).max_kl_floor:
            raise ValueError(
                "reference.max_kl_floor limits the KL floor of a quantised reference, and reference.quantize is not "
                "set. Leave it out."
            )
        if not self.strategy:
            raise ValueError("reference.strategy is empty: use 'auto' or the name of a strategy.")
        if not self.source:
            raise ValueError("reference.source is empty: use 'policy', 'base', 'pretrained' or a model folder.")
        if self.cache == "":
            raise ValueError("reference.cache is empty: name a folder, or leave it out.")


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Settings for the computation of a batch by policy and reference."""

    prefix: Prefix = "auto"
    """"auto": if several rows of a batch share a prompt, refkl computes it once and skips padding, in policy and
    reference alike, when scores and gradients stay the same and it costs less. The GRPO and RLOO micro-batches of one
    optimizer step are put together so that completions of one prompt are in the same one. "off": batches are computed
    as they are."""

    def __post_init__(self) -> None:
        check_offered("scoring", self)

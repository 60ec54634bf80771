"""Which strategy holds the reference: the registry, and the choice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from peft import PeftModel
from torch import nn

from refkl.backend import detect, learned_prompt, unwrap
from refkl.config import ReferenceConfig
from refkl.messages import unknown
from refkl.reference.contract import BuildRequest, Reference
from refkl.reference.strategies.adapter import AdapterReference
from refkl.reference.strategies.clone import CloneReference
from refkl.reference.strategies.fsdp2 import FSDP2Reference
from refkl.reference.strategies.shared_trunk import SharedTrunkReference
from refkl.reference.strategies.swap import SwapReference
from refkl.reference.strategies.zero3 import Zero3Reference
from refkl.types import TokenBatch

if TYPE_CHECKING:
    from accelerate import Accelerator

STRATEGIES: dict[str, type[Reference]] = {
    "adapter": AdapterReference,
    "zero3": Zero3Reference,
    "fsdp2": FSDP2Reference,
    "swap": SwapReference,
    "clone": CloneReference,
    "shared_trunk": SharedTrunkReference,
}
"""Every strategy by its name. Auto takes the first of those that cost the same."""


def register_strategy(name: str, cls: type[Reference]) -> None:
    """Add a strategy of your own (see Reference for the contract).

    Raises:
        ValueError: the name is taken, or reserved, or `cls` is no Reference.
    """
    if name in STRATEGIES or name == "auto":
        raise ValueError(f"A strategy called {name!r} exists already; register yours under another name.")
    if not (isinstance(cls, type) and issubclass(cls, Reference)):
        raise ValueError(f"A strategy must be a subclass of refkl.Reference, got {cls!r}.")
    STRATEGIES[name] = cls


def build_reference(
    policy: nn.Module,
    config: str | ReferenceConfig = "auto",
    accelerator: Accelerator | None = None,
    *,
    calibration: TokenBatch | Iterable[TokenBatch] | None = None,
) -> Reference:
    """Hold a reference for `policy`: by default, the policy as it stands now; the bare base under a learned prompt.

    Args:
        policy: a causal language model, before or after `accelerator.prepare`.
        config: "auto", the name of a strategy, or a ReferenceConfig.
        accelerator: the one that prepares the policy; scores run under its autocast, and its DeepSpeed or FSDP
            settings are taken into account before it has prepared anything.
        calibration: for reference.quantize: tokens to measure the floor under the KL on (`Reference.kl_floor`), now. Of
            several processes each gives its own. Without it the first batch that is scored is taken, by all processes
            together, with the policy as the full-precision side; it must not have trained by then. (For another
            reference.source the model that was loaded stays in host memory until then.)

    Returns:
        A Reference; `.strategy` says which one, `.reason` why, in a sentence.

    Raises:
        ValueError: an unknown name; or a strategy that cannot work here, with the reason and the one to use instead; or
            quantising puts a floor under the KL that is above `reference.max_kl_floor`.
    """
    if isinstance(config, str):
        config = ReferenceConfig(strategy=config)
    if not isinstance(config, ReferenceConfig):
        raise ValueError(
            f"A reference is asked for by the name of a strategy or a ReferenceConfig, and a {type(config).__name__} "
            "was given. One with other weights than the policy's is ReferenceConfig(source='folder of that model')."
        )
    if calibration is not None and config.quantize is None:
        raise ValueError("calibration measures what quantising does, and reference.quantize is not set. Leave it out.")
    request = BuildRequest(policy, config, detect(policy, accelerator), accelerator, calibration=calibration)
    _check_source(request)
    if config.strategy != "auto":
        if config.strategy not in STRATEGIES:
            raise unknown("strategy", config.strategy, [*STRATEGIES, "auto"])
        if (why_not := STRATEGIES[config.strategy].supports(request)) is not None:
            raise ValueError(f"reference strategy {config.strategy!r} cannot work here: {why_not} {_instead(request)}")
        chosen = STRATEGIES[config.strategy]
        return chosen.build(request, f"asked for by name; {chosen.why(request)}")

    chosen = STRATEGIES[choose(request)]
    return chosen.build(request, chosen.why(request))


def choose(request: BuildRequest) -> str:
    """The strategy that auto takes, for a policy in memory or a planned one: of those that can, the cheapest.

    Raises:
        ValueError: none can, with the reason of each.
    """
    refused = {name: cls.supports(request) for name, cls in STRATEGIES.items()}
    able = [name for name, why_not in refused.items() if why_not is None and STRATEGIES[name].auto(request)]
    if not able:
        by_name = [repr(name) for name, why_not in refused.items() if why_not is None]
        raise ValueError(
            f"'auto' finds no strategy to hold a reference for this policy on {request.backend}"
            + (f"; asked for by name, {' or '.join(by_name)} can" if by_name else "")
            + ":\n"
            + "\n".join(f"  {name}: {why_not}" for name, why_not in refused.items() if why_not is not None)
        )
    return _cheapest(able, request)


def _cheapest(names: list[str], request: BuildRequest) -> str:
    """By bytes on the device, then on the host; of equals the first."""
    costs = {name: STRATEGIES[name].cost(request) for name in names}
    return min(names, key=lambda name: (costs[name].device, costs[name].host))


def _check_source(request: BuildRequest) -> None:
    inner, source = unwrap(request.policy), request.config.source
    if source == "base" and not isinstance(inner, PeftModel):
        raise ValueError(
            f"reference.source 'base' is the bare model under a PEFT adapter, and the policy is a "
            f"{type(inner).__name__} without one. Use 'policy' for the policy as it stands, or 'pretrained' for the "
            "weights that it was loaded from."
        )
    if source != "policy" or not isinstance(inner, PeftModel) or learned_prompt(inner) is not None:
        return
    if not any(p.requires_grad for p in inner.parameters()):
        raise ValueError(
            "The policy is a PEFT model of which nothing trains, so it would stay its own reference: its adapter was "
            "loaded with is_trainable=False, or frozen. Load it with is_trainable=True, or set reference.source to the "
            "model to compare with: 'base', or a folder."
        )


def _instead(request: BuildRequest) -> str:
    able = [name for name, cls in STRATEGIES.items() if cls.supports(request) is None]
    able = [name for name in able if STRATEGIES[name].auto(request)] or able
    if not able:
        return "No other strategy can either."
    return f"Use {_cheapest(able, request)!r} instead."

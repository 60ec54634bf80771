"""The registry of strategies, and the choice of the one that holds the reference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass, replace
from inspect import isabstract
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import torch
from peft import PeftModel
from torch import nn

from refkl.backend import detect, holds_shards, learned_prompt, outside_inference_mode, unwrap
from refkl.config import ReferenceConfig
from refkl.messages import nearest, unknown
from refkl.reference.cached.reference import CachedReference
from refkl.reference.contract import Reference
from refkl.reference.request import BuildRequest
from refkl.reference.strategies.adapter import AdapterReference
from refkl.reference.strategies.clone import CloneReference
from refkl.reference.strategies.frozen_copy import runs_another
from refkl.reference.strategies.fsdp2 import FSDP2Reference
from refkl.reference.strategies.given_model import GivenModel
from refkl.reference.strategies.shared_trunk import SharedTrunkReference
from refkl.reference.strategies.swap import SwapReference
from refkl.reference.strategies.zero3 import Zero3Reference
from refkl.scoring import check_causal
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
"""Every strategy by its name. "auto" takes the first of those that cost the same."""
_OURS = frozenset(STRATEGIES.values())


def register_strategy(name: str, cls: type[Reference]) -> None:
    """Register your own strategy (see Reference for the contract).

    Raises:
        ValueError: the name is taken, or reserved, or is not the class's `strategy`; `cls` is not a Reference, or lacks
            methods that every reference has.
    """
    if name in STRATEGIES or name == "auto":
        raise ValueError(f"A strategy called {name!r} exists already; register yours under another name.")
    if not (isinstance(cls, type) and issubclass(cls, Reference)):
        raise ValueError(f"A strategy must be a subclass of refkl.Reference, got {cls!r}.")
    if isabstract(cls):
        raise ValueError(
            f"{cls.__name__} lacks {', '.join(sorted(cls.__abstractmethods__))}. Write these methods first."
        )
    if (own := getattr(cls, "strategy", None)) != name:
        raise ValueError(
            f"{cls.__name__} was to be registered as {name!r}, but its attribute `strategy` is {own!r}: runs would "
            f"record another strategy than they were asked for. Set {cls.__name__}.strategy = {name!r}."
        )
    if cls.Options is not None and not is_dataclass(cls.Options):
        raise ValueError(f"{cls.__name__}.Options must be a dataclass, got {cls.Options!r}.")
    STRATEGIES[name] = cls


def build_reference(
    policy: nn.Module,
    config: str | ReferenceConfig = "auto",
    accelerator: Accelerator | None = None,
    *,
    model: nn.Module | None = None,
    calibration: TokenBatch | Iterable[TokenBatch] | None = None,
) -> Reference:
    """Build a reference for `policy`: by default the policy as it is now, or the bare base under a learned prompt.

    Args:
        policy: a causal language model, before or after `accelerator.prepare`.
        config: "auto", the name of a strategy, or a ReferenceConfig.
        accelerator: the accelerator that prepares the policy. Scores run under its autocast, and its DeepSpeed or FSDP
            settings apply even before it has prepared anything.
        model: a model that you hold, to be the reference as it is: a causal language model with the policy's
            vocabulary. It is not copied, but frozen, kept in eval mode and moved to the policy's device.
        calibration: with reference.quantize, tokens on which the KL floor (`Reference.kl_floor`) is measured now; each
            process gives its own. Without it, all processes together measure the floor on the first batch that is
            scored, with the policy as the full-precision side, which must not have trained by then. (With another
            reference.source, the loaded model stays in host memory until then.)

    Returns:
        A Reference. `.strategy` is the name of its strategy, and `.reason` says in a sentence why it was chosen.

    Raises:
        ValueError: the policy is no causal language model; the name is unknown; the strategy cannot work here (the
            message gives the reason and the strategy to use instead); this machine has no `reference.device`; the KL
            floor of a quantised reference is above `reference.max_kl_floor`; `model` is the policy, shares weights that
            the policy trains, or cannot score the policy's tokens.
    """
    if isinstance(config, str):
        config = ReferenceConfig(strategy=config)
    if not isinstance(config, ReferenceConfig):
        raise ValueError(
            f"A reference is asked for by the name of a strategy or a ReferenceConfig, but a {type(config).__name__} "
            "was given. To use a model that you hold, pass it as model= of build_reference, or as ref_model= of TRL's "
            "trainers. For weights from a folder, use ReferenceConfig(source='folder of that model')."
        )
    if calibration is not None and config.quantize is None:
        raise ValueError("calibration was given, but reference.quantize is not set. Set it, or leave calibration out.")
    with outside_inference_mode():
        request = BuildRequest(policy, config, detect(policy, accelerator), accelerator, calibration=calibration)
        check_causal(policy, _device(policy, accelerator))
        reference = _built(request) if model is None else GivenModel.around(model, request)
        return reference if config.cache is None else CachedReference(reference, config.cache)


def _built(request: BuildRequest) -> Reference:
    config = request.config
    _check_source(request)
    if config.strategy == "auto":
        if config.options:
            raise ValueError(
                f"reference.options ({', '.join(config.options)}) are a strategy's own settings, but "
                "reference.strategy is 'auto'. Set reference.strategy to the strategy that they are for."
            )
        name = choose(request)
        reason = STRATEGIES[name].why(request)
    else:
        name = config.strategy
        if name not in STRATEGIES:
            found = unknown("strategy", name, [*STRATEGIES, "auto"])
            raise ValueError(
                f"{found} A strategy of your own is known once its module is imported: in a configuration file, list "
                "it in imports."
            )
        request = replace(request, options=filled_options(name, config.options))
        if (why_not := why_not_here(name, request)) is not None:
            raise ValueError(f"reference strategy {name!r} cannot work here: {why_not} {_instead(request)}")
        reason = f"asked for by name; {STRATEGIES[name].why(request)}"
    _check_device(config.device)
    built = STRATEGIES[name].build(request, reason)
    _check_built(name, built, unwrap(request.policy))
    return built


def why_not_here(name: str, request: BuildRequest) -> str | None:
    """Return None if the strategy can hold the reference here, else a sentence that says why not.

    A field of ReferenceConfig that the strategy does not take is also a reason: no field is silently ignored.
    """
    cls, config = STRATEGIES[name], request.config
    for field in fields(config):
        if field.name in ("strategy", "cache", "options") or field.name in cls.takes:
            continue
        if getattr(config, field.name) != field.default:
            return f"it takes no reference.{field.name}. Leave that field out."
    return cls.supports(request)


def filled_options(name: str, values: dict[str, Any]) -> Any:
    """Return the strategy's `Options` with these values; None for a strategy that has none.

    Raises:
        ValueError: a name is not an option (the message gives the nearest one), an option is missing, or `Options`
            refuses a value.
    """
    options = STRATEGIES[name].Options
    known = [] if options is None else [field.name for field in fields(options)]
    for given in values:
        if given not in known:
            listed = f" Known: {', '.join(known)}." if known else " It has none."
            raise ValueError(
                f"reference.options.{given} is not an option of strategy {name!r}.{nearest(given, known)}{listed}"
            )
    if options is None:
        return None
    for field in fields(options):
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"Strategy {name!r} needs reference.options.{field.name}, which is not set.")
    hints = get_type_hints(options)
    for given, value in values.items():
        kinds = get_args(hints[given]) or (hints[given],)
        if set(kinds) <= _PLAIN and type(value) not in kinds and not (type(value) is int and float in kinds):
            wanted = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
            raise ValueError(
                f"reference.options.{given} is {value!r} of type {type(value).__name__}, but strategy {name!r} takes "
                f"{wanted}."
            )
    return options(**values)


_PLAIN = {bool, int, float, str, NoneType}
"""Types of which an option's value is checked."""


def _check_built(name: str, built: Any, policy: nn.Module) -> None:
    """Raise ValueError if what a strategy's `build` returned is no reference, or runs the policy by mistake."""
    if not isinstance(built, Reference):
        raise ValueError(
            f"{STRATEGIES[name].__name__}.build must return a Reference, but returned a {type(built).__name__}."
        )
    for attribute, module in vars(built).items():
        if isinstance(module, nn.Module) and (found := runs_another(module, policy)) is not None:
            raise ValueError(
                f"The module {attribute} of reference strategy {name!r} runs the policy: the forward of "
                f"{found or 'the module itself'} was replaced by a function that is bound to the policy, and "
                "copy.deepcopy kept that. Copy the policy with refkl.reference.frozen_copy, or delete 'forward' from "
                "the __dict__ of the copied modules."
            )


def choose(request: BuildRequest) -> str:
    """Return the strategy that "auto" takes, for a policy in memory or a planned one: the cheapest that can work.

    Raises:
        ValueError: no strategy can; the message gives the reason of each.
    """
    refused = {name: why_not_here(name, request) for name, cls in STRATEGIES.items() if cls.Options is None}
    able = [name for name, why_not in refused.items() if why_not is None and _auto_may(name, request)]
    if not able:
        by_name = [repr(name) for name, why_not in refused.items() if why_not is None]
        raise ValueError(
            f"'auto' finds no strategy to hold a reference for this policy on {request.backend}"
            + (f"; asked for by name, {' or '.join(by_name)} can" if by_name else "")
            + ":\n"
            + "\n".join(f"  {name}: {why_not}" for name, why_not in refused.items() if why_not is not None)
        )
    return _cheapest(able, request)


def _auto_may(name: str, request: BuildRequest) -> bool:
    """Return True if "auto" may take the strategy.

    A user's strategy must define `auto` in its own class: one inherited from a strategy of refkl does not count.
    """
    cls = STRATEGIES[name]
    return (cls in _OURS or "auto" in vars(cls)) and cls.auto(request)


def _cheapest(names: list[str], request: BuildRequest) -> str:
    """Return the strategy with the fewest bytes on the device, then on the host; the first of equals."""
    costs = {name: STRATEGIES[name].cost(request) for name in names}
    return min(names, key=lambda name: (costs[name].device, costs[name].host))


def _device(model: nn.Module, accelerator: Accelerator | None) -> torch.device:
    """Return the device on which a model scores."""
    if accelerator is not None and holds_shards(model):
        return torch.device(accelerator.device)
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _check_device(name: str | None) -> None:
    """Raise ValueError unless this machine has the device."""
    if name is None:
        return
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"reference.device {name!r} is not a device. Use 'cpu', 'cuda' or 'cuda:1'.") from None
    if device.type == "cpu":
        return
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if here is None or here.type != device.type:
        found = "no accelerator" if here is None else f"only {here.type} devices"
        raise ValueError(
            f"reference.device is {name!r}, but torch finds {found} on this machine. Leave it out, so that the "
            "reference is where the policy is, or use 'cpu'."
        )
    if device.index is not None and device.index >= (count := torch.accelerator.device_count()):
        raise ValueError(
            f"reference.device is {name!r}, but this process sees {count} device{'s' if count > 1 else ''}, numbered "
            "from 0. Use one of these, or leave reference.device out."
        )


def _check_source(request: BuildRequest) -> None:
    inner, source = unwrap(request.policy), request.config.source
    if source == "base" and not isinstance(inner, PeftModel):
        raise ValueError(
            f"reference.source 'base' is the bare model under a PEFT adapter, but the policy is a "
            f"{type(inner).__name__} without one. Use 'policy' for the policy as it is now, or 'pretrained' for the "
            "weights that it was loaded from."
        )
    if source != "policy" or not isinstance(inner, PeftModel) or learned_prompt(inner) is not None:
        return
    if not any(p.requires_grad for p in inner.parameters()):
        raise ValueError(
            "The policy is a PEFT model without trainable parameters, so it would always equal its reference: its "
            "adapter was loaded with is_trainable=False, or frozen. Load it with is_trainable=True, or set "
            "reference.source to the model to compare with: 'base', or a folder."
        )


def _instead(request: BuildRequest) -> str:
    able = [n for n, cls in STRATEGIES.items() if cls.Options is None and why_not_here(n, request) is None]
    able = [name for name in able if _auto_may(name, request)] or able
    if not able:
        return "No other strategy can either."
    return f"Use {_cheapest(able, request)!r} instead."

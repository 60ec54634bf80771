"""Checks that a PEFT policy with its adapter switched off is its base, or is the policy as it is now."""

from __future__ import annotations

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from refkl.backend import evaluating, is_partitioned, learned_prompt, parameters_in, submodules, whole
from refkl.backend.adapters import adapter_parameters, adapter_tensors, switched_off
from refkl.reference.request import BuildRequest

_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights that move a part of the base weights into the adapter."""


_LEAVES_THE_BASE = {
    "ADALORA", "BEFT", "BOFT", "C3A", "CARTRIDGE", "CPT", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA",
    "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "MULTITASK_PROMPT_TUNING", "OFT", "OSF",
    "PEANUT", "PREFIX_TUNING", "PROMPT_TUNING", "PSOFT", "PVERA", "P_TUNING", "RANDLORA", "ROAD", "SHIRA",
    "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
"""Kinds of adapter that give back the base bit for bit when they are off, after any training; each is tested. An
adapter of another kind is accepted only if it is fresh, after a check of values."""


_FROM_DISK = "Set reference.source to 'pretrained' for the weights that the policy was loaded from."


def is_bare(request: BuildRequest) -> bool:
    """Return True if the reference is the base under the adapter, for a trained adapter too."""
    return request.config.source == "base" or learned_prompt(request.policy) is not None


def not_provably_bare(policy: PeftModel, *, fresh: bool) -> str | None:
    """Return None if the policy with its adapter off is the base as it was loaded, else a sentence that says why not.

    Set `fresh` if the adapter is known to be new.
    """
    changes = map(_changes_base, policy.peft_config.values())
    why_not = _merged(policy) or next(filter(None, changes), None) or base_trains(policy) or _statistics_move(policy)
    kind = policy.active_peft_config.peft_type.value
    known = fresh or kind in _LEAVES_THE_BASE
    if why_not is None and not known and _not_fresh(policy) is not None:
        why_not = f"it is not known if {kind} leaves the base as it was loaded."
    return None if why_not is None else f"{why_not} {_FROM_DISK}"


def _changes_base(config: PeftConfig) -> str | None:
    """Return a sentence if an adapter of this configuration changes the base when it is made or trained, else None."""
    options = config.to_dict()
    # PiSSA's value may end with a number of iterations.
    if str(options.get("init_lora_weights")).lower().startswith(_CHANGES_THE_BASE):
        return f"making the adapter changed the base (init_lora_weights={options['init_lora_weights']!r})."
    if options.get("layer_replication"):
        return "making the adapter changed the base (layer_replication)."
    if options.get("bias", "none") != "none":
        return f"the adapter's bias={options['bias']!r} trains the base's own biases, and so changed the base."
    return None


def not_provably_off(policy: PeftModel, *, fresh: bool) -> str | None:
    """Return None if the policy with its adapter off is the policy as it is now, else a sentence that says why not.

    Set `fresh` if the adapter is known to be new, so that its values need no check.
    """
    if len(policy.active_adapters) != 1:
        return f"it needs exactly one active adapter, but found {policy.active_adapters}."
    if why_not := _merged(policy):
        return why_not
    adapter = adapter_tensors(policy)
    trained = {id(p) for p in policy.parameters() if p.requires_grad}
    if not trained & adapter:
        return "the policy's adapter does not train (was it loaded with is_trainable=False?)."
    return base_trains(policy) or _statistics_move(policy) or (None if fresh else _not_fresh(policy))


def base_trains(policy: PeftModel) -> str | None:
    trained = {id(parameter) for parameter in parameters_in(submodules(policy)) if parameter.requires_grad}
    if outside := trained - adapter_parameters(policy):
        name = next(name for name, parameter in policy.named_parameters() if id(parameter) in outside)
        return f"{name} trains and is not part of the adapter, so training would change the reference too."
    return None


def _statistics_move(policy: PeftModel) -> str | None:
    for name, module in policy.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            return (
                f"{name} is a {type(module).__name__}, whose running statistics change while the policy trains. They "
                "belong to the base, so the reference would change too."
            )
    return None


def _merged(policy: PeftModel) -> str | None:
    if any(isinstance(m, BaseTunerLayer) and m.merged for m in submodules(policy)):
        return "the adapter is merged into the base; switching it off would unmerge it and leave it unmerged."
    return None


def _not_fresh(policy: PeftModel) -> str | None:
    """Return None if the policy has the same values with its adapter on and off, else a sentence that says why not."""
    for name, module in policy.named_modules():
        if found := _trained_wrapper(module):
            return f"{name}.{found} differs from the base weights that it replaces: the adapter was trained already."
    layers = [(n, m) for n, m in policy.named_modules() if isinstance(m, BaseTunerLayer)]
    if all(isinstance(m, LoraLayer | TrainableTokensLayer) for _, m in layers):
        for name, module in layers:
            if isinstance(module, LoraLayer) and (found := _trained_lora(module)):
                return f"{name}.{found} is not zero: the adapter was trained already, or making it changed the base."
        return None
    if any(is_partitioned(p) for p in policy.parameters()):
        return "under ZeRO-3 refkl can check only for LoRA adapters that the policy is the same without the adapter."
    # For any other kind, run the model: a fresh adapter gives the same numbers on and off.
    ids = torch.arange(8, device=policy.device)[None] % policy.config.vocab_size
    with evaluating(policy), torch.no_grad():
        on = policy(input_ids=ids).logits
        with switched_off(policy):
            off = policy(input_ids=ids).logits
    if not torch.allclose(on, off, rtol=1e-5, atol=1e-5):
        return (
            f"with its adapter off the policy gives other logits (by up to {(on - off).abs().max().item():.2g}): the "
            "adapter was trained already, or making it changed the base."
        )
    return None


def _trained_wrapper(module: nn.Module) -> str | None:
    """Return the name of a tensor in modules_to_save or trained token rows that differs from the base's, or None."""
    if isinstance(module, ModulesToSaveWrapper):
        base = dict(module.original_module.named_parameters())
        for adapter in module.active_adapters:
            for name, parameter in module.modules_to_save[adapter].named_parameters():
                if not torch.equal(whole(parameter), whole(base[name])):
                    return f"modules_to_save.{adapter}.{name}"
    if isinstance(module, TrainableTokensLayer):
        weight = module.get_base_layer().get_parameter("weight")
        for adapter in module.active_adapters:
            rows: Tensor = module.trainable_tokens_delta[adapter]
            if not torch.equal(whole(rows), whole(weight)[module.token_indices[adapter]]):
                return f"trainable_tokens_delta.{adapter}"
    return None


def _trained_lora(layer: LoraLayer) -> str | None:
    """Return the name of an active adapter's factor that makes the layer differ from its base, or None."""
    for adapter in layer.active_adapters:
        for first, second in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            factors = [d[adapter] for d in (getattr(layer, first), getattr(layer, second)) if adapter in d]
            weights = [f if isinstance(f, Tensor) else f.weight for f in factors]
            # The product is zero if one of the factors is.
            if weights and all(bool(whole(w).any()) for w in weights):
                return f"{second}.{adapter}"
        for module in (layer.lora_B[adapter],) if adapter in layer.lora_B else ():
            bias = getattr(module, "bias", None)
            if bias is not None and bool(whole(bias).any()):
                return f"lora_B.{adapter}.bias"
    return None

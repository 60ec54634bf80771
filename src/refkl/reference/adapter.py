"""`adapter`: the PEFT policy itself, with its adapter switched off. Adds nothing.

Right only where off is the policy as it stood when the reference was built: a fresh adapter that trains alone.
`disable_adapter()` does not give that back for a trained adapter, for one whose making changed the base (PiSSA, OLoRA,
CorDA, LoftQ, LoRA-GA), with `bias="all"`, with base parameters unfrozen by hand, or on a merged model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from refkl.backend import Weight, evaluating, is_partitioned, unwrap, weights_of, whole
from refkl.reference.base import BuildRequest, Reference
from refkl.reference.peft_layers import quantised
from refkl.reference.shape import Cost
from refkl.scoring import Head, find_head


class AdapterReference(Reference):
    """The policy with its adapter off."""

    strategy = "adapter"

    def __init__(self, request: BuildRequest, reason: str) -> None:
        inner = unwrap(request.policy)
        assert isinstance(inner, PeftModel)
        super().__init__(request, reason, "the policy's base, under its fresh adapter" + quantised(inner))
        self._policy: PeftModel = inner

    @classmethod
    def supports(cls, request: BuildRequest) -> str | None:
        policy = unwrap(request.policy)
        if not isinstance(policy, PeftModel):
            return f"the policy is a {type(policy).__name__} and has no PEFT adapter to switch off."
        if request.backend.name == "fsdp1":
            return "FSDP1 flattens adapter and base into one parameter. Use FSDP2."
        config = request.config
        if config.source != "policy":
            return f"it holds the policy's own base, and reference.source asks for {config.source!r}."
        if config.dtype is not None or config.device is not None:
            return "it shares the policy's weights, so reference.dtype and reference.device cannot be set."
        if config.offload:
            return "it has no weights of its own for reference.offload to keep in host memory."
        if config.quantize is not None:
            return "it shares the policy's weights, so reference.quantize cannot be set."
        return _not_provably_off(policy, fresh=request.planned)

    @classmethod
    def cost(cls, request: BuildRequest) -> Cost:
        shape = request.shape
        return Cost(flops=shape.forward(e for e in shape.entries if e.base), moved=shape.gathered())

    @classmethod
    def why(cls, request: BuildRequest) -> str:
        return "the policy's adapter is fresh and trains alone, so switched off it is the reference and adds no memory"

    @classmethod
    def build(cls, request: BuildRequest, reason: str) -> AdapterReference:
        reference = cls(request, reason)
        reference.fingerprint()
        return reference

    @contextmanager
    def _active(self) -> Iterator[nn.Module]:
        if why_not := _merged(self._policy) or _base_trains(self._policy):
            raise ValueError(f"The policy with its adapter off is not the reference: {why_not}")
        with _switched_off(self._policy):
            yield self._policy

    def head(self) -> Head | None:
        """The policy's own: one that an adapter changes is not found."""
        return find_head(self._policy)

    def _free(self) -> bool:
        return False

    def _owns(self, name: str) -> bool:
        return False

    def _weights(self) -> Iterator[Weight]:
        return weights_of(self._policy, without=_adapter_tensors(self._policy))

    def check_movable(self, policy: nn.Module) -> None:
        raise ValueError(
            "strategy 'adapter' cannot move: its reference is the base that the policy shares. Use reference.strategy "
            "'clone' (which copies the adapter alone) for a run with sync."
        )

    def _move(self, policy: nn.Module, alpha: float) -> None:
        self.check_movable(policy)


def _not_provably_off(policy: PeftModel, *, fresh: bool) -> str | None:
    """A sentence unless off is the policy as it stands; `fresh`: known to be so, without a look at values."""
    if len(policy.active_adapters) != 1 or policy.active_peft_config.is_prompt_learning:
        return (
            f"it needs exactly one active adapter that changes layers, and found {policy.active_adapters} of type "
            f"{policy.active_peft_config.peft_type.value}."
        )
    if why_not := _merged(policy):
        return why_not
    adapter = _adapter_tensors(policy)
    trained = {id(p) for p in policy.parameters() if p.requires_grad}
    if not trained & adapter:
        return "the policy's adapter does not train (was it loaded with is_trainable=False?)."
    return _base_trains(policy) or (None if fresh else _not_fresh(policy))


@contextmanager
def _switched_off(policy: PeftModel) -> Iterator[None]:
    """PEFT's disable_adapter, which turns requires_grad off and then on for the whole adapter, without that: what the
    user froze in the adapter would train afterwards."""
    trains = [(p, p.requires_grad) for p in policy.parameters()]
    try:
        with policy.disable_adapter():
            yield
    finally:
        for parameter, flag in trains:
            parameter.requires_grad_(flag)


def _base_trains(policy: PeftModel) -> str | None:
    adapter = _adapter_tensors(policy)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and id(parameter) not in adapter:
            return f"{name} trains and is not part of the adapter, so it would move the reference too."
    return None


def _merged(policy: PeftModel) -> str | None:
    if any(isinstance(m, BaseTunerLayer) and m.merged for m in policy.modules()):
        return "the adapter is merged into the base; switching it off would unmerge it and leave it so."
    return None


def _adapter_tensors(policy: PeftModel) -> set[int]:
    """ids of all tensors that belong to an adapter."""
    owned: set[int] = set()
    for module in policy.modules():
        if isinstance(module, BaseTunerLayer):
            for name in (*module.adapter_layer_names, *module.other_param_names):
                part = getattr(module, name, None)  # not every layer of a tuner has all of them
                if isinstance(part, nn.Module | nn.ParameterDict):
                    owned.update(id(t) for t in (*part.parameters(), *part.buffers()))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            base = {id(t) for t in module.original_module.parameters()}
            owned.update(id(t) for t in module.parameters() if id(t) not in base)
    return owned


def _not_fresh(policy: PeftModel) -> str | None:
    """A sentence unless the policy with its adapter on is, by value, the policy with its adapter off."""
    for name, module in policy.named_modules():
        if found := _trained_wrapper(module):
            return f"{name}.{found} differs from what it stands for: the adapter was trained already."
    layers = [(n, m) for n, m in policy.named_modules() if isinstance(m, BaseTunerLayer)]
    if all(isinstance(m, LoraLayer | TrainableTokensLayer) for _, m in layers):
        for name, module in layers:
            if isinstance(module, LoraLayer) and (found := _trained_lora(module)):
                return f"{name}.{found} is not zero: the adapter was trained already, or its making changed the base."
        return None
    if any(is_partitioned(p) for p in policy.parameters()):
        return "under ZeRO-3 only a fresh LoRA adapter can be told to be off when switched off."
    # Any other kind: ask the model. A fresh adapter gives the same numbers on and off.
    ids = torch.arange(8, device=policy.device)[None] % policy.config.vocab_size
    with evaluating(policy), torch.no_grad():
        on = policy(input_ids=ids).logits
        with _switched_off(policy):
            off = policy(input_ids=ids).logits
    if not torch.allclose(on, off, rtol=1e-5, atol=1e-5):
        return (
            f"switched off the policy gives other logits (by up to {(on - off).abs().max().item():.2g}): the adapter "
            "was trained already, or its making changed the base."
        )
    return None


def _trained_wrapper(module: nn.Module) -> str | None:
    """What in a module_to_save or in trained token rows is no longer the base's own, or None."""
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
    """The name of an active adapter's factor that keeps the layer from being its base, or None."""
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

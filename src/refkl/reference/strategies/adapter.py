"""`adapter`: the PEFT policy itself, with its adapter switched off. Adds nothing.

Where the reference is to be the policy as it stood when built, right for a fresh adapter alone. Where it is to be the
bare base (reference.source "base"; a learned prompt, of which no state leaves the policy as it is), right for a trained
one too. `disable_adapter()` gives back neither if making the adapter changed the base (PiSSA, OLoRA, CorDA, LoftQ,
LoRA-GA), with `bias="all"`, with base parameters unfrozen by hand, or on a merged model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera import VeraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from refkl.backend import (
    Weight,
    evaluating,
    is_partitioned,
    layout_of,
    learned_prompt,
    local_shard,
    named_weights,
    parameters_in,
    reshard,
    submodules,
    unwrap,
    weights_of,
    whole,
)
from refkl.backend.adapters import adapter_parameters, adapter_tensors, switched_off
from refkl.reference.contract import BuildRequest
from refkl.reference.cost import Cost
from refkl.reference.moving.average import Move, Pair
from refkl.reference.moving.lora_update import planned
from refkl.reference.strategies.swap import SwapReference, snapshot_of
from refkl.reference.weights.fingerprint import combined, digests
from refkl.reference.weights.saved import Saved
from refkl.scoring import Head, find_head

_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights that take out of the base what they put into the adapter."""
_LEAVES_THE_BASE = {
    "ADALORA", "BEFT", "BOFT", "C3A", "CARTRIDGE", "CPT", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA",
    "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "MULTITASK_PROMPT_TUNING", "OFT", "OSF",
    "PEANUT", "PREFIX_TUNING", "PROMPT_TUNING", "PSOFT", "PVERA", "P_TUNING", "RANDLORA", "ROAD", "SHIRA",
    "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
"""Kinds of adapter that give back the base bit for bit when they are off, however they were trained: each is tested. Of
another kind only a fresh one is taken, after a look at values."""
_FROM_DISK = "Set reference.source to 'pretrained' for the weights that the policy was loaded from."


class AdapterReference(SwapReference):
    """The policy with its adapter off; from its first update on, as "swap" does, with another adapter in it."""

    strategy = "adapter"
    _policy: PeftModel
    _built_for = ""
    """The reason of before it moved."""
    _first_open = False
    """Whether it scores as it did before it moved."""

    def __init__(self, request: BuildRequest, reason: str) -> None:
        source = "bare base, without its adapter" if _is_bare(request) else "base, under its fresh adapter"
        super().__init__(request, reason, f"the policy's {source}")
        self._dtypes, self._all_dtypes = self._current_dtypes(), _dtypes_of(self._policy)

    @classmethod
    def supports(cls, request: BuildRequest) -> str | None:
        policy = unwrap(request.policy)
        if not isinstance(policy, PeftModel):
            return f"the policy is a {type(policy).__name__} and has no PEFT adapter to switch off."
        if request.backend.name == "fsdp1":
            return "FSDP1 flattens adapter and base into one parameter. Use FSDP2."
        config = request.config
        if config.source not in ("policy", "base"):
            return f"it holds the policy's own base, and reference.source asks for {config.source!r}."
        if config.dtype is not None or config.device is not None:
            return "it shares the policy's weights, so reference.dtype and reference.device cannot be set."
        if config.offload:
            return "it has no weights of its own for reference.offload to keep in host memory."
        if config.quantize is not None:
            return "it shares the policy's weights, so reference.quantize cannot be set."
        if _is_bare(request):
            return _not_provably_bare(policy, fresh=request.planned)
        return _not_provably_off(policy, fresh=request.planned)

    @classmethod
    def cost(cls, request: BuildRequest) -> Cost:
        shape = request.shape
        return Cost(flops=shape.forward(e for e in shape.entries if e.base), moved=shape.gathered())

    @classmethod
    def why(cls, request: BuildRequest) -> str:
        if (prompt := learned_prompt(request.policy)) is not None:
            return (
                f"the policy's adapter is a learned prompt ({prompt.kind}), which changes the policy from the start, "
                "so the reference is the bare base, without it, and adds no memory"
            )
        if request.config.source == "base":
            return "reference.source asks for the bare base, which is the policy with its adapter off: adds no memory"
        return "the policy's adapter is fresh and trains alone, so switched off it is the reference and adds no memory"

    @classmethod
    def build(cls, request: BuildRequest, reason: str) -> AdapterReference:
        reference = cls(request, reason)
        reference.fingerprint()
        return reference

    @property
    def _off(self) -> bool:
        """Whether the reference is the policy with its adapter off, and holds nothing."""
        return not self._kept or self._first_open

    def follow_policy(self) -> None:
        """Follow a cast of the policy: DeepSpeed makes one of fp32 weights that are to train in bf16."""
        if not self._off:
            super().follow_policy()
            return
        if self._all_dtypes == (found := _dtypes_of(self._policy)):
            return  # which of them are the base's takes longer to find than a small batch to score
        self._all_dtypes = found
        if self._dtypes != (now := self._current_dtypes()):
            self._dtypes = now
            if self._recorded is not None and not self._first_open:
                self.fingerprint()  # the same numbers in another dtype: sanctioned, so recorded anew

    def _current_dtypes(self) -> list[torch.dtype]:
        return [weight.local.dtype for weight in self._base_weights()]

    @contextmanager
    def activate(self) -> Iterator[nn.Module]:
        if self._open or not self._off:
            with super().activate() as model:
                yield model
            return
        if why_not := _merged(self._policy) or _base_trains(self._policy):
            raise ValueError(f"The policy with its adapter off is not the reference: {why_not}")
        with switched_off(self._policy):
            yield self._policy

    def head(self) -> Head | None:
        """The policy's own: one that an adapter changes is not found."""
        return find_head(self._policy) if self._off else super().head()

    def free_weights(self) -> bool:
        return False

    def weights(self) -> Iterator[Weight]:
        return self._base_weights() if self._off else super().weights()

    def _base_weights(self) -> Iterator[Weight]:
        reshard(self._policy)  # FSDP2 has other objects for what a forward left gathered
        return weights_of(self._policy, without=adapter_tensors(self._policy))

    def _check_move(self, policy: nn.Module, step: Move) -> None:
        if self._kept:
            return super()._check_move(policy, step)
        if learned_prompt(self._policy) is not None:
            raise ValueError(
                "strategy 'adapter' cannot move where a prompt is learned: its reference is the bare base, which stays "
                "what it is. Leave the sync out."
            )
        if not step.copies:
            _neutral_state(self._policy)
        # What it will hold is of the policy's shapes.
        tensors = snapshot_of(self._policy)
        if any(is_partitioned(t) and not local_shard(t).numel() for t in tensors.values()):
            raise ValueError("An adapter that ZeRO-3 keeps on NVMe cannot be copied part by part, so it cannot move.")
        names = tensors.keys()
        snapshot = [weight for weight in weights_of(self._policy) if weight.name in names]
        planned(step, [Pair(weight, weight) for weight in snapshot], self.lora_layers())

    def _update(self, policy: nn.Module, step: Move) -> None:
        """The first one makes it a "swap": it holds an adapter of its own from then on."""
        if self._kept:
            return super()._update(policy, step)
        self._check_move(policy, step)
        start = {} if step.copies else _neutral_state(self._policy)
        self._become_swap()
        try:
            for name, value in start.items():
                self._kept[name].copy_(value)
            super()._update(policy, step)
        except BaseException:
            if not self.updates and not self._half_moved:
                self._become_adapter()
            raise

    def _become_swap(self) -> None:
        self._take()
        self._built_for, self.strategy = self.reason, "swap"
        self.reason = "the reference has moved, so what trains of the policy is swapped for a copy of its own"

    def _become_adapter(self) -> None:
        self._kept, self._layouts, self._shapes = {}, {}, {}
        self.reason, self.strategy = self._built_for, type(self).strategy

    def _recalled_first(self, stamp: str | None) -> str | None:
        return stamp if stamp == combined(digests(self._base_weights())) else None

    def load(self, folder: str | Path) -> None:
        if self._kept or not Saved(Path(folder)).provenance["updates"]:
            return super().load(folder)
        found = self._recorded, self.digests
        self._become_swap()
        try:
            super().load(folder)
        except BaseException:
            self._become_adapter()
            self._recorded, self.digests = found
            raise

    def keep_first(self) -> None:
        """Nothing to keep: the policy with its adapter off is what it was first."""
        if self._initial_fingerprint is None:
            if self.updates:
                raise ValueError("The reference has moved already, and what it was first was not kept.")
            self._initial_fingerprint = self.recorded_fingerprint or self.fingerprint()

    def _exchange_first(self) -> None:
        self._first_open = not self._first_open


def _is_bare(request: BuildRequest) -> bool:
    """Whether the reference is the base under the adapter, whatever that has been trained to."""
    return request.config.source == "base" or learned_prompt(request.policy) is not None


def _not_provably_bare(policy: PeftModel, *, fresh: bool) -> str | None:
    """A sentence unless off is the base as it was loaded; `fresh`: known to be a new adapter."""
    changes = map(_changes_base, policy.peft_config.values())
    why_not = _merged(policy) or next(filter(None, changes), None) or _base_trains(policy)
    kind = policy.active_peft_config.peft_type.value
    known = fresh or kind in _LEAVES_THE_BASE
    if why_not is None and not known and _not_fresh(policy) is not None:
        why_not = f"whether {kind} leaves the base as it was loaded is not known."
    return None if why_not is None else f"{why_not} {_FROM_DISK}"


def _changes_base(config: PeftConfig) -> str | None:
    """A sentence if an adapter of this configuration changes the base, when it is made or trained."""
    options = config.to_dict()
    # PiSSA's may have a number of iterations at its end.
    if str(options.get("init_lora_weights")).lower().startswith(_CHANGES_THE_BASE):
        return f"making the adapter changed the base (init_lora_weights={options['init_lora_weights']!r})."
    if options.get("layer_replication"):
        return "making the adapter changed the base (layer_replication)."
    if options.get("bias", "none") != "none":
        return f"the adapter's bias={options['bias']!r} trains the base's own biases, and so changed the base."
    return None


def _not_provably_off(policy: PeftModel, *, fresh: bool) -> str | None:
    """A sentence unless off is the policy as it stands; `fresh`: known to be so, without a look at values."""
    if len(policy.active_adapters) != 1:
        return f"it needs exactly one active adapter, and found {policy.active_adapters}."
    if why_not := _merged(policy):
        return why_not
    adapter = adapter_tensors(policy)
    trained = {id(p) for p in policy.parameters() if p.requires_grad}
    if not trained & adapter:
        return "the policy's adapter does not train (was it loaded with is_trainable=False?)."
    return _base_trains(policy) or (None if fresh else _not_fresh(policy))


def _base_trains(policy: PeftModel) -> str | None:
    trained = {id(parameter) for parameter in parameters_in(submodules(policy)) if parameter.requires_grad}
    if outside := trained - adapter_parameters(policy):
        name = next(name for name, parameter in policy.named_parameters() if id(parameter) in outside)
        return f"{name} trains and is not part of the adapter, so it would move the reference too."
    return None


def _dtypes_of(policy: PeftModel) -> list[torch.dtype]:
    modules = submodules(policy)
    buffers = (buffer for module in modules for buffer in module._buffers.values() if buffer is not None)
    return [tensor.dtype for tensor in (*parameters_in(modules), *buffers)]


def _merged(policy: PeftModel) -> str | None:
    if any(isinstance(m, BaseTunerLayer) and m.merged for m in submodules(policy)):
        return "the adapter is merged into the base; switching it off would unmerge it and leave it so."
    return None


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
        with switched_off(policy):
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


def _neutral_state(policy: PeftModel) -> dict[str, Tensor]:
    """This rank's part of tensors, by canonical name, with which the adapter does nothing; the others are as they are.

    Raises:
        ValueError: a kind of adapter of which it is not known.
    """
    found: dict[int, Tensor] = {}
    for name, module in policy.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            base = dict(module.original_module.named_parameters())
            for adapter in module.active_adapters:
                parameters = module.modules_to_save[adapter].named_parameters()
                found |= {id(parameter): local_shard(base[key]) for key, parameter in parameters}
        elif isinstance(module, TrainableTokensLayer):
            weight = module.get_base_layer().get_parameter("weight")
            for adapter in module.active_adapters:
                rows: Tensor = module.trainable_tokens_delta[adapter]
                found[id(rows)] = layout_of(rows).cut(whole(weight)[module.token_indices[adapter]])
        elif isinstance(module, BaseTunerLayer):
            fill = next((fill for kind, fill in _NEUTRAL.items() if isinstance(module, kind)), None)
            if fill is None or any(getattr(module, "use_dora", {}).values()):
                kind = "DoRA" if fill else type(module).__name__
                raise ValueError(
                    f"{name} has an adapter ({kind}) of which refkl does not know what it is when it does nothing, so "
                    "an average with alpha < 1 has nothing to begin with. Use alpha 1, or reference.strategy 'swap', "
                    "which keeps the adapter as it was when the reference was built."
                )
            prefixes, value = fill
            assert isinstance(module, nn.Module), "every layer of PEFT is"
            for key, parameter in module.named_parameters():
                if key.split(".")[0] in prefixes:
                    found[id(parameter)] = torch.full_like(local_shard(parameter), value)
    return {name: found[id(tensor)] for name, tensor in named_weights(policy) if id(tensor) in found}


_NEUTRAL: dict[type, tuple[tuple[str, ...], float]] = {
    LoraLayer: (("lora_B", "lora_embedding_B"), 0.0),
    VeraLayer: (("vera_lambda_b",), 0.0),
    IA3Layer: (("ia3_l",), 1.0),
}
"""Which tensors of an adapted layer are to be filled, and with what, so that the layer gives what its base does."""

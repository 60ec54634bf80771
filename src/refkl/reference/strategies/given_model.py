"""`clone` around a model that the caller holds: that model is the reference as it is, and is not copied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from refkl.backend import base_model, canonical_name, unwrap
from refkl.backend.adapters import switches
from refkl.config import ReferenceConfig
from refkl.loading import check_vocabulary
from refkl.reference.request import BuildRequest
from refkl.reference.strategies.clone import CloneReference
from refkl.scoring import check_causal

_WHAT = "The given model cannot be the reference"
_HONOURED = ("strategy", "cache", "max_tokens", "averages")


class GivenModel(CloneReference):
    """A model of the caller's: frozen, in eval mode, in its own dtype, on the policy's device."""

    def __init__(self, request: BuildRequest, reason: str, source: str, model: nn.Module, shared: set[str]) -> None:
        super().__init__(request, reason, source, model, shared)
        self._switches = switches(model)

    @classmethod
    def around(cls, model: nn.Module, request: BuildRequest) -> GivenModel:
        """Return the reference that is `model`, which is frozen and put in eval mode for good.

        Raises:
            ValueError: the model is the policy or shares trainable weights with it; it is not a causal language model
                of the policy's vocabulary; the configuration asks for other weights, or for a copy; the policy is
                sharded.
        """
        inner = unwrap(model)
        _check(inner, request)
        kind = type(base_model(inner)).__name__
        loaded = str(base_model(inner).config._name_or_path)  # type: ignore[union-attr]
        # Not "policy": this is another model, whose KL to an untrained policy need not be 0.
        config = replace(request.config, strategy="clone", source=f"a given {kind}")
        reason = f"the given {kind} is the reference, as it is ({request.backend})"
        source = f"the given {kind}" + (f", loaded from {loaded}" if loaded else "")
        reference = cls(replace(request, config=config), reason, source, inner, set())
        reference.follow_policy()
        check_causal(inner, next(inner.parameters()).device)
        reference.fingerprint()
        return reference

    @contextmanager
    def activate(self) -> Iterator[nn.Module]:
        """Yield the model. Its adapters must be active as they were: no fingerprint of weights shows that.

        Raises:
            ValueError: another adapter is active.
        """
        first, now = self._switches, switches(self.model)
        if changed := next((name for name in {**first, **now} if first.get(name) != now.get(name)), None):
            raise ValueError(
                f"The given model was a reference with {changed} {first.get(changed, 'without adapter')}, and this is "
                f"now {now.get(changed, 'without adapter')}. Set its adapters back (set_adapter), or build the "
                "reference again."
            )
        with super().activate() as model:
            yield model

    def _move(self, weights: dict[str, Tensor], first: Tensor) -> bool:
        """Move the model to the policy's device, unless it is spread over several. Its dtypes stay."""
        if not self._is_spread():
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                tensor.data = tensor.data.to(first.device)
        return False

    def _move_buffers(self, policy: nn.Module, first: Tensor) -> None:
        """Do nothing: `_move` has moved them."""

    def _is_spread(self) -> bool:
        return len({p.device for p in self.model.parameters()}) > 1


def _check(model: nn.Module, request: BuildRequest) -> None:
    """Raise ValueError if the model cannot be the reference of this policy with this configuration."""
    policy, config = unwrap(request.policy), request.config
    if model is policy:
        raise ValueError(
            f"{_WHAT}: it is the policy itself, which would always equal its reference. Load it a second time, or "
            "leave the model out: the reference is then the policy as it stands."
        )
    trained = {_place(p): canonical_name(name) for name, p in policy.named_parameters() if p.requires_grad}
    for tensor in model.parameters():
        if tensor.numel() and (name := trained.get(_place(tensor))) is not None:
            raise ValueError(
                f"{_WHAT}: it shares {name} with the policy, which trains it, so the reference would train too. Load "
                "the model a second time."
            )
    other = [f.name for f in fields(config) if f.name not in _HONOURED and getattr(config, f.name) != _default(f)]
    if other or config.strategy not in ("auto", "clone"):
        asked = ", ".join(f"reference.{name}" for name in other or ["strategy"])
        raise ValueError(
            f"{_WHAT}: it is taken as it is, and {asked} asks for other weights or another way to hold them. Leave "
            f"{asked} out, or leave the model out and name its folder in reference.source."
        )
    if request.backend.name == "zero3" or request.backend.name.startswith("fsdp"):
        raise ValueError(
            f"{_WHAT}: the policy is sharded ({request.backend}), and the given model would be whole on each rank. "
            "Name its folder instead (ref_model='folder' or reference.source): it is then loaded in parts."
        )
    _check_kind(base_model(model), base_model(policy))


def _check_kind(own: nn.Module, policy: nn.Module) -> None:
    if not isinstance(own, PreTrainedModel) or own.get_output_embeddings() is None or own.config.is_encoder_decoder:
        raise ValueError(
            f"{_WHAT}: a {type(own).__name__} is not a causal language model of transformers, with a logit for each "
            "token. Use AutoModelForCausalLM."
        )
    if any(p.device.type == "meta" for p in own.parameters()):
        raise ValueError(f"{_WHAT}: its weights are on the meta device, so they have no values. Load it fully.")
    if isinstance(policy, PreTrainedModel):
        check_vocabulary(own.config, str(own.config._name_or_path), policy, _WHAT)


def _default(field: Any) -> Any:
    return getattr(ReferenceConfig(), field.name)


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.data_ptr()

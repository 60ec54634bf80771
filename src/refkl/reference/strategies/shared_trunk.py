"""`shared_trunk`: policy and reference share the weights and activations of the lowest layers, if these are frozen.

The weights are held as in `clone`: a copy of the trainable weights, with the rest shared. In `score_pair` the frozen
layers below the lowest trainable layer (the trunk) run once, in the model that is scored first. The other model uses
their output and runs only the layers above.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from refkl.backend import base_model, decoder_layers, dropout_rates, named_weights, unwrap
from refkl.backend.adapters import adapter_parameters, quantised
from refkl.reference.cost import Cost
from refkl.reference.request import BuildRequest
from refkl.reference.strategies.clone import CloneReference
from refkl.reference.strategies.frozen_copy import frozen_copy
from refkl.reference.strategies.whole_copy import SharingCopy, must_copy_all
from refkl.scoring import HeadError, find_head, score_model
from refkl.types import TokenBatch

_CLOSE = 1e-4
"""Nats by which a score through the trunk may differ from one without it: kernels above may use other tiles."""


class SharedTrunkReference(SharingCopy):
    """A clone of the trainable weights, above frozen layers that run once for both models."""

    strategy = "shared_trunk"
    _depth = 0
    """The number of layers in the trunk, fixed when the reference is built."""
    _proven = False
    """True once a check showed that the layers above the trunk need only the output of its last layer."""

    @classmethod
    def supports(cls, request: BuildRequest) -> str | None:
        policy = unwrap(request.policy)
        if request.config.source != "policy" or request.config.quantize is not None or must_copy_all(policy, request):
            return (
                "its lower layers are the policy's own layers: reference.source, .dtype, .device, .offload and "
                ".quantize cannot be set, and no adapter may be merged. Use 'clone'."
            )
        if (why_not := CloneReference.supports(request)) is not None:
            return why_not
        if decoder_layers(policy) is None:
            return f"{type(base_model(policy)).__name__} has no list of layers, so no trunk can be found."
        if not _trunk(policy):
            return (
                "the lowest layer is not frozen, or the embeddings below it train (tied to a head that trains?): "
                'freeze them, for example with refkl.freeze(policy, ["model.embed_tokens", "model.layers.0"]).'
            )
        return None

    @classmethod
    def auto(cls, request: BuildRequest) -> bool:
        """Return False: it holds as much as "swap" and is faster only in `score_pair`. Ask for it by name."""
        return False

    @classmethod
    def cost(cls, request: BuildRequest) -> Cost:
        shape, step = request.shape, request.shape.step
        below = _trunk(unwrap(request.policy))
        weights = sum(p.numel() for layer in below for p in layer.parameters() if p.dim() >= 2)
        saved = 2 * step.tokens * (weights + len(below) * step.length * step.hidden)
        return replace(CloneReference.cost(request), flops=shape.forward() - saved)

    @classmethod
    def why(cls, request: BuildRequest) -> str:
        depth = len(_trunk(unwrap(request.policy)))
        return (
            f"the {depth} lowest layers are frozen and run once for policy and reference; above them "
            f"{CloneReference.why(request)}"
        )

    @classmethod
    def build(cls, request: BuildRequest, reason: str) -> SharedTrunkReference:
        policy = unwrap(request.policy)
        model, shared = frozen_copy(policy, share=True)
        source = "the policy as it stood when the reference was built" + quantised(policy)
        reference = cls(request, reason, source, model, shared)
        reference.follow_policy()
        reference.fingerprint()
        reference._depth = len(_trunk(policy))
        return reference

    @contextmanager
    def sharing_work_with(self, policy: nn.Module, batch: TokenBatch) -> Iterator[None]:
        """Run the trunk only in the first of the two scores while this is open.

        It runs in both if the policy's trunk may give another output than the reference's: with dropout in it while the
        policy trains, or if it is compiled.
        """
        own = self._policy()
        if self.weights_freed or own is None or unwrap(policy) is not own or _differs(policy, self._depth):
            yield
            return
        self.follow_policy()  # raises if a part of the trunk trains by now
        if not self._proven:
            self._prove(own, batch)
        with _Once([self._trunk_of(own), self._trunk_of(self.model)]):
            yield

    def _trunk_of(self, model: nn.Module) -> list[nn.Module]:
        return list(_layers(model))[: self._depth]

    def _prove(self, policy: nn.Module, batch: TokenBatch) -> None:
        """Raise ValueError if the reference's scores change when the layers above get only the trunk's output, or if a
        module with trainable weights runs before the end of the trunk."""
        for model in (policy, self.model):
            with suppress(HeadError):
                find_head(model)  # this may run a forward, which must not count as one of the two
        trunk = self._trunk_of(self.model)
        copied = {n for n, p in named_weights(self.model) if isinstance(p, nn.Parameter) and n not in self._shared}
        below = _Below(copied, self.model, trunk[-1])
        with self.scoring(batch) as (model, moved), _Once([trunk]):
            with below:
                plain = score_model(model, moved).scores.logp
            taken = score_model(model, moved).scores.logp
        name = type(base_model(self.model)).__name__
        if below.found:
            raise ValueError(
                f"{below.found[0]} trains and runs before the frozen layers of {name} end, so they give the policy "
                "another output than the reference. Freeze it, or use reference.strategy 'swap' or 'clone'."
            )
        if not torch.allclose(plain, taken, rtol=0.0, atol=_CLOSE):
            raise ValueError(
                f"The trainable layers of {name} need more than the output of the last frozen layer: "
                f"log-probabilities differ by up to {float((plain - taken).abs().max()):.2g} nats. Use "
                "reference.strategy 'swap' or 'clone'."
            )
        self._proven = True


class _Once:
    """Context in which the trunk that runs first keeps its output, and another trunk with the same inputs reuses it."""

    def __init__(self, trunks: list[list[nn.Module]]) -> None:
        self._layers = [layer for trunk in trunks for layer in trunk]
        self._first = [trunk[0] for trunk in trunks]
        self._last = [trunk[-1] for trunk in trunks]
        self._entered: list[Tensor] = []
        """The inputs of the first layer: hidden states [B, T, H], masks, positions."""
        self._output: Any = None
        """The output of the last layer: a tensor [B, T, H], or a tuple that begins with it."""
        self._taking = False
        self._stack = ExitStack()

    def __enter__(self) -> None:
        for layer in self._layers:
            self._replace(layer)

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _replace(self, layer: nn.Module) -> None:
        run, own = layer.forward, vars(layer).get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            entering: Tensor = args[0] if args else kwargs["hidden_states"]
            if layer in self._first:
                self._begin([t.detach() for t in _tensors((args, kwargs))])
            if self._taking:
                return _cut(self._output, grad=entering.requires_grad)
            result = run(*args, **kwargs)
            if layer in self._last:
                self._output = _cut(result, grad=False)
                self._without_checkpoints()
            return result

        layer.__dict__["forward"] = forward
        if own is None:
            self._stack.callback(layer.__dict__.pop, "forward")
        else:
            self._stack.callback(layer.__dict__.__setitem__, "forward", own)

    def _begin(self, entering: list[Tensor]) -> None:
        # Noise on the embeddings, other tokens or another mask start a new run.
        before, self._entered = self._entered, entering
        same = len(before) == len(entering) and all(map(_equal, before, entering))
        self._taking = same and self._output is not None
        if not self._taking:
            self._output = None

    def _without_checkpoints(self) -> None:
        """Turn off checkpointing in the trunk's layers: where their output is reused, they keep nothing and must not
        run again in a backward pass."""
        for layer in self._layers:
            if vars(layer).get("gradient_checkpointing"):
                self._stack.callback(setattr, layer, "gradient_checkpointing", True)
                layer.gradient_checkpointing = False  # type: ignore[assignment]


class _Below:
    """Context that records which of the named weights are in modules that run before the trunk ends."""

    def __init__(self, names: set[str], model: nn.Module, last: nn.Module) -> None:
        self.found: list[str] = []
        self._over = False
        self._stack = ExitStack()
        self._modules = {
            name: module
            for name, weight in named_weights(model)
            if name in names
            for module in model.modules()
            if any(weight is p for p in module.parameters(recurse=False))
        }
        self._last = last

    def __enter__(self) -> None:
        def note(name: str) -> None:
            if not self._over:
                self.found.append(name)

        def over() -> None:
            self._over = True

        self._stack.callback(self._last.register_forward_hook(lambda *_: over()).remove)
        for name, module in self._modules.items():
            hook = module.register_forward_pre_hook(lambda *_, name=name: note(name))
            self._stack.callback(hook.remove)

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _cut(result: Any, *, grad: bool) -> Any:
    """Return a layer's result without its graph. Reentrant checkpoints above need an input that requires grad if the
    layer's input did."""
    if isinstance(result, Tensor):
        return result.detach().requires_grad_(grad and result.is_floating_point())
    return tuple(_cut(part, grad=grad) for part in result) if isinstance(result, tuple) else result


def _tensors(arguments: Any) -> Iterator[Tensor]:
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, dict):
        yield from _tensors(tuple(arguments.values()))
    elif isinstance(arguments, tuple | list):
        for part in arguments:
            yield from _tensors(part)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def _layers(policy: nn.Module) -> nn.ModuleList:
    layers = decoder_layers(policy)
    assert layers is not None, "supports() lets no other policy in"
    return layers


def _trunk(policy: nn.Module) -> list[nn.Module]:
    """Return the lowest consecutive frozen layers; empty if the embeddings train."""
    tuned = adapter_parameters(policy)
    moving = {id(p) for p in policy.parameters() if p.requires_grad or id(p) in tuned}

    def still(module: nn.Module) -> bool:
        return not any(id(p) in moving for p in module.parameters())

    embeddings: nn.Module = base_model(policy).get_input_embeddings()  # type: ignore[operator]
    return list(takewhile(still, _layers(policy))) if still(embeddings) else []


def _differs(policy: nn.Module, depth: int) -> bool:
    """Return True if the policy's trunk may give another result than the reference's."""
    if any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in policy.modules()):
        return True  # compiled with the original forward of the layers
    above = {id(m) for layer in _layers(policy)[depth:] for m in layer.modules()}
    return any(m.training and dropout_rates(m) for m in policy.modules() if id(m) not in above)

"""Cheap checks, at each score, of the weights that a reference shares with the policy: the user may change the policy.

A write into a tensor raises its version, so a changed tensor is found without reading any values. PEFT merges an
adapter through `.data`, which does not raise the version. So the state of adapted layers is checked too, and a few
values of each adapted weight are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from weakref import ref

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from refkl.backend import (
    Weight,
    Whole,
    canonical_name,
    is_partitioned,
    is_sharded,
    named_weights,
    own_class,
    submodules,
)
from refkl.reference.weights.fingerprint import digests

_PROBES = 64
"""Number of values of an adapted weight that are read at each score."""


class SharedWeights:
    """The policy's tensors that a reference shares.

    Args:
        policy: the unwrapped policy.
        names: canonical names of the shared tensors.
        recorded: returns the digest that a weight should have, by name; None if it is not known now.
        modules: True if the policy's modules run as the reference, so that replacing one changes the reference.

    Raises:
        ValueError: a tensor that is shared was made inside `torch.inference_mode`.
    """

    def __init__(
        self,
        policy: nn.Module,
        names: Iterable[str],
        recorded: Callable[[str], str | None],
        *,
        modules: bool,
    ) -> None:
        self._policy = policy
        self._names = set(names)
        for name, tensor in named_weights(policy):
            if (modules or name in self._names) and tensor.is_inference():
                raise ValueError(
                    f"The reference shares the policy's weights, but {name} was made inside torch.inference_mode: it "
                    "counts no changes and cannot be trained. Load the policy outside torch.inference_mode, or only "
                    "compare it, with reference.strategy 'clone'."
                )
        self._built = {name: (ref(t), t._version) for name, t in self._shared() if not t.is_inference()}
        self._recorded = recorded
        self._layers = {name: m for name, m in policy.named_modules() if isinstance(m, BaseTunerLayer)}
        self._merged = {name: list(layer.merged_adapters) for name, layer in self._layers.items()}
        self._kinds = _kinds(policy) if modules else {}
        self._present: list[int] = []
        self._versions: list[tuple[str, Tensor, int]] | None = None
        self._probed: list[tuple[str, Tensor]] = []
        self._numbers: list[float] = []

    def check(self) -> None:
        """Raise ValueError if a shared weight or layer has changed; the message names it."""
        self._check_layers()
        if self._versions is None:
            self._remember()
            return
        for place, (name, tensor, version) in enumerate(self._versions):
            if tensor._version != version:
                self._check_digest(name, tensor)
                self._versions[place] = (name, tensor, tensor._version)
        if self._probed and (numbers := self._read()) != self._numbers:
            for name, tensor in self._probed:
                self._check_digest(name, tensor)
            self._numbers = numbers  # a cast

    def _check_layers(self) -> None:
        if not self._layers and not self._kinds:
            return
        ids = list(map(id, submodules(self._policy)))
        if self._kinds and ids != self._present:
            self._check_kinds()
            self._present = ids
        present = set(ids) if self._layers else set()
        for name, layer in self._layers.items():
            if id(layer) not in present:
                raise ValueError(
                    f"{name} was an adapted layer when the reference was built, but the policy no longer has it: was "
                    "its adapter merged and unloaded (merge_and_unload)? That changed a weight that the reference "
                    "shares. Build the reference after that, or set reference.source to a folder."
                )
            if list(layer.merged_adapters) != self._merged[name]:
                raise ValueError(
                    f"The adapter of {name} was {_state(self._merged[name])} when the reference was built and is "
                    f"{_state(list(layer.merged_adapters))} now, which changed a weight that the reference shares. "
                    "Undo that (unmerge_adapter) before the reference scores, or build the reference after it."
                )

    def _check_kinds(self) -> None:
        now = _kinds(self._policy)
        for name, kind in self._kinds.items():
            if (found := now.get(name, kind)) is not kind:
                raise ValueError(
                    f"{name} was a {kind.__name__} when the reference was built and is a {found.__name__} now: the "
                    "reference runs the policy's modules, so it is a different model now. Replace modules before "
                    "build_reference, or use reference.strategy 'clone'."
                )

    def _remember(self) -> None:
        if not self._names or is_sharded(self._policy) or any(map(is_partitioned, self._policy.parameters())):
            self._versions = []  # ZeRO and FSDP write their shards themselves as they gather and scatter
            return
        adapted = {id(layer.get_base_layer().weight) for layer in self._layers.values() if _has_weight(layer)}
        shared = self._shared()
        for name, tensor in shared:
            built, version = self._built.get(name, (None, -1))
            if built is None or built() is not tensor or tensor._version != version:
                self._check_digest(name, tensor)  # written into since the reference was built
        self._built = {}
        self._versions = [(name, tensor, tensor._version) for name, tensor in shared]
        self._probed = [(name, tensor) for name, tensor in shared if id(tensor) in adapted]
        self._numbers = self._read() if self._probed else []

    def _shared(self) -> list[tuple[str, Tensor]]:
        found = dict(self._policy.named_parameters(remove_duplicate=True)) | dict(self._policy.named_buffers())
        return [(canonical_name(n), t) for n, t in found.items() if canonical_name(n) in self._names]

    def _read(self) -> list[float]:
        """Return the probed values of all adapted weights, in one transfer from the device."""
        numbers: list[float] = torch.cat([_probe(tensor).double() for _, tensor in self._probed]).tolist()
        return numbers

    def _check_digest(self, name: str, tensor: Tensor) -> None:
        before = self._recorded(name)
        if before is None or is_partitioned(tensor):
            return
        now = digests([Weight(name, tensor.detach(), Whole(tensor.shape))])[name]
        if now != before and now.split()[0] == before.split()[0]:
            raise ValueError(
                f"The reference changed without an update or load: {name}, which it shares with the policy, has other "
                "values. It does not train, so something else wrote into it: a merged adapter that was unmerged (which "
                "rounds), a load_state_dict, or a buffer that the model changes in train mode."
            )


def _kinds(policy: nn.Module) -> dict[str, type]:
    """Return the class of each module by its canonical name, as it was before FSDP2 or a wrapper added to it."""
    return {canonical_name(name): own_class(module) for name, module in policy.named_modules() if name}


def _probe(tensor: Tensor) -> Tensor:
    """Return [<= 64] values at regular distances in the tensor."""
    flat = tensor.detach().view(-1)
    return flat[:: max(1, flat.numel() // _PROBES)][:_PROBES]


def _has_weight(layer: BaseTunerLayer) -> bool:
    return isinstance(getattr(layer.get_base_layer(), "weight", None), Tensor)


def _state(merged: list[str]) -> str:
    return f"merged ({', '.join(merged)})" if merged else "not merged"

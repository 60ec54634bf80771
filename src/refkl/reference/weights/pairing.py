"""The weights of a reference and of its policy, paired by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from refkl.backend import Weight


class PackedLayer(Protocol):
    """A layer that holds its weight in a packed form, which must not be written directly."""

    @property
    def numbers(self) -> Tensor:
        """The weight, restored to floating point."""

    def repack(self, numbers: Tensor) -> None:
        """Pack these numbers and hold them from now on."""


class Pair(NamedTuple):
    """A weight of the reference and the policy's of the same name, as far as this rank holds them."""

    own: Weight
    theirs: Weight
    packed: PackedLayer | None = None
    """The layer that holds the reference's weight if it is quantised; `own.local` must then not be written."""

    @property
    def source(self) -> Tensor:
        """This rank's part of the policy's weight, sharded like the reference's."""
        theirs = self.theirs.local.detach()
        return self.own.layout.cut(theirs) if self.own.layout.sharded and not self.theirs.layout.sharded else theirs


def paired_weights(
    own: Iterable[Weight], theirs: Iterable[Weight], free: Mapping[str, int] | None = None
) -> list[Pair]:
    """Pair the reference's weights with the policy's by name. They may differ in the dimension that `free` names.

    Raises:
        ValueError: names or shapes differ; a rank's part of a weight differs from its part of the policy's.
    """
    ours, found = ({weight.name: weight for weight in weights} for weights in (own, theirs))
    shapes = [{name: w.layout.shape for name, w in weights.items()} for weights in (found, ours)]
    check_pairs(shapes[0], shapes[1], "the policy", free)
    for name, weight in ours.items():
        parts = weight.local.shape, found[name].local.shape
        if found[name].layout.sharded and type(found[name].layout) is not type(weight.layout):
            raise ValueError(
                f"{name} is sharded in the policy, but whole or sharded in another way in the reference: the reference "
                "was built for another policy. Build it from this one."
            )
        if found[name].layout.sharded and parts[0] != parts[1]:
            raise ValueError(
                f"This rank's part of {name} is {list(parts[1])} in the policy and {list(parts[0])} in the reference: "
                "score once after accelerator.prepare, which shards the reference as the policy is."
            )
    return [Pair(weight, found[name]) for name, weight in ours.items()]


def check_pairs(
    found: dict[str, torch.Size], own: dict[str, torch.Size], what: str, free: Mapping[str, int] | None = None
) -> None:
    """Raise ValueError unless both hold the same names with the same shapes. For each weight in `free`, the dimension
    given there (the rank of a LoRA factor) may differ."""
    if missing := sorted(own.keys() - found.keys()):
        raise ValueError(f"{what} has no weight {missing[0]!r} ({len(missing)} missing); it is a different model.")
    if extra := sorted(found.keys() - own.keys()):
        raise ValueError(f"{what} has a weight {extra[0]!r} that the reference lacks ({len(extra)} in all).")
    for name, shape in own.items():
        dim = None if free is None else free.get(name)
        if _without(found[name], dim) != _without(shape, dim):
            raise ValueError(f"{what} has {name!r} with shape {list(found[name])}; the reference has {list(shape)}.")


def _without(shape: torch.Size, dim: int | None) -> list[int]:
    return [size for place, size in enumerate(shape) if place != dim]

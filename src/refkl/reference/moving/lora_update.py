"""Moves of a reference with LoRA layers: some tensors are averaged one by one, and some layers by their product.

The factors of all new products are computed before the first is written, so that an error changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from refkl.backend import Whole
from refkl.backend.adapters import LoraFactors
from refkl.reference.moving.average import SIXTEEN_BITS, Averages, Move
from refkl.reference.moving.lora_algebra import (
    Factors,
    compressed,
    highest_rank,
    packed,
    squared_average,
    squared_difference,
    squared_norm,
    stacked,
    unpacked,
)
from refkl.reference.weights.pairing import Pair

_OR_FACTORS = "Use lora='factors', or alpha 1, which copies the policy."


@dataclass(frozen=True)
class LastUpdate:
    """The result of the last `update`."""

    alpha: float
    """The `alpha` of the update."""
    lora: Literal["factors", "product"]
    """The `lora` of the update."""
    distance: float | None = None
    """Distance between the two averages of LoRA layers with alpha < 1, before `rank` cuts: ‖factors' - product's‖ /
    ‖product's‖ in the Frobenius norm over the changes of weight of all layers together. None if one of the two does not
    exist (the reference's rank is not the policy's; an adapter changes weights by more than B · A), or if each rank
    holds only a part of the factors (FSDP2, ZeRO-3)."""
    rank: int | None = None
    """Highest rank of the reference's LoRA layers after the update; None without LoRA layers."""
    cut: float = 0.0
    """The part of the average of the products that `rank` left out, relative to that average, in the same norm."""


class LoraPair(NamedTuple):
    """The two factors of a LoRA layer, each paired between reference and policy."""

    layer: LoraFactors
    a: Pair
    b: Pair

    @property
    def ranks(self) -> tuple[int, int]:
        """The reference's rank and the policy's."""
        own, theirs = (weight.layout.shape[0] // self.layer.experts for weight in (self.a.own, self.a.theirs))
        return own, theirs

    @property
    def whole(self) -> bool:
        """True if this rank holds both factors entirely."""
        return not any(w.layout.sharded for pair in (self.a, self.b) for w in (pair.own, pair.theirs))

    def own(self, averages: Averages) -> Factors:
        """Return the reference's factors, in fp32 or wider, on the policy's device."""
        a, b = (averages.mean.get(pair.own.name, pair.own.local) for pair in (self.a, self.b))
        return self._factors(a, b)

    def theirs(self) -> Factors:
        """Return the policy's factors, in the same dtype."""
        return self._factors(self.a.source, self.b.source)

    def _factors(self, a: Tensor, b: Tensor) -> Factors:
        device, dtype = self.b.source.device, torch.promote_types(self.b.own.local.dtype, torch.float32)
        return unpacked(a.to(device, dtype), b.to(device, dtype), self.layer.experts)


@dataclass(frozen=True)
class Plan:
    """The plan of a move."""

    step: Move
    pairs: list[Pair]
    """The tensors to average one by one."""
    layers: list[LoraPair]
    """All LoRA layers."""
    replaced: list[LoraPair]
    """The entries of `layers` whose factors are replaced by new tensors; these are not in `pairs`."""

    def distance(self, averages: Averages) -> float | None:
        """Return LastUpdate.distance. Call it before anything is moved."""
        known = (p.whole and p.layer.refused is None and p.ranks[0] == p.ranks[1] for p in self.layers)
        if self.step.alpha == 1.0 or not self.layers or not all(known):
            return None
        apart, average = 0.0, 0.0
        for pair in self.layers:
            factors, scale = (pair.own(averages), pair.theirs(), self.step.alpha), pair.layer.scaling**2
            apart += scale * float(squared_difference(*factors))
            average += scale * float(squared_average(*factors))
        return _ratio(apart, average)

    def new(self, averages: Averages) -> New:
        """Return the new factors of all replaced layers, and the part that `rank` cuts off."""
        found, lost, total = New({}, {}), 0.0, 0.0
        for pair in self.replaced:
            factors, scale = pair.theirs(), pair.layer.scaling**2
            if self.step.alpha < 1.0:
                factors = stacked(pair.own(averages), factors, self.step.alpha)
                total += 0.0 if self.step.rank is None else scale * float(squared_norm(factors))
                if (highest := highest_rank(factors, self.step.rank)) < factors.rank:
                    factors, left_out = compressed(factors, highest)
                    lost += scale * float(left_out)
            for (own, _, _), numbers in zip((pair.a, pair.b), packed(factors), strict=True):
                # Always a copy: the factors may still share the policy's memory.
                found.weights[own.name] = numbers.to(own.local.device, own.local.dtype, copy=True)
                if own.name in averages.mean or (self.step.alpha < 1.0 and own.local.dtype in SIXTEEN_BITS):
                    found.means[own.name] = averages.place(numbers.clone(), own.local.device)
        return found._replace(cut=0.0 if self.step.rank is None else _ratio(lost, total))

    def rank(self, new: New) -> int | None:
        """Return the highest rank of a layer after the move."""
        ranks = (
            new.weights[p.layer.a].shape[0] // p.layer.experts if p.layer.a in new.weights else p.ranks[0]
            for p in self.layers
        )
        return max(ranks, default=None)


class New(NamedTuple):
    """New factors by name, in PEFT's layout."""

    weights: dict[str, Tensor]
    means: dict[str, Tensor]
    """The averages from which `weights` were rounded, for weights whose averages are kept separately."""
    cut: float = 0.0

    def keep(self, averages: Averages) -> None:
        """Store these means as the averages of the new factors."""
        for name in self.weights:
            averages.lost.pop(name, None)
        for name, mean in self.means.items():
            averages.mean[name], averages.layouts[name] = mean, Whole(mean.shape)


def planned(step: Move, pairs: list[Pair], layers: Iterable[LoraFactors]) -> Plan:
    """Return the plan of a move. `layers` are those in which the reference can hold another rank than the policy.

    Raises:
        ValueError: the move cannot be made.
    """
    by_name = {pair.own.name: pair for pair in pairs}
    found = [LoraPair(f, by_name[f.a], by_name[f.b]) for f in layers if f.a in by_name and f.b in by_name]
    if step.lora == "product" and not found:
        raise ValueError(
            "lora='product' averages what LoRA layers add to their weights, but the reference has no LoRA layers that "
            "it can hold with another rank (strategies 'zero3' and 'fsdp2' hold parts). Use lora='factors'."
        )
    replaced = [pair for pair in found if pair.ranks[0] != pair.ranks[1]]
    if step.alpha < 1.0 and step.lora == "product":
        for pair in found:
            _check_product(pair)
        replaced = found
    elif replaced and (step.alpha < 1.0 or step.bias is not None):
        own, theirs = replaced[0].ranks
        raise ValueError(
            f"{replaced[0].layer.module} has rank {own} in the reference and {theirs} in the policy, so their factors "
            "have no average and no bias. Use lora='product', or alpha 1, which copies the policy and its rank."
        )
    apart = {name for pair in replaced for name in (pair.layer.a, pair.layer.b)}
    return Plan(step, [pair for pair in pairs if pair.own.name not in apart], found, replaced)


def _check_product(pair: LoraPair) -> None:
    if pair.layer.refused is not None:
        raise ValueError(
            f"lora='product' cannot average {pair.layer.module}: its adapter {pair.layer.refused}. {_OR_FACTORS}"
        )
    if not pair.whole:
        raise ValueError(
            f"lora='product' needs whole factors, but each rank holds only a part of those of {pair.layer.module} "
            f"(FSDP2, ZeRO-3). {_OR_FACTORS}"
        )


def _ratio(part: float, whole: float) -> float:
    """Return the ratio of two norms from their squares."""
    return 0.0 if part <= 0.0 else sqrt(part / whole) if whole > 0.0 else inf

"""Moves of a reference: its weights are averaged with the policy's in place, each rank on its own parts.

Nothing is gathered or sent, and only one chunk of a weight takes extra memory. Numbers of 16 bits cannot take small
steps (1 + 0.001 is 1 in bf16), so 16-bit weights are written from an fp32 average that is kept beside them. An fp32
average with a small alpha stands still in the same way: alpha (policy - average) is lost if it is less than half a unit
in the last place. Such an average also keeps the part that rounding left out of it (W. Kahan, "Further remarks on
reducing truncation errors", CACM 8(1), 1965).

torch's lerp computes the same bits for an element at any place in a tensor, and so do its sums and products one by one,
so the result does not depend on how a weight is sharded: tests check this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from refkl.backend import Layout, Weight, Whole
from refkl.reference.weights.pairing import Pair
from refkl.reference.weights.record import KEPT
from refkl.reference.weights.tensors import bytes_held
from refkl.types import MemoryReport

_CHUNK, _CHUNK_OF_A_GPU = 1 << 17, 1 << 24
"""Elements averaged at once if that takes temporaries: few enough for a core's cache, or enough to keep a GPU busy."""
_FIRST = 1 << 12
"""Elements that are searched first for one that changed; it is nearly always among them."""
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
SMALL_ALPHA = 1e-3
"""An fp32 average stops where alpha (policy - average) is below 2^-25 of the average: at alpha 0.001, at a distance of
3e-5 of its size. With a smaller alpha the rounding error of the average is kept as well."""


class Move(NamedTuple):
    """One move: theta <- theta + alpha (policy - theta), with an optional bias."""

    alpha: float
    bias: float | None = None
    """BEMA: the reference is the average + bias (policy - start)."""
    lora: Literal["factors", "product"] = "factors"
    """The quantity that is averaged for LoRA layers; see lora_algebra.py."""
    rank: int | None = None
    """Highest rank that "product" keeps; None keeps all."""

    @property
    def copies(self) -> bool:
        """True if the move overwrites the reference, whatever it held."""
        return self.alpha == 1.0 and self.bias is None

    def check(self) -> None:
        """Raise ValueError if no reference can make this move."""
        if not 0.0 < self.alpha <= 1.0:
            raise ValueError(f"alpha must be in (0, 1], got {self.alpha}.")
        if self.bias is not None and not 0.0 <= self.bias <= 1.0:
            raise ValueError(f"bias must be in [0, 1], got {self.bias}.")
        if self.lora not in ("factors", "product"):
            raise ValueError(f"lora must be 'factors' or 'product', got {self.lora!r}.")
        if self.lora == "product" and self.bias is not None:
            raise ValueError("bias is added to each tensor, so it cannot be used with lora='product'. Leave one out.")
        if self.rank is not None and (self.lora != "product" or self.rank < 1):
            raise ValueError(
                f"rank is for lora='product' and must be at least 1, got rank={self.rank} with lora={self.lora!r}. "
                "Leave rank out, or set lora='product'."
            )


class Probe(NamedTuple):
    """An element that a move changed, to check afterwards that the change can be read."""

    place: int
    """Index in this rank's flattened part."""
    number: Tensor
    """[] the value after the move."""


@dataclass
class Averages:
    """The averages that a moving reference keeps beside its weights, by name: this rank's parts."""

    on_host: bool = False
    mean: dict[str, Tensor] = field(default_factory=dict)
    """Averages in fp32 of weights whose own dtype is too coarse for an average."""
    lost: dict[str, Tensor] = field(default_factory=dict)
    """The part that rounding left out of fp32 averages: the average is the `mean`, or else the weight, plus this."""
    start: dict[str, Tensor] = field(default_factory=dict)
    """The weights when a bias was first given, or first given after a copy of the policy."""
    first: dict[str, Tensor] = field(default_factory=dict)
    """The weights before the first move, if they were asked for."""
    layouts: dict[str, Layout] = field(default_factory=dict)

    def prepare(self, pairs: Iterable[Pair], step: Move) -> None:
        """Allocate all memory that a move needs. If that raises, nothing is kept."""
        mean, start, lost = dict(self.mean), dict(self.start), dict(self.lost)
        for own, _, packed in pairs:
            self.layouts[own.name] = own.layout
            numbers = own.local if packed is None else packed.numbers
            if not numbers.is_floating_point():
                continue
            coarse = step.alpha < 1.0 and (packed is not None or numbers.dtype in SIXTEEN_BITS)
            if own.name not in mean and (coarse or step.bias is not None):
                wide = torch.promote_types(numbers.dtype, torch.float32)
                mean[own.name] = self.place(numbers.to(wide, copy=True))
            if own.name not in start and step.bias is not None:
                start[own.name] = self.place(numbers.clone())
            average = mean.get(own.name, numbers)
            if own.name not in lost and step.alpha < SMALL_ALPHA and average.dtype == torch.float32:
                lost[own.name] = self.place(torch.zeros_like(average))
        self.mean, self.start, self.lost = mean, start, lost

    def follow(self, weights: Iterable[Weight]) -> None:
        """Shard and cast the kept tensors like the weights' present parts."""
        for name, local, layout in weights:
            before = self.layouts.get(name)
            for kind, kept in self._kinds().items():
                if before is None or (tensor := kept.get(name)) is None:
                    continue
                if type(layout) is not type(before):
                    tensor = layout.cut(before.join(tensor)).clone()
                kept[name] = tensor if kind in ("mean", "lost") else tensor.to(local.dtype)
            if before is not None:
                self.layouts[name] = layout
            if local.dtype != torch.float32 and name not in self.mean:
                self.lost.pop(name, None)  # the weight was cast, so this is no longer its rounding error

    def keep_first(self, weights: Iterable[Weight]) -> None:
        """Keep a copy of the weights' present values."""
        for name, local, layout in weights:
            self.layouts[name] = layout
            self.first.setdefault(name, self.place(local.clone()))

    def move(self, pair: Pair, step: Move) -> Probe | None:
        """Move one weight. Return an element that changed, or None if policy and reference hold the same values."""
        name, source = pair.own.name, pair.source
        mean, start = self.mean.get(name), self.start.get(name) if step.bias is not None else None
        if step.bias is None:
            self.start.pop(name, None)
        if step.alpha == 1.0:
            self.lost.pop(name, None)
        lost = self.lost.get(name)
        if pair.packed is None:
            return _move(pair.own.local, source, mean, start, lost, step)
        numbers = pair.packed.numbers
        _move(numbers, source, mean, start, lost, step)
        pair.packed.repack(numbers)
        return None

    def weights(self) -> Iterator[Weight]:
        """Yield all kept tensors, under names that say what each is, to save them or to write into them."""
        for kind, kept in self._kinds().items():
            for name, local in kept.items():
                layout = self.layouts[name]
                # A LoRA layer may have another rank now than at first.
                yield Weight(f"{kind}:{name}", local, layout if layout.sharded else Whole(local.shape))

    def loaded(self, saved: Iterable[Weight], devices: dict[str, torch.device]) -> Averages:
        """Return averages with tensors under the names that `weights` yields, in the same place as these; `devices`
        says where the reference's weights are."""
        new = Averages(on_host=self.on_host)
        home = next(iter(devices.values()))  # a quantised weight's bytes have other names than its average
        for full_name, local, layout in saved:
            kind, name = full_name.split(":", 1)
            new.layouts[name] = layout
            new._kinds()[kind][name] = new.place(local if self.on_host else local.to(devices.get(name, home)))
        return new

    def memory(self, home: torch.device) -> MemoryReport:
        """Return the bytes of the kept tensors; `home` is the device on which the model runs."""
        held = bytes_held((tensor for kept in self._kinds().values() for tensor in kept.values()), home)
        return MemoryReport(device=0, host=held.total) if self.on_host else held

    def _kinds(self) -> dict[str, dict[str, Tensor]]:
        return {kind: getattr(self, kind) for kind in KEPT}

    def place(self, tensor: Tensor, device: torch.device | None = None) -> Tensor:
        """Move a tensor to the place of averages: host memory, or `device` (by default the tensor's own)."""
        return tensor.to("cpu" if self.on_host else tensor.device if device is None else device)


def _move(
    own: Tensor, theirs: Tensor, mean: Tensor | None, start: Tensor | None, lost: Tensor | None, step: Move
) -> Probe | None:
    tensors = [own, theirs, mean, start, lost]
    flat = all(t is None or t.is_contiguous() for t in tensors)
    if flat:
        tensors = [None if t is None else t.view(-1) for t in tensors]
    # A move without temporaries runs in one piece, except for the part that is searched for a changed element.
    in_place = mean is None and lost is None and own.dtype == theirs.dtype and own.device == theirs.device
    chunk = _CHUNK if own.device.type == "cpu" else _CHUNK_OF_A_GPU
    found: Probe | None = None
    scratch = torch.empty(0)
    place, end = 0, own.numel()
    while place < end:
        if not flat or (in_place and found is not None):
            length = end - place
        elif place == 0:
            length = min(_FIRST, chunk)
        else:
            length = chunk
        part, target, average, origin, rest = (
            None if t is None else t[place : place + length] if flat else t for t in tensors
        )
        assert part is not None and target is not None
        before = part.clone() if found is None else None
        wide = part if average is None else average
        if not in_place and step.alpha < 1.0:
            if scratch.shape != wide.shape:
                scratch = torch.empty_like(wide)  # allocated once: one per chunk costs more than the sums
            target = scratch.copy_(target)
        if rest is not None:
            _add_compensated(wide, rest, target, step.alpha)
        elif step.alpha < 1.0 and wide.is_floating_point():
            wide.lerp_(target, step.alpha)
        else:
            wide.copy_(target)  # bit for bit
        if average is not None and origin is not None and step.bias is not None:
            lead = target.to(average.device, average.dtype) - origin.to(average.device, average.dtype)
            part.copy_(lead.mul_(step.bias).add_(average))
        elif average is not None:
            part.copy_(average)
        if before is not None and bool((changed := (before != part).reshape(-1)).any()):
            at = int(changed.int().argmax())
            found = Probe(place + at, part.reshape(-1)[at].clone())
        place += part.numel()
    return found


def _add_compensated(average: Tensor, lost: Tensor, target: Tensor, alpha: float) -> None:
    """Move `average + lost` towards `target`, in place."""
    rest = lost.to(average.device)
    # One operation each: torch.add(..., alpha=) may or may not round twice, depending on the place of an element.
    step = (target - average).sub_(rest).mul_(alpha).add_(rest)
    moved = average + step
    lost.copy_(step.sub_(moved - average))
    average.copy_(moved)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return True if two numbers are equal; two NaNs count as equal."""
    return torch.equal(a, b) or bool(a != a and b != b)

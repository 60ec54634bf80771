"""Which numbers a reference has: a fingerprint that any changed element changes, the same however they are sharded.

A weight's elements side by side are words of 32 bits, each with a 64-bit key that depends on its place: Σ word(i) ·
key(i) mod 2^64 is the weight's sum. Keys are odd, so they have inverses, and no change within one word is lost; changes
of several cancel by chance alone. (Words of 64 bits would be quicker, but 2^63 times an odd number is 2^63: two flipped
signs would cancel.) A sum does not care who adds which part of it: ranks add up their own elements, and exchange one
number a weight. It is there to find mistakes, and does not stand up to somebody who looks for a collision.

    key(i) = inner(i mod B) · outer(i div B),   both from SplitMix64 and made odd   (Steele, Lea, Flood, OOPSLA 2014)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from refkl.backend.layout import Layout, Weight, communicating_device

_BLOCK = 1 << 16
"""B: with their keys, so many words stay in a core's cache."""
_OUTER = 1 << 62
"""The first of the numbers that outer keys are made from."""


def digests(weights: Iterable[Weight]) -> dict[str, str]:
    """Return, by name, the dtype, shape and 16 hex digits of each weight. Collective if a weight is sharded.

    Raises:
        ValueError: a dtype whose elements are not of 1, 2, 4 or 8 bytes.
    """
    found = [(w.name, f"{w.local.dtype} {list(w.layout.shape)}", w.layout, content_sum(*w[1:])) for w in weights]
    if not found:
        return {}
    sharded = any(layout.sharded for _, _, layout, _ in found)
    total = torch.stack([value.cpu() for *_, value in found])
    if sharded:
        counts = torch.tensor([_counts(layout) for _, _, layout, _ in found])
        total = total.where(counts, 0).to(communicating_device())
        dist.all_reduce(total)
    return {
        name: f"{kind} {value % 2**64:016x}" for (name, kind, _, _), value in zip(found, total.tolist(), strict=True)
    }


def combined(found: dict[str, str]) -> str:
    """One fingerprint of all weights, names included: SHA-256 in hex."""
    return hashlib.sha256("\n".join(f"{name} {digest}" for name, digest in sorted(found.items())).encode()).hexdigest()


def content_sum(local: Tensor, layout: Layout) -> Tensor:
    """[] int64: Σ word(i) · key(i) mod 2^64, of words in which all but this rank's elements are 0."""
    size = local.element_size()
    if local.is_complex() or 8 % size:
        raise ValueError(f"A weight of {local.dtype} cannot be fingerprinted: elements must have 1, 2, 4 or 8 bytes.")
    data = local.detach().contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for run in layout.runs():
        part = data[run.local * size : (run.local + run.length) * size]
        first, before = divmod(run.whole * size, 4)
        after = -(before + len(part)) % 4
        if before or after or part.storage_offset() % 4:
            part = nn.functional.pad(part, (before, after))
        total += _sum_of_words(part.view(torch.int32), first)
    return total


def _sum_of_words(words: Tensor, first: int) -> Tensor:
    """[] Σ words · keys, of words [n] that begin at place `first`."""
    inner = _inner_keys(str(words.device))
    last = first + len(words) - 1
    sums = torch.zeros(last // _BLOCK - first // _BLOCK + 1, dtype=torch.int64, device=words.device)
    buffer = torch.empty(_BLOCK, dtype=torch.int64, device=words.device)
    start = first // _BLOCK * _BLOCK
    for number in range(len(sums)):
        low, high = max(start + number * _BLOCK, first), min(start + (number + 1) * _BLOCK, last + 1)
        at, count = low - start - number * _BLOCK, high - low
        product = buffer[:count].copy_(words[low - first : high - first]).mul_(inner[at : at + count])
        torch.sum(product, 0, out=sums[number])
    outer = _odd(torch.arange(len(sums), device=words.device) + (first // _BLOCK + _OUTER))
    return (sums * outer).sum()


def _counts(layout: Layout) -> bool:
    """Return True if this rank adds its part to exchanged sums: a weight that is whole on every rank is added only by
    the first."""
    return layout.counted if layout.sharded else dist.get_rank() == 0


@lru_cache(maxsize=8)
def _inner_keys(device: str) -> Tensor:
    return _odd(torch.arange(_BLOCK, device=device))


def _odd(seeds: Tensor) -> Tensor:
    """[n] int64 -> [n] odd numbers: SplitMix64's output for each seed. int64 products wrap, as they are to."""
    x = (seeds + 1) * -7046029254386353131
    x = (x ^ _shifted(x, 30)) * -4658895280553007687
    x = (x ^ _shifted(x, 27)) * -7723592293110705685
    return (x ^ _shifted(x, 31)) | 1


def _shifted(x: Tensor, places: int) -> Tensor:
    """x >> places, as if without a sign."""
    return (x >> places) & ((1 << (64 - places)) - 1)

"""A fingerprint of a reference's weights: it changes if any element changes, and is the same for any sharding.

A weight's elements are read as consecutive words of 32 bits. Each word has a 64-bit key that depends on its place, and
the weight's sum is Σ word(i) · key(i) mod 2^64. Keys are odd and therefore invertible, so a change within one word
always changes the sum; changes in several words cancel only by chance. (Words of 64 bits would be faster, but 2^63
times an odd number is 2^63, so two flipped signs would cancel.) The order of a sum does not matter: each rank adds up
its own elements, and ranks exchange one number per weight. The fingerprint finds mistakes; it does not withstand a
deliberate search for a collision.

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
"""B: number of words that, with their keys, stay in a core's cache."""
_OUTER = 1 << 62
"""First of the numbers from which outer keys are made."""


def digests(weights: Iterable[Weight]) -> dict[str, str]:
    """Return, by name, the dtype, shape and 16 hex digits of each weight. Collective if a weight is sharded.

    Raises:
        ValueError: a weight's dtype is complex, or its elements do not have 1, 2, 4 or 8 bytes.
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
    """Return one fingerprint of all weights, including their names: SHA-256 in hex."""
    return hashlib.sha256("\n".join(f"{name} {digest}" for name, digest in sorted(found.items())).encode()).hexdigest()


def content_sum(local: Tensor, layout: Layout) -> Tensor:
    """Return [] int64: Σ word(i) · key(i) mod 2^64, for words in which all elements of other ranks are 0."""
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
    """Return [] Σ words · keys, for words [n] that begin at place `first`."""
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
    """Return True if this rank adds its part to the exchanged sums. Only rank 0 adds a weight that every rank holds
    whole."""
    return layout.counted if layout.sharded else dist.get_rank() == 0


@lru_cache(maxsize=8)
def _inner_keys(device: str) -> Tensor:
    return _odd(torch.arange(_BLOCK, device=device))


def _odd(seeds: Tensor) -> Tensor:
    """Map [n] int64 seeds to [n] odd numbers, SplitMix64's output for each seed. int64 products wrap, as intended."""
    x = (seeds + 1) * -7046029254386353131
    x = (x ^ _shifted(x, 30)) * -4658895280553007687
    x = (x ^ _shifted(x, 27)) * -7723592293110705685
    return (x ^ _shifted(x, 31)) | 1


def _shifted(x: Tensor, places: int) -> Tensor:
    """Return x >> places, as for unsigned numbers."""
    return (x >> places) & ((1 << (64 - places)) - 1)

"""The fingerprint: against a plain implementation, the same for any sharding, another for any changed bit."""

from __future__ import annotations

import hashlib
from functools import cache
from itertools import pairwise

import pytest
import torch
from support.layouts import Piece
from support.models import MODELS
from torch import Tensor

from refkl import build_reference
from refkl.backend import Weight, Whole
from refkl.reference.weights import fingerprint
from refkl.reference.weights.fingerprint import combined, content_sum, digests

MASK = 2**64 - 1
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8]


def splitmix(seed: int) -> int:
    """Steele, Lea and Flood's generator: the output for one seed."""
    x = (seed + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@cache
def key_seed(seed: int) -> int:
    """What _odd makes of a seed: SplitMix64 adds its constant once a step."""
    return splitmix(((seed + 1) * 0x9E3779B97F4A7C15 - 0x9E3779B97F4A7C15) & MASK) | 1


def plain_sum(values: Tensor, block: int) -> int:
    data = bytes(values.contiguous().view(-1).view(torch.uint8).tolist())
    data += b"\0" * (-len(data) % 4)
    total = 0
    for place in range(len(data) // 4):
        word = int.from_bytes(data[4 * place : 4 * place + 4], "little", signed=True)
        total += word * key_seed(place % block) * key_seed(place // block + 2**62)
    return total & MASK


def values(dtype: torch.dtype, count: int) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(count).to(dtype)
    return torch.randint(0, 256, (count,)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 7, 64, 1000])
def test_against_plain_integers(dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_BLOCK", 16)
    fingerprint._inner_keys.cache_clear()
    try:
        weight = values(dtype, count)
        assert int(content_sum(weight, Whole(weight.shape))) % 2**64 == plain_sum(weight, 16)
    finally:
        monkeypatch.undo()
        fingerprint._inner_keys.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cuts", [[], [1], [2], [3], [500, 501, 1000], [70_001], [65_536, 131_072]])
def test_parts_add_up_wherever_it_is_cut(dtype: torch.dtype, cuts: list[int]) -> None:
    weight = values(dtype, 140_003)
    bounds = [0, *cuts, len(weight)]
    total = 0
    for start, end in pairwise(bounds):
        piece = Piece(weight.shape, start, end - start)
        total += int(content_sum(piece.cut(weight), piece))
    assert total % 2**64 == int(content_sum(weight, Whole(weight.shape))) % 2**64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_single_bit_counts(dtype: torch.dtype) -> None:
    weight = values(dtype, 37)
    seen = {int(content_sum(weight, Whole(weight.shape)))}
    for byte in range(37 * dtype.itemsize):
        for bit in range(8):
            changed = weight.clone()
            changed.view(torch.uint8)[byte] ^= 1 << bit
            seen.add(int(content_sum(changed, Whole(weight.shape))))
    assert len(seen) == 1 + 37 * dtype.itemsize * 8


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point], ids=str)
def test_two_signs_do_not_cancel(dtype: torch.dtype) -> None:
    """Nor does any pair of them: a key times a high power of two has few bits of its own left."""
    weight = values(dtype, 64)
    seen = set()
    for i in range(64):
        for j in range(i):
            changed = weight.clone()
            changed[[i, j]] *= -1
            seen.add(int(content_sum(changed, Whole(weight.shape))))
    assert len(seen | {int(content_sum(weight, Whole(weight.shape)))}) == 64 * 63 // 2 + 1


def test_order_counts() -> None:
    """Also where whole blocks of words change places."""
    weight = torch.randn(4 * fingerprint._BLOCK)
    swapped = weight.clone()
    swapped[[3, 8]] = weight[[8, 3]]
    half = weight.roll(2 * fingerprint._BLOCK)
    assert len({int(content_sum(w, Whole(w.shape))) for w in (weight, swapped, half)}) == 3


def test_name_shape_and_dtype_count() -> None:
    weight = torch.zeros(6)
    weights = [("a", weight), ("b", weight), ("a", weight.view(2, 3)), ("a", weight.half())]
    prints = {combined(digests([Weight(name, t, Whole(t.shape))])) for name, t in weights}
    assert len(prints) == 4


def test_weights_that_are_not_side_by_side() -> None:
    """A transposed parameter is read as its numbers stand, not as its memory does."""
    weight = torch.randn(5, 7)
    assert content_sum(weight.t(), Whole(torch.Size((7, 5)))) == content_sum(
        weight.t().contiguous(), Whole(torch.Size((7, 5)))
    )


def test_what_has_no_plain_bits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"complex64 cannot be fingerprinted"):
        content_sum(torch.zeros(2, dtype=torch.complex64), Whole(torch.Size((2,))))


@pytest.mark.parametrize("family", MODELS)
def test_every_element_of_a_model_counts(family: str) -> None:
    """One element of each weight, moved by the least that its dtype can: another fingerprint, and its name is found."""
    policy = MODELS[family]()
    reference = build_reference(policy, "clone")
    first, before = reference.fingerprint(), dict(reference.digests)
    for name, local, _ in list(reference.weights()):
        flat = local.view(-1)
        kept = flat[-1].clone()
        flat[-1] = torch.nextafter(kept, kept + 1)
        assert reference.fingerprint() != first
        assert [n for n, d in reference.digests.items() if d != before[n]] == [name]
        flat[-1] = kept
    assert reference.fingerprint() == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool], ids=str)
@pytest.mark.parametrize("count", [1, 3, 4096, 140_001])
def test_the_sum_is_the_documented_one(dtype: torch.dtype, count: int) -> None:
    """With the constants as they are: saved references and caches hold such sums."""
    whole = (torch.randn(count + 3) * 50).to(dtype)
    for tensor in (whole[:count], whole[3:]):  # the second begins at no whole word
        found = int(content_sum(tensor, Whole(tensor.shape))) % 2**64
        assert found == plain_sum(tensor, 2**16)


def test_a_fingerprint_of_an_earlier_version() -> None:
    weights = [Weight("a.weight", torch.arange(6.0).view(2, 3), Whole(torch.Size([2, 3])))]
    found = digests(weights)
    assert found == {"a.weight": f"torch.float32 [2, 3] {plain_sum(weights[0].local, 2**16):016x}"}
    assert combined(found) == hashlib.sha256(f"a.weight {found['a.weight']}".encode()).hexdigest()

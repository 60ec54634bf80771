"""kl.aggregate: hand-computed numbers and gradients, and parts that add up to the whole."""

import math

import pytest
import torch

from refkl import kl

MODES = kl.AGGREGATIONS
VALUES = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 9.0], [7.0, 8.0, 9.0]])
MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
BY_HAND = {"token-mean": 10 / 4, "seq-mean-token-sum": (6 + 4) / 2, "seq-mean-token-mean": (2 + 4) / 2}
SLOPES = {"token-mean": (1 / 4, 1 / 4), "seq-mean-token-sum": (1 / 2, 1 / 2), "seq-mean-token-mean": (1 / 6, 1 / 2)}
COUNTS = {"token-mean": 4, "seq-mean-token-sum": 2, "seq-mean-token-mean": 2}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", [MASK, MASK.long(), MASK.float()], ids=["bool", "int", "float"])
def test_by_hand(mode, mask):
    values = VALUES.clone().requires_grad_()
    result = kl.aggregate(values, mask, mode)
    result.backward()
    assert result.item() == pytest.approx(BY_HAND[mode])
    expected = torch.tensor(SLOPES[mode] + (0.0,))[:, None] * MASK
    torch.testing.assert_close(values.grad, expected)
    assert kl.aggregation_count(mask, mode).item() == COUNTS[mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_masked_reaches_neither_value_nor_gradient(mode, poison):
    values = VALUES.masked_fill(~MASK, poison).requires_grad_()
    result = kl.aggregate(values, MASK, mode)
    result.backward()
    assert result.item() == pytest.approx(BY_HAND[mode])
    assert torch.equal(values.grad[~MASK], torch.zeros(5))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_scored_is_zero_and_holds_on_to_the_graph(mode):
    values = torch.full((2, 3), math.nan, requires_grad=True)
    result = kl.aggregate(values, torch.zeros(2, 3), mode)
    result.backward()
    assert result.item() == 0.0 and torch.equal(values.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("mode", MODES)
def test_normalizer_takes_the_place_of_the_count(mode):
    whole = BY_HAND[mode] * COUNTS[mode]
    for normalizer in (8, 8.0, torch.tensor(8), torch.tensor(8.0)):
        assert kl.aggregate(VALUES, MASK, mode, normalizer=normalizer).item() == pytest.approx(whole / 8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", [[1, 5], [2, 2, 2], [5, 1], [1] * 6])
def test_parts_add_up_to_the_whole(mode, split):
    values, mask = torch.randn(6, 4, dtype=torch.float64).requires_grad_(), torch.rand(6, 4) < 0.5
    mask[3] = False
    whole = kl.aggregate(values, mask, mode)
    count = kl.aggregation_count(mask, mode)
    assert count == sum(kl.aggregation_count(m, mode) for m in mask.split(split))
    parts = zip(values.split(split), mask.split(split), strict=True)
    total = sum(kl.aggregate(v, m, mode, normalizer=count) for v, m in parts)
    assert total.item() == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(total, values)[0], torch.autograd.grad(whole, values)[0])


@pytest.mark.parametrize("mode", MODES)
def test_padding_on_either_side_changes_nothing(mode):
    pad, no = torch.full((3, 2), 5.0), torch.zeros(3, 2, dtype=torch.bool)
    for values, mask in (((pad, VALUES), (no, MASK)), ((VALUES, pad), (MASK, no))):
        assert kl.aggregate(torch.cat(values, 1), torch.cat(mask, 1), mode).item() == pytest.approx(BY_HAND[mode])


@pytest.mark.parametrize(
    ("values", "mask", "options", "message"),
    [
        (VALUES, MASK, {"mode": "tokenmean"}, r"Unknown aggregation 'tokenmean'.*Did you mean 'token-mean'"),
        (VALUES[0], MASK[0], {}, r"per_token must be \[B, T\], got shape \[3\]"),
        (VALUES, MASK[:, :1], {}, r"mask has shape \[3, 1\] but per_token has shape \[3, 3\]"),
        *((VALUES, MASK, {"normalizer": n}, r"normalizer must be positive") for n in (0, -1.0, math.nan)),
        (VALUES, MASK, {"normalizer": torch.tensor(0)}, r"normalizer must be positive and finite, got 0"),
    ],
)
def test_refusals(values, mask, options, message):
    with pytest.raises(ValueError, match=message):
        kl.aggregate(values, mask, **options)


def test_count_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match=r"Unknown aggregation.*Known: seq-mean-token-mean, "):
        kl.aggregation_count(MASK, "mean")

"""kl.aggregate: hand-computed numbers and gradients, and parts that add up to the whole."""

import math

import pytest
import torch

from refkl import kl

MODES = kl.AGGREGATIONS
VALUES = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 9.0], [7.0, 8.0, 9.0]])
MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
NORM = "seq-mean-token-sum-norm"
BY_HAND = {
    "token-mean": 10 / 4,
    "token-sum": 10.0,
    "seq-mean-token-sum": (6 + 4) / 2,
    "seq-mean-token-mean": (2 + 4) / 2,
    NORM: (6 / 5 + 4 / 5) / 2,
}
SLOPES = {
    "token-mean": (1 / 4, 1 / 4),
    "token-sum": (1.0, 1.0),
    "seq-mean-token-sum": (1 / 2, 1 / 2),
    "seq-mean-token-mean": (1 / 6, 1 / 2),
    NORM: (1 / 10, 1 / 10),
}
COUNTS = {"token-mean": 4, "token-sum": 1, "seq-mean-token-sum": 2, "seq-mean-token-mean": 2, NORM: 2}


def aggregate(values, mask, mode, **options):
    """kl.aggregate with a constant length of 5, wider than any batch here, where the mode takes one."""
    return kl.aggregate(values, mask, mode, **options, **({"length": 5} if mode == NORM else {}))


def whole_count(masks, mode):
    """What the parts of one batch divide by."""
    return 1 if mode == "token-sum" else sum(kl.aggregation_count(m, mode) for m in masks)


def test_every_mode_is_computed_by_hand():
    assert set(MODES) == set(BY_HAND) == set(SLOPES) == set(COUNTS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", [MASK, MASK.long(), MASK.float()], ids=["bool", "int", "float"])
def test_by_hand(mode, mask):
    values = VALUES.clone().requires_grad_()
    result = aggregate(values, mask, mode)
    result.backward()
    assert result.item() == pytest.approx(BY_HAND[mode])
    expected = torch.tensor(SLOPES[mode] + (0.0,))[:, None] * MASK
    torch.testing.assert_close(values.grad, expected)
    assert kl.aggregation_count(mask, mode).item() == COUNTS[mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_masked_reaches_neither_value_nor_gradient(mode, poison):
    values = VALUES.masked_fill(~MASK, poison).requires_grad_()
    result = aggregate(values, MASK, mode)
    result.backward()
    assert result.item() == pytest.approx(BY_HAND[mode])
    assert torch.equal(values.grad[~MASK], torch.zeros(5))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_scored_is_zero_and_holds_on_to_the_graph(mode):
    values = torch.full((2, 3), math.nan, requires_grad=True)
    result = aggregate(values, torch.zeros(2, 3), mode)
    result.backward()
    assert result.item() == 0.0 and torch.equal(values.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("mode", MODES)
def test_normalizer_takes_the_place_of_the_count(mode):
    whole = BY_HAND[mode] * COUNTS[mode]
    for normalizer in (8, 8.0, torch.tensor(8), torch.tensor(8.0)):
        assert aggregate(VALUES, MASK, mode, normalizer=normalizer).item() == pytest.approx(whole / 8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", [[1, 5], [2, 2, 2], [5, 1], [1] * 6])
def test_parts_add_up_to_the_whole(mode, split):
    values, mask = torch.randn(6, 4, dtype=torch.float64).requires_grad_(), torch.rand(6, 4) < 0.5
    mask[3] = False
    whole = aggregate(values, mask, mode)
    count = kl.aggregation_count(mask, mode)
    assert count == whole_count(mask.split(split), mode)
    parts = zip(values.split(split), mask.split(split), strict=True)
    total = sum(aggregate(v, m, mode, normalizer=count) for v, m in parts)
    assert total.item() == pytest.approx(whole.item(), rel=1e-12)
    gradients = (torch.autograd.grad(x, values)[0] for x in (total, whole))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_accumulation_clipping_and_a_short_last_window_train_the_same(mode, accumulation):
    """11 micro-batches of unequal size and width: windows of 1, 2 or 3, the last one short. Each window is one step of
    SGD on a clipped gradient, as it would be on all its rows at once."""
    sizes = [3, 1, 4, 2, 2, 5, 1, 3, 2, 6, 1]
    rows = torch.randn(sum(sizes), 4, 7, dtype=torch.float64)  # [rows, tokens, features]
    masks = torch.rand(sum(sizes), 4) < 0.6
    masks[4] = False

    def train(parts_of_window):
        weights = torch.zeros(7, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([weights], lr=0.5)
        for start in range(0, len(sizes), accumulation):
            window = range(start, min(start + accumulation, len(sizes)))
            first = sum(sizes[:start])
            parts = parts_of_window([sizes[i] for i in window])
            x, m = rows[first : first + sum(parts)].split(parts), masks[first : first + sum(parts)].split(parts)
            for part, mask in zip(x, m, strict=True):
                per_token = ((part @ weights - 1.0) ** 2).masked_fill(~mask, math.nan)
                # Each micro-batch is as wide as its own longest sequence.
                width = max(1, int(mask.any(0).nonzero().max()) + 1) if mask.any() else 1
                options = {"normalizer": max(1, whole_count(m, mode))}
                aggregate(per_token[:, :width], mask[:, :width], mode, **options).backward()
            assert torch.nn.utils.clip_grad_norm_([weights], 0.05) > 0.05
            optimizer.step()
            optimizer.zero_grad()
        return weights.detach()

    accumulated, whole = train(lambda parts: parts), train(lambda parts: [sum(parts)])
    assert whole.abs().max() > 0.01
    torch.testing.assert_close(accumulated, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_padding_on_either_side_changes_nothing(mode):
    pad, no = torch.full((3, 2), 5.0), torch.zeros(3, 2, dtype=torch.bool)
    for values, mask in (((pad, VALUES), (no, MASK)), ((VALUES, pad), (MASK, no))):
        assert aggregate(torch.cat(values, 1), torch.cat(mask, 1), mode).item() == pytest.approx(BY_HAND[mode])


@pytest.mark.parametrize(
    ("values", "mask", "options", "message"),
    [
        (VALUES, MASK, {"mode": "tokenmean"}, r"Unknown aggregation 'tokenmean'.*Did you mean 'token-mean'"),
        (VALUES[0], MASK[0], {}, r"per_token must be \[B, T\], got shape \[3\]"),
        (VALUES, MASK[:, :1], {}, r"mask has shape \[3, 1\] but per_token has shape \[3, 3\]"),
        *((VALUES, MASK, {"normalizer": n}, r"normalizer must be positive") for n in (0, -1.0, math.nan)),
        (VALUES, MASK, {"normalizer": torch.tensor(0)}, r"normalizer must be positive and finite, got 0"),
        *((VALUES, MASK, {"mode": NORM, "length": n}, r"length must be positive") for n in (0, -1, math.nan, math.inf)),
        *(
            (VALUES, MASK, {"mode": mode, "length": 5}, rf"length 5 has no use with aggregation '{mode}'")
            for mode in MODES
            if mode != NORM
        ),
    ],
)
def test_refusals(values, mask, options, message):
    with pytest.raises(ValueError, match=message):
        kl.aggregate(values, mask, **options)


def test_count_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match=r"Unknown aggregation.*Known: seq-mean-token-mean, "):
        kl.aggregation_count(MASK, "mean")


def test_without_a_length_the_norm_is_the_width():
    expected = (VALUES * MASK).sum() / VALUES.shape[1] / MASK.any(-1).sum()
    torch.testing.assert_close(kl.aggregate(VALUES, MASK, NORM), expected)


@pytest.mark.parametrize("mode", kl.AGGREGATIONS)
def test_a_value_that_is_no_number_shows_unless_it_is_masked(mode):
    mask = torch.tensor([[True, True], [True, False]])
    for row, column in ((0, 1), (1, 1)):
        values = torch.ones(2, 2)
        values[row, column] = math.nan
        values.requires_grad_()
        total = kl.aggregate(values, mask, mode)
        assert bool(total.isnan()) == bool(mask[row, column])
        total.backward()
        assert values.grad.isfinite().all() and values.grad[1, 1] == 0.0

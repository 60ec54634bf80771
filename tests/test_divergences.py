"""kl.divergence: against sums over the vocabulary in fp64, closed-form gradients, and where probabilities vanish."""

import math

import pytest
import torch

from refkl import kl

KINDS = kl.DIVERGENCES
INF = math.inf


def truth(logits, ref_logits, kind, weight=0.5):
    """The definition, summed in fp64 by math.fsum over the categories of one distribution."""
    p, q = (x.double().softmax(-1).tolist() for x in (logits, ref_logits))

    def relative(a, b):
        return math.fsum(x * math.log(x / y) if x else 0.0 for x, y in zip(a, b, strict=True))

    if kind == "reverse_kl":
        return relative(p, q)
    if kind == "forward_kl":
        return relative(q, p)
    m = [weight * x + (1 - weight) * y for x, y in zip(p, q, strict=True)]
    return weight * relative(p, m) + (1 - weight) * relative(q, m)


def value_and_grad(logits, ref_logits, kind="reverse_kl", **options):
    logits = logits.clone().requires_grad_()
    value = kl.divergence(logits, ref_logits, kind, **options)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_value_is_the_definition(kind, scale):
    logits, ref_logits = scale * torch.randn(2, 3, 11), scale * torch.randn(2, 3, 11)
    value = kl.divergence(logits, ref_logits, kind, weight=0.3)
    expected = [truth(a, b, kind, 0.3) for a, b in zip(logits.view(6, 11), ref_logits.view(6, 11), strict=True)]
    assert value.shape == (2, 3)
    assert value.flatten().tolist() == pytest.approx(expected, rel=2e-5)


def test_direction():
    """p = (½, ½), q = (0.9, 0.1)."""
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    assert kl.divergence(p, q, "reverse_kl").item() == pytest.approx(0.5108256, abs=1e-6)
    assert kl.divergence(p, q, "forward_kl").item() == pytest.approx(0.3680642, abs=1e-6)
    assert torch.equal(kl.divergence(p, q, "reverse_kl"), kl.divergence(q, p, "forward_kl"))


def test_gradients_in_closed_form():
    logits, ref_logits = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    p, q = logits.softmax(-1), ref_logits.softmax(-1)
    d = p.log() - q.log()
    value, slope = value_and_grad(logits, ref_logits, "reverse_kl")
    torch.testing.assert_close(slope, p * (d - value[:, None]))
    torch.testing.assert_close(value_and_grad(logits, ref_logits, "forward_kl")[1], p - q)
    log_pm = p.log() - (0.3 * p + 0.7 * q).log()
    expected = 0.3 * p * (log_pm - (p * log_pm).sum(-1, keepdim=True))
    torch.testing.assert_close(value_and_grad(logits, ref_logits, "jsd", weight=0.3)[1], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_gradient_is_the_derivative_of_the_value(kind, scale):
    """Over the three scales, the terms on either side of |d| = 1 are taken."""
    ref_logits = torch.randn(2, 5, dtype=torch.float64)
    logits = (ref_logits + scale * torch.randn(2, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kl.divergence(x, ref_logits, kind, weight=0.3), logits)


def test_no_gradient_reaches_the_reference():
    logits, ref_logits = torch.randn(2, 5).requires_grad_(), torch.randn(2, 5).requires_grad_()
    sum(kl.divergence(logits, ref_logits, kind).sum() for kind in KINDS).backward()
    assert logits.grad is not None and ref_logits.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
def test_small_divergences_keep_their_digits_and_sign_in_fp32(kind, noise):
    ref_logits = 3 * torch.randn(20, 1000)
    logits = ref_logits + noise * torch.randn(20, 1000)
    value = kl.divergence(logits, ref_logits, kind)
    expected = kl.divergence(logits.double(), ref_logits.double(), kind)  # to 1e-12; the definition is tested above
    assert (value >= 0).all()
    torch.testing.assert_close(value.double(), expected, rtol=2e-2 if noise == 1e-4 else 1e-3, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_logits_give_exactly_zero_and_no_gradient(kind):
    logits = 5 * torch.randn(4, 50)
    value, slope = value_and_grad(logits, logits, kind, weight=0.3)
    assert torch.equal(value, torch.zeros(4)) and torch.equal(slope, torch.zeros(4, 50))


def test_jsd_is_symmetric_at_one_half_and_bounded():
    a, b = 10 * torch.randn(50, 6), 10 * torch.randn(50, 6)
    value = kl.divergence(a, b, "jsd")
    torch.testing.assert_close(value, kl.divergence(b, a, "jsd"))
    assert value.max() <= math.log(2) + 1e-6


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9])
def test_jsd_of_disjoint_supports_is_the_entropy_of_the_weight(weight):
    value, slope = value_and_grad(torch.tensor([1.0, -INF]), torch.tensor([-INF, 1.0]), "jsd", weight=weight)
    assert value.item() == pytest.approx(-weight * math.log(weight) - (1 - weight) * math.log(1 - weight), rel=1e-6)
    assert torch.equal(slope, torch.zeros(2))


# where probabilities vanish


@pytest.mark.parametrize("kind", KINDS)
def test_a_category_that_both_exclude_does_not_exist(kind):
    logits, ref_logits = torch.randn(3, 5), torch.randn(3, 5)
    value, slope = value_and_grad(logits, ref_logits, kind, weight=0.3)
    none = torch.full((3, 2), -INF)
    wide, wide_slope = value_and_grad(torch.cat([logits, none], 1), torch.cat([ref_logits, none], 1), kind, weight=0.3)
    torch.testing.assert_close(wide, value)
    torch.testing.assert_close(wide_slope, torch.cat([slope, torch.zeros(3, 2)], 1))


@pytest.mark.parametrize(
    ("kind", "policy_excludes", "finite"),
    [
        ("reverse_kl", True, True),
        ("reverse_kl", False, False),
        ("forward_kl", True, False),
        ("forward_kl", False, True),
        ("jsd", True, True),
        ("jsd", False, True),
    ],
)
def test_a_category_that_one_excludes(kind, policy_excludes, finite):
    """p = (½, ½, 0) and q = (¼, ¼, ½), or the other way about."""
    narrow, wide = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.25, 0.5]).log()
    logits, ref_logits = (narrow, wide) if policy_excludes else (wide, narrow)
    value, slope = value_and_grad(logits, ref_logits, kind)
    assert value.item() == pytest.approx(truth(logits, ref_logits, kind) if finite else INF, rel=1e-6)
    if finite:
        assert slope.isfinite().all()


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_a_vanishing_probability_against_an_excluded_category_is_not_nan(kind):
    """A policy with a floor of e^-200 against a reference with a top-k filter."""
    floor, filtered = torch.tensor([0.0, -200.0]), torch.tensor([0.0, -INF])
    logits, ref_logits = (floor, filtered) if kind == "reverse_kl" else (filtered, floor)
    assert not kl.divergence(logits, ref_logits, kind).isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_far_apart_is_finite_and_right_in_fp32(kind):
    logits = torch.tensor([[0.0, 80.0, -80.0], [0.0, -200.0, 3.0], [90.0, 0.0, 0.0]])
    ref_logits = torch.tensor([[80.0, 0.0, 10.0], [-200.0, 0.0, 100.0], [0.0, 90.0, 0.0]])
    value, slope = value_and_grad(logits, ref_logits, kind)
    expected, expected_slope = value_and_grad(logits.double(), ref_logits.double(), kind)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope.double(), expected_slope, rtol=1e-4, atol=1e-5)
    if kind != "jsd":  # exp(-170) is a number in fp64 and 0 in the sum of jsd's mixture
        assert expected.tolist() == pytest.approx(
            [truth(a, b, kind) for a, b in zip(logits, ref_logits, strict=True)], rel=1e-9
        )


# dtypes and refusals


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_logits_are_computed_in_fp32(kind):
    logits, ref_logits = torch.randn(3, 40).bfloat16(), torch.randn(3, 40).bfloat16()
    value, slope = value_and_grad(logits, ref_logits, kind)
    expected, expected_slope = value_and_grad(logits.float(), ref_logits.float(), kind)
    assert value.dtype == torch.float32 and slope.dtype == torch.bfloat16
    assert torch.equal(value, expected) and torch.equal(slope, expected_slope.bfloat16())
    assert kl.divergence(logits, ref_logits.double(), kind).dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "reverse-kl"}, r"Unknown divergence 'reverse-kl'.*Did you mean 'reverse_kl'.*forward_kl, jsd"),
        ({"kind": "jsd", "weight": 0.0}, r"weight in \(0, 1\), got 0"),
        ({"kind": "jsd", "weight": 1.0}, r"weight in \(0, 1\), got 1"),
        ({"kind": "jsd", "weight": math.nan}, r"weight in \(0, 1\), got nan"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        kl.divergence(torch.zeros(2, 3), torch.zeros(2, 3), **options)


def test_vocabularies_of_different_size_are_refused():
    with pytest.raises(ValueError, match=r"ref_logits has shape \[2, 4\] but logits has shape \[2, 3\]"):
        kl.divergence(torch.zeros(2, 3), torch.zeros(2, 4))

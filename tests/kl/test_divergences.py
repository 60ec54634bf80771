"""kl.divergence: against sums over the vocabulary in fp64, closed-form gradients, and where probabilities vanish."""

import itertools
import math

import pytest
import torch
from support import plain

from refkl import kl

INF = math.inf
KINDS = [
    ("reverse_kl", {}),
    ("forward_kl", {}),
    ("jsd", {"weight": 0.3}),
    ("amari", {"order": 1.7}),
    ("amari", {"order": 0.2}),
    ("alpha", {"order": -0.6}),
    ("renyi", {"order": 0.4}),
    ("renyi", {"order": 3.0}),
    ("chi2", {}),
    ("hellinger", {}),
    ("tv", {}),
]
every_kind = pytest.mark.parametrize(
    ("kind", "options"), KINDS, ids=lambda x: x if isinstance(x, str) else str(x or "")
)


def truth(logits, ref_logits, kind, weight=0.5, order=None):
    """The definition, summed in fp64 by math.fsum over the categories of one distribution."""
    p, q = (x.double().softmax(-1).tolist() for x in (logits, ref_logits))

    def total(term, a=p, b=q):
        return math.fsum(term(x, y) for x, y in zip(a, b, strict=True))

    def relative(a, b):
        return total(lambda x, y: x * math.log(x / y) if x else 0.0, a, b)

    if kind == "reverse_kl":
        return relative(p, q)
    if kind == "forward_kl":
        return relative(q, p)
    if kind == "jsd":
        m = [weight * x + (1 - weight) * y for x, y in zip(p, q, strict=True)]
        return weight * relative(p, m) + (1 - weight) * relative(q, m)
    if kind == "chi2":
        return total(lambda x, y: (x - y) ** 2 / y)
    if kind == "hellinger":
        return total(lambda x, y: (math.sqrt(x) - math.sqrt(y)) ** 2) / 2
    if kind == "tv":
        return total(lambda x, y: abs(x - y)) / 2
    powers = total(lambda x, y: math.exp(order * math.log(x) + (1 - order) * math.log(y)) if x and y else 0.0)
    if kind == "renyi":
        return math.log(powers) / (order - 1)
    return (powers - 1) / (order * (order - 1))


def value_and_grad(logits, ref_logits, kind="reverse_kl", **options):
    logits = logits.clone().requires_grad_()
    value = kl.divergence(logits, ref_logits, kind, **options)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


@every_kind
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_value_is_the_definition(kind, options, scale):
    """In fp32 and fp64, over several dimensions."""
    logits, ref_logits = scale * torch.randn(2, 3, 11), scale * torch.randn(2, 3, 11)
    rows = zip(logits.view(6, 11), ref_logits.view(6, 11), strict=True)
    expected = [truth(a, b, kind, **options) for a, b in rows]
    value = kl.divergence(logits, ref_logits, kind, **options)
    assert value.shape == (2, 3)
    assert value.flatten().tolist() == pytest.approx(expected, rel=3e-5)
    value = kl.divergence(logits.double(), ref_logits.double(), kind, **options)
    assert value.flatten().tolist() == pytest.approx(expected, rel=1e-11)


def test_direction():
    """p = (½, ½), q = (0.9, 0.1)."""
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    assert kl.divergence(p, q, "reverse_kl").item() == pytest.approx(0.5108256, abs=1e-6)
    assert kl.divergence(p, q, "forward_kl").item() == pytest.approx(0.3680642, abs=1e-6)
    assert torch.equal(kl.divergence(p, q, "reverse_kl"), kl.divergence(q, p, "forward_kl"))
    by_hand = {
        ("amari", 2.0): (0.25 / 0.9 + 0.25 / 0.1 - 1) / 2,
        ("amari", -1.0): (0.81 / 0.5 + 0.01 / 0.5 - 1) / 2,
        ("alpha", 2.0): (0.25 / 0.9 + 0.25 / 0.1 - 1) / 2,
        ("renyi", 2.0): math.log(0.25 / 0.9 + 0.25 / 0.1),
        ("renyi", 0.5): -2 * math.log(math.sqrt(0.45) + math.sqrt(0.05)),
        ("chi2", None): 0.16 / 0.9 + 0.16 / 0.1,
        ("hellinger", None): 1 - math.sqrt(0.45) - math.sqrt(0.05),
        ("tv", None): 0.4,
    }
    for (kind, order), expected in by_hand.items():
        assert kl.divergence(p, q, kind, order=order).item() == pytest.approx(expected, rel=1e-6), kind


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

    def centred(w):
        return w - p * w.sum(-1, keepdim=True)

    for order in (-0.6, 0.3, 0.5, 1.7, 3.0):
        power = p**order * q ** (1 - order)
        _, slope = value_and_grad(logits, ref_logits, "amari", order=order)
        torch.testing.assert_close(slope, centred(power) / (order - 1))
        if order > 0:
            _, slope = value_and_grad(logits, ref_logits, "renyi", order=order)
            torch.testing.assert_close(slope, (power / power.sum(-1, keepdim=True) - p) * order / (order - 1))
    torch.testing.assert_close(value_and_grad(logits, ref_logits, "chi2")[1], 2 * centred(p * p / q))
    torch.testing.assert_close(value_and_grad(logits, ref_logits, "hellinger")[1], -0.5 * centred((p * q).sqrt()))
    torch.testing.assert_close(value_and_grad(logits, ref_logits, "tv")[1], 0.5 * centred(p * (p - q).sign()))


@every_kind
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
def test_gradient_is_the_derivative_of_the_value(kind, options, scale):
    """Over the three scales, the terms on either side of |d| = 1 are taken."""
    ref_logits = torch.randn(2, 5, dtype=torch.float64)
    logits = (ref_logits + scale * torch.randn(2, 5, dtype=torch.float64)).requires_grad_()
    size = kl.divergence(logits, ref_logits, kind, **options).max().item()
    step = 1e-8 if scale == 1e-3 and kind == "tv" else 1e-6  # tv has a corner at each p = q
    assert torch.autograd.gradcheck(
        lambda x: kl.divergence(x, ref_logits, kind, **options) / size, logits, eps=step, atol=1e-5
    )


def test_no_gradient_reaches_the_reference():
    logits, ref_logits = torch.randn(2, 5).requires_grad_(), torch.randn(2, 5).requires_grad_()
    sum(kl.divergence(logits, ref_logits, kind, **options).sum() for kind, options in KINDS).backward()
    assert logits.grad is not None and ref_logits.grad is None


@every_kind
@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("top_k", [None, 20])
def test_small_divergences_keep_their_digits_and_sign_in_fp32(kind, options, noise, top_k):
    """Digits of the logits are the limit: around 10 they are 1e-6 apart, which tv feels to first order."""
    ref_logits = 3 * torch.randn(20, 1000)
    logits = ref_logits + noise * torch.randn(20, 1000)
    value = kl.divergence(logits, ref_logits, kind, top_k=top_k, **options)
    expected = kl.divergence(logits.double(), ref_logits.double(), kind, top_k=top_k, **options)
    assert (value >= 0).all()
    torch.testing.assert_close(value.double(), expected, rtol=2e-2 if noise == 1e-4 else 1e-3, atol=0.0)


@every_kind
@pytest.mark.parametrize("noise", [1e-8, 1e-7, 1e-6, 1e-5, 1.0, 20.0])
def test_never_negative(kind, options, noise):
    ref_logits = 3 * torch.randn(300, 100)
    logits = ref_logits + noise * torch.randn(300, 100)
    for top_k in (None, 1, 7):
        assert (kl.divergence(logits, ref_logits, kind, top_k=top_k, **options) >= 0).all()


@every_kind
@pytest.mark.parametrize("top_k", [None, 1, 9])
def test_equal_logits_give_exactly_zero_and_no_gradient(kind, options, top_k):
    logits = 5 * torch.randn(4, 50)
    value, slope = value_and_grad(logits, logits, kind, top_k=top_k, **options)
    assert torch.equal(value, torch.zeros(4)) and torch.equal(slope, torch.zeros(4, 50))


@pytest.mark.parametrize("kind", ["amari", "renyi"])
@pytest.mark.parametrize("scale", [0.01, 2.0])
def test_orders_near_one_and_zero_are_near_the_kls(kind, scale):
    """And keep their digits in fp32, though (Σ p^a q^(1-a) - 1) / (a (a - 1)) is 0/0 there."""
    ref_logits = torch.randn(5, 30, dtype=torch.float64)
    logits = ref_logits + scale * torch.randn(5, 30, dtype=torch.float64)
    for limit, twin in ((1.0, "reverse_kl"), (0.0, "forward_kl"))[: 2 if kind == "amari" else 1]:
        expected, expected_slope = value_and_grad(logits, ref_logits, twin)
        for shift in (-1e-7, 1e-7):
            value, slope = value_and_grad(logits, ref_logits, kind, order=limit + shift)
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=0.0)
            torch.testing.assert_close(slope, expected_slope, rtol=1e-4, atol=1e-6)
    for order in (0.999, 1.0001, 0.0001, 0.001):
        value, slope = value_and_grad(logits.float(), ref_logits.float(), kind, order=order)
        expected, expected_slope = value_and_grad(
            logits.float().double(), ref_logits.float().double(), kind, order=order
        )
        torch.testing.assert_close(value.double(), expected, rtol=1e-5 if scale == 2.0 else 3e-4, atol=0.0)
        torch.testing.assert_close(slope.double(), expected_slope, rtol=1e-4, atol=1e-5 * scale)


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


@every_kind
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_category_that_both_exclude_does_not_exist(kind, options, top_k):
    logits, ref_logits = torch.randn(3, 5), torch.randn(3, 5)
    value, slope = value_and_grad(logits, ref_logits, kind, top_k=top_k, **options)
    none = torch.full((3, 2), -INF)
    wide = torch.cat([logits, none], 1), torch.cat([ref_logits, none], 1)
    wide_value, wide_slope = value_and_grad(*wide, kind, top_k=top_k, **options)
    torch.testing.assert_close(wide_value, value)
    torch.testing.assert_close(wide_slope, torch.cat([slope, torch.zeros(3, 2)], 1))


def order_of(kind, options):
    """The power of p, where the kind is a power divergence or the limit of one; None where it is bounded."""
    return {"reverse_kl": 1.0, "forward_kl": 0.0, "chi2": 2.0}.get(kind, options.get("order"))


@every_kind
@pytest.mark.parametrize("policy_excludes", [True, False])
def test_a_category_that_one_excludes(kind, options, policy_excludes):
    """p = (½, ½, 0) and q = (¼, ¼, ½), or the other way about: inf where what is missing has a power of 0 or less."""
    narrow, wide = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.25, 0.5]).log()
    logits, ref_logits = (narrow, wide) if policy_excludes else (wide, narrow)
    order = order_of(kind, options)
    infinite = order is not None and (order <= 0.0 if policy_excludes else order >= 1.0)
    for top_k in (None, 1, 2):  # all that is left out of the top 2 is one category, so that this is exact
        value, slope = value_and_grad(logits, ref_logits, kind, top_k=top_k, **options)
        if top_k != 1:
            expected = INF if infinite else truth(logits, ref_logits, kind, **options)
            assert value.item() == pytest.approx(expected, rel=1e-6)
        assert slope.isfinite().all()


@every_kind
def test_distributions_that_share_nothing(kind, options):
    value, slope = value_and_grad(torch.tensor([1.0, 1.0, -INF]), torch.tensor([-INF, -INF, 1.0]), kind, **options)
    order = options.get("order")
    bounded = {"hellinger": 1.0, "tv": 1.0, "jsd": -0.3 * math.log(0.3) - 0.7 * math.log(0.7)}
    if kind == "amari" and order < 1:
        bounded["amari"] = 1 / (order * (1 - order))
    assert value.item() == pytest.approx(bounded.get(kind, INF), rel=1e-6)
    assert slope.isfinite().all()


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_a_vanishing_probability_against_an_excluded_category_is_not_nan(kind):
    """A policy with a floor of e^-200 against a reference with a top-k filter."""
    floor, filtered = torch.tensor([0.0, -200.0]), torch.tensor([0.0, -INF])
    logits, ref_logits = (floor, filtered) if kind == "reverse_kl" else (filtered, floor)
    assert not kl.divergence(logits, ref_logits, kind).isnan()


@every_kind
def test_far_apart_is_finite_and_right_in_fp32(kind, options):
    logits = torch.tensor([[0.0, 80.0, -80.0], [0.0, -200.0, 3.0], [90.0, 0.0, 0.0]])
    ref_logits = torch.tensor([[80.0, 0.0, 10.0], [-200.0, 0.0, 100.0], [0.0, 90.0, 0.0]])
    value, slope = value_and_grad(logits, ref_logits, kind, **options)
    assert value.isfinite().all() and slope.isfinite().all()
    expected, expected_slope = value_and_grad(logits.double(), ref_logits.double(), kind, **options)
    within = expected < math.exp(45)  # where the powers saturate is tested below
    assert (value[~within] > math.exp(45)).all()
    torch.testing.assert_close(value[within].double(), expected[within], rtol=1e-5, atol=4e-6)  # 100 has digits to 4e-6
    torch.testing.assert_close(slope[within].double(), expected_slope[within], rtol=1e-4, atol=1e-5)
    if kind != "jsd":  # exp(-170) is a number in fp64 and 0 in the sum of jsd's mixture
        assert expected.tolist() == pytest.approx(
            [truth(a, b, kind, **options) for a, b in zip(logits, ref_logits, strict=True)], rel=1e-9
        )


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 60.0), (torch.float64, 600.0)])
def test_powers_saturate(dtype, most):
    """p ≈ (1, e^-G), q ≈ (e^-G, 1): p²/q is e^G. The logarithm of renyi has no need to."""
    for gap in (most - 5, most + 5, 2 * most):
        logits, ref_logits = torch.tensor([gap, 0.0], dtype=dtype), torch.tensor([0.0, gap], dtype=dtype)
        reached = math.exp(min(gap, most))
        for kind, order, expected in (
            ("chi2", None, reached),
            ("amari", 2.0, reached / 2),
            ("amari", -1.0, reached / 2),
        ):
            value, slope = value_and_grad(logits, ref_logits, kind, order=order)
            assert value.item() == pytest.approx(expected, rel=1e-5) and slope.isfinite().all()
        assert kl.divergence(logits, ref_logits, "renyi", order=2.0).item() == pytest.approx(gap, rel=1e-6)
        # 1/(a-1) · log(e^(-aG) + e^(-(1-a)G)) at a = ¼
        found = kl.divergence(logits, ref_logits, "renyi", order=0.25).item()
        assert found == pytest.approx(gap / 3, rel=1e-6)


# top_k


@every_kind
@pytest.mark.parametrize("k", [1, 3, 8, 9, 20])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 5.0])
def test_top_k_is_the_divergence_of_the_coarser_distributions(kind, options, k, scale):
    """Value and gradient; all of it at k = V and beyond."""
    ref_logits = 2 * torch.randn(6, 9, dtype=torch.float64)
    logits = (ref_logits + scale * torch.randn(6, 9, dtype=torch.float64)).requires_grad_()
    found = kl.divergence(logits, ref_logits, kind, top_k=k, **options)
    expected = plain.divergence(logits, ref_logits, kind, top_k=k, **options)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-14)
    slopes = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-7, atol=1e-12)
    if k >= 9:
        assert torch.equal(found, kl.divergence(logits, ref_logits, kind, **options))


@every_kind
def test_gradient_of_top_k_is_the_derivative_of_the_value(kind, options):
    """Away from ties, where the k likeliest change."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0], [0.0, 4.0, -2.0, 1.0, 2.0]], dtype=torch.float64)
    ref_logits = torch.randn(2, 5, dtype=torch.float64)
    for k in (1, 2, 4):
        assert torch.autograd.gradcheck(
            lambda x: kl.divergence(x, ref_logits, kind, top_k=k, **options),  # noqa: B023
            logits.clone().requires_grad_(),
        )


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_top_k_is_a_lower_bound_that_grows_with_k(kind, options, dtype, scale):
    ref_logits = 2 * torch.randn(300, 12, dtype=dtype)
    logits = ref_logits + scale * torch.randn(300, 12, dtype=dtype)
    values = [kl.divergence(logits, ref_logits, kind, top_k=k, **options) for k in range(1, 13)]
    rounding = 1e-10 if dtype == torch.float64 else 1e-4
    for less, more in itertools.pairwise(values):
        assert (less >= 0).all()
        assert (less <= more * (1 + rounding) + (1e-13 if dtype == torch.float64 else 1e-8)).all()
    assert torch.equal(values[-1], kl.divergence(logits, ref_logits, kind, **options))


def test_a_tail_that_underflows_is_not_a_tail_that_is_excluded():
    """e^-200 is 0 in fp32: the bound must hold there too, and the gradient be alive."""
    logits, ref_logits = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([200.0, 0.0, 0.0])
    for kind, options in KINDS:
        for pair in ((logits, ref_logits), (ref_logits, logits)):
            value, slope = value_and_grad(*pair, kind, top_k=1, **options)
            exact = kl.divergence(*pair, kind, **options)
            assert 0 < value <= exact * (1 + 1e-5), kind
            assert slope.isfinite().all()
    value, slope = value_and_grad(logits, ref_logits, top_k=1)
    p = 2 / (2 + math.e)
    expected = p * (math.log(p) - math.log(2) + 200) + (1 - p) * math.log(1 - p)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert slope[0].item() == pytest.approx(-p * (1 - p) * (math.log(p / 2) + 200 - math.log(1 - p)), rel=1e-5)


def test_an_excluded_category_in_the_bucket_counts_with_the_bucket():
    """p = (.6, .2, .1, .1), q = (.5, .2, .3, 0): the bucket of p's two last has .2 against .3."""
    p, q = torch.tensor([0.6, 0.2, 0.1, 0.1]), torch.tensor([0.5, 0.2, 0.3, 0.0])
    value, slope = value_and_grad(p.log(), q.log(), top_k=2)
    terms = [0.6 * math.log(0.6 / 0.5), 0.0, 0.2 * math.log(0.2 / 0.3)]
    assert value.item() == pytest.approx(sum(terms), rel=1e-5)
    assert slope[2].item() == pytest.approx(0.1 * (math.log(0.2 / 0.3) - sum(terms)), rel=1e-5)
    assert kl.divergence(p.log(), q.log(), top_k=3).item() == INF  # alone in its bucket
    q = torch.tensor([0.7, 0.3, 0.0, 0.0])
    assert kl.divergence(p.log(), q.log(), top_k=2).item() == INF  # all of the bucket
    assert kl.divergence(q.log(), p.log(), "forward_kl", top_k=2).item() == INF


# dtypes and refusals


@every_kind
def test_half_precision_logits_are_computed_in_fp32(kind, options):
    logits, ref_logits = torch.randn(3, 40).bfloat16(), torch.randn(3, 40).bfloat16()
    value, slope = value_and_grad(logits, ref_logits, kind, **options)
    expected, expected_slope = value_and_grad(logits.float(), ref_logits.float(), kind, **options)
    assert value.dtype == torch.float32 and slope.dtype == torch.bfloat16
    assert torch.equal(value, expected) and torch.equal(slope, expected_slope.bfloat16())
    assert kl.divergence(logits, ref_logits.double(), kind, **options).dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "reverse-kl"}, r"Unknown divergence 'reverse-kl'.*Did you mean 'reverse_kl'.*forward_kl.*jsd"),
        ({"kind": "jsd", "weight": 0.0}, r"weight in \(0, 1\), got 0"),
        ({"kind": "jsd", "weight": 1.0}, r"weight in \(0, 1\), got 1"),
        ({"kind": "jsd", "weight": math.nan}, r"weight in \(0, 1\), got nan"),
        *(
            ({"kind": kind, "order": order}, f"{kind} needs a finite order.*got {order}")
            for kind in ("amari", "alpha", "renyi")
            for order in (None, math.nan, INF)
        ),
        ({"kind": "amari", "order": 1.0}, "amari of order 1.0 is a limit: ask for 'reverse_kl'"),
        ({"kind": "renyi", "order": 1.0}, "renyi of order 1.0 is a limit: ask for 'reverse_kl'"),
        ({"kind": "alpha", "order": 0.0}, "alpha of order 0.0 is a limit: ask for 'forward_kl'"),
        ({"kind": "renyi", "order": -0.5}, "renyi takes a positive order, got -0.5"),
        ({"kind": "jsd", "order": 0.5}, "order=0.5 belongs to 'amari'.*jsd takes none"),
        ({"kind": "chi2", "order": 2.0}, "order=2.0 belongs to 'amari'.*chi2 takes none"),
        ({"top_k": 0}, "top_k counts categories and must be at least 1, got 0"),
        ({"top_k": -3}, "at least 1, got -3"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        kl.divergence(torch.zeros(2, 3), torch.zeros(2, 3), **options)


def test_vocabularies_of_different_size_are_refused():
    with pytest.raises(ValueError, match=r"ref_logits has shape \[2, 4\] but logits has shape \[2, 3\]"):
        kl.divergence(torch.zeros(2, 3), torch.zeros(2, 4))


# NaN in is NaN out


SPOILT = {
    "policy": (math.nan, 0.5),
    "reference": (0.5, math.nan),
    "policy inf": (INF, 0.5),
    "reference inf": (0.5, INF),
}


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("excluded", [False, True], ids=["", "excluded"])
@pytest.mark.parametrize("side", SPOILT)
@every_kind
def test_a_logit_that_is_no_number_shows_in_value_and_gradient(kind, options, side, excluded, top_k):
    """In its row only; beside a category that both exclude, whose -inf - -inf is 0, and without one."""
    logits, ref_logits = torch.randn(2, 3, 6)
    if excluded:
        logits[:, 4] = ref_logits[:, 4] = -INF
    clean = value_and_grad(logits, ref_logits, kind, top_k=top_k, **options)
    logits[1, 2], ref_logits[1, 2] = SPOILT[side]
    value, grad = value_and_grad(logits, ref_logits, kind, top_k=top_k, **options)
    assert value[1].isnan() and grad[1].isnan().all()
    for found, expected in zip((value, grad), clean, strict=True):
        assert torch.equal(found[[0, 2]], expected[[0, 2]]) and expected.isfinite().all()


@every_kind
def test_a_category_that_both_exclude_adds_nothing(kind, options):
    logits, ref_logits = torch.randn(2, 3, 6, dtype=torch.float64)
    with_it = [torch.cat([x, torch.full((3, 2), -INF)], 1) for x in (logits, ref_logits)]
    value, grad = value_and_grad(*with_it, kind, **options)
    expected, expected_grad = value_and_grad(logits, ref_logits, kind, **options)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, torch.cat([expected_grad, torch.zeros(3, 2)], 1))


def test_a_masked_row_that_is_no_number_gets_no_gradient():
    logits, ref_logits = torch.randn(3, 6).requires_grad_(), torch.randn(3, 6)
    ref_logits[1, 2] = math.nan
    mask = torch.tensor([True, False, True])
    kl.divergence(logits, ref_logits).masked_fill(~mask, 0.0).sum().backward()
    assert torch.equal(logits.grad[1], torch.zeros(6)) and logits.grad[mask].abs().sum() > 0
    assert logits.grad.isfinite().all()

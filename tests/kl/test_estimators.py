"""kl.estimate: values against formulas, and expectations by enumeration of small categorical policies in fp64."""

import math

import pytest
import torch

from refkl import kl

ESTIMATORS = ["k1", "k2", "k3", "abs"]
FORMULAS = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.expm1(-d) + d,
    "abs": abs,
}
TAILS = [-100.0, -12.0, -3.0, -0.015625, 0.0, 0.5, 12.0, 100.0]  # all of them numbers of fp16 and bf16 too


def policies(*shape, n=3):
    """fp64 logits of `n` categorical distributions; the first is the policy and has grad."""
    logits = [torch.randn(*shape, dtype=torch.float64) for _ in range(n)]
    logits[0].requires_grad_()
    return logits


def exact_kl(logits, ref_logits):
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def expected(logits, ref_logits, estimator, sampler=None, **options):
    """Σ_x s(x) · estimate at x: the expectation over samples of s, which is the policy itself unless given. The
    samples are fixed when the gradient is taken, as they are in training."""
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    old_logp = None if sampler is None else sampler.log_softmax(-1)
    share = (logp if sampler is None else old_logp).exp().detach()
    return (share * kl.estimate(logp, ref_logp, estimator, old_logp=old_logp, **options)).sum(-1)


def grad(value, logits):
    return torch.autograd.grad(value.sum(), logits)[0]


# values


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("gradient", kl.GRADIENTS)
def test_value_is_the_formula_whatever_the_gradient(estimator, gradient):
    d = torch.tensor([-12.0, -3.0, -0.5, 0.0, 1e-3, 2.0, 30.0], dtype=torch.float64)
    ref_logp = torch.linspace(-4, -1, 7, dtype=torch.float64)
    value = kl.estimate(ref_logp + d, ref_logp, estimator, gradient=gradient)
    assert value.tolist() == pytest.approx([FORMULAS[estimator](x) for x in d.tolist()], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_for_the_kl_of_policy_from_reference(estimator):
    p, q, _ = policies(7)
    assert expected(p, q, estimator).item() == pytest.approx(exact_kl(p, q).item(), rel=1e-12)
    assert exact_kl(p, q).item() != pytest.approx(exact_kl(q, p).item(), rel=0.05)  # so a direction is told apart


def test_k2_and_k3_are_never_negative_and_k1_is_where_the_reference_is_likelier():
    d = torch.cat([torch.linspace(-50, 50, 999), torch.tensor([1e-7, -1e-7, 1e-20])])
    zero = torch.zeros_like(d)
    assert kl.estimate(d, zero, "k2").min() >= 0 and kl.estimate(d, zero, "k3").min() >= 0
    assert torch.equal(kl.estimate(d, zero, "k1") < 0, d < 0)


@pytest.mark.parametrize("d", [1e-2, 1e-3, 1e-4, 1e-6, -1e-4, -1e-6])
def test_k3_keeps_its_digits_where_the_log_ratio_is_tiny(d):
    value = kl.estimate(torch.tensor([d]), torch.zeros(1), "k3")
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(d * d / 2 - d**3 / 6, rel=1e-2)  # Taylor, good to 1e-5 at the largest d


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_models_give_exactly_zero_and_no_gradient(estimator):
    logp = torch.randn(4, 5).requires_grad_()
    value = kl.estimate(logp, logp.detach().clone(), estimator)
    assert torch.equal(value, torch.zeros(4, 5))
    assert torch.equal(grad(value, logp), torch.zeros(4, 5))


def test_half_precision_inputs_are_subtracted_in_fp32():
    logp, ref_logp = torch.tensor([-5.0, -0.25]).bfloat16(), torch.tensor([-5.03125, -0.2520]).bfloat16()
    value = kl.estimate(logp, ref_logp, "k1")
    assert value.dtype == torch.float32
    assert torch.equal(value, logp.float() - ref_logp.float())
    assert kl.estimate(logp, ref_logp.double(), "k1").dtype == torch.float64


# gradients


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_reverse_kl_gradient_is_that_of_the_kl_whatever_the_estimator(estimator):
    p, q, _ = policies(7)
    torch.testing.assert_close(grad(expected(p, q, estimator), p), grad(exact_kl(p, q), p), rtol=1e-10, atol=1e-14)


def test_autograd_gradients_are_what_the_formulas_have():
    p, q, _ = policies(7)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    # ∇ Σ p(x) f(x) with f held fixed is Σ p(x) f(x) ∇log p(x)
    sign = grad((log_p.exp() * (log_p - log_q).sign().detach()).sum(), p)
    truth = {
        "k1": torch.zeros_like(p),
        "k2": grad(exact_kl(p, q), p),
        "k3": grad(exact_kl(q, p), p),  # the forward KL
        "abs": sign,
    }
    for estimator, expected_grad in truth.items():
        found = grad(expected(p, q, estimator, gradient="autograd"), p)
        torch.testing.assert_close(found, expected_grad, rtol=1e-10, atol=1e-14, msg=lambda m, e=estimator: f"{e}: {m}")


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_autograd_is_the_derivative_of_the_value(estimator, off_policy):
    logp, ref_logp, old = (-3 * torch.rand(2, 4, dtype=torch.float64) for _ in range(3))
    old_logp = old if off_policy else None
    for ratio in kl.estimators.RATIOS if off_policy else ["token"]:
        assert torch.autograd.gradcheck(
            lambda x, ratio=ratio: kl.estimate(
                x, ref_logp, estimator, gradient="autograd", old_logp=old_logp, ratio=ratio
            ),
            logp.clone().requires_grad_(),
        )


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_reverse_kl_gradient_grows_with_the_log_ratio_and_is_never_clamped(estimator, dtype):
    d = torch.tensor(TAILS, dtype=dtype, requires_grad=True)
    value = kl.estimate(d, torch.zeros_like(d), estimator)
    assert value.isfinite().all() and value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(grad(value, d), d.detach())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("ratio", kl.estimators.RATIOS)
def test_off_policy_reverse_kl_gradient_is_the_weight_times_the_log_ratio(estimator, ratio):
    """Above the cap of the weight too, where it is exp(60) times the log-ratio."""
    logp = torch.tensor([-3.0, -1.0, -12.0, -100.0], requires_grad=True)
    old_logp = torch.tensor([-2.0, -3.0, -12.5, -200.0])
    value = kl.estimate(logp, torch.zeros(4), estimator, old_logp=old_logp, ratio=ratio)
    drifts = [-1.0, 2.0, 0.5, 60.0] if ratio == "token" else [-1.0, 1.0, 1.5, 60.0]
    assert value.isfinite().all()
    assert grad(value, logp).tolist() == pytest.approx(
        [math.exp(w) * d for w, d in zip(drifts, logp.tolist(), strict=True)], rel=1e-5
    )


@pytest.mark.parametrize("estimator", ["k2", "k3", "abs"])
def test_autograd_pulls_back_in_the_tail(estimator):
    d = torch.tensor([-100.0, -65.0, -12.0, 12.0, 100.0], requires_grad=True)
    slope = grad(kl.estimate(d, torch.zeros_like(d), estimator, gradient="autograd"), d)
    assert slope.isfinite().all()
    assert torch.equal(slope.sign(), d.detach().sign())


@pytest.mark.parametrize("ratio", kl.estimators.RATIOS)
def test_weighted_k3_under_autograd_keeps_its_digits_in_the_tail(ratio):
    """Its derivative by a token's own logp is w·d: 60 or 25, between terms of exp(60) and exp(25) that cancel."""
    logp = torch.tensor([-60.0, -3.0, -25.0], requires_grad=True)
    value = kl.estimate(
        logp, torch.zeros(3), "k3", gradient="autograd", old_logp=torch.tensor([-60.5, -3.0, -25.0]), ratio=ratio
    )
    own = [torch.autograd.grad(value[i], logp, retain_graph=True)[0][i].item() for i in range(3)]
    before = math.exp(0.5) if ratio == "prefix" else 1.0
    assert own == pytest.approx([-60 * math.exp(0.5), -3 * before, -25 * before], rel=1e-6)


@pytest.mark.parametrize("ratio", kl.estimators.RATIOS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("max_log_ratio", [None, 0.8])
def test_weighted_autograd_is_the_derivative_of_the_plain_formula(estimator, ratio, max_log_ratio):
    """∇ of exp(Σ log-ratios to the old policy) · f(d), written out, with a mask and with clipping."""
    logp, ref_logp, old_logp = (-3 * torch.rand(4, 6, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(4, 6) > 0.3
    logp.requires_grad_()
    limit = math.inf if max_log_ratio is None else max_log_ratio
    d, drift = (logp - ref_logp).clamp(-limit, limit), (logp - old_logp) * mask
    f = {"k1": d, "k2": d * d / 2, "k3": torch.expm1(-d) + d, "abs": d.abs()}[estimator]
    plain = (drift.cumsum(-1) if ratio == "prefix" else drift).exp() * f * mask
    options = {"old_logp": old_logp, "mask": mask, "ratio": ratio, "max_log_ratio": max_log_ratio}
    value = kl.estimate(logp, ref_logp, estimator, gradient="autograd", **options)
    torch.testing.assert_close(value, plain, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(grad(value, logp), grad(plain, logp), rtol=1e-10, atol=1e-12)


def test_none_is_detached():
    assert not kl.estimate(torch.zeros(3, requires_grad=True), torch.ones(3), "k3", gradient="none").requires_grad


@pytest.mark.parametrize("gradient", ["reverse_kl", "autograd"])
def test_no_gradient_reaches_the_reference_or_the_old_policy(gradient):
    logp, ref_logp, old_logp = (torch.randn(2, 3).requires_grad_() for _ in range(3))
    kl.estimate(logp, ref_logp, "k3", gradient=gradient, old_logp=old_logp).sum().backward()
    assert logp.grad is not None and ref_logp.grad is None and old_logp.grad is None


# saturation and clipping


def test_exp_saturates_at_e60_in_fp32_and_says_so():
    d = torch.tensor([-59.0, -61.0, -100.0, -1e4, 100.0])
    value = kl.estimate(d, torch.zeros(5), "k3")
    truth = [math.expm1(59) - 59, *[math.exp(60)] * 3, 99.0]
    assert value.tolist() == pytest.approx(truth, rel=1e-4)
    assert kl.saturated(d).tolist() == [False, True, True, True, False]
    assert kl.saturated(d.double()).tolist() == [False, False, False, True, False]
    assert kl.estimate(d.double(), torch.zeros(5), "k3").isfinite().all()


def test_saturation_holds_at_any_magnitude():
    d = torch.tensor([-1e6, -1e9, -1e20])
    value = kl.estimate(d, torch.zeros(3), "k3")
    assert value[0].item() == pytest.approx(math.exp(60), rel=1e-4)
    assert (value >= 0).all() and value.isfinite().all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("gradient", kl.GRADIENTS)
@pytest.mark.parametrize("ratio", kl.estimators.RATIOS)
def test_weight_times_estimator_saturates_too(estimator, gradient, ratio):
    """A sampler that gave exp(-140) to what it sampled, and a policy that gives exp(-500): value and slope stay finite
    and the slope is not lost."""
    logp = torch.tensor([-70.0, -2.0, -1.0, -500.0], requires_grad=True)
    old_logp = torch.tensor([-140.0, -2.0, -200.0, -1.0])
    value = kl.estimate(logp, torch.zeros(4), estimator, gradient=gradient, old_logp=old_logp, ratio=ratio)
    assert value.isfinite().all() and value.abs().max() <= math.exp(60) * (1 + 1e-5)
    if gradient != "none":
        slope = grad(value, logp)
        assert slope.isfinite().all() and slope[0] != 0


@pytest.mark.parametrize("ratio", kl.estimators.RATIOS)
def test_weights_do_not_overflow_over_a_long_drift(ratio):
    """1,000 tokens that drifted by ±0.5 nats each: a prefix ratio of exp(±500) is out of the range of fp32."""
    old_logp = torch.full((2, 1000), -2.0)
    drift = torch.tensor([[0.5], [-0.5]])
    logp = (old_logp + drift).requires_grad_()
    value = kl.estimate(logp, old_logp - 0.25, "k3", old_logp=old_logp, ratio=ratio)
    slope = grad(value, logp)
    assert value.isfinite().all() and slope.isfinite().all()
    last = {"token": [0.5, -0.5], "prefix": [60.0, -500.0]}[ratio]
    assert slope[:, -1].tolist() == pytest.approx([math.exp(last[0]) * 0.75, math.exp(last[1]) * -0.25], rel=1e-5)


def test_fp64_of_any_input_is_kept():
    single, double = torch.full((2,), -1.0), torch.full((2,), -1.1, dtype=torch.float64)
    for inputs in [(double, single, single), (single, double, single), (single, single, double)]:
        value = kl.estimate(inputs[0], inputs[1], "k1", old_logp=inputs[2])
        d, drift = (inputs[0].double() - x.double() for x in inputs[1:])
        assert value.dtype == torch.float64 and torch.equal(value.detach(), drift.exp() * d)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("gradient", kl.GRADIENTS)
@pytest.mark.parametrize("excluded_by", ["reference", "policy"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_an_excluded_token_has_a_finite_value_and_no_nan(estimator, gradient, excluded_by, off_policy):
    logp, ref_logp = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.5])
    (ref_logp if excluded_by == "reference" else logp)[0] = -math.inf
    logp.requires_grad_()
    old_logp = torch.tensor([-1.2, -2.0]) if off_policy else None
    value = kl.estimate(logp, ref_logp, estimator, gradient=gradient, old_logp=old_logp)
    assert value.isfinite().all() and value[1].item() == pytest.approx(FORMULAS[estimator](0.5))
    if excluded_by == "policy" and off_policy:
        assert value[0] == 0.0  # its weight is 0
    else:
        assert value[0].abs() > 1e12
        assert (value[0] < 0) == (estimator == "k1" and excluded_by == "policy")
    if gradient != "none":
        slope = grad(value, logp)
        assert slope.isfinite().all() or gradient == "autograd"
        assert not slope.isnan().any()
        if gradient == "reverse_kl":
            assert slope.tolist() == [0.0, 0.5]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_max_log_ratio_clamps_the_value_and_leaves_the_gradient_whole(estimator):
    d = torch.tensor([-100.0, -12.0, -3.0, 4.0, 100.0], dtype=torch.float64, requires_grad=True)
    value = kl.estimate(d, torch.zeros_like(d), estimator, max_log_ratio=5.0)
    assert value.tolist() == pytest.approx([FORMULAS[estimator](x) for x in [-5.0, -5.0, -3.0, 4.0, 5.0]], rel=1e-12)
    assert torch.equal(grad(value, d), d.detach())
    clipped = grad(kl.estimate(d, torch.zeros_like(d), "k2", gradient="autograd", max_log_ratio=5.0), d)
    assert clipped.tolist() == [0.0, 0.0, -3.0, 4.0, 0.0]
    assert not kl.estimate(d, torch.zeros_like(d), estimator, gradient="none", max_log_ratio=5.0).requires_grad


# off-policy


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_off_policy_value_is_unbiased(estimator):
    p, q, old = policies(7)
    assert expected(p, q, estimator, sampler=old).item() == pytest.approx(exact_kl(p, q).item(), rel=1e-12)


@pytest.mark.parametrize(
    ("estimator", "gradient"), [*((e, "reverse_kl") for e in ESTIMATORS), ("k1", "autograd"), ("k3", "autograd")]
)
def test_off_policy_gradient_is_that_of_the_kl(estimator, gradient):
    p, q, old = policies(7)
    found = grad(expected(p, q, estimator, sampler=old, gradient=gradient), p)
    torch.testing.assert_close(found, grad(exact_kl(p, q), p), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_old_logp_of_the_present_policy_changes_nothing(estimator):
    logp, ref_logp = torch.randn(3, 4).requires_grad_(), torch.randn(3, 4)
    plain = kl.estimate(logp, ref_logp, estimator)
    slope = grad(plain, logp)
    # Off-policy correction of samples that need none: value and gradient are the same to the bit.
    for ratio in kl.estimators.RATIOS:
        weighted = kl.estimate(logp, ref_logp, estimator, old_logp=logp.detach(), ratio=ratio)
        assert torch.equal(weighted, plain) and torch.equal(grad(weighted, logp), slope)


@pytest.mark.parametrize("gradient", ["reverse_kl", "autograd"])
def test_prefix_ratio_passes_over_masked_tokens(gradient):
    """A prompt, padding on either side and a gap: as if those tokens were not there, in value and in gradient."""
    inputs = [torch.randn(2, 7) for _ in range(3)]
    mask = torch.tensor([[0, 0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 1, 0]], dtype=torch.bool)
    kept = [x[mask].view(2, 3) for x in inputs]
    results = []
    for (logp, ref_logp, old_logp), where in [(inputs, mask), (kept, None)]:
        leaf = logp.clone().requires_grad_()
        options = {"gradient": gradient, "old_logp": old_logp, "mask": where, "ratio": "prefix"}
        value = kl.estimate(leaf, ref_logp, "k3", **options)
        results.append((value.detach(), grad(value, leaf)))
    for whole, part in zip(*results, strict=True):
        torch.testing.assert_close(whole[mask].view(2, 3), part)


def test_prefix_ratio_is_the_product_up_to_and_with_the_token():
    logp, ref_logp, old_logp = fixed = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -1.0, -2.0], [-1.2, -2.5, -0.3]])[
        :, None
    ]
    assert len(fixed) == 3
    value = kl.estimate(logp, ref_logp, "k1", old_logp=old_logp, ratio="prefix")
    expected_value = [math.exp(0.2) * 0.5, math.exp(0.2 + 0.5) * -1.0, math.exp(0.2 + 0.5 - 0.2) * 1.5]
    assert value[0].tolist() == pytest.approx(expected_value, rel=1e-6)


# masks


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("gradient", kl.GRADIENTS)
@pytest.mark.parametrize("ratio", [None, "token", "prefix"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_masked_reaches_neither_value_nor_gradient(estimator, gradient, ratio, poison):
    clean = [torch.randn(2, 4) for _ in range(3)]
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]])
    results = []
    for fill in (0.0, poison):
        logp, ref_logp, old_logp = (x.masked_fill(mask == 0, fill) for x in clean)
        logp.requires_grad_()
        options = {} if ratio is None else {"old_logp": old_logp, "ratio": ratio}
        value = kl.estimate(logp, ref_logp, estimator, gradient=gradient, mask=mask, **options)
        slope = torch.zeros(2, 4) if gradient == "none" else grad(value, logp)
        assert torch.equal(value[mask == 0], torch.zeros(3)) and torch.equal(slope[mask == 0], torch.zeros(3))
        results.append((value.detach(), slope))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


# refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "k4"}, r"Unknown estimator 'k4'.*Did you mean 'k[123]'.*Known: abs, k1, k2, k3"),
        ({"gradient": "reverse-kl"}, r"Unknown gradient.*Did you mean 'reverse_kl'"),
        ({"ratio": "sequence", "old_logp": torch.zeros(2, 3)}, r"Unknown ratio.*prefix, token"),
        ({"ratio": "prefix"}, r"ratio='prefix' weights tokens by policy / old policy, and old_logp is None"),
        ({"max_log_ratio": 0.0}, r"max_log_ratio must be positive, got 0"),
        ({"max_log_ratio": math.nan}, r"max_log_ratio must be positive, got nan"),
        ({"mask": torch.ones(3)}, r"mask has shape \[3\] but logp has shape \[2, 3\]"),
        ({"old_logp": torch.zeros(2, 2)}, r"old_logp has shape \[2, 2\] but logp"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        kl.estimate(torch.zeros(2, 3), torch.zeros(2, 3), **options)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"ref_logp has shape \[1, 3\] but logp has shape \[2, 3\]"):
        kl.estimate(torch.zeros(2, 3), torch.zeros(1, 3))


@pytest.mark.parametrize("max_log_ratio", [None, 0.5])
@pytest.mark.parametrize("ratio", [None, "token", "prefix"])
@pytest.mark.parametrize("gradient", ["reverse_kl", "autograd"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("name", ["logp", "ref_logp", "old_logp"])
def test_a_log_probability_that_is_no_number_shows_unless_it_is_masked(name, estimator, gradient, ratio, max_log_ratio):
    if ratio is None and name == "old_logp":
        return
    inputs = {key: -torch.rand(2, 4) for key in ("logp", "ref_logp", "old_logp")}
    inputs[name][1, 3] = math.nan
    inputs["logp"].requires_grad_()
    options = {"gradient": gradient, "max_log_ratio": max_log_ratio}
    options |= {"ratio": ratio, "old_logp": inputs["old_logp"]} if ratio else {}
    mask = torch.ones(2, 4, dtype=torch.bool)
    for scored in (True, False):
        mask[1, 3] = scored
        value = kl.estimate(inputs["logp"], inputs["ref_logp"], estimator, mask=mask, **options)
        (slope,) = torch.autograd.grad(value.sum(), inputs["logp"])
        assert bool(value[1, 3].isnan()) == bool(slope[1, 3].isnan()) == scored
        assert value[0].isfinite().all() and slope[0].isfinite().all()
        assert scored or (value.isfinite().all() and slope.isfinite().all())


@pytest.mark.parametrize("gradient", ["reverse_kl", "autograd", "none"])
def test_a_masked_token_after_one_that_is_nan_is_zero(gradient):
    """With ratio="prefix" the weight of every later token is NaN, also of those that are left out."""
    logp = torch.tensor([[-1.0, -2.0, -1.0]], requires_grad=True)
    old_logp = torch.tensor([[math.nan, -1.0, -1.0]])
    mask = torch.tensor([[True, False, True]])
    value = kl.estimate(logp, logp.detach() - 1, gradient=gradient, old_logp=old_logp, mask=mask, ratio="prefix")
    assert value.isnan().tolist() == [[True, False, True]] and value[0, 1] == 0
    if gradient != "none":
        (slope,) = torch.autograd.grad(value.sum(), logp)
        assert slope.isnan().tolist() == [[True, False, True]] and slope[0, 1] == 0


@pytest.mark.parametrize("gradient", ["reverse_kl", "autograd"])
@pytest.mark.parametrize("old", [math.nan, -math.inf])
def test_the_gradient_is_nan_where_the_value_is_although_the_log_ratio_is_infinite(gradient, old):
    """-inf has no gradient by itself; an old log-probability that is NaN, or -inf too, must not pass for that."""
    logp = torch.tensor([-math.inf, -1.0], requires_grad=True)
    value = kl.estimate(logp, torch.tensor([-1.0, -2.0]), gradient=gradient, old_logp=torch.tensor([old, -1.0]))
    (slope,) = torch.autograd.grad(value.sum(), logp)
    assert value.isnan().tolist() == slope.isnan().tolist() == [True, False]

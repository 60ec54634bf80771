"""kl.token_logp: against log_softmax in fp64, gradients against autograd's, and rows that are not to be read."""

import math

import pytest
import torch

from refkl import kl
from refkl.kl import logprobs

INF = math.inf


def plain(logits, targets, temperature=1.0):
    """log_softmax in fp64."""
    log_p = (logits.double() / temperature).log_softmax(-1)
    p = log_p.exp()
    return log_p.gather(-1, targets[:, None])[:, 0], -torch.where(p > 0, p * log_p, 0.0).sum(-1)


def test_two_categories_by_hand():
    """Odds of 3 to 1; at temperature 2 of √3 to 1."""
    logits, targets = torch.tensor([[math.log(3), 0.0]] * 2), torch.tensor([0, 1])
    logp, entropy = kl.token_logp(logits, targets, entropy=True)
    assert logp.tolist() == pytest.approx([math.log(0.75), math.log(0.25)])
    assert entropy.tolist() == pytest.approx([-0.75 * math.log(0.75) - 0.25 * math.log(0.25)] * 2)
    share = math.sqrt(3) / (1 + math.sqrt(3))
    assert kl.token_logp(logits, targets, temperature=2.0).logp.tolist() == pytest.approx(
        [math.log(share), math.log(1 - share)]
    )


def test_entropy_of_known_distributions():
    rows = torch.tensor([[2.0] * 8, [0.0, 0, 0, 0, -INF, -INF, -INF, -INF], [500.0, 0, 0, 0, 0, 0, 0, 0]])
    entropy = kl.token_logp(rows, torch.tensor([0, 1, 0]), entropy=True).entropy
    assert entropy.tolist() == pytest.approx([math.log(8), math.log(4), 0.0], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_value_is_that_of_log_softmax_in_fp64(dtype, temperature):
    logits, targets = (8 * torch.randn(6, 300)).to(dtype), torch.randint(300, (6,))
    result = kl.token_logp(logits, targets, temperature=temperature, entropy=True)
    assert result.logp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for found, expected in zip(result, plain(logits, targets, temperature), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_probabilities_of_bf16_logits_sum_to_one():
    row = torch.randn(1, 2000).bfloat16()
    logp = kl.token_logp(row.expand(2000, -1), torch.arange(2000)).logp
    assert logp.double().exp().sum().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ahead", [20.0, 40.0, 80.0])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_a_log_probability_near_zero_keeps_its_digits(dtype, ahead, with_entropy):
    """Logits (a, 0, 0): log p = -log(1 + 2 e^-a), which z - logsumexp(z) rounds to 0; so it does 1 - p."""
    logits = torch.tensor([[ahead, 0.0, 0.0]], dtype=dtype).requires_grad_()
    left = 2 * math.exp(-ahead) / (1 + 2 * math.exp(-ahead))
    found = kl.token_logp(logits, torch.tensor([0]), entropy=with_entropy)
    assert found.logp.item() == pytest.approx(math.log1p(-left), rel=1e-5)
    close = 1e-5 if dtype == torch.float32 else 4e-3
    (slope,) = torch.autograd.grad(found.logp.sum(), logits, retain_graph=True)
    assert slope[0].tolist() == pytest.approx([left, -left / 2, -left / 2], rel=close)
    if with_entropy:
        assert found.entropy.item() == pytest.approx(ahead * left - math.log1p(-left), rel=1e-5)
        (slope,) = torch.autograd.grad(found.entropy.sum(), logits)
        spread = ahead * left * (1 - left)
        assert slope[0].tolist() == pytest.approx([-spread, spread / 2, spread / 2], rel=close)


@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_logits_of_any_size(target, with_entropy):
    """±1e4 and equal rows: log p by hand, and no overflow in the gradient."""
    logits = torch.tensor([[1e4, 1e4 - 2], [-1e4, -1e4 - 2], [1e4, -1e4], [-1e4, -1e4]]).requires_grad_()
    found = kl.token_logp(logits, torch.full((4,), target), entropy=with_entropy)
    near = -math.log1p(math.exp(-2)) - 2 * target
    assert found.logp.tolist() == pytest.approx([near, near, -2e4 * target, -math.log(2)], rel=1e-6)
    (slope,) = torch.autograd.grad(found.logp.sum(), logits)
    own = 1 - math.exp(near)
    expected = [own, own, float(target), 0.5]
    assert slope[:, target].tolist() == pytest.approx(expected, rel=1e-6)
    assert slope[:, 1 - target].tolist() == pytest.approx([-x for x in expected], rel=1e-6)
    if with_entropy:
        p = 1 / (1 + math.exp(-2))
        near = -p * math.log(p) - (1 - p) * math.log(1 - p)
        assert found.entropy.tolist() == pytest.approx([near, near, 0.0, math.log(2)], rel=1e-6)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_a_target_that_is_excluded_or_alone(with_entropy):
    """log p = -inf with the gradient of a sure loss, and 0.0 with none."""
    logits = torch.tensor([[-INF, 1.0, 1.0], [2.0, -INF, -INF]]).requires_grad_()
    found = kl.token_logp(logits, torch.tensor([0, 0]), entropy=with_entropy)
    assert found.logp.tolist() == [-INF, 0.0]
    (slope,) = torch.autograd.grad(found.logp.sum(), logits)
    assert slope.tolist() == [[1.0, -0.5, -0.5], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_is_the_derivative_of_both_outputs(temperature):
    logits = torch.randn(4, 6, dtype=torch.float64)
    logits[2, 3] = -INF
    finite = logits.isfinite()
    targets, mask = torch.tensor([0, 5, 1, 2]), torch.tensor([True, True, True, False])

    def scores(values):
        full = logits.masked_scatter(finite, values)
        return tuple(kl.token_logp(full, targets, temperature=temperature, entropy=True, mask=mask))

    assert torch.autograd.gradcheck(scores, logits[finite].clone().requires_grad_())


@pytest.mark.parametrize("use_logp", [True, False])
def test_gradient_in_fp32_and_bf16_is_that_of_autograd(use_logp):
    """Also where the loss uses one of the outputs alone."""
    targets, weight = torch.randint(50, (5,)), torch.randn(5)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        logits = (3 * torch.randn(5, 50)).to(dtype).requires_grad_()
        result = kl.token_logp(logits, targets, temperature=0.7, entropy=True)
        (found,) = torch.autograd.grad(((result.logp if use_logp else result.entropy) * weight).sum(), logits)
        reference = plain(logits, targets, 0.7)[0 if use_logp else 1]
        (expected,) = torch.autograd.grad((reference * weight).sum(), logits)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def test_gradient_with_an_excluded_category_is_finite_and_zero_there():
    logits = torch.tensor([[1.0, -INF, 0.5], [-INF, 2.0, -INF]], requires_grad=True)
    result = kl.token_logp(logits, torch.tensor([0, 1]), entropy=True)
    (slope,) = torch.autograd.grad(result.logp.sum() + result.entropy.sum(), logits)
    assert slope.isfinite().all() and torch.equal(slope[logits == -INF], torch.zeros(3))
    assert result.entropy[1].item() == 0.0


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_chunking_changes_nothing(rows, monkeypatch):
    logits, targets = torch.randn(7, 20), torch.randint(20, (7,))
    mask, weight = torch.tensor([1, 1, 0, 1, 1, 0, 1]).bool(), torch.randn(2, 7)

    def scores():
        leaf = logits.clone().requires_grad_()
        result = kl.token_logp(leaf, targets, entropy=True, mask=mask)
        (slope,) = torch.autograd.grad((weight[0] * result.logp + weight[1] * result.entropy).sum(), leaf)
        return result.logp, result.entropy, slope

    whole = scores()
    monkeypatch.setattr(logprobs, "blocks", lambda n, *_: (slice(i, min(i + rows, n)) for i in range(0, n, rows)))
    for found, expected in zip(scores(), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
def test_masked_rows_are_not_read(poison):
    logits, targets = torch.randn(4, 9), torch.tensor([3, -100, 8, -100])
    mask = torch.tensor([True, False, True, False])
    leaf = logits.masked_fill(~mask[:, None], poison).requires_grad_()
    result = kl.token_logp(leaf, targets, entropy=True, mask=mask)
    kept = logits[mask].requires_grad_()
    expected = kl.token_logp(kept, targets[mask], entropy=True)
    for found, want in zip(result, expected, strict=True):
        assert torch.equal(found[mask], want) and torch.equal(found[~mask], torch.zeros(2))
    (slope,) = torch.autograd.grad(result.logp.sum() + result.entropy.sum(), leaf)
    (want,) = torch.autograd.grad(expected.logp.sum() + expected.entropy.sum(), kept)
    assert torch.equal(slope[mask], want) and torch.equal(slope[~mask], torch.zeros(2, 9))


def test_nothing_wanted_gives_zeros_that_hold_on_to_the_graph():
    logits = torch.randn(3, 5).requires_grad_()
    result = kl.token_logp(logits, torch.zeros(3).long(), entropy=True, mask=torch.zeros(3))
    assert torch.equal(result.logp, torch.zeros(3)) and torch.equal(result.entropy, torch.zeros(3))
    (result.logp.sum() + result.entropy.sum()).backward()
    assert torch.equal(logits.grad, torch.zeros(3, 5))


def test_int32_targets():
    logits, targets = torch.randn(3, 5).requires_grad_(), torch.tensor([4, 0, 2])
    result, expected = kl.token_logp(logits, targets.int()).logp, kl.token_logp(logits, targets).logp
    assert torch.equal(result, expected)
    assert torch.equal(torch.autograd.grad(result.sum(), logits)[0], torch.autograd.grad(expected.sum(), logits)[0])


@pytest.mark.parametrize(
    "function", [lambda z: kl.token_logp(z, torch.tensor([1, 3])).logp, lambda z: kl.divergence(z, -z)]
)
def test_a_second_derivative_is_refused(function):
    logits = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(function(logits).sum(), logits, create_graph=True)


@pytest.mark.parametrize(
    ("logits", "targets", "options", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3), {}, r"logits must be \[N, V\], got shape \[2, 3, 4\]"),
        (torch.zeros(2, 3), torch.zeros(3), {}, r"targets has shape \[3\] but the rows of logits has shape \[2\]"),
        (torch.zeros(2, 3), torch.zeros(2), {"mask": torch.ones(2, 3)}, r"mask has shape \[2, 3\] but the rows"),
        *(
            (torch.zeros(2, 3), torch.zeros(2), {"temperature": t}, r"temperature must be positive and finite")
            for t in (0.0, -1.0, INF, math.nan)
        ),
    ],
)
def test_refusals(logits, targets, options, message):
    with pytest.raises(ValueError, match=message):
        kl.token_logp(logits, targets.long(), **options)

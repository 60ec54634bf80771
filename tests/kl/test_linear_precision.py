"""The fused heads in the precisions that people train in: digits kept, exact zeros, and equal bits on equal inputs.

Truths are computed in fp64 from the very numbers (in bf16, fp16 or fp32) that the fused functions were given.
"""

import math

import pytest
import torch
from support import plain

from refkl import kl
from refkl.kl import projection

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
ORDERS = {"amari": 1.7, "alpha": -0.6, "renyi": 0.4}
KINDS = [(kind, ORDERS.get(kind)) for kind in kl.DIVERGENCES]


def problem(hidden_dtype=FP32, weight_dtype=FP32, *, n=40, width=32, vocab=300, spread=3.0):
    """hidden, weight, targets; logits have standard deviation `spread`."""
    hidden = (spread * torch.randn(n, width)).to(hidden_dtype)
    weight = (torch.randn(vocab, width) / math.sqrt(width)).to(weight_dtype)
    return hidden, weight, torch.randint(vocab, (n,))


def value_and_slopes(loss, *leaves):
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


# dtypes


@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype", "result"),
    [
        (FP64, FP64, FP64),
        (FP32, FP64, FP64),
        (FP64, BF16, FP64),
        (FP32, FP32, FP32),
        (BF16, BF16, FP32),
        (FP16, FP16, FP32),
        (BF16, FP32, FP32),
        (FP32, BF16, FP32),
        (FP16, BF16, FP32),
    ],
)
@pytest.mark.parametrize("widened", [1, 7 * 32 * 4, 8 << 20])
@pytest.mark.parametrize("trained", [False, True])
def test_values_and_gradients_in_every_dtype(hidden_dtype, weight_dtype, result, widened, trained, monkeypatch):
    """A weight in 16 bits is widened in blocks of its rows: one row, some that do not divide V, all."""
    monkeypatch.setattr(projection, "_WIDEN_BYTES", widened)
    hidden, weight, targets = problem(hidden_dtype, weight_dtype, n=12, vocab=50)
    ref_hidden = hidden + 0.2 * torch.randn_like(hidden)
    ref_weight = weight + 0.1 * torch.randn_like(weight)
    hidden.requires_grad_(), weight.requires_grad_(trained)
    bias = (0.3 * torch.randn(50)).to(weight_dtype)
    options = {"bias": bias, "ref_bias": bias, "logit_scale": 0.9, "temperature": 1.1}
    found = kl.linear_pair(hidden, weight, targets, ref_hidden, ref_weight, entropy=True, chunk=5, **options)
    assert all(x.dtype == result for x in found)
    scaling = {"logit_scale": 0.9, "temperature": 1.1}
    z = plain.logits(hidden, weight, bias, **scaling)
    ref_z = plain.logits(ref_hidden, ref_weight, bias, **scaling).detach()
    truth = (
        plain.logp(z, targets),
        plain.entropy(z),
        plain.logp(ref_z, targets),
        plain.divergence(z, ref_z, "reverse_kl"),
    )
    close = {"rtol": 1e-11, "atol": 1e-12} if result == FP64 else {"rtol": 1e-6, "atol": 2e-6}
    for got, want in zip(found, truth, strict=True):
        torch.testing.assert_close(got.double(), want, **close)
    leaves = [hidden, weight] if trained else [hidden]
    slopes = torch.autograd.grad(found.logp.sum() + found.entropy.sum() + found.divergence.sum(), leaves)
    wanted = torch.autograd.grad(truth[0].sum() + truth[1].sum() + truth[3].sum(), leaves)
    for leaf, slope, want in zip(leaves, slopes, wanted, strict=True):
        assert slope.dtype == leaf.dtype
        ulp = {FP64: 1e-11, FP32: 2e-6, BF16: 2**-7, FP16: 2**-10}[leaf.dtype]
        torch.testing.assert_close(slope.double(), want.double(), rtol=ulp, atol=ulp * want.abs().max().item())


def test_one_input_in_fp64_is_enough():
    hidden, weight, targets = problem(n=3, vocab=9)
    assert kl.linear_logp(hidden, weight, targets, bias=torch.zeros(9, dtype=FP64)).logp.dtype == FP64
    assert kl.linear_divergence(hidden, weight, hidden.double(), weight).dtype == FP64


@pytest.mark.parametrize("closure", [False, True])
def test_a_weights_gradient_is_rounded_to_bf16_once(closure):
    """300 tiles: added up in bf16, what a tile adds would be lost against the sum."""
    hidden, weight, targets = problem(BF16, BF16, n=600, width=8, vocab=40)
    weight.requires_grad_()
    token_loss = (lambda s: s.logp) if closure else None
    found = kl.linear_logp(hidden, weight, targets, chunk=2, token_loss=token_loss)
    (slope,) = torch.autograd.grad((found if closure else found.logp).sum(), weight)
    exact = weight.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(plain.logp(plain.logits(hidden, exact), targets).sum(), exact)
    # half a unit in the last place of 8 bits, and what fp32 sums lose
    assert ((slope.double() - truth).abs() <= 2**-8 * truth.abs() + 1e-6 * truth.abs().max()).all()


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_a_normalizer_does_not_lean_a_bf16_gradient_one_way(name):
    """339/256 is 340/256 in bf16: rounded before it multiplies, it would shift every gradient by 0.3 %."""
    hidden, weight, targets = problem(BF16, BF16, n=300, width=16, vocab=60)
    hidden.requires_grad_(), weight.requires_grad_()
    factor = 339 / 256
    loss = kl.linear_logp(hidden, weight, targets, token_loss=lambda s: s.logp).sum() * factor
    leaf = {"hidden": hidden, "weight": weight}[name]
    slope = torch.autograd.grad(loss, leaf)[0].double()
    exact = {"hidden": hidden.detach().double(), "weight": weight.detach().double()}
    exact[name].requires_grad_()
    (truth,) = torch.autograd.grad(plain.logp(plain.logits(**exact), targets).sum() * factor, exact[name])
    assert (slope * truth).sum().item() / truth.square().sum().item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("closure", [False, True])
def test_fp16_gradients_survive_until_the_loss_scale(trained, closure):
    """1e-9 is zero in fp16; times a loss scale of 2^20 it is not."""
    hidden, weight, targets = problem(FP16, FP16, n=10, vocab=20)
    hidden.requires_grad_(), weight.requires_grad_(trained)
    leaves = [hidden, weight] if trained else [hidden]
    if closure:
        loss = kl.linear_logp(hidden, weight, targets, token_loss=lambda s: 1e-9 * s.logp)
    else:
        loss = 1e-9 * kl.linear_logp(hidden, weight, targets).logp
    slopes = torch.autograd.grad((2.0**20 * loss).sum(), leaves)
    wanted = torch.autograd.grad((2.0**20 * 1e-9 * plain.logp(plain.logits(hidden, weight), targets)).sum(), leaves)
    for slope, want in zip(slopes, wanted, strict=True):
        assert slope.dtype == FP16
        torch.testing.assert_close(slope.double(), want.double(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("closure", [False, True])
def test_autocast_changes_nothing(trained, closure):
    """Neither in the pair nor in the two functions that have a shorter path of their own."""
    hidden, weight, targets = problem(n=20, vocab=50)
    ref_hidden, ref_weight = hidden + 0.1, weight + 0.01 * torch.randn_like(weight)
    bias = torch.randn(50).requires_grad_(trained)
    hidden.requires_grad_(), weight.requires_grad_(trained)
    leaves = [hidden, weight, bias] if trained else [hidden]
    token_loss = (lambda s: s.logp + s.divergence * s.entropy) if closure else None

    def results():
        ref = ref_hidden, ref_weight
        found = kl.linear_pair(hidden, weight, targets, *ref, bias=bias, entropy=True, chunk=6, token_loss=token_loss)
        loss = found if closure else found.logp + found.divergence * found.entropy
        logp = kl.linear_logp(hidden, weight, targets, bias=bias).logp
        divergence = kl.linear_divergence(hidden, weight, *ref, bias=bias, ref_bias=bias)
        return [x for y in (loss, logp, divergence) for x in value_and_slopes(y * torch.linspace(0.1, 1, 20), *leaves)]

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        found = results()
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


# probabilities near 1


@pytest.mark.parametrize("ahead", [20.0, 40.0, 80.0])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("closure", [False, True])
def test_a_log_probability_near_zero_keeps_its_digits(ahead, trained, entropy, closure):
    """Logits (a, 0, 0): log p = -log(1 + 2 e^-a), its slope 1 - p at the target, where z - logsumexp(z) is 0 twice."""
    hidden = torch.tensor([[ahead]]).requires_grad_()
    weight = torch.tensor([[1.0], [0.0], [0.0]]).requires_grad_(trained)
    left = 2 * math.exp(-ahead) / (1 + 2 * math.exp(-ahead))
    token_loss = (lambda s: s.logp) if closure else None
    found = kl.linear_logp(hidden, weight, torch.tensor([0]), entropy=entropy, token_loss=token_loss)
    logp = found if closure else found.logp
    assert logp.item() == pytest.approx(-math.log1p(2 * math.exp(-ahead)), rel=1e-5)
    slopes = torch.autograd.grad(logp.sum(), [hidden, weight] if trained else [hidden])
    assert slopes[0].item() == pytest.approx(left, rel=1e-5)
    if trained:
        assert slopes[1].flatten().tolist() == pytest.approx([ahead * left, *[-ahead * left / 2] * 2], rel=1e-5)


@pytest.mark.parametrize("ahead", [20.0, 40.0, 80.0])
@pytest.mark.parametrize("shared", [False, True])
def test_so_do_entropy_and_the_pair(ahead, shared):
    """H = -log p₁ + a·(1 - p₁), ∂H/∂a = -a p₁ (1 - p₁). The reference is at a - 1."""
    hidden, weight = torch.tensor([[ahead]]).requires_grad_(), torch.tensor([[1.0], [0.0], [0.0]])
    ref_weight = weight if shared else weight.clone()
    pair = kl.linear_pair(hidden, weight, torch.tensor([0]), hidden.detach() - 1, ref_weight, entropy=True)
    left = 2 * math.exp(-ahead) / (1 + 2 * math.exp(-ahead))
    ref_left = 2 * math.exp(1 - ahead) / (1 + 2 * math.exp(1 - ahead))
    assert pair.logp.item() == pytest.approx(math.log1p(-left), rel=1e-5)
    assert pair.ref_logp.item() == pytest.approx(math.log1p(-ref_left), rel=1e-5)
    assert pair.entropy.item() == pytest.approx(ahead * left - math.log1p(-left), rel=1e-5)
    (slope,) = torch.autograd.grad(pair.entropy.sum(), hidden, retain_graph=True)
    assert slope.item() == pytest.approx(-ahead * left * (1 - left), rel=1e-5)
    # Σ p d with d = (log p₁/q₁, log p₁/q₁ - 1, …) = left · (e - 2) to first order in left
    truth = math.log1p(-left) - math.log1p(-ref_left) - left
    if ahead == 20.0:
        assert pair.divergence.item() == pytest.approx(truth, rel=1e-5)
    assert pair.divergence.item() == pytest.approx(left * (math.e - 2), rel=1e-5)


# small divergences


def scaled_to(target, hidden, direction, heads):
    """How far along `direction` each row must go for a reverse KL of `target`, by the truth in fp64."""
    size = torch.full((hidden.shape[0], 1), math.sqrt(target))
    for _ in range(8):
        truth = heads(hidden + size * direction)
        size *= (target / truth.clamp(min=1e-30)).sqrt().clamp(0.1, 10)[:, None].float()
    return hidden + size * direction


def rows_of(shape, vocab, n, width=32):
    """Distributions over V: flat, of a language model's spread, peaked, or two tokens that share all of it."""
    weight = torch.randn(vocab, width) / math.sqrt(width)
    hidden = {"flat": 0.3, "usual": 3.0, "peaked": 8.0, "two": 1.0}[shape] * torch.randn(n, width)
    if shape == "two":
        weight[:, 0] = 0.0
        weight[:2, 0] = 1.0
        hidden[:, 0] = 30.0
    return hidden, weight


@pytest.mark.parametrize("target", [1e-1, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("vocab", [17, 1000, 20011])
@pytest.mark.parametrize("shape", ["flat", "usual", "peaked", "two"])
@pytest.mark.parametrize("weight_dtype", [FP32, BF16])
@pytest.mark.parametrize("heads", ["one", "equal", "trained"])
def test_a_small_kl_keeps_its_digits_and_its_sign(target, vocab, shape, weight_dtype, heads):
    """One head on both sides, a copy of it, or one that was trained away from it: value and gradient."""
    hidden, weight = rows_of(shape, vocab, n=24 if vocab < 10_000 else 8)
    weight = weight.to(weight_dtype)
    ref_weight = weight if heads == "one" else weight.clone()
    if heads == "trained":  # in bf16 a weight that moves at all moves by a unit in its last place
        ref_weight += (math.sqrt(target) / math.sqrt(32) * torch.randn(weight.shape)).to(weight_dtype)
    z = plain.logits(hidden, weight)

    def truth(ref_hidden):
        return plain.divergence(z, plain.logits(ref_hidden, ref_weight), "reverse_kl")

    ref_hidden = scaled_to(target, hidden, torch.randn_like(hidden), truth)
    expected = truth(ref_hidden)
    reached = (expected > 0.1 * target) & (expected < 10 * target)
    assert reached.any()  # a peaked row may have nowhere to go
    policy, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    plain_z, ref_z = plain.logits(exact, weight), plain.logits(ref_hidden, ref_weight)
    (want,) = torch.autograd.grad(plain.divergence(plain_z, ref_z, "reverse_kl").sum(), exact)
    targets = torch.zeros(len(hidden), dtype=torch.long)
    alone = kl.linear_divergence(policy, weight, ref_hidden, ref_weight)
    for found in (alone, kl.linear_pair(policy, weight, targets, ref_hidden, ref_weight).divergence):
        assert (found >= 0).all()
        errors = ((found.double() - expected) / expected).abs()[reached]
        assert (errors < 1e-3).all(), f"value {errors.max():.1e}"
        (slope,) = torch.autograd.grad(found.sum(), policy)
        errors = ((slope.double() - want).norm(dim=-1) / want.norm(dim=-1))[reached]
        assert (errors < 1e-3).all(), f"gradient {errors.max():.1e}"


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("biased", ["neither", "both", "one"])
@pytest.mark.parametrize("trained", [False, True])
def test_heads_trained_apart_a_little_keep_all_digits_of_their_difference(capped, biased, trained):
    """With bias, a token that neither has, padding and a soft cap, to 20 times the precision of subtracted logits."""
    hidden, weight, targets = problem(n=24, vocab=900)
    far = 1e-4
    ref_hidden, ref_weight = hidden + far * torch.randn_like(hidden), weight + far * torch.randn_like(weight)
    bias = torch.randn(900) if biased != "neither" else None
    ref_bias = bias + far * torch.randn(900) if biased == "both" else None
    if biased == "both":
        bias[7] = ref_bias[7] = -math.inf if not capped else -50.0  # a cap makes a finite logit of -inf
    elif biased == "one":
        bias *= far
    options = {"softcap": 8.0 if capped else None, "temperature": 0.8, "logit_scale": 1.3}
    hidden.requires_grad_(), weight.requires_grad_(trained)
    leaves = [hidden, weight] if trained else [hidden]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    z = plain.logits(exact[0], exact[-1] if trained else weight, bias, **options)
    ref_z = plain.logits(ref_hidden, ref_weight, ref_bias, **options)
    finite = z[0].isfinite()
    expected = plain.divergence(z[:, finite], ref_z[:, finite], "reverse_kl")
    wanted = torch.autograd.grad(expected.sum(), exact)
    options |= {"bias": bias, "ref_bias": ref_bias, "vocab_size": 905, "chunk": 10}
    pair = kl.linear_pair(hidden, weight, targets.clamp(min=8), ref_hidden, ref_weight, **options)
    assert float(expected.detach().min()) > 1e-9 and float(expected.detach().max()) < 1e-5
    for found in (pair.divergence, kl.linear_divergence(hidden, weight, ref_hidden, ref_weight, **options)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
        for slope, want in zip(torch.autograd.grad(found.sum(), leaves), wanted, strict=True):
            torch.testing.assert_close(slope.double(), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    torch.testing.assert_close(pair.logp.double(), plain.logp(z, targets.clamp(min=8)), rtol=1e-6, atol=8e-6)


@pytest.mark.parametrize(("kind", "order"), KINDS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_step_zero_is_exactly_zero(kind, order, dtype, trained, softcap):
    """One storage or equal values in two, with and without top_k: value and gradient."""
    hidden, weight, targets = problem(dtype, dtype, n=9, vocab=70)
    bias = torch.randn(70).to(dtype)
    reference = hidden.clone()
    copies = weight.clone(), bias.clone()
    hidden.requires_grad_(), weight.requires_grad_(trained)
    for ref_weight, ref_bias in ((weight, bias), copies):
        for top_k in (None, 5):
            pair = kl.linear_pair(
                hidden,
                weight,
                targets,
                reference,
                ref_weight,
                kind,
                bias=bias,
                ref_bias=ref_bias,
                softcap=softcap,
                temperature=0.7,
                order=order,
                top_k=top_k,
                chunk=4,
            )
            alone = kl.linear_divergence(
                hidden, weight, reference, ref_weight, kind, softcap=softcap, order=order, top_k=top_k, chunk=4
            )
            assert torch.equal(pair.logp, pair.ref_logp)
            for divergence in (pair.divergence, alone):
                assert torch.equal(divergence, torch.zeros(9))
                for leaf in (hidden, weight) if trained else (hidden,):
                    (slope,) = torch.autograd.grad(divergence.sum(), leaf, retain_graph=True)
                    assert torch.equal(slope, torch.zeros_like(leaf))


# logits of any size


@pytest.mark.parametrize("level", [-1e4, 1e4])
@pytest.mark.parametrize("shared", [False, True])
def test_logits_far_from_zero(level, shared):
    """Rows of equal logits: entropy log V and no divergence; rows of unequal ones: as without the level."""
    weight = torch.cat([torch.full((50, 1), 1.0), torch.randn(50, 1)], 1)
    hidden = torch.tensor([[level, 0.0], [level, 2.0]]).requires_grad_()
    ref_hidden, targets = torch.tensor([[level, 0.0], [level, 1.0]]), torch.tensor([3, 4])
    ref_weight = weight if shared else weight.clone()
    pair = kl.linear_pair(hidden, weight, targets, ref_hidden, ref_weight, entropy=True)
    assert pair.entropy[0].item() == pytest.approx(math.log(50), rel=1e-6)
    assert pair.logp[0].item() == pytest.approx(-math.log(50), rel=1e-6)
    z, ref_z = plain.logits(hidden, weight), plain.logits(ref_hidden, weight)
    # fp32 numbers around 1e4 are 1e-3 apart
    torch.testing.assert_close(pair.logp.double(), plain.logp(z, targets), rtol=0, atol=4e-3)
    torch.testing.assert_close(pair.entropy.double(), plain.entropy(z), rtol=0, atol=4e-3)
    truth = plain.divergence(z, ref_z, "reverse_kl")
    for divergence in (pair.divergence, kl.linear_divergence(hidden, weight, ref_hidden, ref_weight)):
        assert divergence[0].item() == 0.0
        torch.testing.assert_close(divergence.double(), truth, rtol=0, atol=4e-3)
    (slope,) = torch.autograd.grad(pair.divergence.sum() + pair.entropy.sum() + pair.logp.sum(), hidden)
    assert slope.isfinite().all()


@pytest.mark.parametrize("spread", [0.03, 1.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("moved", [0.01, 1.0])
@pytest.mark.parametrize("shared", [False, True])
def test_a_kl_of_any_size(spread, moved, shared):
    """From logits within 0.1 of another to thousands apart, alone and in a pair: value and gradient."""
    hidden, weight, targets = problem(n=20, spread=spread)
    ref_hidden = (1 - moved) * hidden + moved * spread * torch.randn_like(hidden)
    exact, hidden = hidden.double().requires_grad_(), hidden.requires_grad_()
    ref_weight = weight if shared else weight.clone()
    z, ref_z = plain.logits(exact, weight), plain.logits(ref_hidden, weight)
    d = z.log_softmax(-1) - ref_z.log_softmax(-1)
    truth = (z.softmax(-1) * d).sum(-1)
    (want,) = torch.autograd.grad(truth.sum(), exact)
    rounding = 2e-7 * spread  # of the logits, in nats; what is common to all of them enters as its square
    atol = 5 * rounding * truth.max().item() ** 0.5 + rounding**2 + 1e-10
    pair = kl.linear_pair(hidden, weight, targets, ref_hidden, ref_weight).divergence
    for found in (pair, kl.linear_divergence(hidden, weight, ref_hidden, ref_weight)):
        assert (found >= 0).all()
        torch.testing.assert_close(found.double(), truth, rtol=2e-5, atol=atol)
        (slope,) = torch.autograd.grad(found.sum(), hidden)
        close = (1e-4 + 3 * rounding) * want.norm(dim=-1).max().item() + 10 * rounding + 3e-7 * truth.max().item()
        assert (slope.double() - want).norm(dim=-1).max().item() < close


@pytest.mark.parametrize("gap", [1e2, 1e4])
def test_one_token_far_ahead_on_each_side(gap):
    """Policy all on token 0, reference all on token 1: reverse KL is the gap between the logits."""
    hidden = torch.tensor([[gap, 0.0]]).requires_grad_()
    head, ref_head = torch.eye(2), torch.eye(2)
    pair = kl.linear_pair(hidden, head, torch.tensor([1]), torch.tensor([[0.0, gap]]), ref_head, entropy=True)
    assert (pair.divergence.item(), pair.logp.item()) == (gap, -gap)
    assert kl.linear_divergence(hidden, head, hidden.detach().flip(1), ref_head).item() == gap
    assert pair.ref_logp.item() == pytest.approx(-math.exp(-gap), abs=1e-44)
    assert pair.entropy.item() == pytest.approx(0.0, abs=1e-30)
    (slope,) = torch.autograd.grad(pair.logp.sum(), hidden)
    assert slope.tolist() == [[-1.0, 1.0]]


# the same inputs, the same bits


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_equal_inputs_give_equal_bits_on_every_path(dtype, softcap):
    """Policy with grad, old policy and reference without: their log-ratio must be zero where the weights are equal."""
    hidden, weight, targets = problem(dtype, dtype, n=23, vocab=501)
    other = torch.randn_like(hidden)
    options = {"softcap": softcap, "temperature": 0.8, "chunk": 8}
    with torch.no_grad():
        expected = kl.linear_logp(hidden, weight, targets, **options).logp
    copy = weight.clone()
    found = {
        "copied weights": kl.linear_logp(hidden.clone(), copy, targets, **options).logp,
        "pair, policy": kl.linear_pair(hidden, weight, targets, other, copy, **options).logp,
        "pair, reference": kl.linear_pair(other, copy, targets, hidden, weight, **options).ref_logp,
        "pair of one head, reference": kl.linear_pair(other, weight, targets, hidden, weight, **options).ref_logp,
        "pair of one head, at step 0": kl.linear_pair(hidden, weight, targets, hidden, weight, **options).logp,
    }
    for name, trains in (("frozen", False), ("trained", True)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trains)
        for entropy in (False, True, "detached"):
            found[f"{name}, entropy {entropy}"] = kl.linear_logp(h, w, targets, entropy=entropy, **options).logp
        found[f"{name}, closure"] = kl.linear_logp(h, w, targets, token_loss=lambda s: s.logp, **options)
        found[f"{name}, pair"] = kl.linear_pair(h, w, targets, other, copy, entropy=True, **options).logp
    for name, logp in found.items():
        assert torch.equal(logp.detach(), expected), name


def test_rounding_is_all_that_packing_changes():
    """Which rows share a tile: masks, chunks, order."""
    hidden, weight, targets = problem(n=50, vocab=1031)
    whole = kl.linear_logp(hidden, weight, targets, entropy=True)
    mask = torch.rand(50) < 0.5
    order = torch.randperm(50)
    for chunk in (1, 7, 50):
        part = kl.linear_logp(hidden, weight, targets, entropy=True, mask=mask, chunk=chunk)
        moved = kl.linear_logp(hidden[order], weight, targets[order], entropy=True, chunk=chunk)
        for found, masked, shuffled in zip(whole, part, moved, strict=True):
            torch.testing.assert_close(masked[mask], found[mask], rtol=1e-6, atol=3e-6)
            torch.testing.assert_close(shuffled, found[order], rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_dense_and_fused_agree(temperature):
    hidden, weight, targets = problem(n=30, vocab=400)
    hidden.requires_grad_()
    ref_hidden = hidden.detach() + 0.3 * torch.randn_like(hidden)
    fused = kl.linear_pair(
        hidden, weight, targets, ref_hidden, weight.clone(), "jsd", entropy=True, temperature=temperature
    )
    z, ref_z = hidden @ weight.t(), ref_hidden @ weight.t()
    dense = kl.token_logp(z, targets, temperature=temperature, entropy=True)
    divergence = kl.divergence(z / temperature, ref_z / temperature, "jsd")
    for got, want in zip((fused.logp, fused.entropy, fused.divergence), (*dense, divergence), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        slopes = [torch.autograd.grad(x.sum(), hidden, retain_graph=True)[0] for x in (got, want)]
        torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-6)

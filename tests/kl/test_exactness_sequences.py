"""What each loss is exact for on sequences: an autoregressive model of two tokens over three symbols, all nine
sequences enumerated in fp64.

P the policy, Q the reference, S the policy that sampled when it is another. The KL of the sequence is

    KL(P ‖ Q) = KL_1 + Σ_a P(a) KL_2(a)

with KL_1 of the first token and KL_2(a) of the second after `a`. Its gradient has a part that a loss on each token
with its prefix held fixed has too (`own`), and one that it leaves out (`later`): Σ_a P(a) KL_2(a) ∇log P(a), the
effect of the first token on the second's KL.
"""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from support.exact import DOCS, ESTIMATORS, EXACT, error, fp64, quoted
from torch import Tensor

from refkl import kl

PAIRS = torch.tensor(list(product(range(3), repeat=2)))
Tables = tuple[Tensor, Tensor]
"""Probabilities of the first token [3], and of the second after each first [3, 3]."""

P: Tables = (fp64(0.5, 0.3, 0.2), torch.stack([fp64(0.7, 0.2, 0.1), fp64(0.3, 0.3, 0.4), fp64(0.4, 0.4, 0.2)]))
Q: Tables = (fp64(0.3, 0.4, 0.3), torch.stack([fp64(0.2, 0.3, 0.5), fp64(0.3, 0.4, 0.3), fp64(0.2, 0.5, 0.3)]))
S: Tables = (fp64(0.3, 0.3, 0.4), torch.stack([fp64(0.5, 0.3, 0.2), fp64(0.2, 0.5, 0.3), fp64(0.3, 0.4, 0.3)]))
Loss = Callable[[Tensor], Tensor]


def parameters(tables: Tables) -> Tensor:
    """The 12 logits, [12]."""
    return torch.cat([x.log().flatten() for x in tables])


def token_logp(logits: Tensor) -> Tensor:
    """[9, 2], nats: of both tokens of each sequence."""
    first, second = logits[:3].log_softmax(-1), logits[3:].view(3, 3).log_softmax(-1)
    return torch.stack([first[PAIRS[:, 0]], second[PAIRS[:, 0], PAIRS[:, 1]]], dim=-1)


LOGP, REF_LOGP, OLD_LOGP = (token_logp(parameters(x)) for x in (P, Q, S))
SHARE, OLD_SHARE = LOGP.sum(-1).exp(), OLD_LOGP.sum(-1).exp()


def token_kl(logits: Tensor) -> Tables:
    """Exact, nats: KL_1 [] and KL_2 [3]."""
    ref = parameters(Q)
    return kl.divergence(logits[:3], ref[:3]), kl.divergence(logits[3:].view(3, 3), ref[3:].view(3, 3))


def slope(f: Loss, logits: Tensor | None = None) -> Tensor:
    """Gradient of f(logits) at P."""
    return torch.autograd.functional.jacobian(f, parameters(P) if logits is None else logits)


def sequence_kl(logits: Tensor) -> Tensor:
    logp = token_logp(logits).sum(-1)
    return (logp.exp() * (logp - REF_LOGP.sum(-1))).sum()


def own(first_shares: Tensor) -> Tensor:
    """∇ of KL_1 + Σ_a s(a) KL_2(a), with the shares s of the prefixes held fixed."""

    def objective(logits: Tensor) -> Tensor:
        now, after = token_kl(logits)
        return now + (first_shares * after).sum()

    return slope(objective)


def later() -> Tensor:
    """Σ_a P(a) KL_2(a) ∇log P(a): what prefixes held fixed leave out."""
    after = token_kl(parameters(P))[1]
    return slope(lambda logits: (logits[:3].softmax(-1) * after).sum())


TRUTH = slope(sequence_kl)


def expected(per_sequence: Loss, share: Tensor = SHARE) -> Tensor:
    """Expected gradient of a loss that maps logits to [9]."""
    return share @ torch.autograd.functional.jacobian(per_sequence, parameters(P))


def spread(per_sequence: Loss, share: Tensor = SHARE) -> float:
    """Standard deviation of one sequence's gradient: root of the trace of its covariance."""
    each = torch.autograd.functional.jacobian(per_sequence, parameters(P))
    return (share @ (each - share @ each).square().sum(-1)).sqrt().item()


def token_loss(estimator: str, gradient: str, old_logp: Tensor | None = None, ratio: str = "token") -> Loss:
    """Σ_t kl.estimate, [9]."""
    return lambda logits: kl.estimate(
        token_logp(logits), REF_LOGP, estimator, gradient=gradient, old_logp=old_logp, ratio=ratio
    ).sum(-1)


def summed_loss(estimator: str, gradient: str, old_logp: Tensor | None = None) -> Loss:
    """kl.estimate of the summed log-ratio, a sequence as one sample, [9]."""
    old = None if old_logp is None else old_logp.sum(-1)
    return lambda logits: kl.estimate(
        token_logp(logits).sum(-1), REF_LOGP.sum(-1), estimator, gradient=gradient, old_logp=old
    )


def return_to_go(reward: Tensor, gamma: float = 1.0) -> Tensor:
    """[9, 2]: each token's reward and the discounted ones after it."""
    return torch.stack([reward[:, 0] + gamma * reward[:, 1], reward[:, 1]], dim=-1)


def reward_loss(estimator: str, gamma: float = 1.0) -> Loss:
    """Σ_t logp_t · stopgrad(return to go of the KL), [9]: a policy gradient with the KL in the reward."""

    def loss(logits: Tensor) -> Tensor:
        logp = token_logp(logits)
        cost = kl.estimate(logp, REF_LOGP, estimator, gradient="none")
        return (logp * return_to_go(cost, gamma)).sum(-1)

    return loss


def exact_loss(logits: Tensor) -> Tensor:
    """Exact KL of both tokens, and the first one's score times the KL to come, [9]."""
    now, after = token_kl(logits)
    to_come = after[PAIRS[:, 0]]
    return now + to_come + token_logp(logits)[:, 0] * to_come.detach()


# values


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_sum_over_tokens_is_unbiased_for_the_kl_of_the_sequence(estimator):
    value = kl.estimate(LOGP, REF_LOGP, estimator, gradient="none").sum(-1)
    assert (SHARE * value).sum().item() == pytest.approx(sequence_kl(parameters(P)).item(), rel=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_off_policy_values(estimator):
    """Prefix ratios: the KL of the sequence. Token ratios: KL_2 at the prefixes that the old policy wrote."""
    true = sequence_kl(parameters(P)).item()
    now, after = token_kl(parameters(P))
    closed = {"prefix": true, "token": (now + (S[0] * after).sum()).item()}
    for ratio, expected_value in closed.items():
        value = kl.estimate(LOGP, REF_LOGP, estimator, gradient="none", old_logp=OLD_LOGP, ratio=ratio).sum(-1)
        assert (OLD_SHARE * value).sum().item() == pytest.approx(expected_value, rel=1e-12)
    bias = closed["token"] / true - 1
    assert bias < -0.2
    quoted("value", "0.0%", f"{bias:.1%}", "0.0%")


def test_variance_of_the_values():
    """Closed forms: moments of f over sequences; of the weighted ones, with the weight squared."""
    d = LOGP - REF_LOGP
    formulas = {"k1": d, "k3": torch.expm1(-d) + d}
    weight = {"token": (LOGP - OLD_LOGP).exp(), "prefix": (LOGP - OLD_LOGP).cumsum(-1).exp()}
    found = {}
    for estimator, f in formulas.items():
        for ratio, w in [(None, torch.ones_like(d)), *weight.items()]:
            share = SHARE if ratio is None else OLD_SHARE
            options = {} if ratio is None else {"old_logp": OLD_LOGP, "ratio": ratio}
            value = kl.estimate(LOGP, REF_LOGP, estimator, gradient="none", **options).sum(-1)
            variance = (share * value**2).sum() - (share * value).sum() ** 2
            closed = (share * (w * f).sum(-1) ** 2).sum() - (share * (w * f).sum(-1)).sum() ** 2
            assert variance.item() == pytest.approx(closed.item(), rel=1e-10)
            found[estimator, ratio] = variance.item()
    assert found["k3", None] < found["k1", None] / 3
    assert found["k1", "prefix"] > found["k1", "token"]


def test_weights_of_prefixes_spread_without_end():
    """E_s[w²] of a prefix of T tokens alike is (1 + χ²)^T: what is left of n samples is n / (1 + χ²)^T."""
    p, s = fp64(0.5, 0.3, 0.2), fp64(0.45, 0.33, 0.22)
    chi2 = ((p - s).square() / s).sum().item()
    sequences = torch.tensor(list(product(range(3), repeat=4)))
    logp, old_logp = p.log()[sequences], s.log()[sequences]
    # k1 at a log-ratio of 1 everywhere is the weight alone
    weight = kl.estimate(logp, logp - 1, "k1", gradient="none", old_logp=old_logp, ratio="prefix")
    squares = (old_logp.sum(-1, keepdim=True).exp() * weight.square()).sum(0)
    assert squares.tolist() == pytest.approx([(1 + chi2) ** t for t in (1, 2, 3, 4)], rel=1e-12)
    drift = (p * (p / s).log()).sum().item()
    left = [(1 + chi2) ** -t for t in (10, 100, 1000)]
    assert left[0] > 0.9 and left[1] < 0.4 and left[2] < 1e-4
    quoted(f"{drift:.2g} nats a token", *(f"{x:.2g}" for x in left))


# gradients


def test_the_truth_is_own_and_later():
    torch.testing.assert_close(TRUTH, own(P[0]) + later(), **EXACT)
    assert later().norm() > 0.2 * TRUTH.norm()
    assert f"all nine sequences, KL {sequence_kl(parameters(P)).item():.3f}." in DOCS


WHOLE = {
    "k1 in the reward, return-to-go": reward_loss("k1"),
    "k1 of the sum, in the reward": lambda x: (
        token_logp(x).sum(-1) * kl.estimate(token_logp(x).sum(-1), REF_LOGP.sum(-1), "k1", gradient="none")
    ),
    "summed log-ratio, k2 `autograd`": summed_loss("k2", "autograd"),
    "summed log-ratio, `reverse_kl`": summed_loss("k3", "reverse_kl"),
    "k1, `autograd`, `old_logp=logp.detach()`, prefix": token_loss("k1", "autograd", LOGP, "prefix"),
    "k3, `autograd`, `old_logp=logp.detach()`, prefix": token_loss("k3", "autograd", LOGP, "prefix"),
    "exact KL + score times KL to come": exact_loss,
}
WHOLE_OFF_POLICY = {
    "summed log-ratio, `reverse_kl`, `old_logp`": summed_loss("k3", "reverse_kl", OLD_LOGP),
    "k1, `autograd`, prefix": token_loss("k1", "autograd", OLD_LOGP, "prefix"),
    "k3, `autograd`, prefix": token_loss("k3", "autograd", OLD_LOGP, "prefix"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_right_for_the_sequence(name):
    torch.testing.assert_close(expected(WHOLE[name]), TRUTH, **EXACT)
    quoted(name, "on-policy", "0.0%", spread(WHOLE[name]))


@pytest.mark.parametrize("name", WHOLE_OFF_POLICY)
def test_right_for_the_sequence_off_policy(name):
    torch.testing.assert_close(expected(WHOLE_OFF_POLICY[name], OLD_SHARE), TRUTH, **EXACT)
    quoted(name, "off-policy", "0.0%", spread(WHOLE_OFF_POLICY[name], OLD_SHARE))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_token_losses_leave_out_the_effect_on_later_tokens(estimator):
    found = expected(token_loss(estimator, "reverse_kl"))
    torch.testing.assert_close(found, own(P[0]), **EXACT)
    torch.testing.assert_close(found, TRUTH - later(), **EXACT)
    wrong = error(found, TRUTH)
    assert wrong > 0.2
    if estimator == "k3":
        quoted("token loss, `reverse_kl`", "on-policy", f"{wrong:.1%}", spread(token_loss(estimator, "reverse_kl")))


def test_exact_divergence_as_a_token_loss_leaves_it_out_too():
    def loss(logits: Tensor) -> Tensor:
        now, after = token_kl(logits)
        return now + after[PAIRS[:, 0]]

    torch.testing.assert_close(expected(loss), own(P[0]), **EXACT)
    quoted("token loss, exact KL", "on-policy", f"{error(own(P[0]), TRUTH):.1%}", spread(loss))


def test_what_grpo_does_leaves_it_out_and_follows_the_forward_kl():
    """k3 under autograd on-policy: the gradient of KL(q ‖ p) of each token, prefixes held fixed."""

    def objective(logits: Tensor) -> Tensor:
        ref = parameters(Q)
        after = kl.divergence(logits[3:].view(3, 3), ref[3:].view(3, 3), "forward_kl")
        return kl.divergence(logits[:3], ref[:3], "forward_kl") + (P[0] * after).sum()

    loss = token_loss("k3", "autograd")
    torch.testing.assert_close(expected(loss), slope(objective), **EXACT)
    wrong = error(expected(loss), TRUTH)
    assert wrong > 0.3
    quoted("token loss, k3 `autograd`", "on-policy", f"{wrong:.1%}", spread(loss))


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_a_discounted_return_keeps_that_share_of_the_later_part(gamma):
    found = expected(reward_loss("k1", gamma))
    torch.testing.assert_close(found, own(P[0]) + gamma * later(), **EXACT)
    torch.testing.assert_close(found - TRUTH, (gamma - 1) * later(), **EXACT)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_k3_in_the_reward_is_wrong_in_the_token_s_own_part(gamma):
    """Its later part is right, k3 being unbiased; its own part is reverse minus forward KL."""
    forward = expected(token_loss("k3", "autograd"))
    found = expected(reward_loss("k3", gamma))
    torch.testing.assert_close(found, own(P[0]) - forward + gamma * later(), **EXACT)
    wrong = error(found, TRUTH)
    assert wrong > 0.5
    if gamma == 1.0:
        quoted("k3 in the reward, return-to-go", "on-policy", f"{wrong:.1%}", spread(reward_loss("k3")))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ratios_with_the_reverse_kl_gradient(estimator):
    """Both leave out `later`; they differ in the prefixes at which they stand."""
    errors = {}
    for ratio, shares in {"token": S[0], "prefix": P[0]}.items():
        found = expected(token_loss(estimator, "reverse_kl", OLD_LOGP, ratio), OLD_SHARE)
        torch.testing.assert_close(found, own(shares), **EXACT)
        errors[ratio] = error(found, TRUTH), error(found, own(P[0]))
    assert errors["token"][0] > 0.2 and errors["token"][1] > 0.2 and errors["prefix"][0] > 0.2
    if estimator == "k3":
        for ratio, (wrong, _) in errors.items():
            loss = token_loss(estimator, "reverse_kl", OLD_LOGP, ratio)
            quoted(f"token loss, `reverse_kl`, {ratio}", "off-policy", f"{wrong:.1%}", spread(loss, OLD_SHARE))
        quoted("gradient of each token, prefixes held fixed", "0.0%", f"{errors['token'][1]:.1%}", "0.0%")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_autograd_with_prefix_ratios_is_the_gradient_of_the_expected_value(estimator):
    """Whatever the estimator, prefixes included: ∇ Σ_t E_P[f_t]. Only k1 and k3 have the KL as their expectation."""

    def objective(logits: Tensor) -> Tensor:
        logp = token_logp(logits)
        d = logp - REF_LOGP
        f = {"k1": d, "k2": d * d / 2, "k3": torch.expm1(-d) + d, "abs": d.abs()}[estimator]
        return (logp.sum(-1).exp() * f.sum(-1)).sum()

    found = expected(token_loss(estimator, "autograd", OLD_LOGP, "prefix"), OLD_SHARE)
    torch.testing.assert_close(found, slope(objective), **EXACT)
    assert (error(found, TRUTH) < 1e-9) == (estimator in ("k1", "k3"))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_autograd_with_token_ratios_stays_at_the_old_policy_s_prefixes(estimator):
    found = expected(token_loss(estimator, "autograd", OLD_LOGP, "token"), OLD_SHARE)
    torch.testing.assert_close(found, own(S[0]), **EXACT)


def test_prefix_k3_at_the_reference_is_silent_and_prefix_k1_is_noise():
    """Untouched policy: k1's gradient is zero in expectation alone, k3's for each sample."""

    def untouched(estimator: str) -> float:
        options = {"gradient": "autograd", "old_logp": LOGP, "ratio": "prefix"}
        return spread(lambda x: kl.estimate(token_logp(x), LOGP, estimator, **options).sum(-1))

    assert untouched("k3") < 1e-12 and untouched("k1") > 1


# masks


def three_token_model(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits over two symbols of a token, of one that a tool writes, and of a token after both."""
    g = torch.Generator().manual_seed(seed)
    shapes = (2,), (2, 2), (2, 2, 2)
    first, tool, last = (1.5 * torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    return first, tool, last


TRIPLES = torch.tensor(list(product(range(2), repeat=3)))


def triple_logp(model: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    first, tool, last = (x.log_softmax(-1) for x in model)
    a, b, c = TRIPLES.T
    return torch.stack([first[a], tool[a, b], last[a, b, c]], dim=-1)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_prefix_ratios_pass_over_what_a_tool_wrote_and_over_the_prompt(estimator):
    """The tool's tokens come from the world, whatever the models give them: with those masked, the sum is unbiased
    for the KL of what the policy wrote; the prompt before changes nothing. Weighed as its own, it is biased."""
    p, q, s, world = (three_token_model(seed) for seed in range(4))
    logp, ref_logp, old_logp = (triple_logp(model) for model in (p, q, s))
    answer = triple_logp((p[0], world[1], p[2])).sum(-1).exp()
    sampled = triple_logp((s[0], world[1], s[2])).sum(-1).exp()
    true = (answer * (logp - ref_logp)[:, [0, 2]].sum(-1)).sum().item()

    prompt = torch.full((8, 2), -4.0, dtype=torch.float64)
    inputs = [torch.cat([prompt + shift, x], dim=-1) for shift, x in enumerate((logp, ref_logp, old_logp))]
    mask = torch.tensor([False, False, True, False, True]).expand(8, 5)

    def value(mask: Tensor | None, logp: Tensor, ref_logp: Tensor, old_logp: Tensor) -> float:
        found = kl.estimate(logp, ref_logp, estimator, gradient="none", old_logp=old_logp, mask=mask, ratio="prefix")
        return (sampled * found[:, [-3, -1]].sum(-1)).sum().item()

    assert value(mask, *inputs) == pytest.approx(true, rel=1e-12)
    assert abs(value(None, logp, ref_logp, old_logp) / true - 1) > 0.05


def test_a_token_of_the_policy_s_own_that_is_masked_is_not_corrected_for():
    """A mask that drops the first token drops its ratio: the second is then weighed as under token ratios."""
    mask = torch.tensor([False, True]).expand(9, 2)
    value = kl.estimate(LOGP, REF_LOGP, "k3", gradient="none", old_logp=OLD_LOGP, mask=mask, ratio="prefix")
    after = token_kl(parameters(P))[1]
    found = (OLD_SHARE * value.sum(-1)).sum().item()
    assert found == pytest.approx((S[0] * after).sum().item(), rel=1e-12)
    assert found / (P[0] * after).sum().item() < 0.75


# where training ends: E[R] - β · KL of the sequence

REWARD, BETA = fp64(1.0, 0.2, 0.0, 0.4, 0.5, 0.6, 0.3, 0.0, 0.8), 0.4
OPTIMUM = (REF_LOGP.sum(-1) + REWARD / BETA).softmax(-1)
FIRST_OPTIMUM = OPTIMUM.view(3, 3).sum(-1)


def ascend(loss_of: Callable[[Tensor], Loss]) -> Tensor:
    """Where exact gradient ascent from the reference ends, [9]; `loss_of(logp)` is the loss for samples of logp."""
    logits = parameters(Q)
    for _ in range(250):
        logits.requires_grad_()
        logp = token_logp(logits)
        share = logp.detach().sum(-1).exp()
        objective = (logp.sum(-1).exp() * REWARD).sum() - BETA * (share * loss_of(logp.detach())(logits)).sum()
        (ascent,) = torch.autograd.grad(objective, logits)
        # The second token's logits see the share of their prefix alone: divided out, all converge alike.
        pace = torch.cat([torch.ones_like(P[0]), 1 / logp.detach().view(3, 3, 2)[:, 0, 0].exp().repeat_interleave(3)])
        logits = (logits + 5 * pace * ascent).detach()
    return token_logp(logits).sum(-1).exp()


def regret(share: Tensor) -> float:
    """What E[R] - β · KL falls short of its greatest value."""
    best = BETA * (REF_LOGP.sum(-1) + REWARD / BETA).logsumexp(-1)
    return (best - (share * (REWARD - BETA * (share.log() - REF_LOGP.sum(-1)))).sum()).item()


@pytest.mark.parametrize(
    "loss_of",
    [
        pytest.param(lambda _: reward_loss("k1"), id="k1-reward"),
        pytest.param(lambda _: summed_loss("k3", "reverse_kl"), id="summed"),
        pytest.param(lambda logp: token_loss("k3", "autograd", logp, "prefix"), id="k3-prefix"),
        pytest.param(lambda _: exact_loss, id="exact"),
    ],
)
def test_the_right_ones_reach_the_optimum_of_the_sequence(loss_of):
    """Π* ∝ Q · exp(R/β)."""
    torch.testing.assert_close(ascend(loss_of), OPTIMUM, rtol=1e-6, atol=0)
    quoted("right for the sequence", *FIRST_OPTIMUM.tolist(), "0")


def test_token_losses_end_where_costly_continuations_look_free():
    """The second token ends right; the first ends at Π*(a) · exp(KL_2(a)), KL_2 being that of the optimum: the price of
    what follows is not charged."""
    given_first = OPTIMUM.view(3, 3) / FIRST_OPTIMUM[:, None]
    after = kl.divergence(given_first.log(), Q[1].log())
    first = FIRST_OPTIMUM * after.exp()
    first = first / first.sum()
    closed = (first[:, None] * given_first).flatten()
    torch.testing.assert_close(ascend(lambda _: token_loss("k3", "reverse_kl")), closed, rtol=1e-6, atol=0)
    assert regret(closed) > 0.001 and (first - FIRST_OPTIMUM).abs().max() > 0.05
    quoted("token loss, `reverse_kl`", *first.tolist(), regret(closed))

"""What each estimator and gradient is exact for, on one token: full enumeration of four symbols in fp64.

p the policy, q the reference, s the policy that sampled when it is another, d = log p - log q. Every expectation is a
sum over all symbols, so that "unbiased" is an equality to rounding and a bias is a number. The figures of
docs/estimators.md are looked up in it. Sequences are in test_exactness_sequences.py.
"""

import math
from collections.abc import Callable

import pytest
import torch
from support.exact import ESTIMATORS, EXACT, error, fp64, quoted
from torch import Tensor

from refkl import kl

Q = fp64(0.50, 0.25, 0.15, 0.10)
FAR = fp64(0.20, 0.20, 0.20, 0.40)
NEAR = 0.9 * Q + 0.1 * FAR
OLD = fp64(0.30, 0.30, 0.20, 0.20)


def relative_entropy(a: Tensor, b: Tensor) -> Tensor:
    """KL(a ‖ b), nats."""
    return torch.special.xlogy(a, a / b).sum()


def moments(p: Tensor, estimator: str, old: Tensor | None = None) -> tuple[float, float]:
    """Expectation and variance of the value, over what the sampler draws."""
    old_logp = None if old is None else old.log()
    value = kl.estimate(p.log(), Q.log(), estimator, gradient="none", old_logp=old_logp)
    share = p if old is None else old
    mean = (share * value).sum()
    return mean.item(), (share * (value - mean).square()).sum().item()


def sample_gradients(p: Tensor, estimator: str, gradient: str, old: Tensor | None = None) -> Tensor:
    """[sample, logit]: the gradient that each symbol would give, were it the one that was sampled."""
    old_logp = None if old is None else old.log()

    def values(logits: Tensor) -> Tensor:
        return kl.estimate(logits.log_softmax(-1), Q.log(), estimator, gradient=gradient, old_logp=old_logp)

    return torch.autograd.functional.jacobian(values, p.log())


def expected_gradient(p: Tensor, estimator: str, gradient: str, old: Tensor | None = None) -> Tensor:
    return (p if old is None else old) @ sample_gradients(p, estimator, gradient, old)


def slope(p: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradient of `objective(softmax(logits))` by the logits, at p."""
    return torch.autograd.functional.jacobian(lambda logits: objective(logits.softmax(-1)), p.log())


def score_times(p: Tensor, coefficient: Tensor) -> Tensor:
    """Σ p(x) · coefficient(x) · ∇log p(x), with the coefficient held fixed."""
    return slope(p, lambda x: (x * coefficient).sum())


def true_gradient(p: Tensor) -> Tensor:
    return slope(p, lambda x: relative_entropy(x, Q))


# values


@pytest.mark.parametrize("p", [FAR, NEAR], ids=["far", "near"])
@pytest.mark.parametrize("old", [None, OLD], ids=["on-policy", "off-policy"])
def test_expected_values(p, old):
    """k1 and k3 are the KL. k2 and abs are not, by their own closed forms, whoever sampled."""
    true, d = relative_entropy(p, Q).item(), (p / Q).log()
    closed = {"k1": true, "k2": (p * d * d / 2).sum().item(), "k3": true, "abs": (p * d.abs()).sum().item()}
    for estimator, expected in closed.items():
        assert moments(p, estimator, old)[0] == pytest.approx(expected, rel=1e-12), estimator
    assert closed["k2"] > 1.06 * true and closed["abs"] > 2 * true


def test_bias_of_the_values_in_figures():
    for name, p, k2_bias, abs_bias in [("near", NEAR, 0.068, 13.2), ("far", FAR, 0.254, 1.19)]:
        true = relative_entropy(p, Q).item()
        k2, magnitude = (moments(p, e)[0] / true - 1 for e in ("k2", "abs"))
        assert (k2, magnitude) == (pytest.approx(k2_bias, rel=0.01), pytest.approx(abs_bias, rel=0.01))
        quoted(name, true, "0", f"+{k2:.1%}", "0", f"+{magnitude:.0%}")


@pytest.mark.parametrize("p", [FAR, NEAR], ids=["far", "near"])
def test_variance_on_policy(p):
    """Closed forms: Var k3 = Var k1 + χ²(q ‖ p) - 2 (KL(p ‖ q) + KL(q ‖ p)), the control variate q/p - 1 at work."""
    true, d = relative_entropy(p, Q), (p / Q).log()
    k1 = ((p * d * d).sum() - true**2).item()
    chi2 = ((Q - p).square() / p).sum().item()
    k3 = k1 + chi2 - 2 * (true + relative_entropy(Q, p)).item()
    k2 = ((p * d**4 / 4).sum() - (p * d * d / 2).sum() ** 2).item()
    absolute = ((p * d * d).sum() - (p * d.abs()).sum() ** 2).item()
    for estimator, expected in {"k1": k1, "k2": k2, "k3": k3, "abs": absolute}.items():
        assert moments(p, estimator)[1] == pytest.approx(expected, rel=1e-9), estimator
    assert k3 < k1 / (100 if p is NEAR else 9)


@pytest.mark.parametrize("p", [FAR, NEAR], ids=["far", "near"])
def test_variance_off_policy(p):
    """Σ s (w·f)² - (Σ p f)², with w = p/s: the weight enters squared."""
    d = (p / Q).log()
    formulas = {"k1": d, "k2": d * d / 2, "k3": torch.expm1(-d) + d, "abs": d.abs()}
    for estimator, f in formulas.items():
        expected = (p * p / OLD * f * f).sum() - (p * f).sum() ** 2
        assert moments(p, estimator, OLD)[1] == pytest.approx(expected.item(), rel=1e-9), estimator


def test_spread_of_the_values_in_figures():
    for name, p in [("near", NEAR), ("far", FAR)]:
        on, off = ([moments(p, e, old)[1] ** 0.5 for e in ESTIMATORS] for old in (None, OLD))
        quoted(f"{name}, on-policy", *on)
        quoted(f"{name}, off-policy", *off)


def test_k3_spreads_more_than_k1_where_the_policy_lost_what_the_reference_has():
    """Var k3 holds χ²(q ‖ p), which grows with q²/p: a policy that left one symbol makes k3 the noisier one."""
    left = fp64(0.989, 0.005, 0.005, 0.001)
    k1, k3 = (moments(left, e)[1] ** 0.5 for e in ("k1", "k3"))
    assert k3 > 6 * k1
    quoted("left behind, on-policy", *(moments(left, e)[1] ** 0.5 for e in ESTIMATORS))


# gradients


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("old", [None, OLD], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("p", [FAR, NEAR], ids=["far", "near"])
def test_reverse_kl_is_the_true_gradient(p, old, estimator):
    found = expected_gradient(p, estimator, "reverse_kl", old)
    torch.testing.assert_close(found, true_gradient(p), **EXACT)
    quoted("`reverse_kl`, on- and off-policy", "near, far", *[f"{error(found, true_gradient(p)):.1%}"] * 4)


@pytest.mark.parametrize("p", [FAR, NEAR], ids=["far", "near"])
def test_autograd_on_policy(p):
    """k1: zero. k2: the truth. k3: the forward KL's. abs: the score weighed by the sign of d alone."""
    truth = true_gradient(p)
    closed = {
        "k1": torch.zeros(4, dtype=torch.float64),
        "k2": truth,
        "k3": slope(p, lambda x: relative_entropy(Q, x)),
        "abs": score_times(p, (p / Q).log().sign()),
    }
    found = {e: expected_gradient(p, e, "autograd") for e in ESTIMATORS}
    for estimator, expected in closed.items():
        torch.testing.assert_close(found[estimator], expected, **EXACT)
    errors = {e: error(found[e], truth) for e in ESTIMATORS}
    assert errors["k1"] == pytest.approx(1.0) and errors["k2"] < 1e-10
    assert errors["k3"] > (0.08 if p is NEAR else 0.29) and errors["abs"] > (8.1 if p is NEAR else 0.46)
    quoted("`autograd`, on-policy", "near" if p is NEAR else "far", *(f"{errors[e]:.1%}" for e in ESTIMATORS))


@pytest.mark.parametrize("p", [FAR, NEAR], ids=["far", "near"])
def test_autograd_off_policy_is_the_gradient_of_the_expected_value(p):
    """∇ Σ s·w·f = ∇ Σ p·f: right where f's expectation is the KL, for k1 and k3; that of another aim for k2 and abs."""
    truth = true_gradient(p)
    closed = {
        "k1": truth,
        "k2": slope(p, lambda x: (x * (x / Q).log().square() / 2).sum()),
        "k3": truth,
        "abs": slope(p, lambda x: (x * (x / Q).log().abs()).sum()),
    }
    found = {e: expected_gradient(p, e, "autograd", OLD) for e in ESTIMATORS}
    for estimator, expected in closed.items():
        torch.testing.assert_close(found[estimator], expected, **EXACT)
    errors = {e: error(found[e], truth) for e in ESTIMATORS}
    assert errors["k2"] > (0.09 if p is NEAR else 0.46) and errors["abs"] > 0.58
    quoted("`autograd`, off-policy", "near" if p is NEAR else "far", *(f"{errors[e]:.1%}" for e in ESTIMATORS))


@pytest.mark.parametrize("p", [FAR, NEAR], ids=["far", "near"])
def test_off_policy_without_old_logp_is_biased(p):
    """Samples of another policy taken for one's own: Σ s·d·∇log p."""
    found = OLD @ sample_gradients(p, "k3", "reverse_kl")
    scores = torch.eye(4, dtype=torch.float64) - p
    torch.testing.assert_close(found, (OLD * (p / Q).log()) @ scores, **EXACT)
    wrong = error(found, true_gradient(p))
    assert wrong > 0.3
    quoted("off-policy, `old_logp` not passed", "near" if p is NEAR else "far", *[f"{wrong:.1%}"] * 4)


@pytest.mark.parametrize("p", [FAR, NEAR], ids=["far", "near"])
@pytest.mark.parametrize("old", [None, OLD], ids=["on-policy", "off-policy"])
def test_in_the_reward(p, old):
    """The gradient of logp · stopgrad(value): right for k1; for k3 it is reverse minus forward KL, two gradients that
    agree to first order, so that nothing is left near the reference."""
    old_logp = None if old is None else old.log()
    truth, d = true_gradient(p), (p / Q).log()
    forward = slope(p, lambda x: relative_entropy(Q, x))
    closed = {
        "k1": truth,
        "k2": score_times(p, d * d / 2),
        "k3": truth - forward,
        "abs": score_times(p, d.abs()),
    }
    errors = {}
    for estimator, expected in closed.items():
        reward = kl.estimate(p.log(), Q.log(), estimator, gradient="none", old_logp=old_logp)
        found = (p if old is None else old) @ (reward[:, None] * (torch.eye(4, dtype=torch.float64) - p))
        torch.testing.assert_close(found, expected, **EXACT)
        errors[estimator] = error(found, truth)
    assert min(errors[e] for e in ("k2", "k3", "abs")) > 0.5
    if old is None:
        quoted("in the reward", "near" if p is NEAR else "far", *(f"{errors[e]:.1%}" for e in ESTIMATORS))


def test_k2_and_k3_in_the_reward_pull_in_second_order_alone():
    """Ten times nearer, the true gradient is ten times smaller and theirs a hundred times."""
    for estimator in ("k2", "k3"):
        pulls = []
        for step in (1e-2, 1e-3):
            p = Q + step * (FAR - Q)
            reward = kl.estimate(p.log(), Q.log(), estimator, gradient="none")
            pulls.append((score_times(p, reward).norm() / true_gradient(p).norm()).item())
        assert pulls[0] / pulls[1] == pytest.approx(10, rel=0.05)


def spread(p: Tensor, estimator: str, gradient: str, old: Tensor | None = None) -> float:
    """Standard deviation of the gradient of one sample: root of the trace of its covariance."""
    each, share = sample_gradients(p, estimator, gradient, old), p if old is None else old
    return (share @ (each - share @ each).square().sum(-1)).sqrt().item()


def test_spread_of_the_gradients():
    """Weighted k3 under autograd is w·d·∇log p sample by sample, the same as reverse_kl; weighted k1 adds w·∇log p,
    which has mean zero and is noise that does not shrink as the policy comes near."""
    same = [sample_gradients(FAR, "k3", g, OLD) for g in ("autograd", "reverse_kl")]
    torch.testing.assert_close(*same, **EXACT)
    extra = sample_gradients(FAR, "k1", "autograd", OLD) - same[1]
    torch.testing.assert_close(extra, (FAR / OLD)[:, None] * (torch.eye(4, dtype=torch.float64) - FAR), **EXACT)
    for name, p in [("near", NEAR), ("far", FAR)]:
        right, noisy = spread(p, "k3", "reverse_kl", OLD), spread(p, "k1", "autograd", OLD)
        assert noisy > (10 if p is NEAR else 1.9) * right
        quoted(name, true_gradient(p).norm().item(), spread(p, "k3", "reverse_kl"), right, noisy)
    assert spread(Q, "k3", "reverse_kl", OLD) < 1e-12 and spread(Q, "k1", "autograd", OLD) > 0.79


# where training ends: E[r] - β · KL on a bandit

REWARD, BETA = fp64(0.0, 0.3, 0.6, 1.0), 0.4
OPTIMUM = (Q.log() + REWARD / BETA).softmax(-1)


def ascend(pull: Callable[[Tensor], Tensor], beta: float = BETA, steps: int = 400) -> Tensor:
    """Where exact gradient ascent from the reference ends; `pull(logits)` is a scalar with the penalty's gradient.

    The step shrinks, because the sign in abs never settles.
    """
    logits = Q.log()
    for i in range(steps):
        logits.requires_grad_()
        objective = (logits.softmax(-1) * REWARD).sum() - beta * pull(logits)
        (ascent,) = torch.autograd.grad(objective, logits)
        logits = (logits + 2 / beta / (1 + i / 50) * ascent).detach()
    return logits.softmax(-1)


def in_loss(estimator: str, gradient: str, old: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    def pull(logits: Tensor) -> Tensor:
        logp = logits.log_softmax(-1)
        share, old_logp = (logp.exp().detach(), None) if old is None else (old, old.log())
        return (share * kl.estimate(logp, Q.log(), estimator, gradient=gradient, old_logp=old_logp)).sum()

    return pull


def in_reward(estimator: str) -> Callable[[Tensor], Tensor]:
    def pull(logits: Tensor) -> Tensor:
        logp = logits.log_softmax(-1)
        return (logp.exp().detach() * kl.estimate(logp, Q.log(), estimator, gradient="none") * logp).sum()

    return pull


def regret(p: Tensor) -> float:
    """What E[r] - β · KL falls short of its greatest value."""
    best = BETA * (Q.log() + REWARD / BETA).logsumexp(-1)
    return (best - (p * REWARD).sum() + BETA * relative_entropy(p, Q)).item()


def root(f: Callable[[float], float], low: float, high: float) -> float:
    """Where the decreasing f is zero, by bisection."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return low


@pytest.mark.parametrize(
    "pull",
    [
        *(pytest.param(in_loss(e, "reverse_kl"), id=f"{e}-reverse_kl") for e in ESTIMATORS),
        *(pytest.param(in_loss(e, "reverse_kl", OLD), id=f"{e}-reverse_kl-off-policy") for e in ("k1", "k3")),
        pytest.param(in_loss("k2", "autograd"), id="k2-autograd"),
        *(pytest.param(in_loss(e, "autograd", OLD), id=f"{e}-autograd-off-policy") for e in ("k1", "k3")),
        pytest.param(in_reward("k1"), id="k1-in-the-reward"),
    ],
)
def test_the_right_ones_reach_the_optimum(pull):
    """π* ∝ q · exp(r/β)."""
    reached = ascend(pull)
    torch.testing.assert_close(reached, OPTIMUM, rtol=1e-6, atol=0)
    assert regret(reached) == pytest.approx(0.0, abs=1e-10)


def test_the_optimum_in_figures():
    quoted("every right one", *OPTIMUM.tolist(), relative_entropy(OPTIMUM, Q).item(), "0")


def ends(name: str, reached: Tensor, closed: Tensor, least: float, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(reached, closed, rtol=0, atol=tolerance)
    assert regret(closed) > least
    quoted(name, *closed.tolist(), relative_entropy(closed, Q).item(), regret(closed))


def test_k1_as_a_loss_under_autograd_ends_as_if_there_were_no_penalty():
    reached = ascend(in_loss("k1", "autograd"))
    torch.testing.assert_close(reached, ascend(lambda logits: 0.0 * logits.sum()), rtol=1e-9, atol=1e-12)
    ends("k1, loss, `autograd`", reached, fp64(0, 0, 0, 1), 0.34, tolerance=0.003)


def test_k3_as_a_loss_under_autograd_ends_at_the_optimum_of_the_forward_kl():
    """max E[r] - β KL(q ‖ p): p = β q / (λ - r), with λ such that p sums to 1."""
    top = REWARD.max().item()
    weight = root(lambda x: (BETA * Q / (x - REWARD)).sum().item() - 1, top + 1e-9, top + 10)
    ends("k3, loss, `autograd`", ascend(in_loss("k3", "autograd")), BETA * Q / (weight - REWARD), 0.02)


def test_abs_as_a_loss_under_autograd_sticks_to_the_reference_or_lets_go():
    """A symbol's pull is ±β and not more: it stays at q while that can hold it (symbols 1 and 2); the worst reward is
    given up and the best takes what is left."""
    ends("abs, loss, `autograd`", ascend(in_loss("abs", "autograd")), fp64(0, 0.25, 0.15, 0.6), 0.08, 0.02)
    held = ascend(in_loss("abs", "autograd"), beta=1.0)
    torch.testing.assert_close(held, Q, rtol=0, atol=0.02)  # twice β covers the range of r: nothing is learnt
    assert ((Q.log() + REWARD).softmax(-1) - Q).abs().max() > 0.09


def test_k3_in_the_reward_collapses():
    """Its aim, E[r] - β (KL(p ‖ q) - KL(q ‖ p)), has no greatest value: it grows without end as a symbol dies."""
    ends("k3, reward", ascend(in_reward("k3")), fp64(0, 0, 0, 1), 0.34)
    larger = ascend(in_reward("k3"), beta=4.0)  # ten times the coefficient does not hold it
    assert larger.max() > 0.999 and larger.argmax() != REWARD.argmax() and relative_entropy(larger, Q) > 1


def test_k2_in_the_reward_kills_symbols():
    """It takes reward from what the policy made rarer, which makes that rarer still: two symbols die. Where the others
    rest, r - β d²/2 is the same for both."""
    alive = fp64(0, 0, 1, 1)

    def share(level: float) -> Tensor:
        return Q * alive * (2 * (REWARD - level).clamp(min=0) / BETA).sqrt().exp()

    level = -root(lambda x: 1 - share(-x).sum().item(), -0.6, 10.0)
    ends("k2, reward", ascend(in_reward("k2")), share(level), 0.17, tolerance=0.001)


def test_abs_in_the_reward_kills_symbols():
    """As k2 in the reward. The others share by q · exp(r/β), which is right among themselves."""
    closed = (Q.log() + REWARD / BETA).masked_fill(fp64(1, 1, 0, 0).bool(), -math.inf).softmax(-1)
    ends("abs, reward", ascend(in_reward("abs")), closed, 0.17, tolerance=0.002)

"""Several references as one geometric mixture: by enumeration in fp64, per token and over whole sequences."""

import math

import pytest
import torch
from support.enumeration import SCORED, close, expected_gradient, policies, sequence_logp

from refkl import KLConfig, KLPenalty, TokenScores

WEIGHTS = [0.5, 0.2, 0.3]
CATEGORIES = 7


def one_token():
    """Policy logits [V], and the log-probabilities of three references [3, V]."""
    logits = torch.randn(CATEGORIES, dtype=torch.float64).requires_grad_()
    return logits, torch.randn(3, CATEGORIES, dtype=torch.float64).mul(2).log_softmax(-1)


def mixture(ref_logps, weights=WEIGHTS):
    """(log of the normalised mixture [V], log Z)."""
    log_q = sum(w * r for w, r in zip(weights, ref_logps, strict=True))
    return log_q - log_q.logsumexp(-1), log_q.logsumexp(-1).item()


def relative_entropy(logp, log_q):
    return (logp.exp() * (logp - log_q)).sum()


def expected(penalty, logits, ref_logps):
    """(E[value], gradient of E[loss]): each category is a row of one token, weighed by its probability."""
    logp = logits.log_softmax(-1)
    ones = torch.ones(CATEGORIES, 1)
    output = penalty(TokenScores(logp[:, None]), [TokenScores(r[:, None]) for r in ref_logps], ones, normalizer=1.0)
    weighted = (logp.exp().detach() * output.per_token[:, 0]).sum()
    return weighted.item(), torch.autograd.grad(weighted, logits)[0]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_the_gradient_is_that_of_the_kl_to_the_normalised_mixture(estimator):
    logits, refs = one_token()
    log_q, _ = mixture(refs)
    (true,) = torch.autograd.grad(relative_entropy(logits.log_softmax(-1), log_q), logits)
    penalty = KLPenalty(KLConfig(estimator=estimator, reference_weights=WEIGHTS))
    close(expected(penalty, logits, refs)[1], true)
    other = KLPenalty(KLConfig(estimator=estimator, reference_weights=[0.2, 0.5, 0.3]))
    assert (expected(other, logits, refs)[1] - true).abs().max() > 0.01


def test_values_differ_from_it_by_a_constant_that_the_policy_does_not_change():
    logits, refs = one_token()
    log_q, log_z = mixture(refs)
    assert log_z < -0.1  # the mixture is not normalised
    k1, k3 = (KLPenalty(KLConfig(estimator=e, reference_weights=WEIGHTS)) for e in ("k1", "k3"))
    for policy in (logits, torch.randn(CATEGORIES, dtype=torch.float64).requires_grad_()):
        logp = policy.log_softmax(-1).detach()
        to_mixture = relative_entropy(logp, log_q).item()
        weighted = sum(w * relative_entropy(logp, r).item() for w, r in zip(WEIGHTS, refs, strict=True))
        assert weighted == pytest.approx(to_mixture - log_z, rel=1e-12)
        assert expected(k1, policy, refs)[0] == pytest.approx(weighted, rel=1e-12)
        assert expected(k3, policy, refs)[0] == pytest.approx(weighted + math.exp(log_z) - 1, rel=1e-12)


def test_exact_divergences_are_summed_with_the_weights():
    logits, refs = one_token()
    log_q, log_z = mixture(refs)
    logp = logits.log_softmax(-1)
    divergences = [relative_entropy(logp, r)[None, None] for r in refs]
    scores = TokenScores(logp[None, :1]), [TokenScores(r[None, :1]) for r in refs]
    penalty = KLPenalty(KLConfig(coef=1.0, estimator="exact", reference_weights=WEIGHTS))
    loss = penalty(*scores, torch.ones(1, 1), divergence=divergences).loss
    to_mixture = relative_entropy(logits.log_softmax(-1), log_q)
    assert loss.item() == pytest.approx(to_mixture.item() - log_z, rel=1e-12)
    close(*(torch.autograd.grad(x, logits)[0] for x in (loss, to_mixture)))


def test_in_the_reward_it_is_the_normalised_mixture_of_whole_sequences():
    """Z of a token's mixture depends on the tokens before it; that of the sequences' mixture is one constant."""
    logits, first = policies()
    second = sequence_logp(torch.randn_like(logits).mul(2))
    log_q = 0.7 * first.sum(-1) + 0.3 * second.sum(-1)
    logp = sequence_logp(logits).sum(-1)
    true = (logp.exp() * (logp - log_q + log_q.logsumexp(-1))).sum()
    penalty = KLPenalty(KLConfig(coef=0.3, placement="reward", reference_weights=[0.7, 0.3]))
    scores = TokenScores(sequence_logp(logits)), [TokenScores(first), TokenScores(second)]
    reward = penalty(*scores, SCORED).reward
    close(expected_gradient(logits, reward), -0.3 * torch.autograd.grad(true, logits)[0])


def test_without_weights_all_count_alike_and_a_weight_of_zero_leaves_one_out():
    logits, refs = one_token()
    equal, none = (KLPenalty(KLConfig(estimator="k1", reference_weights=w)) for w in ([1 / 3] * 3, None))
    assert expected(equal, logits, refs)[0] == pytest.approx(expected(none, logits, refs)[0], rel=1e-12)
    alone = expected(KLPenalty(KLConfig(estimator="k1")), logits, refs[:1])[0]
    poisoned = torch.stack([refs[0], torch.full_like(refs[1], math.nan), torch.full_like(refs[2], -math.inf)])
    first = KLPenalty(KLConfig(estimator="k1", reference_weights=[1.0, 0.0, 0.0]))
    assert expected(first, logits, poisoned)[0] == pytest.approx(alone, rel=1e-12)


def test_no_gradient_reaches_any_reference():
    logits, refs = one_token()
    refs = refs[:2].clone().requires_grad_()
    penalty = KLPenalty(KLConfig(reference_weights=[0.5, 0.5]))
    scores = TokenScores(logits.log_softmax(-1)[None]), [TokenScores(r[None]) for r in refs]
    penalty(*scores, torch.ones(1, CATEGORIES)).loss.backward()
    assert refs.grad is None and logits.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("weights", "refs", "message"),
    [
        ([0.5, 0.5], [torch.zeros(1, 2)] * 3, r"\[0.5, 0.5\] are for 2 references, and 3 were passed"),
        ([0.5, 0.5], [torch.zeros(1, 2)], r"are for 2 references, and 1 were passed"),
        (None, [torch.zeros(1, 2), torch.zeros(1, 3)], r"ref_logp has shape \[1, 3\]"),
    ],
)
def test_references_and_weights_that_do_not_fit_are_refused(weights, refs, message):
    penalty = KLPenalty(KLConfig(reference_weights=weights))
    with pytest.raises(ValueError, match=message):
        penalty(TokenScores(torch.zeros(1, 2)), [TokenScores(r) for r in refs], torch.ones(1, 2))


def test_each_reference_must_be_scored_at_the_policys_temperature():
    scores = TokenScores(torch.zeros(1, 2), temperature=0.7)
    with pytest.raises(ValueError, match=r"at temperature 0.7 and the reference at 1.0"):
        KLPenalty()(scores, [scores, TokenScores(torch.zeros(1, 2))], torch.ones(1, 2))


@pytest.mark.parametrize("weights", [[], [0.5, 0.6], [1.5, -0.5], [math.nan, 1.0], [0.5]])
def test_weights_that_are_no_mixture_are_refused(weights):
    with pytest.raises(ValueError, match=r"kl.reference_weights must not be negative and must sum to 1"):
        KLConfig(reference_weights=weights)

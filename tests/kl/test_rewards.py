"""The KL as a reward: against plain loops, and by enumeration of every sequence of a small policy, in fp64."""

import math

import pytest
import torch
from support.enumeration import SCORED, close, expected_gradient, policies, sequence_logp

from refkl import KLConfig, KLPenalty, TokenScores, kl

MASK = torch.tensor([[True, True, False, True], [False, True, True, False], [False, False, False, False]])


def plain_return_to_go(rewards, mask, gamma):
    """Backwards over the scored tokens of each row."""
    placed = [[0.0] * len(row) for row in rewards]
    for b, row in enumerate(rewards):
        total = 0.0
        for t in reversed(range(len(row))):
            if mask[b][t]:
                total = row[t] + gamma * total
                placed[b][t] = total
    return torch.tensor(placed, dtype=torch.float64)


# place_rewards


@pytest.mark.parametrize(
    ("form", "gamma", "expected"),
    [
        ("token", 1.0, [[1, 2, 0, 4], [0, 6, 7, 0], [0, 0, 0, 0]]),
        ("sequence", 1.0, [[0, 0, 0, 7], [0, 0, 13, 0], [0, 0, 0, 0]]),
        ("return_to_go", 1.0, [[7, 6, 0, 4], [0, 13, 7, 0], [0, 0, 0, 0]]),
        ("return_to_go", 0.5, [[1 + (2 + 4 / 2) / 2, 2 + 4 / 2, 0, 4], [0, 6 + 7 / 2, 7, 0], [0, 0, 0, 0]]),
    ],
)
@pytest.mark.parametrize("poison", [0.0, math.nan, math.inf])
def test_by_hand(form, gamma, expected, poison):
    rewards = torch.arange(1.0, 13.0).reshape(3, 4).masked_fill(~MASK, poison).requires_grad_()
    placed = kl.place_rewards(rewards, MASK.long(), form, gamma=gamma)
    assert not placed.requires_grad
    torch.testing.assert_close(placed, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 0.99, 0.3])
@pytest.mark.parametrize("width", [1, 2, 3, 8, 37, 64])
def test_return_to_go_is_the_plain_loop(width, gamma):
    rewards, mask = torch.randn(5, width, dtype=torch.float64), torch.rand(5, width) < 0.7
    placed = kl.place_rewards(rewards, mask, gamma=gamma)
    torch.testing.assert_close(placed, plain_return_to_go(rewards.tolist(), mask, gamma), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("form", kl.REWARDS)
def test_padding_on_either_side_moves_nothing(form):
    gamma = 0.7 if form == "return_to_go" else 1.0
    rewards, pad, no = torch.randn(3, 4), torch.full((3, 3), 9.0), torch.zeros(3, 3, dtype=torch.bool)
    alone = kl.place_rewards(rewards, MASK, form, gamma=gamma)
    left = kl.place_rewards(torch.cat([pad, rewards], 1), torch.cat([no, MASK], 1), form, gamma=gamma)
    right = kl.place_rewards(torch.cat([rewards, pad], 1), torch.cat([MASK, no], 1), form, gamma=gamma)
    torch.testing.assert_close(left[:, 3:], alone)
    torch.testing.assert_close(right[:, :4], alone)
    assert not left[:, :3].any() and not right[:, 4:].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "return-to-go"}, "Unknown reward 'return-to-go'.*Did you mean 'return_to_go'"),
        *(({"gamma": g}, r"gamma must be in \(0, 1\]") for g in (0.0, 1.1, -0.5, math.nan)),
        *(({"form": f, "gamma": 0.9}, rf"gamma 0.9 has no use with reward '{f}'") for f in ("token", "sequence")),
        ({"mask": MASK[:, :2]}, r"mask has shape \[3, 2\] but per_token has shape \[3, 4\]"),
        ({"per_token": torch.zeros(4), "mask": MASK[0]}, r"per_token must be \[B, T\], got shape \[4\]"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        kl.place_rewards(**{"per_token": torch.zeros(3, 4), "mask": MASK, **options})


# by enumeration


def sequence_kl(logits, ref_logp):
    logp = sequence_logp(logits).sum(-1)
    return (logp.exp() * (logp - ref_logp.sum(-1))).sum()


def reward_of(logits, ref_logp, **options):
    scores = TokenScores(sequence_logp(logits))
    return KLPenalty(KLConfig(coef=0.3, placement="reward", **options))(scores, TokenScores(ref_logp), SCORED)


def test_return_to_go_and_sequence_have_the_gradient_of_the_sequences_kl():
    logits, ref_logp = policies()
    (true,) = torch.autograd.grad(sequence_kl(logits, ref_logp), logits)
    assert true.abs().max() > 0.05
    close(expected_gradient(logits, reward_of(logits, ref_logp).reward), -0.3 * true)
    # "sequence" holds the sum at the last token: every token of the sequence is credited with it.
    placed = reward_of(logits, ref_logp, reward="sequence").reward
    assert ((placed != 0).sum(-1) == 1).all()
    close(expected_gradient(logits, placed.sum(-1, keepdim=True).expand_as(placed)), -0.3 * true)


def test_the_rewards_of_tokens_are_whole_once_a_trainer_makes_returns_of_them():
    logits, ref_logp = policies()
    (true,) = torch.autograd.grad(sequence_kl(logits, ref_logp), logits)
    alone = reward_of(logits, ref_logp, reward="token").reward
    close(expected_gradient(logits, plain_return_to_go(alone.tolist(), SCORED, 1.0)), -0.3 * true)
    # As they stand, they leave out what a token does to those after it, as a loss per token does.
    partial = expected_gradient(logits, alone)
    assert (partial + 0.3 * true).abs().max() > 0.01
    logp = sequence_logp(logits)
    loss = KLPenalty(KLConfig(coef=0.3, aggregation="token-sum"))
    per_token = loss(TokenScores(logp), TokenScores(ref_logp), SCORED).per_token
    weighted = (logp.sum(-1).exp().detach()[:, None] * per_token).sum()
    close(partial, -0.3 * torch.autograd.grad(weighted, logits)[0])


def test_a_discount_is_biased():
    logits, ref_logp = policies()
    (true,) = torch.autograd.grad(sequence_kl(logits, ref_logp), logits)
    discounted = reward_of(logits, ref_logp, gamma=0.5).reward
    per_token = (sequence_logp(logits) - ref_logp).detach()
    close(discounted, plain_return_to_go((-0.3 * per_token).tolist(), SCORED, 0.5))
    assert (expected_gradient(logits, discounted) + 0.3 * true).abs().max() > 0.01


def test_k3_in_the_reward_follows_another_divergence():
    """KL(p ‖ q) - KL(q ‖ p), which can be negative: shown for one token, where nothing else is at play."""
    logits, ref_logits = torch.randn(2, 5, dtype=torch.float64)
    logits.requires_grad_()
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    difference = (logp.exp() * (logp - ref_logp) - ref_logp.exp() * (ref_logp - logp)).sum()
    (true,) = torch.autograd.grad(difference, logits)
    config = KLConfig(coef=0.3, placement="reward", estimator="k3")
    reward = KLPenalty(config)(TokenScores(logp[:, None]), TokenScores(ref_logp[:, None]), torch.ones(5, 1)).reward
    surrogate = (logits.log_softmax(-1).exp() * reward[:, 0]).sum()
    close(torch.autograd.grad(surrogate, logits)[0], -0.3 * true)


# the penalty


def test_the_reward_is_minus_coef_times_k1_and_nothing_else():
    policy = TokenScores(torch.tensor([[-1.0, -2.0, -5.0]], requires_grad=True))
    ref, mask = TokenScores(torch.tensor([[-2.0, -1.5, math.nan]])), torch.tensor([[1, 1, 0]])
    output = KLPenalty(KLConfig(coef=0.2, placement="reward", reward="token"))(policy, ref, mask)
    assert output.loss is None and not output.reward.requires_grad and not output.per_token.requires_grad
    assert output.reward.tolist() == [pytest.approx([-0.2, 0.1, 0.0])]  # likelier than under the reference: penalised
    assert output.per_token.tolist() == [[1.0, -0.5, 0.0]]
    assert output.metrics["kl"] == 0.25 and output.metrics["kl/sequence"] == 0.5


def test_the_reward_takes_the_present_coefficient_and_is_counted_without_grad():
    penalty = KLPenalty(KLConfig(coef=1.0, placement="reward", controller="linear", end_coef=0.0, steps=2))
    scores = TokenScores(torch.full((1, 1), -1.0)), TokenScores(torch.full((1, 1), -3.0))
    rewards = []
    for _ in range(3):
        rewards.append(penalty(*scores, torch.ones(1, 1)).reward.item())
        penalty(*scores, torch.ones(1, 1), count=False)
        assert penalty.step()["kl"] == 2.0
    assert rewards == [-2.0, -1.0, 0.0] and penalty.step() == {}


def test_a_coefficient_of_zero_rewards_nothing_even_where_the_kl_is_infinite():
    scores = TokenScores(torch.zeros(1, 2)), TokenScores(torch.full((1, 2), -math.inf))
    output = KLPenalty(KLConfig(coef=0.0, placement="reward"))(*scores, torch.ones(1, 2))
    assert output.reward.tolist() == [[0.0, 0.0]] and output.metrics["kl"] > 1e3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"old_logp": torch.zeros(1, 2)}, "old_logp has no use with placement 'reward'.*the policy that sampled"),
        ({"normalizer": 2.0}, "normalizer has no use with placement 'reward'"),
        ({"divergence": torch.zeros(1, 2)}, "exact divergence does not go into the reward.*prefers no token"),
    ],
)
def test_what_has_no_use_in_the_reward_is_refused(options, message):
    scores = TokenScores(torch.zeros(1, 2)), TokenScores(torch.zeros(1, 2))
    penalty = KLPenalty(KLConfig(placement="reward"))
    with pytest.raises(ValueError, match=message):
        penalty(*scores, torch.ones(1, 2), **options)
    assert penalty.step() == {}


@pytest.mark.parametrize("form", ["return_to_go", "token", "sequence"])
def test_a_reward_that_is_no_number_reaches_scored_tokens_only(form):
    rewards, mask = torch.ones(2, 4), torch.tensor([[False, True, True, False]] * 2)
    rewards[0, 2] = math.nan
    placed = kl.place_rewards(rewards, mask, form)
    assert placed[0, 2].isnan() and torch.equal(placed[~mask], torch.zeros(4)) and placed[1].isfinite().all()

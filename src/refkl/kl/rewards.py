"""Placement of a sequence's reward: from [B, T] rewards per token to the credit of each token.

Let r_t = -coef · (log p(x_t) - log q(x_t)) for the tokens x that the policy p sampled. The gradient of coef · KL(p ‖ q)
of whole sequences is -E[Σ_t R_t · ∇log p(x_t)] for each of

    return_to_go   R_t = Σ_{s ≥ t} gamma^(s - t) r_s with gamma = 1: a token gets no credit for earlier ones
    sequence       R_t = Σ_s r_s for every t: the same in expectation, with more variance

and not for R_t = r_t ("token"), which leaves out the effect of a token on later ones (Tang and Munos, "On a few
pitfalls in KL divergence gradient estimation for RL", arXiv:2506.09477). Use "token" with a trainer that computes its
own returns from rewards per token, as PPO does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refkl.messages import unknown
from refkl.types import require_shape

REWARDS = ("return_to_go", "token", "sequence")
"""The forms of a token's credit."""


def place_rewards(per_token: Tensor, mask: Tensor, form: str = "return_to_go", *, gamma: float = 1.0) -> Tensor:
    """Place rewards per token.

    Args:
        per_token: [B, T] rewards. Values where the mask is False are ignored, including NaN and inf.
        mask: [B, T], True = counts.
        form: "return_to_go": each scored token gets its own reward and those of the tokens after it. "token": its own.
            "sequence": the sum over the sequence, at its last scored token.
        gamma: for "return_to_go", the discount from one scored token to the next, in (0, 1].

    Returns:
        [B, T], detached, 0.0 where not scored. Padding on either side changes nothing.

    Raises:
        ValueError: an unknown form, shapes that differ, a gamma outside (0, 1] or one that is unused.
    """
    check_rewards(form, gamma)
    if per_token.dim() != 2:
        raise ValueError(f"per_token must be [B, T], got shape {list(per_token.shape)}.")
    require_shape("mask", mask, per_token.shape, "per_token")
    mask = mask.bool()
    rewards = per_token.detach().masked_fill(~mask, 0.0)
    if form == "token":
        return rewards
    if form == "sequence":
        is_last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
        return torch.where(is_last, rewards.sum(-1, keepdim=True), 0.0)  # NaN · 0 is NaN
    # R_t = r_t + a_t R_{t+1}, a_t = gamma where t is scored. Doubling: after log2(T) steps of span 1, 2, 4, … it is
    # whole.
    returns, discount = rewards.clone(), torch.ones_like(rewards).masked_fill(mask, gamma)
    span = 1
    while span < mask.shape[1]:
        returns[:, :-span] += (discount[:, :-span] * returns[:, span:]).clone()
        discount[:, :-span] *= discount[:, span:].clone()
        span *= 2
    return returns.masked_fill(~mask, 0.0)


def check_rewards(form: str, gamma: float) -> None:
    """Raise ValueError if the form does not exist, or the discount is invalid or unused."""
    if form not in REWARDS:
        raise unknown("reward", form, REWARDS)
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma must be in (0, 1], got {gamma}.")
    if gamma != 1.0 and form != "return_to_go":
        raise ValueError(f"gamma {gamma} has no use with reward {form!r}: only 'return_to_go' discounts.")

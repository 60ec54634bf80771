"""Where a sequence's reward goes: from [B, T] rewards per token to what each token is credited with.

With r_t = -coef · (log p(x_t) - log q(x_t)) for the tokens x that the policy p sampled, the gradient of
coef · KL(p ‖ q) of whole sequences is -E[Σ_t R_t · ∇log p(x_t)] for each of

    return_to_go   R_t = Σ_{s ≥ t} gamma^(s - t) r_s with gamma = 1: what came before a token is not its doing
    sequence       R_t = Σ_s r_s for every t: the same in expectation, with more variance

and not for R_t = r_t ("token"), which leaves out what a token does to those after it (Tang and Munos, "On a few
pitfalls in KL divergence gradient estimation for RL", arXiv:2506.09477). That form is for a trainer which makes returns
of its own from rewards per token, as PPO does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refkl.messages import unknown
from refkl.types import require_shape

REWARDS = ("return_to_go", "token", "sequence")
"""What a token is credited with."""


def place_rewards(per_token: Tensor, mask: Tensor, form: str = "return_to_go", *, gamma: float = 1.0) -> Tensor:
    """Rewards per token, placed.

    Args:
        per_token: [B, T] rewards. What is not scored does not matter, NaN and inf included.
        mask: [B, T], True = counts.
        form: "return_to_go": each scored token gets its own reward and those of the tokens after it. "token": its own.
            "sequence": the sum over the sequence, at its last scored token.
        gamma: for "return_to_go", the discount from one scored token to the next, in (0, 1].

    Returns:
        [B, T], detached, 0.0 where not scored. Padding changes nothing, on either side.

    Raises:
        ValueError: an unknown form, shapes that differ, a gamma outside (0, 1] or one that has no use.
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
    # R_t = r_t + a_t R_{t+1}, a_t = gamma where t is scored: by doubling, log2(T) times, what 1, 2, 4, … tokens hold.
    returns, discount = rewards.clone(), torch.ones_like(rewards).masked_fill(mask, gamma)
    span = 1
    while span < mask.shape[1]:
        returns[:, :-span] += (discount[:, :-span] * returns[:, span:]).clone()
        discount[:, :-span] *= discount[:, span:].clone()
        span *= 2
    return returns.masked_fill(~mask, 0.0)


def check_rewards(form: str, gamma: float) -> None:
    """Raise ValueError for a form that does not exist, or a discount that makes no sense or has no use."""
    if form not in REWARDS:
        raise unknown("reward", form, REWARDS)
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma must be in (0, 1], got {gamma}.")
    if gamma != 1.0 and form != "return_to_go":
        raise ValueError(f"gamma {gamma} has no use with reward {form!r}: 'return_to_go' alone discounts.")

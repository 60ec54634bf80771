"""Monte-Carlo estimators of the KL divergence from the log-probabilities of sampled tokens.

Notation: p the policy, q the reference, d = log p(x) - log q(x) for a token x that was sampled (`log_ratio`).

    k1 = d                     unbiased for KL(p ‖ q) when x ~ p; can be negative
    k2 = d² / 2                biased, never negative
    k3 = exp(-d) - 1 + d       unbiased when x ~ p, never negative
    abs = |d|

(J. Schulman, "Approximating KL divergence", 2020.) The *value* of an estimator and its *gradient* are chosen apart:
differentiating k1 gives a gradient of mean zero and k3 that of the forward KL, while the gradient of KL(p ‖ q) with
x ~ p is E[d · ∇log p(x)], which is what differentiating k2 gives ("Rethinking KL Regularization in RLHF", Liu et al.,
arXiv:2510.01555). These are per-token statements: the effect of a token on later ones is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from refkl.messages import unknown
from refkl.types import require_shape

GRADIENTS = ("reverse_kl", "autograd", "none")
RATIOS = ("token", "prefix")

_MAX_EXPONENT = {torch.float32: 60.0, torch.float64: 600.0}
"""Past this exp saturates: well inside the range, so that a sum over a batch is finite too."""


def estimate(
    logp: Tensor,
    ref_logp: Tensor,
    estimator: str = "k3",
    *,
    gradient: str = "reverse_kl",
    old_logp: Tensor | None = None,
    mask: Tensor | None = None,
    ratio: str = "token",
    max_log_ratio: float | None = None,
) -> Tensor:
    """KL(policy ‖ reference) per token, in nats, from log-probabilities of sampled tokens.

    Args:
        logp: policy's log-probabilities, any shape, nats. Grad flows to these alone.
        ref_logp: the reference's, same shape. Always detached.
        estimator: "k1", "k2", "k3" or "abs": the value.
        gradient: "reverse_kl" (default): the gradient of KL(policy ‖ reference), d·∇logp, whatever the estimator,
            and never clamped. "autograd": of the estimator's formula as it stands. "none": detached, for rewards.
        old_logp: log-probabilities under the policy that sampled the tokens, same shape, when it is not the present
            one. The value is then weighted by w = exp(logp - old_logp), with which k1 and k3 are unbiased. The
            gradient of w is kept under "autograd" and left out under "reverse_kl" (w·d·∇logp is the whole gradient).
        mask: same shape, True = counts. Elsewhere the result and its gradient are 0.0, whatever the inputs hold.
        ratio: with `old_logp`: "token" weighs each token by its own ratio, "prefix" by the product of the ratios up
            to it along the last dimension, which alone corrects for how the tokens before it were sampled.
        max_log_ratio: if given, d is clamped to ±this in the *value*; the "reverse_kl" gradient stays whole.

    Returns:
        Same shape; fp32, or fp64 if an input is. exp, and the weighted value, saturate at exp(60) in fp32 (exp(600) in
        fp64). Where a log-probability is -inf the value saturates and the reverse-KL gradient is 0.

    Raises:
        ValueError: unknown estimator, gradient or ratio; shapes that differ; a `max_log_ratio` that is not positive.
    """
    if estimator not in ESTIMATORS:
        raise unknown("estimator", estimator, ESTIMATORS)
    if gradient not in GRADIENTS:
        raise unknown("gradient", gradient, GRADIENTS)
    if ratio not in RATIOS:
        raise unknown("ratio", ratio, RATIOS)
    if max_log_ratio is not None and not max_log_ratio > 0:
        raise ValueError(f"max_log_ratio must be positive, got {max_log_ratio}.")
    log_ratio = masked_log_ratio(logp, ref_logp, mask)
    bounded = log_ratio if max_log_ratio is None else log_ratio.clamp(-max_log_ratio, max_log_ratio)
    value = ESTIMATORS[estimator](bounded)

    weight = torch.ones_like(value)
    if old_logp is not None:
        drift = masked_log_ratio(logp, old_logp, mask, name="old_logp")
        weight = _saturating(drift.cumsum(-1) if ratio == "prefix" else drift).exp()
    if gradient == "autograd":
        result = weight * value
    else:
        result = (weight * value).detach().clamp(max=math.exp(_MAX_EXPONENT[value.dtype]))
        if gradient == "reverse_kl":
            # Straight-through: adds exactly zero to the value, and w·d·∇logp to the gradient.
            whole = log_ratio.masked_fill(log_ratio.isinf(), 0.0)  # inf - inf is NaN
            result = result + (weight * whole).detach() * (whole - whole.detach())
    return result if mask is None else result.masked_fill(~mask.bool(), 0.0)


def masked_log_ratio(logp: Tensor, ref_logp: Tensor, mask: Tensor | None, name: str = "ref_logp") -> Tensor:
    """logp - ref_logp in fp32 or better; 0.0 (and no gradient) where the mask is False, before any other maths."""
    require_shape(name, ref_logp, logp.shape, "logp")
    dtype = torch.promote_types(torch.promote_types(logp.dtype, ref_logp.dtype), torch.float32)
    log_ratio = logp.to(dtype) - ref_logp.detach().to(dtype)
    if mask is None:
        return log_ratio
    require_shape("mask", mask, logp.shape, "logp")
    return log_ratio.masked_fill(~mask.bool(), 0.0)


def saturated(log_ratio: Tensor) -> Tensor:
    """Bool, same shape: where exp(-log_ratio) is capped so as not to overflow."""
    return -log_ratio > _MAX_EXPONENT[log_ratio.dtype]


def _saturating(exponent: Tensor) -> Tensor:
    """`exponent` capped in value alone: its gradient stays 1, so that what is built on it still pulls back."""
    cap = _MAX_EXPONENT[exponent.dtype]
    return torch.where(exponent > cap, cap + (exponent - exponent.detach()), exponent)


def _k3(log_ratio: Tensor) -> Tensor:
    return torch.expm1(_saturating(-log_ratio)) + log_ratio


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: 0.5 * log_ratio.square(),
    "k3": _k3,
    "abs": torch.abs,
}

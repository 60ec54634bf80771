"""Monte-Carlo estimators of the KL divergence from the log-probabilities of sampled tokens.

Notation: p the policy, q the reference, d = log p(x) - log q(x) for a sampled token x (`log_ratio`).

    k1 = d                     unbiased for KL(p ‖ q) when x ~ p; can be negative
    k2 = d² / 2                biased, never negative
    k3 = exp(-d) - 1 + d       unbiased when x ~ p, never negative
    abs = |d|                  biased, never negative

(J. Schulman, "Approximating KL divergence", 2020.) The *value* of an estimator and its *gradient* are separate choices.
Differentiating k1 gives a gradient of mean zero, and k3 that of the forward KL. The gradient of KL(p ‖ q) with x ~ p is
E[d · ∇log p(x)], which is the derivative of k2 ("Rethinking KL Regularization in RLHF", Liu et al., arXiv:2510.01555).
Per-token losses leave out the effect of a token on later ones (Tang and Munos, arXiv:2506.09477).

docs/estimators.md lists which combination is exact for which quantity, and how far off the others are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from refkl.messages import unknown
from refkl.types import require_shape

GRADIENTS = ("reverse_kl", "autograd", "none")
"""The gradients of an estimate; each combines with any value."""
RATIOS = ("token", "prefix")

MAX_EXPONENT = {torch.float32: 60.0, torch.float64: 600.0}
"""Largest exponent of exp, by dtype; exp of a larger one saturates. It leaves room for a finite sum over a batch.

Values saturate at exp of this. A log-ratio, infinite or not, enters a value as at most exp(half of this), so that its
square is finite too.
"""


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
    """Estimate KL(policy ‖ reference) per token, in nats, from log-probabilities of sampled tokens.

    Args:
        logp: the policy's log-probabilities, any shape, nats. Grad flows to these only.
        ref_logp: the reference's, same shape. Always detached.
        estimator: "k1", "k2", "k3" or "abs": the value.
        gradient: "reverse_kl" (default): the gradient of KL(policy ‖ reference), d·∇logp, for every estimator, never
            clamped. "autograd": the derivative of the estimator's formula. "none": detached, for rewards.
        old_logp: log-probabilities under the policy that sampled the tokens, same shape, if it is not the present one.
            Always detached. The value is weighted by w = exp(logp - old_logp). "reverse_kl" has the gradient w·d·∇logp;
            "autograd" keeps the gradient of w too.
        mask: same shape, True = counts: the tokens that the policy sampled. Elsewhere (prompt, padding, a tool's
            output) the result and its gradient are 0.0 and the ratio is 1, whatever the inputs hold.
        ratio: used with `old_logp`. "token": each token's own ratio. k1 and k3 are then unbiased for the KL at the
            prefixes that the *old* policy wrote. "prefix": the product of the ratios up to and including this token,
            along the last dimension. It is unbiased at the prefixes that the *present* policy writes, so the sum over
            tokens is unbiased for KL(policy ‖ reference) of the sequence; its spread grows with the length.
        max_log_ratio: nats. If given, d is clamped to ±this in the *value*; the "reverse_kl" gradient is not clamped.
            Under "autograd" the clamp is part of the formula: no gradient beyond it.

    Per token, "reverse_kl" is the exact gradient of KL(policy ‖ reference) with the prefixes held fixed. For the whole
    gradient of the sequence's KL, with the effect of a token on later ones, use either of (docs/estimators.md):

        estimate(logp.sum(-1), ref_logp.sum(-1))            # masked log-probabilities: one sample per sequence
        estimate(logp, ref_logp, "k3", gradient="autograd", old_logp=logp.detach(), ratio="prefix").sum(-1)

    Returns:
        Same shape; fp32, or fp64 if an input is. exp saturates at exp(60) in fp32 and exp(600) in fp64, and so does the
        value, weighted or not. If one log-probability is -inf, the value is finite and the reverse-KL gradient is 0.
        Where the mask is True, value and gradient are NaN if a log-probability is NaN, or if two that are compared are
        both -inf; with ratio="prefix", those of the later tokens of the row are NaN too.

    Raises:
        ValueError: unknown estimator, gradient or ratio; ratio="prefix" without `old_logp`; shapes that differ; a
            `max_log_ratio` that is not positive.
    """
    _check_options(estimator, gradient, ratio, old_logp, max_log_ratio)
    # Both log-ratios are 0 where the mask is False: every value is 0 there, and a product over a prefix skips it.
    log_ratio = masked_log_ratio(logp, ref_logp, mask)
    drift = torch.zeros_like(log_ratio)
    if old_logp is not None:
        drift = masked_log_ratio(logp, old_logp, mask, name="old_logp")
        dtype = torch.promote_types(log_ratio.dtype, drift.dtype)
        log_ratio, drift = log_ratio.to(dtype), drift.to(dtype)
    cap = MAX_EXPONENT[log_ratio.dtype]
    largest = math.exp(cap / 2)
    drift = drift.clamp(-largest, largest)  # a sum over infinities of both signs would be NaN
    exponent = drift
    if ratio == "prefix":
        exponent = drift.cumsum(-1)
        if mask is not None:  # NaN in a prefix must not reach a token that is left out
            exponent = exponent.masked_fill(~mask.bool(), 0.0)
    spoilt = log_ratio.isnan() | exponent.isnan()
    bounded = log_ratio.clamp(-largest, largest)
    if max_log_ratio is not None:
        bounded = bounded.clamp(-max_log_ratio, max_log_ratio)
    value = ESTIMATORS[estimator](bounded)
    # inf - inf is NaN: an infinite log-ratio has no gradient, except that NaN stays NaN.
    whole = log_ratio.masked_fill(log_ratio.isinf() & ~spoilt, 0.0)
    if gradient == "autograd":
        result = value
        if old_logp is not None:
            result = _weighted_k3(bounded, log_ratio, drift) if estimator == "k3" else _times_exp(drift, value)
        if ratio == "prefix":
            earlier = pad(drift.cumsum(-1)[..., :-1], (1, 0))
            result = _times_exp(earlier if mask is None else earlier.masked_fill(~mask.bool(), 0.0), result)
        # clamp passes no gradient where its input is NaN, and the slope of k1 is 1 at every value.
        result = result + _straight_through(torch.zeros_like(whole).masked_fill(spoilt, torch.nan), whole)
    else:
        weight = _saturating(exponent, cap).exp()
        result = (weight * value).detach().clamp(-math.exp(cap), math.exp(cap))
        if gradient == "reverse_kl":
            result = result + _straight_through(weight * whole, whole)
    return result


def _check_options(
    estimator: str, gradient: str, ratio: str, old_logp: Tensor | None, max_log_ratio: float | None
) -> None:
    """Raise ValueError if a name is unknown, or an option is unused or invalid."""
    if estimator not in ESTIMATORS:
        raise unknown("estimator", estimator, ESTIMATORS)
    if gradient not in GRADIENTS:
        raise unknown("gradient", gradient, GRADIENTS)
    if ratio not in RATIOS:
        raise unknown("ratio", ratio, RATIOS)
    if ratio == "prefix" and old_logp is None:
        raise ValueError(
            "ratio='prefix' weights tokens by policy / old policy, and old_logp is None. Pass the log-probabilities of "
            "the policy that sampled; for the whole gradient on-policy, pass logp.detach()."
        )
    if max_log_ratio is not None and not max_log_ratio > 0:
        raise ValueError(f"max_log_ratio must be positive, got {max_log_ratio}.")


def masked_log_ratio(logp: Tensor, ref_logp: Tensor, mask: Tensor | None, name: str = "ref_logp") -> Tensor:
    """Return logp - ref_logp in fp32 or better. Masked tokens are 0.0 (and have no gradient), before any other
    maths."""
    require_shape(name, ref_logp, logp.shape, "logp")
    dtype = torch.promote_types(torch.promote_types(logp.dtype, ref_logp.dtype), torch.float32)
    log_ratio = logp.to(dtype) - ref_logp.detach().to(dtype)
    if mask is None:
        return log_ratio
    require_shape("mask", mask, logp.shape, "logp")
    return log_ratio.masked_fill(~mask.bool(), 0.0)


def saturated(log_ratio: Tensor) -> Tensor:
    """Return a bool tensor of the same shape, True where exp(-log_ratio) is capped so that it does not overflow."""
    return -log_ratio > MAX_EXPONENT[log_ratio.dtype]


def _saturating(exponent: Tensor, cap: float | Tensor) -> Tensor:
    """Cap `exponent` (finite) in value only. Its gradient stays 1, so a saturated value still pulls back."""
    return torch.where(exponent > cap, cap + (exponent - exponent.detach()), exponent)


def _straight_through(slope: Tensor, variable: Tensor) -> Tensor:
    """Return exactly zero, with the gradient slope · ∇variable."""
    return slope.detach() * (variable - variable.detach())


def _times_exp(exponent: Tensor, factor: Tensor) -> Tensor:
    """Return exp(exponent) · factor, at most exp of the cap in value and slope: a large factor leaves the exponent less
    room."""
    room = MAX_EXPONENT[factor.dtype] - factor.detach().abs().clamp(min=1.0).log()
    return _saturating(exponent, room).exp() * factor


def _k3(log_ratio: Tensor) -> Tensor:
    return torch.expm1(_saturating(-log_ratio, MAX_EXPONENT[log_ratio.dtype])) + log_ratio


def _weighted_k3(bounded: Tensor, log_ratio: Tensor, drift: Tensor) -> Tensor:
    """Return w · k3, with its derivative w·d in closed form.

    Autograd takes the difference of two terms of w·exp(-d), which in fp32 leaves only rounding error from d = -17 on.
    Where d is clamped, k3 is a constant and the derivative is w · k3.
    """
    value = _times_exp(drift, _k3(bounded)).detach()
    weight = _saturating(drift, MAX_EXPONENT[drift.dtype]).exp()
    slope = torch.where(bounded == log_ratio, weight * bounded, value)
    return value + _straight_through(slope, drift)


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: 0.5 * log_ratio.square(),
    "k3": _k3,
    "abs": torch.abs,
}
"""The value of each estimator, from log p - log q."""

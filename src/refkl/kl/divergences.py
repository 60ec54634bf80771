"""Exact divergences between two categorical distributions, from their logits.

Notation: p = softmax(logits) the policy, q = softmax(ref_logits) the reference, d = log p - log q, V categories.

    reverse_kl   KL(p ‖ q) = Σ p d
    forward_kl   KL(q ‖ p) = -Σ q d
    jsd          weight · KL(p ‖ m) + (1 - weight) · KL(q ‖ m),  m = weight · p + (1 - weight) · q

Each is summed as Σ p (d + exp(-d) - 1) or its like, whose terms are never negative: Σ p d cancels terms that are
larger than the sum, which in fp32 is 25 % off at a KL of 1e-6 and can come out below zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from refkl.messages import unknown
from refkl.types import require_shape

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")


def divergence(logits: Tensor, ref_logits: Tensor, kind: str = "reverse_kl", *, weight: float = 0.5) -> Tensor:
    """Exact divergence over the last dimension, in nats.

    Args:
        logits: policy, [..., V], any float dtype; computed in fp32, or in fp64 if an input is. -inf excludes a
            category.
        ref_logits: reference, [..., V]. Always detached: grad flows to the policy alone.
        kind: "reverse_kl" KL(policy ‖ reference), "forward_kl" KL(reference ‖ policy), or "jsd".
        weight: for "jsd", the share of the policy in the mixture, in (0, 1). 0.5 is the Jensen-Shannon divergence.

    Returns:
        [...], never negative. inf where a distribution puts mass on what the other excludes (never so for "jsd").

    Raises:
        ValueError: an unknown kind, shapes that differ, or a weight outside (0, 1).
    """
    if kind not in DIVERGENCES:
        raise unknown("divergence", kind, DIVERGENCES)
    require_shape("ref_logits", ref_logits, logits.shape, "logits")
    dtype = torch.promote_types(torch.promote_types(logits.dtype, ref_logits.dtype), torch.float32)
    log_p = torch.log_softmax(logits.to(dtype), dim=-1)
    log_q = torch.log_softmax(ref_logits.detach().to(dtype), dim=-1)
    if kind == "reverse_kl":
        return _relative_entropy(log_p, log_q, _log_ratio(log_p, log_q)).sum(-1)
    if kind == "forward_kl":
        return _relative_entropy(log_q, log_p, _log_ratio(log_q, log_p)).sum(-1)
    if not 0.0 < weight < 1.0:
        raise ValueError(f"jsd takes a weight in (0, 1), got {weight}: at 0 or 1 it is zero for any two distributions.")
    both = (log_p > -torch.inf) & (log_q > -torch.inf)
    d = log_p.masked_fill(~both, 0.0) - log_q.masked_fill(~both, 0.0)
    near = both & (d.abs() < 1.0)
    d = d.masked_fill(~near, 0.0)
    log_m = torch.logaddexp(_finite(log_p) + math.log(weight), _finite(log_q) + math.log1p(-weight))
    to_p = _relative_entropy(log_p, log_m, _to_mixture(d, near, 1.0 - weight, _log_ratio(log_p, log_m)))
    to_q = _relative_entropy(log_q, log_m, _to_mixture(-d, near, weight, _log_ratio(log_q, log_m)))
    return (weight * to_p + (1.0 - weight) * to_q).sum(-1)


def _log_ratio(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log a - log b; 0 where a is 0, whose term of the sum needs none."""
    empty = log_a.exp() == 0
    return log_a.masked_fill(empty, 0.0) - log_b.masked_fill(empty, 0.0)


def _to_mixture(d: Tensor, near: Tensor, other: float, direct: Tensor) -> Tensor:
    """log a - log m for m = (1 - other) a + other b, from d = log a - log b: exactly 0 where a and b are equal."""
    return torch.where(near, -torch.log1p(other * torch.expm1(-d)), direct)


def _finite(log_prob: Tensor) -> Tensor:
    """-inf as a low finite number: logaddexp(-inf, -inf) has a NaN gradient."""
    return log_prob.clamp(min=torch.finfo(log_prob.dtype).min / 4)


def _relative_entropy(log_a: Tensor, log_b: Tensor, d: Tensor) -> Tensor:
    """Terms a (d + exp(-d) - 1) = a d + b - a, d = log a - log b, which sum to KL(a ‖ b) and are never negative."""
    # Where |d| is large a·exp(-d) would be 0·inf; where it is small a·d + b - a would cancel.
    near = d.abs() < 1.0
    d_near = d.masked_fill(~near, 0.0)
    a = log_a.exp()
    small = a * (torch.expm1(-d_near) + d_near)
    large = a * d.masked_fill(near, 0.0) + (log_b.exp() - a)
    empty = a == 0  # 0 · log 0 = 0: only b is left of the term
    return torch.where(empty, log_b.exp(), torch.where(near, small, large))

"""Exact divergences between two categorical distributions, from logits.

`linear_divergence` computes the same from hidden states, without the logits in memory. The maths is in
divergence_rows.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from refkl.kl.divergence_rows import DIVERGENCES, Divergence, blocks, compare, first_order
from refkl.types import require_shape

__all__ = ["DIVERGENCES", "divergence"]


def divergence(
    logits: Tensor,
    ref_logits: Tensor,
    kind: str = "reverse_kl",
    *,
    weight: float = 0.5,
    order: float | None = None,
    top_k: int | None = None,
) -> Tensor:
    """Compute the exact divergence over the last dimension, in nats (a plain number for chi2, hellinger, tv and amari).

    Args:
        logits: policy, [..., V], any float dtype; computed in fp32, or in fp64 if an input is. -inf excludes a
            category.
        ref_logits: reference, [..., V]. Always detached: grad flows to the policy only.
        kind: "reverse_kl" KL(policy ‖ reference), "forward_kl" KL(reference ‖ policy), "jsd", "amari" (also called
            "alpha") and "renyi" of an `order`, "chi2" Σ (p - q)²/q, "hellinger" 1 - Σ √(p q) (the squared distance),
            "tv" ½ Σ |p - q|.
        weight: for "jsd", the share of the policy in the mixture, in (0, 1). 0.5 is the Jensen-Shannon divergence.
        order: for "amari" and "renyi", the power that p is raised to. Towards 1 both become "reverse_kl"; towards 0
            amari becomes "forward_kl".
        top_k: compare the policy's k likeliest categories and one bucket for all others. The result never exceeds the
            exact value and equals it at k = V.

    Returns:
        [...], never negative. inf if a distribution puts mass where the other has none (a probability that underflows
        to 0 counts as none); "jsd", "hellinger", "tv" and orders in (0, 1) are always finite, except "renyi" of
        distributions that share no category. In "amari" and "chi2" the power p^a q^(1-a) saturates at exp(60) in fp32,
        exp(600) in fp64. Value and gradient are NaN if a logit on either side is NaN or +inf, or if all of a side's are
        -inf; a row whose value gets no gradient from above has none. The gradient is finite also where the value is
        inf, unless it exceeds the range of the logits' dtype.

    Raises:
        ValueError: an unknown kind, shapes that differ, a weight outside (0, 1), an order that is missing or unused, a
            top_k below 1.
    """
    how = Divergence(kind, weight, order, top_k)
    require_shape("ref_logits", ref_logits, logits.shape, "logits")
    columns = logits.shape[-1]
    value = _Dense.apply(logits.reshape(-1, columns), ref_logits.detach().reshape(-1, columns), how)
    return value.view(logits.shape[:-1])


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logits: Tensor, how: Divergence) -> Tensor:
        ctx.save_for_backward(logits, ref_logits)
        ctx.how = how
        value = logits.new_empty(logits.shape[0], dtype=_dtype(logits, ref_logits))
        for rows in blocks(logits.shape[0], logits.shape[1], logits.device):
            z, ref_z = logits[rows].to(value.dtype), ref_logits[rows].to(value.dtype)
            value[rows], _ = compare(how, z, ref_z, slope=False)
        return value

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_value: Tensor) -> Any:
        logits, ref_logits = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for rows in blocks(logits.shape[0], logits.shape[1], logits.device):
            z, ref_z = logits[rows].to(grad_value.dtype), ref_logits[rows].to(grad_value.dtype)
            _, slope = compare(ctx.how, z, ref_z)
            assert slope is not None
            grad[rows] = slope * grad_value[rows, None]
        # A row that is masked out above: 0 · NaN is NaN.
        return grad.index_fill_(0, (grad_value == 0).nonzero()[:, 0], 0.0), None, None


def _dtype(logits: Tensor, ref_logits: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(logits.dtype, ref_logits.dtype), torch.float32)

"""Log-probability of a token and entropy, from rows of logits, shared by the dense and the fused functions.

Notation: z [n, V] a row's logits, t its target, e = exp(z - max z), s = Σ e, p = e / s.

log p_t = -log(1 + Σ_{j≠t} e_j / e_t) keeps the digits of a log-probability near zero, which z_t - logsumexp(z) rounds
away. So does its gradient 1 - p_t = Σ_{j≠t} e_j / s at the target.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from refkl.kl.divergence_rows import FLOOR, Softmax


def logp_in_place(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p_t [n] and a factor [n, 1]. z is overwritten: z times the factor is then ∂log p_t/∂z."""
    own, rest, _ = _exponentiate(z, target, out=z)
    z.scatter_(-1, target, -rest)
    total = rest + own.exp()
    return _logp(own, rest, total)[:, 0], -total.reciprocal()


class TokenRows(NamedTuple):
    """Softmax and log-probabilities of rows of logits."""

    softmax: Softmax
    shift: Tensor
    """[n, V] z - max z."""
    log_total: Tensor
    """[n, 1] log Σ exp(shift)."""
    logp: Tensor | None
    """[n, 1] log-probability of the target."""
    left: Tensor | None
    """[n, 1] 1 - p_t."""


def token_rows(z: Tensor, target: Tensor | None) -> TokenRows:
    """Compute the softmax of z [n, V], and log p_t if there is a target [n, 1]."""
    if target is None:
        peak = z.amax(-1, keepdim=True)
        shift = z - peak
        prob = shift.exp()
        total = prob.sum(-1, keepdim=True)
        log_total, logp, left = total.log(), None, None
    else:
        shift = torch.empty_like(z)
        prob = torch.empty_like(z)
        own, rest, peak = _exponentiate(z, target, out=prob, shift=shift)
        mine = own.exp()
        prob.scatter_(-1, target, mine)
        total = rest + mine
        logp = _logp(own, rest, total)
        log_total = torch.where(own > -1.0, own - logp, total.log())
        left = rest / total
    return TokenRows(Softmax(prob.div_(total), peak + log_total), shift, log_total, logp, left)


def entropy(rows: TokenRows, *, finite: bool) -> Tensor:
    """Return the entropy [n, 1] in nats."""
    # 0 · -inf is NaN, 0 · FLOOR is 0; a NaN stays one.
    parts = rows.softmax.prob * rows.shift if finite else rows.shift.clamp(min=FLOOR).mul_(rows.softmax.prob)
    return rows.log_total - parts.sum(-1, keepdim=True)


def logp_slope(rows: TokenRows, target: Tensor) -> Tensor:
    """Return ∂log p_t/∂z [n, V]."""
    assert rows.left is not None
    return rows.softmax.prob.neg().scatter_(-1, target, rows.left)


def entropy_slope(rows: TokenRows, value: Tensor, *, finite: bool) -> Tensor:
    """Return ∂H/∂z [n, V] = -p (log p + H), for the entropy H [n, 1]."""
    less = value - rows.log_total
    slope = rows.shift + less if finite else rows.shift.clamp(min=FLOOR).add_(less)
    return slope.mul_(rows.softmax.prob).neg_()


def _exponentiate(
    z: Tensor, target: Tensor, *, out: Tensor, shift: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute out <- e, with 0 at the target. Return z_t - max z, Σ_{j≠t} e_j and max z, each [n, 1]."""
    peak = z.amax(-1, keepdim=True)
    moved = torch.sub(z, peak, out=out if shift is None else shift)
    own = moved.gather(-1, target)
    torch.exp(moved, out=out).scatter_(-1, target, 0.0)
    return own, out.sum(-1, keepdim=True), peak


def _logp(own: Tensor, rest: Tensor, total: Tensor) -> Tensor:
    return torch.where(own > -1.0, -torch.log1p(rest / own.exp()), own - total.log())

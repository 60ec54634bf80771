"""Divergences between rows of logits, value and gradient, shared by the dense and the fused functions.

Notation: z the policy's logits and p = softmax(z), q the reference's distribution, d = log p - log q, V categories.

    reverse_kl   KL(p ‖ q) = Σ p d
    forward_kl   KL(q ‖ p) = -Σ q d
    jsd          w KL(p ‖ m) + (1 - w) KL(q ‖ m),  m = w p + (1 - w) q
    amari        (Σ p^a q^(1-a) - 1) / (a (a - 1))          a = 1 would be reverse_kl, a = 0 forward_kl
    renyi        log(Σ p^a q^(1-a)) / (a - 1)
    chi2         Σ (p - q)² / q, Pearson's
    hellinger    1 - Σ √(p q), the squared distance
    tv           ½ Σ |p - q|

Each is a sum Σ g(p, q) whose terms are arranged so that none is negative. Σ p d itself cancels terms larger than the
sum, which in fp32 is 25 % off at a KL of 1e-6 and can come out below zero. With w_j = p_j ∂g/∂p_j the gradient is
∂/∂z_j = w_j - p_j Σ w. (S. Amari, "Differential-Geometrical Methods in Statistics", 1985; J. Lin, "Divergence measures
based on the Shannon entropy", 1991; T. van Erven, P. Harremoës, "Rényi divergence and Kullback-Leibler divergence",
2014)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refkl.kl.estimators import MAX_EXPONENT
from refkl.messages import unknown

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "amari", "renyi", "alpha", "chi2", "hellinger", "tv")
"""Exact divergences; "alpha" is another name of "amari"."""

_FAR = 1e5
"""Replaces an infinite log-ratio that is multiplied by a probability: 0 · inf is NaN."""
FLOOR = -1e6
"""Replaces log 0 where two logarithms are mixed: inf - inf is NaN."""
_STEEP = 40.0
"""Value of log q - log p from which p (q/p - 1) may be 0 · inf, or 0 although q is not."""


@dataclass(frozen=True)
class Divergence:
    """A kind of divergence and its options. Invalid ones raise ValueError at construction."""

    kind: str = "reverse_kl"
    weight: float = 0.5
    order: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            raise unknown("divergence", self.kind, DIVERGENCES)
        if self.kind == "jsd" and not 0.0 < self.weight < 1.0:
            raise ValueError(
                f"jsd takes a weight in (0, 1), got {self.weight}: at 0 or 1 jsd is zero for any two distributions."
            )
        if self.kind in ("amari", "alpha", "renyi"):
            self._check_order()
        elif self.order is not None:
            raise ValueError(f"order={self.order} belongs to 'amari' (or 'alpha') and 'renyi'; {self.kind} takes none.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k counts categories and must be at least 1, got {self.top_k}.")

    def _check_order(self) -> None:
        if self.order is None or not math.isfinite(self.order):
            raise ValueError(f"{self.kind} needs a finite order, as in order=0.5; got {self.order}.")
        if self.order in (0.0, 1.0):
            same = "reverse_kl" if self.order == 1.0 else "forward_kl"
            raise ValueError(f"{self.kind} of order {self.order} is a limit: ask for {same!r}, which is exact.")
        if self.kind == "renyi" and self.order < 0.0:
            raise ValueError(f"renyi takes a positive order, got {self.order}: below zero it is not a divergence.")


class Softmax(NamedTuple):
    """Distributions of rows of logits."""

    prob: Tensor
    """[n, V]."""
    log_z: Tensor
    """[n, 1] logsumexp of the logits."""


def softmax(z: Tensor) -> Softmax:
    """Return the softmax of rows [n, V]."""
    peak = z.amax(-1, keepdim=True)
    prob = (z - peak).exp_()
    total = prob.sum(-1, keepdim=True)
    return Softmax(prob.div_(total), peak.add_(total.log_()))


def compare(
    how: Divergence,
    z: Tensor,
    ref_z: Tensor,
    *,
    policy: Softmax | None = None,
    reference: Softmax | None = None,
    difference: Tensor | None = None,
    finite: bool = False,
    slope: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Compute the divergence of rows, and its gradient.

    Args:
        how: the divergence.
        z, ref_z: logits [n, V] of policy and reference, in the dtype of the maths. -inf excludes a category.
        policy, reference: softmax(z) and softmax(ref_z), if already computed.
        difference: z - ref_z, if it is known to more digits than z and ref_z have.
        finite: promises that no logit is -inf, which saves passes.
        slope: also compute the gradient.

    Returns:
        value [n], never negative, and ∂value/∂z [n, V] (None without `slope`), finite even if the value is inf. Both
        are NaN in a row with a logit that is NaN or +inf on either side, or with no category at all.
    """
    p, log_z = policy or softmax(z)
    q, ref_log_z = reference or softmax(ref_z)
    # A NaN logit makes the logsumexp of its row NaN; -inf does not. This is one number per row: no pass over [n, V].
    poison = 0.0 * log_z + 0.0 * ref_log_z
    d = (z - ref_z if difference is None else difference) - (log_z - ref_log_z)
    holes = None
    if not finite:
        # NaN here comes from -inf - -inf, a category that neither side has. `poison` restores NaN in invalid rows.
        holes = (d == torch.inf) & (p > 0), (d == -torch.inf) & (q > 0)
        d.nan_to_num_(nan=0.0, posinf=_FAR, neginf=-_FAR)
    pair = _Pair(p, q, d, lambda: ((z - log_z).clamp_(min=FLOOR), (ref_z - ref_log_z).clamp_(min=FLOOR)))
    if how.top_k is not None and how.top_k < z.shape[-1]:
        value, grad, holes = _bucketed(how, pair, how.top_k, holes, poison, slope)
    else:
        value, weighted = _terms(how, pair)
        grad = weighted.addcmul_(p, weighted.sum(-1, keepdim=True).add_(poison), value=-1.0) if slope else None
    value.clamp_(min=0.0)  # terms that should be zero may round below it
    if holes is not None:
        for direction, hole in zip(("policy", "reference"), holes, strict=True):
            if _infinite(how, direction):
                value.masked_fill_(hole.any(-1), torch.inf)
    return value.add_(poison[:, 0]), grad


def reverse_kl_in_place(z: Tensor, ref_z: Tensor, *, difference: bool) -> tuple[Tensor, Tensor]:
    """Compute KL(p ‖ q) of rows without -inf, in the fewest passes; `compare` handles all other cases.

    Args:
        z, ref_z: logits [n, V]; both are overwritten.
        difference: True if the first argument is z - ref_z, not z.

    Returns:
        value [n] and a factor [n, 1]. The first argument, overwritten, times the factor is ∂value/∂z.
    """
    whole = z + ref_z if difference else z
    peak, ref_peak = whole.amax(-1, keepdim=True), ref_z.amax(-1, keepdim=True)
    weight = (whole - peak).exp_()
    total = weight.sum(-1, keepdim=True)
    behind = (ref_z - ref_peak).exp_()  # used for its sum, then as the buffer of log q - log p
    shift = (peak - ref_peak) + (total.log() - behind.sum(-1, keepdim=True).log())
    if difference:
        torch.sub(shift, z, out=behind)
    else:
        torch.sub(ref_z, z, out=behind).add_(shift)
    if not float(behind.max()) <= _STEEP:  # NaN of one row hides how steep the others are
        value, slope = compare(Divergence(), whole, ref_z, difference=z if difference else None, finite=True)
        assert slope is not None
        z.copy_(slope)
        return value, torch.ones_like(total)
    torch.expm1(behind, out=ref_z).sub_(behind)
    value = _dot(ref_z, weight) / total
    torch.mul(behind.sub_(_dot(behind, weight) / total), weight, out=z)
    return value.clamp_(min=0.0)[:, 0], -total.reciprocal()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ a b as [n, 1]."""
    return torch.linalg.vecdot(a, b)[:, None]


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate an autograd.Function's backward that has no derivative, so that it refuses create_graph=True.

    With once_differentiable only, the result would count as a constant, and a gradient penalty would silently lose a
    term.
    """
    once = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def refusing(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "This gradient was asked for with create_graph=True, but it cannot be differentiated again. Leave "
                "create_graph out, or compute the penalty from the logits with torch only."
            )
        return once(ctx, *grads)

    return refusing


def blocks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Return slices of rows to process at a time, small enough that the intermediate tensors stay in a CPU's cache."""
    elements = (1 << 19) if device.type == "cpu" else (1 << 23)
    size = max(1, elements // max(1, columns))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


class _Pair(NamedTuple):
    """Two distributions: p, q, d each [n, V], and a function that returns their logarithms."""

    p: Tensor
    q: Tensor
    d: Tensor
    logs: Callable[[], tuple[Tensor, Tensor]]


def _infinite(how: Divergence, direction: str) -> bool:
    """Return True if the divergence is inf where only the policy ("policy") or only the reference has mass."""
    order = {"reverse_kl": 1.0, "forward_kl": 0.0, "chi2": 2.0}.get(how.kind, how.order)
    if order is None:  # jsd, hellinger and tv are bounded
        return False
    return order >= 1.0 if direction == "policy" else order <= 0.0


def _terms(how: Divergence, pair: _Pair) -> tuple[Tensor, Tensor]:
    """Return the value [n], and w = p ∂g/∂p [n, V]."""
    if how.kind == "reverse_kl":
        weighted = pair.p * pair.d
        return _relative_entropy(pair.p, pair.q, pair.d, weighted).sum(-1), weighted
    if how.kind == "forward_kl":
        value = _relative_entropy(pair.q, pair.p, -pair.d, pair.q * -pair.d).sum(-1)
        return value, _gap(pair)
    if how.kind == "jsd":
        return _jsd(pair, how.weight)
    if how.kind == "tv":
        gap = _gap(pair)
        return 0.5 * gap.abs().sum(-1), 0.5 * pair.p * gap.sign()
    if how.kind == "chi2":
        terms, weighted = _amari(pair, 2.0)
        return 2.0 * terms.sum(-1), 2.0 * weighted
    if how.kind == "hellinger":
        terms, weighted = _amari(pair, 0.5)
        return 0.25 * terms.sum(-1), 0.25 * weighted
    assert how.order is not None
    terms, weighted = _amari(pair, how.order)
    value = terms.sum(-1)
    return _renyi(pair, value, weighted, how.order) if how.kind == "renyi" else (value, weighted)


def _relative_entropy(a: Tensor, b: Tensor, d: Tensor, ad: Tensor) -> Tensor:
    """Return terms a (d + exp(-d) - 1) = a d + b - a, d = log a - log b: they sum to KL(a ‖ b) and are never
    negative."""
    # If |d| is large, a·exp(-d) would be 0·inf; if it is small, a·d + b - a would cancel.
    small = torch.expm1(-d).add_(d).mul_(a)
    return torch.where(d.abs() < 1.0, small, (b - a).add_(ad))


def _gap(pair: _Pair) -> Tensor:
    """Return p - q, without cancellation where they are close."""
    return torch.where(pair.d.abs() < 1.0, torch.expm1(-pair.d).mul_(pair.p).neg_(), pair.p - pair.q)


def _jsd(pair: _Pair, weight: float) -> tuple[Tensor, Tensor]:
    p, q, d = pair.p, pair.q, pair.d
    # log p/m and log q/m come from exp(-|d|) - 1, which cannot overflow; they differ by d.
    shrink = torch.expm1(-d.abs())
    ahead = d >= 0
    larger = -torch.log1p(torch.where(ahead, (1.0 - weight) * shrink, weight * shrink))
    p_to_m, q_to_m = torch.where(ahead, larger, larger + d), torch.where(ahead, larger - d, larger)
    m = weight * p + (1.0 - weight) * q
    weighted = p * p_to_m
    terms = weight * _relative_entropy(p, m, p_to_m, weighted)
    terms += (1.0 - weight) * _relative_entropy(q, m, q_to_m, q * q_to_m)
    return terms.sum(-1), weighted.mul_(weight)


def _amari(pair: _Pair, order: float) -> tuple[Tensor, Tensor]:
    """Return terms (p^a q^(1-a) - a p - (1-a) q) / (a (a - 1)), never negative."""
    p, q, d = pair.p, pair.q, pair.d
    log_p, log_q = pair.logs()
    power = (order * log_p + (1.0 - order) * log_q).clamp_(max=MAX_EXPONENT[p.dtype]).exp_()
    # Towards order 1 the power becomes p, towards 0 q. Its difference from that, over a (a - 1), must keep its digits.
    base, other, u, share = (p, q, d, 1.0 - order) if order > 0.5 else (q, p, -d, order)
    y = -share * u
    near = torch.maximum(y.abs(), u.abs()) < 1.0
    step = torch.expm1(y)
    small = base * ((step - y) - share * (torch.expm1(-u) + u))
    change = torch.where(y.abs() < 1.0, base * step, power - base)
    terms = torch.where(near, small, change + share * (base - other)) / (order * (order - 1.0))
    x = (order - 1.0) * d
    above_p = change if base is p else torch.where(x.abs() < 1.0, p * torch.expm1(x), power - p)
    return terms, above_p / (order - 1.0)


def _renyi(pair: _Pair, amari: Tensor, weighted: Tensor, order: float) -> tuple[Tensor, Tensor]:
    excess = order * (order - 1.0) * amari  # Σ p^a q^(1-a) - 1
    # If p and q are far apart, the sum vanishes (order < 1) or overflows (order > 1): take it from logarithms there.
    far = (excess < -0.5) | (excess > 1.0)
    log_p, log_q = pair.logs()
    apart = ((log_p <= FLOOR) | (log_q <= FLOOR)).all(-1)
    power = order * log_p + (1.0 - order) * log_q
    value = torch.where(far, power.logsumexp(-1), excess.log1p()) / (order - 1.0)
    tilt = (power.softmax(-1) - pair.p) * (order / (order - 1.0))
    weighted = torch.where(far[:, None], tilt, weighted * (order / (1.0 + excess))[:, None])
    return value.masked_fill_(apart, torch.inf), weighted


def _bucketed(
    how: Divergence, pair: _Pair, k: int, holes: tuple[Tensor, Tensor] | None, poison: Tensor, slope: bool
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """Compute the divergence of the policy's k likeliest categories and one bucket for all others.

    It is a lower bound: merging categories can only lose what distinguishes two distributions (the data-processing
    inequality). `holes` [n, V] mark where only the policy, and only the reference, has mass; the result has those of
    the coarse distributions. `poison` [n, 1] is NaN where the gradient must be NaN, else 0.
    """
    p, q, d = pair.p, pair.q, pair.d
    top = p.topk(k, dim=-1, sorted=False).indices
    rest_p, rest_q = p.scatter(-1, top, 0.0), q.scatter(-1, top, 0.0)
    tail_p, tail_q = rest_p.sum(-1, keepdim=True), rest_q.sum(-1, keepdim=True)
    gap = torch.where(d.abs() < 1.0, rest_p * torch.expm1(-d), rest_q - rest_p).sum(-1, keepdim=True)
    shift = gap / tail_p  # q_tail / p_tail - 1
    # The tails come from logarithms: a tail that underflows is not an excluded one.
    log_p, log_q = pair.logs()
    tail_log_p, tail_log_q = (x.scatter(-1, top, FLOOR).logsumexp(-1, keepdim=True) for x in (log_p, log_q))
    tail_d = torch.where(shift.abs() < 0.5, -torch.log1p(shift), (tail_log_p - tail_log_q).clamp_(-_FAR, _FAR))

    def logs() -> tuple[Tensor, Tensor]:
        return torch.cat([log_p.gather(-1, top), tail_log_p], -1), torch.cat([log_q.gather(-1, top), tail_log_q], -1)

    if holes is not None:
        tails = (tail_p > 0) & (tail_log_q < 0.5 * FLOOR), (tail_q > 0) & (tail_log_p < 0.5 * FLOOR)
        policy, reference = (torch.cat([x.gather(-1, top), t], -1) for x, t in zip(holes, tails, strict=True))
        holes = policy, reference
    coarse = _Pair(
        torch.cat([p.gather(-1, top), tail_p], -1),
        torch.cat([q.gather(-1, top), tail_q], -1),
        torch.cat([d.gather(-1, top), tail_d], -1),
        logs,
    )
    value, weighted = _terms(how, coarse)
    if not slope:
        return value, None, holes
    total = weighted.sum(-1, keepdim=True).add_(poison)
    in_tail = (weighted[:, -1:] / tail_p).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    grad = rest_p.mul_(in_tail - total)
    return value, grad.scatter_(-1, top, weighted[:, :-1] - coarse.p[:, :-1] * total), holes

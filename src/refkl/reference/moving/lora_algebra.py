"""The two averages of LoRA layers: of the factors, and of their product, the change of weight.

    r       rank; E, I, O       experts (1 for a plain layer), inputs, outputs of a layer
    A, B    [E, r, I], [E, O, r]        the factors: the layer's weight changes by s·B·A  (Hu et al., arXiv:2106.09685)
    0, 1    the reference's factors and the policy's, which have the same s
    w       alpha, the policy's share

    of the factors:     ((1-w) B0 + w B1) · ((1-w) A0 + w A1)                   rank r
    of the product:     (1-w) B0·A0 + w B1·A1 = [(1-w) B0, w B1] · [A0; A1]     rank r0 + r1

They differ by -w(1-w) (B1-B0)·(A1-A0). Sun et al. (arXiv:2403.12313) show this for averages over clients; Wang et al.
(arXiv:2409.05976) stack ranks, which is exact. No [O, I] weight is ever allocated here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """One layer's factors, of the same dtype and on the same device."""

    a: Tensor
    """[E, r, I]"""
    b: Tensor
    """[E, O, r]"""

    @property
    def rank(self) -> int:
        """The rank r of each expert."""
        return self.a.shape[-2]


def unpacked(a: Tensor, b: Tensor, experts: int = 1) -> Factors:
    """Return Factors from PEFT's layout: [E·r, I], expert after expert, and [O, r·E], rank after rank (for a plain
    layer [r, I] and [O, r]). They are views where possible."""
    return Factors(a.reshape(experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1))


def packed(factors: Factors) -> tuple[Tensor, Tensor]:
    """Return the factors in PEFT's layout: [E·r, I] and [O, r·E], contiguous."""
    a, b = factors
    return a.reshape(-1, a.shape[-1]).contiguous(), b.permute(1, 2, 0).reshape(b.shape[1], -1).contiguous()


def stacked(own: Factors, theirs: Factors, alpha: float) -> Factors:
    """Return factors of the exact average of the products, (1 - alpha) own + alpha theirs: rank r0 + r1.

    The rank is lower where that suffices: if a product is zero, or if both have the same A or the same B.
    """
    if own.rank == theirs.rank and torch.equal(own.a, theirs.a):
        return Factors(own.a, _mixed(own.b, theirs.b, alpha))
    if own.rank == theirs.rank and torch.equal(own.b, theirs.b):
        return Factors(_mixed(own.a, theirs.a, alpha), own.b)
    if _is_zero(own):
        return Factors(theirs.a, alpha * theirs.b)
    if _is_zero(theirs):
        return Factors(own.a, (1.0 - alpha) * own.b)
    return _both(own, theirs, alpha)


def highest_rank(factors: Factors, rank: int | None = None) -> int:
    """Return the highest rank that `rank` allows, at most min(I, O), which suffices for any product."""
    bound = min(factors.a.shape[-1], factors.b.shape[-2])
    return bound if rank is None else min(bound, rank)


def compressed(factors: Factors, rank: int) -> tuple[Factors, Tensor]:
    """Return the best approximation of each expert's product with this rank, in the Frobenius norm (Eckart and Young,
    1936).

    Computed from a QR of each factor and the SVD of the small core between them: B·A = Q_B (R_B R_Aᵀ) Q_Aᵀ. Both
    factors get the square roots of the singular values, so that neither is coarse when held in 16 bits.

    Returns:
        The factors, of this rank or of min(r, I, O) if that is less; and [] fp64, the squared Frobenius norm of the
        part that is left out.
    """
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(factors.b), torch.linalg.qr(factors.a.mT)
    u, s, v = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = s[..., :rank].sqrt()
    a = root[..., :, None] * (v[..., :rank, :] @ q_a.mT)
    b = (q_b @ u[..., :rank]) * root[..., None, :]
    return Factors(a, b), _wide(s[..., rank:]).square().sum()


def squared_norm(factors: Factors) -> Tensor:
    """Return [] fp64: ‖B·A‖² in the Frobenius norm, summed over experts, as tr(BᵀB · AAᵀ) of [r, r] matrices."""
    a, b = _wide(factors.a), _wide(factors.b)
    return ((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0.0)


def squared_average(own: Factors, theirs: Factors, alpha: float) -> Tensor:
    """Return [] fp64: ‖(1-w) B0·A0 + w B1·A1‖²."""
    return squared_norm(_both(Factors(*map(_wide, own)), Factors(*map(_wide, theirs)), alpha))


def squared_difference(own: Factors, theirs: Factors, alpha: float) -> Tensor:
    """Return [] fp64: ‖product of the averaged factors - average of the products‖², for factors of the same rank."""
    apart = Factors(_wide(theirs.a) - _wide(own.a), _wide(theirs.b) - _wide(own.b))
    return (alpha * (1.0 - alpha)) ** 2 * squared_norm(apart)


def _both(own: Factors, theirs: Factors, alpha: float) -> Factors:
    a = torch.cat([own.a, theirs.a], dim=-2)
    return Factors(a, torch.cat([(1.0 - alpha) * own.b, alpha * theirs.b], dim=-1))


def _mixed(own: Tensor, theirs: Tensor, alpha: float) -> Tensor:
    return own + alpha * (theirs - own)


def _is_zero(factors: Factors) -> bool:
    return not (bool(factors.a.any()) and bool(factors.b.any()))


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor in fp64; on the host if its device has no fp64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()

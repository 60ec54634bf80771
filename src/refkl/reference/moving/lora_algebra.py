"""LoRA's two averages: of the factors, and of the change of weight that they make.

    r       rank; E, I, O       experts (1 for a plain layer), inputs, outputs of a layer
    A, B    [E, r, I], [E, O, r]        the factors: the layer's weight changes by s·B·A  (Hu et al., arXiv:2106.09685)
    0, 1    the reference's and the policy's, which have the same s
    w       alpha, the policy's share

    of the factors:     ((1-w) B0 + w B1) · ((1-w) A0 + w A1)                   rank r
    of the product:     (1-w) B0·A0 + w B1·A1 = [(1-w) B0, w B1] · [A0; A1]     rank r0 + r1

They differ by -w(1-w) (B1-B0)·(A1-A0): Sun et al. (arXiv:2403.12313) point that out for averages over clients, and Wang
et al. (arXiv:2409.05976) stack ranks, which is exact. No [O, I] weight is ever made here.
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
        """r: of each expert."""
        return self.a.shape[-2]


def unpacked(a: Tensor, b: Tensor, experts: int = 1) -> Factors:
    """Factors from the layout in which PEFT holds them: [E·r, I], expert after expert, and [O, r·E], rank after rank
    (for a plain layer [r, I] and [O, r]). Views where that can be."""
    return Factors(a.reshape(experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1))


def packed(factors: Factors) -> tuple[Tensor, Tensor]:
    """As PEFT holds them: [E·r, I] and [O, r·E], contiguous."""
    a, b = factors
    return a.reshape(-1, a.shape[-1]).contiguous(), b.permute(1, 2, 0).reshape(b.shape[1], -1).contiguous()


def stacked(own: Factors, theirs: Factors, alpha: float) -> Factors:
    """(1 - alpha) own + alpha theirs, of the products, exactly: rank r0 + r1.

    Less where no more is needed: a product that is zero adds no rank, and neither does a factor that both have.
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
    """Return the highest rank that `rank` allows, never more than min(I, O), which holds any product."""
    bound = min(factors.a.shape[-1], factors.b.shape[-2])
    return bound if rank is None else min(bound, rank)


def compressed(factors: Factors, rank: int) -> tuple[Factors, Tensor]:
    """The product's best approximation of this rank in the Frobenius norm (Eckart and Young, 1936), of each expert.

    By a QR of each factor, and the SVD of the small core between them: B·A = Q_B (R_B R_Aᵀ) Q_Aᵀ. Both factors get the
    square roots of the singular values, so that neither is coarse when held in 16 bits.

    Returns:
        the factors, of this rank or of min(r, I, O) if that is less; [] fp64, the squared Frobenius norm of what is
        left out.
    """
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(factors.b), torch.linalg.qr(factors.a.mT)
    u, s, v = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = s[..., :rank].sqrt()
    a = root[..., :, None] * (v[..., :rank, :] @ q_a.mT)
    b = (q_b @ u[..., :rank]) * root[..., None, :]
    return Factors(a, b), _wide(s[..., rank:]).square().sum()


def squared_norm(factors: Factors) -> Tensor:
    """[] fp64: ‖B·A‖² in the Frobenius norm, summed over experts: tr(BᵀB · AAᵀ), of [r, r] matrices."""
    a, b = _wide(factors.a), _wide(factors.b)
    return ((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0.0)


def squared_average(own: Factors, theirs: Factors, alpha: float) -> Tensor:
    """[] fp64: ‖(1-w) B0·A0 + w B1·A1‖²."""
    return squared_norm(_both(Factors(*map(_wide, own)), Factors(*map(_wide, theirs)), alpha))


def squared_difference(own: Factors, theirs: Factors, alpha: float) -> Tensor:
    """[] fp64: ‖average of the factors, multiplied - average of the products‖², of the same rank."""
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
    """fp64; by way of the host where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()

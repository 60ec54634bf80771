"""Slow, plain implementations by definition, differentiable in fp64: what the fast ones are held against.

Nothing here is careful with digits or memory. The reference is detached, as it is everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """[N, V] in fp64."""
    z = logit_scale * (hidden.double() @ weight.double().t())
    if bias is not None:
        z = z + bias.double()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def logp(z: Tensor, targets: Tensor) -> Tensor:
    """[N]."""
    return z.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def entropy(z: Tensor) -> Tensor:
    """[N]."""
    log_p = z.log_softmax(-1)
    return -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)


def divergence(
    z: Tensor,
    ref_z: Tensor,
    kind: str,
    *,
    weight: float = 0.5,
    order: float | None = None,
    top_k: int | None = None,
) -> Tensor:
    """[..., V] -> [...]."""
    p, q = z.softmax(-1), ref_z.detach().softmax(-1)
    if top_k is not None and top_k < z.shape[-1]:
        p, q = coarse(p, q, top_k)
    if kind == "reverse_kl":
        return (p * (p / q).log()).sum(-1)
    if kind == "forward_kl":
        return (q * (q / p).log()).sum(-1)
    if kind == "jsd":
        m = weight * p + (1 - weight) * q
        return weight * (p * (p / m).log()).sum(-1) + (1 - weight) * (q * (q / m).log()).sum(-1)
    if kind == "chi2":
        return ((p - q).square() / q).sum(-1)
    if kind == "hellinger":
        return 1 - (p * q).sqrt().sum(-1)
    if kind == "tv":
        return 0.5 * (p - q).abs().sum(-1)
    assert order is not None
    total = (p**order * q ** (1 - order)).sum(-1)
    return total.log() / (order - 1) if kind == "renyi" else (total - 1) / (order * (order - 1))


def coarse(p: Tensor, q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both with all but p's k largest categories in one."""
    order = p.argsort(dim=-1, descending=True)
    p, q = p.gather(-1, order), q.gather(-1, order)
    return tuple(torch.cat([x[..., :k], x[..., k:].sum(-1, keepdim=True)], -1) for x in (p, q))  # type: ignore[return-value]

"""Log-probabilities of given tokens from logits, without a second [N, V] tensor in fp32.

`log_softmax` of bf16 logits in bf16 sums to 1.011, and in fp32 it doubles or triples the memory of the logits; here
rows are taken a few at a time in fp32, and the backward pass makes the gradient from the logits again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from refkl.types import require_shape

_CHUNK_ELEMENTS = 1 << 24
"""A chunk of rows holds about this many numbers: 64 MiB in fp32."""


class LogpEntropy(NamedTuple):
    """Per row, in nats."""

    logp: Tensor
    entropy: Tensor | None


def token_logp(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False, mask: Tensor | None = None
) -> LogpEntropy:
    """Log-probability of `targets` under softmax(logits / temperature).

    Args:
        logits: [N, V], any float dtype; computed in fp32, or in fp64 if they are fp64.
        targets: [N] integers in [0, V).
        temperature: positive; divides the logits.
        entropy: also give the entropy of each row.
        mask: [N], True = wanted. Other rows are not read: they get 0.0 and no gradient, whatever they hold.

    Returns:
        logp [N] and entropy [N] or None, in nats, with grad to `logits`.

    Raises:
        ValueError: wrong shapes, a temperature that is not positive.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits must be [N, V], got shape {list(logits.shape)}.")
    require_shape("targets", targets, logits.shape[:1], "the rows of logits")
    check_temperature(temperature)
    if mask is None:
        rows = torch.arange(logits.shape[0], device=logits.device)
    else:
        require_shape("mask", mask, logits.shape[:1], "the rows of logits")
        rows = mask.nonzero()[:, 0]
    logp, row_entropy = _TokenLogp.apply(logits, targets, rows, temperature, entropy)
    return LogpEntropy(logp, row_entropy)


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless `temperature` is positive and finite."""
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}.")


class _TokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, rows: Tensor, temperature: float, entropy: bool) -> Any:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logp = torch.zeros(logits.shape[0], dtype=dtype, device=logits.device)
        log_z = torch.zeros_like(logp)
        row_entropy = torch.zeros_like(logp) if entropy else None
        for chunk in _chunks(rows, logits.shape[1]):
            scaled = logits[chunk].to(dtype) / temperature
            log_z[chunk] = torch.logsumexp(scaled, dim=-1)
            logp[chunk] = scaled.gather(-1, targets[chunk, None])[:, 0] - log_z[chunk]
            if row_entropy is not None:
                log_p = scaled - log_z[chunk, None]
                p = log_p.exp()
                row_entropy[chunk] = -torch.where(p > 0, p * log_p, p).sum(-1)
        ctx.save_for_backward(logits, targets, rows, log_z, row_entropy)
        ctx.temperature = temperature
        return logp, row_entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        logits, targets, rows, log_z, row_entropy = ctx.saved_tensors
        grad_logp, grad_entropy = grads
        grad_logits = torch.zeros_like(logits)
        for chunk in _chunks(rows, logits.shape[1]):
            log_p = logits[chunk].to(log_z.dtype) / ctx.temperature - log_z[chunk, None]
            p = log_p.exp()
            grad = torch.zeros_like(p)
            if grad_logp is not None:
                grad = p * -grad_logp[chunk, None]
                grad.scatter_add_(-1, targets[chunk, None], grad_logp[chunk, None])
            if row_entropy is not None and grad_entropy is not None:
                # dH/dz = -p (log p + H); where p is 0, log p may be -inf.
                grad -= grad_entropy[chunk, None] * p * torch.where(p > 0, log_p + row_entropy[chunk, None], 0.0)
            grad_logits[chunk] = (grad / ctx.temperature).to(logits.dtype)
        return grad_logits, None, None, None, None


def _chunks(rows: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    return rows.split(max(1, _CHUNK_ELEMENTS // max(1, vocabulary)))

"""Log-probabilities of given tokens from logits, without a second [N, V] tensor in fp32.

`log_softmax` of bf16 logits in bf16 sums to 1.011, and in fp32 it doubles or triples the memory of the logits. Here a
few rows at a time are computed in fp32, and the backward pass recomputes the gradient from the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refkl.kl.divergence_rows import blocks, first_order
from refkl.kl.token_rows import entropy as row_entropies
from refkl.kl.token_rows import entropy_slope, logp_in_place, logp_slope, token_rows
from refkl.types import require_shape


class LogpEntropy(NamedTuple):
    """Scores per row, in nats."""

    logp: Tensor
    entropy: Tensor | None


def token_logp(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False, mask: Tensor | None = None
) -> LogpEntropy:
    """Compute the log-probability of `targets` under softmax(logits / temperature).

    Args:
        logits: [N, V], any float dtype; computed in fp32, or in fp64 if they are fp64.
        targets: [N] integers in [0, V).
        temperature: positive; divides the logits.
        entropy: also compute the entropy of each row.
        mask: [N], True = scored. Other rows are not read: they get 0.0 and no gradient, whatever they hold.

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
    def forward(ctx: Any, logits: Tensor, targets: Tensor, rows: Tensor, temperature: float, with_entropy: bool) -> Any:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logp = torch.zeros(logits.shape[0], dtype=dtype, device=logits.device)
        row_entropy = torch.zeros_like(logp) if with_entropy else None
        for chunk in _chunks(rows, logits):
            scaled = logits[chunk].to(dtype) / temperature
            if row_entropy is None:
                logp[chunk], _ = logp_in_place(scaled, targets[chunk, None])
            else:
                parts = token_rows(scaled, targets[chunk, None])
                assert parts.logp is not None
                logp[chunk] = parts.logp[:, 0]
                row_entropy[chunk] = row_entropies(parts, finite=False)[:, 0]
        ctx.save_for_backward(logits, targets, rows)
        ctx.dtype, ctx.temperature = dtype, temperature
        ctx.set_materialize_grads(False)
        return logp, row_entropy

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Any:
        logits, targets, rows = ctx.saved_tensors
        if grad_logp is None and grad_entropy is None:
            return None, None, None, None, None
        grad_logits = torch.zeros_like(logits)
        for chunk in _chunks(rows, logits):
            scaled, target = logits[chunk].to(ctx.dtype) / ctx.temperature, targets[chunk, None]
            if grad_entropy is None:
                assert grad_logp is not None
                _, factor = logp_in_place(scaled, target)
                slope = scaled.mul_(factor * grad_logp[chunk, None])
            else:
                parts = token_rows(scaled, target)
                slope = entropy_slope(parts, row_entropies(parts, finite=False), finite=False).mul_(
                    grad_entropy[chunk, None]
                )
                if grad_logp is not None:
                    slope += logp_slope(parts, target).mul_(grad_logp[chunk, None])
            grad_logits[chunk] = (slope / ctx.temperature).to(logits.dtype)
        return grad_logits, None, None, None, None


def _chunks(rows: Tensor, logits: Tensor) -> Iterator[Tensor]:
    return (rows[block] for block in blocks(rows.numel(), logits.shape[1], logits.device))

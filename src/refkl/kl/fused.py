"""The autograd functions of the fused heads: when they form a tile's gradient, and what they keep for the backward
pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from refkl.kl.divergence_rows import first_order
from refkl.kl.job import Inputs, Job, Values
from refkl.kl.walk import Walk, outputs


def score(inputs: Inputs, job: Job) -> Values:
    """Compute each of `job.names` as [N], 0.0 in rows left out; with a `token_loss`, only "loss"."""
    trained = inputs.hidden, inputs.weight, inputs.bias
    if inputs.hidden.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        job = replace(job, autocast=torch.get_autocast_dtype("cuda"))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained):
        return dict(zip(outputs(job), _Fused.apply(*trained, inputs, job), strict=True))
    with full_precision(inputs):
        walk = Walk(inputs, job)
        return walk.spread(walk.values())


class _Fused(torch.autograd.Function):
    """A head's autograd function.

    A frozen head keeps ∂value/∂h. A trained head projects again, or with a `token_loss` keeps the finished gradients.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, inputs: Inputs, job: Job) -> Any:
        ctx.set_materialize_grads(False)
        ctx.job, ctx.shape, ctx.dtype = job, hidden.shape, hidden.dtype
        ctx.spent = False
        ctx.trained = any(ctx.needs_input_grad[1:3])
        kept: list[Tensor | None] = []
        with full_precision(inputs):
            walk = Walk(inputs, job)
            if job.token_loss is not None:
                values, grads, coefs = walk.gradients(ctx.needs_input_grad[:3], None)
                kept = [*grads, *(coefs[name] for name in job.graded)]
            elif not ctx.trained:
                values, directions = walk.directions()
                kept = [directions[name] for name in job.graded]
            else:
                values = walk.values()
        ctx.save_for_backward(*kept, *(inputs.tensors() if ctx.trained else ()))
        ctx.kept = len(kept)
        spread = walk.spread(values)
        ctx.mark_non_differentiable(*(spread[name] for name in job.names if name in spread and name not in job.graded))
        return tuple(spread[name] for name in outputs(job))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        job: Job = ctx.job
        if ctx.spent:
            raise RuntimeError(
                "This is a second backward pass through a trained head with a `token_loss`, but the gradient that it "
                "keeps was modified by an inplace operation in the first pass, since a copy of it would take the "
                "memory of the head's weight again. Compute the loss anew for each backward pass, or pass no "
                "token_loss and take the loss from the scores."
            )
        saved = ctx.saved_tensors
        kept, inputs = saved[: ctx.kept], Inputs(*saved[ctx.kept :]) if ctx.trained else None
        upstream = {
            name: g if job.rows is None else g[job.rows]
            for name, g in zip(outputs(job), grads, strict=True)
            if g is not None
        }
        if not upstream:
            return (None,) * 5
        results: tuple[Tensor | None, ...]
        if job.token_loss is not None:
            loss = upstream["loss"]
            if inputs is None:
                results = kept[0] * loss[:, None], None, None
            elif bool((loss == loss[:1]).all()):
                ctx.spent = bool((loss[:1] != 1.0).any())
                results = tuple(_scaled(g, loss) for g in kept[:3])
            else:  # the kept gradient is a sum over tokens, but the factors differ between tokens
                coefs = {name: c * loss for name, c in zip(job.graded, kept[3:], strict=True)}
                results = _again(inputs, job, coefs, ctx.needs_input_grad[:3])
        elif inputs is None:
            named = dict(zip(job.graded, kept, strict=True))
            d_hidden = sum(named[name] * g[:, None] for name, g in upstream.items())
            assert isinstance(d_hidden, Tensor)
            results = d_hidden, None, None
        else:
            results = _again(inputs, job, upstream, ctx.needs_input_grad[:3])
        return _whole(results[0], job, ctx.shape, ctx.dtype), *results[1:], None, None


def _again(inputs: Inputs, job: Job, coefs: Values, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Compute the gradients by projecting once more; a reference that has no part in them is skipped."""
    if "divergence" not in coefs:
        inputs = replace(inputs, ref_hidden=None, ref_weight=None, ref_bias=None)
    job = replace(job, names=tuple(coefs), graded=tuple(coefs), token_loss=None, observe=None)
    with torch.no_grad(), full_precision(inputs):
        return Walk(inputs, job).gradients(needs, coefs)[1]


def _scaled(grad: Tensor | None, factors: Tensor) -> Tensor | None:
    """Multiply grad by the one factor that all tokens have. In place, since a weight's gradient is large."""
    if grad is None or not factors.numel() or bool(factors[0] == 1.0):
        return grad
    return grad.mul_(float(factors[0]))  # a Python float: a factor rounded to bf16 would bias all gradients


def _whole(d_hidden: Tensor | None, job: Job, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """Scatter [R, H] to [N, H], 0.0 in rows left out."""
    if d_hidden is None:
        return None
    d_hidden = d_hidden.to(dtype)
    if job.rows is None:
        return d_hidden
    return d_hidden.new_zeros(shape).index_copy_(0, job.rows, d_hidden)


def full_precision(inputs: Inputs) -> torch.autocast:
    """Switch autocast off: it would round every product to 16 bits."""
    return torch.autocast(inputs.hidden.device.type, enabled=False)

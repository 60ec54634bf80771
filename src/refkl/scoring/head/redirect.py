"""Redirection of the output head: it computes a fused op instead of the logits, inside the model's forward.

The head's forward returns six known numbers, which the model takes for its logits, and stores the result of the fused
op. Wrappers act on the model's *output*, not on the tensor that left the head: DeepSpeed begins its backward there, and
divides by the accumulation steps; DDP starts there to find unused parameters. So the result is tied to the output:
backward sends a gradient of 1 into one element of the output. A wrapper may scale that gradient on its way to the head.
Whatever arrives there multiplies the result's own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from refkl.kl.divergence_rows import first_order
from refkl.scoring.head.linear_head import FOUND, Head, HeadError, at_least_fp32, close, mapped, not_called

_CHECK = (0.0, 1.0, -0.25, 5.0, -40.0, 2.0**15)
"""Logits given to the model in each redirected forward, to check that it still maps them in the same way."""
_GAUGE = 0
"""Column of _CHECK whose gradient shows the factor by which wrappers scale gradients. Its value is 0, where the map's
slope is s."""


class Redirect:
    """A forward in which the head computes a fused op. `stats` returns the result."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._stats: Tensor | None = None
        self._positions = torch.Size()

    def stats(self, outputs: Any) -> Tensor:
        """Return the result of the function given to `redirected`, with grad, after the wrapper's hooks.

        Args:
            outputs: the outermost wrapper's output. The gradient passes through it, for wrappers that act on the
                gradient of their outputs: DeepSpeed begins its backward there, and divides by the number of
                accumulation steps in a plain loss.backward(); DDP starts there to find unused parameters.

        Raises:
            HeadError: the head was not called; the model maps its logits in another way than when the head was found;
                the outputs are detached from the graph.
        """
        if self._stats is None:
            raise HeadError(not_called("this forward"))
        logits = outputs.logits
        expected = mapped(torch.tensor(_CHECK, dtype=torch.float64), self._head.logit_scale, self._head.softcap)
        found = logits.detach().reshape(-1, logits.shape[-1])[0].double().cpu()
        if logits.shape != (*self._positions, len(_CHECK)) or not close(found, expected, logits.dtype):
            FOUND.pop(self._head.module, None)
            raise HeadError(
                f"The model returned {found.tolist()} {list(logits.shape)} for {list(_CHECK)} given as logits at "
                f"{list(self._positions)} positions; when its head was found it returned {expected.tolist()}: its "
                "configuration has changed since, a hook changes its logits, or it maps them differently in training."
            )
        if not self._stats.requires_grad:
            return self._stats
        if not logits.requires_grad:
            raise HeadError(
                f"The logits in {type(outputs).__name__} have no gradient, but the head's result has one: a wrapper or "
                "a patched forward detached them. Score through the logits instead."
            )
        stats: Tensor = _Tied.apply(self._stats, logits)
        return stats


@contextmanager
def redirected(head: Head, fused: Callable[[Tensor], Tensor]) -> Iterator[Redirect]:
    """Make the head's module compute `fused` instead of its logits while open. Call the outermost wrapper once inside.

        with redirected(head, fused) as redirect:
            outputs = model(**inputs)
        stats = redirect.stats(outputs)

    Args:
        head: from `find_head`.
        fused: takes hidden [B, K, H] and returns a tensor of any shape. It runs as the module's forward, so head.weight
            and head.bias are gathered then, and again in its backward. For the backward it must save the parameter
            itself (save_for_backward(weight)), not a view, cast or slice of it, which would hold the gathered copy.

    Raises:
        HeadError: the module's forward is already replaced; it is called twice; a hook on it changes its result.
    """
    redirect = Redirect(head)

    def forward(hidden: Tensor) -> Tensor:
        redirect._positions = hidden.shape[:-1]
        return fused(hidden)

    def give(stats: Tensor) -> Tensor:
        shape = (*redirect._positions, len(_CHECK))
        probe = torch.tensor(_CHECK, dtype=at_least_fp32(stats), device=stats.device).expand(shape).clone()
        if stats.requires_grad:
            stats, probe = _Leaving.apply(stats, probe, head.logit_scale)
        redirect._stats = stats
        return probe

    with replaced(head.module, forward, give):
        yield redirect


@contextmanager
def replaced(
    module: nn.Linear, forward: Callable[[Tensor], Tensor], give: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Replace the module's forward while open. Its caller gets `give(result)`, called after the module's other hooks.

    Under ZeRO-3, the gather before the module's backward depends on the tensor that DeepSpeed's own hook returns, so
    `give` must get that tensor.
    """
    check_forward(module)
    results: list[tuple[Tensor, int]] = []

    def version(tensor: Tensor) -> int:
        return 0 if tensor.is_inference() else tensor._version  # inference tensors have no version

    @torch.compiler.disable
    def once(input: Tensor) -> Tensor:
        if results:
            raise HeadError("The model calls its head more than once in a forward. Score through the logits instead.")
        result = forward(input)
        results.append((result, version(result)))
        return result

    @torch.compiler.disable
    def last(module: nn.Module, args: Any, result: Tensor) -> Tensor:
        before, counted = results[0]
        if result.data_ptr() != before.data_ptr() or result.shape != before.shape or version(result) != counted:
            raise HeadError(
                "A forward hook on the output head changes its result, and so the log-probabilities, in a way that "
                "refkl cannot see. Remove the hook, or score through the logits."
            )
        return give(result)

    hook = module.register_forward_hook(last)
    module.__dict__["forward"] = once
    try:
        yield
    finally:
        del module.__dict__["forward"]
        hook.remove()


def check_forward(module: nn.Linear) -> None:
    if "forward" in vars(module):
        raise HeadError(
            f"The output head's forward was replaced by {vars(module)['forward']!r}: by accelerate's device_map hooks, "
            "another library's fused head, or a scoring that is still open. Undo that, or score through the logits."
        )


class _Leaving(torch.autograd.Function):
    """The output of the head: (stats, probe) -> stats for refkl, and the probe that the model takes for its logits.

    The backward gets the gradients of both. The probe's gradient came through the model and its wrappers: it is 1·s,
    unless a wrapper scaled it. The gradient of stats bypassed them, so it is scaled by the same factor.
    """

    @staticmethod
    def forward(ctx: Any, stats: Tensor, probe: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        ctx.scale = scale
        return stats.clone(), probe.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_stats: Tensor, grad_probe: Tensor) -> tuple[Tensor, None, None]:
        factor = grad_probe.reshape(-1, len(_CHECK))[0, _GAUGE] / ctx.scale
        return grad_stats * factor.to(grad_stats.dtype), None, None


class _Tied(torch.autograd.Function):
    """The identity on stats. Its backward also sends a gradient of 1 into one element of the model's output, so that
    backward enters the model there."""

    @staticmethod
    def forward(ctx: Any, stats: Tensor, logits: Tensor) -> Tensor:
        ctx.like = logits.shape, logits.dtype, logits.device
        return stats.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        gauge = torch.zeros(shape, dtype=dtype, device=device)
        gauge.view(-1, len(_CHECK))[0, _GAUGE] = 1.0
        return grad, gauge

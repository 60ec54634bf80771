"""Something else computed in place of the logits, inside the forward of whatever wraps the model.

What a fused op gives leaves the head's forward beside six known numbers, which the model takes for its logits. Two
things hang on the model's *output*, and not on the tensor that left the head: DeepSpeed begins its backward there, and
divides by the accumulation steps; DDP looks from there for parameters that are not used. So the result is tied to the
output: backward sends the number 1 into one place of it, and what arrives at the head (1, or what a wrapper made of it)
multiplies the own gradient of the result.
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
"""Logits given to the model in each redirected forward, to check that it still treats them the same."""
_GAUGE = 0
"""The column of _CHECK, at 0 where the slope is s, whose gradient shows by what wrappers scale gradients."""


class Redirect:
    """One forward in which the head computes something else. `stats` takes the result out of it."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._stats: Tensor | None = None
        self._positions = torch.Size()

    def stats(self, outputs: Any) -> Tensor:
        """Return the result of the function given to `redirected`, with grad, after the wrapper's hooks.

        Args:
            outputs: what the outermost wrapper returned. The gradient passes through it, so that wrappers which act on
                the gradient of their outputs do so: DeepSpeed begins its backward there, and divides by the number of
                accumulation steps in a plain loss.backward(); DDP finds unused parameters from there.

        Raises:
            HeadError: the head was not called; the model no longer treats its logits as it did when the head was found;
                the outputs are cut off from the graph.
        """
        if self._stats is None:
            raise HeadError(not_called("this forward"))
        logits = outputs.logits
        expected = mapped(torch.tensor(_CHECK, dtype=torch.float64), self._head.logit_scale, self._head.softcap)
        found = logits.detach().reshape(-1, logits.shape[-1])[0].double().cpu()
        if logits.shape != (*self._positions, len(_CHECK)) or not close(found, expected, logits.dtype):
            FOUND.pop(self._head.module, None)
            raise HeadError(
                f"The model made {found.tolist()} {list(logits.shape)} of {list(_CHECK)} given as logits at "
                f"{list(self._positions)} positions; when its head was found it made {expected.tolist()} of them: its "
                "configuration was changed since, a hook changes its logits, or it treats them otherwise in training."
            )
        if not self._stats.requires_grad:
            return self._stats
        if not logits.requires_grad:
            raise HeadError(
                f"What {type(outputs).__name__} holds as logits has no gradient, though the head's result has one: a "
                "wrapper or a patched forward cut it off. Score through the logits instead."
            )
        stats: Tensor = _Tied.apply(self._stats, logits)
        return stats


@contextmanager
def redirected(head: Head, fused: Callable[[Tensor], Tensor]) -> Iterator[Redirect]:
    """While open, the head's module computes `fused` in place of its logits. Call the outermost wrapper once inside.

        with redirected(head, fused) as redirect:
            outputs = model(**inputs)
        stats = redirect.stats(outputs)

    Args:
        head: from `find_head`.
        fused: hidden [B, K, H] -> a tensor of any shape. It runs as the module's forward, so that head.weight and
            head.bias are gathered, and again in its backward. For the latter it must keep the parameter itself
            (save_for_backward(weight)) and no view, cast or slice of it, which would hold the gathered copy.

    Raises:
        HeadError: the module's forward is replaced already; it is called twice; a hook on it changes its result.
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
    """The module computes `forward`, and its caller gets `give` of the result, after all other hooks of the module.

    Under ZeRO-3 the gather before the module's backward hangs on the tensor that DeepSpeed's own hook returns: `give`
    must see that one.
    """
    check_forward(module)
    results: list[tuple[Tensor, int]] = []

    def version(tensor: Tensor) -> int:
        return 0 if tensor.is_inference() else tensor._version  # inference tensors count none

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
                "A forward hook on the output head changes what it gives, and so log-probabilities, in a way that "
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
    """The head's end: (stats, probe) -> stats for us, and the probe for the model to take for its logits.

    Gradients of both meet here again. What came through the model and its wrappers is 1·s, unless a wrapper scaled it:
    the gradient of stats, which did not take that way, is scaled alike.
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
    """stats, with a gradient of 1 in one place of the model's output, so that backward enters the model through it."""

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

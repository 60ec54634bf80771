"""The output head of a causal language model: where it is, what the model makes of its logits, and how to have
something else computed in its place, inside the forward of whatever wraps the model.

A fused op takes the states that enter the head and gives a few numbers per token, so that the logits [B, K, V] are
never made. For this it must know what a model does to them after the head: Cohere and Granite scale, Gemma-2 caps,
Falcon-H1 has a multiplier. There is no table of families here: the head is replaced for one forward by a stub that
gives known numbers, and what the model makes of them shows the map. Two forms are known, and all causal language
models of transformers 5.23 that have one linear head have one of them:

    logits = s·z   or   logits = c·tanh(s·z / c),   z = hidden·weightᵀ + the module's bias

What the fused op gives leaves the head's forward beside six known numbers, which the model takes for its logits. Two
things hang on the model's *output*, and not on the tensor that left the head: DeepSpeed begins its backward there, and
divides by the accumulation steps; DDP looks from there for parameters that are not used. So the result is tied to the
output: backward sends the number 1 into one place of it, and what arrives at the head (1, or what a wrapper made of it)
multiplies the own gradient of the result.

Notation: B sequences, K positions that reach the head, V vocabulary, H what the head takes, P probe values.
"""

from __future__ import annotations

import inspect
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from refkl.backend import evaluating, full_shape, is_partitioned, unwrap
from refkl.kl.rows import first_order

_POWERS = (-20, 15, 5, -3, 10, 0, 3, 7, 13, -10)
_PROBE = (0.0, *(sign * m * 2.0**k for k in _POWERS for sign in (1, -1) for m in (1.0, 1.25)))
"""What the stub gives for logits, over and over along the vocabulary: from 1e-6, where a cap does nothing, to 4e4,
further than logits go. Few bits each, so that a cast to bf16 and back leaves them alone. 0 shows an offset."""
_CHECK = (0.0, 1.0, -0.25, 5.0, -40.0, 2.0**15)
"""What the model is given for logits in each redirected forward: does it still do the same?"""
_GAUGE = 0
"""The column of _CHECK, at 0 where the slope is s, whose gradient shows by what wrappers scale gradients."""
_TOLERANCE = 2e-6
"""Relative, in fp32: a cap takes three roundings and a tanh."""


class HeadError(ValueError):
    """The head is not one that a fused op can stand in for; the model can still be scored through its logits."""


@dataclass(frozen=True, eq=False)
class Head:
    """A linear output head and what the model makes of its result: logits = softcap(logit_scale·hidden·weightᵀ + bias).

    softcap(x) = c·tanh(x / c), or x where there is none.
    """

    module: nn.Linear
    logit_scale: float
    softcap: float | None
    vocabulary: int
    """V: the logits that the model gives. Some cut the rows off that pad the head's weight."""

    @property
    def weight(self) -> Tensor:
        """[V, H] the module's own parameter (a view of it where the model cuts rows off).

        Raises:
            HeadError: the weight is partitioned (ZeRO-3) and not gathered: read it inside a redirected forward.
        """
        weight: Tensor = self.module.weight
        if weight.shape != full_shape(weight):
            raise HeadError(
                f"The head's weight {list(full_shape(weight))} is partitioned under ZeRO-3 and not gathered here. Read "
                "it in the function given to `redirected`, which runs where DeepSpeed has gathered it."
            )
        return weight if weight.shape[0] == self.vocabulary else weight[: self.vocabulary]

    @property
    def bias(self) -> Tensor | None:
        """[V] what is added after the scale: logit_scale · the module's bias. None if it has none.

        Raises:
            HeadError: as `weight`.
        """
        bias: Tensor | None = self.module.bias
        if bias is None:
            return None
        if bias.shape != full_shape(bias):
            raise HeadError(
                "The head's bias is partitioned under ZeRO-3: read it in the function given to `redirected`."
            )
        bias = bias if bias.shape[0] == self.vocabulary else bias[: self.vocabulary]
        return bias if self.logit_scale == 1.0 else self.logit_scale * bias

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V] in full: what the model gives, and what a fused op must agree with."""
        linear = nn.functional.linear(hidden, self.weight)
        scaled = linear * self.logit_scale + (0.0 if self.bias is None else self.bias)
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


class Redirect:
    """One forward in which the head computes something else. `stats` takes the result out of it."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._stats: Tensor | None = None
        self._positions = torch.Size()

    def stats(self, outputs: Any) -> Tensor:
        """What the function given to `redirected` returned, with grad, after the wrapper's hooks.

        Args:
            outputs: what the outermost wrapper returned. The gradient passes through it, so that wrappers which act on
                the gradient of their outputs do so: DeepSpeed begins its backward there, and divides by the number of
                accumulation steps in a plain loss.backward(); DDP finds unused parameters from there.

        Raises:
            HeadError: the head was not called; the model no longer treats its logits as it did when the head was found;
                the outputs are cut off from the graph.
        """
        if self._stats is None:
            raise HeadError(_not_called("this forward"))
        logits = outputs.logits
        expected = _mapped(torch.tensor(_CHECK, dtype=torch.float64), self._head.logit_scale, self._head.softcap)
        found = logits.detach().reshape(-1, logits.shape[-1])[0].double().cpu()
        if logits.shape != (*self._positions, len(_CHECK)) or not _close(found, expected, logits.dtype):
            _FOUND.pop(self._head.module, None)
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


def find_head(model: nn.Module) -> Head:
    """The output head of a causal language model, wrapped or not.

    The first time for a head, the model is run on two tokens (no grad, eval mode, RNG state restored), as it is wrapped
    under ZeRO-3, where every rank must call. What was found is kept for as long as the head lives. Each redirected
    forward checks, on six numbers, that scale and cap still hold; a treatment of single vocabulary entries that begins
    only after the head was found is not seen. A refusal is kept until the model's forward or its hooks are others.

    Raises:
        HeadError: there is no linear head, or it is not nn.Linear alone with a plain weight (PEFT, quantised, FSDP, on
            the meta device), or the model does not call it once, or makes something else of its logits.
    """
    module = _linear_head(model)
    rows = full_shape(module.weight)[0]
    if (known := _FOUND.get(module)) is None or known[0] != rows:
        if (refused := _REFUSED.get(module)) is not None and refused[0] == _circumstances(model, module):
            raise HeadError(refused[1])
        try:
            known = _FOUND[module] = (rows, *_probe(model, module))
        except HeadError as error:
            refuse(model, module, error)
            raise
        _REFUSED.pop(module, None)
    return Head(module, *known[1:])


def distrust(model: nn.Module, module: nn.Linear, error: HeadError) -> None:
    """After a redirected forward has failed: find the head anew the next time, and if that fails too, refuse it."""
    if module in _DOUBTED:
        refuse(model, module, error)
    _DOUBTED.add(module)
    _FOUND.pop(module, None)


def refuse(model: nn.Module, module: nn.Linear, error: HeadError) -> None:
    """Have `find_head` raise this error for the head from now on, and say so once: it is scored through its logits."""
    _REFUSED[module] = _circumstances(model, module), str(error)
    logger.warning("Scoring through the logits in full, which takes more memory and the model's rounding. %s", error)


def _circumstances(model: nn.Module, module: nn.Linear) -> tuple[Any, ...]:
    base = base_model(model)
    return vars(base).get("forward"), tuple(base._forward_hooks), tuple(module._forward_hooks)


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
        probe = torch.tensor(_CHECK, dtype=_at_least_fp32(stats), device=stats.device).expand(shape).clone()
        if stats.requires_grad:
            stats, probe = _Leaving.apply(stats, probe, head.logit_scale)
        redirect._stats = stats
        return probe

    with _replaced(head.module, forward, give):
        yield redirect


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside wrappers and PEFT."""
    inner = unwrap(model)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner


logger = logging.getLogger(__name__)
_DOUBTED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Heads of which a redirected forward has failed once."""
_FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[int, float, float | None, int]] = weakref.WeakKeyDictionary()
"""For each head: rows of its weight, logit_scale, softcap, vocabulary."""
_REFUSED: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()
"""For each head that a probe refused: under which circumstances (replaced forward, hooks), and why."""


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


@contextmanager
def _replaced(
    module: nn.Linear, forward: Callable[[Tensor], Tensor], give: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """The module computes `forward`, and its caller gets `give` of the result, after all other hooks of the module.

    Under ZeRO-3 the gather before the module's backward hangs on the tensor that DeepSpeed's own hook returns: `give`
    must see that one.
    """
    _check_forward(module)
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


def _linear_head(model: nn.Module) -> nn.Linear:
    """The head's module, if nn.Linear's forward and a plain weight are all there is to it."""
    base = base_model(model)
    if not isinstance(base, PreTrainedModel):
        raise HeadError(f"{type(base).__name__} is not a transformers model: its output head cannot be found.")
    module = base.get_output_embeddings()
    kind = f"{type(base).__name__}'s output head is {_article(module)}"
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        raise HeadError(
            f"{kind}: PEFT adapts it, so its logits are not one product with one weight. Leave the head out of the "
            "adapter's target_modules, modules_to_save and trainable_token_indices, merge the adapter, or score "
            "through the logits."
        )
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise HeadError(
            f"{kind}, and not a torch.nn.Linear with its own forward: there is none, or it is quantised or computes "
            "something else. Leave the head out of quantisation (llm_int8_skip_modules, modules_to_not_convert), or "
            "score through the logits."
        )
    _check_forward(module)
    weight = module.weight
    if isinstance(weight, DTensor):
        raise HeadError(
            f"{kind} whose weight is sharded (DTensor: FSDP2 or tensor parallel). Score through the logits."
        )
    if weight.is_meta:
        raise HeadError(f"{kind} whose weight is on the meta device: it is offloaded, or was never loaded.")
    if type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in _DTYPES or len(full_shape(weight)) != 2:
        raise HeadError(
            f"{kind} whose weight is a {type(weight).__name__} of {weight.dtype} and shape {list(full_shape(weight))}, "
            "not a plain floating-point matrix: it is quantised or packed. Leave the head out of quantisation, or "
            "score through the logits."
        )
    return module


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check_forward(module: nn.Linear) -> None:
    if "forward" in vars(module):
        raise HeadError(
            f"The output head's forward was replaced by {vars(module)['forward']!r}: by accelerate's device_map hooks, "
            "another library's fused head, or a scoring that is still open. Undo that, or score through the logits."
        )


_UNABLE = (TypeError, ValueError, KeyError, AttributeError, IndexError)
"""What a forward raises that wants more than tokens (images, an embedding of the task, …). No RuntimeError: memory that
ran out once must not count against the head for good."""


def _probe(model: nn.Module, module: nn.Linear) -> tuple[float, float | None, int]:
    """logit_scale, softcap and vocabulary, from what the model makes of known numbers."""
    if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        raise HeadError("The model is sharded by FSDP1, which flattens the head's weight. Score through the logits.")
    base = base_model(model)
    rows, width = full_shape(module.weight)
    device = next(base.parameters()).device
    # Position 0 shows the map; position 1, all ones, whether it is the same for the whole vocabulary.
    given = torch.ones(1, 2, rows, dtype=torch.float64)
    given[0, 0] = torch.tensor(_PROBE, dtype=torch.float64).repeat(-(-rows // len(_PROBE)))[:rows]
    called: list[torch.Size] = []

    def forward(hidden: Tensor) -> Tensor:
        called.append(hidden.shape)
        return given.to(device=hidden.device, dtype=_at_least_fp32(hidden), copy=True)

    tokens = torch.tensor([[0, min(1, rows - 1)]], device=device)
    options = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
    devices = [] if device.type == "cpu" else [device]
    # Partitioned weights are gathered by hooks that begin at the engine. Elsewhere the hooks of the model and its
    # wrappers are spared a call that the user did not make.
    run = model if is_partitioned(module.weight) else base.forward
    with (
        torch.random.fork_rng(devices=devices, device_type=devices[0].type if devices else "cuda"),
        torch.no_grad(),
        evaluating(model),
        _replaced(module, forward, lambda result: result),
    ):
        try:
            logits = run(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options).logits
        except HeadError:
            raise
        except _UNABLE as error:
            raise HeadError(
                f"{type(base).__name__} cannot be run on two tokens alone to see what it makes of its logits: "
                f"{type(error).__name__}: {error}"
            ) from error
    if not called:
        raise HeadError(_not_called(f"the forward of {type(base).__name__}"))
    if called[0] != (1, 2, width) or logits.shape[:2] != (1, 2) or logits.shape[2] > rows:
        raise HeadError(
            f"For two tokens {type(base).__name__} gave its head {list(called[0])} with a weight {[rows, width]}, and "
            f"made {list(logits.shape)} of {[1, 2, rows]}: not one row of logits per token. Score through the logits."
        )
    vocabulary = logits.shape[2]
    return *_fit(given[0, :, :vocabulary], logits[0].cpu(), type(base).__name__), vocabulary


def _fit(given: Tensor, found: Tensor, name: str) -> tuple[float, float | None]:
    """logit_scale and softcap of the map from `given` to `found`, [2, V] each; every one of the numbers must fit.

    The slope is read off at 1e-6, where no cap is felt, the cap at 3e4, where it is felt most.
    """
    small, large = _PROBE.index(2.0**-20), _PROBE.index(2.0**15)
    if given.shape[1] <= max(small, large):
        raise HeadError(f"{name} has a vocabulary of {given.shape[1]}: too small to show what it makes of its logits.")
    if found.dtype in (torch.bfloat16, torch.float16):  # a rounded slope would be off by 0.4 %: only 1 is exact
        fits: list[tuple[float, float | None]] = [(1.0, None)]
    else:
        slope = float(found[0, small]) / 2.0**-20
        slope = 1.0 if abs(slope - 1.0) < 1e-6 else slope
        fits = [
            (slope, cap) for cap in (None, _cap(slope, 2.0**15, float(found[0, large]))) if slope > 0.0 and cap != 0.0
        ]
    for scale, cap in fits:
        if _close(found.double(), _mapped(given, scale, cap), found.dtype):
            return scale, cap
    row, column = (
        (0, small)
        if not fits
        else divmod(
            int((found.double() - _mapped(given, *fits[0])).nan_to_num(math.inf).abs().argmax()), given.shape[1]
        )
    )
    raise HeadError(
        f"{name} post-processes its logits in a way that refkl does not know: of {found.shape[1]} numbers it made "
        f"{float(found[0, small]):.6g} of {2.0**-20:.6g}, {float(found[0, large]):.6g} of {2.0**15:.6g}, and at "
        f"vocabulary entry {column} {float(found[row, column]):.6g} of {float(given[row, column]):.6g}, in "
        f"{found.dtype}. Known are a factor and a tanh cap, one for all entries, in fp32. Score through the logits."
    )


def _cap(scale: float, value: float, found: float) -> float:
    """c with c·tanh(scale·value / c) = found, by bisection; 0.0 if there is none."""
    if scale <= 0.0 or not 0.0 < found < scale * value:
        return 0.0
    ratio = found / (scale * value)
    low, high = 0.0, 1.0 / ratio  # tanh(u) / u falls from 1 and is below 1 / u
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if math.tanh(middle) > ratio * middle else (low, middle)
    return scale * value / high


def _mapped(values: Tensor, scale: float, cap: float | None) -> Tensor:
    return values * scale if cap is None else cap * torch.tanh(values * scale / cap)


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether all numbers, in fp64, are those expected, as well as a model that computes in `dtype` can give them."""
    tolerance = _TOLERANCE if torch.finfo(dtype).bits >= 32 else 2 * torch.finfo(dtype).eps
    return bool(((found - expected).abs() <= tolerance * expected.abs()).all())


def _at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _not_called(what: str) -> str:
    return (
        f"{what[0].upper()}{what[1:]} never called the model's output head: it was patched to compute the head in "
        "another way (Liger, TRL's fused heads), or was compiled with the head inside. Undo that, or score through the "
        "logits."
    )


def _article(module: Any) -> str:
    kind = type(module).__name__
    return "missing (None)" if module is None else f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"

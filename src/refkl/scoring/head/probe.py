"""Find a model's output head, and the map that the model applies to its logits.

A fused op takes the states that enter the head and returns a few numbers per token, so the logits [B, K, V] are never
stored. For this it must know the map that the model applies after the head. There is no table of model families here:
for one forward, a stub replaces the head and returns known numbers, and the model's output for them shows the map. All
causal language models of transformers 5.23 with one linear head have one of the two forms in linear_head.py.
"""

from __future__ import annotations

import inspect
import logging
import math
import weakref
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from refkl.backend import base_model, evaluating, full_shape, is_partitioned, without_prompt
from refkl.scoring.head.linear_head import FOUND, Head, HeadError, at_least_fp32, close, mapped, not_called
from refkl.scoring.head.redirect import check_forward, replaced

logger = logging.getLogger(__name__)

_POWERS = (-20, 15, 5, -3, 10, 0, 3, 7, 13, -10)
_PROBE = (0.0, *(sign * m * 2.0**k for k in _POWERS for sign in (1, -1) for m in (1.0, 1.25)))
"""Logits that the stub returns, repeated along the vocabulary: from 1e-6, where a cap has no effect, to 4e4, beyond the
range of logits. Each has few bits, so that a cast to bf16 and back does not change it. 0 shows an offset."""
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_UNABLE = (TypeError, ValueError, KeyError, AttributeError, IndexError)
"""Errors of a forward that needs more than tokens (images, an embedding of the task, …). RuntimeError is not one of
them: a head must not be refused for good because memory ran out once."""
_UNFIT: dict[type[nn.Module], str] = {
    FullyShardedDataParallel: "which flattens the head's weight: shard with FSDP2",
    nn.DataParallel: "whose replicas each call a head of their own: use DistributedDataParallel (accelerate launch)",
}
"""Wrappers in which a head is not redirected, each with the reason."""
_DOUBTED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Heads for which a redirected forward has failed once."""
_REFUSED: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()
"""For each refused head, the circumstances (wrapper, replaced forward, hooks) and the reason."""


def find_head(model: nn.Module) -> Head:
    """Return the output head of a causal language model, wrapped or not.

    The first call for a head runs the model on two tokens (no grad, eval mode, RNG state restored). Under ZeRO-3, it
    runs the model through its wrappers, and every rank must call. The result is kept for as long as the head lives.
    Each redirected forward checks, on six numbers, that scale and cap still hold. It does not detect a map of single
    vocabulary entries that begins after the head was found. A refusal is kept until the model's forward or hooks
    change.

    Raises:
        HeadError: there is no linear head; it is not a plain nn.Linear with a plain weight (PEFT, quantised, FSDP, on
            the meta device); the model does not call it exactly once; the model applies another map to its logits.
    """
    module = _linear_head(model)
    rows = full_shape(module.weight)[0]
    known = None if isinstance(model, tuple(_UNFIT)) else FOUND.get(module)
    if known is None or known[0] != rows:
        if (refused := _REFUSED.get(module)) is not None and refused[0] == _circumstances(model, module):
            raise HeadError(refused[1])
        try:
            known = FOUND[module] = (rows, *_probe(model, module))
        except HeadError as error:
            refuse(model, module, error)
            raise
        _REFUSED.pop(module, None)
    return Head(module, *known[1:])


def distrust(model: nn.Module, module: nn.Linear, error: HeadError) -> None:
    """Forget a head after a redirected forward failed, so that it is probed again; refuse it at the second failure."""
    if module in _DOUBTED:
        refuse(model, module, error)
    _DOUBTED.add(module)
    FOUND.pop(module, None)


def refuse(model: nn.Module, module: nn.Linear, error: HeadError) -> None:
    """Make `find_head` raise this error for the head from now on, and warn that it is scored through its logits."""
    _REFUSED[module] = _circumstances(model, module), str(error)
    logger.warning("Scoring through the full logits, which takes more memory and rounds as the model does. %s", error)


def _circumstances(model: nn.Module, module: nn.Linear) -> tuple[Any, ...]:
    base = base_model(model)
    return type(model), vars(base).get("forward"), tuple(base._forward_hooks), tuple(module._forward_hooks)


def _linear_head(model: nn.Module) -> nn.Linear:
    """Return the head's module. Raise HeadError if it is not an nn.Linear with its own forward and a plain weight."""
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
    check_forward(module)
    weight = module.weight
    # FSDP2 leaves the root's own weights gathered after some forwards: they are plain then, and DTensors again later.
    managed = getattr(module, "_is_fsdp_managed_module", False) and not isinstance(model, FullyShardedDataParallel)
    if isinstance(weight, DTensor) or managed:
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


def _probe(model: nn.Module, module: nn.Linear) -> tuple[float, float | None, int]:
    """Return logit_scale, softcap and vocabulary, from the model's output for known numbers."""
    for kind, reason in _UNFIT.items():
        if any(isinstance(m, kind) for m in model.modules()):
            raise HeadError(f"The model is in {kind.__name__}, {reason}, or score through the logits.")
    base = base_model(model)
    rows, width = full_shape(module.weight)
    device = next(base.parameters()).device
    # Position 0 shows the map. Position 1, all ones, shows if it is the same for the whole vocabulary.
    given = torch.ones(1, 2, rows, dtype=torch.float64)
    given[0, 0] = torch.tensor(_PROBE, dtype=torch.float64).repeat(-(-rows // len(_PROBE)))[:rows]
    called: list[torch.Size] = []

    def forward(hidden: Tensor) -> Tensor:
        called.append(hidden.shape)
        return given.to(device=hidden.device, dtype=at_least_fp32(hidden), copy=True)

    tokens = torch.tensor([[0, min(1, rows - 1)]], device=device)
    options = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
    devices = [] if device.type == "cpu" else [device]
    # Partitioned weights are gathered by hooks that begin at the engine. Otherwise only the model's forward runs, so
    # that hooks of the model and its wrappers do not see a call that the user did not make.
    run = model if is_partitioned(module.weight) else base.forward
    with (
        torch.random.fork_rng(devices=devices, device_type=devices[0].type if devices else "cuda"),
        torch.no_grad(),
        evaluating(model),
        without_prompt(model),
        replaced(module, forward, lambda result: result),
    ):
        try:
            logits = run(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options).logits
        except HeadError:
            raise
        except _UNABLE as error:
            raise HeadError(
                f"{type(base).__name__} cannot run on only two tokens, which refkl does to see how it maps its logits: "
                f"{type(error).__name__}: {error}"
            ) from error
    if not called:
        raise HeadError(not_called(f"the forward of {type(base).__name__}"))
    if called[0] != (1, 2, width) or logits.shape[:2] != (1, 2) or logits.shape[2] > rows:
        raise HeadError(
            f"For two tokens, {type(base).__name__} passed {list(called[0])} to its head of weight {[rows, width]} and "
            f"returned {list(logits.shape)} for {[1, 2, rows]}: not one row of logits per token. Score through the "
            "logits."
        )
    vocabulary = logits.shape[2]
    return *_fit(given[0, :, :vocabulary], logits[0].cpu(), type(base).__name__), vocabulary


def _fit(given: Tensor, found: Tensor, name: str) -> tuple[float, float | None]:
    """Return logit_scale and softcap of the map from `given` to `found`, [2, V] each; all numbers must fit.

    The slope is read at 1e-6, where a cap has no effect; the cap is read at 3e4, where it has the largest effect.
    """
    small, large = _PROBE.index(2.0**-20), _PROBE.index(2.0**15)
    if given.shape[1] <= max(small, large):
        raise HeadError(f"{name} has a vocabulary of {given.shape[1]}: too small to show how it maps its logits.")
    if found.dtype in (torch.bfloat16, torch.float16):  # a rounded slope would be off by 0.4 %: only 1 is exact
        fits: list[tuple[float, float | None]] = [(1.0, None)]
    else:
        slope = float(found[0, small]) / 2.0**-20
        slope = 1.0 if abs(slope - 1.0) < 1e-6 else slope
        fits = [
            (slope, cap) for cap in (None, _cap(slope, 2.0**15, float(found[0, large]))) if slope > 0.0 and cap != 0.0
        ]
    for scale, cap in fits:
        if close(found.double(), mapped(given, scale, cap), found.dtype):
            return scale, cap
    row, column = (
        (0, small)
        if not fits
        else divmod(int((found.double() - mapped(given, *fits[0])).nan_to_num(math.inf).abs().argmax()), given.shape[1])
    )
    raise HeadError(
        f"{name} post-processes its logits in a way that refkl does not know. Given {found.shape[1]} numbers, it "
        f"returned {float(found[0, small]):.6g} for {2.0**-20:.6g}, {float(found[0, large]):.6g} for {2.0**15:.6g}, "
        f"and at vocabulary entry {column} {float(found[row, column]):.6g} for {float(given[row, column]):.6g}, in "
        f"{found.dtype}. refkl knows a factor and a tanh cap, the same for all entries, in fp32. Score through the "
        "logits."
    )


def _cap(scale: float, value: float, found: float) -> float:
    """Return c with c·tanh(scale·value / c) = found, by bisection; 0.0 if there is none."""
    if scale <= 0.0 or not 0.0 < found < scale * value:
        return 0.0
    ratio = found / (scale * value)
    low, high = 0.0, 1.0 / ratio  # tanh(u) / u falls from 1 and is below 1 / u
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if math.tanh(middle) > ratio * middle else (low, middle)
    return scale * value / high


def _article(module: Any) -> str:
    kind = type(module).__name__
    return "missing (None)" if module is None else f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"

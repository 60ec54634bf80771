"""Test of how a model treats the rows of a batch, by running it on three short rows.

Packing, padding, scoring in parts and caching need one property: the scores of a row depend only on its own tokens. A
class name does not guarantee it. An adapter may search each row for its tokens, noise may be scaled by the length of a
row, a hook may average over the batch. Therefore, before a batch is packed or split, the model scores three rows
together, one by one, and packed, with its present mode, hooks and adapters. The results are kept for as long as the
model stays in that state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from refkl.backend import base_model, submodules, unwrap
from refkl.backend.modules import dropout_rates, evaluates_as
from refkl.scoring.call import Call, packed_call, plain_call
from refkl.scoring.packing.exact_models import why_not
from refkl.scoring.packing.pack import pack_for_proof
from refkl.scoring.rope import scaled_from
from refkl.types import TokenBatch

_PROMPT, _ENDS = 4, (5, 2)
"""Number of tokens of the shared prompt, and of the completions in the first two rows."""
_OTHER = 5
"""Number of tokens of the third row."""
_ROUNDING, _ROUNDING_LOOK_AHEAD, _ROUNDING_16_BIT = 1e-3, 1e-4, 0.1
"""Largest mean difference of a row's log-probabilities that counts as rounding, as a share of the logits' spread over
the vocabulary. A causal model's scores do not change with a later token, except for the rounding of experts that other
tokens are sent to. In 16 bits, or with quantised weights, rounding differs between batches."""
_LEAST_SPREAD = 0.01
"""Least spread to compute the tolerance from, for a head that is zero."""
_STATES = 8
"""Number of states of a model for which results are kept, such as training, evaluation, and without its adapter."""


@dataclass(frozen=True)
class RowProof:
    """Reasons why a model's rows may not be treated in some way, each the end of a sentence; None if they may."""

    causal: str | None = None
    """Reason against scoring at all: a later token changes an earlier score."""
    apart: str | None = None
    """Reason against scoring rows in several batches."""
    left: str | None = None
    """Reason against padding before a row's tokens."""
    packed: str | None = None
    """Reason against a packed row."""


def row_proof(model: nn.Module, batch: TokenBatch) -> RowProof:
    """Test how the model treats rows in its present state. Runs it on three rows of 5 to 9 tokens, once per state.

    If weights are sharded, every rank must call. The model's mode and buffers and torch's random state do not change.

    Args:
        model: a causal language model, bare or wrapped.
        batch: a batch to be scored. Its device is used, and its tokens if the model has no configuration.
    """
    inner = model if isinstance(model, FullyShardedDataParallel) else unwrap(model)  # FSDP gathers its flat parameters
    if inner in _BY_CODE:
        return _judged(inner)
    known = _KNOWN.setdefault(inner, {})
    key = _state(inner, batch)
    if key not in known:
        while len(known) >= _STATES:
            del known[next(iter(known))]
        known[key] = RowProof()  # the runs below must not start another proof
        try:
            known[key] = _prove(inner, batch)
        except BaseException:
            del known[key]
            raise
    return known[key]


@dataclass(frozen=True)
class Apart:
    """The conditions under which a model's rows may be scored in several batches."""

    proof: RowProof
    scaled_from: int | None
    """Length from which on the model's RoPE depends on the longest row of a batch; None if it never does."""

    def why_not(self, batch: TokenBatch) -> str | None:
        """Return why the rows of this batch must be scored in one batch; None if they need not."""
        if self.proof.apart is not None or self.scaled_from is None:
            return self.proof.apart
        positions = batch.position_ids
        longest = batch.attention_mask.sum(1).max() if positions is None else positions.max() + 1
        if int(longest) < self.scaled_from:
            return None
        return f"its position encoding is scaled by the longest row of a batch from {self.scaled_from} tokens on"


def rows_apart(model: nn.Module, batch: TokenBatch) -> Apart:
    """Return the conditions for scoring rows in several batches. If weights are sharded, every rank must call."""
    config: Any = getattr(base_model(model), "config", None)
    return Apart(row_proof(model, batch), None if config is None else scaled_from(config))


_KNOWN: WeakKeyDictionary[nn.Module, dict[Any, RowProof]] = WeakKeyDictionary()
_BY_CODE: WeakSet[nn.Module] = WeakSet()
"""Models that are too costly to test on three rows."""
_LIBRARIES = {"torch", "transformers", "peft", "accelerate", "deepspeed", "refkl", "bitsandbytes", "torchao"}


def judge_by_code(model: nn.Module) -> None:
    """Judge from now on by a model's class and the libraries of its hooks if its rows may be packed and split.

    This is for a model whose weights move to the device in each forward pass, such as a reference in host memory. A
    test on three rows would move them several times.
    """
    _BY_CODE.add(unwrap(model))


def _judged(model: nn.Module) -> RowProof:
    for module in submodules(model):
        functions = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if "forward" in module.__dict__:
            functions.append(module.__dict__["forward"])
        for function in functions:
            package = str(getattr(_inner(function), "__module__", None)).split(".")[0]
            if package not in _LIBRARIES:
                why = (
                    f"a hook of {package} runs in it, and a trial would move its weights from host memory several times"
                )
                return RowProof(apart=why, packed=why)
    return RowProof()


def _state(model: nn.Module, batch: TokenBatch) -> Any:
    """Return a hash of the state that may change between two scores: modes, hooks, replaced forwards, adapters."""
    device = batch.input_ids.device
    found: list[Any] = [device, torch.is_autocast_enabled(device.type)]
    for module in submodules(model):
        own = module.__dict__
        found.append(own["training"])
        functions = [*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()]
        if "forward" in own:
            functions.append(own["forward"])
        for function in functions:
            if code := _code_of(function):
                found.append(code)
        if "_active_adapter" in own:  # PEFT's layers
            found.append((str(own["_active_adapter"]), own.get("_disable_adapters")))
    return hash(tuple(found))


def _code_of(function: Any) -> int:
    """Return the identity of a hook's code, which is the same if the hook is registered anew for each score; 0 for
    refkl's own hooks, which change no score."""
    function = _inner(function)
    if getattr(function, "__globals__", {}).get("__name__", "").startswith("refkl."):
        return 0
    return id(getattr(function, "__code__", function))


def _inner(function: Any) -> Any:
    """Return the function in partial objects and methods."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__func__", function)


def _prove(model: nn.Module, batch: TokenBatch) -> RowProof:
    base = base_model(model)
    rows = _rows(base, batch)
    second, third = _own_tokens(rows, 1), _own_tokens(rows, 2)
    with _untouched(model, batch.input_ids.device):
        run = partial(_logp, model)
        together, spread = _through(model, plain_call(model, rows))
        if model.training and not _close(together, run(rows), rows.completion_mask, 0.0):
            random = "it draws random numbers besides dropout, and their scale may depend on the row's length"
            return RowProof(packed=random)
        scale = max(spread, _LEAST_SPREAD) if math.isfinite(spread) else math.inf
        rounding, look_ahead = _tolerances(base, batch)
        tolerance = rounding * scale
        alone, changed = run(second), run(_last_token_changed(second))
        causal = apart = left = packed = None
        if not _close(alone[:, :-1], changed[:, :-1], second.completion_mask[:, :-1], look_ahead * scale):
            causal = "a token's score depends on tokens after it"
        elif not _same_row(together, alone, rows, 1, tolerance):
            apart = "a row's scores depend on the other rows of its batch"
        elif not _same_row(together, run(third), rows, 2, tolerance):
            left = "its scores depend on the padding before a row"
        if why_not(model, base) is None and (one := pack_for_proof(model, rows)) is not None:
            scored, _ = _through(model, packed_call(plain_call(model, rows), one))
            if not _close(scored, together, rows.completion_mask, tolerance):
                packed = "scores of the model with its present wrappers and adapters change in a packed row"
    return RowProof(causal, apart, left, packed)


def _rows(base: nn.Module, batch: TokenBatch) -> TokenBatch:
    """Return three rows [3, 9]: two with one prompt, the second padded on the right, and one padded on the left."""
    config: Any = getattr(base, "config", None)
    if config is None:
        tokens = batch.input_ids.unique()
    else:
        text = config.get_text_config()
        special = {v for c in (config, text) for k, v in vars(c).items() if k.endswith("_token_id") and type(v) is int}
        # Neighbouring ids are often variants of one word. A stride that is coprime to most sizes spreads them.
        tokens = torch.tensor([t for t in range(text.vocab_size) if t not in special][:: max(1, text.vocab_size // 61)])
    width = _PROMPT + _ENDS[0]
    count = _PROMPT + sum(_ENDS) + _OTHER
    drawn = tokens.to(batch.input_ids.device)[(torch.arange(count) * 7 + 3) % len(tokens)].to(batch.input_ids.dtype)
    prompt, rest = drawn[:_PROMPT], drawn[_PROMPT:]
    ids = batch.input_ids.new_zeros(3, width)
    mask = torch.zeros_like(ids)
    ids[0] = torch.cat([prompt, rest[: _ENDS[0]]])
    ids[1, : _PROMPT + _ENDS[1]] = torch.cat([prompt, rest[_ENDS[0] : sum(_ENDS)]])
    ids[2, width - _OTHER :] = rest[sum(_ENDS) :]
    mask[0], mask[1, : _PROMPT + _ENDS[1]], mask[2, width - _OTHER :] = 1, 1, 1
    scored = mask.bool().clone()
    scored[:2, :_PROMPT], scored[2, : width - _OTHER + 2] = False, False
    return TokenBatch(ids, mask, scored, prefix="off")


def _own_tokens(rows: TokenBatch, row: int) -> TokenBatch:
    real = rows.attention_mask[row].bool()
    ids, mask = rows.input_ids[row, real][None], rows.attention_mask[row, real][None]
    return TokenBatch(ids, mask, mask, prefix="off")  # more tokens than `rows` scores: each may show a look ahead


def _last_token_changed(row: TokenBatch) -> TokenBatch:
    ids = row.input_ids.clone()
    ids[:, -1] = ids[:, 0]
    return TokenBatch(ids, row.attention_mask, row.completion_mask, prefix="off")


def _logp(model: nn.Module, batch: TokenBatch) -> Tensor:
    return _through(model, plain_call(model, batch))[0]


def _through(model: nn.Module, call: Call) -> tuple[Tensor, float]:
    """Return [B, T] log-probabilities in fp32, 0.0 where not scored, and the logits' spread over the vocabulary."""
    logits = call.predicting(call.run(model).logits).float()
    logp = call.spread(logits.log_softmax(-1).gather(-1, call.targets[..., None])[..., 0])
    return logp, float(logits[call.mask].std(-1).mean())


def _same_row(together: Tensor, single: Tensor, rows: TokenBatch, row: int, tolerance: float) -> bool:
    real = rows.attention_mask[row].bool()
    return _close(together[row, real][None], single, rows.completion_mask[row, real][None], tolerance)


def _close(one: Tensor, other: Tensor, mask: Tensor, tolerance: float) -> bool:
    """Return True if each row's mean difference is within the tolerance. Two NaN count as equal."""
    difference = torch.where(one.isnan() & other.isnan(), 0.0, (one - other).abs())
    mean = (difference * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    return bool((mean <= tolerance).all())


def _tolerances(base: nn.Module, batch: TokenBatch) -> tuple[float, float]:
    """Return the shares of the logits' spread that count as rounding: between batches, and after a change of a later
    token."""
    exact = all(p.dtype in (torch.float32, torch.float64) for p in base.parameters())
    exact = exact and not torch.is_autocast_enabled(batch.input_ids.device.type)
    return (_ROUNDING, _ROUNDING_LOOK_AHEAD) if exact else (_ROUNDING_16_BIT, _ROUNDING_16_BIT)


@contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Switch gradients and dropout off while open; on exit, restore the model's buffers and torch's random state.

    Quantised layers whose eval mode rewrites their weight are in training mode meanwhile.
    """
    modules = submodules(model)
    rewriting = [m for m in modules if not m.training and evaluates_as(m)]
    rates = [(m, rates) for m in modules if m.training and (rates := dropout_rates(m))]
    buffers = [(m, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.no_grad())
        try:
            for module in rewriting:
                module.training = True
            for module, values in rates:
                for name in values:
                    setattr(module, name, 0.0)
            yield
        finally:
            for module in rewriting:
                module.training = False
            for module, values in rates:
                for name, rate in values.items():
                    setattr(module, name, rate)
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.copy_(before)

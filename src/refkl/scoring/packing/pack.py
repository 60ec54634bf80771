"""Entry points of packing: a batch as one packed row for a model, or None if that is not exact or not cheaper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers.utils import logging

from refkl.backend import base_model, learned_prompt
from refkl.backend.learned_prompt import OF_PROMPTS, active_prompt
from refkl.scoring.packing.attention_kernels import give_masks
from refkl.scoring.packing.exact_models import why_not
from refkl.scoring.packing.packed_batch import PackedBatch, pack_tokens
from refkl.scoring.packing.prefix_mask import Seen, SharedMask
from refkl.scoring.packing.worthwhile import may_gain, pairs_per_token, saves
from refkl.types import TokenBatch

logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed batch, and the attention mask that the model gets with it."""

    batch: PackedBatch
    mask: Any
    """A tensor, or a dict with one for each type of layer."""


def pack(model: nn.Module, batch: TokenBatch) -> Packed | None:
    """Pack a batch for a model with its wrappers.

    Returns None if the model must get the batch unpacked: packing is off, the batch has other inputs than text, the
    model has a learned prompt or is not known to be exact under packing, or packing would not cost less.
    """
    base = base_model(model)
    if not _is_text(model, batch) or active_prompt(model) is not None or not may_gain(base, batch):
        return None
    work = _ONCE.get(batch) or _Work()
    if (packed := work.packed(batch)) is None:
        return None
    if (why := why_not(model, base)) is not None:
        if packed.tokens < 0.8 * batch.input_ids.numel():
            logger.warning_once(
                f"Rows share prompts or have much padding, and the model computes all of it, because {why}. To accept "
                "this without a warning, pass prefix='off' (scoring.prefix: 'off')."
            )
        return None
    seen = work.seen(packed, pairs_per_token(base))
    if not saves(base, packed, seen, batch, dense=_dense(base)):
        return None
    mask = _mask(base, packed, seen)
    return None if mask is None else Packed(packed, mask)


def pack_for_proof(model: nn.Module, batch: TokenBatch) -> Packed | None:
    """Pack a batch regardless of the cost. `why_not` has returned None for the model.

    Returns None if the model's attention window is shorter than a row, and its configuration has no layer types.
    """
    base, packed = base_model(model), pack_tokens(batch)
    assert packed is not None, "its rows have scored tokens and no holes"
    mask = _mask(base, packed, Seen(packed, pairs_per_token(base)))
    return None if mask is None else Packed(packed, mask)


def can_pack(model: nn.Module, batch: TokenBatch) -> bool:
    """Return True if the batch may be packed for this model, regardless of the cost."""
    return _is_text(model, batch) and why_not(model, base_model(model)) is None


def _is_text(model: nn.Module, batch: TokenBatch) -> bool:
    """Return True if the batch may be packed: `prefix` is "auto", and the base model gets only tokens. The input of a
    learned prompt does not reach the base model."""
    own = set() if learned_prompt(model) is None else {OF_PROMPTS}
    return batch.prefix == "auto" and not batch.model_inputs.keys() - own


@contextmanager
def packed_once(batch: TokenBatch) -> Iterator[None]:
    """Pack the batch only once while open, for all models that score it. Its tensors must not change meanwhile."""
    first = batch not in _ONCE
    _ONCE.setdefault(batch, _Work())
    try:
        yield
    finally:
        if first:
            _ONCE.pop(batch, None)


@dataclass(eq=False)
class _Work:
    """The parts of packing that do not depend on the model, or depend only on its size."""

    _packed: list[PackedBatch | None] = field(default_factory=list)
    _seen: dict[int, Seen] = field(default_factory=dict)

    def packed(self, batch: TokenBatch) -> PackedBatch | None:
        if not self._packed:
            self._packed.append(pack_tokens(batch))
        return self._packed[0]

    def seen(self, packed: PackedBatch, scale: int) -> Seen:
        if scale not in self._seen:
            self._seen[scale] = Seen(packed, scale)
        return self._seen[scale]


_ONCE: WeakKeyDictionary[TokenBatch, _Work] = WeakKeyDictionary()
"""The batches for which `packed_once` is open."""


def _dense(base: nn.Module) -> bool:
    """Return True if the model's attention gets full masks [N, N]."""
    config: Any = base.config
    return bool(config._attn_implementation == "eager")


def _mask(base: nn.Module, packed: PackedBatch, seen: Seen) -> Any:
    """Return the model's attention mask; None if its window is shorter than a row and no layer types are given."""
    config: Any = base.config
    dense = _dense(base)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    short = window is None or packed.longest() <= window
    if kinds == {"full_attention"} and not short and "layer_types" not in vars(config):
        return None

    give_masks(base)

    def mask(window: int | None) -> Tensor:
        dtype = base.get_input_embeddings().weight.dtype  # type: ignore[operator]
        return seen.dense(window, dtype) if dense else SharedMask.of(seen, window)

    if "sliding_attention" not in kinds:
        return mask(None)
    return {kind: mask(None if kind == "full_attention" else window) for kind in kinds}

"""The arguments of a causal language model's forward, and which of its outputs predict the scored tokens.

Token t is predicted by the logits at position t - 1: this shift happens here and nowhere else.
Notation: B sequences, T tokens, K columns in which some sequence has a scored token, V vocabulary, H hidden width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from refkl.backend import base_model, learned_prompt
from refkl.backend.learned_prompt import OF_PROMPTS, active_prompt
from refkl.scoring.packing.pack import Packed
from refkl.scoring.packing.packed_batch import PackedBatch, scored_columns
from refkl.types import TokenBatch


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a model that predicts the scored tokens of a batch."""

    batch: TokenBatch
    columns: Tensor
    """[K] where in [0, T) the predicted tokens are."""
    inputs: dict[str, Any]
    """Keyword arguments for the model's forward."""
    ahead: int = 0
    """Positions that the model's output has before those of the batch: a learned prompt's."""
    positions: Tensor | None = None
    """[B, ahead + T] position ids for the model inside PEFT, which drops those that it is given; None for none."""
    packed: PackedBatch | None = None
    """The packed row that the model is given; None if it is given the batch as it is."""

    def run(self, model: nn.Module) -> Any:
        """Call the model, once, as it is wrapped."""
        if self.positions is None:
            return model(**self.inputs)

        def place(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "position_ids": self.positions}

        hook = base_model(model).register_forward_pre_hook(place, with_kwargs=True)
        try:
            return model(**self.inputs)
        finally:
            hook.remove()

    @property
    def targets(self) -> Tensor:
        """[B, K] the tokens to predict."""
        return self.batch.input_ids[:, self.columns]

    @property
    def mask(self) -> Tensor:
        """[B, K] bool, True = scored."""
        return self.batch.completion_mask[:, self.columns]

    def predicting(self, values: Tensor) -> Tensor:
        """[B, K or T, …] -> [B, K, …]: the positions that predict `columns`, of a model that kept these or all.

        Of a packed row it is [1, M or N, …] -> [B, K, …].
        """
        if self.packed is not None:
            packed, given = self.packed, values.shape[1]
            if given not in (packed.keep.numel(), packed.tokens):
                raise ValueError(
                    f"The model gave {given} positions for {packed.tokens} tokens, so it cannot be scored."
                )
            kept = values[0] if given == packed.keep.numel() else values[0, packed.keep]
            return kept[packed.at]
        if values.shape[1] == self.columns.numel():
            return values
        if values.shape[1] != self.ahead + self.batch.input_ids.shape[1]:
            raise ValueError(
                f"The model gave {values.shape[1]} positions for {self.batch.input_ids.shape[1]} tokens"
                + (f" and {self.ahead} virtual ones" if self.ahead else "")
                + ": which of them predict which tokens is not known, so it cannot be scored."
            )
        return values[:, self.columns - 1 + self.ahead]

    def spread(self, values: Tensor) -> Tensor:
        """[B, K, …] back to [B, T, …], 0.0 where nothing is scored."""
        mask = self.mask.reshape(*self.mask.shape, *(1,) * (values.dim() - 2))
        kept = values.masked_fill(~mask, 0.0)
        shape = kept.shape[0], self.batch.input_ids.shape[1], *kept.shape[2:]
        return kept.new_zeros(shape).index_copy(1, self.columns, kept)


def plain_call(model: nn.Module, batch: TokenBatch, **forward: Any) -> Call:
    """Return the arguments to call a model with, for the batch as it is.

    Args:
        model: a causal language model, bare or inside PEFT, DDP, DeepSpeed.
        batch: the tokens.
        forward: further arguments for the model's forward.

    Raises:
        ValueError: the batch has position ids and the model takes none; a learned prompt that would be dropped, or that
            leaves no place for one of the model_inputs.
    """
    base = base_model(model)
    # mypy holds the instances' __hash__ against the class.
    accepted = _forward_parameters(type(base))  # type: ignore[arg-type]
    columns = scored_columns(batch)
    prompt = active_prompt(model)
    ahead = 0 if prompt is None else prompt.ahead
    if prompt is not None:
        prompt.check(base, batch)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = columns - 1 + ahead
    position_ids = _positions(batch, accepted, base)
    if position_ids is not None and prompt is None:
        inputs["position_ids"] = position_ids
    given = dict(batch.model_inputs)
    if prompt is None and learned_prompt(model) is not None:
        given.pop(OF_PROMPTS, None)  # the prompt is off, and without it the model would get them
    inside = None if position_ids is None or prompt is None else prompt.positions(position_ids)
    return Call(batch, columns, {**inputs, **given, **forward}, ahead, inside)


def packed_call(call: Call, packed: Packed) -> Call:
    """Return the call with the packed row in place of the batch."""
    one_row = {"input_ids": packed.batch.input_ids, "attention_mask": packed.mask}
    one_row["position_ids"] = packed.batch.position_ids
    if "logits_to_keep" in call.inputs:
        one_row["logits_to_keep"] = packed.batch.keep
    return replace(call, inputs={**call.inputs, **one_row}, packed=packed.batch)


def _positions(batch: TokenBatch, accepted: frozenset[str], base: nn.Module) -> Tensor | None:
    """Positions counted from the attention mask: without them a model with absolute positions reads left-padded
    rows from the wrong place."""
    if batch.position_ids is not None:
        if "position_ids" not in accepted:
            raise ValueError(f"The batch has position_ids, but {type(base).__name__} takes none.")
        return batch.position_ids
    given = [x for name, x in batch.model_inputs.items() if name != OF_PROMPTS]
    media = any(isinstance(x, Tensor) and x.shape != batch.input_ids.shape for x in given)
    if "position_ids" not in accepted or media:
        return None  # with images and the like, models count positions in their own way
    return (batch.attention_mask.long().cumsum(-1) - 1).clamp(min=0)


@lru_cache(maxsize=64)
def _forward_parameters(cls: type) -> frozenset[str]:
    return frozenset(inspect.signature(cls.forward).parameters)  # type: ignore[attr-defined]

"""Arguments of a causal language model's forward, and the positions of its output that predict the scored tokens.

The logits at position t - 1 predict token t. This shift happens only here.
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
    """[K] columns of the predicted tokens, in [0, T)."""
    inputs: dict[str, Any]
    """Keyword arguments for the model's forward."""
    ahead: int = 0
    """Number of positions of the model's output before those of the batch: those of a learned prompt."""
    positions: Tensor | None = None
    """[B, ahead + T] position ids to pass to the model inside PEFT, which drops its own; None if not needed."""
    packed: PackedBatch | None = None
    """The packed row that the model gets; None if it gets the batch unpacked."""

    def run(self, model: nn.Module) -> Any:
        """Call the model once, through its wrappers."""
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
        """[B, K] ids of the tokens to predict."""
        return self.batch.input_ids[:, self.columns]

    @property
    def mask(self) -> Tensor:
        """[B, K] bool, True = scored."""
        return self.batch.completion_mask[:, self.columns]

    def predicting(self, values: Tensor) -> Tensor:
        """Return [B, K, …], the values at the positions that predict `columns`.

        Args:
            values: [B, K, …] if the model kept only these positions, else [B, ahead + T, …]. For a packed row of N
                tokens, M of which predict: [1, M, …] or [1, N, …].

        Raises:
            ValueError: `values` has another number of positions.
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
                + ": refkl does not know which of them predict which tokens, so it cannot score the model."
            )
        return values[:, self.columns - 1 + self.ahead]

    def spread(self, values: Tensor) -> Tensor:
        """Spread values [B, K, …] to [B, T, …], with 0.0 where not scored."""
        mask = self.mask.reshape(*self.mask.shape, *(1,) * (values.dim() - 2))
        kept = values.masked_fill(~mask, 0.0)
        shape = kept.shape[0], self.batch.input_ids.shape[1], *kept.shape[2:]
        return kept.new_zeros(shape).index_copy(1, self.columns, kept)


def plain_call(model: nn.Module, batch: TokenBatch, **forward: Any) -> Call:
    """Return the call of a model on the unpacked batch.

    Args:
        model: a causal language model, bare or wrapped in PEFT, DDP or DeepSpeed.
        batch: the tokens to score.
        forward: further arguments for the model's forward.

    Raises:
        ValueError: the batch has position ids and the model takes none; a learned prompt, or one of the model_inputs
            given with it, would be dropped.
    """
    base = base_model(model)
    # mypy checks the __hash__ of instances instead of the class's.
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
        given.pop(OF_PROMPTS, None)  # the prompt is off, so the model itself would get them
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
    """Return the batch's position ids, or count them from the attention mask; None leaves them to the model.

    Without them, a model with absolute positions would read left-padded rows from the wrong position.
    """
    if batch.position_ids is not None:
        if "position_ids" not in accepted:
            raise ValueError(f"The batch has position_ids, but {type(base).__name__} takes none.")
        return batch.position_ids
    given = [x for name, x in batch.model_inputs.items() if name != OF_PROMPTS]
    media = any(isinstance(x, Tensor) and x.shape != batch.input_ids.shape for x in given)
    if "position_ids" not in accepted or media:
        return None  # with images or other media, models count positions in their own way
    return (batch.attention_mask.long().cumsum(-1) - 1).clamp(min=0)


@lru_cache(maxsize=64)
def _forward_parameters(cls: type) -> frozenset[str]:
    return frozenset(inspect.signature(cls.forward).parameters)  # type: ignore[attr-defined]

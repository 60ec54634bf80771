"""Forward pass of a model on a batch, packed if that is exact and costs less, and the logits that predict its scored
tokens.

Notation: B sequences, T tokens, K columns in which some sequence has a scored token, V vocabulary, H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from refkl.backend import base_model, holds_shards, learned_prompt
from refkl.backend.exclusive import use_of
from refkl.scoring.call import Call, packed_call, plain_call
from refkl.scoring.packing.exact_models import is_listed
from refkl.scoring.packing.pack import can_pack, pack
from refkl.scoring.rope import forget_longest
from refkl.scoring.row_proof import row_proof
from refkl.types import TokenBatch

logger = logging.get_logger(__name__)


@dataclass(frozen=True, eq=False)
class ScoredLogits:
    """Logits that predict the columns of a batch with scored tokens."""

    call: Call
    logits: Tensor
    """[B, K, V], in the model's dtype, with grad if the forward had it."""
    hidden: Tensor | None
    """[B, K, H] the states that entered the output head; None if not asked for."""
    outputs: Any
    """The model's own output object."""


def prepare(model: nn.Module, batch: TokenBatch, **forward: Any) -> Call:
    """Return the call of a model on a batch, packed if that is exact and costs less.

    Before the model gets its first packed row in its present state, it is tested on three short rows (see
    `refkl.scoring.row_proof`).

    Args:
        model: a causal language model, bare or wrapped in PEFT, DDP or DeepSpeed.
        batch: the tokens to score.
        forward: further arguments for the model's forward; with any of them, the batch is not packed.

    Raises:
        ValueError: the model is not causal, or cannot score the batch's left padding; the batch has position ids and
            the model takes none; a learned prompt, or one of the model_inputs given with it, would be dropped.
    """
    call = plain_call(model, batch, **forward)
    _check_rows(model, batch)
    forget_longest(base_model(model))
    if forward:
        return call
    packed = pack(model, batch)
    # If weights are sharded, all ranks must run the proof in the same call, even those whose own batch is not packed.
    if packed is None and not (holds_shards(model) and can_pack(model, batch)):
        return call
    why_not = row_proof(model, batch).packed
    if packed is None:
        return call
    if why_not is not None:
        logger.warning_once(
            f"Rows share prompts or have much padding, and the model computes all of it, because {why_not}. To accept "
            "this without a warning, pass prefix='off' (scoring.prefix: 'off')."
        )
        return call
    return packed_call(call, packed)


def completion_logits(model: nn.Module, batch: TokenBatch, *, hidden: bool = False, **forward: Any) -> ScoredLogits:
    """Run the model through its wrappers and return the full logits that predict the scored tokens.

    Args:
        model: a causal language model, bare or wrapped in PEFT, DDP or DeepSpeed. Its outermost wrapper is called
            once, so that the wrapper's hooks and gathers run.
        batch: the tokens to score.
        hidden: if True, also return the states that enter the output head.
        forward: further arguments for the model's forward.

    Raises:
        ValueError: see `prepare`; the output does not have one row per token; a reference has borrowed the model in
            this thread, so the model holds the reference's weights.
    """
    captured: list[Tensor] = []
    with use_of(model).running():
        call = prepare(model, batch, **forward)
        hook = _capture_head_input(base_model(model), captured) if hidden else None
        try:
            outputs = call.run(model)
        finally:
            if hook is not None:
                hook.remove()
    return ScoredLogits(
        call=call,
        logits=call.predicting(outputs.logits),
        hidden=call.predicting(captured[0]) if captured else None,
        outputs=outputs,
    )


def _check_rows(model: nn.Module, batch: TokenBatch) -> None:
    """Raise ValueError if the model is not causal, or if left padding changes its scores. Listed classes pass."""
    base = base_model(model)
    if is_listed(base) or batch.model_inputs:
        return
    proof = row_proof(model, batch)
    if proof.causal is not None:
        raise ValueError(not_causal(base, proof.causal))
    if proof.left is not None and not bool(batch.attention_mask[:, 0].all()):
        raise ValueError(
            f"{type(base).__name__} cannot score rows that are padded on the left: {proof.left}. Pad on the right "
            "(tokenizer.padding_side = 'right')."
        )


def check_causal(model: nn.Module, device: torch.device) -> None:
    """Raise ValueError if the model is not a causal language model, by its class or by a test on three short rows.

    If weights are sharded, every rank must call.
    """
    base = base_model(model)
    config: Any = getattr(base, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(not_causal(base, "it is an encoder-decoder"))
    if is_listed(base) or config is None or any(p.is_meta for p in base.parameters()):
        return
    if learned_prompt(model) is None:
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        _check_rows(model, TokenBatch(ids, torch.ones_like(ids), torch.ones_like(ids)))


def not_causal(base: nn.Module, why: str) -> str:
    return (
        f"{type(base).__name__} is not a causal language model: {why}. A KL of sampled tokens needs a model that "
        "predicts each token from those before it."
    )


def _capture_head_input(base: nn.Module, captured: list[Tensor]) -> Any:
    head = base.get_output_embeddings()  # type: ignore[operator]

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        captured.append(args[0])

    return head.register_forward_pre_hook(keep)

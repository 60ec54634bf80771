"""Scores of a reference whose weights are in this process: without a trace, in parts where memory asks for that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils import logging

from refkl.backend import communicating_device, evaluating
from refkl.reference.cached.row_keys import describe
from refkl.scoring import score_model
from refkl.scoring.in_parts import free_tokens, in_parts
from refkl.scoring.packing.pack import can_pack
from refkl.scoring.row_proof import rows_apart
from refkl.types import TokenBatch, TokenScores

if TYPE_CHECKING:
    from refkl.reference.held import HeldReference

logger = logging.get_logger(__name__)


@contextmanager
def prepared(held: HeldReference, batch: TokenBatch) -> Iterator[tuple[nn.Module, TokenBatch]]:
    """Yield the module to run, and the batch on its device: no grad, dropout off. Everything is switched back."""
    with torch.no_grad(), held.activated() as model, evaluating(model), held.autocast():
        yield model, batch if held.device is None else batch.to(held.device)


def score_held(held: HeldReference, batch: TokenBatch, **options: Any) -> TokenScores:
    """Return the scores of a batch, on the batch's device. `options` are those of `score_model`."""
    with held.scoring(batch) as (model, moved), held.use.scoring():

        def score(part: TokenBatch) -> TokenScores:
            return score_model(model, part, **options).scores

        limit = _most_tokens(held, model, moved.input_ids.device)
        if limit is None or (moved.input_ids.numel() <= limit and not held.collective):
            return score(moved).to(batch.input_ids.device)
        if not moved.model_inputs and (why_not := rows_apart(model, moved).why_not(moved)) is not None:
            logger.warning_once(f"The reference scores each batch in one forward pass, whatever its size: {why_not}.")
            limit = max(limit, moved.input_ids.numel())

        def rounds(parts: int) -> int:
            return _most_over_ranks(parts) if held.collective else parts

        scores = in_parts(score, moved, limit, rounds, shares=can_pack(model, moved))
        return scores.to(batch.input_ids.device)


def _most_tokens(held: HeldReference, model: nn.Module, device: torch.device) -> int | None:
    """Return how many tokens to score at once; None for all."""
    if held.config.max_tokens is not None:
        return held.config.max_tokens
    # What is moved for each score is moved once for all tokens.
    return None if held.one_sweep or held.collective else free_tokens(model, device)


def _most_over_ranks(parts: int) -> int:
    """Return the largest number of parts on any rank: ranks that score together do so equally often."""
    most = torch.tensor(parts, device=communicating_device())
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


class Conditions:
    """The conditions, beside the batch, that the scores of a held reference depend on: the key of a cache."""

    def __init__(self, held: HeldReference) -> None:
        self._held = held
        self._described: tuple[str, dict[str, Any]] | None = None

    def of(self, batch: TokenBatch) -> dict[str, Any]:
        """Return them for this batch, as JSON. Collective after an update, if the reference is sharded."""
        held = self._held
        if not held.weights_freed:
            held.follow_policy()
        device = (held.device or batch.input_ids.device).type
        with held.autocast():
            cast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        fingerprint, described = self.take()
        return {"fingerprint": fingerprint, "autocast": cast, **described}

    def take(self) -> tuple[str, dict[str, Any]]:
        """Return the fingerprint, and how the model computes; the same until the fingerprint is another."""
        held = self._held
        # After an update none is recorded: what was scored before it must not answer.
        fingerprint = held.recorded_fingerprint or held.fingerprint()
        if self._described is None or self._described[0] != fingerprint:
            with held.activated() as model:
                self._described = fingerprint, describe(model)
        return self._described

"""The floor that quantising puts under the KL: KL(full precision ‖ quantised), exact, measured before the first score.

A divergence between policy and reference that is not above it is rounding. Over the whole vocabulary and per scored
token, by the scores' own code; not an estimate from the tokens that happened to be sampled.
"""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import logging

from refkl.backend import Weight, Whole, evaluating, named_weights, unwrap
from refkl.backend.layout import communicating_device
from refkl.config import ReferenceConfig
from refkl.kl import divergence
from refkl.reference.weights.fingerprint import digests
from refkl.scoring import Against, HeadError, completion_logits, find_head, score_model
from refkl.types import KLFloor, TokenBatch

logger = logging.get_logger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class QuantizationKLMeter:
    """Measures the floor once, and keeps what it takes until then: of the policy its digests, or a loaded model."""

    def __init__(self, config: ReferenceConfig, policy: nn.Module, loaded: nn.Module | None) -> None:
        """
        Args:
            config: with `quantize` and `max_kl_floor`.
            policy: the full-precision side, where nothing was loaded.
            loaded: the model that was quantised, if it is not the policy; dropped once it was measured.
        """
        self.floor: KLFloor | None = None
        """The floor that was measured."""
        self.loaded = loaded
        """Held in host memory until then."""
        self._config = config
        self._policy = weakref.ref(unwrap(policy))
        self._recorded: dict[str, set[str]] | None = None
        self._refusal: str | None = None

    @property
    def done(self) -> bool:
        """True if there is nothing left to measure.

        Raises:
            ValueError: the floor was found to be above the limit.
        """
        if self._refusal is not None:
            raise ValueError(self._refusal)
        return self.floor is not None

    def watch(self) -> None:
        """Remember which numbers the policy has now, to be told if it trains before the floor was measured."""
        policy = self._policy()
        if self.loaded is None and policy is not None:
            self._recorded = _digests_in_each_dtype(policy)

    def measure(self, held: nn.Module, batches: Iterable[TokenBatch], *, says: bool) -> None:
        """Compare the quantised model with the full one; every rank calls, each with tokens of its own.

        Nothing is settled while no rank has a scored token. Scored under whatever autocast the caller is in.

        Args:
            held: the quantised model.
            batches: what to score.
            says: whether to log the result: on one rank.

        Raises:
            ValueError: the policy has trained since the reference was built; the mean is above `max_kl_floor`.
        """
        full = self._full_precision()
        total, worst, tokens = 0.0, 0.0, 0
        for batch in batches:
            values = exact_kl(full, held, batch).double()
            if values.numel():
                total, worst = total + float(values.sum()), max(worst, float(values.max()))
                tokens += values.numel()
        total, worst, tokens = _over_ranks(total, worst, tokens)
        if not tokens:
            return
        self._settle(KLFloor(total / tokens, worst, tokens))
        if says:
            logger.warning(
                f"The reference is quantised to {self._config.quantize}: a KL below {total / tokens:.2g} nats per "
                f"token (at most {worst:.2g}, over {tokens} tokens) is rounding."
            )

    def recall(self, found: dict[str, Any]) -> None:
        """Take over what was measured earlier of the same reference: the fields of a KLFloor."""
        self._settle(KLFloor(**found))

    def record(self) -> dict[str, Any] | None:
        """For provenance: the fields of the KLFloor, or None before there is one."""
        return None if self.floor is None else asdict(self.floor)

    def _settle(self, floor: KLFloor) -> None:
        self.floor, self.loaded, self._recorded = floor, None, None
        limit, kind = self._config.max_kl_floor, self._config.quantize
        if not floor.mean <= limit:  # NaN is no floor either
            other = "" if kind == "int8" else "reference.quantize 'int8', "
            self._refusal = (
                f"The reference quantised to {kind} is {floor.mean:.3g} nats per token from full precision (at most "
                f"{floor.max:.3g}, over {floor.tokens} tokens), and reference.max_kl_floor is {limit:g}: a KL below "
                f"that is rounding. Use {other}reference.offload, or a higher max_kl_floor."
            )
            raise ValueError(self._refusal)

    def _full_precision(self) -> nn.Module:
        if self.loaded is not None:
            return self.loaded
        policy = self._policy()
        advice = (
            "Score once before training, or give a trainer the reference that build_reference(..., calibration=) makes."
        )
        if policy is None:
            raise ValueError(f"The policy that was quantised is gone, and so what to measure its floor by. {advice}")
        if self._recorded is None:
            return policy
        now = digests(Weight(name, t.detach(), Whole(t.shape)) for name, t in named_weights(policy))
        if changed := [name for name, digest in now.items() if digest not in self._recorded.get(name, ())]:
            raise ValueError(
                f"The policy has changed since its quantised reference was built ({changed[0]} has other values), so "
                f"the KL floor of quantising can no longer be measured. {advice}"
            )
        return policy


@torch.no_grad()
def exact_kl(full: nn.Module, held: nn.Module, batch: TokenBatch) -> Tensor:
    """[n] KL(full ‖ held) in nats for each of the n scored tokens; both in eval mode, each on its own device."""
    here, there = (next(model.parameters()).device for model in (full, held))
    mask = batch.completion_mask.to(here)
    with evaluating(full), evaluating(held):
        try:
            head = find_head(held)
            if here != there:
                head = replace(head, module=copy.deepcopy(head.module).to(here))
            scores = score_model(held, batch.to(there), hidden=True).scores.to(here)
            scored = score_model(full, batch.to(here), against=Against(scores, head, "reverse_kl"))
            assert scored.against is not None
            return scored.against[1][mask]
        except HeadError:
            own, other = completion_logits(full, batch.to(here)), completion_logits(held, batch.to(there))
            rows = own.call.mask
            logits, ref_logits = own.logits[rows], other.logits.to(here)[rows]
            least = torch.promote_types(logits.dtype, torch.float32)
            return divergence(logits.to(least), ref_logits.to(least), "reverse_kl")


def _digests_in_each_dtype(model: nn.Module) -> dict[str, set[str]]:
    """Return the digests of each weight, as it is and in each dtype it can be cast to: a policy that was only cast
    since has not trained."""
    found = defaultdict(set)
    weights = list(named_weights(model))
    for dtype in (None, *_DTYPES):
        casts = ((name, t.detach().to(dtype if dtype and t.is_floating_point() else t.dtype)) for name, t in weights)
        for name, digest in digests(Weight(name, t, Whole(t.shape)) for name, t in casts).items():
            found[name].add(digest)
    return dict(found)


def _over_ranks(total: float, worst: float, tokens: int) -> tuple[float, float, int]:
    """Sum, maximum and sum."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return total, worst, tokens
    sums = torch.tensor([total, tokens], dtype=torch.float64, device=communicating_device())
    top = torch.tensor([worst], dtype=torch.float64, device=communicating_device())
    dist.all_reduce(sums)
    dist.all_reduce(top, dist.ReduceOp.MAX)
    return float(sums[0]), float(top), int(sums[1])

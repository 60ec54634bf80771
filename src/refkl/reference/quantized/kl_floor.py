"""The KL floor of a quantised reference: KL(full precision ‖ quantised), exact, measured before the first score.

A divergence between policy and reference that is not above the floor is rounding. The KL is computed over the whole
vocabulary for each scored token, with the code that scores; it is not an estimate from the sampled tokens.
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
    """Measures the floor once. Until then it keeps the policy's digests, or the model that was loaded."""

    def __init__(self, config: ReferenceConfig, policy: nn.Module, loaded: nn.Module | None) -> None:
        """
        Args:
            config: with `quantize` and `max_kl_floor`.
            policy: the full-precision side, if no model was loaded.
            loaded: the model that was quantised, if it is not the policy; dropped once the floor is measured.
        """
        self.floor: KLFloor | None = None
        """The measured floor; None until it is measured."""
        self.loaded = loaded
        """The loaded model, kept in host memory until the floor is measured."""
        self._config = config
        self._policy = weakref.ref(unwrap(policy))
        self._recorded: dict[str, set[str]] | None = None
        self._refusal: str | None = None

    @property
    def done(self) -> bool:
        """True if the floor has been measured.

        Raises:
            ValueError: the measured floor is above the limit.
        """
        if self._refusal is not None:
            raise ValueError(self._refusal)
        return self.floor is not None

    def watch(self) -> None:
        """Record the policy's present digests, to detect that it trains before the floor is measured."""
        policy = self._policy()
        if self.loaded is None and policy is not None:
            self._recorded = _digests_in_each_dtype(policy)

    def measure(self, held: nn.Module, batches: Iterable[TokenBatch], *, says: bool) -> None:
        """Compare the quantised model with the full-precision one. Every rank must call, each with its own tokens.

        The floor stays unmeasured if no rank has a scored token. Scores run under the caller's autocast.

        Args:
            held: the quantised model.
            batches: the sequences to score.
            says: if True, log the result; set it on one rank.

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
                f"token (at most {worst:.2g}, over {tokens} tokens) is rounding error."
            )

    def recall(self, found: dict[str, Any]) -> None:
        """Use the floor that was measured earlier for the same reference: the fields of a KLFloor."""
        self._settle(KLFloor(**found))

    def record(self) -> dict[str, Any] | None:
        """Return the fields of the KLFloor for the provenance, or None before it is measured."""
        return None if self.floor is None else asdict(self.floor)

    def _settle(self, floor: KLFloor) -> None:
        self.floor, self.loaded, self._recorded = floor, None, None
        try:
            self.check(floor)
        except ValueError as error:
            self._refusal = str(error)
            raise

    def check(self, floor: KLFloor) -> None:
        """Raise ValueError if a floor is above `reference.max_kl_floor`."""
        limit, kind = self._config.max_kl_floor, self._config.quantize
        if not floor.mean <= limit:  # NaN is no floor either
            other = "" if kind == "int8" else "reference.quantize 'int8', "
            raise ValueError(
                f"The reference quantised to {kind} is {floor.mean:.3g} nats per token from full precision (at most "
                f"{floor.max:.3g}, over {floor.tokens} tokens), but reference.max_kl_floor is {limit:g}: a KL below "
                f"the floor is rounding error. Use {other}reference.offload, or a higher reference.max_kl_floor."
            )

    def _full_precision(self) -> nn.Module:
        if self.loaded is not None:
            return self.loaded
        policy = self._policy()
        advice = (
            "Score once before training, or give a trainer the reference that build_reference(..., calibration=) makes."
        )
        if policy is None:
            raise ValueError(f"The policy no longer exists, so the KL floor cannot be measured against it. {advice}")
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
    """Return [n] KL(full ‖ held) in nats for each of the n scored tokens. Both run in eval mode on their own device."""
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
    """Return the digests of each weight, in its present dtype and in each dtype it can be cast to: a policy that was
    only cast has not trained."""
    found = defaultdict(set)
    weights = list(named_weights(model))
    for dtype in (None, *_DTYPES):
        casts = ((name, t.detach().to(dtype if dtype and t.is_floating_point() else t.dtype)) for name, t in weights)
        for name, digest in digests(Weight(name, t, Whole(t.shape)) for name, t in casts).items():
            found[name].add(digest)
    return dict(found)


def _over_ranks(total: float, worst: float, tokens: int) -> tuple[float, float, int]:
    """Reduce over all ranks: the sum of `total`, the maximum of `worst` and the sum of `tokens`."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return total, worst, tokens
    sums = torch.tensor([total, tokens], dtype=torch.float64, device=communicating_device())
    top = torch.tensor([worst], dtype=torch.float64, device=communicating_device())
    dist.all_reduce(sums)
    dist.all_reduce(top, dist.ReduceOp.MAX)
    return float(sums[0]), float(top), int(sums[1])

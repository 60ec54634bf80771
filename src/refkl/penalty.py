"""Where the KL goes: joins an estimator, an aggregation and a coefficient into one penalty."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from refkl.config import KLConfig
from refkl.kl import FixedKL, aggregate, aggregation_count, estimate, saturated
from refkl.kl.estimators import masked_log_ratio
from refkl.types import KLOutput, TokenScores, require_shape

if TYPE_CHECKING:
    from accelerate import Accelerator


class KLPenalty:
    """coef · KL(policy ‖ reference), for the loss.

    Call it once per micro-batch and `step` once per optimizer step.
    """

    def __init__(self, config: KLConfig | None = None) -> None:
        self.config = config or KLConfig()
        self.controller = FixedKL(self.config.coef)
        self._window: list[Tensor] = []

    @property
    def coef(self) -> float:
        """The present coefficient."""
        return self.controller.coef

    def __call__(
        self,
        policy_scores: TokenScores,
        ref_scores: TokenScores,
        mask: Tensor,
        *,
        old_logp: Tensor | None = None,
        divergence: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> KLOutput:
        """The penalty of one micro-batch.

        Args:
            policy_scores: with grad. Scores without grad (an evaluation) are not counted by the next `step`.
            ref_scores: no grad ever flows to these.
            mask: [B, T], True = counts; usually `batch.completion_mask`.
            old_logp: [B, T], nats: the log-probabilities under the policy that sampled, if it was another.
            divergence: [B, T], nats, with grad: exact divergence to use instead of the estimator.
            normalizer: what the aggregation divides by, where the batch is a part of a greater one (see
                `global_normalizer`).

        Raises:
            ValueError: shapes that differ, temperatures that differ, or a divergence that carries no grad.
        """
        logp, ref_logp = policy_scores.logp, ref_scores.logp.detach()
        _check_comparable(policy_scores, ref_scores, mask)
        if divergence is None:
            per_token = estimate(
                logp,
                ref_logp,
                self.config.estimator,
                gradient=self.config.gradient,
                old_logp=old_logp,
                mask=mask,
                max_log_ratio=self.config.max_log_ratio,
            )
        elif old_logp is not None:
            raise ValueError("old_logp corrects an estimate from samples; an exact divergence takes none.")
        else:
            require_shape("divergence", divergence, mask.shape, "mask")
            if self.coef and logp.requires_grad and not divergence.requires_grad:
                raise ValueError(
                    "divergence carries no grad, so this penalty would train nothing. Take it from score_pair."
                )
            per_token = divergence.masked_fill(~mask.bool(), 0.0)

        # With coef 0 an infinite divergence must not make the loss NaN: only the graph is kept.
        penalised = mask.bool() if self.coef else torch.zeros_like(mask, dtype=torch.bool)
        loss = self.coef * aggregate(per_token, penalised, self.config.aggregation, normalizer=normalizer)
        stats = _statistics(per_token.detach(), masked_log_ratio(logp.detach(), ref_logp, mask), mask.bool())
        if logp.requires_grad:
            self._window.append(stats)
        return KLOutput(loss, None, per_token, _metrics(stats, self.coef))

    def step(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Close an optimizer step: the KL since the last one, over all ranks, updates the coefficient.

        Args:
            accelerator: reduces over its processes; every rank must call. None for a single process.

        Returns:
            Metrics over the step: "kl" nats per token, "kl/sequence" nats per sequence, "kl/max" the largest
            |log-ratio| of a token, "kl/saturated" the share of tokens whose exp is capped, "kl/coef" the coefficient
            that applied. Empty if nothing was scored.
        """
        stats = _merge(self._window) if self._window else torch.zeros(_STATISTICS, dtype=torch.float64)
        self._window = []
        if accelerator is not None and accelerator.num_processes > 1:
            on_device = stats.to(accelerator.device, torch.float32)
            sums = accelerator.reduce(on_device[:-1], reduction="sum")
            peak = accelerator.reduce(on_device[-1:], reduction="max")
            stats = torch.cat([sums, peak]).to(stats)
        metrics = _metrics(stats, self.coef)
        tokens = int(stats[1])
        if tokens:
            self.controller.update(metrics["kl"], tokens)
        return metrics if tokens else {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"controller": self.controller.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.controller.load_state_dict(state["controller"])


def global_normalizer(
    mask: Tensor | Iterable[Tensor], mode: str = "token-mean", accelerator: Accelerator | None = None
) -> Tensor:
    """What each micro-batch's aggregation divides by, so that micro-batches and ranks add up to the whole batch.

    Args:
        mask: [B, T], True = counts: this rank's mask; or one mask per micro-batch of the optimizer step.
        mode: as in `kl.aggregate`.
        accelerator: counts over its processes (every rank must call), and undoes their averaging of gradients.

    Returns:
        Scalar fp32: the count over all micro-batches and ranks, divided by the number of ranks (gradients are averaged
        over ranks). Sum the losses of the micro-batches: a loop whose backward divides by the number of
        accumulation steps, as `accelerator.backward` does, must divide this by that number too.
    """
    masks = [mask] if isinstance(mask, Tensor) else list(mask)
    if not masks:
        raise ValueError("global_normalizer got no mask: pass this rank's mask, or one per micro-batch.")
    count = torch.stack([aggregation_count(m, mode) for m in masks]).sum().to(torch.float32)
    if accelerator is None or accelerator.num_processes == 1:
        return count.clamp(min=1.0)
    return accelerator.reduce(count, reduction="sum").clamp(min=1.0) / accelerator.num_processes


def _check_comparable(policy_scores: TokenScores, ref_scores: TokenScores, mask: Tensor) -> None:
    """Raise ValueError for scores whose difference would not be a log-ratio of policy and reference."""
    require_shape("mask", mask, policy_scores.logp.shape, "policy_scores.logp")
    if policy_scores.temperature != ref_scores.temperature:
        raise ValueError(
            f"The policy was scored at temperature {policy_scores.temperature} and the reference at "
            f"{ref_scores.temperature}: their KL would compare two different distributions. Score both alike."
        )


_STATISTICS = 5
"""Sum of the KL, tokens, sequences, saturated tokens, largest |log-ratio|."""


def _statistics(per_token: Tensor, log_ratio: Tensor, mask: Tensor) -> Tensor:
    counts = mask.sum(), mask.any(-1).sum(), (saturated(log_ratio) & mask).sum()
    peak = log_ratio.abs().max() if log_ratio.numel() else log_ratio.new_zeros(())
    return torch.stack([x.to(per_token.dtype) for x in (per_token.sum(), *counts, peak)]).to("cpu", torch.float64)


def _merge(window: list[Tensor]) -> Tensor:
    stacked = torch.stack(window)
    return torch.cat([stacked[:, :-1].sum(0), stacked[:, -1:].max(0).values])


def _metrics(stats: Tensor, coef: float) -> dict[str, float]:
    total, tokens, sequences, saturated_tokens, peak = stats.tolist()
    return {
        "kl": total / max(tokens, 1.0),
        "kl/sequence": total / max(sequences, 1.0),
        "kl/max": peak,
        "kl/saturated": saturated_tokens / max(tokens, 1.0),
        "kl/coef": coef,
    }

"""Base class of the GRPO and RLOO trainers: the policy samples completions, and the reference scores them once per
rollout.

TRL's own KL is switched off (beta 0), so that it loads no reference and adds no copy of the adapter. The same function
scores policy, old policy and reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from refkl.backend import dropout_rates
from refkl.backend.adapters import keeping_base
from refkl.config import KLConfig
from refkl.hf.checkpoint_writing import overridden
from refkl.trl.base import settled_sync
from refkl.trl.compat import default_config, no_adapter_of_trl
from refkl.trl.reference_model import ReferenceModel
from refkl.trl.rollout import RolloutScoring, completions
from refkl.trl.scored_model import PolicyScorer, ScoredModel, same_tokens
from refkl.types import KLOutput, TokenBatch, TokenScores

logger = logging.get_logger(__name__)


class OnlineKL(RolloutScoring):
    """The KL of KLGRPOTrainer and KLRLOOTrainer."""

    # Attributes of both trainers:
    beta: float
    ref_model: Any
    use_vllm: bool
    vllm_generation: Any
    placements = ("loss", "reward")
    trl_config: ClassVar[Any]
    """The class of TRL's configuration."""
    _switched_off: ClassVar[dict[str, Any]] = {}
    """Further settings of TRL's configuration while TRL's `__init__` reads it."""
    _beta = 0.0
    """TRL's own coefficient, as the caller gave it."""
    _inputs: dict[str, Any] | None = None
    """During a loss: the micro-batch."""
    _calls: PolicyScorer | None = None
    """During a loss: the policy's scores."""
    _trained: Any = None
    """During a loss: the policy, as TRL wraps it."""

    @contextmanager
    def _settled(self, given: dict[str, Any]) -> Iterator[None]:
        """Switch TRL's own KL off while TRL reads its arguments. Without `args`, they are those that TRL would make."""
        if given["args"] is None:
            given["args"] = default_config(self.trl_config, given["model"])
        config = given["args"]
        self._beta = self._settled_beta(config, self._given.kl)
        self._given.sync = settled_sync(config, self._given.sync)
        self._measures = self._beta != 0.0 or self._given.asks
        with (
            overridden(config, beta=0.0, sync_ref_model=False, **self._switched_off),
            no_adapter_of_trl(given["model"]),
        ):
            yield

    def _penalty(self) -> KLConfig:
        return self._given.kl or self._as_trl(self._beta)

    @property
    def _temperature(self) -> float:
        return self.temperature

    def _attach(self, *args: Any, **kwargs: Any) -> None:
        if self.use_vllm:
            # The sync merges and unmerges a LoRA adapter, which rounds the base that the reference shares.
            self.vllm_generation.sync_weights = keeping_base(self.model, self.vllm_generation.sync_weights)
        super()._attach(*args, **kwargs)
        if self._measures:
            self.ref_model = ReferenceModel(self.reference, prefix=self.scoring.prefix)
            return
        logger.warning(
            f"{type(self).__name__} has beta 0 and no kl=, so no KL is measured and the reference is never scored. "
            "Pass kl=KLConfig(coef=0.0) to measure the KL."
        )

    def _check_settings(self) -> None:
        super()._check_settings()
        if not self.args.disable_dropout and any(dropout_rates(module) for module in self.model.modules()):
            logger.warning(
                "The policy has dropout, which is on while it trains and never in the reference: the KL will not start "
                "at zero. Set disable_dropout=True."
            )

    def _settled_beta(self, config: Any, kl: KLConfig | None) -> float:
        """Return TRL's coefficient.

        Raises:
            ValueError: both it and `kl` ask for a KL.
        """
        own = type(config).__dataclass_fields__["beta"].default
        # A configuration does not distinguish a default from a given value, and RLOO's default is not 0.
        if kl is not None and config.beta not in (0.0, own):
            raise ValueError(
                f"The KL is asked for twice: kl.coef {kl.coef} and TRL's beta {config.beta}. Leave beta at 0 and use "
                "kl=."
            )
        return float(config.beta)

    def _as_trl(self, beta: float) -> KLConfig:
        """Return the penalty for a script that sets TRL's own beta."""
        raise NotImplementedError

    def _differentiates_entropy(self) -> bool:
        """Return True if the entropy is in the loss: its gradient costs one more product with the head's weight."""
        return False

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Score as TRL does, with a stand-in for the policy that refkl scores."""
        of_loss = self._is_of_the_loss(model, input_ids, attention_mask)
        exact = self._exact and of_loss
        calls = PolicyScorer(
            model,
            temperature=self.temperature,
            entropy=(self._differentiates_entropy() or "detached") if compute_entropy else False,
            reference=self.reference if exact else None,
            exact=exact,
            ready=self._ready_hidden(input_ids.shape[1]) if exact else None,
            before=self._measure_exact if of_loss else None,
        )
        found = super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
            ScoredModel(calls, model=model, prefix=self.scoring.prefix),
            input_ids,
            attention_mask,
            logits_to_keep,
            batch_size,
            compute_entropy=compute_entropy,
            compute_aux_loss=compute_aux_loss,
            **inputs,
        )
        if of_loss:
            if not calls.batches:
                raise ValueError(
                    f"{type(self).__name__} scores its policy without calling it as TRL does (labels= and "
                    "fused_lm_head=True), so there are no scores to compute the KL from."
                )
            self._calls = calls
            if self.model.training:
                self.kl_state.last_batch = calls.batches[-1]
            self._scored(found[0])
        return found

    def _is_of_the_loss(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> bool:
        """Return True if this call scores the policy on its micro-batch. A subclass may score other models or
        tokens."""
        if self._inputs is None or self._calls is not None or model is not self._trained:
            return False
        inputs = self._inputs
        own = TokenBatch(
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            completions(inputs),
        )
        return same_tokens(own, input_ids, attention_mask)

    def _scored(self, logp: Tensor) -> None:
        """Handle the policy's log-probabilities [B, C] in a loss, as soon as TRL has them."""

    def _ready_hidden(self, length: int) -> Callable[[TokenBatch], TokenScores] | None:
        """Return the reference's scores with hidden states [B, `length`, …], if the rollout has them."""
        assert self._inputs is not None
        if "reference_hidden" not in self._inputs:
            return None
        inputs = self._inputs = self._present(self._inputs)
        logp, hidden = inputs["ref_per_token_logps"], inputs["reference_hidden"]
        ahead = length - logp.shape[1]
        padded = TokenScores(
            F.pad(logp, (ahead, 0)), hidden=F.pad(hidden, (0, 0, ahead, 0)), temperature=self.temperature
        )
        return lambda batch: padded

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not self._measures:
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
        self._inputs, self._trained = self._to_loss(inputs), model
        try:
            loss = super()._compute_loss(model, self._inputs)  # type: ignore[misc]
            if self._calls is None:
                raise ValueError(
                    f"The loss of {type(self).__name__} did not score the policy on its micro-batch, so there is no KL "
                    "to add. It must call _get_per_token_logps_and_entropies with the model and the tokens that it is "
                    "given."
                )
            return loss + self._of_kl(self._calls, self._inputs)
        finally:
            self._inputs = self._calls = self._trained = None

    def _to_loss(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of TRL's loss. TRL keeps `inputs` itself for the next iteration over the same rollouts."""
        return inputs

    def _of_kl(self, calls: PolicyScorer, inputs: dict[str, Any]) -> Tensor | float:
        """Return the term to add to TRL's loss, after TRL has scored the policy."""
        if self.penalty.config.placement == "reward":
            return 0.0
        keep = inputs["completion_ids"].shape[1]
        policy_logp = torch.cat([scores.logp[:, -keep:] for scores in calls.scores])
        if self._exact:
            divergence = torch.cat([d[:, -keep:] for d in calls.divergences if d is not None])
            ref_logp, old_logp = torch.cat([s.logp[:, -keep:] for s in calls.references]), None
        else:
            divergence = None
            ref_logp, old_logp = self._present(inputs)["ref_per_token_logps"], self._old_logp(inputs, policy_logp)
        output = self._penalise(
            policy_logp,
            ref_logp,
            scored_tokens(inputs),
            self.temperature,
            old_logp=old_logp,
            divergence=divergence,
            normalizer=self._normalizer(inputs),
        )
        assert output.loss is not None
        return output.loss

    def _reward_of(self, logp: Tensor, inputs: dict[str, Any], *, count: bool = True) -> KLOutput:
        """Compute the penalty as a reward, [B, C], from a policy's log-probabilities."""
        ref_logp = self._present(inputs)["ref_per_token_logps"]
        return self._penalise(logp, ref_logp, scored_tokens(inputs), self.temperature, count=count)

    def _old_logp(self, inputs: dict[str, Any], policy_logp: Tensor) -> Tensor | None:
        """Return the denominator [B, C] of the KL estimate's ratio, or None if the estimate uses no ratio."""
        sampled = inputs.get("old_per_token_logps")  # None if it would equal the present policy's
        if self.penalty.config.ratio == "prefix":
            return policy_logp.detach() if sampled is None else sampled
        return sampled if self.penalty.config.gradient == "reverse_kl" else None

    def _normalizer(self, inputs: dict[str, Any]) -> Tensor | None:
        """Return this micro-batch's divisor, so that a step's KL adds up over micro-batches and ranks."""
        if not self.model.training:
            return None
        steps, aggregation = self._accumulated(), self.penalty.config.aggregation
        processes = self.accelerator.num_processes  # gradients are averaged over ranks
        if aggregation == "token-sum":
            return torch.tensor(steps / (self.current_gradient_accumulation_steps * processes))
        if aggregation != "token-mean":
            # Count every row as TRL does, even one masked as truncated: the count is equal on all ranks.
            return torch.tensor(float(inputs["completion_ids"].shape[0] * steps))
        # TRL counts the tokens of the whole generation batch, over all ranks.
        return inputs["num_items_in_batch"].clamp(min=1.0) * steps / self.args.steps_per_generation / processes

    def _accumulated(self) -> int:
        """Return the number of micro-batches to divide a loss by; 1 if the Trainer divides."""
        return self.current_gradient_accumulation_steps


def scored_tokens(inputs: dict[str, Any]) -> Tensor:
    """Return the mask [B, C], 1 = a token that the policy sampled. A tool's output is not sampled."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask

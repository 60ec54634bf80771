"""RLOO with a refkl reference and penalty."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl import RLOOConfig, RLOOTrainer

from refkl.config import KLConfig
from refkl.trl.online import OnlineKL, scored_tokens
from refkl.trl.scored_model import PolicyScorer


class KLRLOOTrainer(OnlineKL, RLOOTrainer):
    """trl.RLOOTrainer with `reference=`, `kl=` and `sync=`; everything else is TRL's.

    If the KL is in the loss, it is added to TRL's loss. If it is in the reward, reward "sequence" subtracts it from the
    completion's reward before the leave-one-out baseline. "return_to_go" and "token" make it an advantage of each
    token, in a second term of the loss, weighted and clipped by that token's ratio; this term has no baseline, and
    `normalize_advantages` does not scale it. In the reward, it is the KL of the policy that sampled, with the reference
    and the coefficient of that time. The log, a controller and `sync.max_kl` get the present policy's KL at each step.

    Besides the extended trainer's arguments, it takes those of `refkl.hf.KLTrainerMixin`. Specific to this trainer:

    Args:
        kl: the penalty. By default TRL's: k1, summed over each completion, subtracted from its reward at coefficient
            `args.beta`. With `beta` 0, no KL is measured, unless `kl`, `reference` or `sync` is given.

    Raises:
        ValueError: `kl` and an `args.beta` other than TRL's default are both given; an option of TRL that refkl does
            not support.
    """

    args: RLOOConfig
    trl_trainer = RLOOTrainer
    trl_config = RLOOConfig
    _sampled: Tensor | None = None
    """During a rollout: [B, C] log-probabilities of the policy that sampled."""
    _taken: dict[str, Tensor] | None = None
    """During a rollout: the reference's scores, if TRL has asked for them."""

    def _as_trl(self, beta: float) -> KLConfig:
        return KLConfig(coef=beta, placement="reward", reward="sequence")

    def _accumulated(self) -> int:
        return 1  # the Trainer divides RLOO's loss

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Make TRL's rollouts. A penalty of whole sequences is subtracted from the rewards where TRL subtracts its
        own."""
        self._sampled = self._taken = None
        with self._penalty_of_trl():
            return super()._generate_and_score_completions(inputs)

    @contextmanager
    def _penalty_of_trl(self) -> Iterator[None]:
        if self.penalty.settled.reward != "sequence" or not self._measures:
            yield
            return
        # TRL then asks for the scores of `ref_model`, and subtracts beta · (log-ratio, summed) from the rewards.
        shown = self.ref_model
        self.ref_model, self.beta = self.reference, self.penalty.coef
        try:
            yield
        finally:
            self.ref_model, self.beta = shown, 0.0

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
        if model is self.reference:
            prompt, completion = slice(None, -logits_to_keep), slice(-logits_to_keep, None)
            tokens = {
                "prompt_ids": input_ids[:, prompt],
                "completion_ids": input_ids[:, completion],
                "prompt_mask": attention_mask[:, prompt],
                "completion_mask": attention_mask[:, completion],
            }
            return self._as_reference_of_trl({**tokens, **inputs}, batch_size), None, None
        found = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss, **inputs
        )
        if self._inputs is None and self._sampled is None and model is self.model:
            self._sampled = found[0]
        return found

    def _as_reference_of_trl(self, rollout: dict[str, Any], batch_size: int | None) -> Tensor:
        """Return [B, C] such that the log-ratio to it, as TRL computes it, is the KL estimate."""
        assert self._sampled is not None, "TRL scores the policy before the reference"
        self._taken = self._reference_scores(rollout, batch_size)
        return self._sampled - self._reward_of(self._sampled, {**rollout, **self._taken}, count=False).per_token

    def _with_reference(self, rollout: dict[str, Any]) -> dict[str, Any]:
        if not self._measures:
            return rollout
        sampled, scored = self._sampled, scored_tokens(rollout)
        if (
            sampled is None
            or sampled.shape != scored.shape
            or not torch.allclose((sampled * scored).sum(1), rollout["old_logps"], rtol=1e-4, atol=1e-3)
        ):
            raise ValueError(
                f"The rollouts of {type(self).__name__} are not of the completions that it has scored, or not in their "
                "order, so refkl cannot assign their KL. Choose or sort completions before super() scores them."
            )
        tokens = self.accelerator.reduce(scored.sum().float(), reduction="sum")
        rollout |= {"old_per_token_logps": sampled, "num_items_in_batch": tokens}
        if self._taken is not None:
            self._metrics["train" if self.model.training else "eval"]["kl"].pop()  # the penalty logs it
            return rollout | self._taken
        rollout = super()._with_reference(rollout)
        if self.penalty.settled.reward not in (None, "sequence"):
            rollout["kl_reward"] = self._reward_of(sampled, rollout, count=False).reward
        return rollout

    def _of_kl(self, calls: PolicyScorer, inputs: dict[str, Any]) -> Tensor | float:
        if self.penalty.config.placement != "reward":
            return super()._of_kl(calls, inputs)
        keep = inputs["completion_ids"].shape[1]
        logp = torch.cat([scores.logp[:, -keep:] for scores in calls.scores])
        self._reward_of(logp.detach(), inputs)  # the present KL, for the log and a controller
        if (reward := inputs.get("kl_reward")) is None or not self.penalty.coef:
            return 0.0
        ratio = torch.exp(logp - inputs["old_per_token_logps"])
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        gain = torch.minimum(ratio * reward, clipped * reward) * scored_tokens(inputs)
        return -gain.sum(-1).mean()

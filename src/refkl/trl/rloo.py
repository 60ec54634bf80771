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
from refkl.trl.views import PolicyView


class KLRLOOTrainer(OnlineKL, RLOOTrainer):
    """trl.RLOOTrainer with `reference=`, `kl=` and `sync=`; all else is TRL's.

    Args:
        reference: "auto", a strategy's name, a ReferenceConfig, or a Reference built from this policy.
        kl: the penalty. By default what TRL does: k1, summed over each completion, taken off its reward at
            coefficient `args.beta` before the leave-one-out baseline. A `kl` in the reward is that too where it is
            rewarded by "sequence"; by "return_to_go" or "token" it is an advantage of each token of its own, weighed
            and clipped by that token's ratio, in a second term of the loss. In the loss it is added to TRL's.
        sync: when the reference moves; by default never, or as `args.sync_ref_model` says.
        resume_reference: on resume, the reference that the checkpoint "recorded", or the "initial" one of this trainer.
        on_checkpoint_error: when a checkpoint cannot be written, as on a full disk, "stop" or "continue".

    Raises:
        ValueError: `kl` and an `args.beta` other than TRL's default are both given; no `args`; an option of TRL's that
            refkl's scorer cannot honour.
    """

    args: RLOOConfig
    trl_trainer = RLOOTrainer
    _sampled: Tensor | None = None
    """In a rollout: [B, C] the log-probabilities of the policy that sampled."""
    _taken: dict[str, Tensor] | None = None
    """In a rollout: the reference's scores, where TRL has asked for them."""

    def _as_trl(self, beta: float) -> KLConfig:
        return KLConfig(coef=beta, placement="reward", reward="sequence")

    def _accumulated(self) -> int:
        return 1  # RLOO's loss is divided by the Trainer

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollouts; a penalty of whole sequences is taken off the rewards where TRL takes its own."""
        with self._penalty_of_trl():
            output = super()._generate_and_score_completions(inputs)
        self._sampled = self._taken = None
        return output

    @contextmanager
    def _penalty_of_trl(self) -> Iterator[None]:
        config = self.penalty.config
        if config.placement != "reward" or config.reward != "sequence":
            yield
            return
        # TRL then asks for the scores of `ref_model`, and takes beta · (log-ratio, summed) off the rewards.
        self.ref_model, self.beta = self.reference, self.penalty.coef
        try:
            yield
        finally:
            self.ref_model, self.beta = None, 0.0

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
        if self._inputs is None:
            self._sampled = found[0]
        return found

    def _as_reference_of_trl(self, rollout: dict[str, Any], batch_size: int | None) -> Tensor:
        """[B, C] such that the log-ratio to it, as TRL computes that, is the KL estimate."""
        assert self._sampled is not None, "TRL scores the policy before the reference"
        self._taken = self._reference_scores(rollout, batch_size)
        return self._sampled - self._reward_of(self._sampled, {**rollout, **self._taken}).per_token

    def _with_reference(self, rollout: dict[str, Any]) -> dict[str, Any]:
        assert self._sampled is not None, "TRL scores the policy in its rollout"
        tokens = self.accelerator.reduce(scored_tokens(rollout).sum().float(), reduction="sum")
        rollout |= {"old_per_token_logps": self._sampled, "num_items_in_batch": tokens}
        if self._taken is not None:
            self._metrics["train" if self.model.training else "eval"]["kl"].pop()  # the penalty logs it
            return rollout | self._taken
        rollout = super()._with_reference(rollout)
        if self.penalty.config.placement == "reward":
            rollout["kl_reward"] = self._reward_of(self._sampled, rollout).reward
        return rollout

    def _of_kl(self, view: PolicyView, inputs: dict[str, Any]) -> Tensor | float:
        if "kl_reward" not in inputs:
            return super()._of_kl(view, inputs)
        reward = inputs["kl_reward"]
        logp = torch.cat([scores.logp[:, -reward.shape[1] :] for scores in view.scores])
        ratio = torch.exp(logp - inputs["old_per_token_logps"])
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        gain = torch.minimum(ratio * reward, clipped * reward) * scored_tokens(inputs)
        return -gain.sum(-1).mean()

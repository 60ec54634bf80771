"""GRPO with a refkl reference and penalty.

TRL's KL is switched off (beta 0), so that it loads no reference and adds no copy of the adapter; refkl scores the
reference once per rollout batch and adds its penalty to TRL's loss. Policy, old policy and reference are scored by the
same function, with positions counted from the attention mask.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from refkl.backend import dropout_rates
from refkl.config import KLConfig, OnCheckpointError, ReferenceConfig, ResumedReference, SyncConfig
from refkl.reference import Reference
from refkl.scoring import score_model
from refkl.trl.checkpoints import overridden
from refkl.trl.common import KLTrainerMixin, settled_sync, trainer_args
from refkl.types import TokenBatch, TokenScores

logger = logging.get_logger(__name__)


class KLGRPOTrainer(KLTrainerMixin, GRPOTrainer):
    """trl.GRPOTrainer with `reference=`, `kl=` and `sync=`; all else is TRL's.

    Args:
        reference: "auto", a strategy's name, a ReferenceConfig, or a Reference built from this policy.
        kl: the penalty. By default k3 with the reverse-KL gradient at coefficient `args.beta` (0 measures only),
            aggregated as TRL does it for `args.loss_type`. Placed in the reward, it is added to the advantages, after
            TRL has scaled them: per token, or ("sequence") the same for all tokens of a completion. It then is the
            KL of the policy that sampled, and takes part in all that `loss_type` does to advantages.
        sync: when the reference moves; by default never, or as `args.sync_ref_model` says.
        resume_reference: on resume, the reference that the checkpoint "recorded", or the "initial" one of this trainer.
        on_checkpoint_error: when a checkpoint cannot be written, as on a full disk, "stop" or "continue".

    Raises:
        ValueError: `kl` and `args.beta` both given; an option of TRL's that refkl's scorer cannot honour; with the KL
            in the reward, one that drops tokens from the loss (top_entropy_quantile, off_policy_mask_threshold).
    """

    args: GRPOConfig
    placements = ("loss", "reward")

    def __init__(
        self,
        *args: Any,
        reference: str | ReferenceConfig | Reference = "auto",
        kl: KLConfig | None = None,
        sync: SyncConfig | None = None,
        resume_reference: ResumedReference = "recorded",
        on_checkpoint_error: OnCheckpointError = "stop",
        **kwargs: Any,
    ) -> None:
        config = trainer_args(GRPOTrainer, args, kwargs, "args")
        beta = 0.0 if config is None else config.beta
        if kl is not None and beta != 0.0:
            raise ValueError(
                f"The KL is asked for twice: kl.coef {kl.coef} and TRL's beta {beta}. Leave beta at 0 and use kl=."
            )
        if config is not None and config.cast_lm_head_to_fp32:
            raise ValueError(
                "cast_lm_head_to_fp32 replaces the policy's head by a function that a reference would share. Load the "
                "policy in float32 instead."
            )
        sync = settled_sync(config, sync)
        with overridden(config, beta=0.0, sync_ref_model=False):
            super().__init__(*args, **kwargs)
        self._policy_logp: Tensor | None = None
        self._rewarded: dict[str, Any] | None = None
        penalty = kl or _as_trl(beta, self.loss_type, self.max_completion_length)
        self._attach(reference, penalty, sync, resume_reference, on_checkpoint_error, self.temperature)
        if not self.args.disable_dropout and any(dropout_rates(module) for module in self.model.modules()):
            logger.warning(
                "The policy has dropout, which is on while it trains and never in the reference: the KL will not start "
                "at zero. Set disable_dropout=True."
            )

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
        """refkl's scorer in the place of TRL's, for the policy and for the policy that sampled."""
        if given := sorted(name for name, value in inputs.items() if value is not None):
            raise ValueError(f"KLGRPOTrainer does not score images and other model inputs yet; it was given {given}.")
        logps, entropies, aux_losses = [], [], []
        # A gradient of the entropy takes one more product with the head's weight.
        entropy: Literal["detached", True] = True if self._entropy_bonus_enabled else "detached"
        forward: dict[str, Any] = {"output_router_logits": True} if compute_aux_loss else {}
        for batch in self._batches(input_ids, attention_mask, logits_to_keep, batch_size):
            with self.accelerator.autocast():
                scored = score_model(
                    model, batch, temperature=self.temperature, entropy=entropy if compute_entropy else False, **forward
                )
            scores = scored.scores
            logps.append(scores.logp[:, -logits_to_keep:])
            if scores.entropy is not None:
                entropies.append(scores.entropy[:, -logits_to_keep:])
            if compute_aux_loss:
                aux_losses.append(scored.outputs.aux_loss)
        self._policy_logp = torch.cat(logps)
        if self.model.training:
            self._last_batch = batch
        if self._rewarded is not None:
            self._add_reward(self._rewarded, self._policy_logp)
        aux_loss = torch.stack(aux_losses).mean() if compute_aux_loss else None
        return self._policy_logp, torch.cat(entropies) if compute_entropy else None, aux_loss

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollouts, and the reference's scores of them."""
        output = super()._generate_and_score_completions(inputs)
        training = self.model.training
        size = self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size
        output["ref_per_token_logps"] = self._reference_logp(output, size)
        output["reference_updates"] = torch.full((output["completion_ids"].shape[0],), self.reference.updates)
        return output

    def _reference_logp(self, rollout: dict[str, Any], batch_size: int | None = None) -> Tensor:
        """[B, C] the reference's log-probabilities of the completions."""
        input_ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)
        attention_mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1)
        keep = rollout["completion_ids"].shape[1]
        batches = self._batches(input_ids, attention_mask, keep, None if self.reference.one_sweep else batch_size)
        with self.reference.several():
            scores: list[TokenScores] = [self.reference.score(b, temperature=self.temperature) for b in batches]
        return torch.cat([s.logp[:, -keep:] for s in scores])

    @staticmethod
    def _batches(
        input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: int | None
    ) -> list[TokenBatch]:
        completion_mask = attention_mask.bool().clone()
        completion_mask[:, :-logits_to_keep] = False
        rows = zip(*(x.split(batch_size or len(x)) for x in (input_ids, attention_mask, completion_mask)), strict=True)
        return [TokenBatch(*tensors) for tensors in rows]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.penalty.config.placement == "reward":
            # TRL scores the policy first and reads the advantages then, by which time they hold the KL. Not in `inputs`
            # itself: TRL keeps that for the next iteration over the same rollouts.
            self._rewarded = dict(inputs)
            try:
                return super()._compute_loss(model, self._rewarded)
            finally:
                self._rewarded = self._policy_logp = None
        loss = super()._compute_loss(model, inputs)
        policy_logp, self._policy_logp = self._policy_logp, None
        assert policy_logp is not None, "TRL scores the policy in its loss"
        output = self._penalise(
            policy_logp,
            self._present_reference_logp(inputs),
            _scored(inputs),
            self.temperature,
            old_logp=self._old_logp(inputs, policy_logp),
            normalizer=self._normalizer(inputs),
        )
        assert output.loss is not None
        return loss + output.loss

    def _check_kl(self, kl: KLConfig) -> None:
        super()._check_kl(kl)
        drops = {
            "top_entropy_quantile": self.top_entropy_quantile < 1.0,
            "off_policy_mask_threshold": self.off_policy_mask_threshold is not None,
        }
        for name, given in drops.items():
            if given and kl.placement == "reward":
                raise ValueError(
                    f"{name} drops tokens from TRL's loss, and the KL of these with them if it is in their reward. Use "
                    f"kl.placement 'loss', or leave {name} out."
                )

    def _add_reward(self, inputs: dict[str, Any], policy_logp: Tensor) -> None:
        """Add the penalty of the policy that sampled to the advantages, which become [B, C]."""
        sampled = inputs.get("old_per_token_logps")  # None where it would be the present policy's
        sampled = policy_logp.detach() if sampled is None else sampled
        reward = self._penalise(sampled, self._present_reference_logp(inputs), _scored(inputs), self.temperature).reward
        assert reward is not None
        if self.penalty.config.reward == "sequence":
            reward = reward.sum(-1, keepdim=True).expand_as(reward)
        advantages = inputs["advantages"]
        inputs["advantages"] = (advantages[:, None] if advantages.dim() == 1 else advantages) + reward

    def _present_reference_logp(self, inputs: dict[str, Any]) -> Tensor:
        """[B, C] the reference's scores of a micro-batch, anew where it has moved: TRL keeps rollouts over steps."""
        if bool((inputs["reference_updates"] == self.reference.updates).all()):
            return inputs["ref_per_token_logps"]
        kept: list[dict[str, Any]] = self._buffered_inputs or []
        if not self.reference.one_sweep or not any(part["prompt_ids"] is inputs["prompt_ids"] for part in kept):
            return self._reference_logp(inputs)
        whole = {name: torch.cat([part[name] for part in kept]) for name in _SEQUENCES}
        scores = self._reference_logp(whole).split([len(part["prompt_ids"]) for part in kept])
        for part, logp in zip(kept, scores, strict=True):
            part["ref_per_token_logps"] = logp
            part["reference_updates"] = torch.full_like(part["reference_updates"], self.reference.updates)
            if part["prompt_ids"] is inputs["prompt_ids"]:
                found = logp
        return found

    def _old_logp(self, inputs: dict[str, Any], policy_logp: Tensor) -> Tensor | None:
        """What the KL estimate's ratio is to, or None where the estimate takes none.

        Differentiated as it stands, k3 has the right gradient only times a ratio that is differentiated too, on-policy
        as well, where the ratio is 1: TRL's use_bias_correction_kl.
        """
        sampled = inputs.get("old_per_token_logps")  # None where it would be the present policy's
        if self.penalty.config.ratio == "prefix":
            return policy_logp.detach() if sampled is None else sampled
        if self.penalty.config.gradient == "reverse_kl":
            return sampled
        if not self.args.use_bias_correction_kl:
            return None
        return policy_logp.detach() if sampled is None else sampled

    def _normalizer(self, inputs: dict[str, Any]) -> Tensor | None:
        """What this micro-batch's KL is divided by: its share of the whole step's tokens or sequences, over ranks."""
        if not self.model.training:
            return None
        steps, aggregation = self.current_gradient_accumulation_steps, self.penalty.config.aggregation
        if aggregation == "token-sum":
            return torch.tensor(1.0 / self.accelerator.num_processes)  # gradients are averaged over ranks
        if aggregation != "token-mean":
            # Every row, as TRL counts, one that was masked as truncated too: the same on each rank and micro-batch.
            return torch.tensor(float(inputs["completion_ids"].shape[0] * steps))
        # TRL counts the tokens of the whole generation batch, over all ranks.
        window = inputs["num_items_in_batch"].clamp(min=1.0) * steps / self.args.steps_per_generation
        return window / self.accelerator.num_processes


_SEQUENCES = ("prompt_ids", "completion_ids", "prompt_mask", "completion_mask")

_TRL_AGGREGATION: dict[str, Any] = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "luspo": "seq-mean-token-sum",
    "dr_grpo": "seq-mean-token-sum-norm",
}
"""How TRL's loss types aggregate the KL; the others take a mean over tokens."""


def _as_trl(beta: float, loss_type: str, max_completion_length: int | None) -> KLConfig:
    """The penalty that a script which sets TRL's own beta asks for."""
    length = max_completion_length if loss_type == "dr_grpo" else None
    return KLConfig(coef=beta, aggregation=_TRL_AGGREGATION.get(loss_type, "token-mean"), length=length)


def _scored(inputs: dict[str, Any]) -> Tensor:
    """[B, C], 1 = a token that the policy sampled; what a tool put in is not."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask

"""GRPO with a refkl reference and penalty."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from refkl.config import KLConfig
from refkl.trl.online import OnlineKL


class KLGRPOTrainer(OnlineKL, GRPOTrainer):
    """trl.GRPOTrainer with `reference=`, `kl=` and `sync=`; everything else is TRL's.

    If the KL is in the reward, it is added to the advantages after TRL has scaled them: per token, or with reward
    "sequence" the same for all tokens of a completion. It is then the KL of the policy that sampled, and `loss_type`
    treats it like any advantage.

    Besides the extended trainer's arguments, it takes those of `refkl.hf.KLTrainerMixin`. Specific to this trainer:

    Args:
        kl: the penalty. By default k3 with the reverse-KL gradient at coefficient `args.beta`, aggregated as TRL does
            for `args.loss_type`. If `args.use_bias_correction_kl` is False, the gradient is "autograd" instead, which
            is not the gradient of the KL. With `beta` 0, no KL is measured and the reference is not scored, unless
            `kl`, `reference` or `sync` is given; pass KLConfig(coef=0.0) to measure it.

    Raises:
        ValueError: `kl` and `args.beta` are both given; an option of TRL that refkl does not support; with the KL in
            the reward, an option that drops tokens from the loss (top_entropy_quantile, off_policy_mask_threshold).
    """

    args: GRPOConfig
    trl_trainer = GRPOTrainer
    trl_config = GRPOConfig
    _switched_off: ClassVar = {"cast_lm_head_to_fp32": False}
    """refkl's products of the output head are in fp32 for any dtype, so the head itself need not be cast."""

    def _as_trl(self, beta: float) -> KLConfig:
        return KLConfig(
            coef=beta,
            gradient="reverse_kl" if self.args.use_bias_correction_kl else "autograd",
            aggregation=TRL_AGGREGATION.get(self.loss_type, "token-mean"),
            length=self.max_completion_length if self.loss_type == "dr_grpo" else None,
        )

    def _check_kl(self, kl: KLConfig) -> None:
        super()._check_kl(kl)
        if kl.placement == "reward":
            owner = next(c for c in type(self).__mro__ if "_compute_loss" in vars(c) and not issubclass(c, OnlineKL))
            if owner is not GRPOTrainer:
                raise ValueError(
                    f"{owner.__name__} has a loss of its own, which may not support advantages per token, but the KL "
                    "in the reward needs them. Use kl.placement 'loss'."
                )
        uncorrected = not self.args.use_bias_correction_kl and kl.placement == "loss" and kl.estimator != "exact"
        if uncorrected and kl.coef and (kl.gradient != "autograd" or kl.ratio == "prefix"):
            raise ValueError(
                "use_bias_correction_kl False leaves out the ratio that gives k3, differentiated as it stands, the "
                f"gradient of KL(policy ‖ reference); with kl.gradient {kl.gradient!r} and kl.ratio {kl.ratio!r} there "
                "is none to leave out. Leave it True, or set kl.gradient 'autograd' and kl.ratio 'token'."
            )
        drops = {
            "top_entropy_quantile": self.top_entropy_quantile < 1.0,
            "off_policy_mask_threshold": self.off_policy_mask_threshold is not None,
        }
        for name, given in drops.items():
            if given and kl.placement == "reward":
                raise ValueError(
                    f"{name} drops tokens from TRL's loss, and with them their KL if it is in the reward. Use "
                    f"kl.placement 'loss', or leave {name} out."
                )

    def _differentiates_entropy(self) -> bool:
        return self._entropy_bonus_enabled

    def _to_loss(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return dict(inputs) if self.penalty.config.placement == "reward" else inputs

    def _scored(self, logp: Tensor) -> None:
        """Add the KL in the reward to the advantages, which become [B, C].

        TRL scores the policy before it reads the advantages, so they hold the KL by then.
        """
        inputs = self._inputs
        if inputs is None or self.penalty.config.placement != "reward":
            return
        sampled = inputs.get("old_per_token_logps")  # None if it would equal the present policy's
        reward = self._reward_of(logp.detach() if sampled is None else sampled, inputs).reward
        assert reward is not None
        if self.penalty.settled.reward == "sequence":
            reward = reward.sum(-1, keepdim=True).expand_as(reward)
        advantages = inputs["advantages"]
        inputs["advantages"] = (advantages[:, None] if advantages.dim() == 1 else advantages) + reward

    def _old_logp(self, inputs: dict[str, Any], policy_logp: Tensor) -> Tensor | None:
        """Return the log-probabilities for the ratio; under "autograd" also on-policy, where the ratio is 1.

        Under "autograd" k3 has the right gradient only if it is multiplied by a ratio that is differentiated too (TRL's
        use_bias_correction_kl).
        """
        found = super()._old_logp(inputs, policy_logp)
        config = self.penalty.config
        if config.gradient == "reverse_kl" or config.ratio == "prefix" or not self.args.use_bias_correction_kl:
            return found
        sampled = inputs.get("old_per_token_logps")
        return policy_logp.detach() if sampled is None else sampled


TRL_AGGREGATION: dict[str, Any] = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "luspo": "seq-mean-token-sum",
    "dr_grpo": "seq-mean-token-sum-norm",
}
"""The aggregation of the KL for TRL's loss types; for any other type, it is a mean over tokens."""

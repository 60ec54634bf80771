"""DPO with a refkl reference."""

from __future__ import annotations

from trl import DPOTrainer

from refkl.trl.preference import PreferenceKL


class KLDPOTrainer(PreferenceKL, DPOTrainer):
    """trl.DPOTrainer with `reference=`, `kl=` and `sync=`; everything else is TRL's, including `beta`.

    It logs `kl`, which DPO does not: the KL estimate on the preference data's completions.

    Args:
        reference: "auto", a strategy's name, a ReferenceConfig, or a Reference built from this policy.
        kl: a penalty added to DPO's loss; by default the KL is only measured.
        sync: when to update the reference (TR-DPO); by default never, or as `args.sync_ref_model` says.
        scoring: whether prompts that rows share run once; by default if that is exact and costs less.
        resume_reference: on resume, "recorded" uses the checkpoint's reference, "initial" the one of this trainer.
        on_checkpoint_error: "stop" or "continue" when a checkpoint cannot be written, as on a full disk.

    Raises:
        ValueError: `ref_model` is given, or an option of TRL that refkl does not support.
    """

    trl_trainer = DPOTrainer

    def _statistics(self) -> tuple[str, ...]:
        weights = ("log_sum_sq_probs",) if self.use_weighting else ()  # WPO's
        return ("mean_logits", "is_top1", *weights)

"""KTO with a refkl reference."""

from __future__ import annotations

from trl import KTOTrainer

from refkl.trl.preference import PreferenceKL


class KLKTOTrainer(PreferenceKL, KTOTrainer):
    """trl.KTOTrainer with `reference=`, `kl=` and `sync=`; everything else is TRL's, including `beta`.

    TRL logs KTO's own `kl`: the mean log-ratio of mismatched completions, per sequence, clamped at 0. refkl logs the KL
    estimate on the data's own completions as `kl/token` and `kl/sequence`.

    Args:
        reference: "auto", a strategy's name, a ReferenceConfig, or a Reference built from this policy.
        kl: a penalty added to KTO's loss; by default the KL is only measured.
        sync: when to update the reference; by default never, or as `args.sync_ref_model` says.
        scoring: whether prompts that rows share run once; by default if that is exact and costs less.
        resume_reference: on resume, "recorded" uses the checkpoint's reference, "initial" the one of this trainer.
        on_checkpoint_error: "stop" or "continue" when a checkpoint cannot be written, as on a full disk.

    Raises:
        ValueError: `ref_model` is given, or an option of TRL that refkl does not support.
    """

    trl_trainer = KTOTrainer
    kl_metric = "kl/token"

    def _statistics(self) -> tuple[str, ...]:
        return ("mean_logits",)

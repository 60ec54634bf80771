"""KTO with a refkl reference."""

from __future__ import annotations

from trl import KTOTrainer

from refkl.trl.preference import PreferenceKL


class KLKTOTrainer(PreferenceKL, KTOTrainer):
    """trl.KTOTrainer with `reference=`, `kl=` and `sync=`; everything else is TRL's, including `beta`.

    `ref_model`, `precompute_ref_log_probs` and `trainer.ref_model` are as in KLDPOTrainer.

    TRL logs KTO's own `kl`: the mean log-ratio of mismatched completions, per sequence, clamped at 0. refkl logs the KL
    estimate on the data's own completions as `kl/token` and `kl/sequence`.

    Besides the extended trainer's arguments, it takes those of `refkl.hf.KLTrainerMixin`. Specific to this trainer:

    Args:
        kl: a penalty added to KTO's loss; by default the KL is only measured.

    Raises:
        ValueError: `ref_model` cannot be the reference, or `reference` asks for other weights too; an option of TRL
            that refkl does not support.
    """

    trl_trainer = KTOTrainer
    kl_metric = "kl/token"

    def _statistics(self) -> tuple[str, ...]:
        return ("mean_logits",)

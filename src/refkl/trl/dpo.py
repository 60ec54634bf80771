"""DPO with a refkl reference."""

from __future__ import annotations

from trl import DPOTrainer

from refkl.trl.preference import PreferenceKL


class KLDPOTrainer(PreferenceKL, DPOTrainer):
    """trl.DPOTrainer with `reference=`, `kl=` and `sync=`; everything else is TRL's, including `beta`.

    It also logs `kl`, which DPO does not: the KL estimate on the completions of the preference data.

    Besides the extended trainer's arguments, it takes those of `refkl.hf.KLTrainerMixin`. Specific to this trainer:

    Args:
        kl: a penalty added to DPO's loss; by default the KL is only measured.

    Raises:
        ValueError: `ref_model` is given, or an option of TRL that refkl does not support.
    """

    trl_trainer = DPOTrainer

    def _statistics(self) -> tuple[str, ...]:
        weights = ("log_sum_sq_probs",) if self.use_weighting else ()  # WPO's
        return ("mean_logits", "is_top1", *weights)

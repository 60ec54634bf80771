"""DPO with a refkl reference."""

from __future__ import annotations

from trl import DPOTrainer

from refkl.trl.preference import PreferenceKL


class KLDPOTrainer(PreferenceKL, DPOTrainer):
    """trl.DPOTrainer with `reference=`, `kl=` and `sync=`; everything else is TRL's, including `beta`.

    A `ref_model` is the reference as it is: a model, or the name of its folder. With `precompute_ref_log_probs`, the
    reference scores the data when training begins, into a cache in the output folder (`reference.cache`). It is then
    freed where TRL frees it: for a full policy, unless `ref_model` or a Reference is given. `trainer.ref_model` is a
    ReferenceModel: the reference, called like a model.

    It also logs `kl`, which DPO does not: the KL estimate on the completions of the preference data.

    Besides the extended trainer's arguments, it takes those of `refkl.hf.KLTrainerMixin`. Specific to this trainer:

    Args:
        kl: a penalty added to DPO's loss; by default the KL is only measured.

    Raises:
        ValueError: `ref_model` cannot be the reference, or `reference` asks for other weights too; an option of TRL
            that refkl does not support.
    """

    trl_trainer = DPOTrainer

    def _statistics(self) -> tuple[str, ...]:
        weights = ("log_sum_sq_probs",) if self.use_weighting else ()  # WPO's
        return ("mean_logits", "is_top1", *weights)

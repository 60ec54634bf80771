"""DPO with a refkl reference."""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

import trl.trainer.dpo_trainer as trl_dpo
from trl import DPOTrainer

from refkl.trl.preference import PreferenceKL


class KLDPOTrainer(PreferenceKL, DPOTrainer):
    """trl.DPOTrainer with `reference=`, `kl=` and `sync=`; all else is TRL's, `beta` included.

    It logs `kl`, which DPO itself never shows: the KL estimate on the preference data's completions.

    Args:
        reference: "auto", a strategy's name, a ReferenceConfig, or a Reference built from this policy.
        kl: a penalty added to DPO's loss; by default none, only measured.
        sync: when the reference moves (TR-DPO); by default never, or as `args.sync_ref_model` says.
        scoring: whether prompts that rows share are run once; by default where that is exact and costs less.
        resume_reference: on resume, the reference that the checkpoint "recorded", or the "initial" one of this trainer.
        on_checkpoint_error: when a checkpoint cannot be written, as on a full disk, "stop" or "continue".

    Raises:
        ValueError: `ref_model` is given, or an option of TRL's that refkl cannot honour.
    """

    trl_trainer = DPOTrainer
    trl_module: ClassVar[ModuleType] = trl_dpo

    def _statistics(self) -> tuple[str, ...]:
        weights = ("log_sum_sq_probs",) if self.use_weighting else ()  # WPO's
        return ("mean_logits", "is_top1", *weights)

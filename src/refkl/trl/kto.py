"""KTO with a refkl reference."""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

import trl.trainer.kto_trainer as trl_kto
from trl import KTOTrainer

from refkl.trl.preference import PreferenceKL


class KLKTOTrainer(PreferenceKL, KTOTrainer):
    """trl.KTOTrainer with `reference=`, `kl=` and `sync=`; all else is TRL's, `beta` included.

    TRL logs as `kl` what KTO calls so: the mean log-ratio of mismatched completions, per sequence, clamped at 0. The KL
    estimate on the data's own completions is logged as `kl/token` and `kl/sequence`.

    Args:
        reference: "auto", a strategy's name, a ReferenceConfig, or a Reference built from this policy.
        kl: a penalty added to KTO's loss; by default none, only measured.
        sync: when the reference moves; by default never, or as `args.sync_ref_model` says.
        scoring: whether prompts that rows share are run once; by default where that is exact and costs less.
        resume_reference: on resume, the reference that the checkpoint "recorded", or the "initial" one of this trainer.
        on_checkpoint_error: when a checkpoint cannot be written, as on a full disk, "stop" or "continue".

    Raises:
        ValueError: `ref_model` is given, or an option of TRL's that refkl cannot honour.
    """

    trl_trainer = KTOTrainer
    trl_module: ClassVar[ModuleType] = trl_kto
    kl_metric = "kl/token"

    def _statistics(self) -> tuple[str, ...]:
        return ("mean_logits",)

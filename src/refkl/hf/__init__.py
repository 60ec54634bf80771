"""transformers' Trainer with a refkl reference: KL-regularised supervised fine-tuning. Does not import trl.

    from refkl.hf import KLTrainer             # instead of: from transformers import Trainer

coef · KL(policy ‖ reference) is added to the Trainer's own loss.
"""

from refkl.hf.compat import check_transformers

check_transformers()

from refkl.hf.supervised import KLTrainer, with_reference  # noqa: E402
from refkl.hf.trainer_mixin import KLTrainerMixin  # noqa: E402

__all__ = ["KLTrainer", "KLTrainerMixin", "with_reference"]

"""transformers' Trainer with a refkl reference: KL-regularised supervised fine-tuning. Does not import trl.

    from refkl.hf import KLTrainer             # instead of: from transformers import Trainer

coef · KL(policy ‖ reference) is added to the Trainer's own loss.
"""

from refkl.hf.supervised import KLTrainer, with_reference

__all__ = ["KLTrainer", "with_reference"]

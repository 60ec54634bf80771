"""transformers' Trainer with a refkl reference: supervised fine-tuning on a KL leash. Imports no trl.

    from refkl.hf import KLTrainer             # instead of: from transformers import Trainer

The Trainer's loss stays as it is; coef · KL(policy ‖ reference) is added to it.
"""

from refkl.hf.supervised import KLTrainer, with_reference

__all__ = ["KLTrainer", "with_reference"]

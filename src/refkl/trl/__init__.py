"""TRL's trainers with a refkl reference. Only this package imports trl.

    from refkl.trl import KLGRPOTrainer        # instead of: from trl import GRPOTrainer

TRL's loop, generation, logging and arguments stay the same. refkl provides the reference and the KL, and scores policy
and reference with one function.
"""

from refkl.trl.compat import TESTED, check_trl

check_trl()

from refkl.trl.dpo import KLDPOTrainer  # noqa: E402
from refkl.trl.grpo import KLGRPOTrainer  # noqa: E402
from refkl.trl.kto import KLKTOTrainer  # noqa: E402
from refkl.trl.reference_model import ReferenceModel  # noqa: E402
from refkl.trl.rloo import KLRLOOTrainer  # noqa: E402
from refkl.trl.sft import KLSFTTrainer  # noqa: E402
from refkl.trl.subclasses import with_reference  # noqa: E402

__all__ = [
    "TESTED",
    "KLDPOTrainer",
    "KLGRPOTrainer",
    "KLKTOTrainer",
    "KLRLOOTrainer",
    "KLSFTTrainer",
    "ReferenceModel",
    "with_reference",
]

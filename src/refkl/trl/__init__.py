"""TRL's trainers with a refkl reference: the only place that imports trl.

    from refkl.trl import KLGRPOTrainer        # instead of: from trl import GRPOTrainer

TRL's loop, generation, logging and arguments stay as they are. What changes is where the reference comes from, which
KL is added, and that policy and reference are scored by one function.
"""

from refkl.trl.compat import TESTED, check_trl

check_trl()

from refkl.trl.dpo import KLDPOTrainer  # noqa: E402
from refkl.trl.grpo import KLGRPOTrainer  # noqa: E402
from refkl.trl.kto import KLKTOTrainer  # noqa: E402
from refkl.trl.rloo import KLRLOOTrainer  # noqa: E402
from refkl.trl.sft import KLSFTTrainer  # noqa: E402
from refkl.trl.subclasses import with_reference  # noqa: E402

__all__ = ["TESTED", "KLDPOTrainer", "KLGRPOTrainer", "KLKTOTrainer", "KLRLOOTrainer", "KLSFTTrainer", "with_reference"]

"""TRL's trainers with a refkl reference: the only place that imports trl.

    from refkl.trl import KLGRPOTrainer        # instead of: from trl import GRPOTrainer

TRL's loop, generation, logging and arguments stay as they are. What changes is where the reference comes from, which
KL is added, and that policy and reference are scored by one function.
"""

from importlib.metadata import version

TESTED = ("1.16", "1.17")
"""From the first, below the second: TRL's internals move between minor versions."""

_installed = version("trl")
if not TESTED[0] <= ".".join(_installed.split(".")[:2]) < TESTED[1]:
    raise ImportError(
        f"refkl.trl was tested with trl >={TESTED[0]},<{TESTED[1]} and found {_installed}, whose trainers may differ "
        f"where refkl joins them. Install 'trl>={TESTED[0]},<{TESTED[1]}', or use refkl without its TRL plugin."
    )

from refkl.trl.dpo import KLDPOTrainer  # noqa: E402
from refkl.trl.grpo import KLGRPOTrainer  # noqa: E402
from refkl.trl.kto import KLKTOTrainer  # noqa: E402
from refkl.trl.rloo import KLRLOOTrainer  # noqa: E402
from refkl.trl.subclasses import with_reference  # noqa: E402

__all__ = ["KLDPOTrainer", "KLGRPOTrainer", "KLKTOTrainer", "KLRLOOTrainer", "with_reference"]

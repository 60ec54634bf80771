"""`refkl` under FSDP2 on a CPU, which accelerate does not select there: it is told that the processes are GPUs'.

accelerate launch --config_file launch/accelerate/fsdp2.yaml tests/scripts/train_fsdp2.py train CONFIG.yaml ...
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

from refkl.cli import main

made = PartialState.__init__


def called_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
    made(self, *args, **kwargs)
    if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = called_gpus
    sys.exit(main())

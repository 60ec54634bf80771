"""Detection of another rank's failure."""

from __future__ import annotations

import re

import torch.distributed as dist

_GONE = re.compile(
    r"gloo.*(closed by peer|connection reset|broken pipe|timed out|timeout)"
    r"|(connection closed by peer|connection reset by peer|socket timeout|nccl.*abort|remote process exited)",
    re.IGNORECASE | re.DOTALL,
)


def peer_gone(error: BaseException) -> bool:
    """Return True if the error is one that a collective raises when a rank is gone or no longer answers."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return False
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, dist.DistError) or (isinstance(found, RuntimeError) and _GONE.search(str(found))):
            return True
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return False

"""Fill a cache of scores, in a process that shares it with others.

python tests/scripts/cached_fill.py CACHE MODEL FIRST LAST [killed]

Scores the batches with seeds FIRST to LAST - 1, with a file for each; says how many rows it scored and how many it
found. With "killed" it is killed where a file would get its name.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from support.models import batch
from transformers import LlamaForCausalLM

from refkl import ReferenceConfig, build_reference
from refkl.reference.cached import score_files as store


def main() -> None:
    cache, model, first, last = sys.argv[1:5]
    if sys.argv[5:]:
        Path.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    store.WRITE_SECONDS = store.SCAN_SECONDS = 0.0
    reference = build_reference(LlamaForCausalLM.from_pretrained(model), ReferenceConfig(strategy="clone", cache=cache))
    stats = reference.fill(batch(seed=seed) for seed in range(int(first), int(last)))
    print(f"scored {stats.misses}, found {stats.hits}")


if __name__ == "__main__":
    main()

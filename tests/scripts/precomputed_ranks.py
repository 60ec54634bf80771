"""precompute_ref_log_probs on two processes: the losses are those without it.

accelerate launch --config_file launch/accelerate/LAUNCH.yaml [FLAGS] tests/scripts/precomputed_ranks.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from support.models import llama
from support.trl_runs import LABELLED, PAIRS, dpo, kto, logged

from refkl import ScoringConfig
from refkl.trl import KLDPOTrainer, KLKTOTrainer

FOLDER = Path(sys.argv[1])


def main() -> None:
    state = PartialState(cpu=True)
    for make, cls, data in ((dpo, KLDPOTrainer, PAIRS), (kto, KLKTOTrainer, LABELLED)):
        # Odd numbers of rows: ranks have different ones, and the last batches are not full.
        rows: dict[str, Any] = {"train_dataset": data.select(range(13)), "eval_dataset": data.select(range(13, 16))}
        runs = []
        for precompute in (False, True):
            torch.manual_seed(3)
            options = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 4, "per_device_train_batch_size": 2}
            options |= {"eval_strategy": "steps", "eval_steps": 2, "precompute_ref_log_probs": precompute}
            folder = FOLDER / f"{cls.__name__} {precompute}"
            trainer = make(cls, llama(), folder, options, scoring=ScoringConfig(prefix="off"), **rows)
            trainer.train()
            runs.append([logged(trainer, name) for name in ("loss", "eval_loss", trainer.kl_metric)])
            stats = trainer.reference.cache.stats if precompute else None
            if stats is not None:
                assert trainer.reference.freed and stats.hits > 0, stats
        for mine, expected in zip(runs[1], runs[0], strict=True):
            assert mine == pytest.approx(expected, abs=1e-6), (cls, runs)
        assert len(set(runs[0][0])) > 2 and len(runs[0][1]) == 2
    print(f"rank {state.process_index} agrees", flush=True)


if __name__ == "__main__":
    main()

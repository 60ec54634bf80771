"""A cache of scores on two processes, where a score is collective or not: ranks must not part ways.

accelerate launch --config_file launch/accelerate/LAUNCH.yaml [FLAGS] tests/scripts/cached_ranks.py \
    BACKEND STRATEGY FOLDER

BACKEND: multi, zero3, or fsdp2 (launched as multi). FOLDER has the model; the cache is made in it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from contract_run import Run
from support.models import batch

from refkl import ReferenceConfig, build_reference
from refkl.reference import score as base

BACKEND, STRATEGY, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])


def main() -> None:
    from accelerate import Accelerator, PartialState

    PartialState(cpu=not torch.accelerator.is_available())
    accelerator = Accelerator()
    if BACKEND == "zero3":
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 3
    case = Run(BACKEND, STRATEGY, "full", "after", FOLDER).make_case(accelerator)
    config = ReferenceConfig(strategy=STRATEGY, cache=str(FOLDER / "cache"))
    reference = build_reference(case.policy, config, accelerator)
    rank, sharded = accelerator.process_index, BACKEND != "multi"
    forwards = []
    score_model = base.score_model
    base.score_model = lambda *args, **kwargs: forwards.append(1) or score_model(*args, **kwargs)

    def check(seeds: tuple[int, int], ran: tuple[int, int]) -> None:
        """Each rank scores the batch of its seed; so many forwards are made on each."""
        forwards.clear()
        tokens = batch(seed=seeds[rank])
        found = reference.score(tokens).logp
        torch.testing.assert_close(found, case.expected(tokens), rtol=0, atol=2e-6)
        assert len(forwards) == ran[rank], (BACKEND, seeds, forwards)

    check((0, 1), (1, 1))
    check((0, 1), (0, 0))
    check((0, 2), (1, 1) if sharded else (0, 1))  # rank 0 knows its rows, and runs because rank 1 must
    reference.update(case.policy)  # the same weights, so the same key, but it has to be found out by all together
    check((0, 1), (0, 0))
    case.train()
    reference.update(case.policy)
    case.plain = None  # the reference has moved away from it
    forwards.clear()
    reference.score(batch(seed=rank))
    assert len(forwards) == 1
    reference.uncached.updates = 0  # only to go on with the rest
    dist.barrier()  # or the first to fill scores what the other is still to ask for
    # As many batches as a rank has: 3 and 1. Then both can ask for what either filled.
    stats = reference.fill([batch(seed=10 * rank + n) for n in range(3 - 2 * rank)], free=True)
    assert reference.freed and reference.memory().total == 0, reference.memory()
    forwards.clear()
    for seed in (0, 1, 2, 10):
        reference.score(batch(seed=seed))
    assert not forwards
    with pytest.raises(ValueError, match="weights were freed"):
        reference.score(batch(seed=99))
    dist.barrier()
    print(f"rank {rank} agrees: {stats}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()

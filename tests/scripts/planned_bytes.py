"""What a sharded reference takes on a rank, by plan from the configuration alone and by counting storages.

accelerate launch --config_file launch/accelerate/zero3.yaml --gradient_accumulation_steps 1 \
    --gradient_clipping 1.0 tests/scripts/planned_bytes.py zero3
accelerate launch --config_file launch/accelerate/multi.yaml tests/scripts/planned_bytes.py fsdp2
"""

import sys
import time
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from support.models import MODELS, batch, llama
from support.storages import SIZES, counting
from torch import nn
from torch.distributed.fsdp import fully_shard

from refkl import ReferenceConfig, build_reference
from refkl.backend import reshard, unwrap
from refkl.backend.zero import release
from refkl.planner import Plan, PlanConfig, make_plans


def shard(policy: Any) -> nn.Module:
    for layer in policy.model.layers if hasattr(policy, "model") else policy.transformer.h:
        fully_shard(layer)
    return fully_shard(policy)


def settle(policy: nn.Module) -> None:
    """Drop what a forward of the policy left gathered: that is the policy's."""
    inner = unwrap(policy)
    reshard(inner)
    release(inner.parameters())


def plans(backend: str) -> dict[tuple[str, str], Plan]:
    """Before there is an accelerator: ZeRO-3 would partition the planned models."""
    found = {}
    for family, sizes in SIZES.items():
        for size, overrides in sizes.items():
            model = MODELS[family](**overrides).config
            config = PlanConfig(model=model, method="full", backend=backend, world_size=2, dtype="float32")
            found[family, size] = make_plans(config)[0]
    return found


def main() -> None:
    backend = sys.argv[1]
    planned = plans(backend)
    PartialState(cpu=not torch.accelerator.is_available())
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    if backend == "zero3":
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 3
    build_reference(llama(), "swap", accelerator)  # the keys of fingerprints are made once a process
    for (family, size), plan in planned.items():
        for strategy, offload in ((backend, False), (backend, True), ("swap", False)):
            bare = MODELS[family](**SIZES[family][size])
            if backend == "zero3":
                policy = accelerator.prepare(bare, torch.optim.SGD(bare.parameters(), lr=0.1))[0]
            else:
                policy = shard(bare)
            with torch.no_grad():
                policy(input_ids=batch().input_ids)
            settle(policy)
            with counting(policy) as count:
                reference = build_reference(policy, ReferenceConfig(strategy=strategy, offload=offload), accelerator)
                reference.score(batch())
                settle(policy)
                time.sleep(0.3)  # a collective's thread lets go of its buffers a moment later, on a busy machine
                counted = count()
            option, name = ("offload=true", f"{strategy} offload") if offload else ("", strategy)
            predicted = next(r for r in plan.rows if (r.strategy, r.option) == (strategy, option)).cost.total
            accelerator.print(f"{family} {size} full {name}: {predicted} predicted, {counted} counted", flush=True)
            del reference, count, policy
            accelerator.free_memory()


if __name__ == "__main__":
    main()

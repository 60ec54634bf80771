"""The contract of a strategy, for `zero3` on two processes.

accelerate launch --config_file launch/accelerate/zero3.yaml --gradient_accumulation_steps 1 \
    --gradient_clipping 1.0 tests/scripts/zero3_contract.py FOLDER
"""

import sys
from pathlib import Path

import deepspeed
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from contract import CHECKS, Case, plain_copy
from torch import Tensor
from transformers import LlamaForCausalLM

from refkl import build_reference
from refkl.backend.zero import full_shape


def make_case(accelerator: Accelerator, folder: Path) -> Case:
    # The policy's own parameters persist gathered (as they do by default when small): the reference's must not.
    policy = LlamaForCausalLM.from_pretrained(folder / "model")
    with deepspeed.zero.Init(enabled=False):
        whole = LlamaForCausalLM(policy.config)
    whole.load_state_dict(_state(folder))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    reference = build_reference(policy, "auto", accelerator=accelerator)
    assert reference.strategy == "zero3", reference.strategy
    engine, optimizer = accelerator.prepare(policy, optimizer)

    def step(loss: Tensor) -> None:
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return Case(engine, reference, plain_copy(whole), step, True, folder)


def _state(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def main() -> None:
    folder = Path(sys.argv[1])
    PartialState(
        cpu=not torch.accelerator.is_available()
    )  # as transformers' use_cpu does; Accelerator() alone would not
    accelerator = Accelerator()
    assert accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.num_processes == 2
    accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 3
    for check in CHECKS:
        case = make_case(accelerator, folder)
        check(case)
        accelerator.print(f"passed {check.__name__}", flush=True)
        held = case.reference.memory().total
        whole = sum(full_shape(p).numel() * p.element_size() for p in case.reference.model.parameters())
        accelerator.free_memory()
    buffers = sum(b.numel() * b.element_size() for b in case.reference.model.buffers())
    # Partitions are padded to a multiple of the ranks: a few elements for each parameter.
    accelerator.print(f"each rank holds half: {whole / 2 <= held - buffers <= whole / 2 + 16 * 64}")
    accelerator.end_training()


if __name__ == "__main__":
    main()

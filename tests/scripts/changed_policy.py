"""Under ZeRO-3, a policy that was changed after loading: refused, unless the weights on disk are asked for.

accelerate launch --config_file launch/accelerate/zero3.yaml --gradient_accumulation_steps 1 \
    --gradient_clipping 1.0 tests/scripts/changed_policy.py FOLDER
"""

import sys

import torch
from accelerate import Accelerator, PartialState
from transformers import AutoModelForCausalLM

from refkl import ReferenceConfig, build_reference
from refkl.backend import gathered


def main() -> None:
    PartialState(cpu=not torch.accelerator.is_available())
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    policy = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    weight = policy.model.layers[1].mlp.up_proj.weight
    # The last element: it lies in the last rank's part alone, and every rank must come to the same verdict.
    with gathered([weight], write=True), torch.no_grad():
        if accelerator.is_main_process:
            weight[-1, -1] += 0.01
    try:
        build_reference(policy, accelerator=accelerator)
    except ValueError as error:
        accelerator.print(f"refused: {error}")
    reference = build_reference(policy, ReferenceConfig(source="pretrained"), accelerator=accelerator)
    accelerator.print(f"taken when asked for: {reference.strategy == 'zero3'}")
    try:
        build_reference(policy, ReferenceConfig(strategy="clone", source="pretrained"), accelerator=accelerator)
    except ValueError as error:
        accelerator.print(f"clone refused: {error}")
    accelerator.end_training()


if __name__ == "__main__":
    main()

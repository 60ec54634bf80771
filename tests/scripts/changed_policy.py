"""Under ZeRO-3 and ZeRO-2, the reference is the policy in memory, also where that is not what is on disk.

accelerate launch --config_file launch/accelerate/zero3.yaml --gradient_accumulation_steps 1 \
    --gradient_clipping 1.0 tests/scripts/changed_policy.py FOLDER
"""

import sys

import torch
from accelerate import Accelerator, PartialState
from support.models import batch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from refkl import ReferenceConfig, build_reference, score_tokens
from refkl.backend import gathered


def main() -> None:
    PartialState(cpu=not torch.accelerator.is_available())
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 3
    say = accelerator.print
    policy = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    weight = policy.model.layers[1].mlp.up_proj.weight
    # The last elements: they lie in the last rank's part alone.
    with gathered([weight], write=True), torch.no_grad():
        if accelerator.is_main_process or not hasattr(weight, "ds_id"):
            weight[-1] += 0.5
    strategy = ReferenceConfig(strategy="zero3")
    reference = build_reference(policy, strategy, accelerator=accelerator)
    on_disk = build_reference(policy, ReferenceConfig(strategy="zero3", source="pretrained"), accelerator=accelerator)
    try:
        build_reference(policy, ReferenceConfig(strategy="clone", source="pretrained"), accelerator=accelerator)
        say("clone taken")
    except ValueError as error:
        say(f"clone refused: {error}")
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    engine, optimizer = accelerator.prepare(policy, optimizer)
    with torch.no_grad():
        now = score_tokens(engine, batch()).logp
    say(f"as in memory: {torch.equal(reference.score(batch()).logp, now)}")
    say(f"as on disk, when asked for: {not torch.allclose(on_disk.score(batch()).logp, now, atol=1e-3)}")
    after = build_reference(engine, strategy, accelerator=accelerator)
    say(f"built after prepare, the same: {after.fingerprint() == reference.fingerprint()}")
    accelerator.backward(score_tokens(engine, batch()).logp.sum())
    optimizer.step()
    optimizer.zero_grad()
    reference.update(engine)
    with torch.no_grad():
        trained = score_tokens(engine, batch()).logp
    moved = reference.score(batch()).logp
    say(f"moved to the policy: {torch.equal(moved, trained) and not torch.allclose(moved, now, atol=1e-3)}")
    parameters = list(reference.model.parameters())  # type: ignore[attr-defined]
    whole = sum(p.ds_numel * p.element_size() for p in parameters)
    say(f"holds {reference.memory().total / whole:.2f} of it")

    config = LlamaConfig.from_pretrained(sys.argv[1])
    torch.manual_seed(accelerator.process_index * 0)
    made = LlamaForCausalLM(config)
    made.config._name_or_path = ""
    reference = build_reference(made, strategy, accelerator=accelerator)
    say(f"a policy from a config: {reference.source}")
    try:
        made.model.layers[0].mlp.forward = lambda x: x
        build_reference(made, strategy, accelerator=accelerator)
    except ValueError as error:
        say(f"patched refused: {error}")
    accelerator.end_training()


if __name__ == "__main__":
    main()

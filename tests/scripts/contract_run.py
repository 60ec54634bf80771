"""The contract of a strategy on two processes, under the backend that it is launched with.

accelerate launch --config_file launch/accelerate/BACKEND.yaml [FLAGS] tests/scripts/contract_run.py \
    BACKEND STRATEGY POLICY WHEN FOLDER

BACKEND: multi, zero2, zero3; launched as multi, fsdp2 (torch's fully_shard by hand) and fsdp2-accelerate, which
accelerate does not run on a CPU unless it is told that this is none. A suffix -bf16 or -offload sets FSDP's policies.
STRATEGY: a name in STRATEGIES, "auto", "NAME:DEVICE", "NAME:offload" or "NAME:QUANTIZE".
POLICY: full, upper (all above a frozen layer), lora (trained before), fresh (a new LoRA), base (as lora, with
reference.source "base"), prompt (tuning, trained before).
WHEN: before, after (accelerator.prepare).
FOLDER has the model that the policy starts from.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from support.contract import CHECKS, STEPPING, Case, plain_copy
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from transformers import LlamaForCausalLM

from refkl import ReferenceConfig, build_reference, freeze, trainable_parameters
from refkl.backend import base_model, layout_of, unwrap
from refkl.reference.quantized.layers import FORMATS

LR = 0.05


@dataclass
class Run:
    backend: str
    strategy: str
    policy: str
    when: str
    folder: Path

    def make_policy(self) -> nn.Module:
        """Loaded as a user does; under ZeRO-3 each rank gets its part. With "lora", an adapter that was trained."""
        torch.manual_seed(0)
        base = LlamaForCausalLM.from_pretrained(self.folder / "model")
        if self.policy in ("full", "upper"):
            freeze(base, [] if self.policy == "full" else ["model.embed_tokens", "model.layers.0"])
            return base
        config: PeftConfig = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
        if self.policy == "prompt":
            config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        torch.manual_seed(0)
        model = get_peft_model(base, config)
        if self.policy == "fresh":
            return model.eval()
        with _gathered(model):
            torch.manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_" in name or "prompt_encoder" in name:
                    nn.init.normal_(parameter, std=0.5)
        return model.eval()

    def shard(self, policy: nn.Module) -> nn.Module:
        options: dict[str, Any] = {}
        if "bf16" in self.backend:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        if "offload" in self.backend:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        for layer in base_model(policy).model.layers:
            fully_shard(layer, **options)
        return fully_shard(policy, **options)

    def make_case(self, accelerator: Accelerator) -> Case:
        with _not_partitioned(self.backend):
            plain, start = plain_copy(self.make_policy()), None
            if self.policy in ("base", "prompt"):
                plain, start = LlamaForCausalLM.from_pretrained(self.folder / "model").requires_grad_(False), plain
            if "bf16" in self.backend:  # nothing but FSDP rounds as it does
                self.shard(plain)
        policy = self.make_policy()
        optimizer = torch.optim.SGD(trainable_parameters(policy), lr=LR)
        name, _, option = self.strategy.partition(":")
        options: dict[str, Any] = {"device": option or None}
        if option == "offload":
            options = {"offload": True}
        elif option in FORMATS:
            options = {"quantize": option, "max_kl_floor": 1.0}
        source = "base" if self.policy == "base" else "policy"
        config = ReferenceConfig(strategy=name, source=source, **options)
        reference = None
        if self.when == "before":
            reference = build_reference(policy, config, accelerator)
        if self.backend.startswith("fsdp2") and "accelerate" not in self.backend:
            wrapped = self.shard(policy)
            optimizer = torch.optim.SGD(trainable_parameters(policy), lr=LR)
        else:
            wrapped, optimizer = accelerator.prepare(policy, optimizer)
        if reference is None:
            reference = build_reference(wrapped, config, accelerator)
        if name != "auto":
            assert reference.strategy == name

        def step(loss: Tensor) -> None:
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

        rounded = option in FORMATS
        moves = self.policy != "prompt"
        rounding = 0.1 if rounded else 0.0
        return Case(wrapped, reference, plain, step, moves, self.folder, LR, start, rounding)


def held_share(case: Case) -> float:
    """Bytes that the reference adds on this rank, over those of what trains of the policy."""
    trained = [p for p in unwrap(case.policy).parameters() if p.requires_grad]
    whole = sum(layout_of(p).shape.numel() * p.element_size() for p in trained)
    return case.reference.memory().total / whole


@contextlib.contextmanager
def _not_partitioned(backend: str) -> Iterator[None]:
    if backend != "zero3":
        yield
        return
    import transformers.integrations.deepspeed as integration

    kept, integration._hf_deepspeed_config_weak_ref = integration._hf_deepspeed_config_weak_ref, None
    try:
        import deepspeed

        with deepspeed.zero.Init(enabled=False):
            yield
    finally:
        integration._hf_deepspeed_config_weak_ref = kept


@contextlib.contextmanager
def _gathered(model: nn.Module) -> Iterator[None]:
    sharded = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0):
        yield


def main() -> None:
    backend, strategy, policy, when, folder = sys.argv[1:]
    run = Run(backend, strategy, policy, when, Path(folder))
    # As transformers' use_cpu does; Accelerator() alone would not.
    PartialState(cpu=not torch.accelerator.is_available())
    plugin = None
    if backend == "fsdp2-accelerate":
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
    accelerator = Accelerator(fsdp_plugin=plugin)
    assert accelerator.num_processes == 2, accelerator.num_processes
    if backend.startswith("zero"):
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 3
    strategies = set()
    unfit = STEPPING if "bf16" in backend else ()
    for check in CHECKS:
        if check.__name__ in unfit:
            continue
        case = run.make_case(accelerator)
        strategies.add(case.reference.strategy)  # one that moves may become another
        check(case)
        accelerator.print(f"passed {check.__name__}", flush=True)
        share = held_share(case)
        accelerator.free_memory()
    accelerator.print(f"strategies: {sorted(strategies)}; share of what trains: {share:.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()

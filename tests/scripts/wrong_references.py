"""Naive references of a sharded policy, and what becomes of them; then refkl's.

accelerate launch --config_file launch/accelerate/zero3.yaml --gradient_accumulation_steps 1 \
    --gradient_clipping 1.0 tests/scripts/wrong_references.py zero3 FOLDER
accelerate launch --config_file launch/accelerate/multi.yaml tests/scripts/wrong_references.py fsdp2 FOLDER
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from accelerate import Accelerator, PartialState
from support.models import batch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM

from refkl import build_reference, score_tokens
from refkl.backend import local_shard, unwrap

BATCH = batch()


def logp(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return score_tokens(model, BATCH).logp


def raises(call: Callable[[], object]) -> bool:
    try:
        call()
    except Exception:
        return True
    return False


def load(folder: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(f"{folder}/model")


def refkls_moves(engine: nn.Module, reference: object, train: Callable[[], None]) -> bool:
    before = reference.score(BATCH).logp
    reference.score(BATCH)
    train()
    reference.update(engine)
    after = [reference.score(BATCH).logp for _ in range(3)]
    now = logp(engine)
    return not torch.allclose(before, now, atol=1e-3) and all(torch.equal(a, now) for a in after)


def zero3(accelerator: Accelerator, folder: str) -> None:
    import deepspeed

    accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 3
    policy = load(folder)
    say = accelerator.print
    say(f"a deep copy fails in forward: {raises(lambda: logp(copy.deepcopy(policy)))}")

    # A second partitioned model, as a naive reference: in an engine, with DeepSpeed's own defaults.
    naive = load(folder)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    naive_engine, *_ = deepspeed.initialize(model=naive, config=config)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    reference = build_reference(policy, accelerator=accelerator)
    engine, optimizer = accelerator.prepare(policy, optimizer)

    def train() -> None:
        accelerator.backward(score_tokens(engine, BATCH).logp.sum())
        optimizer.step()
        optimizer.zero_grad()

    before = logp(naive_engine)
    train()
    for own, theirs in zip(naive.parameters(), unwrap(engine).parameters(), strict=True):
        if own.numel() == theirs.numel() == 0:  # placeholders, until a forward leaves small ones gathered
            own.data.copy_(theirs.data)
    for p in naive.parameters():
        if p.ds_status.name == "AVAILABLE":
            p.partition()
    for own, theirs in zip(naive.parameters(), unwrap(engine).parameters(), strict=True):
        own.data.lerp_(theirs.data, 1.0) if own.numel() == theirs.numel() else None
    say(f"an update of .parameters() moves nothing: {torch.equal(logp(naive_engine), before)}")
    for p in naive.parameters():
        if p.ds_status.name == "AVAILABLE":
            p.partition()
    for own in naive.parameters():
        with deepspeed.zero.GatheredParameters([own]):
            own.data.add_(1.0)
    say(f"a write without modifier_rank is dropped: {torch.equal(logp(naive_engine), before)}")
    logp(naive_engine)  # leaves its small parameters gathered
    for own, theirs in zip(naive.parameters(), unwrap(engine).parameters(), strict=True):
        local_shard(own).copy_(local_shard(theirs))
    say(f"shards under parameters that persist are not read: {torch.equal(logp(naive_engine), before)}")
    say(f"refkl's moves: {refkls_moves(engine, reference, train)}")


def fsdp2(accelerator: Accelerator, folder: str) -> None:
    say = accelerator.print
    policy, naive = load(folder), load(folder)
    for model in (policy, naive):
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    say(f"a deep copy is refused: {raises(lambda: copy.deepcopy(policy))}")
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    reference = build_reference(policy, accelerator=accelerator)

    def train() -> None:
        score_tokens(policy, BATCH).logp.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    shards = {name: p.to_local() for name, p in naive.named_parameters()}
    before = logp(naive)
    train()
    policy.reshard()
    with torch.no_grad():
        shards["lm_head.weight"].copy_(policy.lm_head.weight.to_local())
    say(f"shards under the root are not read: {torch.equal(logp(naive), before)}")
    say(f"refkl's moves: {refkls_moves(policy, reference, train)}")


def main() -> None:
    backend, folder = sys.argv[1:]
    PartialState(cpu=not torch.accelerator.is_available())
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    {"zero3": zero3, "fsdp2": fsdp2}[backend](accelerator, folder)
    accelerator.end_training()


if __name__ == "__main__":
    main()

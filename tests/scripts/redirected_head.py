"""Gradients of a head that computes log-probabilities in place of logits, on two processes: those of one process.

Run under DDP or ZeRO-3, with the head trained, tied or not, and by either way to begin a backward pass:

accelerate launch --config_file launch/accelerate/zero3.yaml --gradient_accumulation_steps 2 \
    --gradient_clipping 1e9 tests/scripts/redirected_head.py FOLDER
"""

import copy
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from refkl.backend import full_shape, gathered, named_weights, unwrap
from refkl.scoring import HeadError, find_head
from refkl.scoring.head.redirect import redirected


class Logp(torch.autograd.Function):
    """log p of targets [B, T] from hidden [B, T, H]: it keeps the parameter, and needs it gathered in backward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        ctx.save_for_backward(hidden, weight, targets)
        return (hidden @ weight.T).log_softmax(-1).gather(-1, targets[..., None])

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets = ctx.saved_tensors
        assert weight.numel(), "the weight was not gathered again before the head's backward"
        slope = -(hidden @ weight.T).softmax(-1)
        slope.scatter_add_(-1, targets[..., None], torch.ones_like(grad))
        slope = slope * grad
        return slope @ weight, slope.flatten(0, 1).T @ hidden.flatten(0, 1), None


def logp(model: nn.Module, ids: Tensor) -> Tensor:
    head = find_head(model)
    kept = ids[:, 1:]
    with redirected(head, lambda hidden: Logp.apply(hidden[:, :-1], head.weight, kept)) as redirect:
        outputs = model(input_ids=ids, use_cache=False)
    return redirect.stats(outputs)[..., 0]


def expected_weights(whole: nn.Module, ids: Tensor, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """One step of SGD at rate 1 on all sequences at once, through the logits."""
    whole.load_state_dict(start, strict=False)  # a tied head is named once
    whole.zero_grad()
    rows = whole(input_ids=ids, use_cache=False).logits.log_softmax(-1)[:, :-1]
    rows.gather(-1, ids[:, 1:, None]).mean().backward()
    return {name: w.detach() - w.grad for name, w in whole.named_parameters()}


def check(accelerator: Accelerator, folder: Path, backward: str) -> None:
    steps = accelerator.gradient_accumulation_steps
    zero3 = accelerator.distributed_type == DistributedType.DEEPSPEED
    policy = LlamaForCausalLM.from_pretrained(folder)
    whole = LlamaForCausalLM._from_config(policy.config) if not zero3 else unpartitioned(policy.config)
    before = {}
    for name, weight in named_weights(policy):
        with gathered([weight]):
            before[name] = weight.detach().clone()
    ids = torch.randint(2, 258, (2 * steps, 7), generator=torch.Generator().manual_seed(3))
    expected = expected_weights(whole, ids, before)
    model, optimizer = accelerator.prepare(policy, torch.optim.SGD(policy.parameters(), lr=1.0))
    for step in range(steps):
        own = ids[2 * step + accelerator.process_index][None]
        with accelerator.accumulate(model):
            loss = logp(model, own).mean()
            if backward == "plain":
                loss.backward()
                model.step()
            else:
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    if zero3:
        head = find_head(model)
        assert head.module.weight.numel() < full_shape(head.module.weight).numel()
        try:
            _ = head.weight
        except HeadError as error:
            assert "not gathered" in str(error)
        else:
            raise AssertionError("a partitioned weight was given out")
    for name, weight in named_weights(unwrap(model)):
        with gathered([weight]):
            torch.testing.assert_close(
                weight.detach(), expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m
            )
            assert (expected[name] - before[name]).abs().max() > 1e-3, name
    accelerator.free_memory()


def unpartitioned(config: LlamaConfig) -> nn.Module:
    import deepspeed

    with deepspeed.zero.Init(enabled=False):
        return LlamaForCausalLM(copy.deepcopy(config))


def main() -> None:
    folder, *ddp = Path(sys.argv[1]), *sys.argv[2:]
    PartialState(cpu=not torch.accelerator.is_available())
    # A static graph of DDP's cannot begin with a pass that does not synchronise.
    steps = 1 if "static_graph" in ddp else 2
    options = DistributedDataParallelKwargs(**dict.fromkeys(ddp, True))
    accelerator = Accelerator(kwargs_handlers=[options], gradient_accumulation_steps=steps)
    assert accelerator.num_processes == 2
    zero3 = accelerator.distributed_type == DistributedType.DEEPSPEED
    if zero3:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = 1
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    for tied in ("untied", "tied"):
        for backward in ("plain", "accelerator") if zero3 else ("accelerator",):
            check(accelerator, folder / tied, backward)
            accelerator.print(f"passed {tied} {backward}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()

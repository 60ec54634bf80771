"""Every strategy passes every check of contract.py: here in one process, and under ZeRO-3 in two."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptLearningConfig, PromptTuningConfig, get_peft_model
from support.contract import CHECKS, STEPPING, Case, plain_copy
from support.launching import accelerate_launch
from support.models import gpt2, llama
from support.own_loop import OWN_LOOP
from torch import Tensor, nn

from refkl import STRATEGIES, ReferenceConfig, build_reference, freeze, trainable_parameters
from refkl.backend import learned_prompt


def _lora(**options: object) -> nn.Module:
    # Dropout in the adapter and in the attention, where it is a float: neither may reach the reference.
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, **options)
    return get_peft_model(llama(attention_dropout=0.5), config).eval()


def _trained_lora() -> nn.Module:
    policy = _lora()
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return policy


def _partly_frozen() -> nn.Module:
    policy = llama(attention_dropout=0.5, tie_word_embeddings=True)
    freeze(policy, ["model.embed_tokens", "model.layers.0"])
    return policy


HOST = ReferenceConfig(strategy="swap", device="cpu")
OFFLOADED = ReferenceConfig(strategy="clone", offload=True)
INT8, NF4 = (ReferenceConfig(strategy="clone", quantize=kind, max_kl_floor=math.inf) for kind in ("int8", "nf4"))
TOLERANCES = {None: 0.0, "int8": 0.1, "nf4": 1.5}
"""In nats, for these models, whose weights are drawn wide; reference/quantized/test_quantized.py has exact ones."""
POLICIES: dict[str, tuple[str | ReferenceConfig, Callable[[], nn.Module]]] = {
    "clone": ("clone", lambda: llama(attention_dropout=0.5)),
    "clone of tied, partly frozen": ("clone", _partly_frozen),
    "clone of a trained adapter": ("clone", _trained_lora),
    "clone with gradient checkpointing": ("clone", lambda: _checkpointing(llama())),
    "clone offloaded": (OFFLOADED, lambda: llama(attention_dropout=0.5)),
    "clone of tied, partly frozen, offloaded": (OFFLOADED, _partly_frozen),
    "clone of a trained adapter, offloaded": (OFFLOADED, _trained_lora),
    "clone offloaded with gradient checkpointing": (OFFLOADED, lambda: _checkpointing(llama())),
    "clone offloaded in bf16": (OFFLOADED, lambda: llama(attention_dropout=0.5).bfloat16()),
    "adapter": ("adapter", _lora),
    "adapter IA3": ("adapter", lambda: _ia3()),
    "adapter under a learned prompt": ("adapter", lambda: _prompt(PromptTuningConfig)),
    "adapter under a learned prefix": ("adapter", lambda: _prompt(PrefixTuningConfig)),
    "adapter with gradient checkpointing": ("adapter", lambda: _checkpointing(_lora())),
    "swap": ("swap", lambda: llama(attention_dropout=0.5)),
    "swap of tied, partly frozen": ("swap", _partly_frozen),
    "swap of a trained adapter": ("swap", _trained_lora),
    "swap with gradient checkpointing": ("swap", lambda: _checkpointing(llama())),
    "swap from the host": (HOST, lambda: llama(attention_dropout=0.5)),
    "swap of tied, partly frozen from the host": (HOST, _partly_frozen),
    "swap of a trained adapter from the host": (HOST, _trained_lora),
    "swap from the host with gradient checkpointing": (HOST, lambda: _checkpointing(llama())),
    "shared_trunk": ("shared_trunk", lambda: _frozen_below()),
    "shared_trunk with gradient checkpointing": ("shared_trunk", lambda: _checkpointing(_frozen_below())),
    "shared_trunk in bf16": ("shared_trunk", lambda: _frozen_below().bfloat16()),
    "clone in int8": (INT8, lambda: llama(attention_dropout=0.5)),
    "clone of tied, partly frozen in int8": (INT8, _partly_frozen),
    "clone in nf4 with gradient checkpointing": (NF4, lambda: _checkpointing(llama())),
    "swap in bf16": ("swap", lambda: llama(attention_dropout=0.5).bfloat16()),
}


def _frozen_below() -> nn.Module:
    policy = llama(attention_dropout=0.5, num_hidden_layers=3)
    freeze(policy, ["model.embed_tokens", "model.layers.0", "model.layers.1"])
    return policy


def _ia3() -> nn.Module:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    return get_peft_model(llama(), config).eval()


def _prompt(config: type[PromptLearningConfig]) -> nn.Module:
    base = llama(attention_dropout=0.5)
    return get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()


def _checkpointing(policy: nn.Module) -> nn.Module:
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    return policy


def _case(strategy: str | ReferenceConfig, policy: nn.Module, folder: Path) -> Case:
    plain, start = plain_copy(policy), None
    if learned_prompt(policy) is not None:
        plain, start = plain.get_base_model(), plain
    optimizer = torch.optim.SGD(trainable_parameters(policy), lr=0.05)

    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    reference = build_reference(policy, strategy)
    kind = reference.config.quantize
    moves = learned_prompt(policy) is None
    return Case(policy, reference, plain, step, moves, folder, start=start, tolerance=TOLERANCES[kind])


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
@pytest.mark.parametrize("name", POLICIES)
def test_contract(name: str, check: Callable[[Case], None], tmp_path: Path) -> None:
    strategy, policy = POLICIES[name]
    check(_case(strategy, policy(), tmp_path))


# backend, strategy, policy, when it is built, and what the reference holds on a rank of what trains
LAUNCHES = [
    ("zero3", "zero3", "full", "before", 0.5),
    ("fsdp2", "fsdp2", "full", "after", 0.5),
]
MORE = [
    ("multi", "swap", "lora", "after", 1.0),
    ("fsdp2-accelerate", "fsdp2", "full", "before", 0.5),
    ("zero3", "swap", "lora", "before", 0.5),
    ("fsdp2", "swap", "lora", "before", 0.5),
    ("zero2", "swap", "full", "before", 1.0),
    ("multi", "clone", "full", "before", 1.0),
    ("multi", "clone:int8", "full", "before", 0.62),
    ("multi", "adapter", "fresh", "before", 0.0),
    ("multi", "shared_trunk", "upper", "before", 1.0),
    ("zero2", "shared_trunk", "upper", "after", 1.0),
    ("multi", "adapter", "prompt", "after", 0.0),
    ("multi", "adapter", "base", "before", 0.0),
    ("zero2", "adapter", "prompt", "before", 0.0),
    ("zero3", "adapter", "prompt", "after", 0.0),
    ("zero3", "adapter", "base", "before", 0.0),
    ("fsdp2", "adapter", "prompt", "before", 0.0),
    ("fsdp2", "adapter", "base", "after", 0.0),
    ("zero2", "swap", "lora", "after", 1.0),
    ("zero2", "clone", "full", "after", 1.0),
    ("zero3", "swap", "full", "after", 0.5),
    ("zero3", "adapter", "fresh", "after", 0.0),
    ("fsdp2", "swap", "full", "after", 0.5),
    ("fsdp2", "adapter", "fresh", "after", 0.0),
    ("fsdp2-accelerate", "fsdp2", "full", "after", 0.5),
    ("fsdp2-bf16", "fsdp2", "full", "after", 0.5),
    ("fsdp2-bf16", "swap", "lora", "before", 0.5),
    ("fsdp2-offload", "fsdp2", "full", "after", 0.5),
    ("fsdp2-offload", "swap", "lora", "after", 0.5),
    ("zero3", "zero3:offload", "full", "after", 0.5),
    ("fsdp2", "fsdp2:offload", "full", "after", 0.5),
    ("zero2", "clone:offload", "full", "before", 1.0),
]


@pytest.mark.parametrize(
    ("backend", "strategy", "policy", "when", "share"),
    [*LAUNCHES, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE)],
    ids=lambda value: str(value),
)
def test_contract_on_two_processes(
    backend: str, strategy: str, policy: str, when: str, share: float, tmp_path: Path
) -> None:
    llama(attention_dropout=0.5).save_pretrained(tmp_path / "model")
    launch, flags = (backend, OWN_LOOP) if backend.startswith("zero") else ("multi", ())
    arguments = ("tests/scripts/contract_run.py", backend, strategy, policy, when, str(tmp_path))
    output = accelerate_launch(launch, *arguments, flags=flags)
    unfit = STEPPING if "bf16" in backend else ()
    for check in CHECKS:
        assert (f"passed {check.__name__}\n" in output) == (check.__name__ not in unfit)
    found = re.search(r"strategies: \['(\w+)'\]; share of what trains: ([\d.]+)", output)
    assert found is not None and found[1] == strategy.split(":")[0]
    assert ":int8" not in strategy or "over 18 tokens" in output  # the floor is of both ranks' 9
    assert float(found[2]) == pytest.approx(share, abs=0.02)


def test_every_strategy_has_a_row() -> None:
    rows = {s.strategy if isinstance(s, ReferenceConfig) else s for s, _ in POLICIES.values()}
    assert rows | {strategy for _, strategy, *_ in LAUNCHES} == set(STRATEGIES)


def test_gpt2_with_dropout_starts_at_zero_kl() -> None:
    """GPT-2's default dropout makes a step-0 KL of .28 where a reference is left in training mode."""
    policy = gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    check = next(check for check in CHECKS if check.__name__ == "check_scores_are_the_policys_as_built")
    check(_case("clone", policy, Path()))

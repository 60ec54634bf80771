"""What people hold for a reference, and is not it: each naive way gives another model here, or none.

The figures are in the tests; the launched ones (ZeRO-3, FSDP2) are in scripts/wrong_references.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from support.launching import accelerate_launch
from support.models import batch, gpt2, llama, qwen2
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from trl.trainer.utils import disable_dropout_in_model

from refkl import build_reference, score_tokens, trainable_parameters

BATCH = batch()


def logp(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return score_tokens(model, BATCH).logp


def lora(**options: object) -> PeftModel:
    return get_peft_model(llama(), LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options})).eval()


def moved(policy: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in trainable_parameters(policy):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return policy


def far(found: Tensor, right: Tensor, by: float = 1e-2) -> bool:
    return bool((found - right).abs().max() > by)


def norms() -> PeftModel:
    policy = lora()
    for name, parameter in policy.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    return policy


SWITCHED_OFF: dict[str, Callable[[], PeftModel]] = {
    "an adapter that was trained before": lambda: moved(lora()),
    "PiSSA": lambda: lora(init_lora_weights="pissa"),
    "OLoRA": lambda: lora(init_lora_weights="olora"),
    "bias of all layers": lambda: moved_later(
        get_peft_model(qwen2(), LoraConfig(r=4, target_modules=["q_proj"], bias="all"))
    ),
    "norms unfrozen by hand": lambda: moved_later(norms()),
}


def moved_later(policy: PeftModel) -> PeftModel:
    policy.moves = True  # the fault is seen once the run has trained
    return policy.eval()


@pytest.mark.parametrize("name", SWITCHED_OFF)
def test_the_adapter_switched_off(name: str) -> None:
    """disable_adapter() is not the policy as the run began."""
    policy = SWITCHED_OFF[name]()
    right = logp(policy)
    reference = build_reference(policy)
    if getattr(policy, "moves", False):
        moved(policy)
    with policy.disable_adapter():
        assert far(logp(policy), right)
    assert torch.equal(reference.score(BATCH).logp, right)


def test_the_adapter_of_a_merged_policy_switched_off() -> None:
    """disable_adapter() unmerges it, and leaves it so."""
    policy = moved(lora())
    policy.merge_adapter()
    right, merged = logp(policy), [m for m in policy.modules() if getattr(m, "merged", False)]
    reference = build_reference(policy)
    assert torch.equal(reference.score(BATCH).logp, right) and all(m.merged for m in merged)
    with policy.disable_adapter():
        assert far(logp(policy), right)
    assert merged and not any(m.merged for m in merged)


@pytest.mark.parametrize("kind", ["IA3", "VeRA", "embedding", "trainable tokens"])
def test_a_second_adapter_with_a_copy_of_the_first(kind: str) -> None:
    """As TRL makes its "ref" adapter: names with ".default." in them are matched, which these adapters' have not."""
    config = {
        "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "VeRA": VeraConfig(r=8, target_modules=["q_proj", "o_proj"]),
        "embedding": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
        "trainable tokens": LoraConfig(
            r=4, target_modules=["q_proj"], trainable_token_indices=BATCH.input_ids[0, :6].tolist()
        ),
    }[kind]
    policy = moved(get_peft_model(llama(), config)).eval()
    right = logp(policy)
    reference = build_reference(policy)
    assert torch.equal(reference.score(BATCH).logp, right)
    policy.add_adapter("ref", copy.deepcopy(policy.peft_config["default"]))
    for name, parameter in policy.named_parameters():
        if ".default." in name:
            policy.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    policy.set_adapter("ref")
    assert far(logp(policy), right)


def test_reloaded_from_where_the_policy_came_from(tmp_path: Path) -> None:
    """As TRL's GRPO does, from config._name_or_path: the policy may have been edited since, or made from a config."""
    llama().save_pretrained(tmp_path)
    policy = moved(AutoModelForCausalLM.from_pretrained(tmp_path)).eval()
    right = logp(policy)
    reference = build_reference(policy)
    assert far(logp(AutoModelForCausalLM.from_pretrained(policy.config._name_or_path).eval()), right)
    assert torch.equal(reference.score(BATCH).logp, right)


def test_an_adapter_loaded_as_it_is_by_default(tmp_path: Path) -> None:
    """is_trainable=False: nothing would train, and the KL would stay 0."""
    lora().save_pretrained(tmp_path)
    policy = PeftModel.from_pretrained(llama(), tmp_path)
    assert not trainable_parameters(policy)
    with pytest.raises(ValueError, match="is_trainable=False"):
        build_reference(policy)


def test_a_copy_left_in_training_mode() -> None:
    """GPT-2's default dropouts: the KL of a policy with itself."""
    policy = gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1).train()
    naive = copy.deepcopy(policy)
    torch.manual_seed(1)
    assert far(logp(naive), logp(naive), by=0.1)
    policy.eval()
    right = logp(policy)
    policy.train()
    assert torch.equal(build_reference(policy).score(BATCH).logp, right)


def test_dropout_that_is_a_float() -> None:
    """Helpers that set nn.Dropout.p to 0 miss the attention's, which is an attribute of the layer."""
    policy = llama(attention_dropout=0.5)
    right = logp(policy)
    policy.train()
    naive = copy.deepcopy(policy)
    disable_dropout_in_model(naive)
    assert far(logp(naive), right)
    assert torch.equal(build_reference(policy).score(BATCH).logp, right)


def test_positions_that_padding_shifts() -> None:
    """Absolute positions counted from the first column, where the first tokens are padding."""
    policy, left = gpt2(), batch(padding="left")
    with torch.no_grad():
        logits = policy(input_ids=left.input_ids, attention_mask=left.attention_mask).logits[:, :-1]
        naive = logits.log_softmax(-1).gather(-1, left.input_ids[:, 1:, None])[..., 0]
    right = build_reference(policy).score(BATCH).logp[BATCH.completion_mask]
    assert far(naive[left.completion_mask[:, 1:]], right, by=0.1)
    found = build_reference(policy).score(left).logp[left.completion_mask]
    torch.testing.assert_close(found, right, rtol=0, atol=2e-5)


def test_a_copy_scored_outside_the_policys_autocast() -> None:
    """Made before accelerator.prepare: the policy then rounds its products to bf16, and the copy does not."""
    PartialState._reset_state()
    AcceleratorState._reset_state(True)
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        policy = llama()
        naive = copy.deepcopy(policy)
        reference = build_reference(policy, accelerator=accelerator)
        prepared = accelerator.prepare(policy)
        right = logp(prepared)
        assert far(logp(naive), right, by=1e-3)
        assert torch.equal(reference.score(BATCH).logp, right)
    finally:
        PartialState._reset_state()
        AcceleratorState._reset_state(True)


def test_a_copy_of_a_patched_policy() -> None:
    """A forward replaced by a function that holds on to the policy: a deep copy runs the policy's weights."""
    policy = llama()
    right = logp(policy)
    inner = policy.model

    def forward(input_ids: Tensor, attention_mask: Tensor, **kwargs: object) -> object:
        kwargs.pop("logits_to_keep", None)
        hidden = inner(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(logits=policy.lm_head(hidden))

    policy.forward = forward  # type: ignore[method-assign]
    naive = copy.deepcopy(policy)
    swap = build_reference(policy, "swap")
    with pytest.raises(ValueError, match=r"refers to the policy .* Use 'swap' instead"):
        build_reference(policy, "clone")
    moved(policy)
    assert torch.equal(logp(naive), logp(policy)) and far(logp(naive), right)
    assert torch.equal(swap.score(BATCH).logp, right)


@pytest.mark.parametrize("launch", [pytest.param("zero3", marks=pytest.mark.slow), "fsdp2"])
def test_sharded(launch: str, tmp_path: Path) -> None:
    """Copies, updates and syncs that see placeholders, or shards that the next forward does not read."""
    llama().save_pretrained(tmp_path / "model")
    flags = ("--gradient_accumulation_steps", "1", "--gradient_clipping", "1.0") if launch == "zero3" else ()
    script = ("tests/scripts/wrong_references.py", launch, str(tmp_path))
    output = accelerate_launch(launch if launch == "zero3" else "multi", *script, flags=flags)
    lines = {
        "zero3": (
            "a deep copy fails in forward: True",
            "an update of .parameters() moves nothing: True",
            "a write without modifier_rank is dropped: True",
            "shards under parameters that persist are not read: True",
            "refkl's moves: True",
        ),
        "fsdp2": ("a deep copy is refused: True", "shards under the root are not read: True", "refkl's moves: True"),
    }[launch]
    for line in lines:
        assert line in output

"""`clone`: what it costs, what it shares, and the wrong references that a plain deepcopy gives."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from support.models import batch, llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from refkl import ReferenceConfig, build_reference, freeze, score_tokens, trainable_parameters


def _bytes(parameters: object) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)  # type: ignore[attr-defined]


def test_costs_only_what_trains() -> None:
    policy = llama(tie_word_embeddings=True)
    freeze(policy, ["model.embed_tokens", "model.layers.0"])
    reference = build_reference(policy, "clone")
    buffers = sum(b.numel() * b.element_size() for b in reference.model.buffers())
    assert reference.memory().total == _bytes(trainable_parameters(policy)) + buffers
    # The plain way, for comparison: everything again.
    assert _bytes(copy.deepcopy(policy).parameters()) > 2 * reference.memory().total


def test_a_lora_clone_costs_its_adapter() -> None:
    policy = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    reference = build_reference(policy, "clone")
    buffers = sum(b.numel() * b.element_size() for b in reference.model.buffers())
    assert reference.memory().total == _bytes(trainable_parameters(policy)) + buffers


def test_ties_are_kept() -> None:
    reference = build_reference(llama(tie_word_embeddings=True), "clone")
    assert reference.model.lm_head.weight is reference.model.model.embed_tokens.weight


def test_shared_weights_are_never_the_policys_own_parameter_objects() -> None:
    policy = llama()
    freeze(policy, "model.embed_tokens")
    reference = build_reference(policy, "clone")
    theirs, own = policy.model.embed_tokens.weight, reference.model.model.embed_tokens.weight
    assert own is not theirs and own.data_ptr() == theirs.data_ptr()
    theirs.requires_grad_(True)
    assert not own.requires_grad
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight trains now"):
        reference.score(batch())


def test_names_are_the_policys() -> None:
    policy = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    reference = build_reference(policy, "clone")
    assert [n for n, _ in reference.model.named_parameters()] == [n for n, _ in policy.named_parameters()]


def test_follows_the_policy_to_another_dtype_and_shares_again() -> None:
    policy = llama()
    freeze(policy, "model.layers.0")
    reference = build_reference(policy, "clone")
    first = reference.fingerprint()
    policy.to(torch.bfloat16)
    tokens = batch()
    assert torch.equal(reference.score(tokens).logp, score_tokens(policy, tokens).logp)
    frozen = reference.model.model.layers[0].mlp.up_proj.weight
    assert frozen.data_ptr() == policy.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert reference.fingerprint() != first  # other bits, and recorded as such
    assert reference.score(tokens).fingerprint == reference.fingerprint()


def test_dtype_option_holds_it_in_that_dtype() -> None:
    policy = llama()
    reference = build_reference(policy, ReferenceConfig(strategy="clone", dtype="bfloat16"))
    assert {p.dtype for p in reference.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    expected = score_tokens(copy.deepcopy(policy).bfloat16(), batch()).logp
    assert torch.equal(reference.score(batch()).logp, expected)


def test_device_option_holds_it_there_and_shares_nothing() -> None:
    policy = llama()
    freeze(policy, "model.layers.0")
    reference = build_reference(policy, ReferenceConfig(strategy="clone", device="cpu"))
    assert torch.equal(reference.score(batch()).logp, score_tokens(policy, batch()).logp)
    everything = sum(t.numel() * t.element_size() for t in (*policy.parameters(), *policy.buffers()))
    assert reference.memory().total == everything


@pytest.mark.parametrize("when", ["before", "after"])
def test_bf16_mixed_precision_starts_at_zero_kl(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scored outside autocast, a clone differs from the policy by 1.5e-3 (built before or after prepare)."""
    from accelerate.state import AcceleratorState, PartialState

    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    monkeypatch.setattr(PartialState, "_shared_state", {})
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    policy, tokens = llama(), batch()
    reference = build_reference(policy, "clone", accelerator) if when == "before" else None
    prepared = accelerator.prepare(policy)
    reference = reference or build_reference(prepared, "clone", accelerator)
    assert torch.equal(reference.score(tokens).logp, score_tokens(prepared, tokens).logp)
    if when == "before":  # the naive way: the same weights outside autocast
        outside = score_tokens(reference.model, tokens).logp
        assert (outside - reference.score(tokens).logp).abs().max() > 1e-3


def test_copy_of_a_policy_that_trl_patched_runs_its_own_weights() -> None:
    """TRL replaces forward by a function that calls the policy's: a deepcopy then runs the policy's weights."""
    policy, tokens = llama(), batch()
    add_fused_lm_head(policy)
    naive, reference = copy.deepcopy(policy).eval(), build_reference(policy, "clone")
    right = reference.score(tokens).logp
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    assert torch.equal(reference.score(tokens).logp, right)
    assert not torch.equal(score_tokens(naive, tokens).logp, right)  # the naive way is wrong


def test_refuses_a_forward_that_it_cannot_copy() -> None:
    policy = llama()
    head = policy.lm_head

    @functools.wraps(type(head).forward)
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, head.weight)

    head.forward = types.MethodType(forward, head)
    with pytest.raises(ValueError, match=r"lm_head was replaced .* Build the reference before that replacement"):
        build_reference(policy, "clone")


def test_from_a_folder_instead_of_the_policy(tmp_path) -> None:
    first, policy = llama(), llama()
    first.save_pretrained(tmp_path / "first")
    reference = build_reference(policy, ReferenceConfig(strategy="clone", source=str(tmp_path / "first")))
    assert torch.equal(reference.score(batch()).logp, score_tokens(first, batch()).logp)
    with pytest.raises(ValueError, match="made from a config"):
        build_reference(policy, ReferenceConfig(strategy="clone", source="pretrained"))
    with pytest.raises(ValueError, match="cannot be loaded from"):
        build_reference(policy, ReferenceConfig(strategy="clone", source=str(tmp_path / "nowhere")))


def test_a_policy_edited_in_memory_is_the_reference(tmp_path) -> None:
    """TRL reloads its reference from the folder's name, and so gets another model."""
    llama().save_pretrained(tmp_path / "model")
    policy = type(llama()).from_pretrained(tmp_path / "model")
    with torch.no_grad():
        policy.lm_head.weight.mul_(0.5)
    right = score_tokens(policy, batch()).logp
    assert torch.equal(build_reference(policy).score(batch()).logp, right)


def test_update_refuses_another_model_and_changes_nothing() -> None:
    policy = llama()
    reference = build_reference(policy, "clone")
    before = reference.fingerprint()
    with pytest.raises(ValueError, match=r"has no weight|has a weight"):
        reference.update(llama(num_hidden_layers=3))
    with pytest.raises(ValueError, match="with shape"):
        reference.update(llama(intermediate_size=48))
    assert reference.fingerprint() == before and reference.updates == 0


def test_an_altered_file_is_refused_and_nothing_is_written(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    build_reference(llama(), "clone").save(tmp_path)
    weights = load_file(tmp_path / "reference.safetensors")
    weights["lm_head.weight"][0, 0] += 1e-3
    save_file(weights, tmp_path / "reference.safetensors")
    other = build_reference(llama(), "clone")
    before = other.fingerprint()
    with pytest.raises(ValueError, match=r"lm_head\.weight was altered"):
        other.load(tmp_path)
    assert other.fingerprint() == before


def test_load_leaves_what_the_policy_shares_alone(tmp_path) -> None:
    """Shared storage is the policy's: another base in the file is refused by name, not written into the policy."""
    policies = [llama(), llama()]
    for policy in policies:
        freeze(policy, "model.layers.0")
    build_reference(policies[0], "clone").save(tmp_path)
    before = policies[1].model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(ValueError, match=r"model\.layers\.0\..* is shared with the policy"):
        build_reference(policies[1], "clone").load(tmp_path)
    assert torch.equal(policies[1].model.layers[0].mlp.up_proj.weight, before)


def test_pretrained_weights_run_with_the_policys_own_settings(tmp_path) -> None:
    """Rotary scaling and the like are part of the function; the folder may hold other ones."""
    llama().save_pretrained(tmp_path / "model")
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    policy = type(llama()).from_pretrained(tmp_path / "model", rope_parameters=scaled)
    right = score_tokens(policy, batch()).logp
    reference = build_reference(policy, ReferenceConfig(strategy="clone", source="pretrained"))
    assert torch.equal(reference.score(batch()).logp, right)
    plain = type(llama()).from_pretrained(tmp_path / "model")
    assert not torch.allclose(score_tokens(plain, batch()).logp, right, atol=1e-3)


def test_fingerprint_sees_any_changed_weight_and_nothing_else() -> None:
    policy = llama()
    reference = build_reference(policy, "clone")
    first = reference.fingerprint()
    assert first == build_reference(copy.deepcopy(policy), "clone").fingerprint() == reference.fingerprint()
    for parameter in reference.model.parameters():
        flat = parameter.data.view(-1)
        kept = flat[-1].clone()
        flat[-1] = torch.nextafter(kept, kept + 1)
        assert reference.fingerprint() != first
        flat[-1] = kept
    assert reference.fingerprint() == first


def test_a_policy_that_is_sharded_later_is_told_when_to_build(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        policy = llama()
        reference = build_reference(policy)
        assert reference.strategy == "clone"
        fully_shard(policy, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"sharded by FSDP2 after .* Build the reference after fully_shard"):
            reference.score(batch())
        assert build_reference(policy).strategy == "fsdp2"
    finally:
        torch.distributed.destroy_process_group()


def test_storage_is_shared_again_after_a_move_that_keeps_the_device() -> None:
    """accelerate's DDP moves a policy to "cpu:0" (or from a device to itself by another name), which copies it."""
    policy = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    reference = build_reference(policy, "clone")
    held, right = reference.memory().total, reference.score(batch()).logp
    policy.to("cpu:0")
    assert reference.memory().total > 5 * held
    assert torch.equal(reference.score(batch()).logp, right)
    assert reference.memory().total == held


def test_of_what_is_shared_a_digest_is_saved_alone(tmp_path) -> None:
    """An adapter's reference is as small on disk as in memory, and is put back under another adapter of that base."""
    from safetensors.torch import load_file

    base = llama()
    first, second = (get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["q_proj"])) for _ in range(2))
    for name, parameter in first.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    reference = build_reference(first, "clone")
    reference.save(tmp_path)
    saved = load_file(tmp_path / "reference.safetensors")
    assert all("lora_" in name for name in saved) and len(saved) == 4
    other = build_reference(second, "clone")
    assert other.fingerprint() != reference.fingerprint()
    other.load(tmp_path)
    assert other.fingerprint() == reference.fingerprint()
    assert torch.equal(other.score(batch()).logp, reference.score(batch()).logp)
    with torch.no_grad():
        base.lm_head.weight.add_(1.0)
    stranger = build_reference(get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])), "clone")
    with pytest.raises(ValueError, match=r"lm_head\.weight is shared with the policy"):
        stranger.load(tmp_path)


def test_pretrained_is_the_folder_and_not_the_policy_as_it_is_now(tmp_path) -> None:
    llama().save_pretrained(tmp_path)
    policy = LlamaForCausalLM.from_pretrained(tmp_path)
    right = score_tokens(policy, batch()).logp.detach()
    with torch.no_grad():
        policy.lm_head.weight.mul_(2.0)
    reference = build_reference(policy, ReferenceConfig(strategy="clone", source="pretrained"))
    assert torch.equal(reference.score(batch()).logp, right)
    now = build_reference(policy, "clone")
    assert torch.equal(now.score(batch()).logp, score_tokens(policy, batch()).logp)

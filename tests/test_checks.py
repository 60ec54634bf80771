"""check_reference and `refkl check`: each fault that is put in is found by its own check, and clean runs have none."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.launching import accelerate_launch
from support.models import MODELS, batch, byte_tokenizer, gpt2, llama
from support.train_inputs import write_config
from torch import nn
from trl import GRPOConfig

from refkl import Finding, KLConfig, ReferenceConfig, build_reference, check_reference, trainable_parameters
from refkl.checks import repadded
from refkl.cli import main
from refkl.trl import KLGRPOTrainer


def lora(base: nn.Module) -> nn.Module:
    target = ["q_proj"] if hasattr(base.config, "num_key_value_heads") else ["c_attn", "query_key_value"]
    return get_peft_model(base, LoraConfig(r=4, target_modules=target, lora_dropout=0.1))


def faults(findings: list[Finding]) -> list[str]:
    return [f.check for f in findings if f.verdict == "fault"]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", ["clone", "swap", "adapter"])
def test_clean_runs_have_no_fault(family: str, kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    policy = MODELS[family]()
    policy = (lora(policy) if kind == "adapter" else policy).train()
    reference = build_reference(policy, kind)
    optimizer = torch.optim.AdamW(trainable_parameters(policy))
    modes = [m.training for m in policy.modules()]
    random = torch.get_rng_state()
    findings = check_reference(policy, reference, batch(seed=seed), optimizer=optimizer, vocabulary=258)
    assert not faults(findings), findings
    assert [m.training for m in policy.modules()] == modes and torch.equal(torch.get_rng_state(), random)
    zero = next(f for f in findings if f.check == "the KL is 0 before the first step")
    assert zero.verdict == "ok" and zero.found == "exactly 0.0 for each token"


def _shares(policy, reference):
    reference.model.lm_head.weight.data = policy.lm_head.weight.data


def _trains(policy, reference):
    reference.model.model.norm.weight.requires_grad_(True)


def _changed_policy(policy, reference):
    policy.model.layers[0].mlp.up_proj.weight.data += 0.1


def _changed_reference(policy, reference):
    reference.model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 0.01


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


def _noise(policy, reference):
    reference.model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), Noisy())


def _no_positions(policy, reference):
    """A model that counts positions from the first column, whatever is padded."""
    inner = policy.model.forward

    def forward(*args, position_ids=None, **kwargs):
        return inner(*args, position_ids=torch.arange(kwargs["input_ids"].shape[1])[None], **kwargs)

    policy.model.forward = forward
    policy.model.embed_tokens.forward = lambda ids: (
        nn.functional.embedding(ids, policy.model.embed_tokens.weight) * (1 + torch.arange(ids.shape[1])[None, :, None])
    )


FAULTS: dict[str, tuple[Callable[..., None], str, str]] = {
    "storage that is shared": (
        _shares,
        "policy and reference share no trainable weights",
        "lm_head.weight of the reference",
    ),
    "a reference that trains": (_trains, "the reference does not train", "model.norm.weight requires grad"),
    "a policy that was changed": (_changed_policy, "the KL is 0 before the first step", "nats per token"),
    "a reference that was changed": (
        _changed_reference,
        "the reference is as it was built",
        "model.layers.1.mlp.up_proj.weight has other values",
    ),
    "dropout of its own": (_noise, "the reference has no dropout", "differ by up to"),
    "positions that padding shifts": (_no_positions, "padding does not change scores", "the policy's scores"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_by_its_own_check(name: str) -> None:
    inject, check, found = FAULTS[name]
    policy = llama()
    reference = build_reference(policy, "clone")
    inject(policy, reference)
    findings = {f.check: f for f in check_reference(policy, reference, batch())}
    assert findings[check].verdict == "fault"
    assert found in findings[check].found and findings[check].advice


def test_a_cache_does_not_hide_a_fault(tmp_path: Path) -> None:
    policy = llama()
    reference = build_reference(policy, ReferenceConfig(strategy="clone", cache=str(tmp_path)))
    _noise(policy, reference)
    findings = {f.check: f for f in check_reference(policy, reference, batch())}
    assert findings["the reference has no dropout"].verdict == "fault"
    assert reference.cache is not None and reference.cache.stats.misses == 0


def test_a_reference_in_the_optimizer_is_found() -> None:
    policy = llama()
    reference = build_reference(policy, "clone")
    optimizer = torch.optim.SGD([*policy.parameters(), reference.model.lm_head.weight], lr=0.1)
    findings = check_reference(policy, reference, batch(), optimizer=optimizer)
    assert faults(findings) == ["the optimizer does not hold the reference"]


def test_a_tokenizer_with_more_tokens_than_logits_is_found() -> None:
    policy = llama()
    findings = check_reference(policy, build_reference(policy), batch(), vocabulary=300)
    assert faults(findings) == ["tokenizer and logits agree"]
    finding = next(f for f in findings if f.verdict == "fault")
    assert finding.found == "the tokenizer has 300 tokens and the policy 258 logits"


def test_legitimate_differences_are_notes_with_their_size(tmp_path: Path) -> None:
    policy = gpt2(resid_pdrop=0.1).train()
    findings = {f.check: f for f in check_reference(policy, build_reference(policy), batch())}
    dropout = findings["the policy has no dropout"]
    assert dropout.verdict == "note" and "transformer.h.0.attn.resid_dropout: 0.1" in dropout.found
    policy = llama(attention_dropout=0.3)
    findings = {f.check: f for f in check_reference(policy, build_reference(policy), batch())}
    assert "self_attn.attention_dropout: 0.3" in findings["the policy has no dropout"].found
    policy = llama()
    coarse = build_reference(policy, ReferenceConfig(strategy="clone", dtype="bfloat16"))
    findings = {f.check: f for f in check_reference(policy, coarse, batch())}
    zero = findings["the KL is 0 before the first step"]
    assert zero.verdict == "note" and "reference.dtype is 'bfloat16'" in zero.advice
    assert 1e-7 < float(zero.found.split()[0]) < 1e-2
    assert not faults(list(findings.values()))


@pytest.mark.parametrize("left", [True, False])
def test_repadded_keeps_tokens_and_what_is_scored(left: bool) -> None:
    tokens = batch(padding="left" if left else "right")
    there = repadded(batch(), left=left, extra=2)
    same = [(t[2:] if left else t[:-2]) for t in there.input_ids]
    assert torch.equal(torch.stack(same), tokens.input_ids)
    assert torch.equal(there.input_ids[there.completion_mask], tokens.input_ids[tokens.completion_mask])


# during training


@pytest.mark.parametrize("strategy", ["clone", "swap", "adapter"])
def test_a_sampled_look_finds_a_changed_weight_and_names_it(strategy: str) -> None:
    policy = lora(llama())
    reference = build_reference(policy, strategy)
    count = len(reference.digests)
    for _ in range(count):
        reference.verify(3)
    with torch.no_grad():
        policy.get_base_model().model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"update or load: model\.layers\.1\.mlp\.down_proj\.weight.* other values"):
        for _ in range(count // 3 + 1):
            reference.verify(3)


def test_an_update_is_no_fault() -> None:
    policy = llama()
    reference = build_reference(policy, "clone")
    with torch.no_grad():
        policy.lm_head.weight += 1.0
    reference.update(policy, alpha=0.5)
    reference.verify()
    reference.verify()
    reference.model.lm_head.weight.data += 1.0
    with pytest.raises(ValueError, match="lm_head"):
        reference.verify()


# the command


@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_refkl_check(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, method)
    assert main(["check", str(config), "--trainer.use_cpu", "true"]) == 0
    out = capsys.readouterr().out
    assert "nothing wrong was found" in out and "exactly 0.0" in out and "reference: clone" in out
    assert not (tmp_path / "run").exists()


def test_refkl_check_exits_1_for_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    tokenizer = tmp_path / "model" / "tokenizer.json"
    data = json.loads(tokenizer.read_text())
    data["added_tokens"] += [
        {**copy.deepcopy(data["added_tokens"][0]), "id": 258 + i, "content": f"<extra{i}>"} for i in range(5)
    ]
    tokenizer.write_text(json.dumps(data))
    assert main(["check", str(config), "--trainer.use_cpu", "true"]) == 1
    assert "wrong: tokenizer and logits agree" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["multi", "zero2", "zero3"])
def test_refkl_check_on_two_processes(launch: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, "dpo")
    command = ("refkl", "check", str(config), "--trainer.use_cpu", "true")
    output = accelerate_launch(launch, *command, module=True)
    assert output.count("nothing wrong was found") == 1 and "258 tokens, 258 logits" in output


def _trainer(policy: nn.Module, folder: Path, reward: Callable[..., list[float]], **more: Any) -> KLGRPOTrainer:
    options = {"num_generations": 4, "max_completion_length": 4, "max_steps": 3, "use_cpu": True, "bf16": False}
    quiet = {"report_to": "none", "save_strategy": "no", "per_device_train_batch_size": 4, "logging_steps": 1}
    return KLGRPOTrainer(
        policy,
        reward_funcs=reward,
        args=GRPOConfig(output_dir=str(folder), **options, **quiet),
        train_dataset=Dataset.from_list([{"prompt": "hello"}] * 8),
        processing_class=byte_tokenizer(),
        kl=KLConfig(coef=0.1),
        **more,
    )


def test_a_training_does_not_begin_with_a_fault(tmp_path: Path) -> None:
    """The cheap checks are made when the optimizer is there, before the first rollout."""
    rollouts = []

    def reward(completions: list[str], **columns: object) -> list[float]:
        rollouts.append(len(completions))
        return [float(len(text)) for text in completions]

    trainer = _trainer(llama(), tmp_path, reward, reference="clone")
    trainer.optimizer = torch.optim.SGD([*trainer.model.parameters(), *trainer.reference.model.parameters()], lr=0.1)
    with pytest.raises(ValueError, match=r"the optimizer does not hold the reference: .* refkl\.trainable_parameters"):
        trainer.train()
    assert not rollouts
    _trainer(llama(), tmp_path, reward).train()
    assert rollouts


def test_a_training_looks_at_its_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that writes to a weight which the reference shares ends the run, and the weight is named."""
    monkeypatch.setattr("refkl.hf.callbacks.VERIFY_EVERY", 1)
    monkeypatch.setattr("refkl.hf.callbacks.VERIFIED_WEIGHTS", 100)
    policy = llama()
    policy.model.layers[0].requires_grad_(False)

    def writes(completions: list[str], **columns: object) -> list[float]:
        policy.model.layers[0].mlp.up_proj.weight.data[0, 0] += 0.5
        return [float(len(text)) for text in completions]

    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight has other values"):
        _trainer(policy, tmp_path, writes).train()


def test_the_first_kl_of_a_training_is_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A policy that was changed after its reference was built is told of; clean runs, and another source, are not."""
    transformers.utils.logging.enable_propagation()

    def said(policy: nn.Module, change: Callable[[], None] | None = None, **more: Any) -> bool:
        caplog.clear()
        trainer = _trainer(policy, tmp_path, lambda completions, **columns: [1.0] * len(completions), **more)
        if change is not None:
            change()
        trainer.train()
        return "the policy has not trained yet" in caplog.text

    def nudge() -> None:
        with torch.no_grad():
            changed.model.layers[0].mlp.up_proj.weight.add_(0.1)

    changed = llama()
    assert said(changed, nudge)
    assert not said(llama())
    said(llama(vocab_size=250))
    assert "the tokenizer has 258 tokens and the policy 250 logits" in caplog.text
    assert not said(lora(llama()))
    assert not said(llama(attention_dropout=0.5))
    other = llama()
    other.save_pretrained(tmp_path / "other")
    assert not said(llama(), reference=ReferenceConfig(source=str(tmp_path / "other")))

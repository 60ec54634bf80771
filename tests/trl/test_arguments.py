"""Arguments of TRL's trainers mean in refkl's what they mean in TRL's."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.models import byte_tokenizer, gpt2, llama, qwen2
from support.trl_runs import LABELLED, PAIRS, PROMPTS, distinct_letters, dpo, grpo, kto, logged, rloo
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, BertLMHeadModel, LlamaForCausalLM
from transformers.utils import logging as of_transformers
from trl import RLOOConfig
from trl import RLOOTrainer as TRLRLOOTrainer

from refkl import KLConfig, ReferenceConfig, ScoringConfig, SyncConfig, TokenBatch, build_reference
from refkl.trl import KLDPOTrainer, KLGRPOTrainer, KLKTOTrainer, KLRLOOTrainer

BOTH = [(dpo, KLDPOTrainer), (kto, KLKTOTrainer)]
SGD = {"optim": "sgd", "learning_rate": 0.1, "train_sampling_strategy": "sequential"}


def data_of(make: Any) -> Dataset:
    return PAIRS if make is dpo else LABELLED


def another(maker: Any = llama, **overrides: Any) -> Any:
    """A model of the same kind with other weights."""
    torch.manual_seed(7)
    return maker(**overrides)


def start(maker: Any = llama) -> Any:
    torch.manual_seed(3)
    return maker()


# ref_model


@pytest.mark.parametrize("make, cls", BOTH)
@pytest.mark.parametrize("maker", [llama, gpt2, qwen2])
def test_a_given_ref_model_is_the_reference(make: Any, cls: type, maker: Any, tmp_path: Path) -> None:
    """As the same weights from a folder: as a model, by the folder's name, and by refkl's own name for that."""
    other = another(maker)
    other.save_pretrained(tmp_path / "other")
    before, runs = copy.deepcopy(other.state_dict()), []
    for more in (
        {"ref_model": other},
        {"ref_model": str(tmp_path / "other")},
        {"reference": ReferenceConfig(source=str(tmp_path / "other"))},
    ):
        trainer = make(cls, start(maker), tmp_path, {**SGD, "max_steps": 3}, **more)
        if more.get("ref_model") is other:
            assert trainer.reference.model is other and trainer.reference.strategy == "clone"
            assert type(other).__name__ in trainer.reference.source
        trainer.train()
        runs.append([logged(trainer, name) for name in ("loss", trainer.kl_metric, "rewards/margins")])
    for run in runs[1:]:
        for mine, expected in zip(run, runs[0], strict=True):
            assert mine == pytest.approx(expected, abs=1e-6)
    assert runs[0][1][0] > 1e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    assert not any(p.requires_grad for p in other.parameters()) and not other.train().training


def test_a_given_model_keeps_its_dtype_and_is_verified(tmp_path: Path) -> None:
    other = another().to(torch.bfloat16)
    trainer = dpo(KLDPOTrainer, start(), tmp_path, ref_model=other)
    fingerprint = trainer.reference.fingerprint()
    trainer.train()
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    batch = TokenBatch(torch.arange(12).view(2, 6), torch.ones(2, 6), torch.ones(2, 6))
    logits = other(input_ids=batch.input_ids).logits.float()[:, :-1]
    expected = logits.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(trainer.reference.score(batch).logp[:, 1:], expected, rtol=0, atol=0.05)
    trainer.reference.verify()
    assert trainer.reference.fingerprint() == fingerprint
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        trainer.reference.verify()


def test_a_given_model_moves_and_is_resumed(tmp_path: Path) -> None:
    options = {**SGD, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    runs = []
    for resumed in (None, str(tmp_path / "run" / "checkpoint-2")):
        sync = SyncConfig(every=2, alpha=0.5)
        trainer = dpo(KLDPOTrainer, start(), tmp_path, options, ref_model=another(), sync=sync)
        trainer.train(resume_from_checkpoint=resumed)
        runs.append((logged(trainer, "loss"), trainer.reference.fingerprint()))
    assert runs[0][0][2:] == runs[1][0][2:] and runs[0][1] == runs[1][1]
    still = dpo(KLDPOTrainer, start(), tmp_path / "still", options, ref_model=another())
    still.train()
    with pytest.raises(ValueError, match="trained against a reference with fingerprint"):
        dpo(KLDPOTrainer, start(), tmp_path / "still", options, ref_model=start()).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("make, cls", BOTH)
def test_a_given_peft_model_is_scored_with_its_adapter(make: Any, cls: type, tmp_path: Path) -> None:
    """As the same model, merged; another adapter would be another reference."""
    lora = LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False, lora_dropout=0.5)
    runs = []
    for merged in (False, True):
        torch.manual_seed(7)
        other: Any = get_peft_model(llama(), lora)
        other.add_adapter("second", lora)
        trainer = make(cls, start(), tmp_path, SGD, ref_model=other.merge_and_unload() if merged else other)
        trainer.train()
        runs.append([logged(trainer, name) for name in ("loss", trainer.kl_metric)])
        if not merged:
            adapted = trainer
    for mine, expected in zip(runs[0], runs[1], strict=True):
        assert mine == pytest.approx(expected, rel=1e-4)
    held = adapted.reference.model
    held.set_adapter("second")
    held.requires_grad_(False)
    with pytest.raises(ValueError, match=r"q_proj on with \['default'\], and this is now on with \['second'\]"):
        adapted.train()
    held.set_adapter("default")
    held.requires_grad_(False)
    adapted.train()


@pytest.mark.parametrize("make, cls", BOTH)
def test_ref_models_that_are_refused(make: Any, cls: type, tmp_path: Path) -> None:
    policy = start()
    sharing = copy.copy(policy)
    sharing._modules = dict(policy._modules)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    bert = BertForMaskedLM(BertConfig(**small))
    ahead = BertLMHeadModel(BertConfig(**small, vocab_size=policy.config.vocab_size, initializer_range=0.5))
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (policy, {}, "`model` and `ref_model` cannot be the same object"),
        (sharing, {}, "shares .* with the policy, which trains it"),
        (another(vocab_size=300), {}, "its vocabulary has 300 tokens"),
        (bert, {}, "BertForMaskedLM.* vocabulary|its vocabulary has"),
        (ahead, {}, "BertLMHeadModel is not a causal language model: a token's score depends on tokens after it"),
        (torch.nn.Linear(2, 2), {}, "Linear is not a causal language model"),
        (3, {}, "takes a model or the folder of one, and got a int"),
        (str(tmp_path / "nowhere"), {}, "cannot be loaded"),
        (another(), {"reference": ReferenceConfig(source=str(tmp_path))}, "asked for twice"),
        (str(tmp_path), {"reference": ReferenceConfig(source="pretrained")}, "asked for twice"),
        (another(), {"reference": build_reference(policy)}, "asked for twice"),
        (another(), {"reference": "swap"}, "reference.strategy asks for"),
        (another(), {"reference": ReferenceConfig(dtype="bfloat16")}, "reference.dtype asks for"),
        (another(), {"reference": ReferenceConfig(quantize="int8")}, "reference.quantize asks for"),
    ]
    for ref_model, more, message in cases:
        with pytest.raises(ValueError, match=message):
            make(cls, policy, tmp_path, ref_model=ref_model, **more)


def test_the_base_that_carries_the_policys_adapter_is_refused(tmp_path: Path) -> None:
    base = start()
    policy = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=4))
    with pytest.raises(ValueError, match=r"shares .*lora_A.* with the policy"):
        dpo(KLDPOTrainer, policy, tmp_path, ref_model=base)


# Trainers without args, and with adapters


@pytest.mark.parametrize("kind", ["pissa", "olora", "default"])
@pytest.mark.parametrize("make, cls", [(rloo, KLRLOOTrainer), (grpo, KLGRPOTrainer), *BOTH])
def test_a_peft_policy_is_not_changed_when_its_trainer_is_made(make: Any, cls: type, kind: str, tmp_path: Path) -> None:
    start_of = True if kind == "default" else kind
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=start_of, task_type="CAUSAL_LM")
    policy = get_peft_model(start(), lora)
    ids = torch.arange(10)[None]
    before = policy.eval()(input_ids=ids).logits
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer = make(cls, policy, tmp_path, options | ({"beta": 0.1} if make is grpo else {}))
    assert torch.equal(policy.eval()(input_ids=ids).logits, before)
    assert set(policy.peft_config) == {"default"}
    trainer.train()
    assert not [path for path in (tmp_path / "run").rglob("ref") if path.is_dir()]
    assert (tmp_path / "run" / "checkpoint-1" / "adapter_config.json").is_file()


@pytest.mark.parametrize("cls", [KLRLOOTrainer, KLGRPOTrainer])
def test_a_trainer_without_args_has_trls(cls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start().save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.TrainingArguments.bf16", False, raising=False)
    kind = cls.trl_config
    monkeypatch.setattr(kind, "__init__", _on_cpu(kind.__init__))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "tiny")
    trainer = cls(model, reward_funcs=distinct_letters, train_dataset=PROMPTS, processing_class=byte_tokenizer())
    default = kind("x").beta
    assert trainer.args.output_dir == f"tiny-{kind.__name__.removesuffix('Config')}"
    assert trainer.penalty.coef == default == (0.05 if kind is RLOOConfig else 0.0)
    if kind is RLOOConfig:
        theirs = TRLRLOOTrainer(
            str(tmp_path / "tiny"), reward_funcs=distinct_letters, train_dataset=PROMPTS,
            processing_class=byte_tokenizer(),
        )  # fmt: skip
        assert theirs.args.output_dir == trainer.args.output_dir and theirs.beta == trainer.penalty.coef
        assert (trainer.penalty.config.placement, trainer.penalty.settled.reward) == ("reward", "sequence")


def _on_cpu(init: Any) -> Any:
    def on_cpu(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{"bf16": False, "use_cpu": True, "report_to": [], **kwargs})

    return on_cpu


# trainer.ref_model


@pytest.mark.parametrize("make, cls", [*BOTH, (rloo, KLRLOOTrainer), (grpo, KLGRPOTrainer)])
@pytest.mark.parametrize("strategy", ["clone", "swap", "adapter"])
def test_ref_model_is_a_stand_in_for_the_reference(make: Any, cls: type, strategy: str, tmp_path: Path) -> None:
    first, more = start(), {}
    if strategy == "adapter":
        more = {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], r=4)}
    policy = copy.deepcopy(first)
    beta = {"beta": 0.1} if make is grpo else {}
    trainer = make(cls, policy, tmp_path, {**SGD, "max_steps": 1, **beta}, reference=strategy, **more)
    trainer.train()
    shown = trainer.ref_model
    assert f"strategy='{strategy}'" in repr(shown) and trainer.reference.source in repr(shown)
    ids, mask = torch.arange(14).view(2, 7) + 3, torch.ones(2, 7, dtype=torch.long)
    expected = first.eval()(input_ids=ids, attention_mask=mask).logits
    found = shown(ids, attention_mask=mask).logits
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-6)
    assert not found.requires_grad and not torch.allclose(trainer.model.eval()(input_ids=ids).logits, expected)
    fused = shown(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True).log_probs
    plain = expected[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(fused, plain.detach(), rtol=0, atol=1e-5)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(shown.eval().generate(ids, **options), first.generate(ids, **options))
    assert torch.equal(shown.get_parameter("model.norm.weight"), first.model.norm.weight)
    assert not any(p.requires_grad for p in shown.parameters())
    with pytest.raises(AttributeError, match="no weight 'nothing'"):
        shown.get_parameter("nothing")
    if make in (dpo, kto):
        prepared = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
        scores = trainer.compute_ref_log_probs(trainer.model, prepared)[0]
        labels = prepared["input_ids"].masked_fill(prepared["completion_mask"] == 0, -100)
        tokens = {name: prepared[name] for name in ("input_ids", "attention_mask")}
        own = shown(**tokens, labels=labels, fused_lm_head=True).log_probs.sum(1)
        torch.testing.assert_close(scores, own[: len(scores)])


# A KL that nobody asked for


@pytest.mark.parametrize("make, cls", [(grpo, KLGRPOTrainer), (rloo, KLRLOOTrainer)])
def test_without_beta_and_kl_the_reference_is_not_scored(
    make: Any, cls: type, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_transformers.get_logger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("refkl"), "propagate", True)
    losses = []
    for more in ({}, {"kl": KLConfig(coef=0.0)}, {"reference": "clone"}):
        caplog.clear()
        torch.manual_seed(0)
        options = {**SGD, "beta": 0.0, "save_strategy": "steps", "save_steps": 2, "num_iterations": 2}
        options |= {"eval_strategy": "steps", "eval_steps": 2}
        trainer = make(
            cls, start(), tmp_path / str(len(losses)), options, eval_dataset=PROMPTS.select(range(8)), **more
        )
        calls: list[int] = []
        score = trainer.reference.score
        monkeypatch.setattr(trainer.reference, "score", lambda *a, _s=score, _c=calls, **k: _c.append(1) or _s(*a, **k))
        trainer.train()
        said = [record.message for record in caplog.records if "no KL is measured" in record.message]
        assert bool(calls) == bool(more) and len(said) == (0 if more else 1)
        assert bool(logged(trainer, "kl")) == bool(logged(trainer, "eval_kl")) == bool(more)
        assert (trainer.ref_model is not None) == bool(more)
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1] == losses[2] and any(losses[0])
    resumed = make(cls, start(), tmp_path / "0", options, eval_dataset=PROMPTS.select(range(8)))
    resumed.train(resume_from_checkpoint=True)


# cast_lm_head_to_fp32


@pytest.mark.parametrize("maker", [llama, gpt2])
def test_products_of_a_bf16_head_are_in_fp32(maker: Any, tmp_path: Path) -> None:
    """What cast_lm_head_to_fp32 asks for: log-probabilities of an fp32 head, for bf16 weights."""
    seen: list[tuple[Any, ...]] = []

    class Seen(KLGRPOTrainer):
        def _get_per_token_logps_and_entropies(
            self, model: Any, ids: Any, mask: Any, keep: int, *a: Any, **k: Any
        ) -> Any:
            found = super()._get_per_token_logps_and_entropies(model, ids, mask, keep, *a, **k)
            if not seen:
                with torch.no_grad():
                    positions = (mask.cumsum(-1) - 1).clamp(min=0)
                    hidden = self.model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions)[0]
                    weight = self.model.get_output_embeddings().weight
                    assert hidden.dtype == weight.dtype == torch.bfloat16
                    tokens = ids[:, -keep:, None]
                    for logits in (hidden.float() @ weight.float().T, (hidden @ weight.T).float()):
                        logp = (logits / self.temperature).log_softmax(-1)
                        seen.append((logp[:, -keep - 1 : -1].gather(-1, tokens)[..., 0], mask[:, -keep:]))
                seen.append((found[0].detach(), None))
            return found

    torch.manual_seed(0)
    policy = maker().to(torch.bfloat16)
    with torch.no_grad():
        policy.get_output_embeddings().weight.mul_(2)
    options = {"cast_lm_head_to_fp32": True, "beta": 0.1, "max_steps": 1}
    trainer = grpo(Seen, policy, tmp_path, options, scoring=ScoringConfig(prefix="off"))
    assert trainer.args.cast_lm_head_to_fp32
    trainer.train()
    (cast, mask), (rounded, _), (own, _) = seen
    real = mask.bool()
    assert float((own - cast)[real].abs().max()) < 1e-4
    assert float((rounded - cast)[real].abs().max()) > 1e-3
    assert logged(trainer, "kl")[0] == pytest.approx(0.0, abs=1e-6)


def test_the_model_that_is_held_is_also_for_loops_of_ones_own(tmp_path: Path) -> None:
    policy, other = start(), another()
    reference = build_reference(policy, ReferenceConfig(cache=str(tmp_path / "scores")), model=other)
    batch = TokenBatch(torch.arange(12).view(2, 6), torch.ones(2, 6), torch.ones(2, 6))
    expected = other(input_ids=batch.input_ids).logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])
    torch.testing.assert_close(reference.score(batch).logp[:, 1:], expected[..., 0].detach(), rtol=0, atol=1e-5)
    same = AutoModelForCausalLM.from_config(other.config)
    same.load_state_dict(other.state_dict())
    assert build_reference(policy, model=same).fingerprint() == reference.fingerprint()
    with pytest.raises(ValueError, match="is the policy itself"):
        build_reference(policy, model=policy)

"""The TRL plugin: TRL's numbers where it is right, the right reference where TRL's is not, and nothing of its own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.dpo_trainer
import trl.trainer.grpo_trainer
from peft import LoraConfig, get_peft_model
from support.models import gpt2, llama, shared_batch
from support.trl_runs import LABELLED, PAIRS, PROMPTS, dpo, grpo, kto, logged, rloo, saved
from transformers import LlamaForCausalLM
from trl import DPOTrainer, GRPOTrainer

from refkl import KLConfig, ReferenceConfig, SyncConfig, build_reference, freeze
from refkl.scoring import prepare
from refkl.trl import KLDPOTrainer, KLGRPOTrainer, KLKTOTrainer, KLRLOOTrainer


def no_second_model(monkeypatch: pytest.MonkeyPatch, *allowed: str) -> list[str]:
    """Records every model that TRL loads."""
    loads: list[str] = []
    for module in (trl.trainer.grpo_trainer, trl.trainer.dpo_trainer):
        original = module.create_model_from_path

        def create(path: str, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            loads.append(path)
            return original(path, *args, **kwargs)

        monkeypatch.setattr(module, "create_model_from_path", create)
    return loads


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_grpo_is_trls_where_the_settings_are_trls(tmp_path: Path, accumulation: int, corrected: bool) -> None:
    """beta 0.2 of TRL is k3 differentiated as it stands; same seeds, same completions, same losses and weights."""
    folder = saved(tmp_path)
    # SGD: Adam makes a full step of a gradient that is rounding alone, and then other tokens are sampled.
    options = {"gradient_accumulation_steps": accumulation, "loss_type": "dapo", "learning_rate": 0.3, "max_steps": 4}
    options |= {"optim": "sgd", "use_bias_correction_kl": corrected}
    theirs = grpo(GRPOTrainer, LlamaForCausalLM.from_pretrained(folder), tmp_path, {**options, "beta": 0.2})
    theirs.train()
    kl = KLConfig(coef=0.2, estimator="k3", gradient="autograd", aggregation="token-mean")
    ours = grpo(KLGRPOTrainer, LlamaForCausalLM.from_pretrained(folder), tmp_path, options, kl=kl)
    ours.train()
    assert logged(ours, "kl")[1] > 1e-4
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), abs=2e-6)
    assert logged(ours, "kl") == pytest.approx(logged(theirs, "kl"), abs=2e-5, rel=1e-4)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-5)


def test_dpo_is_trls(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    options = {"gradient_accumulation_steps": 2}
    theirs = dpo(DPOTrainer, LlamaForCausalLM.from_pretrained(folder), tmp_path, options)
    ours = dpo(KLDPOTrainer, LlamaForCausalLM.from_pretrained(folder), tmp_path, options)
    theirs.train()
    ours.train()
    for key in ("loss", "rewards/margins", "logps/chosen", "entropy", "logits/chosen", "mean_token_accuracy"):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), abs=2e-5, rel=1e-4), key
    assert logged(ours, "kl")[0] == 0.0 and logged(ours, "kl")[1] > 1e-3


def test_dpo_runs_a_shared_trunk_once(tmp_path: Path) -> None:
    """The same losses as with a clone, from one pass of the frozen layers a step where there were two."""
    logs, runs = [], []
    for strategy in ("clone", "shared_trunk"):
        torch.manual_seed(0)
        policy = llama(num_hidden_layers=3)
        freeze(policy, ["model.embed_tokens", "model.layers.0", "model.layers.1"])
        trainer = dpo(KLDPOTrainer, policy, tmp_path, None, reference=strategy)
        counts = [0, 0]
        for model in (policy, trainer.reference.model):
            for place in (0, 2):
                model.model.layers[place].self_attn.register_forward_pre_hook(
                    lambda *_, place=place // 2, counts=counts: counts.__setitem__(place, counts[place] + 1)
                )
        for model in (policy.train(), trainer.reference.model.eval()):
            prepare(model, shared_batch())  # a packed row is tried once
        counts[:] = [0, 0]
        trainer.train()
        logs.append(logged(trainer, "loss"))
        runs.append(counts)
    assert logs[0] == logs[1] and logs[0][-1] < logs[0][0]
    # Two forwards find the heads; the first pair's proof is one pass below and two above.
    assert runs == [[8, 8], [6, 10]]


def test_reward_and_kl_of_the_loss_change_with_the_coefficient(tmp_path: Path) -> None:
    """The penalty is in the loss: with a large coefficient the policy stays nearer."""
    runs = {}
    options = {"optim": "sgd", "learning_rate": 0.03, "max_steps": 8}
    for coef in (0.0, 1.0):
        policy = LlamaForCausalLM.from_pretrained(saved(tmp_path))
        trainer = dpo(KLDPOTrainer, policy, tmp_path, options, kl=KLConfig(coef=coef))
        trainer.train()
        runs[coef] = logged(trainer, "kl")
    assert runs[0.0][-1] > 1e-3
    assert runs[1.0][-1] < 0.7 * runs[0.0][-1]


@pytest.mark.parametrize("make", [grpo, dpo])
@pytest.mark.parametrize("kind", ["full", "lora", "peft model"])
def test_trl_loads_no_reference_of_its_own(
    make: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = no_second_model(monkeypatch)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    folder = saved(tmp_path)
    if kind == "peft model":
        model, peft = get_peft_model(LlamaForCausalLM.from_pretrained(folder), lora), None
    else:
        model, peft = folder, lora if kind == "lora" else None
    trainer = make(
        KLGRPOTrainer if make is grpo else KLDPOTrainer,
        model,
        tmp_path,
        {"model_init_kwargs": {"dtype": "float32"}} if isinstance(model, str) else {},
        peft_config=peft,
        kl=KLConfig(coef=0.1),
    )
    assert loads == ([folder] if isinstance(model, str) else [])
    assert trainer.ref_model.reference is trainer.reference
    assert trainer.reference.strategy == ("clone" if kind == "full" else "adapter")
    if kind == "peft model":
        assert set(model.peft_config) == {"default"}
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, _ in model.named_parameters() if "lora_" in n and ".default." in n
        }
    before = trainer.reference.fingerprint()
    trainer.train()
    assert trainer.reference.fingerprint() == before
    assert logged(trainer, "kl")[0] == 0.0


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}], ids=str)
def test_making_the_trainer_leaves_the_policy_as_it_is(options: dict[str, Any], tmp_path: Path) -> None:
    """TRL adds a second adapter called "ref", and making one of these rewrites the base once more."""
    policy = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], **options)).eval()
    ids = torch.arange(2, 20)[None]
    before = policy(input_ids=ids).logits
    trainer = dpo(KLDPOTrainer, policy, tmp_path)
    assert torch.equal(policy(input_ids=ids).logits, before)
    assert trainer.reference.strategy == "swap" and set(policy.peft_config) == {"default"}
    assert "add_adapter" not in vars(policy) and "get_parameter" not in vars(policy)
    trainer.train()
    assert logged(trainer, "kl")[0] == 0.0


def test_a_policy_that_does_not_train_is_refused(tmp_path: Path) -> None:
    policy = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    policy.requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=False"):
        dpo(KLDPOTrainer, policy, tmp_path)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum"])
def test_dpo_with_kl_does_not_depend_on_accumulation(aggregation: str, accumulation: int, tmp_path: Path) -> None:
    """Lengths differ between micro-batches: a mean of their means would be another loss."""
    policy = LlamaForCausalLM.from_pretrained(saved(tmp_path))
    options = {
        "per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation,
        "optim": "sgd", "learning_rate": 0.01, "max_steps": 4, "max_grad_norm": 1e9,
    }  # fmt: skip
    trainer = dpo(KLDPOTrainer, policy, tmp_path, options, kl=KLConfig(coef=1.0, aggregation=aggregation))
    trainer.train()
    whole = _ACCUMULATED.setdefault(aggregation, [logged(trainer, "loss"), [p.detach() for p in policy.parameters()]])
    assert logged(trainer, "loss") == pytest.approx(whole[0], abs=2e-5)
    for mine, right in zip(policy.parameters(), whole[1], strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-5)


_ACCUMULATED: dict[str, list[Any]] = {}


@pytest.mark.parametrize("origin", ["from a config", "edited in memory"])
@pytest.mark.parametrize("make", [grpo, dpo])
def test_the_right_reference_where_trl_fails_or_takes_another(make: Any, origin: str, tmp_path: Path) -> None:
    """TRL reloads `config._name_or_path`: from a config it cannot train with KL, edited it gets another model."""
    if origin == "from a config":
        policy = llama()
    else:
        policy = LlamaForCausalLM.from_pretrained(saved(tmp_path))
        with torch.no_grad():
            policy.lm_head.weight.mul_(0.5)
    trainer = make(KLGRPOTrainer if make is grpo else KLDPOTrainer, policy, tmp_path, kl=KLConfig(coef=0.1))
    trainer.train()
    assert logged(trainer, "kl")[0] == 0.0 and logged(trainer, "kl")[1] > 0


def test_gpt2_is_scored_at_its_positions(tmp_path: Path) -> None:
    """TRL passes no position ids: left-padded GPT-2 prompts are then read from the wrong place, by .43 nats here."""
    from refkl import TokenBatch, score_tokens

    trainer = grpo(KLGRPOTrainer, gpt2(), tmp_path, kl=KLConfig(coef=0.1))
    ids = torch.tensor([[0, 0, 0, 40, 41, 42, 43], [30, 31, 32, 33, 34, 35, 36]])
    mask = (ids != 0).long()
    with torch.no_grad():
        ours = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 3)[0]
        bare = TokenBatch(ids[:1, 3:], mask[:1, 3:], torch.tensor([[0, 1, 1, 1]]))
        right = score_tokens(trainer.model, bare).logp[0, 1:]
        theirs = GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, ids, mask, 3)[0]
    torch.testing.assert_close(ours[0], right, rtol=0, atol=1e-5)
    assert (theirs[0] - right).abs().max() > 0.05


def test_sync_happens_when_the_schedule_says(tmp_path: Path) -> None:
    options = {"max_steps": 5, "gradient_accumulation_steps": 2}
    trainer = dpo(KLDPOTrainer, llama(), tmp_path, options, sync=SyncConfig(every=2, alpha=1.0))
    trainer.train()
    assert trainer.sync.updates == [{"step": 2, "alpha": 1.0}, {"step": 4, "alpha": 1.0}]
    kl = logged(trainer, "kl")
    # alpha 1 copies the policy: the KL measured in the step after a sync starts from zero again.
    assert kl[0] == 0.0 and kl[1] > 0 and kl[2] == 0.0 and kl[3] > 0 and kl[4] == 0.0


def test_scores_kept_by_grpo_are_not_used_past_a_sync(tmp_path: Path) -> None:
    """TRL keeps a rollout over num_iterations steps; after a copy of the policy its second use must give a KL of 0."""
    options = {"num_iterations": 2, "max_steps": 4}
    stale = grpo(KLGRPOTrainer, llama(), tmp_path, options, kl=KLConfig(coef=0.1))
    stale.train()
    trainer = grpo(
        KLGRPOTrainer, llama(), tmp_path, options, kl=KLConfig(coef=0.1), sync=SyncConfig(every=1, alpha=1.0)
    )
    trainer.train()
    assert logged(trainer, "kl") == [0.0] * 4
    assert logged(stale, "kl")[1] > 0  # without the sync, the rollout's second use has drifted


def test_trls_own_sync_setting_is_taken_over(tmp_path: Path) -> None:
    options = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    trainer = dpo(KLDPOTrainer, llama(), tmp_path, options)
    assert (trainer.sync.config.every, trainer.sync.config.alpha) == (2, 0.5)
    assert not any(type(c).__name__ == "SyncRefModelCallback" for c in trainer.callback_handler.callbacks)
    with pytest.raises(ValueError, match="Both sync="):
        dpo(KLDPOTrainer, llama(), tmp_path, options, sync=SyncConfig())


def test_tr_dpo_with_lora(tmp_path: Path) -> None:
    """TRL refuses sync with PEFT."""
    for reference, after in (("clone", "clone"), ("auto", "swap")):
        policy = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
        sync = SyncConfig(every=1, alpha=1.0)
        trainer = dpo(KLDPOTrainer, policy, tmp_path / reference, reference=reference, sync=sync)
        trainer.train()
        assert trainer.reference.updates == 3 and logged(trainer, "kl") == [0.0, 0.0, 0.0]
        assert trainer.reference.strategy == after


def test_resume_brings_back_a_reference_that_had_moved(tmp_path: Path) -> None:
    """TRL starts a resumed run from the first reference."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    sync = SyncConfig(every=2, alpha=0.5)
    torch.manual_seed(0)
    whole = dpo(KLDPOTrainer, llama(), tmp_path / "a", options, sync=sync)
    whole.train()
    torch.manual_seed(0)
    second = dpo(KLDPOTrainer, llama(), tmp_path / "b", options, sync=sync)
    second.train(resume_from_checkpoint=str(tmp_path / "a" / "run" / "checkpoint-2"))
    assert logged(second, "kl")[-2:] == logged(whole, "kl")[-2:]
    assert second.reference.fingerprint() == whole.reference.fingerprint()
    assert second.sync.updates == whole.sync.updates


def test_a_moved_reference_survives_a_resume_without_sync(tmp_path: Path) -> None:
    """Resumed once without sync, its checkpoints must still hold the reference, for the resume after that."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    first = dpo(KLDPOTrainer, llama(), tmp_path / "a", options, sync=SyncConfig(every=2, alpha=0.5))
    first.train()
    moved = tmp_path / "a" / "run" / "checkpoint-2"
    second = dpo(KLDPOTrainer, llama(), tmp_path / "b", options)
    second.train(resume_from_checkpoint=str(moved))
    third = dpo(KLDPOTrainer, llama(), tmp_path / "c", {**options, "max_steps": 6})
    third.train(resume_from_checkpoint=str(tmp_path / "b" / "run" / "checkpoint-4"))
    assert third.reference.fingerprint() == second.reference.fingerprint() and third.reference.updates == 1


def test_every_checkpoint_says_which_reference_it_was_trained_against(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    torch.manual_seed(0)
    trainer = dpo(KLDPOTrainer, llama(), tmp_path, options, sync=SyncConfig(every=2, alpha=0.5))
    built = trainer.reference.fingerprint()
    trainer.train()
    first, second = (json.loads((tmp_path / "run" / f"checkpoint-{n}" / "reference.json").read_text()) for n in (1, 2))
    assert first["fingerprint"] == built and first["updates"] == 0 and first["synced"] == []
    assert (first["strategy"], first["source"]) == ("clone", trainer.reference.source)
    assert set(first["versions"]) == {"refkl", "torch", "transformers", "accelerate", "peft", "trl"}
    assert second["fingerprint"] == trainer.reference.fingerprint() != built
    assert second["synced"] == [{"step": 2, "alpha": 0.5}]


def test_a_run_is_not_resumed_against_another_reference(tmp_path: Path) -> None:
    """The policy as it was saved is no reference of a run that began with another: elsewhere the KL starts anew."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    torch.manual_seed(0)
    dpo(KLDPOTrainer, llama(), tmp_path, options).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    trained = LlamaForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="Give the trainer the model that the first run began with"):
        dpo(KLDPOTrainer, trained, tmp_path, options).train(resume_from_checkpoint=checkpoint)
    torch.manual_seed(0)
    again = dpo(KLDPOTrainer, llama(), tmp_path, {**options, "max_steps": 2})
    again.train(resume_from_checkpoint=checkpoint)
    assert again.state.global_step == 2


def test_a_resumed_adapter_that_is_drawn_anew_has_the_recorded_reference(tmp_path: Path) -> None:
    """A script makes its LoRA before each start, and need not seed it."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    base = llama()

    def trainer(steps: int) -> Any:
        policy = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["q_proj"]))
        return dpo(KLDPOTrainer, policy, tmp_path, {**options, "max_steps": steps}, reference="clone",
                   sync=SyncConfig(every=2, alpha=1.0))  # fmt: skip

    first, second = trainer(1), trainer(2)
    assert first.reference.fingerprint() != second.reference.fingerprint()
    recorded = first.reference.fingerprint()
    first.train()
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert second.reference.updates == 1
    third = trainer(1)
    third.reference.load(tmp_path / "run" / "checkpoint-1" / "reference")
    assert third.reference.fingerprint() == recorded


def test_a_checkpoint_is_not_made_of_a_reference_that_changed(tmp_path: Path) -> None:
    policy = llama()
    policy.model.layers[0].requires_grad_(False)
    trainer = dpo(KLDPOTrainer, policy, tmp_path, {"save_strategy": "steps", "save_steps": 1})
    policy.model.layers[0].mlp.up_proj.weight.data[0, 0] += 0.5
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight has other values"):
        trainer.train()
    assert not list((tmp_path / "run").glob("checkpoint-*/model.safetensors"))


def test_a_sync_can_be_added_on_resume(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    dpo(KLDPOTrainer, llama(), tmp_path, options).train()
    torch.manual_seed(0)
    second = dpo(KLDPOTrainer, llama(), tmp_path, {**options, "max_steps": 4}, sync=SyncConfig(every=4, alpha=0.5))
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert second.sync.updates == [{"step": 4, "alpha": 0.5}]


def test_a_sync_that_cannot_be_made_fails_before_the_run(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    policy = get_peft_model(LlamaForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"has a weight .* that the reference lacks"):
        dpo(KLDPOTrainer, policy, tmp_path, reference=ReferenceConfig(source="pretrained"), sync=SyncConfig())


def test_resuming_a_plain_trainer_without_the_moved_reference_is_refused(tmp_path: Path) -> None:
    """The callback in any transformers trainer: it cannot load the weights itself, and does not go on without them."""
    from transformers import Trainer, TrainingArguments

    from refkl import SyncReferenceCallback

    def trainer(folder: Path) -> tuple[Trainer, Any]:
        torch.manual_seed(0)
        model = llama()
        reference = build_reference(model)
        args = TrainingArguments(str(folder), max_steps=4, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
        data = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 64
        callback = SyncReferenceCallback(reference, SyncConfig(every=2, alpha=0.5))
        return Trainer(model, args, train_dataset=data, callbacks=[callback]), reference

    first, moved = trainer(tmp_path / "a")
    first.train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    second, reference = trainer(tmp_path / "a")
    with pytest.raises(ValueError, match=r"First call reference\.load"):
        second.train(resume_from_checkpoint=str(checkpoint))
    third, reference = trainer(tmp_path / "a")
    reference.load(checkpoint / "reference")
    third.train(resume_from_checkpoint=str(checkpoint))
    assert reference.fingerprint() == moved.fingerprint()


def test_what_is_asked_twice_or_cannot_be_honoured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="asked for twice"):
        grpo(KLGRPOTrainer, llama(), tmp_path, {"beta": 0.1}, kl=KLConfig())
    with pytest.raises(ValueError, match="use_bias_correction_kl False leaves out the ratio"):
        grpo(KLGRPOTrainer, llama(), tmp_path, {"use_bias_correction_kl": False}, kl=KLConfig())
    uncorrected = grpo(KLGRPOTrainer, llama(), tmp_path, {"use_bias_correction_kl": False, "beta": 0.1})
    assert uncorrected.penalty.config.gradient == "autograd"


def test_beta_alone_is_the_coefficient(tmp_path: Path) -> None:
    """One changed line: a script that sets TRL's beta keeps its meaning."""
    trainer = grpo(KLGRPOTrainer, llama(), tmp_path, {"beta": 0.3})
    assert trainer.penalty.coef == 0.3 and trainer.args.beta == 0.3
    assert trainer.penalty.config.aggregation == "token-mean"
    sequences = grpo(KLGRPOTrainer, llama(), tmp_path, {"beta": 0.3, "loss_type": "grpo"})
    assert sequences.penalty.config.aggregation == "seq-mean-token-mean"
    constant = grpo(KLGRPOTrainer, llama(), tmp_path, {"beta": 0.3, "loss_type": "dr_grpo"}).penalty.config
    assert (constant.aggregation, constant.length) == ("seq-mean-token-sum-norm", 8)


@pytest.mark.parametrize(
    "make, cls", [(grpo, KLGRPOTrainer), (rloo, KLRLOOTrainer), (dpo, KLDPOTrainer), (kto, KLKTOTrainer)]
)
def test_evaluation_logs_kl_and_leaves_the_penalty_alone(make: Any, cls: type, tmp_path: Path) -> None:
    data = {dpo: PAIRS, kto: LABELLED}.get(make, PROMPTS)
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "per_device_eval_batch_size": 4}
    more = {"reference": "clone"} if make is grpo else {}  # beta is 0, so that without it no KL is measured
    trainer = make(cls, llama(), tmp_path, options, eval_dataset=data, **more)
    name, passed = trainer.kl_metric, []
    penalise = trainer._penalise

    def kept(*args: Any, **kwargs: Any) -> Any:
        output = penalise(*args, **kwargs)
        if not trainer.model.training:
            passed.append((float(output.per_token.sum()), float(args[2].sum())))
        return output

    trainer._penalise = kept
    trainer.train()
    found = logged(trainer, f"eval_{name}")
    batches = len(passed) // 2
    for step, value in enumerate(found):
        means = [kl / tokens for kl, tokens in passed[step * batches : (step + 1) * batches]]
        assert value == pytest.approx(sum(means) / batches, rel=1e-4)
    assert len(found) == 2 and found[1] != 0.0
    assert len(logged(trainer, "kl/coef")) == 2 and logged(trainer, name)[0] == 0.0


def test_a_reference_from_elsewhere(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    torch.manual_seed(1)
    trainer = dpo(KLDPOTrainer, llama(), tmp_path, reference=ReferenceConfig(source=folder))
    trainer.train()
    assert logged(trainer, "kl")[0] > 0.01


@pytest.mark.parametrize("make, cls", [(grpo, KLGRPOTrainer), (dpo, KLDPOTrainer)])
@pytest.mark.parametrize(
    "given, message",
    [
        ({"kl": 0.1}, "kl= takes a KLConfig, and got a float"),
        ({"sync": 5}, "sync= takes a SyncConfig, and got a int"),
        ({"scoring": "off"}, "scoring= takes a ScoringConfig, and got a str"),
        ({"reference": llama()}, "name of a strategy or a ReferenceConfig, but a LlamaForCausalLM was given"),
    ],
)
def test_what_is_no_configuration_is_told(make: Any, cls: type, given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make(cls, llama(), tmp_path, **given)

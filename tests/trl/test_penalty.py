"""The penalty in TRL's trainers: controllers that go on after a resume, and the KL in GRPO's advantages."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.trainer
from support.models import llama
from support.trl_runs import dpo, grpo, logged, saved
from transformers import LlamaForCausalLM
from trl import GRPOTrainer

from refkl import KLConfig, ReferenceConfig
from refkl.checkpoint import MARK, RECORD
from refkl.hf.checkpoints import PENALTY_STATE
from refkl.trl import KLDPOTrainer, KLGRPOTrainer

CONTROLLERS: dict[str, dict[str, Any]] = {
    "adaptive": {"coef": 0.1, "target": 0.05, "horizon": 20},
    "dual": {"coef": 0.1, "target": 0.05, "learning_rate": 0.3, "unit": "token"},
    "linear": {"coef": 0.1, "end_coef": 0.4, "steps": 4},
}
SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_resumed_run_has_the_coefficients_of_one_that_was_not_stopped(name: str, tmp_path: Path) -> None:
    kl = KLConfig(controller=name, **CONTROLLERS[name])
    options = {"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    torch.manual_seed(0)
    whole = dpo(KLDPOTrainer, llama(), tmp_path / "whole", {**options, **SAVING}, kl=kl)
    whole.train()
    torch.manual_seed(0)
    second = dpo(KLDPOTrainer, llama(), tmp_path / "second", {**options, **SAVING}, kl=kl)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "run" / "checkpoint-2"))
    coefs = logged(whole, "kl/coef")
    assert len(set(coefs)) == 4 and coefs[0] == 0.1  # one update per optimizer step, of two micro-batches
    assert logged(second, "kl/coef")[-2:] == coefs[-2:]
    assert second.penalty.state_dict() == whole.penalty.state_dict()
    assert logged(second, "loss")[-2:] == logged(whole, "loss")[-2:]


def test_the_controller_is_saved_before_older_checkpoints_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With save_total_limit=1 a kill in between would else leave a checkpoint without its controller."""
    found = []
    rotate = transformers.trainer.rotate_checkpoints

    def spy(output_dir: str, **options: Any) -> None:
        newest = max(Path(output_dir).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        found.append(json.loads((newest / PENALTY_STATE).read_text()))
        rotate(output_dir=output_dir, **options)

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", spy)
    options = {**SAVING, "save_steps": 1, "max_steps": 2, "save_total_limit": 1}
    trainer = dpo(KLDPOTrainer, llama(), tmp_path, options, kl=KLConfig(controller="linear", **CONTROLLERS["linear"]))
    trainer.train()
    assert found == [{"controller": {"controller": "linear", "step": step}} for step in (1, 2)]
    assert not list((tmp_path / "run").rglob("*tmp"))


def test_a_checkpoint_of_another_controller(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {**SAVING, "max_steps": 2}
    start = llama()
    dpo(KLDPOTrainer, copy.deepcopy(start), tmp_path, options, kl=KLConfig(coef=0.1)).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"

    def resumed(reference: str = "recorded", **kl: Any) -> Any:
        options = {"kl": KLConfig(**kl), "resume_reference": reference}
        trainer = dpo(KLDPOTrainer, copy.deepcopy(start), tmp_path, {"max_steps": 3}, **options)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return logged(trainer, "kl/coef")[-1]

    dual = {"controller": "dual", **CONTROLLERS["dual"], "coef": 0.25}
    with pytest.raises(
        ValueError, match=rf"of the KL controller 'fixed' and cannot be loaded by 'dual'.*{PENALTY_STATE}"
    ):
        resumed(**dual)
    assert resumed(coef=0.7) == 0.7  # a fixed coefficient is a setting: what this run asks for holds
    for name in (PENALTY_STATE, RECORD, MARK):  # as TRL's own trainer writes one
        (checkpoint / name).unlink()
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        assert resumed("initial", **dual) == 0.25
    transformers.utils.logging.disable_propagation()
    assert "is missing: the 'dual' KL controller begins at coefficient 0.25" in caplog.text


@pytest.mark.parametrize("accumulation", [1, 2])
def test_dr_grpo_is_trls(accumulation: int, tmp_path: Path) -> None:
    """TRL divides by max_completion_length whatever the lengths are; so does the constant length here."""
    folder = saved(tmp_path)
    options = {
        "gradient_accumulation_steps": accumulation,
        "loss_type": "dr_grpo",
        "learning_rate": 0.3,
        "optim": "sgd",
    }
    options |= {"use_bias_correction_kl": True}
    theirs = grpo(GRPOTrainer, LlamaForCausalLM.from_pretrained(folder), tmp_path, {**options, "beta": 0.2})
    theirs.train()
    kl = KLConfig(coef=0.2, gradient="autograd", aggregation="seq-mean-token-sum-norm", length=8)
    ours = grpo(KLGRPOTrainer, LlamaForCausalLM.from_pretrained(folder), tmp_path, options, kl=kl)
    ours.train()
    assert logged(ours, "kl")[-1] > 1e-4
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), abs=2e-6)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-5)


@pytest.mark.parametrize("reward", ["return_to_go", "token", "sequence"])
def test_grpo_with_the_kl_in_the_advantages_is_a_plain_computation(reward: str, tmp_path: Path) -> None:
    """Loss and gradient of each micro-batch, over two iterations of the same rollouts, with another reference."""
    torch.manual_seed(1)
    llama().save_pretrained(tmp_path / "reference")
    torch.manual_seed(0)
    options = {"loss_type": "dapo", "num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    options |= {"per_device_train_batch_size": 2, "optim": "sgd", "learning_rate": 1.0}
    kl = KLConfig(coef=0.3, placement="reward", reward=reward, gamma=0.9 if reward == "return_to_go" else None)
    source = ReferenceConfig(strategy="clone", source=str(tmp_path / "reference"))
    trainer = grpo(KLGRPOTrainer, llama(), tmp_path, options, kl=kl, reference=source)
    compute = trainer._compute_loss
    ratios, kls = [], []

    def checked(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        before = inputs["advantages"].clone()
        loss = compute(model, inputs)
        assert torch.equal(inputs["advantages"], before)  # TRL keeps them for the next iteration
        mask, parameters = inputs["completion_mask"], list(model.parameters())
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], mask], 1)
        logp = trainer._get_per_token_logps_and_entropies(model, ids, attention, mask.shape[1])[0]
        old = inputs.get("old_per_token_logps", logp).detach()
        d = ((old - inputs["ref_per_token_logps"]) * mask).tolist()
        credit = torch.zeros_like(logp)
        for b, row in enumerate(d):
            for t in range(len(row)):
                if mask[b, t]:
                    later = {
                        "token": [row[t]],
                        "sequence": row,
                        "return_to_go": [0.9**k * x for k, x in enumerate(row[t:])],
                    }
                    credit[b, t] = before[b] - 0.3 * sum(later[reward])
        ratio = (logp - old).exp()
        surrogate = torch.min(ratio * credit, ratio.clamp(0.8, 1.2) * credit)
        normalizer = inputs["num_items_in_batch"] * 2 / trainer.args.steps_per_generation
        expected = -(surrogate * mask).sum() / normalizer
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for found, right in zip(
            torch.autograd.grad(loss, parameters, retain_graph=True),
            torch.autograd.grad(expected, parameters),
            strict=True,
        ):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
        ratios.append(((ratio - 1).abs() * mask).max().item())
        kls.append((sum(map(sum, d)), mask.sum().item()))
        return loss

    trainer._compute_loss = checked
    trainer.train()
    assert len(ratios) == 4 and max(ratios[:2]) < 1e-5 and max(ratios[2:]) > 1e-2
    for step in range(2):
        window = kls[2 * step : 2 * step + 2]
        mean = sum(total for total, _ in window) / sum(tokens for _, tokens in window)
        assert logged(trainer, "kl")[step] == pytest.approx(mean, rel=1e-4) and mean > 0.1


def test_a_penalty_that_a_trainer_cannot_apply_is_refused(tmp_path: Path) -> None:
    for make, cls in ((dpo, KLDPOTrainer), (grpo, KLGRPOTrainer)):
        cached = ReferenceConfig(cache=str(tmp_path / "scores"))
        with pytest.raises(ValueError, match="cache"):
            make(cls, llama(), tmp_path, kl=KLConfig(estimator="exact"), reference=cached)
        with pytest.raises(ValueError, match=rf"{cls.__name__} holds one reference, and kl.reference_weights"):
            make(cls, llama(), tmp_path, kl=KLConfig(reference_weights=[0.5, 0.5]))
    with pytest.raises(ValueError, match=r"KLDPOTrainer has no rewards to which kl.placement 'reward'.*'loss'"):
        dpo(KLDPOTrainer, llama(), tmp_path, kl=KLConfig(placement="reward"))
    for options in ({"top_entropy_quantile": 0.5}, {"off_policy_mask_threshold": 0.5}):
        with pytest.raises(
            ValueError, match=f"{next(iter(options))} drops tokens from TRL's loss, and with them their KL"
        ):
            grpo(KLGRPOTrainer, llama(), tmp_path, options, kl=KLConfig(placement="reward"))

"""In the trainers a prompt is run once for all of its completions, and a step's gradient stays what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import shared_batch
from support.trl_runs import dpo, grpo, kto, logged, rloo, saved, train
from transformers import LlamaForCausalLM

from refkl import KLConfig, ReferenceConfig, ScoringConfig
from refkl.scoring import prepare
from refkl.trl import KLDPOTrainer, KLGRPOTrainer, KLKTOTrainer, KLRLOOTrainer

TRAINERS = {"grpo": (grpo, KLGRPOTrainer), "rloo": (rloo, KLRLOOTrainer)}
PAIRED = {"dpo": (dpo, KLDPOTrainer), "kto": (kto, KLKTOTrainer)}
OFF = ScoringConfig(prefix="off")
WHOLE = {"grpo": ("prompt_ids", "completion_ids"), "dpo": ("input_ids",)}
"""What a micro-batch as it is has for tokens."""


def micro_batches(trainer: Any) -> list[dict[str, Any]]:
    """What the losses of a training are computed of."""
    seen: list[dict[str, Any]] = []
    compute = trainer._compute_loss

    def watched(model: Any, inputs: dict[str, Any]) -> Any:
        seen.append(inputs)
        return compute(model, inputs)

    trainer._compute_loss = watched
    trainer.train()
    return seen


def prompts(micro: dict[str, Any]) -> list[str]:
    return [str(row[mask.bool()].tolist()) for row, mask in zip(micro["prompt_ids"], micro["prompt_mask"], strict=True)]


@pytest.mark.parametrize("method", TRAINERS)
def test_completions_of_one_prompt_meet(method: str, tmp_path: Path) -> None:
    """TRL deals a rollout's rows out at random; those of an optimizer step are put together again, and no others."""
    make, cls = TRAINERS[method]
    policy = saved(tmp_path)
    options = {"gradient_accumulation_steps": 4, "max_steps": 2}
    kept, dealt = (
        micro_batches(make(cls, LlamaForCausalLM.from_pretrained(policy), tmp_path, options, scoring=scoring))
        for scoring in (None, OFF)
    )
    assert all(len(set(prompts(micro))) == 1 for micro in kept) and len(kept) == 8
    assert any(len(set(prompts(micro))) > 1 for micro in dealt)
    for step in (slice(0, 4), slice(4, 8)):
        assert sorted(p for micro in kept[step] for p in prompts(micro)) == sorted(
            p for micro in dealt[step] for p in prompts(micro)
        )


def test_a_loss_that_depends_on_its_micro_batch_keeps_it(tmp_path: Path) -> None:
    """bnpo is a mean over each micro-batch's own tokens: which rows are in one stays TRL's."""
    policy = saved(tmp_path)
    options = {"gradient_accumulation_steps": 4, "max_steps": 1, "loss_type": "bnpo"}
    kept, dealt = (
        micro_batches(grpo(KLGRPOTrainer, LlamaForCausalLM.from_pretrained(policy), tmp_path, options, scoring=scoring))
        for scoring in (None, OFF)
    )
    assert any(len(set(prompts(micro))) > 1 for micro in kept)
    assert [micro["refkl_row"].tolist() for micro in kept] == [micro["refkl_row"].tolist() for micro in dealt]


def test_two_optimizer_steps_of_a_rollout_keep_their_rows(tmp_path: Path) -> None:
    policy = saved(tmp_path)
    options = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 2}
    kept, dealt = (
        micro_batches(grpo(KLGRPOTrainer, LlamaForCausalLM.from_pretrained(policy), tmp_path, options, scoring=scoring))
        for scoring in (None, OFF)
    )
    for step in (slice(0, 2), slice(2, 4)):
        rows = [sorted(r for micro in found[step] for r in micro["refkl_row"].tolist()) for found in (kept, dealt)]
        assert rows[0] == rows[1] and len(rows[0]) == 8


@pytest.mark.parametrize("method", [*TRAINERS, *PAIRED])
@pytest.mark.parametrize("estimator", ["k3", "exact"])
def test_gradients_are_the_same(method: str, estimator: str, tmp_path: Path) -> None:
    make, cls = (TRAINERS | PAIRED)[method]
    folder = saved(tmp_path)
    kl = KLConfig(coef=0.3, estimator=estimator)
    options = {"gradient_accumulation_steps": 2}
    off = train(make, cls, folder, tmp_path, options, kl=kl, scoring=OFF)
    on = train(make, cls, folder, tmp_path, options, off, kl=kl, scoring=ScoringConfig())
    assert logged(on[0], "kl") == pytest.approx(logged(off[0], "kl"), rel=1e-4, abs=1e-6)
    assert logged(on[0], "loss") == pytest.approx(logged(off[0], "loss"), rel=1e-4, abs=1e-5)
    for found, right in zip(on[1].gradients, off[1].gradients, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5 * max(1.0, float(right.abs().max())))


def test_a_limit_of_tokens_takes_the_place_of_the_micro_batch(tmp_path: Path) -> None:
    """With reference.max_tokens a rollout is scored in parts of so many tokens; else in the loss's micro-batches."""
    options = {"gradient_accumulation_steps": 4, "max_steps": 1}
    found: dict[int | None, tuple[list[int], torch.Tensor]] = {}
    for limit in (None, 10_000):
        torch.manual_seed(0)
        policy = LlamaForCausalLM.from_pretrained(saved(tmp_path))
        reference = ReferenceConfig(strategy="clone", max_tokens=limit)
        trainer = grpo(KLGRPOTrainer, policy, tmp_path, options, reference=reference)
        sizes: list[int] = []
        embedding = trainer.reference.model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, args, out, sizes=sizes: sizes.append(args[0].numel()))
        prepare(trainer.reference.model.eval(), shared_batch())  # a packed row is tried once
        sizes.clear()
        micro = micro_batches(trainer)
        scores = torch.cat([x["ref_per_token_logps"] for x in micro])
        found[limit] = sizes[-4:] if limit is None else sizes[-1:], scores
        assert len(sizes) == (5 if limit is None else 2)  # the first is the look for the head
    assert sum(found[10_000][0]) <= sum(found[None][0])  # less where micro-batches have a prompt in common
    torch.testing.assert_close(found[None][1], found[10_000][1], rtol=0, atol=1e-5)


def test_rollouts_of_a_subclass_are_left_as_they_are(tmp_path: Path) -> None:
    """Without the numbers that refkl gives its rows nothing is regrouped, and training goes on."""

    class Own(KLGRPOTrainer):
        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            rollout = super()._generate_and_score_completions(inputs)
            return {name: value for name, value in rollout.items() if name != "refkl_row"}

    policy = LlamaForCausalLM.from_pretrained(saved(tmp_path))
    seen = micro_batches(grpo(Own, policy, tmp_path, {"gradient_accumulation_steps": 4, "max_steps": 1}))
    assert len(seen) == 4 and any(len(set(prompts(micro))) > 1 for micro in seen)


@pytest.mark.parametrize("method", ["grpo", "dpo"])
@pytest.mark.parametrize("scoring", [None, OFF], ids=["auto", "off"])
def test_each_token_runs_once(method: str, scoring: ScoringConfig | None, tmp_path: Path) -> None:
    """Counted in the embedding of policy and reference: prompts once each, completions without their last token; or
    with scoring.prefix "off" all there is."""
    make, cls = (TRAINERS | PAIRED)[method]
    policy = LlamaForCausalLM.from_pretrained(saved(tmp_path))
    trainer = make(cls, policy, tmp_path, {"max_steps": 1}, scoring=scoring, kl=KLConfig(coef=0.0))
    counts: dict[str, list[int]] = {"policy": [], "reference": []}

    def watch(name: str, model: Any) -> None:
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, args, out: counts[name].append(args[0].numel()))

    watch("reference", trainer.reference.model)
    seen: list[int] = []
    compute = trainer._compute_loss

    def watched(model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        if scoring is OFF:
            seen.append(sum(inputs[name].numel() for name in WHOLE[method]))
        elif method == "grpo":
            lengths = inputs["completion_mask"].sum(1) - 1
            seen.append(int(inputs["prompt_mask"][0].sum() + lengths.sum()))
        else:  # a chosen and a rejected completion of each prompt; some prompts are in several pairs
            rows = zip(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"], strict=True)
            split = [(tuple(i[a.bool() & ~c.bool()].tolist()), int(c.sum()) - 1) for i, a, c in rows]
            seen.append(sum(len(p) for p in {p for p, _ in split}) + sum(length for _, length in split))
        counts["policy"].clear()
        watch("policy", trainer.accelerator.unwrap_model(model))
        return compute(model, inputs, *rest)

    trainer._compute_loss = watched
    trainer.train()
    # The first time the head is looked for, on two tokens.
    assert counts["policy"][-1:] == counts["reference"][-1:] == seen

"""TRL's `precompute_ref_log_probs`: the reference scores the data when training begins, and is then freed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.launching import accelerate_launch
from support.models import dynamic_rope, gpt2, llama
from support.trl_runs import LABELLED, PAIRS, dpo, kto, logged

from refkl import KLConfig, ReferenceConfig, ScoringConfig, SyncConfig, build_reference
from refkl.trl import KLDPOTrainer, KLKTOTrainer

BOTH = [(dpo, KLDPOTrainer), (kto, KLKTOTrainer)]
SGD = {"optim": "sgd", "learning_rate": 0.1, "train_sampling_strategy": "sequential"}


def data_of(make: Any) -> Dataset:
    return PAIRS if make is dpo else LABELLED


def start(maker: Any = llama, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return maker()


@pytest.mark.parametrize("make, cls", BOTH)
@pytest.mark.parametrize("maker", [llama, gpt2])
def test_precomputed_scores_give_the_same_losses(make: Any, cls: type, maker: Any, tmp_path: Path) -> None:
    runs, sizes = [], []
    for precompute in (False, True):
        options = {**SGD, "max_steps": 4, "precompute_ref_log_probs": precompute, "precompute_ref_batch_size": 3}
        options |= {"eval_strategy": "steps", "eval_steps": 2}
        more = {"scoring": ScoringConfig(prefix="off"), "eval_dataset": data_of(make).select(range(4))}
        trainer = make(cls, start(maker), tmp_path, options, **more)
        if precompute:
            hook = lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"]))  # noqa: E731
            trainer.reference.uncached.model.register_forward_pre_hook(hook, with_kwargs=True)
        trainer.train()
        runs.append([logged(trainer, name) for name in ("loss", "eval_loss", "rewards/margins", trainer.kl_metric)])
    for mine, expected in zip(runs[1], runs[0], strict=True):
        assert mine == pytest.approx(expected, abs=1e-6)
    assert len(set(runs[1][0])) > 2 and len(runs[1][1]) == 2
    assert trainer.reference.freed and trainer.ref_model is None
    assert any((tmp_path / "run" / "_reference_scores").iterdir())
    # A batch of three pairs has six sequences, and one of KTO's three of each kind.
    assert max(sizes) == (6 if make is dpo else 3)


@pytest.mark.parametrize("make, cls", BOTH)
def test_a_second_run_finds_the_precomputed_scores(make: Any, cls: type, tmp_path: Path) -> None:
    losses, counts = [], []
    for _ in range(2):
        trainer = make(cls, start(), tmp_path, {**SGD, "precompute_ref_log_probs": True})
        ran: list[int] = []
        trainer.reference.uncached.model.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        trainer.train()
        losses.append(logged(trainer, "loss"))
        counts.append(len(ran))
    assert losses[0] == losses[1] and counts[0] >= 3 and counts[1] == 0


@pytest.mark.parametrize("make, cls", BOTH)
def test_new_data_after_precomputed_training(make: Any, cls: type, tmp_path: Path) -> None:
    """Refused, in TRL's words, where the reference is gone; answered where it is still there."""
    new = data_of(make).select(range(4))
    options = {**SGD, "max_steps": 1, "precompute_ref_log_probs": True, "per_device_eval_batch_size": 4}
    trainer = make(cls, start(), tmp_path / "full", options)
    before = trainer.evaluate(eval_dataset=new)["eval_loss"]
    trainer.train()
    with pytest.raises(ValueError, match="Cannot compute reference log-probs for a dataset passed to"):
        trainer.evaluate(eval_dataset=new)

    kept = make(cls, start(), tmp_path / "given", options, ref_model=start())
    assert kept.evaluate(eval_dataset=new)["eval_loss"] == pytest.approx(before, abs=1e-6)
    kept.train()
    assert not kept.reference.freed and kept.ref_model is not None

    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    found = []
    for precompute in (True, False):
        torch.manual_seed(5)
        policy = get_peft_model(start(), lora)
        adapted = make(cls, policy, tmp_path / f"lora {precompute}", options | {"precompute_ref_log_probs": precompute})
        adapted.train()
        found.append(adapted.evaluate(eval_dataset=new)["eval_loss"])
        assert not adapted.reference.freed and set(policy.peft_config) == {"default"}
    assert found[0] == pytest.approx(found[1], abs=1e-6)


@pytest.mark.parametrize("make, cls", BOTH)
def test_a_resumed_run_takes_up_its_precomputed_scores(make: Any, cls: type, tmp_path: Path) -> None:
    options = {**SGD, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "precompute_ref_log_probs": True}
    whole = make(cls, start(), tmp_path, options)
    whole.train()
    resumed = make(cls, start(), tmp_path, options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert logged(resumed, "loss")[2:] == logged(whole, "loss")[2:]
    with pytest.raises(ValueError, match="trained against a reference with fingerprint"):
        make(cls, start(seed=7), tmp_path, options).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


@pytest.mark.parametrize("make, cls", BOTH)
@pytest.mark.parametrize(
    "options, more, message",
    [
        ({"sync_ref_model": True}, {}, "cannot use `sync_ref_model=True`.*together with `precompute_ref_log_probs"),
        ({}, {"sync": SyncConfig(every=2)}, "or sync= together with `precompute_ref_log_probs"),
        ({}, {"kl": KLConfig(estimator="exact")}, "precompute_ref_log_probs keeps log-probabilities only"),
        ({}, {"kl": KLConfig(exact_every=2)}, "precompute_ref_log_probs keeps log-probabilities only"),
        ({}, {"train_dataset": "streamed"}, "precompute_ref_log_probs.*not supported with IterableDataset"),
        ({}, {"eval_dataset": "streamed"}, "precompute_ref_log_probs.*not supported with IterableDataset"),
    ],
)
def test_what_cannot_be_precomputed(
    make: Any, cls: type, options: Any, more: Any, message: str, tmp_path: Path
) -> None:
    streamed = data_of(make).to_iterable_dataset()
    more = {name: streamed if value == "streamed" else value for name, value in more.items()}
    with pytest.raises(ValueError, match=message):
        make(cls, start(), tmp_path, {**options, "precompute_ref_log_probs": True}, **more)


def test_a_cache_of_the_users_is_the_one_that_is_filled(tmp_path: Path) -> None:
    config = ReferenceConfig(cache=str(tmp_path / "mine"))
    trainer = dpo(KLDPOTrainer, start(), tmp_path, {"precompute_ref_log_probs": True}, reference=config)
    trainer.train()
    assert any((tmp_path / "mine").iterdir()) and not (tmp_path / "run" / "_reference_scores").exists()


@pytest.mark.parametrize("make, cls", BOTH)
def test_a_reference_of_the_users_is_not_freed(make: Any, cls: type, tmp_path: Path) -> None:
    policy = start()
    reference = build_reference(policy)
    fingerprint = reference.fingerprint()
    trainer = make(cls, policy, tmp_path, {**SGD, "precompute_ref_log_probs": True}, reference=reference)
    trainer.train()
    assert trainer.ref_model is not None and not trainer.reference.freed
    reference.verify()
    assert reference.fingerprint() == fingerprint
    trainer.evaluate(eval_dataset=data_of(make).select(range(4)))


def test_rows_that_must_be_scored_together_are_refused_before_the_reference_is_freed(tmp_path: Path) -> None:
    """The rows to refuse are in the first data set, and the reference is freed after the last."""
    pairs = [{"prompt": "hello", "chosen": " what a long answer this is", "rejected": "no"}] * 4
    short = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4)
    more = {"train_dataset": Dataset.from_list(pairs), "eval_dataset": short}
    options = {"precompute_ref_log_probs": True, "per_device_train_batch_size": 2}
    trainer = dpo(KLDPOTrainer, start(lambda: dynamic_rope(12)), tmp_path, {**SGD, **options}, **more)
    with pytest.raises(ValueError, match=r"scaled by the longest row.*precompute_ref_log_probs of a TRL trainer False"):
        trainer.train()
    assert not trainer.reference.freed


def test_precomputing_leaves_the_random_numbers_of_training(tmp_path: Path) -> None:
    """Dropout of the policy drops the same units with and without it."""
    losses = []
    for precompute in (False, True):
        policy = start(lambda: gpt2(resid_pdrop=0.3).train())
        options = {**SGD, "disable_dropout": False, "precompute_ref_log_probs": precompute}
        trainer = dpo(KLDPOTrainer, policy, tmp_path, options, scoring=ScoringConfig(prefix="off"))
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[1] == pytest.approx(losses[0], abs=1e-6) and losses[0][0] != pytest.approx(0.6931, abs=1e-3)


def test_two_processes_share_the_scores(tmp_path: Path) -> None:
    output = accelerate_launch("multi", "tests/scripts/precomputed_ranks.py", str(tmp_path), timeout=150)
    assert "rank 0 agrees" in output and "rank 1 agrees" in output

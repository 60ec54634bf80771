"""Data of which no row is left, or that fills no batch: a sentence before the first step, with what to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from support.models import byte_tokenizer, llama
from support.train_inputs import write_config
from support.trl_runs import COMMON, LABELLED, PAIRS, PROMPTS, dpo, grpo, kto, rloo
from trl import SFTConfig

from refkl.cli import main
from refkl.trl import KLDPOTrainer, KLGRPOTrainer, KLKTOTrainer, KLRLOOTrainer, KLSFTTrainer


def sft(cls: type, model: Any, tmp_path: Path, options: dict[str, Any] | None = None, **refkl: Any) -> Any:
    args = SFTConfig(str(tmp_path / "run"), **{**COMMON, "max_steps": 3, **(options or {})})
    return cls(model, args=args, processing_class=byte_tokenizer(), **{"train_dataset": TEXTS, **refkl})


TEXTS = LABELLED.remove_columns("label")
OFFLINE = [(dpo, KLDPOTrainer), (kto, KLKTOTrainer), (sft, KLSFTTrainer)]
ONLINE = [(grpo, KLGRPOTrainer, PROMPTS), (rloo, KLRLOOTrainer, PROMPTS)]
ALL = [*ONLINE, (dpo, KLDPOTrainer, PAIRS), (kto, KLKTOTrainer, LABELLED), (sft, KLSFTTrainer, TEXTS)]


@pytest.mark.parametrize(("make", "cls"), OFFLINE)
def test_prompts_that_all_fill_max_length(make: Any, cls: type, tmp_path: Path) -> None:
    """The shortest prompt, "abc", has 3 tokens: at 4 the rows with it are left."""
    with pytest.raises(ValueError, match=r"no row left to train on: .* fills max_length, which is 3\. Raise"):
        make(cls, llama(), tmp_path, {"max_length": 3})
    assert len(make(cls, llama(), tmp_path, {"max_length": 4}).train_dataset) == 6


@pytest.mark.parametrize("method", ["dpo", "kto", "sft"])
def test_the_command_with_prompts_that_are_all_too_long(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, method)
    kinds = {"prompt": "hello", "chosen": " a", "rejected": " b", "completion": " a", "label": True}
    (tmp_path / "data.jsonl").write_text((json.dumps(kinds) + "\n") * 8)
    assert main(["train", str(config), "--trainer.max_length", "5"]) == 2
    error = capsys.readouterr().err
    assert "prompt fills max_length, which is 5. Raise max_length above" in error and "Traceback" not in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(("make", "cls", "data"), ALL)
def test_data_without_a_row(make: Any, cls: type, data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train_dataset has no row to train on\. Give it at least one"):
        make(cls, llama(), tmp_path, train_dataset=data.select([]))


@pytest.mark.parametrize(("make", "cls", "data"), ONLINE)
def test_fewer_prompts_than_a_rollout_needs(make: Any, cls: type, data: Dataset, tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = make(cls, llama(), tmp_path, options, train_dataset=data.select(range(3)))
    with pytest.raises(ValueError) as error:
        trainer.train()
    assert trainer.state.global_step == 0
    for part in ("3 rows of train_dataset do not fill one batch of 4 prompts", "generation_batch_size 16",
                 "num_generations 4", "Give at least 4 rows"):  # fmt: skip
        assert part in str(error.value)
    trainer = make(cls, llama(), tmp_path, options, train_dataset=data.select(range(4)))
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(("make", "cls", "data"), ALL[2:])
def test_a_last_batch_that_is_dropped_and_the_only_one(make: Any, cls: type, data: Dataset, tmp_path: Path) -> None:
    options = {"dataloader_drop_last": True, "per_device_train_batch_size": 4, "max_steps": 1}
    trainer = make(cls, llama(), tmp_path, options, train_dataset=data.select(range(3)))
    with pytest.raises(ValueError, match=r"3 rows .* do not fill one batch.* is 4 and dataloader_drop_last True"):
        trainer.train()
    trainer = make(cls, llama(), tmp_path, options, train_dataset=data.select(range(4)))
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_stream_has_no_length(tmp_path: Path) -> None:
    trainer = dpo(KLDPOTrainer, llama(), tmp_path, {"max_steps": 1}, train_dataset=PAIRS.to_iterable_dataset())
    trainer.train()
    assert trainer.state.global_step == 1

"""`refkl train` with each kind of reward: what is logged is what plain code says of the same completions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import train_inputs
from support.models import byte_tokenizer
from support.reward_models import alone, classifier
from support.train_inputs import write_config
from torch import nn
from transformers import LlamaForSequenceClassification

from refkl.cli import main
from refkl.cli.inputs import load_data
from refkl.cli.settings import parse_run
from refkl.cli.train import make_trainer
from refkl.config import DataConfig, ModelConfig, RewardConfig, RunConfig
from refkl.rewards import RewardModel, TaskReward

LETTERS = {
    "source": "reasoning_gym:letter_counting",
    "kwargs": {"size": 8, "seed": 1, "max_words": 6, "instructions": "Say how many."},
}
WATCHING = {"function": "support.train_inputs:watching", "weight": 0.0}
DIGITS = {byte_tokenizer().convert_tokens_to_ids(str(digit)) for digit in range(10)}
TRAINER = {
    "max_steps": 2,
    # a model that has learned nothing says digits, so that some of its answers are right in part
    "generation_kwargs": {"suppress_tokens": sorted(set(range(258)) - DIGITS)},
}


def reward_folder(folder: Path) -> Path:
    made = byte_tokenizer()
    made.model_max_length = 512
    classifier(max_position_embeddings=512).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def letter_counts(batch: dict[str, Any]) -> list[float]:
    """What the task does: 1 for the answer itself, else its share of a text that has it."""
    answers = [json.loads(text)["answer"] for text in batch["entry"]]
    pairs = [(text.strip(), answer) for text, answer in zip(batch["completions"], answers, strict=True)]
    return [len(answer) / len(text) if answer in text else 0.0 for text, answer in pairs]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_a_task_a_model_and_a_function_are_weighted_and_logged_apart(tmp_path: Path) -> None:
    folder = reward_folder(tmp_path / "judge")
    rewards = [
        {"task": "letter_counting", "answer": "whole", "weight": 2.0},
        {"model": str(folder), "weight": -0.5, "batch_size": 3},
        WATCHING,
    ]
    train_inputs.seen.clear()
    assert main(["train", str(write_config(tmp_path, reward=rewards, data=LETTERS, trainer=TRAINER))]) == 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [entry for entry in logged if "loss" in entry]
    assert len(logged) == len(train_inputs.seen) == 2
    plain = LlamaForSequenceClassification.from_pretrained(folder)
    for entry, batch in zip(logged, train_inputs.seen, strict=True):
        texts = [p + c for p, c in zip(batch["prompts"], batch["completions"], strict=True)]
        judged = alone(plain, byte_tokenizer(), texts)[:, 0].tolist()
        counted = letter_counts(batch)
        assert entry["rewards/letter_counting/mean"] == pytest.approx(mean(counted), abs=1e-6)
        assert entry["rewards/judge/mean"] == pytest.approx(mean(judged), abs=1e-5)
        assert entry["rewards/watching/mean"] == 0.0
        assert entry["reward"] == pytest.approx(2.0 * mean(counted) - 0.5 * mean(judged), abs=1e-5)
    assert any(entry["rewards/letter_counting/mean"] > 0 for entry in logged)
    assert logged[0]["kl"] == 0.0 and logged[1]["kl"] > 0.0


@pytest.mark.parametrize("kind", ["task", "model"])
def test_one_alone_trains(kind: str, tmp_path: Path) -> None:
    reward = {"task": "letter_counting", "answer": "whole"}
    if kind == "model":
        reward = {"model": str(reward_folder(tmp_path / "judge")), "name": "taste"}
    path = write_config(tmp_path, reward=[reward], data=LETTERS, trainer=TRAINER)
    assert main(["train", str(path), "--samples.prompts", "0"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    name = {"task": "letter_counting", "model": "taste"}[kind]
    assert [e["reward"] for e in lines if "loss" in e] == [e[f"rewards/{name}/mean"] for e in lines if "loss" in e]


def test_in_a_script_trl_holds_no_reward_model(tmp_path: Path) -> None:
    """As a module it would be one more that a launcher wraps and a checkpoint may hold."""
    judge, task = RewardModel.load(str(reward_folder(tmp_path / "judge"))), TaskReward("letter_counting")
    run = parse_run([str(write_config(tmp_path, reward=[WATCHING, {"task": "letter_counting"}], data=LETTERS))])
    trainer = make_trainer(run, run.trainer_config(), load_data(run.config.data, "grpo"), [judge, task])
    assert trainer.reward_func_names == ["judge", "letter_counting"]
    before = {name: weight.clone() for name, weight in judge.model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in judge.model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in judge.model.parameters())
    assert not any(isinstance(reward, nn.Module) for reward in trainer.reward_funcs)
    held = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert held == sum(p.numel() for p in trainer.model.parameters())


WRONG: list[tuple[list[dict[str, Any]], str]] = [
    ([{}], "is a function, a model or a task, and it has none of them"),
    ([{"function": "a:b", "task": "gcd"}], "and it has function and task. Give one"),
    ([{"function": "a:b", "label": 1}], r"reward\.label has no use with reward\.function: it is for reward\.model"),
    ([{"model": "m", "answer": "whole"}], r"reward\.answer has no use with reward\.model: it is for reward\.task"),
    ([{"task": "gcd", "dtype": "bfloat16"}], r"reward\.dtype has no use with reward\.task: it is for reward\.model"),
    ([{"task": "gcd", "probability": False}], r"reward\.probability has no use with reward\.task"),
    ([{"model": "m", "probability": True}], r"set reward\.label to its name or number"),
    ([{"model": "m", "batch_size": 0}], r"reward\.batch_size must be at least 1, got 0"),
    ([{"model": "m", "max_length": -1}], r"reward\.max_length must be at least 1, got -1"),
    ([{"task": "gcd", "answer": "boxed"}], r"Unknown reward\.answer 'boxed'"),
    ([{"model": "my model"}], r"called 'my model' in the logs .*Set reward\.name"),
    ([{"model": ".."}], r"Set reward\.name"),
    ([{"function": "a:score"}, {"function": "b:score"}], "Two entries of `reward` are called 'score'"),
    ([{"task": "gcd"}, {"model": "runs/gcd"}], "are called 'gcd'.*Set reward.name"),
]


@pytest.mark.parametrize(("rewards", "message"), WRONG)
def test_nonsense_is_refused(rewards: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made = [RewardConfig(**reward) for reward in rewards]
        RunConfig(model=ModelConfig(path="m"), data=DataConfig(source="d.jsonl"), reward=made)


def test_names(tmp_path: Path) -> None:
    named = {"a.b:score": {"function": "a.b:score"}, "folder": {"model": "some/folder/"}, "gcd": {"task": "gcd"}}
    assert [RewardConfig(**given).settled().name for given in named.values()] == ["score", "folder", "gcd"]
    assert RewardConfig(model="a.b:made_folder").settled().name == "made_folder"
    assert RewardConfig(task="gcd", name="divisors").settled().name == "divisors"
    assert RewardConfig(task="gcd").settled().answer == "tagged" and RewardConfig(task="gcd").settled().name == "gcd"


def test_wrong_inputs_of_a_run_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for sections, message in (
        ({"reward": [{"task": "letter_counting"}]}, "with the column 'entry'"),
        ({"reward": [{"task": "letter_countin"}]}, "Did you mean 'letter_counting'"),
        ({"reward": [{"model": str(tmp_path / "model"), "name": "causal"}]}, "has no score.weight"),
        ({"data": {"source": "reasoning_gym:letter_counts", "kwargs": {}}}, "Did you mean 'letter_counting'"),
    ):
        assert main(["train", str(write_config(tmp_path, **sections))]) == 2
        assert message in capsys.readouterr().err


def test_help_of_an_entry(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["train", "--reward.help"])
    assert status.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--reward.label LABEL Label of the model that is the reward, by name or number, for `model`." in text
